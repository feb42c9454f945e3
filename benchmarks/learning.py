"""What the model learns, one change at a time: trainings through 03_train side by side on one GPU, and their tables.

    python -m benchmarks.learning --sets ablation grid union --at-once 6 --budget 1800
    python -m benchmarks.learning --report runs/learning-*     # only the tables

The data are made first, by 02_data: data/bc5cdr_iob/ner; data/union/ner of bc5cdr, bc2gm, jnlpba and anatem with
``corpus_cue=true``; for the set small data/anatem/ner, data/bc5cdr_50/ner (``max_per_corpus=50``), _200 and _800, and
the set begun before it. Each training is `python -m biomerge_lib run 03_train` with SmolLM2-135M, rank 8, learning rate
2e-3, 16 sentences a step, two epochs, token head and what its line below says. After --budget seconds none is started;
one that was cut off goes on when the command is given again. Writes reports/learning.json, .md and, for a grid, .svg.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from benchmarks.common import choose_names, run_side_by_side, train_command
from biomerge_lib.core.files import write_json
from biomerge_lib.core.parameters import watch_metric_of
from biomerge_lib.core.prompt_format import GONE_STYLES
from biomerge_lib.experiment.recorded import read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR
from biomerge_lib.report.display import markdown_table

REPORT = PROJECT_DIR / "reports" / "learning.json"
COMMON = (
    "model=smollm2_135m runtime=h200 data_dir=data/bc5cdr_iob/ner num_train_epochs=2 per_device_train_batch_size=16 "
    "per_device_eval_batch_size=256 num_workers=0 logging_steps=10"
)
AT_512 = "max_input_tokens=512"  # before 768 became the default
SOME = f"eval_limit=800 {AT_512}"  # of dev, evenly spread
START = f"{SOME} offset_anchors=start"
UNION = "data_dir=data/union/ner per_device_train_batch_size=32"
LONG = "num_train_epochs=6 early_stopping_patience=100"
QWEN = f"{SOME} model=qwen2_5_coder_1_5b per_device_eval_batch_size=128"
# Some 200 to 400 steps each, whatever the size of the corpus; dev is decoded once an epoch.
BUDGETS = {
    50: "num_train_epochs=8 per_device_train_batch_size=2",
    200: "num_train_epochs=5 per_device_train_batch_size=4",
    800: "num_train_epochs=4 per_device_train_batch_size=8",
}
SETS: dict[str, dict[str, str]] = {
    "headline": {f"seed {seed}": f"seed={seed}" for seed in (42, 43, 44)},
    "unsloth": {f"seed {seed}, unsloth": f"backend=unsloth seed={seed}" for seed in (42, 43, 44)},
    "start": {f"seed {seed}, start": f"offset_anchors=start seed={seed}" for seed in (42, 43, 44)},
    "padded": {
        f"seed {seed}, padded": f"{AT_512} seed={seed} packing=false step_launch=eager"
        for seed in (42, 43, 44)
    },
    "order": {
        f"seed {seed}, {name}": f"{AT_512} seed={seed} {changes}"
        for name, changes in (
            ("padded, not grouped", "packing=false step_launch=eager group_by_length=false"),
            ("packed, grouped", "group_by_length=true"),
            ("packed, eager", "step_launch=eager"),
        )
        for seed in (42, 43, 44)
    },
    "union": {"cue": f"{UNION} corpus_cue=true"},
    "ceiling": {
        "LoRA, 6 epochs": f"{SOME} {LONG}",
        "all weights, 2 epochs": f"{SOME} trainable=all learning_rate=3e-4",
        "all weights, 6 epochs": f"{SOME} trainable=all learning_rate=3e-4 {LONG}",
    },
    "ablation": {
        "start": START,
        "none": f"{SOME} offset_anchors=none",
        "start_colon": f"{SOME} offset_anchors=start_colon",
        "start_before_space": f"{SOME} offset_anchors=start_before_space",
        "start_end": f"{SOME} offset_anchors=start_end",
        "echo_start": f"{SOME} offset_anchors=echo_start",
        "echo_start_before_space": f"{SOME} offset_anchors=echo_start_before_space",
        "start, no head": f"{START} fast_metrics=false",
        "start, cue": f"{START} corpus_cue=true cue_dropout=0.0",
        "start, batch 32": f"{START} per_device_train_batch_size=32",
    },
    "grid": {
        f"rank {rank}, learning rate {rate}": f"{START} lora_rank={rank} learning_rate={rate}"
        for rank, rate in product((4, 8, 16), ("1e-3", "2e-3", "3e-3"))
    },
    "more": {
        "start, batch 8": f"{START} per_device_train_batch_size=8",
        "start, head weight 0.2": f"{START} head_loss_weight=0.2",
        "start, no dropout": f"{START} lora_dropout=0.0",
        "union, no cue": UNION,
    },
    "begun": {"anatem": "data_dir=data/anatem/ner eval_limit=400"},
    "small": {
        f"{size} sentences, {name}, seed {seed}": f"data_dir=data/bc5cdr_{size}/ner eval_limit=400 {BUDGETS[size]} "
        f"learning_rate=1e-3 logging_steps=5 eval_steps=25 save_steps=25 seed={seed}{begin}"
        for size in BUDGETS
        for name, begin in (
            ("fresh", ""),
            ("from AnatEM", " init_adapter=runs/learning-begun-anatem"),
        )
        for seed in (42, 43, 44)
    },
    "qwen": {anchors: f"{QWEN} offset_anchors={anchors}" for anchors in ("none", "start")},
}


def run_id(group: str, name: str) -> str:
    words = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in name)
    return f"learning-{group}-{'-'.join(filter(None, words.split('-')))}"


def run_all(sets: list[str], *, names: list[str], at_once: int, budget: float, extra: list[str]) -> None:
    """Train what is not finished, ``at_once`` side by side, in the sets' order; ``names`` are the only ones."""
    commands = {}
    for group, name, changes in ((g, n, c) for g in sets for n, c in SETS[g].items()):
        if name in names and name not in GONE_STYLES:  # their published runs keep their rows
            folder = run_id(group, name)
            commands[folder] = train_command(folder, *COMMON.split(), *changes.split(), *extra)
    run_side_by_side(commands, at_once=at_once, budget=budget)


