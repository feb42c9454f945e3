"""How fast vLLM serves an 8B shape and a trained small model, and whether it answers as transformers does.

    python -m benchmarks.served_speed --data_dir data/bc5cdr_iob/ner          # one GPU; about 4 minutes, 17 GB of disk
    python -m benchmarks.served_speed --data_dir data/sample/ner --shape tiny --limit 8         # on a CPU, to try it
    python -m benchmarks.served_speed --data_dir data/bc5cdr_iob/ner --ways --out reports/served_start_8b.json  # 5 min

The 8B has Llama-3's shape and tokenizer and random bfloat16 weights: its answers mean nothing and never end, so each
is cut at 64 tokens, more than a trained model writes. The trained model is the shipped adapter, merged. ``--ways``
takes the seconds of a start apart instead, in the ways to start (``WAYS``; the first two by default), and has
one server answer for several runs. Writes the report after each part, so that a part that fails costs no other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, cast

from benchmarks.common import REPORTS, origin, origin_of_dev, write_report
from benchmarks.decoding import compare, decode, serve
from benchmarks.random_llama import SHAPES, find_backbone
from biomerge_lib.apply.ready_models import SHIPPED, merge_for_use
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.predictions import Prediction, build_prompts
from biomerge_lib.decoding.vllm_client import served_names
from biomerge_lib.decoding.vllm_server import EXECUTION
from biomerge_lib.experiment.runs import quiet_libraries
from biomerge_lib.prompts.manifest import Manifest, read_manifest
from biomerge_lib.prompts.ner_span import read_split
from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer
from biomerge_lib.report.display import markdown_table
from biomerge_lib.scoring.ner_metrics import score_predictions

RANDOM = Manifest(
    prompt_format=PromptFormat(offset_anchors="start", corpus_cue=False, max_input_tokens=512),
    max_new_tokens=64,
)
WARM_UP = 8  # sentences answered before the clock of "answering" starts; their time counts as start-up
FEW_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 16, 128, 256]}
FEW = ["--compilation-config", json.dumps(FEW_GRAPHS)]
LEAN = [*FEW, "--kernel-config", json.dumps({"enable_flashinfer_autotune": False})]
# How a server is started: execution, arguments that come after the library's own.
WAYS: dict[str, tuple[str, list[str]]] = {
    "as the library does": ("graphs", []),
    "the same again": ("graphs", []),
    "4 graphs, no autotuning": ("graphs", LEAN),
    "eager": ("eager", []),
    "4 graphs, no autotuning, fixed cache": (
        "graphs",
        [*LEAN, "--kv-cache-memory-bytes", str(16 * 2**30)],
    ),
    "no weights read": ("graphs", ["--load-format", "dummy"]),
}
BY_DEFAULT = [*WAYS][:2]
# What a server's log says of its start. The engine's first line comes when all is imported, twice.
PHASES = {
    "weights s": r"Loading weights took ([\d.]+) seconds",
    "model s": r"Model loading took .* and ([\d.]+) seconds",
    "graphs s": r"Graph capturing finished in ([\d.]+) secs",
    "engine s": r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s",
}
ENGINE_BEGINS = r"(\d\d-\d\d \d\d:\d\d:\d\d) .*Initializing a V1 LLM engine"
PARTS = {
    "starts": "",
    "reloads": "## Several runs through one server",
    "served": "",
    "decoded": "## The same in transformers",
    "parity": "## Parity of the trained model",
}


class Measurement:
    """The report of one command, written after each part."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.starts: Counter[str] = Counter()
        self.records: list[Record] = read_split(options.data_dir, "dev", limit=options.limit)
        self.report: dict[str, Any] = {
            **origin("served_speed"),
            **origin_of_dev(options.data_dir, self.records),
            **{part: [] for part in PARTS},
            "failed": {},
        }

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Write the page when the block ends; what goes wrong in it is printed and kept."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            self.report["failed"][name] = f"{type(error).__name__}: {error}".replace("\n", " ")
        write_report(self.options.out, self.report, describe(self.report))
        print(f"{name}: {time.monotonic() - started:.0f} s", self.report["failed"].get(name, ""), flush=True)
        for rows in PARTS:
            print(rows, self.report[rows][-1:], flush=True)

    def serve(self, model_dir: Path, manifest: Manifest, *, dtype: str, execution: str) -> list[Prediction]:
        """Start a server, let it answer the records, and stop it: a row, and the predictions."""
        name = f"{served_names(model_dir)[0]}-{dtype}-{execution}"
        self.starts[name] += 1
        options: dict[str, Any] = {"dtype": dtype, "execution": execution}
        if self.options.logs:
            options["log_path"] = self.options.logs / f"{name}-{self.starts[name]}.log"
        with serve(model_dir, manifest, **options) as (server, ask):
            warm_up = ask(self.records[:WARM_UP], concurrency=self.options.concurrency)
            done = ask(self.records, concurrency=self.options.concurrency)
        start_up = cast(float, server.startup_seconds) + warm_up.seconds
        prompts = build_prompts(self.records, load_plain_tokenizer(model_dir), manifest.prompt_format)
        self.report["served"].append(
            {
                "model": server.model_id,
                "dtype": dtype,
                "execution": server.executes,
                "start": self.starts[name],
                "weights GB": round(
                    sum(path.stat().st_size for path in model_dir.glob("*.safetensors")) / 1e9, 2
                ),
                "sentences": len(self.records),
                "in flight": self.options.concurrency,
                "tokens a prompt": round(mean(len(prompt.prompt_ids) for prompt in prompts), 1),
                "tokens an answer": round(done.new_tokens / len(prompts), 1),
                "start-up s": round(start_up, 1),
                "answering s": round(done.seconds, 1),
                "together s": round(start_up + done.seconds, 1),
                "sentences/s": round(done.sentences_per_second, 1),
                "new tokens/s": round(done.tokens_per_second),
                "vLLM": server.version,
            }
        )
        return done.predictions

    def start(self, model_dir: Path, way: str) -> None:
        """A row of where a start's seconds go, from nothing to the score."""
        execution, arguments = WAYS[way]
        options: dict[str, Any] = {"dtype": "bfloat16", "execution": execution, "extra_arguments": arguments}
        if self.options.logs:
            options["log_path"] = self.options.logs / f"start-{len(self.report['starts'])}.log"
        began = datetime.now()
        with serve(model_dir, RANDOM, **options) as (server, ask):
            done = ask(self.records, concurrency=self.options.concurrency)
            together = (datetime.now() - began).total_seconds()
            log = server.log_path.read_text(encoding="utf-8", errors="replace")
        begins = re.search(ENGINE_BEGINS, log)
        said = {name: re.search(pattern, log) for name, pattern in PHASES.items()}
        self.report["starts"].append(
            {
                "way": way,
                "until the engine begins s": begins and seconds_between(began, begins[1]),
                **{name: found and round(float(found[1]), 1) for name, found in said.items()},
                "start-up s": round(cast(float, server.startup_seconds), 1),
                "answering s": round(done.seconds, 1),
                "together s": round(together, 1),
                "sentences": len(self.records),
                "vLLM": server.version,
            }
        )

    def reload(self, models: list[Path], manifest: Manifest, *, dtype: str) -> None:
        """Rows of one server that answers twice for the first model, then for the others, and for the first again.

        Of tied models, too, which the library does not reload: the last two columns tell whether it could.
        """
        os.environ["VLLM_SERVER_DEV_MODE"] = "1"
        first, *others = models
        with serve(first, manifest, dtype=dtype, others=others) as (server, ask):
            found: dict[str, list[Prediction]] = {}
            for model_dir in [first, *models, first]:
                started = time.monotonic()
                if model_dir.resolve() != server.model_dir:  # in place, also where `load` would start anew
                    server._reload(model_dir.resolve())
                    server.model_dir, server.model_id = model_dir.resolve(), served_names(model_dir)[0]
                loaded = time.monotonic() - started
                done = ask(self.records, concurrency=self.options.concurrency)
                before = found.get(server.model_id, done.predictions)
                pairs = zip(before, done.predictions, strict=True)
                same = sum(one.answer_ids == other.answer_ids for one, other in pairs)
                self.report["reloads"].append(
                    {
                        "model": server.model_id,
                        "dtype": dtype,
                        "start-up s": None if found else round(cast(float, server.startup_seconds), 1),
                        "reload s": round(loaded, 1),
                        "answering s": round(done.seconds, 1),
                        "F1": round(score_predictions(done.predictions)["ner_f1"], 4),
                        "as the first time": f"{same} of {len(before)}" if server.model_id in found else None,
                    }
                )
                found.setdefault(server.model_id, done.predictions)

    def decode(self, model_dir: Path, manifest: Manifest, *, dtype: str) -> list[Prediction]:
        """The same with transformers; the F1 of random weights means nothing."""
        batch_size = self.options.batch_size
        [(_, found, seconds)] = decode(model_dir, self.records, manifest, dtype=dtype, batch_size=batch_size)
        self.report["decoded"].append(
            {
                "model": served_names(model_dir)[0],
                "decoder": f"transformers, batches of {batch_size}",
                "dtype": dtype,
                "sentences": len(self.records),
                "seconds": round(seconds, 1),
                "sentences/s": round(len(self.records) / seconds, 1),
                "tokens an answer": round(mean(len(ids) for p in found for ids in p.answer_ids), 1),
                "F1": round(score_predictions(found)["ner_f1"], 4),
            }
        )
        return found


