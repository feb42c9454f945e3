"""How fast a training step is: this project's, and its peers' on the same sentences, on one GPU, in one run.

    python -m benchmarks.training_speed --shape 8b --data_dir data/bc5cdr_iob/ner
    python -m benchmarks.training_speed --shape backbones/smollm2-135m --batches 8 32 128 256 --steps 50 --ways trl
    python -m benchmarks.training_speed --shape backbones/smollm2-135m --ways packed+graphed --epochs 1000 4560 32000
    python -m benchmarks.training_speed --shape tiny --batches 4 --ways packed padded   # to try it on a CPU

Every way trains LoRA r = 8 on all linear layers on the same anchored sentences, in a process of its own:

    packed, packed+compiled, ...   this project's Trainer with its parameters of those names
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
steps. All processes import side by side, then each loads, warms up and measures alone; those that compile warm up side
by side where there is one batch size. Writes reports/training_speed.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from benchmarks.random_llama import find_backbone
from benchmarks.training_page import add_runs
from benchmarks.training_peers import PEERS, build_peer, count_batch, load_peer
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance

REPORT = PROJECT_DIR / "reports" / "training_speed.json"
OURS: dict[str, dict[str, Any]] = {  # parameters of this project
    "padded": {"packing": False},
    "padded+checkpointing": {"packing": False, "gradient_checkpointing": True},
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
    "unsloth padded": {"backend": "unsloth", "packing": False},
}
WAYS = [
    "unsloth packed",
    "unsloth packed+checkpointing",
    "packed+compiled",
    "packed",
    "packed+checkpointing",
    "packed+compiled+checkpointing",
    "padded",
    "brief",
    "tuned",
    "trl",
    "unsloth",
    "unsloth tuned",
]
METHOD = __doc__.split("\n\n", 2)[2]
FEWEST_STEPS = 4  # measured, however slow they are
QUIET_STEPS = 20  # without a capture, before a graphed way is measured
MOST_WARM_STEPS = 120  # even if it still captures


def compiles(way: str) -> bool:
    return "compiled" in way or "unsloth" in way


def warm_steps(way: str) -> int:
    """First steps that are not measured: compilation, graphs (one a shape of batch), the allocator's growth.

    More of them are left out while graphs are still being captured.
    """
    return 16 if "graphed" in way else 6 if compiles(way) else 3


class Stopwatch:
    """Times a Trainer's optimiser steps between two moments at which the GPU has done all its work.

    ``count`` gives the real tokens and sentences that the Trainer has seen, ``compiled`` what was compiled or captured.
    The first ``warm`` steps are left out, and more, up to ``most_warm``, until ``QUIET_STEPS`` have compiled nothing.
    """

    def __init__(
        self,
        warm: int,
        most_warm: int,
        steps: int | None,
        seconds: float,
        *,
        count: Callable[[], tuple[int, int]],
        compiled: Callable[[], int],
        when_warm: Callable[[], None],
    ) -> None:
        from transformers import TrainerCallback

        watch = self
        self.steps = 0
        self.warm: int | None = None  # steps before the first measured one
        self.last_compiled = (0, 0)  # how much was compiled, and at which step that changed last
        self.warm_end = self.start = 0.0
        self.at_start = (0, 0, 0)  # tokens, sentences, compilations
        self.end: float  # at the last measured step

        class AtStepEnd(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                watch.steps += 1
                if watch.warm is None:
                    if compiled() != watch.last_compiled[0]:
                        watch.last_compiled = compiled(), watch.steps
                    quiet = watch.steps - watch.last_compiled[1] >= QUIET_STEPS
                    if watch.steps >= warm and (quiet or watch.steps >= most_warm):
                        watch.warm, watch.warm_end = watch.steps, wait_for_gpu()
                        when_warm()
                        watch.at_start = (*count(), compiled())
                        watch.start = time.perf_counter()
                else:
                    measured = watch.steps - watch.warm
                    late = time.perf_counter() - watch.start > seconds and measured >= FEWEST_STEPS
                    if steps is not None:
                        control.should_training_stop |= measured >= steps or late
                    if control.should_training_stop or state.global_step >= state.max_steps:
                        watch.end = wait_for_gpu()  # before the Trainer puts its things away
                return control

        def read() -> dict[str, Any]:
            taken, done = watch.end - watch.start, watch.steps - cast(int, watch.warm)
            tokens, sentences, recompiles = (
                after - before for after, before in zip((*count(), compiled()), watch.at_start, strict=True)
            )
            return {
                "measured_steps": done,
                "ms_a_step": round(taken / done * 1e3, 1),
                "tokens_a_step": round(tokens / done),
                "tokens_a_second": round(tokens / taken),
                "sentences_a_second": round(sentences / taken, 1),
                "recompiles": recompiles,
            }

        self.callback, self.read = AtStepEnd(), read


def wait_for_gpu() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Turns:
    """Where a way's process waits until it may go on; one that hangs in between is ended."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.left = 2  # to load the model, and to measure

    def wait(self) -> None:
        if self.left:
            self.left -= 1
            faulthandler.cancel_dump_traceback_later()
            print("TURN", flush=True)
            if not sys.stdin.readline():
                sys.exit("the benchmark itself has ended")
            self.watch()

    def watch(self) -> None:
        faulthandler.dump_traceback_later(self.limit, exit=True)