def read_rows(folders: list[Path]) -> list[dict[str, Any]]:
    """What each finished run's ``metrics.json`` says."""
    ids = {run_id(group, name): (group, name) for group, names in SETS.items() for name in names}
    rows = []
    for folder in folders:
        found = read_metrics(folder)
        stage = found.get("stages", {}).get("03_train", {})
        if folder.name not in ids or stage.get("status") != "finished":
            continue
        metrics = stage["metrics"]
        group, name = ids[folder.name]
        rows.append(
            {
                "set": group,
                "name": name,
                "changes": SETS[group][name],
                "f1": metrics["greedy_dev_ner_f1"],
                "low": metrics["greedy_dev_ner_f1_low"],
                "high": metrics["greedy_dev_ner_f1_high"],
                "snapped_f1": metrics["greedy_dev_ner_f1_snapped"],
                "answer_f1": metrics.get("eval_answer_ner_f1"),
                "head_f1": metrics["eval_ner_f1"]
                if watch_metric_of(found["parameters"]) == "token_head"
                else metrics.get("eval_head_ner_f1"),
                "per_corpus": {
                    key.split("/")[1]: value
                    for key, value in metrics.items()
                    if key.startswith("greedy_dev_dataset/") and key.endswith("/ner_f1")
                },
                "sentences": metrics["greedy_dev_records"],
                "tokens_an_example": metrics["train_tokens_per_second"]
                / metrics["train_sentences_per_second"],
                "steps": metrics["steps"],
                "step_launch": metrics.get("step_launch"),
                "seconds": metrics["train_seconds"],
                "evaluation_share": round(evaluation_seconds(folder) / metrics["train_seconds"], 3),
                "peak_memory_gb": metrics.get("peak_memory_gb"),
                "trainable_parameters": metrics["trainable_parameters"],
                "device": stage["provenance"]["device"],
                "commit": stage["provenance"]["commit"],
            }
        )
    order = list(ids.values())
    return sorted(rows, key=lambda row: order.index((row["set"], row["name"])))


def evaluation_seconds(folder: Path) -> float:
    """Seconds of a training that went into scoring dev: with the token head and greedily."""
    history = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    return sum(entry.get("eval_runtime", 0) + entry.get("greedy_dev_seconds", 0) for entry in history)