def seconds_between(began: datetime, clock: str) -> float:
    """From then to a log's ``12-31 23:59:59``."""
    then = datetime.strptime(f"{began.year}-{clock}", "%Y-%m-%d %H:%M:%S")
    return round((then - began).total_seconds(), 1)


def make_twin(model_dir: Path, scratch: Path, noise: float) -> Path:
    """The model under another name: its files as links, its weights with ``noise`` of their spread (0: as they are)."""
    twin = scratch / "twin"
    twin.mkdir()
    for path in model_dir.iterdir():
        (twin / path.name).symlink_to(path.resolve())
    if noise:
        import torch
        from safetensors.torch import load_file, save_file

        torch.manual_seed(0)
        weights = load_file(model_dir / "model.safetensors")
        moved = {name: rows + noise * rows.std() * torch.randn_like(rows) for name, rows in weights.items()}
        (twin / "model.safetensors").unlink()
        save_file(moved, twin / "model.safetensors", metadata={"format": "pt"})
    return twin


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The page's lines."""
    yield from (
        "# vLLM: start-up, speed and parity on one machine",
        "",
        f"`{report['command']}`, commit {report['commit']}, {report['device']}, Python {report['python']}, "
        f"torch {report['versions'].get('torch')}, transformers {report['versions'].get('transformers')}.",
        f"{report['records']} records of {report['data']} (sha256 {report['data_sha256'][:12]}), spread evenly.",
        "",
        "*start-up*: from starting the server to its answer to eight sentences; *answering*: the records, through the "
        "project's own client. *start*: the first of a model in this run, the second (kernels that Triton compiles at "
        "first use are kept on disk). The random model never writes EOS, so that each of its answers is cut at "
        f"{RANDOM.max_new_tokens} tokens. *execution*: eager, with CUDA graphs, or compiled with "
        "torch.compile and graphs. *until the engine begins*: what is imported; *model*: made and its weights read; "
        "*engine*: profiled, cache made, warmed up, graphs captured. *together*: from nothing to the last answer.",
        "",
    )
    for part, title in PARTS.items():
        if rows := report[part]:
            yield from ([title, ""] if title else [])
            yield from (markdown_table(rows[0], [row.values() for row in rows]), "")
    if report["failed"]:
        yield from ("## Failed", "", *(f"- {what}: {why}" for what, why in report["failed"].items()))


