"""How fast the brief's own command trains an 8B, as a user gives it, on a card of 48 GB.

    python -m benchmarks.brief_job                                  # one GPU; 50 GB of disk
    python -m benchmarks.brief_job --rows a100-start h200-start     # some rows alone
    python -m benchmarks.brief_job --rows epoch                     # 32,000 sentences: five minutes
    python -m benchmarks.brief_job --shape tiny --runtime cpu_debug --subsample 0.02  # the same way on a CPU, to try it

`python -m biomerge_lib run 03_train task=ner_span model=lora_ner_unsloth runtime=a100` (Unsloth, 8 x 4 sentences a
step, gradient checkpointing, token head), with random weights of the 8B's shape and the real Llama-3 tokenizer, on
BC5CDR. The row `job` is the same through slurm/job_single_ner.sbatch, outside SLURM, with 04 and 05 behind it on the
merged model, with the whole card, of which vLLM wants nine tenths. The row `epoch` is one epoch of 32,000 sentences
(BC5CDR, repeated) with backend=peft, and of dev 800 sentences: its seconds by what they were for. The other rows of
runtime=a100 have 48 GB of it: another process holds the rest. Tokens a second are those of the run's own metrics.json
(``steady_tokens_per_second``): from step to step, without compilation, evaluation and saving; padding is not counted.
Writes reports/brief_job.json and .md, a row as it comes; rows not asked for are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import read_log
from benchmarks.random_llama import TOKENIZER_DIR, find_backbone
from biomerge_lib.core.files import write_json
from biomerge_lib.experiment.recorded import read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance

REPORT = PROJECT_DIR / "reports" / "brief_job.json"
CARD_GB = 48
EPOCH = 32_000  # sentences
FEW = 0.25  # of BC5CDR
ROWS = {  # runtime and anchors
    "a100-start": ("a100", "start"),
    "a100-echo_start": ("a100", "echo_start"),
    "h200-start": ("h200", "start"),
    "h200-echo_start": ("h200", "echo_start"),
    "job": ("a100", "echo_start"),
    "epoch": ("h200", "start"),
}
COLUMNS = {
    "row": "row",
    "runtime": "runtime",
    "backend": "backend",
    "offset_anchors": "anchors",
    "tokens_a_second": "tokens a second",
    "peak_memory_gb": "peak GB",
    "row_tokens": "row_tokens",
    "checkpointed_layers": "layers that recompute",
    "steps": "steady steps",
    "seconds": "whole command, s",
}


@contextmanager
def held_to(gigabytes: float | None) -> Iterator[None]:
    """Leave so much of the GPU's memory to others inside the block: a process holds the rest."""
    import torch

    if gigabytes is None or not torch.cuda.is_available():
        yield
        return
    code = (
        "import sys, torch\n"
        f"rest = torch.cuda.mem_get_info()[0] - int({gigabytes}e9)\n"
        "held = torch.empty(rest, dtype=torch.uint8, device='cuda')\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if holder.stdout is None or holder.stdout.readline().strip() != b"held":
            raise SystemExit(f"the card has less than {gigabytes} GB free")
        yield
    finally:
        holder.communicate()


def repeat_corpus(data_dir: Path, sentences: int) -> Path:
    """A folder with dev and test of a corpus, and its training sentences repeated up to so many."""
    folder = PROJECT_DIR / "runs" / f"brief-data-{sentences}"
    shutil.copytree(PROJECT_DIR / data_dir, folder, dirs_exist_ok=True)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    repeated = itertools.islice(itertools.cycle(lines), sentences)
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in repeated), encoding="utf-8")
    return folder.relative_to(PROJECT_DIR)


def divide_seconds(run: Path, metrics: dict[str, Any]) -> dict[str, float]:
    """What a run's seconds of 03_train were for; the steps' are all steps at the steady ones' speed."""
    named = [
        seconds
        for entry in read_log(run)
        for name, seconds in entry.items()
        if name in ("eval_runtime", "greedy_dev_seconds")
    ]
    steps = metrics["steps"] * metrics["steady_step_ms"] / 1e3
    parts = {
        "steps": steps,
        "evaluation": sum(named),
        "compilation, first steps and checkpoints": metrics["train_seconds"] - steps - sum(named),
        "loading, tokenising and the notebook": metrics["stage_seconds"] - metrics["train_seconds"],
    }
    return {name: round(seconds, 1) for name, seconds in parts.items()}


def card_gb(row: str) -> float | None:
    return CARD_GB if row.startswith("a100") else None


