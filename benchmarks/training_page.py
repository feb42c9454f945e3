"""Knows the page of the training benchmark: its tables, its plot and the log of changes kept beside it.

rows of benchmarks.training_speed --[add_runs]--> reports/training_speed.{json,md,svg}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.training_peers import PEERS
from biomerge_lib.core.files import write_json
from biomerge_lib.experiment.runs import PROJECT_DIR

CHANGES = PROJECT_DIR / "benchmarks" / "training_speed_log.md"
CORPUS_SIZES = (1_000, 4_560, 32_000)  # a small corpus, BC5CDR's training sentences, the union's
COLUMNS = {
    "way": "way",
    "batch": "sentences a step",
    "anchors": "anchors",
    "ms_a_step": "ms a step",
    "tokens_a_second": "real tokens/s",
    "sentences_a_second": "sentences/s",
    "useful_tflops": "useful TFLOP/s",
    "share_of_peak": "share of peak",
    "peak_memory_gb": "peak GB",
    "measured_steps": "measured steps",
    "first_steps_seconds": "first steps, s",
    "recompiles": "compiled anew",
}


def add_runs(path: Path, runs: list[dict[str, Any]], method: str) -> None:
    """Add runs to a report, each in the place of an earlier one of the same command, and write its page and plot."""
    kept = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    commands = {run["command"] for run in runs}
    kept = [run for run in kept if run["command"] not in commands] + runs
    write_json(path, {"runs": kept})
    path.with_suffix(".md").write_text(describe(kept, method), encoding="utf-8")
    plot(kept, path.with_suffix(".svg"))


def describe(runs: list[dict[str, Any]], method: str) -> str:
    """The page: method, each run's tables, and the log of changes."""
    lines = ["# How fast a training step is", "", method.strip(), ""]
    lines += ["![tokens a second](training_speed.svg)", ""]
    for run in runs:
        origin = run["provenance"]
        peak = f", matrix peak {run['matrix_peak_tflops']} TFLOP/s" if run["matrix_peak_tflops"] else ""
        lines += [
            f"## {Path(run['shape']).name}: {origin['device']}{peak}",
            "",
            f"`{run['command']}`, commit `{origin['commit'][:12]}`.",
            "",
        ]
        steps = [row for row in run["rows"] if "epoch" not in row]
        lines += [*table(list(COLUMNS.values()), [step_cells(row) for row in steps]), ""]
        lines += tell_how_busy(steps) + compare(steps) + tabulate_epochs(run["rows"]) + estimate_epochs(steps)
    return "\n".join([*lines, CHANGES.read_text(encoding="utf-8")])


def table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def step_cells(row: dict[str, Any]) -> list[Any]:
    cells = [
        f"{row.get(name, ''):,}" if name == "tokens_a_second" and name in row else row.get(name, "")
        for name in COLUMNS
    ]
    if row.get("accumulate", 1) > 1:
        cells[1] = f"{row['batch']} ({row['batch'] // row['accumulate']} x {row['accumulate']})"
    if "error" in row:
        cells[3] = f"failed: {row['error'].split('. ')[0]}"
    return cells