def describe(rows: list[dict[str, Any]]) -> str:
    """The tables."""
    commits = ", ".join(f"`{commit[:12]}`" for commit in dict.fromkeys(row["commit"] for row in rows))
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    lines = [
        "# What the model learns, one change at a time",
        "",
        f"SmolLM2-135M, and Qwen2.5-Coder-1.5B in the set qwen, on {devices}, commit {commits};",
        "`python -m benchmarks.learning` says what all have in common. F1 of exact spans on dev (greedy answers), 95 %",
        "bootstrap interval. Tokens are of prompt and answer together. Trainings ran side by side on one card, so that",
        "seconds compare only roughly.",
    ]
    for group in dict.fromkeys(row["set"] for row in rows):
        lines += ["", f"## {group}", ""]
        lines += [
            "| training | changes | dev F1 | snapped to words | answer, forced | token head | sentences | tokens "
            "| steps | launch | s | of that scoring |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in (row for row in rows if row["set"] == group):
            answer, head = (
                "—" if row.get(name) is None else f"{row[name]:.3f}" for name in ("answer_f1", "head_f1")
            )
            lines.append(
                f"| {row['name']} | `{row['changes']}` | **{row['f1']:.3f}** [{row['low']:.3f}, {row['high']:.3f}] "
                f"| {row['snapped_f1']:.3f} | {answer} | {head} | {row['sentences']:,} "
                f"| {row['tokens_an_example']:.0f} | {row['steps']:,} | {row['step_launch']} | {row['seconds']:.0f} "
                f"| {row['evaluation_share']:.0%} |"
            )
            if row["per_corpus"]:
                parts = ", ".join(f"{name} {f1:.3f}" for name, f1 in sorted(row["per_corpus"].items()))
                lines += ["", f"{row['name']}, per corpus: {parts}.", ""]
        if group == "small":
            lines += ["", *describe_small([row for row in rows if row["set"] == group])]
        if group == "grid":
            lines += ["", "![F1 over rank and learning rate](learning.svg)"]
    return "\n".join(lines) + "\n"


def small_curves(rows: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Dev F1 of each seed by how training began and by the sentences that it had."""
    curves: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        size, name, _ = row["name"].split(", ")
        curves.setdefault(name, {}).setdefault(int(size.split()[0]), []).append(row["f1"])
    return curves


def describe_small(rows: list[dict[str, Any]]) -> list[str]:
    curves = small_curves(rows)
    sizes = sorted({size for curve in curves.values() for size in curve})
    table = [
        [
            name,
            *(
                f"**{mean(curve[size]):.3f}** ± {pstdev(curve[size]):.3f}" if size in curve else ""
                for size in sizes
            ),
        ]
        for name, curve in curves.items()
    ]
    head = ["training began", *(f"{size} sentences" for size in sizes)]
    note = "Mean and standard deviation over the seeds."
    return [note, "", markdown_table(head, table), "", "![F1 over the size of the corpus](small_corpus.svg)"]


def plot_small(rows: list[dict[str, Any]], path: Path) -> None:
    """Dev F1 over the sentences that a training had, a line for each way to begin, a point for each seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    curves = small_curves(rows)
    for (name, curve), marker in zip(curves.items(), "osD", strict=False):
        sizes = sorted(curve)
        (line,) = axes.plot(sizes, [mean(curve[size]) for size in sizes], marker=marker, label=name)
        for size in sizes:
            axes.scatter([size] * len(curve[size]), curve[size], s=8, color=line.get_color(), alpha=0.5)
    axes.set(xscale="log", xlabel="training sentences", ylabel="dev F1", ylim=(0, 1))
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def plot_grid(rows: list[dict[str, Any]], path: Path) -> None:
    """Dev F1 over rank and learning rate."""
    import matplotlib.pyplot as plt
    import numpy as np

    found = {tuple(row["name"].removeprefix("rank ").split(", learning rate ")): row["f1"] for row in rows}
    ranks, rates = (sorted({key[i] for key in found}, key=float) for i in (0, 1))
    values = np.array([[found.get((rank, rate), np.nan) for rate in rates] for rank in ranks])
    figure, axes = plt.subplots(figsize=(4.6, 3.4))
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        light = value < np.nanmean(values)
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="white" if light else "black")
    axes.set(xlabel="learning rate", ylabel="LoRA rank", xticks=range(len(rates)), yticks=range(len(ranks)))
    axes.set_xticklabels(rates)
    axes.set_yticklabels(ranks)
    figure.colorbar(image, label="dev F1")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="only these of the sets")
    parser.add_argument(
        "--at-once", type=int, default=6, help="trainings side by side (default: %(default)s)"
    )
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which none is started")
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="RUN", help="only write the tables of run folders"
    )
    parser.add_argument("extra", nargs="*", metavar="NAME=VALUE", help="parameters of all trainings")
    options = parser.parse_args()
    names = choose_names(parser, options, [name for group in options.sets for name in SETS[group]])
    if not options.report:
        run_all(
            options.sets,
            names=names,
            at_once=options.at_once,
            budget=options.budget,
            extra=options.extra,
        )
    rows = read_rows(options.report or sorted((PROJECT_DIR / "runs").glob("learning-*/")))
    if not options.report:  # those that were trained elsewhere keep their rows
        fresh = {(row["set"], row["name"]) for row in rows}
        kept = [row for row in json.loads(REPORT.read_text()) if (row["set"], row["name"]) not in fresh]
        order = [(group, name) for group, names in SETS.items() for name in names]
        rows = sorted(kept + rows, key=lambda row: order.index((row["set"], row["name"])))
    write_json(REPORT, rows)
    REPORT.with_suffix(".md").write_text(describe(rows), encoding="utf-8")
    grid = [row for row in rows if row["set"] == "grid"]
    if small := [row for row in rows if row["set"] == "small"]:
        plot_small(small, REPORT.with_name("small_corpus.svg"))
    if grid:
        plot_grid(grid, REPORT.with_suffix(".svg"))
    print(json.dumps([{key: row[key] for key in ("set", "name", "f1", "seconds")} for row in rows]))


if __name__ == "__main__":
    main()
