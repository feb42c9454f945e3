"""Knows the page of the training benchmark: its tables, its plot and the log of changes kept beside it.

rows of benchmarks.training_speed --[add_runs]--> reports/training_speed.{json,md,svg}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import write_report
from benchmarks.training_peers import PEERS
from biomerge_lib.experiment.runs import PROJECT_DIR
from biomerge_lib.report.display import markdown_table

CHANGES = PROJECT_DIR / "benchmarks" / "training_speed_log.md"
COLUMNS = {
    "way": "way",
    "batch": "sentences a step",
    "ms_a_step": "ms a step",
    "tokens_a_second": "real tokens/s",
    "sentences_a_second": "sentences/s",
    "useful_tflops": "useful TFLOP/s",
    "share_of_peak": "share of peak",
    "peak_memory_gb": "peak GB",
    "measured_steps": "measured steps",
    "first_steps_seconds": "first steps, s",
    "recompiles": "compiled anew",
    "first_loss": "first loss",
    "loss": "mean loss",
    "first_grad_norm": "first gradient norm",
    "grad_norm": "mean gradient norm",
}
EPOCH_COLUMNS = {
    "way": "way",
    "batch": "sentences a step",
    "epoch": "sentences",
    "epoch_seconds": "epoch, s",
    "build_seconds": "of which tokenising, s",
    "first_steps_seconds": "first steps, s",
    "import_seconds": "importing before it, s",
    "load_seconds": "loading before it, s",
}


def add_runs(path: Path, runs: list[dict[str, Any]], method: str) -> None:
    """Add runs to a report, each in the place of an earlier one of the same command, and write its page and plot."""
    kept = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    commands = {run["command"] for run in runs}
    kept = [run for run in kept if run["command"] not in commands] + runs
    write_report(path, {"runs": kept}, describe(kept, method))
    plot(kept, path.with_suffix(".svg"))


def describe(runs: list[dict[str, Any]], method: str) -> Iterator[str]:
    """The page's lines: method, each run's tables, and the log of changes."""
    yield from ("# How fast a training step is", "", method.strip(), "")
    yield from ("![tokens a second](training_speed.svg)", "")
    for run in runs:
        origin = run["provenance"]
        peak = f", matrix peak {run['matrix_peak_tflops']} TFLOP/s" if run["matrix_peak_tflops"] else ""
        yield from (f"## {Path(run['shape']).name}: {origin['device']}{peak}", "")
        yield from (f"`{run['command']}`, commit `{origin['commit'][:12]}`.", "")
        steps = [row for row in run["rows"] if "epoch" not in row]
        yield from (markdown_table(COLUMNS.values(), map(step_cells, steps)), "")
        for line in (*tell_how_busy(steps), *compare(steps)):
            yield from (line, "")
        if epochs := [row for row in run["rows"] if "epoch_seconds" in row]:
            yield from ("Whole epochs, measured (the corpus is repeated up to so many sentences):", "")
            rows = [[row[name] for name in EPOCH_COLUMNS] for row in epochs]
            yield from (markdown_table(EPOCH_COLUMNS.values(), rows), "")
    yield CHANGES.read_text(encoding="utf-8")


def step_cells(row: dict[str, Any]) -> list[Any]:
    cells = {name: row.get(name) for name in COLUMNS}
    if (parts := row.get("accumulate", 1)) > 1:
        cells["batch"] = f"{row['batch']} ({row['batch'] // parts} x {parts})"
    if "error" in row:
        cells["ms_a_step"] = f"failed: {row['error'].split('. ')[0]}"
    return list(cells.values())


def tell_how_busy(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each profiled row.

    >>> busy = {"busy_share": 0.897, "kernels_a_step": 5098, "profiled_ms": 223.3}
    >>> next(tell_how_busy([{"way": "packed", "batch": 32, "gpu_busy": busy}, {"way": "trl", "batch": 32}]))
    '32 sentences, packed: the GPU is busy for 90 % of a profiled step of 223.3 ms, with 5,098 kernels.'
    """
    for row in rows:
        if busy := row.get("gpu_busy"):
            yield (
                f"{row['batch']} sentences, {row['way']}: the GPU is busy for {busy['busy_share']:.0%} of a profiled "
                f"step of {busy['profiled_ms']} ms, with {busy['kernels_a_step']:,} kernels."
            ).replace("%", " %")


def compare(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each size of step: the best of this project's ways over the best peer.

    >>> speeds = {"packed": 9000, "trl": 6000, "brief": 1500}
    >>> next(compare([{"batch": 32, "way": way, "tokens_a_second": speed} for way, speed in speeds.items()]))
    '32 sentences: packed is 1.50 times as fast as the best peer (trl).'
    """
    done = [row for row in rows if "tokens_a_second" in row]
    for batch in dict.fromkeys(row["batch"] for row in done):
        speeds = {row["way"]: row["tokens_a_second"] for row in done if row["batch"] == batch}
        peers = [way for way in speeds if way in PEERS]
        ours = [way for way in speeds if way not in PEERS]
        if peers and ours:
            best, peer = (max(ways, key=speeds.__getitem__) for ways in (ours, peers))
            times = speeds[best] / speeds[peer]
            yield f"{batch} sentences: {best} is {times:.2f} times as fast as the best peer ({peer})."


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Real tokens a second over the sentences a step, a panel a run of several rows; bars for one size of step."""
    import matplotlib.pyplot as plt
    import pandas as pd

    shown = []
    for run in runs:
        rows = [row for row in run["rows"] if "tokens_a_second" in row and "epoch" not in row]
        if len(rows) > 1:
            speeds = pd.DataFrame(rows).pivot_table("tokens_a_second", "batch", "way", sort=False)
            shown.append((run, speeds.sort_index()))
    columns = max(1, min(2, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    size = (6 * columns, 4.2 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in grid.flat[len(shown) :]:
        panel.set_axis_off()
    for panel, (run, speeds) in zip(grid.flat, shown, strict=False):
        panel.grid(alpha=0.3)
        if len(speeds) == 1:
            bars = speeds.iloc[0].sort_values()
            colours = ["tab:orange" if way in PEERS else "tab:blue" for way in bars.index]
            panel.bar_label(panel.barh(bars.index, bars, color=colours), fmt="{:,.0f}", fontsize=8, padding=3)
            panel.margins(x=0.15)
            panel.set_xlabel(f"real tokens a second\n{speeds.index[0]} sentences a step; orange: peers")
        else:
            styles = ["o--" if way in PEERS else "o-" for way in speeds]
            speeds.plot(ax=panel, style=styles, logx=True, xlabel="sentences a step")
            panel.set_ylabel("real tokens a second (dashed: peers)")
            panel.set_xticks(speeds.index, speeds.index)
            panel.minorticks_off()
            panel.legend(fontsize=7)
        panel.set_title(f"{Path(run['shape']).name}, {run['provenance']['device']}")
    figure.savefig(path)
    plt.close(figure)
