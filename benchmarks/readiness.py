"""Whether an 8B fits: train, decode, merge and reload a Llama-3-8B shape with random weights through 03 and 04.

    python -m benchmarks.readiness                      # one GPU; 50 GB of disk: backbone and two merged models
    python -m benchmarks.readiness --shape tiny         # the same way on a CPU, to try it
    python -m benchmarks.readiness --start --threads    # what people wait for on a laptop (benchmarks/start.py)

The brief's batch (8 x 4), LoRA r = 8 and token head on the real Llama-3 tokenizer, with and without gradient
checkpointing, side by side. Writes reports/readiness.json and reports/readiness.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from benchmarks.common import REPORTS, command, read_log, write_report
from benchmarks.random_llama import SHAPES, TOKENIZER_DIR, find_backbone
from benchmarks.start import compare_starts, compare_threads
from biomerge_lib.experiment.recorded import read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance
from biomerge_lib.report.display import markdown_table

CARDS_GB = {"A100 48 GB": 48, "A100 80 GB": 80, "H100 94 GB": 94}
BESIDE_PEAK_GB = 3  # CUDA's own context, libraries and the allocator's gaps


def notebook(name: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "biomerge_lib", "run", name, *arguments], cwd=PROJECT_DIR)


def run_notebooks(shape: str) -> None:
    """Run 03 twice side by side, then 04 on the first that finished: both merged models have the same shape."""
    find_backbone(shape)
    common = (
        "model=lora_ner_unsloth runtime=a100 backend=peft wandb_mode=disabled num_workers=0 existing_run=replace "
        f"backbone=random/llama3-{shape} tokenizer_dir={TOKENIZER_DIR.relative_to(PROJECT_DIR)} corpora=[sample] "
        "data_dir=data/readiness/ner subsample=0.2 num_train_epochs=1 "
        "eval_limit=16 per_device_eval_batch_size=16 logging_steps=1"
    ).split()
    if not (PROJECT_DIR / "data" / "readiness" / "ner" / "data_card.json").is_file():
        notebook("02_data", *common, "run_id=readiness-data").wait()
    started = {
        name: notebook("03_train", *common, f"run_id={name}", f"gradient_checkpointing={value}")
        for name, value in run_names(shape).items()
    }
    finished = [name for name, process in started.items() if process.wait() == 0]
    if finished:
        notebook("04_greedy_dev", f"run_id={finished[0]}").wait()


def run_names(shape: str) -> dict[str, str]:
    return {f"readiness-{shape}-checkpointing": "true", f"readiness-{shape}-plain": "false"}


def read_run(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run's ``metrics.json`` says, and where it was trained."""
    run = PROJECT_DIR / "runs" / name
    stages = read_metrics(run).get("stages", {})
    training, decoded = stages.get("03_train", {}), stages.get("04_greedy_dev", {}).get("status")
    metrics = training.get("metrics", {})
    losses = [round(entry["loss"], 4) for entry in read_log(run) if "loss" in entry] or [None]
    return {
        "batch": "8 x 4",
        "status": training.get("status"),
        "steps": metrics.get("steps"),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_memory_gb": metrics.get("peak_memory_gb"),
        "fits": fitting_cards(metrics.get("peak_memory_gb")),
        "trainable_parameters": metrics.get("trainable_parameters"),
        "merge_max_logit_difference": metrics.get("merge_max_logit_difference"),
        "reloaded_and_decoded_by_04": (decoded or "not tried").replace("running", "cut off"),
    }, training.get("provenance") or provenance()


def fitting_cards(peak_gb: float | None) -> str:
    """The cards whose memory holds a peak and what CUDA needs beside it.

    >>> fitting_cards(58.2)
    'A100 80 GB, H100 94 GB'
    """
    if not peak_gb:
        return "not measured"
    fitting = [name for name, memory in CARDS_GB.items() if peak_gb + BESIDE_PEAK_GB <= memory]
    return ", ".join(fitting) or "none of these"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument(
        "--report", action="store_true", help="only write the table of the runs that are there"
    )
    parser.add_argument("--start", action="store_true", help="reports/start.md instead (benchmarks/start.py)")
    parser.add_argument("--threads", action="store_true", help="reports/threads.md instead")
    parser.add_argument("--sentences", type=int, default=8, help="of each process of --threads (%(default)s)")
    parser.add_argument("--beside", metavar="PYTHON", help="interpreter with GLiNER and spaCy, for --start")
    options = parser.parse_args()
    if options.start or options.threads:
        if options.start:
            compare_starts(options.beside)
        if options.threads:
            compare_threads(options.sentences)
        return
    if not options.report:
        run_notebooks(options.shape)
    rows = []
    for name, checkpointing in run_names(options.shape).items():
        row, where = read_run(name)
        rows.append({"gradient_checkpointing": checkpointing == "true", **row})
    page = [
        f"# A Llama-3 of shape {options.shape}, random weights, trained, merged and reloaded",
        "",
        f"Written by `{command('readiness')}` on {where['device']}, "
        f"commit `{where['commit'][:12]}`. Both trainings ran side by side; memory is each "
        f"process's peak, and a card fits that has {BESIDE_PEAK_GB} GB beside it, of {', '.join(CARDS_GB)}.",
        "",
        markdown_table(rows[0], [row.values() for row in rows]),
    ]
    report = {"shape": options.shape, "provenance": where, "runs": rows}
    write_report(REPORTS / "readiness.json", report, page)


if __name__ == "__main__":
    main()
