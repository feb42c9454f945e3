"""How fast a training step is: this project's, and its peers' on the same sentences, on one GPU, in one run.

    python -m benchmarks.training_speed --shape 8b --data_dir data/bc5cdr_iob/ner
    python -m benchmarks.training_speed --shape backbones/smollm2-135m --batches 8 32 128 256 --steps 50 --ways trl
    python -m benchmarks.training_speed --shape backbones/smollm2-135m --ways packed+graphed --epochs 1000 4560 32000
    python -m benchmarks.training_speed --ways 'fused, as needed' --card-gb 48 --profile profile
    python -m benchmarks.training_speed --shape tiny --batches 4 --ways packed padded   # to try it on a CPU

Every way trains LoRA r = 8 on all linear layers on the same sentences with start anchors, in a process of its own:

    packed, packed+compiled, ...   this project's Trainer with its parameters of those names
    fused, ...                     packed+compiled with LoRA in the base layers' products (model/fused_lora.py); as
                                   needed: as many layers as --card-gb demands compute their activations anew
    padded                         this project's Trainer with packing=false
    brief                          transformers' Trainer and peft as the brief writes it: rows padded to 256 + 64
                                   tokens, 8 sentences x 4, gradient checkpointing
    tuned                          transformers' Trainer and peft at their best: grouped by length, padded to the
                                   batch's longest, all sentences in one batch, no checkpointing
    trl                            TRL's SFTTrainer, packing, no checkpointing; a row holds a step's tokens
    unsloth                        FastLanguageModel and SFTTrainer as Unsloth's notebooks use them
    unsloth tuned                  the same without their gradient checkpointing

A row is the mean over the optimiser steps behind the first ones, between two moments at which the GPU had done all its
work; tokens are those that were in these steps, padding left out. "Useful" TFLOP/s count 4 FLOP a weight of the decoder
and real token (forward, and backward to the inputs; the frozen weights need no gradient), and their share of a measured
8192 x 8192 x 8192 bfloat16 product. "Compiled anew" counts compilations and graph captures that fell into the measured
steps. Loss and gradient norm are the first step's, and their mean over the measured ones. All processes import side by
side, and compile with one layer of a random shape; then each loads, warms up and measures alone. Writes
reports/training_speed.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, cast

from benchmarks.common import REPORTS, command, write_report
from benchmarks.kernel_profile import describe_kernels, summarise
from benchmarks.random_llama import SHAPES, draw_weights, find_backbone
from benchmarks.training_page import add_runs
from benchmarks.training_peers import PEERS, build_peer, count_batch, load_peer, parts_of
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance

OURS: dict[str, dict[str, Any]] = {  # parameters of this project
    "padded": {"packing": False},
    "packed": {},
    "packed+checkpointing": {"gradient_checkpointing": True},
    "packed+compiled": {"step_launch": "compiled"},
    "packed+compiled+checkpointing": {"step_launch": "compiled", "gradient_checkpointing": True},
    "packed+graphed": {"step_launch": "graphed"},
    "packed+compiled+graphed": {"step_launch": "compiled_graphed"},
    "packed, no head": {"fast_metrics": False},
    "packed+compiled, no head": {"step_launch": "compiled", "fast_metrics": False},
    "unsloth packed": {"backend": "unsloth"},
    "unsloth packed+checkpointing": {"backend": "unsloth", "gradient_checkpointing": True},
}
FUSED: dict[str, dict[str, Any]] = {  # with model/fused_lora.py
    "fused": {"step_launch": "compiled"},
    "fused+graphed": {"step_launch": "compiled_graphed"},
    "fused+checkpointing": {"step_launch": "compiled", "gradient_checkpointing": True},
    "fused, as needed": {"step_launch": "compiled", "gradient_checkpointing": True},
}
OURS |= FUSED
WAYS = [way for way in [*OURS, *PEERS] if "graphed" not in way and "no head" not in way]
METHOD = __doc__.split("\n\n", 2)[2]
FORMAT = PromptFormat(offset_anchors="start", corpus_cue=False, max_input_tokens=512)
SENTENCES = 2048  # of the corpus, to draw steps from
FEWEST_STEPS = 4  # measured, however slow they are
QUIET_STEPS = 20  # without a capture, before a graphed way is measured
MOST_WARM_STEPS = 120  # even if it still captures


def warm_steps(way: str) -> int:
    """First steps that are not measured: compilation, graphs (one a shape of batch), the allocator's growth.

    More of them are left out while graphs are still being captured.
    """
    return 16 if "graphed" in way else 6 if compiles(way) or "unsloth" in way else 3


def compiles(way: str) -> bool:
    return "compiled" in way or way in FUSED


class Stopwatch:
    """Times a Trainer's optimiser steps between two moments at which the GPU has done all its work.

    ``count`` gives the real tokens and sentences that the Trainer has seen, ``compiled`` what was compiled or captured.
    The first ``warm`` steps are left out, and more, up to ``most_warm``, until ``QUIET_STEPS`` have compiled nothing.
    It stops the training after ``steps`` measured ones, or when ``seconds`` are over; None measures to its end.
    """

    def __init__(
        self,
        *,
        warm: int,
        most_warm: int,
        steps: int | None,
        seconds: float,
        count: Callable[[], tuple[int, int]],
        compiled: Callable[[], int],
    ) -> None:
        self.fewest_warm, self.most_warm, self.most_steps, self.seconds = warm, most_warm, steps, seconds
        self.count, self.compiled = count, compiled
        self.steps = 0
        self.warm: int | None = None  # steps before the first measured one
        self.last_compiled = (0, 0)  # how much was compiled, and at which step that changed last
        self.start = self.end = 0.0
        self.at_start = (0, 0, 0)  # tokens, sentences, compilations

    def on_step_end(self, args, state, control, **kwargs):
        """As the Trainer calls it."""
        self.steps += 1
        if self.warm is None:
            if self.compiled() != self.last_compiled[0]:
                self.last_compiled = self.compiled(), self.steps
            quiet = self.steps - self.last_compiled[1] >= QUIET_STEPS
            if self.steps >= self.fewest_warm and (quiet or self.steps >= self.most_warm):
                self.warm, self.start = self.steps, wait_for_gpu()
                self.at_start = (*self.count(), self.compiled())
            return control
        measured = self.steps - self.warm
        late = time.perf_counter() - self.start > self.seconds and measured >= FEWEST_STEPS
        if self.most_steps is not None:
            control.should_training_stop |= measured >= self.most_steps or late
        if control.should_training_stop or state.global_step >= state.max_steps:
            self.end = wait_for_gpu()  # before the Trainer puts its things away
        return control

    def callback(self):
        """What the Trainer takes."""
        from transformers import TrainerCallback

        callback = TrainerCallback()
        callback.on_step_end = self.on_step_end  # type: ignore[method-assign]
        return callback

    def read(self) -> dict[str, Any]:
        taken, done = self.end - self.start, self.steps - cast(int, self.warm)
        after = (*self.count(), self.compiled())
        tokens, sentences, recompiles = (b - a for a, b in zip(self.at_start, after, strict=True))
        return {
            "warm_steps": self.warm,
            "measured_steps": done,
            "ms_a_step": round(taken / done * 1e3, 1),
            "tokens_a_step": round(tokens / done),
            "tokens_a_second": round(tokens / taken),
            "sentences_a_second": round(sentences / taken, 1),
            "recompiles": recompiles,
        }


def wait_for_gpu() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_way(options: dict[str, Any]) -> None:
    """All measurements of a way in this process: the model is loaded once, a Trainer is built for each."""
    way = options["way"]
    started = time.perf_counter()
    if "unsloth" in way:
        # Two processes at once must not write the same files.
        os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()
        os.environ.setdefault("UNSLOTH_RETURN_LOGITS", "0")
        import unsloth  # noqa: F401
    import torch

    import biomerge_lib.training.run  # noqa: F401
    from biomerge_lib.model import fused_lora
    from biomerge_lib.prompts.ner_span import read_split
    from biomerge_lib.prompts.tokenizer import load_tokenizer
    from biomerge_lib.training.run import build_model

    torch.set_float32_matmul_precision("high")
    tokenizer = load_tokenizer(Path(options["backbone"]))
    imported = time.perf_counter()
    folder, random = options["backbone"], options["backbone"].endswith("-weightless")
    if way in OURS:
        fused_lora.DEVICES = ("cuda", "cpu") if way in FUSED else ()
    if torch.cuda.is_available() and options["card_gb"]:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1, options["card_gb"] * 1e9 / whole))

    def load(layers: int | None = None) -> Any:
        with draw_weights(layers) if random else nullcontext():
            return build_model(our_parameters(way), folder) if way in OURS else load_peer(way, folder)

    ahead = {}
    if random and compiles(way):
        faulthandler.dump_traceback_later(options["way_limit"], exit=True)
        few = {"batch": max(options["batches"]), "steps": 1, "profile": None}
        measure(load(1), tokenizer, read_split(options["data_dir"], "train"), options | few)
        ahead["compile_seconds"] = round(time.perf_counter() - imported, 1)
        free_memory()
        faulthandler.cancel_dump_traceback_later()
    print("READY", flush=True)
    if not sys.stdin.readline():
        sys.exit("the benchmark itself has ended")
    faulthandler.dump_traceback_later(options["way_limit"], exit=True)
    start = time.perf_counter()
    model = load()
    startup = ahead | {
        "import_seconds": round(imported - started, 1),
        "load_seconds": round(wait_for_gpu() - start, 1),
    }
    runs: list[dict[str, Any]] = options.get("runs") or [{"batch": batch} for batch in options["batches"]]
    runs += [run | {"epoch": size} for run in runs for size in options["epochs"]]
    for run in runs:
        row: dict[str, Any] = {"way": way, "anchors": FORMAT.offset_anchors} | run
        faulthandler.dump_traceback_later(options["way_limit"], exit=True)
        try:
            records = read_split((options | run)["data_dir"], "train")
            row |= startup | measure(model, tokenizer, records, options | run)
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print("ROW " + json.dumps(row), flush=True)
        free_memory()


def free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def watch_numbers(trainer: Any) -> dict[str, list[Any]]:
    """The losses and gradient norms of a Trainer's steps to come, left on the GPU."""
    seen: dict[str, list[Any]] = {"loss": [], "grad_norm": []}
    step, clip = trainer.training_step, trainer._clip_grad_norm

    def training_step(*arguments: Any, **named: Any) -> Any:
        seen["loss"].append(step(*arguments, **named).detach())
        return seen["loss"][-1]

    def clip_grad_norm(*arguments: Any) -> Any:
        seen["grad_norm"].append(clip(*arguments))
        return seen["grad_norm"][-1]

    trainer.training_step, trainer._clip_grad_norm = training_step, clip_grad_norm
    return seen


