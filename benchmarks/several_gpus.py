"""Several GPUs of a node: how fast torchrun trains an 8B on them, and whether it trains the same.

    python -m benchmarks.several_gpus                       # every part, on as many GPUs as there are
    python -m benchmarks.several_gpus --parts speed --cards 1 2
    python -m benchmarks.several_gpus --parts losses sweep lost --shape smollm2    # on a CPU: two processes (gloo)

The parts, each through `python -m biomerge_lib run 03_train`, with `start` anchors on BC5CDR:

- speed: packed and compiled, 32 sentences a card and step, on 1, 2, 4 and 8 cards, one after the other. The share of
  the ideal is of the first row's tokens a second times the cards. Communication is what a step takes longer than on
  one card; *all-reduce* is that of the trained weights' gradients alone.
- losses: the same 32 sentences a step in the same order, without dropout and at a low learning rate (at a high one,
  rounding soon leads the losses apart): one process and torchrun side by side, then both DeepSpeed files (three steps,
  and 64 sentences decoded). Their seconds say nothing.
- sweep: a SmolLM2 point a card at once, each `python -m biomerge_lib sweep --point N FILE` as in
  slurm/job_sweep_ner.sbatch, and the same points one after the other.
- lost: a process is killed behind the first checkpoint; the same command then goes on from it.

Writes reports/several_gpus.json and .md, a part as it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import read_log
from benchmarks.random_llama import TOKENIZER_DIR, find_backbone
from biomerge_lib.core.files import write_json
from biomerge_lib.experiment.recorded import read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance
from biomerge_lib.report.display import markdown_table

REPORT = PROJECT_DIR / "reports" / "several_gpus.json"
RUNS = PROJECT_DIR / "runs"
STEP = 32  # sentences
TRAIN_SENTENCES = 4560  # BC5CDR
COMMON = (
    "runtime=h200 backend=peft offset_anchors=start num_train_epochs=1 eval_limit=8 logging_steps=1 num_workers=0 "
    "wandb_mode=disabled existing_run=replace"
)
SAME = "lora_dropout=0 learning_rate=1e-4"
ZERO = {
    name: f"parameters/deepspeed/{name.lower().replace('-', '')}_offload.json"
    for name in ("ZeRO-2", "ZeRO-3")
}
SWEEP = """\
name: several_gpus
method: grid
metric: {{name: eval_ner_f1, goal: maximize}}
parameters:
  seed: {{values: {seeds}}}
