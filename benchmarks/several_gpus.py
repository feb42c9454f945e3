"""Whether several processes train what one does: torchrun alone and with both DeepSpeed files, through 03_train.

    python -m benchmarks.several_gpus                     # two GPUs (NCCL), or two processes on a CPU (gloo)
    python -m benchmarks.several_gpus --shape 8b          # the same with a Llama-3-8B shape of random weights
    python -m benchmarks.several_gpus --report            # only the table of the runs that are there

Each training takes the same 32 sentences a step in the same order, without dropout and at a low learning rate, so that
its losses can be laid beside those of one process (at a high one, rounding soon leads them apart). They run side by
side: seconds say little. Writes reports/several_gpus.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.readiness import TOKENIZER_DIR, read_log
from benchmarks.training_speed import find_backbone
from biomerge_lib.core.files import write_json
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance, read_metrics

REPORT = PROJECT_DIR / "reports" / "several_gpus.json"
STEP = 32  # sentences
COMMON = (
    "runtime=h200 backend=peft lora_dropout=0 learning_rate=1e-4 step_launch=eager num_train_epochs=1 eval_limit=8 "
    "max_target_tokens=64 max_new_tokens=64 logging_steps=1 num_workers=0 wandb_mode=disabled existing_run=replace"
)
WAYS: dict[str, tuple[int, str | None]] = {
    "one process": (1, None),
    "torchrun": (2, None),
    "DeepSpeed ZeRO-2": (2, "parameters/deepspeed/zero2_offload.json"),
    "DeepSpeed ZeRO-3": (2, "parameters/deepspeed/zero3_offload.json"),
    "DeepSpeed ZeRO-3 alone": (1, "parameters/deepspeed/zero3_offload.json"),
}
MODELS = {"smollm2": "model=smollm2_135m subsample=0.05", "8b": "model=lora_ner_unsloth subsample=0.05"}


def run_id(shape: str, way: str) -> str:
    return f"several-gpus-{shape}-{way.lower().replace(' ', '-')}"


def start(shape: str, way: str, extra: list[str]) -> subprocess.Popen:
    """One training through 03_train, its output in runs/<run_id>.log."""
    processes, file = WAYS[way]
    words = [*MODELS[shape].split(), *COMMON.split(), f"per_device_train_batch_size={STEP // processes}"]
    words += [f"num_processes={processes}", *([f"deepspeed={file}"] if file else [])]
    if shape == "8b":
        folder = find_backbone(shape).relative_to(PROJECT_DIR)
        words += [f"backbone={folder}", f"tokenizer_dir={TOKENIZER_DIR.relative_to(PROJECT_DIR)}"]
    name = run_id(shape, way)
    log = PROJECT_DIR / "runs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "biomerge_lib", "run", "03_train", *words, *extra, f"run_id={name}"]
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=PROJECT_DIR)


def read_rows(shapes: list[str]) -> list[dict[str, Any]]:
    """What the runs say of their losses, beside those of one process."""
    rows = []
    for shape in shapes:
        first = next(way for way in WAYS if read_losses(shape, way))
        alone = read_losses(shape, first)
        for way, (processes, _) in WAYS.items():
            folder = PROJECT_DIR / "runs" / run_id(shape, way)
            losses = read_losses(shape, way)
            stage = read_metrics(folder).get("stages", {}).get("03_train", {})
            trained = folder / "training.json"
            metrics = json.loads(trained.read_text(encoding="utf-8")) if trained.is_file() else {}
            apart = [abs(ours / theirs - 1) for ours, theirs in zip(losses, alone, strict=False)]
            rows.append(
                {
                    "model": shape,
                    "way": way,
                    "processes": processes,
                    "status": stage.get("status", "not tried").replace("running", "cut off"),
                    "steps": len(losses),
                    "first_loss": losses[0] if losses else None,
                    "last_loss": losses[-1] if losses else None,
                    "largest_relative_difference": max(apart) if apart and way != first else None,
                    "dev_f1": metrics.get("greedy_dev_ner_f1"),
                    "peak_memory_gb": metrics.get("peak_memory_gb"),
                    "train_seconds": metrics.get("train_seconds"),
                    "greedy_seconds": next(
                        (
                            entry["greedy_dev_seconds"]
                            for entry in read_log(folder)
                            if "greedy_dev_seconds" in entry
                        ),
                        None,
                    ),
                    "provenance": stage.get("provenance"),
                }
            )
    return rows


def read_losses(shape: str, way: str) -> list[float]:
    """Of the optimiser steps of a run that has finished training.

    Without the last step: what is left for it is dealt out evenly, some sentences twice.
    """
    log = read_log(PROJECT_DIR / "runs" / run_id(shape, way))
    return [entry["loss"] for entry in log if "loss" in entry][:-1]


def describe(rows: list[dict[str, Any]]) -> str:
    found = [row["provenance"] for row in rows if row["provenance"]] or [provenance()]
    devices = ", ".join(dict.fromkeys(where["device"] for where in found))
    commits = ", ".join(dict.fromkeys(f"`{where['commit'][:12]}`" for where in found))
    lines = [
        "# Several GPUs: torchrun and DeepSpeed beside one process",
        "",
        f"`python -m benchmarks.several_gpus`, {devices}, commit {commits}, "
        f"torch {found[0]['versions'].get('torch')}, DeepSpeed {found[0]['versions'].get('deepspeed')}. "
        f"{STEP} sentences of BC5CDR a step, bfloat16, no dropout; the trainings ran side by side. "
        "*Difference*: the largest, relative, of a whole step's loss from the same step of a model's first way. "
        "*Peak*: GPU memory of the first process. *Greedy*: eight sentences, 64 tokens each.",
        "",
        "| model | way | processes | device | 03_train | steps | first loss | last loss | difference | peak GB "
        "| training s | of that greedy s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        apart = row["largest_relative_difference"]
        device = row["provenance"]["device"] if row["provenance"] else ""
        cells = [row["model"], row["way"], row["processes"], device, row["status"], row["steps"]]
        cells += [f"{row[name]:.4f}" if row[name] is not None else "" for name in ("first_loss", "last_loss")]
        cells += ["" if apart is None else f"{apart:.2%}"]
        cells += [row[name] or "" for name in ("peak_memory_gb", "train_seconds", "greedy_seconds")]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(MODELS), default="smollm2")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument("extra", nargs="*", metavar="NAME=VALUE", help="parameters of all trainings")
    options = parser.parse_args()
    if not options.report:
        started = [
            start(options.shape, way, options.extra or ["data_dir=data/bc5cdr_iob/ner"])
            for way in options.ways
        ]
        for process in started:
            process.wait()
    tried = [shape for shape in MODELS if any(read_losses(shape, way) for way in WAYS)]
    rows = read_rows(tried)
    write_json(REPORT, rows)
    REPORT.with_suffix(".md").write_text(describe(rows), encoding="utf-8")
    print(describe(rows))


if __name__ == "__main__":
    main()