def describe_numbers(seen: dict[str, list[Any]], measured: int) -> dict[str, float]:
    """First and mean loss and gradient norm; the mean over the steps that were measured last."""
    told: dict[str, float] = {}
    for name, values in seen.items():
        numbers = [float(value) for value in values if value is not None]
        if numbers:
            told |= {f"first_{name}": numbers[0], name: statistics.fmean(numbers[-measured:])}
    return {name: float(f"{value:.5g}") for name, value in told.items()}


def measure(model, tokenizer, records: list, options: dict[str, Any]) -> dict[str, Any]:
    """One batch size, or one whole epoch (``epoch`` sentences) with the steps behind the first ones measured."""
    import torch

    from biomerge_lib.model.fused_lora import fused_layers

    way, batch, epoch = options["way"], options["batch"], options.get("epoch")
    size = epoch or max(SENTENCES, batch)
    if epoch:
        records = (records * (size // len(records) + 1))[:size]
    elif size < len(records):
        records = [records[k * len(records) // size] for k in range(size)]  # evenly over all
    start = time.perf_counter()
    build = build_ours if way in OURS else build_peer_trainer
    trainer, count = build(way, model, tokenizer, records, batch)
    warm = min(warm_steps(way), epoch // batch - 1) if epoch else warm_steps(way)
    most_warm = MOST_WARM_STEPS if "graphed" in way and not epoch else warm
    watch = Stopwatch(
        warm=warm,
        most_warm=most_warm,
        steps=None if epoch else options["steps"],
        seconds=options["way_seconds"],
        count=count,
        compiled=lambda: count_compilations(trainer),
    )
    trainer.add_callback(watch.callback())
    numbers = watch_numbers(trainer)
    if not epoch:
        trainer.args.max_steps = most_warm + options["steps"]
    ready = wait_for_gpu()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train()
        result = watch.read()
        weights = sum(
            p.numel() for n, p in trainer.model.named_parameters() if ".layers." in n and "lora_" not in n
        )
        result |= {
            **describe_numbers(numbers, result["measured_steps"] * parts_of(way, batch)),
            "fused_layers": sum(layer.fused_into[0].ready for layer in fused_layers(trainer.model)),
            "accumulate": parts_of(way, batch),
            "decoder_weights": weights,
            "useful_tflops": round(4 * weights * result["tokens_a_second"] / 1e12, 1),
            "sentences": len(records),
            "build_seconds": round(ready - start, 1),
            "first_steps_seconds": round(watch.start - ready, 1),
        }
        if epoch:
            result["epoch_seconds"] = round(time.perf_counter() - start, 1)
        if torch.cuda.is_available():
            result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            result["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 1)
        if options["profile"] and torch.cuda.is_available():
            path = Path(f"{options['profile']}-{way.replace(', ', '-').replace(' ', '-')}-{batch}.json")
            try:
                result["gpu_busy"] = profile_steps(trainer, path, way)
            except Exception as error:  # what was measured stays
                traceback.print_exc()
                result["profile_error"] = f"{type(error).__name__}: {error}"[:200]
    finally:
        # The next Trainer wraps the model's forward anew.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        trainer.accelerator.free_memory()
    return result


def count_compilations(trainer) -> int:
    from torch._dynamo.utils import counters

    own = getattr(trainer, "count_compilations", None)  # a peer's Trainer has none
    return own() if own else counters["stats"]["unique_graphs"]


def our_parameters(way: str, **changes: Any):
    from biomerge_lib.core.composition import compose_parameters
    from biomerge_lib.core.parameters import check_parameters

    values = compose_parameters(["model=smollm2_135m", "runtime=h200"]).model_dump()
    values |= {
        "backend": "peft",
        "packing": True,
        "step_launch": "eager",
        "gradient_checkpointing": False,
        "fast_metrics": True,
        "offset_anchors": FORMAT.offset_anchors,
        "max_input_tokens": FORMAT.max_input_tokens,
        "num_train_epochs": 1.0,
        "eval_steps": 10_000,
        "save_steps": 10_000,
        "logging_steps": 10_000,
        "num_workers": 2,
        "wandb_mode": "disabled",
        # A number: every layer is checkpointed, where auto would go by the card's memory.
        "row_tokens": 100_000 if "checkpoint" in way else "auto",
    }
    return check_parameters(values | OURS[way] | changes)


def build_ours(way: str, model, tokenizer, records: list, batch: int):
    """This project's Trainer, as 03_train builds it, without evaluation and checkpoints; and what it has seen."""
    from biomerge_lib.training.run import build_trainer

    parameters = our_parameters(way, per_device_train_batch_size=batch, gradient_accumulation_steps=1)
    dev = [record for record in records if record.spans][:2]
    checkpoints = Path(tempfile.mkdtemp()) / "checkpoints"
    if parameters.gradient_checkpointing:  # in the layers that the batch before needed not recompute, too
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = build_trainer(
        model, tokenizer, {"train": records, "dev": dev}, parameters, checkpoints=checkpoints
    )
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    trainer.callback_handler.callbacks = [
        callback
        for callback in trainer.callback_handler.callbacks
        if type(callback).__name__ in ("DefaultFlowCallback", "FiniteLoss")
    ]
    return trainer, lambda: (int(trainer.tokens_seen), trainer.examples_seen)


def build_peer_trainer(way: str, model, tokenizer, records: list, batch: int):
    """A peer's Trainer on the same token ids and labels, and what it has seen."""
    from biomerge_lib.prompts.ner_span import build_dataset

    dataset = build_dataset(records, tokenizer, FORMAT, max_target_tokens=128)
    trainer: Any = build_peer(way, model, tokenizer, dataset, batch=batch)
    seen: list[Any] = [0, 0]
    get_batches = trainer.get_batch_samples

    def counting(*arguments):
        batches, items = get_batches(*arguments)
        for found in batches:
            tokens, sentences = count_batch(found)
            seen[:] = seen[0] + tokens, seen[1] + sentences
        return batches, items

    trainer.get_batch_samples = counting
    return trainer, lambda: (int(seen[0]), int(seen[1]))


def profile_steps(trainer, path: Path, way: str) -> dict[str, Any]:
    """The share of time that the GPU is busy over three more steps; ``path`` and its page get its kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    steps = 3
    batches = iter(trainer.get_train_dataloader())
    model = trainer.model_wrapped
    held = [trainer.get_batch_samples(batches, 1, trainer.args.device) for _ in range(2 * steps)]

    def run(chosen: list[Any]) -> float:
        start = time.perf_counter()
        for (inputs, *_), items in chosen:
            trainer.training_step(model, inputs, items)
            trainer._clip_grad_norm(model)
            trainer.optimizer.step()
            model.zero_grad()
        return time.perf_counter() - start

    torch.cuda.synchronize()
    host = run(held[:steps])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], record_shapes=True) as watched:
        run(held[steps:])
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        watched.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8", errors="replace"))
    found = summarise(trace, steps) | {"host_ms": round(host / steps * 1e3, 1)}
    write_report(path, found, describe_kernels(f"Kernels of {way}", found))
    return {
        "busy_share": round(found["busy_ms"] / found["ms_a_step"], 3),
        "kernels_a_step": found["kernels_a_step"],
        "profiled_ms": found["ms_a_step"],
        "busy_ms": found["busy_ms"],
        "host_ms": found["host_ms"],
    }


def matrix_peak() -> float | None:
    """TFLOP/s of an 8192 x 8192 x 8192 bfloat16 matrix product on random data: the card's measured limit."""
    import torch

    if not torch.cuda.is_available():
        return None
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ right
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(2 * 8192**3 / statistics.median(times[3:]) / 1e9, 1)


class Way:
    """A way's process: it imports, then waits until it may measure."""

    def __init__(self, way: str, options: dict[str, Any]) -> None:
        self.way, self.options = way, options
        threads = max(
            2, len(os.sched_getaffinity(0)) // len(options["ways"])
        )  # all ways compile at the same time
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training_speed", "--one", json.dumps(options | {"way": way})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=PROJECT_DIR,
            env={"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
            | os.environ
            | {"TOKENIZERS_PARALLELISM": "false"},
        )
        self.lines = cast(IO[str], self.process.stdout)

    def wait_for_imports(self) -> None:
        next((line for line in self.lines if line == "READY\n"), None)

    def measure(self) -> Iterator[dict[str, Any]]:
        """Its rows as they come; a process that broke down is a row with its last line."""
        if self.process.poll() is None:  # else its error is read below
            go = cast(IO[str], self.process.stdin)
            go.write("GO\n")
            go.flush()
        failed = False
        for line in self.lines:
            if line.startswith("ROW "):
                yield (row := json.loads(line.removeprefix("ROW ")))
                failed |= "error" in row
        if self.process.wait() or failed:
            self.errors.seek(0)
            text = self.errors.read()
            print(text[-3000:], file=sys.stderr)
            if self.process.returncode:
                last = (text.strip().splitlines() or ["no output"])[-1]
                if "Timeout (" in text:  # of faulthandler
                    last = f"hung for {self.options['way_limit']:.0f} s"
                yield {"way": self.way, "batch": self.options["batches"][0], "error": last[:200]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", default="8b", help=f"{', '.join(SHAPES)} (random weights), or a prepared backbone's folder"
    )
    parser.add_argument("--data_dir", default="data/bc5cdr_iob/ner")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=[*OURS, *PEERS], metavar="WAY")
    parser.add_argument("--batches", nargs="+", type=int, default=[32], help="sentences an optimiser step")
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    parser.add_argument(
        "--way-seconds", type=float, default=8, help=f"measure no longer, but {FEWEST_STEPS} steps at least"
    )
    parser.add_argument(
        "--way-limit", type=float, default=240, help="seconds until a measurement that hangs is ended"
    )
    parser.add_argument(
        "--epochs", nargs="*", type=int, default=[], help="also train whole epochs of so many sentences"
    )
    parser.add_argument(
        "--profile", help="begins the names of files for the kernels' times, two for each way"
    )
    parser.add_argument("--card-gb", type=float, help="hold each way to so many GB of the card")
    parser.add_argument(
        "--out", default=str(REPORTS / "training_speed.json"), help="JSON file of all runs; this run is added"
    )
    parser.add_argument("--merge", nargs="*", metavar="JSON", help="only add these files' runs to --out")
    # A published command has it: how many ways warmed up together. Now each does alone.
    parser.add_argument("--abreast", help=argparse.SUPPRESS)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if options["one"]:
        measure_way(options["one"])
        return
    out = Path(options["out"])
    if options["merge"] is not None:
        files = [json.loads(Path(file).read_text(encoding="utf-8")) for file in options["merge"]]
        add_runs(out, [run for file in files for run in file["runs"]], METHOD)
        return
    started = time.perf_counter()
    from_files = any("unsloth" in way for way in options["ways"])
    backbone = str(find_backbone(options["shape"], weightless=not from_files))
    ways = [Way(way, options | {"backbone": backbone}) for way in options["ways"]]
    for way in ways:
        way.wait_for_imports()
    run: dict[str, Any] = {
        "command": command("training_speed"),
        "shape": options["shape"],
        "matrix_peak_tflops": matrix_peak(),
        "provenance": provenance(),
        "rows": [],
    }
    for way in ways:
        for row in way.measure():
            if run["matrix_peak_tflops"] and "useful_tflops" in row:
                row["share_of_peak"] = round(row["useful_tflops"] / run["matrix_peak_tflops"], 3)
            print(json.dumps(row), flush=True)
            run["rows"].append(row)
            # Now, so that what comes later can cost nothing that is measured.
            add_runs(out, [run | {"seconds": round(time.perf_counter() - started)}], METHOD)


if __name__ == "__main__":
    main()