def measure_way(way: str, options: dict[str, Any]) -> None:
    """All measurements of a way in this process: the model is loaded once, a Trainer is built for each."""
    started = time.perf_counter()
    if "unsloth" in way:
        # Two processes at once must not write the same files.
        os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()
        os.environ.setdefault("UNSLOTH_RETURN_LOGITS", "0")
        import unsloth  # noqa: F401
    import torch

    import biomerge_lib.training.run  # noqa: F401
    from biomerge_lib.prompts.ner_span import read_split
    from biomerge_lib.prompts.tokenizer import load_tokenizer

    torch.set_float32_matmul_precision("high")
    tokenizer = load_tokenizer(Path(options["backbone"]))
    records = read_split(options["data_dir"], "train")
    turns = Turns(options["way_limit"])
    imported = time.perf_counter()
    turns.wait()
    start = time.perf_counter()
    model = load_ours(way, options) if way in OURS else load_peer(way, options["backbone"])
    startup = {
        "import_seconds": round(imported - started, 1),
        "load_seconds": round(wait_for_gpu() - start, 1),
    }
    runs = [
        {"anchors": anchors, "batch": batch} for anchors in options["anchors"] for batch in options["batches"]
    ]
    runs += [run | {"epoch": size} for run in runs for size in options["epochs"]]
    for run in runs:
        row: dict[str, Any] = {"way": way} | run
        turns.watch()
        try:
            row |= startup | measure(way, model, tokenizer, records, options | run, turns)
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print("ROW " + json.dumps(row), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(way: str, model, tokenizer, records, options: dict[str, Any], turns: Turns) -> dict[str, Any]:
    """One batch size, or one whole epoch (``epoch`` sentences) with the steps behind the first ones measured."""
    import torch

    epoch, batch = options.get("epoch"), options["batch"]
    size = epoch or max(options["sentences"], batch)
    records = (records * (size // len(records) + 1))[:size] if epoch else spread(records, size)
    accumulate = 4 if way == "brief" and batch >= 4 else options["accumulate"]
    start = time.perf_counter()
    build = build_ours if way in OURS else build_peer_trainer
    trainer, count = build(way, model, tokenizer, records, options | {"accumulate": accumulate})
    warm = min(warm_steps(way), epoch // batch - 1) if epoch else warm_steps(way)
    most_warm = MOST_WARM_STEPS if "graphed" in way and not epoch else warm
    watch = Stopwatch(
        warm,
        most_warm,
        None if epoch else options["steps"],
        options["way_seconds"],
        count=count,
        compiled=lambda: count_compilations(trainer),
        when_warm=turns.wait,
    )
    trainer.add_callback(watch.callback)
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
            "accumulate": accumulate,
            "decoder_weights": weights,
            "useful_tflops": round(4 * weights * result["tokens_a_second"] / 1e12, 1),
            "sentences": len(records),
            "build_seconds": round(ready - start, 1),
            "warm_steps": watch.warm,
            "first_steps_seconds": round(watch.warm_end - ready, 1),
        }
        if epoch:
            result["epoch_seconds"] = round(time.perf_counter() - start, 1)
        if torch.cuda.is_available():
            result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            result["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 1)
        if options.get("profile"):
            result["gpu_busy"] = profile_steps(trainer, options["profile"])
    finally:
        # The next Trainer wraps the model's forward anew.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        trainer.accelerator.free_memory()
    return result


def spread(records: list, size: int) -> list:
    """So many records, evenly over all."""
    return records if size >= len(records) else [records[k * len(records) // size] for k in range(size)]


def count_compilations(trainer) -> int:
    from torch._dynamo.utils import counters

    own = getattr(trainer, "count_compilations", None)  # a peer's Trainer has none
    return own() if own else counters["stats"]["unique_graphs"]


def our_parameters(way: str, options: dict[str, Any], **changes: Any):
    from biomerge_lib.core.parameters import check_parameters, compose_parameters

    values = compose_parameters(["model=smollm2_135m", f"runtime={options['runtime']}"]).model_dump()
    values |= {
        "backend": "peft",
        "packing": True,
        "step_launch": "eager",
        "gradient_checkpointing": False,
        "fast_metrics": True,
        "max_input_tokens": options["max_tokens"],
        "num_train_epochs": 1.0,
        "eval_steps": 10_000,
        "save_steps": 10_000,
        "logging_steps": 10_000,
        "num_workers": options["num_workers"],
        "wandb_mode": "disabled",
    }
    return check_parameters(values | OURS[way] | changes)


def load_ours(way: str, options: dict[str, Any]):
    from biomerge_lib.training.run import build_model

    return build_model(our_parameters(way, options), options["backbone"])


def build_ours(way: str, model, tokenizer, records, options: dict[str, Any]):
    """This project's Trainer, as 03_train builds it, without evaluation and checkpoints; and what it has seen."""
    from biomerge_lib.training.run import build_trainer

    parameters = our_parameters(
        way,
        options,
        offset_anchors=options["anchors"],
        per_device_train_batch_size=options["batch"] // options["accumulate"],
        gradient_accumulation_steps=options["accumulate"],
    )
    dev = [record for record in records if record.spans][:2]
    checkpoints = Path(tempfile.mkdtemp()) / "checkpoints"
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


def build_peer_trainer(way: str, model, tokenizer, records, options: dict[str, Any]):
    """A peer's Trainer on the same token ids and labels, and what it has seen."""
    from biomerge_lib.core.prompt_format import PromptFormat
    from biomerge_lib.prompts.ner_span import build_dataset

    dataset = build_dataset(
        records,
        tokenizer,
        PromptFormat(
            offset_anchors=options["anchors"], corpus_cue=False, max_input_tokens=options["max_tokens"]
        ),
        max_target_tokens=128,
    )
    names = ("batch", "accumulate", "num_workers")
    trainer: Any = build_peer(way, model, tokenizer, dataset, **{name: options[name] for name in names})
    seen: list[Any] = [0, 0]
    get_batches = trainer.get_batch_samples

    def counting(*arguments):
        batches, items = get_batches(*arguments)
        for batch in batches:
            tokens, sentences = count_batch(batch)
            seen[:] = seen[0] + tokens, seen[1] + sentences
        return batches, items

    trainer.get_batch_samples = counting
    return trainer, lambda: (int(seen[0]), int(seen[1]))


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
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=[*OURS, *PEERS], metavar="WAY")
    parser.add_argument("--batches", nargs="+", type=int, default=[32], help="sentences an optimiser step")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a step (brief: always 4)")
    parser.add_argument("--anchors", nargs="+", default=["start"])
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    parser.add_argument(
        "--way-seconds", type=float, default=8, help=f"measure no longer, but {FEWEST_STEPS} steps at least"
    )
    parser.add_argument(
        "--way-limit", type=float, default=240, help="seconds until a measurement that hangs is ended"
    )
    parser.add_argument(
        "--abreast", type=int, default=3, help="compiling ways that load and warm up together"
    )
    parser.add_argument("--sentences", type=int, default=2048, help="of the corpus, to draw steps from")
    parser.add_argument(
        "--epochs", nargs="*", type=int, default=[], help="also train whole epochs of so many sentences"
    )
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--runtime", default="h200")
    parser.add_argument("--profile", help="file for the kernels' times")
    parser.add_argument("--out", default=str(REPORT), help="JSON file of all runs; this run is added")
    parser.add_argument("--merge", nargs="*", metavar="JSON", help="only add these files' runs to --out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if options["one"]:
        measure_way(options["one"], json.loads(os.environ["BIOMERGE_BENCHMARK"]))
        return
    if options["merge"] is not None:
        files = [json.loads(Path(file).read_text(encoding="utf-8")) for file in options["merge"]]
        add_runs(Path(options["out"]), [run for file in files for run in file["runs"]], METHOD)
        return
    import torch

    folder = find_backbone(options["shape"])
    started = time.perf_counter()
    processes = [Way(way, options | {"backbone": str(folder)}) for way in options["ways"]]
    for process in processes:
        process.wait_for_turn()
    print(f"{time.perf_counter() - started:.0f} s: all have imported", flush=True)
    peak = matrix_peak() if torch.cuda.is_available() else None
    groups = [[process] for process in processes]
    if len(options["batches"]) == len(options["anchors"]) == 1:
        together = [process for process in processes if compiles(process.way)]
        starts = range(0, len(together), options["abreast"])
        groups = [together[start : start + options["abreast"]] for start in starts]
        groups += [[process] for process in processes if not compiles(process.way)]
    run: dict[str, Any] = {
        "command": "python -m benchmarks.training_speed " + shlex.join(sys.argv[1:]),
        "shape": options["shape"],
        "matrix_peak_tflops": peak and round(peak, 1),
        "provenance": provenance(),
    }

    def keep() -> None:
        """Write all rows so far, so that what comes later can cost nothing that is measured."""
        rows = [with_share(row, peak) for process in processes for row in process.rows]
        add_runs(
            Path(options["out"]),
            [run | {"seconds": round(time.perf_counter() - started), "rows": rows}],
            METHOD,
        )

    for group in groups:
        for process in group:
            process.go_on()
        for process in group:
            process.wait_for_turn()
        for process in group:
            process.go_on()
            process.wait_for_end(keep)
            print(f"{time.perf_counter() - started:.0f} s: {process.way} is done", flush=True)
            keep()


def with_share(row: dict[str, Any], peak: float | None) -> dict[str, Any]:
    """A row with its share of the matrix peak, where both are known."""
    if not (peak and "useful_tflops" in row):
        return row
    return row | {"share_of_peak": round(row["useful_tflops"] / peak, 3)}


class Way:
    """A way's process, which waits for its turns, and the rows that it has printed."""

    def __init__(self, way: str, options: dict[str, Any]) -> None:
        self.way, self.options = way, options
        self.rows: list[dict[str, Any]] = []
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training_speed", "--one", way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=PROJECT_DIR,
            env=os.environ | {"BIOMERGE_BENCHMARK": json.dumps(options), "TOKENIZERS_PARALLELISM": "false"},
        )

    def go_on(self) -> None:
        with suppress(BrokenPipeError):  # it has ended, which wait_for_end reports
            stdin = cast(IO[str], self.process.stdin)
            stdin.write("\n")
            stdin.flush()

    def wait_for_turn(self, keep: Callable[[], None] | None = None) -> bool:
        """Read rows until the process waits again, and call ``keep`` after each; False when it has ended."""
        for line in cast(IO[str], self.process.stdout):
            if line.startswith("ROW "):
                print(line.removeprefix("ROW "), end="", flush=True)
                self.rows.append(json.loads(line.removeprefix("ROW ")))
                if keep:
                    keep()
            elif line == "TURN\n":
                return True
        return False

    def wait_for_end(self, keep: Callable[[], None] | None = None) -> None:
        """Read the last rows; a process that broke down is a row with its last line."""
        while self.wait_for_turn(keep):
            self.go_on()
        self.process.wait()
        if self.process.returncode or any("error" in row for row in self.rows):
            self.errors.seek(0)
            text = self.errors.read()
            print(text[-3000:], file=sys.stderr)
            if self.process.returncode:
                last = (text.strip().splitlines() or ["no output"])[-1]
                if "Timeout (" in text:  # of faulthandler
                    last = f"hung for {self.options['way_limit']:.0f} s"
                where = {"batch": self.options["batches"][0], "anchors": self.options["anchors"][0]}
                self.rows.append({"way": self.way, **where, "error": last[:200]})


if __name__ == "__main__":
    main()