def compare_starts(measured: Measurement, ways: list[str]) -> None:
    if measured.options.shape != "none":
        model_dir = find_backbone(measured.options.shape)
        for way in ways:
            with measured.part(way):
                measured.start(model_dir, way)
        with TemporaryDirectory() as scratch, measured.part("reload of the random model"):
            measured.reload([model_dir, make_twin(model_dir, Path(scratch), 0.0)], RANDOM, dtype="bfloat16")
    with TemporaryDirectory() as scratch, measured.part("reload of the trained model"):
        trained = merge_for_use(SHIPPED)
        manifest = Manifest.of(read_manifest(trained), where=trained)
        measured.reload([make_twin(trained, Path(scratch), 0.5), trained], manifest, dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of dev.jsonl")
    parser.add_argument(
        "--shape", choices=[*sorted(SHAPES), "none"], default="8b", help="of the random model"
    )
    parser.add_argument("--limit", type=int, default=800, help="records (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=256, help="requests in flight (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="of transformers (%(default)s)")
    parser.add_argument(
        "--execution", nargs="+", choices=EXECUTION, default=["graphs"], help="of the random model's servers"
    )
    ways = "take the start apart instead, in these ways (none named: the first two)"
    parser.add_argument("--ways", nargs="*", choices=WAYS, help=ways)
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument(
        "--dtypes",
        nargs="*",
        default=["bfloat16", "float32"],
        help="of the trained model (both; none leaves it out)",
    )
    parser.add_argument(
        "--out", type=Path, default=REPORTS / "served_speed.json", help="JSON file; its page stands beside it"
    )
    options = parser.parse_args()
    quiet_libraries()
    measured = Measurement(options)
    if options.ways is not None:
        compare_starts(measured, options.ways or BY_DEFAULT)
        sys.exit(1 if measured.report["failed"] else 0)
    if options.shape != "none":
        model_dir = find_backbone(options.shape)
        for execution in options.execution:
            with measured.part(f"{options.shape} {execution}"):
                measured.serve(model_dir, RANDOM, dtype="bfloat16", execution=execution)
        with measured.part(f"{options.shape} in transformers"):
            measured.decode(model_dir, RANDOM, dtype="bfloat16")
    if options.dtypes:
        trained = merge_for_use(SHIPPED)  # in float32: each decoder rounds it as its own dtype wants
        manifest = Manifest.of(read_manifest(trained), where=trained)
    for dtype in options.dtypes:
        with measured.part(f"{SHIPPED.name} {dtype}"):
            served = measured.serve(trained, manifest, dtype=dtype, execution="graphs")
            greedy = measured.decode(trained, manifest, dtype=dtype)
            row = compare(greedy, served, trained, greedy_dtype=dtype, served_dtype=dtype)
            measured.report["parity"].append(row)
    sys.exit(1 if measured.report["failed"] else 0)


if __name__ == "__main__":
    main()
