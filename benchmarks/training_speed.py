"""How fast a training step is: this project's, and its peers' on the same sentences, on one GPU, in one run.

    python -m benchmarks.training_speed --shape 8b --data_dir data/bc5cdr_iob/ner
    python -m benchmarks.training_speed --shape tiny --batches 4 --ways packed padded   # to try it on a CPU

Every way trains LoRA r = 8 on all linear layers on the same anchored sentences, in a process of its own:

    packed, packed+compiled, ...   this project's Trainer with its parameters of those names
    padded                         this project's Trainer with packing=false
    brief                          transformers' Trainer and peft as the brief writes it: padded to a fixed length
    trl                            TRL's SFTTrainer with packing
    unsloth                        FastLanguageModel and SFTTrainer as Unsloth's notebooks use them

A row is the median of the optimiser steps after the first ones. "Useful" TFLOP/s count 4 FLOP a weight of the decoder
and real token (forward, and backward to the inputs; the frozen weights need no gradient), and their share of a measured
8192 x 8192 x 8192 bfloat16 product. Writes reports/training_speed.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from biomerge_lib.runs import PROJECT_DIR, provenance, write_json

REPORT = PROJECT_DIR / "reports" / "training_speed.json"
OURS = {  # parameters of this project
    "padded": {"packing": False},
    "padded+checkpointing": {"packing": False, "gradient_checkpointing": True},
    "packed": {},
    "packed+checkpointing": {"gradient_checkpointing": True},
    "packed+compiled": {"step_launch": "compiled"},
    "packed+compiled+checkpointing": {"step_launch": "compiled", "gradient_checkpointing": True},
    "packed+graphed": {"step_launch": "graphed"},
    "unsloth packed": {"backend": "unsloth"},
    "unsloth padded": {"backend": "unsloth", "packing": False},
}
PEERS = ("brief", "trl", "unsloth")
WARM_STEPS = 6


class Clock:
    """Notes the time at the end of each optimiser step, when the GPU has done it."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        clock = self
        self.ends: list[float] = []

        class AtStepEnd(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                clock.ends.append(time.perf_counter())

        self.callback = AtStepEnd()

    def seconds_a_step(self) -> float:
        # Without waiting for the GPU a step's end says when it was launched; over many steps the two agree.
        return (self.ends[-1] - self.ends[WARM_STEPS - 1]) / (len(self.ends) - WARM_STEPS)


def measure(way: str, options: dict[str, Any]) -> dict[str, Any]:
    """One way of training, in this process."""
    if "unsloth" in way:
        os.environ.setdefault("UNSLOTH_RETURN_LOGITS", "0")
        import unsloth  # noqa: F401
    import torch

    from biomerge_lib.ner_span import build_dataset, read_split
    from biomerge_lib.tokenizer import load_tokenizer

    torch.set_float32_matmul_precision("high")
    folder, batch = Path(options["backbone"]), options["batch"]
    steps = WARM_STEPS + options["steps"]
    tokenizer = load_tokenizer(folder)
    records = read_split(options["data_dir"], "train", limit=batch * steps)[: batch * steps]
    if len(records) < batch * steps:
        records = (records * (batch * steps // len(records) + 1))[: batch * steps]
    rendering = {"offset_anchors": options["anchors"], "corpus_cue": False}
    dataset = build_dataset(
        records, tokenizer, **rendering, max_input_tokens=options["max_tokens"], max_target_tokens=128
    )
    clock = Clock()
    start = time.perf_counter()
    if way in OURS:
        trainer = build_ours(OURS[way], options, tokenizer, records, clock)
    else:
        trainer = build_peer(way, options, tokenizer, dataset, steps, clock)
    ready = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        clock.ends[-1] = time.perf_counter()
    tokens = sum(dataset["length"]) / len(dataset) * batch
    seconds = clock.seconds_a_step()
    if way == "trl":  # a packed row holds other sentences than a step of the others
        tokens = trainer.biomerge_tokens_a_step
    weights = sum(
        p.numel() for n, p in trainer.model.named_parameters() if ".layers." in n and "lora_" not in n
    )
    result = {
        "way": way,
        "batch": batch,
        "anchors": options["anchors"],
        "ms_a_step": round(seconds * 1e3, 1),
        "tokens_a_second": round(tokens / seconds),
        "sentences_a_second": round(
            batch * tokens / (sum(dataset["length"]) / len(dataset) * batch) / seconds, 1
        ),
        "useful_tflops": round(4 * weights * tokens / seconds / 1e12, 1),
        "build_seconds": round(ready - start, 1),
        "first_steps_seconds": round(clock.ends[WARM_STEPS - 1] - ready, 1),
    }
    if torch.cuda.is_available():
        result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        result["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 1)
    if options.get("profile"):
        result["gpu_busy"] = profile_steps(trainer, options["profile"])
    return result


def build_ours(changes: dict[str, Any], options: dict[str, Any], tokenizer, records, clock: Clock):
    """This project's Trainer, as 03_train builds it."""
    import tempfile

    from biomerge_lib.parameters import check_parameters, compose_parameters
    from biomerge_lib.training import build_model, build_trainer

    values = compose_parameters(["model=smollm2_135m", f"runtime={options['runtime']}"]).model_dump()
    values |= {
        "backend": "peft",
        "packing": True,
        "step_launch": "eager",
        "gradient_checkpointing": False,
        "fast_metrics": options["head"],
        "offset_anchors": options["anchors"],
        "max_input_tokens": options["max_tokens"],
        "per_device_train_batch_size": options["batch"] // options["accumulate"],
        "gradient_accumulation_steps": options["accumulate"],
        "num_train_epochs": 1.0,
        "eval_steps": 10_000,
        "save_steps": 10_000,
        "logging_steps": 1000,
        "num_workers": options["num_workers"],
        "wandb_mode": "disabled",
        **changes,
    }
    parameters = check_parameters(values)
    model = build_model(parameters, options["backbone"])
    dev = [record for record in records if record.spans][:2]
    folder = tempfile.mkdtemp()
    trainer = build_trainer(
        model, tokenizer, {"train": records, "dev": dev}, parameters, checkpoints=Path(folder) / "checkpoints"
    )
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    trainer.callback_handler.callbacks = [
        callback
        for callback in trainer.callback_handler.callbacks
        if type(callback).__name__ in ("DefaultFlowCallback", "FiniteLoss")
    ]
    trainer.add_callback(clock.callback)
    return trainer


def build_peer(way: str, options: dict[str, Any], tokenizer, dataset, steps: int, clock: Clock):
    """A peer's Trainer as its own pages write it; the data are this project's token ids and labels."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    batch, accumulate = options["batch"], options["accumulate"]
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch // accumulate,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": 2e-4,
        "max_steps": steps,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "dataloader_num_workers": options["num_workers"],
        "warmup_steps": 0.05,
    }
    lora = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    if way == "unsloth":
        from trl import SFTConfig, SFTTrainer
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            options["backbone"], max_seq_length=2048, dtype=None, load_in_4bit=False
        )
        # Their notebooks: no dropout (their kernels need that), checkpointing "unsloth".
        model = FastLanguageModel.get_peft_model(
            model, **lora, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth"
        )
        data = dataset.select_columns(["input_ids", "labels"])
        config = SFTConfig(
            **common, max_length=2048, packing=False, dataset_kwargs={"skip_prepare_dataset": True}
        )
        trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(clock.callback)
        return trainer
    from peft import LoraConfig, get_peft_model

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options["backbone"], dtype=dtype).to(device)
    if way == "trl":
        from trl import SFTConfig, SFTTrainer

        tokens = round(sum(dataset["length"]) / len(dataset) * batch)
        row = -(-tokens // 512) * 512
        config = SFTConfig(
            **common | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
            max_length=row,
            packing=True,
            packing_strategy="bfd",
            padding_free=True,
            gradient_checkpointing=False,
        )
        # Rows are filled, so a step's real tokens are a row's.
        repeated = dataset.select_columns(["input_ids"])
        trainer = SFTTrainer(
            model,
            args=config,
            train_dataset=repeated,
            processing_class=tokenizer,
            peft_config=LoraConfig(**lora, lora_dropout=0.05, task_type="CAUSAL_LM"),
        )
        packed = trainer.train_dataset
        trainer.biomerge_tokens_a_step = sum(len(ids) for ids in packed["input_ids"]) / len(packed)
        trainer.args.max_steps = min(steps, len(packed))
        trainer.add_callback(clock.callback)
        return trainer
    model = get_peft_model(model, LoraConfig(**lora, lora_dropout=0.05, task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    arguments = TrainingArguments(**common, gradient_checkpointing=True)
    longest = options["max_tokens"]

    def pad(examples):
        ids = torch.full((len(examples), longest), tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, example in enumerate(examples):
            size = min(len(example["input_ids"]), longest)
            ids[row, :size] = torch.tensor(example["input_ids"][:size])
            labels[row, :size] = torch.tensor(example["labels"][:size])
            mask[row, :size] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    data = dataset.select_columns(["input_ids", "labels"])
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=pad, processing_class=tokenizer)
    trainer.add_callback(clock.callback)
    return trainer


def profile_steps(trainer, path: str) -> dict[str, Any]:
    """The share of time that the GPU is busy, and where it goes, over a few more steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    loader = trainer.get_train_dataloader()
    batches = iter(loader)
    model = trainer.model_wrapped
    held = [trainer.get_batch_samples(batches, 1, trainer.args.device) for _ in range(4)]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
        start = time.perf_counter()
        for (inputs, *_), items in held[1:]:
            trainer.training_step(model, inputs, items)
            trainer._clip_grad_norm(model)
            trainer.optimizer.step()
            model.zero_grad()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    kernels = [event for event in watched.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time for event in kernels) / 1e6
    totals: dict[str, list[float]] = {}
    for event in kernels:
        total = totals.setdefault(event.name[:90], [0, 0.0])
        total[0] += 1
        total[1] += event.device_time / 1e3
    top = sorted(totals.items(), key=lambda item: -item[1][1])[:40]
    Path(path).write_text(json.dumps({name: [n, round(ms, 2)] for name, (n, ms) in top}, indent=1))
    return {
        "busy_share": round(busy / wall, 3),
        "kernels_a_step": len(kernels) // 3,
        "profiled_ms": round(wall / 3e-3, 1),
    }


def matrix_peak() -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 bfloat16 matrix product on random data: the card's measured limit."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ right
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / statistics.median(times[3:]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", default="8b", help="8b or tiny (random weights), or a prepared backbone's folder"
    )
    parser.add_argument("--data_dir", default="data/bc5cdr_iob/ner")
    parser.add_argument("--ways", nargs="+", default=[*OURS, *PEERS], metavar="WAY")
    parser.add_argument("--batches", nargs="+", type=int, default=[32], help="sentences an optimiser step")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--anchors", nargs="+", default=["start"])
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--no-head", dest="head", action="store_false")
    parser.add_argument("--runtime", default="h200")
    parser.add_argument("--profile", help="file for the kernels' times")
    parser.add_argument("--out", default=str(REPORT), help="JSON file of all runs; this run is added")
    parser.add_argument("--merge", nargs="+", metavar="JSON", help="only add these files' runs to --out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if options["one"]:
        print("RESULT " + json.dumps(measure(options["one"], json.loads(os.environ["BIOMERGE_BENCHMARK"]))))
        return
    if options["merge"]:
        add_runs(
            Path(options["out"]),
            [
                run
                for file in options["merge"]
                for run in json.loads(Path(file).read_text(encoding="utf-8"))["runs"]
            ],
        )
        return
    from benchmarks.readiness import SHAPES, build_backbone, build_tokenizer

    if options["shape"] in SHAPES:
        folder = PROJECT_DIR / "backbones" / f"llama3-{options['shape']}"
        if not (folder / "config.json").is_file():
            build_tokenizer("random/llama3-8b")
            build_backbone(folder, options["shape"])
    else:
        folder = Path(options["shape"])
    import torch

    rows, peak = [], matrix_peak() if torch.cuda.is_available() else None
    for anchors in options["anchors"]:
        for batch in options["batches"]:
            for way in options["ways"]:
                one = options | {"anchors": anchors, "batch": batch, "backbone": str(folder)}
                row = run_one(way, one)
                if peak and "useful_tflops" in row:
                    row["share_of_peak"] = round(row["useful_tflops"] / peak, 3)
                rows.append(row)
                print(json.dumps(row), flush=True)
    run = {
        "command": "python -m benchmarks.training_speed " + " ".join(sys.argv[1:]),
        "shape": options["shape"],
        "matrix_peak_tflops": peak and round(peak, 1),
        "provenance": provenance(),
        "rows": rows,
    }
    add_runs(Path(options["out"]), [run])


def add_runs(path: Path, runs: list[dict[str, Any]]) -> None:
    """Add runs to a report, each in the place of an earlier one of the same command, and write its table and plot."""
    kept = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    commands = {run["command"] for run in runs}
    kept = [run for run in kept if run["command"] not in commands] + runs
    write_json(path, {"runs": kept})
    path.with_suffix(".md").write_text(describe(kept), encoding="utf-8")
    plot(kept, path.with_suffix(".svg"))


def describe(runs: list[dict[str, Any]]) -> str:
    """The table of all runs."""
    columns = {
        "way": "way",
        "batch": "sentences a step",
        "anchors": "anchors",
        "ms_a_step": "ms a step",
        "tokens_a_second": "real tokens/s",
        "sentences_a_second": "sentences/s",
        "useful_tflops": "useful TFLOP/s",
        "share_of_peak": "share of peak",
        "peak_memory_gb": "peak GB",
        "first_steps_seconds": "first 6 steps, s",
    }
    lines = ["# How fast a training step is", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += ["![tokens a second](training_speed.svg)", ""]
    for run in runs:
        origin = run["provenance"]
        peak = f", matrix peak {run['matrix_peak_tflops']} TFLOP/s" if run["matrix_peak_tflops"] else ""
        lines += [
            f"## {Path(run['shape']).name}: {origin['device']}{peak}",
            "",
            f"`{run['command']}`, commit `{origin['commit'][:12]}`.",
            "",
            "| " + " | ".join(columns.values()) + " |",
            "|" + "---|" * len(columns),
        ]
        for row in run["rows"]:
            cells = [row.get(name, "") for name in columns]
            if "error" in row:
                cells = [row["way"], row["batch"], row["anchors"], f"failed: {row['error']}", *[""] * 6]
            if isinstance(row.get("tokens_a_second"), int):
                cells[4] = f"{row['tokens_a_second']:,}"
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Real tokens a second over the sentences a step, a panel a run."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4.2), squeeze=False)
    for panel, run in zip(panels[0], runs, strict=True):
        rows = [row for row in run["rows"] if "error" not in row]
        for way in dict.fromkeys(row["way"] for row in rows):
            points = sorted((row["batch"], row["tokens_a_second"]) for row in rows if row["way"] == way)
            panel.plot(*zip(*points, strict=True), marker="o", label=way)
        panel.set(xscale="log", xlabel="sentences a step", ylabel="real tokens a second")
        panel.set_xticks(sorted({row["batch"] for row in rows}), sorted({row["batch"] for row in rows}))
        panel.set_title(f"{Path(run['shape']).name}, {run['provenance']['device']}")
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def run_one(way: str, options: dict[str, Any]) -> dict[str, Any]:
    """Measure one way in a process of its own; a failure is a row with its last line."""
    command = [sys.executable, "-m", "benchmarks.training_speed", "--one", way]
    environment = os.environ | {"BIOMERGE_BENCHMARK": json.dumps(options), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT_DIR)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(done.stderr[-3000:], file=sys.stderr)
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"way": way, "batch": options["batch"], "anchors": options["anchors"], "error": last[:300]}


if __name__ == "__main__":
    main()