program: biomerge_lib
command: [python, -m, biomerge_lib, run, 03_train, model=smollm2_135m, {words}, "${{args_no_hyphens}}"]
"""


def start(run_id: str, words: list[str], cards: list[int]) -> subprocess.Popen:
    """One training through 03_train on these cards, its output in runs/<run_id>.log."""
    command = [
        sys.executable,
        "-m",
        "biomerge_lib",
        "run",
        "03_train",
        *COMMON.split(),
        *words,
        f"run_id={run_id}",
    ]
    return launch(command, RUNS / f"{run_id}.log", cards)


def launch(command: list[str], log: Path, cards: list[int]) -> subprocess.Popen:
    log.parent.mkdir(exist_ok=True)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, cards))}
    with log.open("a") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=PROJECT_DIR, env=os.environ | visible
        )


def model_words(shape: str) -> list[str]:
    if shape == "smollm2":
        return ["model=smollm2_135m"]
    backbone = find_backbone(shape).relative_to(PROJECT_DIR)
    return [
        "model=lora_ner_unsloth",
        f"backbone={backbone}",
        f"tokenizer_dir={TOKENIZER_DIR.relative_to(PROJECT_DIR)}",
    ]


def result_of(run_id: str) -> dict[str, Any]:
    """What a run says of itself; without ``training.json`` only its status."""
    folder = RUNS / run_id
    stage = read_metrics(folder).get("stages", {}).get("03_train", {})
    trained = folder / "training.json"
    metrics = json.loads(trained.read_text(encoding="utf-8")) if trained.is_file() else {}
    log = read_log(folder)
    return {
        "run_id": run_id,
        "status": stage.get("status", "not tried").replace("running", "cut off"),
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "metrics": metrics,
        "provenance": stage.get("provenance"),
    }


def measure_speed(
    shape: str, data: str, cards: list[int], known: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    rows = [row for row in known if row["cards"] not in cards]
    for count in cards:
        run_id = f"several-gpus-speed-{count}"
        # As many steps on any number of cards: 35.
        words = [f"subsample={min(1.0, 0.25 * count)}", f"num_train_epochs={max(1.0, count / 4):g}"]
        words += [
            f"per_device_train_batch_size={STEP}",
            f"num_processes={count}",
            "step_launch=compiled",
            data,
        ]
        start(run_id, [*model_words(shape), *words], list(range(count))).wait()
        found = result_of(run_id)
        metrics = found["metrics"]
        alone = next((row for row in rows if row["cards"] == 1), None)
        speed = metrics.get("steady_tokens_per_second")
        step = metrics.get("steady_step_ms")
        rows.append(
            {
                "cards": count,
                "status": found["status"],
                "tokens_a_second": speed,
                "share_of_ideal": speed and alone and round(speed / alone["tokens_a_second"] / count, 3),
                "step_ms": step,
                "communication_ms": step and alone and round(step - alone["step_ms"], 1),
                "all_reduce_ms": time_all_reduce(count, metrics.get("trainable_parameters"))
                if count > 1
                else None,
                "steady_steps": metrics.get("steady_steps"),
                "peak_memory_gb": metrics.get("peak_memory_gb"),
                "provenance": found["provenance"],
            }
        )
        print(rows[-1], flush=True)
    return sorted(rows, key=lambda row: row["cards"])


def time_all_reduce(cards: int, weights: int | None) -> float | None:
    """Milliseconds of one all-reduce of that many fp32 gradients, the median of 20."""
    code = (
        "import os, statistics, time, torch, torch.distributed as dist\n"
        "rank = int(os.environ['LOCAL_RANK']); torch.cuda.set_device(rank); dist.init_process_group('nccl')\n"
        f"gradients = torch.ones({weights}, device='cuda'); seconds = []\n"
        "for _ in range(25):\n"
        "    torch.cuda.synchronize(); dist.barrier(); torch.cuda.synchronize(); begun = time.perf_counter()\n"
        "    dist.all_reduce(gradients); torch.cuda.synchronize(); seconds.append(time.perf_counter() - begun)\n"
        "if rank == 0: print(1000 * statistics.median(seconds[5:]))\n"
        "dist.destroy_process_group()\n"
    )
    script = RUNS / "all_reduce.py"
    script.write_text(code, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={cards}",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return round(float(done.stdout.split()[-1]), 2) if weights and done.stdout.split() else None


def compare_losses(shape: str, data: str, cards: int, gpus: int) -> list[dict[str, Any]]:
    """The first 20 losses of several processes beside one's, and three steps of each DeepSpeed file, side by side."""
    counts = [count for count in (1, 2, 4, 8) if count <= cards]
    ways: list[tuple[str, int, list[str]]] = [
        ("one process" if count == 1 else "torchrun", count, [f"subsample={21 * STEP / TRAIN_SENTENCES:.4f}"])
        for count in counts
    ]
    ways += [
        (name, cards, [f"subsample={4 * STEP / TRAIN_SENTENCES:.4f}", "eval_limit=64", f"deepspeed={file}"])
        for name, file in ZERO.items()
    ]
    started: list[tuple[str, int, str, subprocess.Popen]] = []
    for name, count, words in ways:
        if words[-1].startswith("deepspeed=") and "deepspeed" not in str(started[-1][3].args):
            for *_, process in started:  # all at once do not fit
                process.wait()
        run_id = f"several-gpus-{shape}-{name.lower().replace(' ', '-')}-{count}"
        words = [*model_words(shape), *SAME.split(), *words, data, f"num_processes={count}"]
        words += [f"per_device_train_batch_size={STEP // count}", "step_launch=eager"]
        # Alone on the last card where it can be.
        on = [gpus - 1] if count == 1 and gpus else list(range(min(count, gpus)))
        started.append((name, count, run_id, start(run_id, words, on)))
    rows = []
    alone: list[float] = []
    for name, count, run_id, process in started:
        process.wait()
        found = result_of(run_id)
        # Without the last step: what is left for it is dealt out evenly, some sentences twice.
        losses = found["losses"][:-1][:20]
        alone = alone or losses
        apart = [abs(ours / theirs - 1) for ours, theirs in zip(losses, alone, strict=False)]
        rows.append(
            {
                "model": shape,
                "way": name,
                "processes": count,
                "status": found["status"],
                "steps": len(losses),
                "first_loss": losses[0] if losses else None,
                "last_loss": losses[-1] if losses else None,
                "largest_relative_difference": max(apart) if apart and count > 1 else None,
                "greedy_sentences": found["metrics"].get("greedy_dev_records"),
                "peak_memory_gb": found["metrics"].get("peak_memory_gb"),
                "provenance": found["provenance"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def measure_sweep(data: str, cards: int, gpus: int) -> dict[str, Any]:
    """Seconds of a point a card at once, and of the same points one after the other on one card."""
    words = [*COMMON.replace("existing_run=replace", "").split(), "subsample=0.1", data]
    file = RUNS / "several_gpus_sweep.yaml"
    seconds: dict[str, float] = {}
    statuses: dict[str, list[int]] = {}
    for way, first_seed in (("at once", 100), ("one after the other", 200)):
        seeds = list(range(first_seed, first_seed + cards))
        file.write_text(SWEEP.format(seeds=seeds, words=", ".join(words)), encoding="utf-8")
        command = [sys.executable, "-m", "biomerge_lib", "sweep", "--point"]
        begun = time.monotonic()
        running, ended = [], []
        for point in range(cards):
            card = [point if way == "at once" else 0] if gpus else []
            running.append(
                launch([*command, str(point), str(file)], RUNS / f"several-gpus-{way[:6]}-{point}.log", card)
            )
            if way != "at once":
                ended.append(running.pop().wait())
        ended += [process.wait() for process in running]
        seconds[way], statuses[way] = round(time.monotonic() - begun, 1), ended
    row = {"points": cards, "seconds": seconds, "exit_statuses": statuses, "provenance": provenance()}
    print(row, flush=True)
    return row


def lose_a_process(data: str, cards: int, gpus: int) -> dict[str, Any]:
    """Kill a training process behind its first checkpoint; what is said, and where the same command goes on."""
    run_id = "several-gpus-lost"
    words = ["model=smollm2_135m", "subsample=0.5", "eval_steps=10", "save_steps=10", data]
    words += [f"num_processes={cards}", f"per_device_train_batch_size={STEP // cards}", "step_launch=eager"]
    log = RUNS / f"{run_id}.log"
    log.unlink(missing_ok=True)
    training = start(run_id, words, list(range(min(cards, gpus))))
    checkpoint = RUNS / run_id / "checkpoints" / "checkpoint-10" / "trainer_state.json"
    while training.poll() is None and not checkpoint.is_file():
        time.sleep(0.2)
    killed = [pid for pid in processes_of(run_id) if environment_of(pid).get("LOCAL_RANK") == "1"]
    begun = time.monotonic()
    if killed:
        os.kill(killed[0], signal.SIGKILL)
    first_status = training.wait()
    seconds = time.monotonic() - begun
    left = processes_of(run_id)
    said = [line for line in log.read_text(encoding="utf-8").splitlines() if "%|" not in line][-12:]
    again = start(run_id, [*words, "existing_run=resume"], list(range(min(cards, gpus)))).wait()
    went_on = [
        line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("going on from")
    ]
    row = {
        "cards": cards,
        "killed": killed,
        "exit_status": first_status,
        "seconds_to_the_end": round(seconds, 1),
        "processes_left": len(left),
        "said": said,
        "then": {"exit_status": again, "went_on": went_on[-1:], "status": result_of(run_id)["status"]},
        "provenance": provenance(),
    }
    print(row, flush=True)
    return row


def processes_of(run_id: str) -> list[int]:
    """The training processes that torchrun started for a run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"biomerge_lib.training.launch" in words and b"torch.distributed.run" not in words:
            found += [int(entry.parent.name)] if any(word.endswith(run_id.encode()) for word in words) else []
    return found


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text(encoding="utf-8", errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def describe(found: dict[str, Any]) -> str:
    """The tables."""

    def table(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
        def short(value: Any) -> Any:
            if not isinstance(value, float):
                return value
            return f"{value:.4g}" if value < 1000 else round(value)

        return markdown_table(columns.values(), ([short(row.get(name)) for name in columns] for row in rows))

    def where(*rows: dict[str, Any]) -> str:
        known = [row["provenance"] for row in rows if row.get("provenance")]
        devices = ", ".join(dict.fromkeys(place["device"] for place in known))
        commits = ", ".join(dict.fromkeys(f"`{place['commit'][:12]}`" for place in known))
        versions = known[0]["versions"] if known else {}
        return f"{devices}; commit {commits}; torch {versions.get('torch')}, DeepSpeed {versions.get('deepspeed')}."

    lines = ["# Several GPUs of a node", ""]
    if rows := found.get("speed"):
        columns = {
            "cards": "cards",
            "tokens_a_second": "tokens a second",
            "share_of_ideal": "of the ideal",
            "step_ms": "step, ms",
            "communication_ms": "longer than on one card, ms",
            "all_reduce_ms": "all-reduce alone, ms",
            "steady_steps": "steady steps",
            "peak_memory_gb": "peak GB a card",
            "status": "03_train",
        }
        lines += [
            "## Speed",
            "",
            f"8B shape, LoRA r = 8 with dropout, {STEP} `start`-anchored sentences a card and step,",
        ]
        lines += [f"packed, compiled layers, torchrun. {where(*rows)}", "", table(columns, rows), ""]
    if rows := found.get("losses"):
        columns = {
            "model": "model",
            "way": "way",
            "processes": "processes",
            "status": "03_train",
            "steps": "steps",
            "first_loss": "first loss",
            "last_loss": "last loss",
            "largest_relative_difference": "largest relative difference",
            "greedy_sentences": "decoded",
            "peak_memory_gb": "peak GB",
        }
        lines += ["## Losses", "", f"The same {STEP} sentences a step, no dropout, eager. {where(*rows)}", ""]
        lines += [table(columns, rows), ""]
    if row := found.get("sweep"):
        at_once, in_turn = row["seconds"]["at once"], row["seconds"]["one after the other"]
        lines += ["## A sweep's points, a card each", ""]
        lines += [
            f"{row['points']} SmolLM2 points (a tenth of BC5CDR) at once: {at_once:.0f} s; one after the other on"
        ]
        lines += [f"one card: {in_turn:.0f} s ({in_turn / at_once:.1f} times as long). {where(row)}", ""]
    if row := found.get("lost"):
        then = row["then"]
        lines += ["## A process that drops out", ""]
        lines += [
            f"One of {row['cards']} processes killed behind checkpoint 10: the command ended with {row['exit_status']}",
            f"after {row['seconds_to_the_end']} s, {row['processes_left']} processes left. Its last lines:",
        ]
        lines += ["", "```", *row["said"][-4:], "```", ""]
        lines += [f"The same command again: {' '.join(then['went_on'])}; {then['status']}. {where(row)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = torch.cuda.device_count()
    parts = ["speed", "losses", "sweep", "lost"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--shape", choices=["smollm2", "tiny", "8b"], default="8b" if gpus else "smollm2")
    parser.add_argument(
        "--cards", nargs="+", type=int, default=[n for n in (1, 2, 4, 8) if n <= max(2, gpus)]
    )
    parser.add_argument("--data_dir", default="data/bc5cdr_iob/ner")
    options = parser.parse_args()
    found = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.is_file() else {}
    found = found if isinstance(found, dict) else {}
    data, cards = f"data_dir={options.data_dir}", max(options.cards)
    for part in options.parts:
        if part == "speed":
            found[part] = measure_speed(options.shape, data, options.cards, found.get(part, []))
        elif part == "losses":
            kept = [row for row in found.get(part, []) if row["model"] != options.shape]
            found[part] = kept + compare_losses(options.shape, data, cards, gpus)
        elif part == "sweep":
            found[part] = measure_sweep(data, cards, gpus)
        else:
            found[part] = lose_a_process(data, cards, gpus)
        write_json(REPORT, found)
        REPORT.with_suffix(".md").write_text(describe(found), encoding="utf-8")


if __name__ == "__main__":
    main()
