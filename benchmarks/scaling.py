"""How the cost of training grows: with a step's sentences, their length, the model, the data, and points on one card.

    python -m benchmarks.scaling                                   # on one GPU
    python -m benchmarks.scaling --parts models --way fused
    python -m benchmarks.scaling --shapes tiny --way packed --parts models     # to try it on a CPU

- models: shapes with random weights, a process each (benchmarks/training_speed.py): import and compile side by side,
  then measure in turn 8, 32 and more sentences a step; 8B also the corpus's shorter and longer third, 135M epochs.
- sweep: 1, 4 and 8 trainings by 03_train side by side, of SmolLM2 where it is prepared, else of its shape. Speed is the
  sum of each one's over its steady steps; the seconds are those until the last has ended, start and scoring included.
- A node, by reports/several_gpus.json: a step as on two cards (what it took longer there than on one, the host's work,
  is assumed to stay), with a ring's all-reduce, 2 (n - 1) / n of the gradients' 84 MB over the bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import REPORTS, command, run_side_by_side, train_command, write_report
from benchmarks.random_llama import find_backbone
from benchmarks.several_gpus import COMMON, STEP, model_words, result_of
from benchmarks.training_speed import Way
from biomerge_lib.core.records import write_records
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance
from biomerge_lib.prompts.ner_span import read_split
from biomerge_lib.report.display import markdown_table

Row = dict[str, Any]
DATA, SMALL = "data/bc5cdr_iob/ner", PROJECT_DIR / "backbones" / "smollm2-135m"
LIMITS = {"steps": 12, "way_seconds": 2, "way_limit": 100, "epochs": [], "profile": None, "card_gb": None}
POINTS: dict[str, list[Row]] = {  # sentences a step; which third of them; sentences of a whole epoch
    "8b": [{"batch": n} for n in (32, 8, 64)] + [{"batch": 32, "third": n} for n in ("shorter", "longer")],
    "1.5b": [{"batch": n} for n in (32, 8, 128)],
    "135m": [{"batch": n} for n in (32, 8, 128)] + [{"batch": 32, "epoch": n} for n in (1000, 4560)],
    "tiny": [{"batch": 2}, {"batch": 4}, {"batch": 4, "third": "shorter"}],
}
SWEEP = "merge=false logging_steps=50 per_device_train_batch_size=16 subsample=0.4 step_launch=graphed"
KEY = ["part", "shape", "way", "batch", "third", "epoch", "trainings"]
SPEED = ["ms_a_step", "tokens_a_step", "tokens_a_second", "sentences_a_second", "loss", "seconds", "error"]


def measure_models(shapes: list[str], way: str) -> Iterator[Row]:
    records = sorted(read_split(DATA, "train"), key=lambda record: len(record.text))
    write_records("runs/scaling/shorter/train.jsonl", records[: len(records) // 3])
    write_records("runs/scaling/longer/train.jsonl", records[-len(records) // 3 :])
    ways = {}
    for shape in shapes:
        runs = [r | {"data_dir": f"runs/scaling/{r['third']}"} if "third" in r else r for r in POINTS[shape]]
        own = {"backbone": str(find_backbone(shape, weightless=True)), "data_dir": DATA, "runs": runs}
        own |= {"ways": shapes, "batches": [max(run["batch"] for run in runs)]}
        ways[shape] = Way("packed+graphed" if shape == "135m" else way, LIMITS | own)
    for process in ways.values():
        process.wait_for_imports()
    for shape, process in ways.items():
        for row in process.measure():
            yield {"part": "models", "shape": shape, "seconds": row.get("epoch_seconds")} | row


def measure_sweep(counts: list[int], deadline: float) -> Iterator[Row]:
    shape = "smollm2" if (SMALL / "config.json").is_file() else "135m"
    words = [*COMMON.split(), *model_words(shape), f"data_dir={DATA}", *SWEEP.split()]
    for count in counts:
        row: Row = {"part": "sweep", "shape": shape, "trainings": count}
        names = [f"scaling-{count}-{place}" for place in range(count)]
        commands = {name: train_command(name, *words, f"seed={seed}") for seed, name in enumerate(names)}
        begun, left = time.perf_counter(), deadline - time.perf_counter()
        if left < 40 or run_side_by_side(commands, at_once=count, budget=left, stop=left):
            yield row | {"error": f"not finished within {left:.0f} s (runs/scaling-{count}-*.log)"}
            continue
        row["seconds"] = round(time.perf_counter() - begun, 1)
        found = [result_of(name) for name in names]
        row["tokens_a_second"] = round(sum(run["metrics"]["steady_tokens_per_second"] for run in found))
        yield row | {"loss": round(statistics.fmean(run["losses"][-1] for run in found), 4)}


def node_of(speed: list[Row], cards: int, gb_s: float | None = None) -> list[float]:
    """Milliseconds of all-reduce and step, tokens a second and share of the ideal; ``gb_s`` replaces the bandwidth."""
    one, two = ({row["cards"]: row for row in speed}[count] for count in (1, 2))
    all_reduce = 2 * (cards - 1) / cards * (84 / gb_s if gb_s else two["all_reduce_ms"])
    step = two["step_ms"] - two["all_reduce_ms"] + all_reduce
    tokens = cards / 2 * two["tokens_a_second"] * two["step_ms"] / step
    share = tokens / cards / one["tokens_a_second"]
    return [round(all_reduce, 2), round(step, 1), round(tokens), round(share, 3)]


def lines_of(rows: list[Row]) -> Iterator[tuple[str, list[Row], float, float]]:
    """A shape's steps of the corpus's sentences, and the line through them: ms of any step, and of 1,000 tokens."""
    for shape in POINTS:
        own = [row for row in rows if row["shape"] == shape and not {"third", "epoch"} & set(row)]
        steps = sorted((row for row in own if "ms_a_step" in row), key=lambda row: row["tokens_a_step"])
        if len(steps) > 1:
            ends = ([row[name] for row in steps] for name in ("tokens_a_step", "ms_a_step"))
            slope, fixed = statistics.linear_regression(*ends)
            yield shape, steps, round(fixed, 1), round(1e3 * slope, 2)


def describe(rows: list[Row], speed: list[Row]) -> Iterator[str]:
    """The page's lines: what was measured, and apart from it what is extrapolated."""
    yield from ("# How the cost of training grows", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "")
    yield from ("![dots are measured, dashed lines extrapolated](scaling.svg)", "", "## Measured", "")
    for said in dict.fromkeys((row["command"], row["device"], row["commit"][:12]) for row in rows):
        yield "`{}`, {}, commit `{}`.\n".format(*said)
    yield markdown_table(
        [name.replace("_", " ") for name in KEY + SPEED], [map(row.get, KEY + SPEED) for row in rows]
    )
    yield f"\n## Extrapolated\n\nBy the line through a shape's measured steps; {STEP} sentences a step, no start:\n"
    heads = ("shape", "ms of any step", "ms of 1,000 tokens", "32,000 sentences, s", "100,000 sentences, s")
    cells: list[list[Any]] = []
    for shape, steps, fixed, slope in lines_of(rows):
        tokens = STEP * steps[-1]["tokens_a_second"] / steps[-1]["sentences_a_second"]
        seconds = [round(size / STEP * (fixed + slope * tokens / 1e3) / 1e3) for size in (32_000, 100_000)]
        cells.append([shape, fixed, slope, *seconds])
    yield markdown_table(heads, cells)
    yield "\nEight cards, 8B, 32 sentences a card and step, by the bandwidth between them:\n"
    cells = [["as between the two", *node_of(speed, 8)], ["25 GB/s", *node_of(speed, 8, 25)]]
    yield markdown_table(("bandwidth", "all-reduce, ms", "step, ms", "tokens/s", "of the ideal"), cells)


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (step, length, beside) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for shape, steps, fixed, slope in lines_of(rows):
        tokens = [row["tokens_a_step"] for row in steps]
        step.loglog(tokens, [row["ms_a_step"] for row in steps], "o")
        step.annotate(shape, (tokens[-1], steps[-1]["ms_a_step"]))
        wide = [tokens[0] / 2, *tokens, 4 * tokens[-1]]
        step.plot(wide, [fixed + slope * n / 1e3 for n in wide], "--", color=step.lines[-1].get_color())
    for row in rows:
        if "trainings" in row and "loss" in row:
            beside.plot(row["trainings"], row["tokens_a_second"], "o", color="tab:blue")
        elif row["shape"] == "8b" and row["batch"] == STEP and "loss" in row:
            length.plot(row["tokens_a_step"] / STEP, row["tokens_a_second"], "o", color="tab:blue")
    step.set(xlabel="tokens a step", ylabel="ms a step")
    length.set(xlabel="tokens a sentence (8b, 32 a step)", ylabel="tokens a second", ylim=(0, None))
    beside.set(xlabel="trainings side by side on one card", ylabel="tokens a second in all", ylim=(0, None))
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="*", default=["models", "sweep"], help="none: only the page anew")
    parser.add_argument("--shapes", nargs="+", default=["8b", "1.5b", "135m"], choices=[*POINTS])
    parser.add_argument("--way", default="packed+compiled", help="of benchmarks.training_speed (%(default)s)")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8, 4], help="trainings side by side")
    parser.add_argument("--budget", type=float, default=250, help="seconds, which the sweep's part heeds")
    parser.add_argument("--out", type=Path, default=REPORTS / "scaling.json", help="rows, then a page")
    options = parser.parse_args()
    sweep = measure_sweep(options.counts, time.perf_counter() + options.budget)
    measured = {"models": measure_models(options.shapes, options.way), "sweep": sweep}
    speed = json.loads((REPORTS / "several_gpus.json").read_text(encoding="utf-8"))["speed"]
    rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.is_file() else []
    for row in (row for part in options.parts for row in measured[part]):
        print(json.dumps(row), flush=True)
        rows = [old for old in rows if any(old.get(name) != row.get(name) for name in KEY)]
        rows.append(row | {"command": command("scaling"), **provenance()})
        write_report(options.out, {"rows": rows}, describe(rows, speed))
    write_report(options.out, {"rows": rows}, describe(rows, speed))
    plot(rows, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
