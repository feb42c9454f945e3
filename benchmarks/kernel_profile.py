"""Knows where a profiled step's time goes: its kernels by time, what each achieves, and the time without any.

trace of torch.profiler (record_shapes) --[summarise]--> a dictionary --[describe_kernels]--> lines of a page

A kernel stands with the operator that launched it and the operator's shapes. Products have TFLOP/s by these; all have
GB/s, as if each tensor of the operator were read or written once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any

from biomerge_lib.report.display import markdown_table

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
BYTES = {
    **{"c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "bool": 1},
    **{"unsigned char": 1, "signed char": 1, "int": 4, "long int": 8, "long": 8},
}
# Where the first factor stands.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}


def summarise(trace: dict[str, Any], steps: int) -> dict[str, Any]:
    """Milliseconds a step of ``steps`` profiled ones: busy, idle, the longest gaps, and kernels by their sum."""
    events = trace["traceEvents"]
    operators = {
        event["args"]["External id"]: event
        for event in events
        if event.get("cat") in ("cpu_op", "user_annotation") and "External id" in event.get("args", {})
    }
    kernels = sorted((e for e in events if e.get("cat") in ON_GPU), key=lambda event: event["ts"])
    gaps, busy_until = [], kernels[0]["ts"]
    for kernel in kernels:
        if kernel["ts"] > busy_until:
            gaps.append((kernel["ts"] - busy_until, kernel["name"]))
        busy_until = max(busy_until, kernel["ts"] + kernel["dur"])
    span = busy_until - kernels[0]["ts"]
    idle = sum(gap for gap, _ in gaps)
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for kernel in kernels:
        operator = operators.get(kernel.get("args", {}).get("External id"), {})
        shapes = [dims for dims in operator.get("args", {}).get("Input Dims", []) if dims]
        groups[kernel["name"], f"{operator.get('name', '')} {shapes}"].append((kernel, operator))
    rows = [_row(name, found, steps) for (name, _), found in groups.items()]
    return {
        "steps": steps,
        "ms_a_step": round(span / steps / 1e3, 2),
        "busy_ms": round((span - idle) / steps / 1e3, 2),
        "idle_ms": round(idle / steps / 1e3, 2),
        "kernels_a_step": len(kernels) // steps,
        "longest_gaps_ms": [
            {"ms": round(gap / 1e3, 3), "before": name[:80]} for gap, name in sorted(gaps, reverse=True)[:10]
        ],
        "kernels": sorted(rows, key=lambda row: -row["ms"]),
    }


def _row(name: str, found: list[Any], steps: int) -> dict[str, Any]:
    seconds = sum(kernel["dur"] for kernel, _ in found) / 1e6
    operator = found[0][1]
    arguments = operator.get("args", {})
    dims, types = arguments.get("Input Dims", []), arguments.get("Input type", [])
    row = {
        "ms": round(seconds * 1e3 / steps, 3),
        "count": round(len(found) / steps, 1),
        "kernel": name[:100],
        "operator": operator.get("name", ""),
        "shapes": [list(shape) for shape in dims if shape],
    }
    try:
        tensors = zip(dims, types, strict=False)
        moved = sum(prod(shape) * BYTES.get(kind, 0) for shape, kind in tensors if shape)
        row["gb_s"] = round(moved * len(found) / seconds / 1e9)
        if (first := PRODUCTS.get(row["operator"])) is not None:
            left, right = dims[first : first + 2]
            row["tflop_s"] = round(2 * prod(left) * right[-1] * len(found) / seconds / 1e12, 1)
    except (TypeError, IndexError, ValueError, ZeroDivisionError):
        pass  # lists of tensors, or nothing recorded
    return row


def describe_kernels(title: str, found: dict[str, Any], most: int = 60) -> Iterator[str]:
    """The page's lines of a summary."""
    yield from (f"# {title}", "")
    yield (
        f"{found['ms_a_step']} ms a profiled step: a kernel runs for {found['busy_ms']} ms, none for "
        f"{found['idle_ms']} ms; {found['kernels_a_step']:,} kernels a step."
    )
    if "host_ms" in found:
        yield f"Without the profiler the host is done with launching a step after {found['host_ms']} ms."
    yield ""
    columns = ("ms", "count", "gb_s", "tflop_s", "operator", "shapes", "kernel")
    cells = [[row.get(name, "") for name in columns] for row in found["kernels"][:most]]
    yield markdown_table(("ms a step", "times", "GB/s", "TFLOP/s", "operator", "shapes", "kernel"), cells)
    yield ""
    gaps = [[gap["ms"], gap["before"]] for gap in found["longest_gaps_ms"]]
    yield markdown_table(("longest gaps, ms", "before"), gaps)