def command_of(row: str, options: argparse.Namespace, backbone: str) -> tuple[list[str], dict[str, str]]:
    """A row's command, and what it wants in its environment."""
    runtime, anchors = ROWS[row]
    words = [
        f"offset_anchors={anchors}",
        f"backbone={backbone}",
        f"tokenizer_dir={TOKENIZER_DIR.relative_to(PROJECT_DIR)}",
        f"data_dir={options.data_dir}",
        f"subsample={options.subsample}",
        "num_train_epochs=1",
        "eval_limit=32",
        "wandb_mode=disabled",
        "existing_run=replace",
        f"run_id=brief-{row}",
    ]
    if row == "epoch":
        sentences = round(EPOCH * options.subsample / FEW)
        words += [f"data_dir={repeat_corpus(Path(options.data_dir), sentences)}", "subsample=1"]
        words += ["eval_limit=800", "backend=peft", "merge=false"]
        words = [*{word.partition("=")[0]: word for word in words}.values()]
    if options.runtime:
        words.append(f"runtime={options.runtime}")
    if row == "job":
        site = {
            "SLURM_JOB_ID": "1",
            "SLURM_JOB_NAME": "ner_span",
            "SLURM_SUBMIT_DIR": str(PROJECT_DIR),
            "VENV": sys.prefix,
            "MODULES": "",
        }
        notebooks = ["03_train", "04_greedy_dev", "05_vllm_eval"]
        return ["bash", "slurm/job_single_ner.sbatch", *notebooks, *words], site
    command = [sys.executable, "-m", "biomerge_lib", "run", "03_train", "task=ner_span"]
    return [*command, "model=lora_ner_unsloth", f"runtime={runtime}", *words], {}


def measure(row: str, options: argparse.Namespace, backbone: str) -> dict[str, Any]:
    """Run a row's command to its end and read what it recorded."""
    command, site = command_of(row, options, backbone)
    log = PROJECT_DIR / "runs" / f"brief-{row}.log"
    log.parent.mkdir(exist_ok=True)
    with held_to(card_gb(row)), log.open("w") as output:
        ended = subprocess.run(
            command,
            cwd=PROJECT_DIR,
            env=os.environ | site,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    found = read_metrics(PROJECT_DIR / "runs" / f"brief-{row}")
    stages, parameters = found.get("stages", {}), found.get("parameters", {})
    training = stages.get("03_train", {})
    metrics, where = training.get("metrics", {}), training.get("provenance", provenance())
    shown = [Path(command[0]).name, *command[1:]]
    result: dict[str, Any] = {
        "row": row,
        "command": shlex.join(shown),
        "exit_status": ended.returncode,
        "shape": options.shape,
        "card_gb": card_gb(row),
        "backend": parameters.get("backend"),
        "runtime": options.runtime or ROWS[row][0],
        "offset_anchors": parameters.get("offset_anchors"),
        "tokens_a_second": metrics.get("steady_tokens_per_second"),
        "checkpointed_layers": metrics.get("checkpointed_layers"),
        "steps": metrics.get("steady_steps"),
        "row_tokens": metrics.get("row_tokens"),
        "peak_memory_gb": metrics.get("peak_memory_gb"),
        "trainable_parameters": metrics.get("trainable_parameters"),
        "seconds": metrics.get("stage_seconds"),
        "stages": {name: stage.get("status") for name, stage in stages.items()},
        "versions": where["versions"],
        "commit": where["commit"],
        "device": where["device"],
    }
    if row == "epoch" and "steady_step_ms" in metrics:
        result["parts"] = divide_seconds(PROJECT_DIR / "runs" / "brief-epoch", metrics)
    for merged in (PROJECT_DIR / "runs" / f"brief-{row}").glob("merged"):
        shutil.rmtree(merged)  # 16 GB each, of random weights
    if ended.returncode or result["tokens_a_second"] is None:
        result["error"] = log.read_text(encoding="utf-8", errors="replace")[-1500:]
    return result


def write_report(rows: list[dict[str, Any]], out: Path) -> None:
    write_json(out, {"rows": rows, "method": __doc__})
    lines = [
        "# The brief's own command",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(),
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        found = [row.get(name) for name in COLUMNS]
        cells = [f"{cell:,}" if isinstance(cell, int | float) else str(cell or "–") for cell in found]
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        if parts := row.get("parts"):
            told = [
                f"{name} {seconds} ({seconds / sum(parts.values()):.0%})".replace("%", " %")
                for name, seconds in parts.items()
            ]
            lines += ["", f"Seconds of {row['row']}: {', '.join(told)}."]
    lines += ["", "Commands:", ""]
    lines += [f"- {row['row']}: `{row['command']}`; commit {row['commit']}, {row['device']}." for row in rows]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--shape", default="8b", choices=["8b", "tiny"])
    parser.add_argument("--runtime", help="in place of a row's own, to try it elsewhere")
    parser.add_argument("--data_dir", default="data/bc5cdr_iob/ner")
    parser.add_argument("--subsample", type=float, default=FEW, help="of BC5CDR: 35 steps of 32 sentences")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    find_backbone(options.shape)
    known = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.is_file() else []
    rows = {row["row"]: row for row in known}
    for row in options.rows:
        rows[row] = measure(row, options, f"random/llama3-{options.shape}")
        print({name: rows[row].get(name) for name in (*COLUMNS, "exit_status", "error")}, flush=True)
        write_report([rows[name] for name in ROWS if name in rows], options.out)


if __name__ == "__main__":
    main()