def tell_how_busy(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each profiled row.

    >>> busy = {"busy_share": 0.897, "kernels_a_step": 5098, "profiled_ms": 223.3}
    >>> tell_how_busy([{"way": "packed", "batch": 32, "gpu_busy": busy}, {"way": "trl", "batch": 32}])[0]
    '32 sentences, packed: the GPU is busy for 90 % of a profiled step of 223.3 ms, with 5,098 kernels.'
    """
    lines = []
    for row in rows:
        busy = row.get("gpu_busy")
        if busy:
            lines += [
                f"{row['batch']} sentences, {row['way']}: the GPU is busy for {100 * busy['busy_share']:.0f} % of a "
                f"profiled step of {busy['profiled_ms']} ms, with {busy['kernels_a_step']:,} kernels.",
                "",
            ]
    return lines


def compare(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each size of step: the best of this project's ways over the best peer.

    >>> speeds = {"packed": 9000, "trl": 6000, "brief": 1500}
    >>> step = {"batch": 32, "anchors": "start"}
    >>> compare([step | {"way": way, "tokens_a_second": speed} for way, speed in speeds.items()])[0]
    '32 sentences, anchors start: packed is 1.50 times as fast as the best peer (trl).'
    """
    lines = []
    for batch, anchors in dict.fromkeys((row["batch"], row["anchors"]) for row in rows):
        done = [
            row
            for row in rows
            if (row["batch"], row["anchors"]) == (batch, anchors) and "tokens_a_second" in row
        ]
        peers = [row for row in done if row["way"] in PEERS]
        ours = [row for row in done if row["way"] not in PEERS]
        if peers and ours:
            best, peer = (max(ways, key=lambda row: row["tokens_a_second"]) for ways in (ours, peers))
            times = best["tokens_a_second"] / peer["tokens_a_second"]
            lines += [
                f"{batch} sentences, anchors {anchors}: {best['way']} is {times:.2f} times as fast as the best peer "
                f"({peer['way']}).",
                "",
            ]
    return lines


def tabulate_epochs(rows: list[dict[str, Any]]) -> list[str]:
    """Whole epochs that were trained."""
    epochs = [row for row in rows if "epoch_seconds" in row]
    if not epochs:
        return []
    header = ["way", "sentences a step", "sentences", "epoch, s", "of which tokenising, s", "first steps, s"]
    header += ["import + load before it, s"]
    cells = [
        [
            row["way"],
            row["batch"],
            f"{row['epoch']:,}",
            row["epoch_seconds"],
            row["build_seconds"],
            row["first_steps_seconds"],
            round(row["import_seconds"] + row["load_seconds"], 1),
        ]
        for row in epochs
    ]
    return [
        "Whole epochs, measured (the corpus is repeated up to so many sentences):",
        "",
        *table(header, cells),
        "",
    ]


def epoch_seconds(row: dict[str, Any], sentences: int) -> float:
    """An epoch's seconds with start-up, derived from a row's parts.

    >>> row = {"import_seconds": 10, "load_seconds": 5, "build_seconds": 2, "sentences": 1000, "first_steps_seconds": 4}
    >>> epoch_seconds(row | {"warm_steps": 3, "batch": 32, "sentences_a_second": 100}, 2000)
    42.04
    """
    behind = max(sentences - row["warm_steps"] * row["batch"], 0)
    startup = row["import_seconds"] + row["load_seconds"]
    tokenising = row["build_seconds"] * sentences / row["sentences"]
    return round(startup + tokenising + row["first_steps_seconds"] + behind / row["sentences_a_second"], 2)


def estimate_epochs(rows: list[dict[str, Any]]) -> list[str]:
    """An epoch's seconds over the corpus's size, derived from the steps that were measured."""
    rows = [row for row in rows if "warm_steps" in row]
    if not rows:
        return []
    header = ["way", "sentences a step", *(f"{size:,} sentences, s" for size in CORPUS_SIZES)]
    cells = [
        [row["way"], row["batch"], *(round(epoch_seconds(row, size)) for size in CORPUS_SIZES)]
        for row in rows
    ]
    return [
        "One epoch over the corpus's size, derived, not measured: imports (while the other ways imported too), "
        "loading, tokenising by the sentence, the first steps, and the remaining sentences at the measured rate. No "
        "evaluation, no checkpoint.",
        "",
        *table(header, cells),
        "",
    ]


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Real tokens a second over the sentences a step, a panel a run of several rows; bars for one size of step."""
    import matplotlib.pyplot as plt

    found = [
        (run, [row for row in run["rows"] if "tokens_a_second" in row and "epoch" not in row]) for run in runs
    ]
    shown = [(run, rows) for run, rows in found if len(rows) > 1]
    columns = max(1, min(2, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    figure, grid = plt.subplots(lines, columns, figsize=(6 * columns, 4.2 * lines), squeeze=False)
    panels = grid.flatten().tolist()
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel, (run, rows) in zip(panels, shown, strict=False):
        batches = sorted({row["batch"] for row in rows})
        label = "{way}" if len({row["anchors"] for row in rows}) == 1 else "{way}, {anchors}"
        panel.set_title(f"{Path(run['shape']).name}, {run['provenance']['device']}")
        panel.grid(alpha=0.3)
        if len(batches) == 1:
            rows.sort(key=lambda row: row["tokens_a_second"])
            colours = ["tab:orange" if row["way"] in PEERS else "tab:blue" for row in rows]
            bars = panel.barh(
                [label.format(**row) for row in rows],
                [row["tokens_a_second"] for row in rows],
                color=colours,
            )
            panel.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=3)
            panel.margins(x=0.15)
            panel.set(xlabel=f"real tokens a second\n{batches[0]} sentences a step; orange: peers")
            continue
        for way, anchors in dict.fromkeys((row["way"], row["anchors"]) for row in rows):
            points = sorted(
                (row["batch"], row["tokens_a_second"])
                for row in rows
                if (row["way"], row["anchors"]) == (way, anchors)
            )
            panel.plot(
                *zip(*points, strict=True),
                marker="o",
                linestyle="--" if way in PEERS else "-",
                label=label.format(way=way, anchors=anchors),
            )
        panel.set(xscale="log", xlabel="sentences a step", ylabel="real tokens a second (dashed: peers)")
        panel.set_xticks(batches, batches)
        panel.minorticks_off()
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
