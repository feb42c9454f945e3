"""How fast the data path is and how much memory it takes; writes reports/data_speed.json and reports/data_speed.md.

    python -m benchmarks.data_speed --corpora ../shared/corpora --sizes 10000 100000 1000000

Real corpora: the five IOB corpora are converted, checked, deduplicated and tokenised, then read again in a new process.
Scale: JSONL of generated sentences is tokenised; memory grows with the records alone. Each measurement runs in a
process of its own (peak memory is a process's), and the machine's load at its start is kept beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import REPORTS, origin, write_report
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record, write_records
from biomerge_lib.corpora.readers import read_corpus
from biomerge_lib.experiment.runs import PROJECT_DIR, quiet_libraries
from biomerge_lib.report.display import markdown_table

CORPORA = ("bc5cdr", "bc2gm", "jnlpba", "anatem", "bionlp13cg")
TOKENIZER = PROJECT_DIR / "tokenizers" / "smollm2_biomerge_tok"
EXAMPLES: dict[str, Any] = {
    "prompt_format": PromptFormat(offset_anchors="start", corpus_cue=True, max_input_tokens=512),
    "max_target_tokens": 128,
}
STAGES = {
    "convert_seconds": "converted, merged, deduplicated and written",
    "check_seconds": "read back and checked",
    "tokenise_seconds": "tokenised, or tokens from the cache",
}


class Clock:
    """What a measurement took: seconds of its stages, and CPU seconds of all threads from its first stage on."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.cpu = time.process_time()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.stages[name] = round(time.perf_counter() - started, 2)

    def read(self) -> dict[str, float]:
        """CPU seconds are what the work costs, however busy the machine is."""
        return {
            **self.stages,
            "seconds": round(sum(self.stages.values()), 2),
            "cpu_seconds": round(time.process_time() - self.cpu, 2),
            "peak_mb": peak_mb(),
        }


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def load_libraries() -> tuple[Any, float]:
    """The tokenizer, and the seconds that importing transformers and datasets for it took."""
    started = time.perf_counter()
    import datasets  # noqa: F401

    from biomerge_lib.prompts.tokenizer import load_tokenizer

    return load_tokenizer(TOKENIZER), round(time.perf_counter() - started, 2)


def measure_start(folder: str, corpora: str = "") -> dict[str, Any]:
    """Tokenised train and dev sets from a folder's JSONL, or from ``corpora`` and nothing else."""
    from biomerge_lib.corpora.conversion import write_corpus
    from biomerge_lib.prompts.ner_span import build_dataset, read_split

    tokenizer, imports = load_libraries()
    clock, found = Clock(), {}
    if corpora:
        sources = [str(Path(corpora) / f"{name}_iob") for name in CORPORA]
        with clock.stage("convert_seconds"):
            card = write_corpus(sources, folder, drop_leaks="train", deduplicate=True, conflicts="keep")
        splits_read = [split for source in card["sources"].values() for split in source["splits"].values()]
        found["sentences_converted"] = sum(split["sentences"] for split in splits_read)
    with clock.stage("check_seconds"):
        splits = [read_split(folder, split) for split in ("train", "dev")]
    cache = Path(folder) / "cache"
    cached = sorted(cache.glob("*"))
    with clock.stage("tokenise_seconds"):
        sets = [build_dataset(records, tokenizer, cache_dir=cache, **EXAMPLES) for records in splits]
    assert corpora or sorted(cache.glob("*")) == cached, "the cache was missed"
    found |= {"sentences_tokenised": sum(map(len, splits)), "examples": sum(map(len, sets))}
    return found | {"import_seconds": imports} | clock.read()


def measure_preflight(folder: str) -> dict[str, Any]:
    """Preflight on a folder's data, imports and all."""
    clock = Clock()
    with clock.stage("preflight_seconds"):
        from biomerge_lib.core.composition import compose_parameters
        from biomerge_lib.training.preflight import check_training

        words = [f"data_dir={folder}", "eval_limit=null", "corpus_cue=true", f"tokenizer_dir={TOKENIZER}"]
        found = check_training(compose_parameters(words))
    return clock.read() | {"train_records": found.scans["train"].records}


def measure_stream(folder: str) -> dict[str, Any]:
    """A JSONL split read and tokenised into the cache, or found there; a thousand examples from all over it."""
    from biomerge_lib.prompts.ner_span import build_dataset, read_split

    tokenizer, _ = load_libraries()
    imported, cache, clock = peak_mb(), Path(folder) / "cache", Clock()
    with clock.stage("tokenise_seconds"):
        dataset = build_dataset(
            read_split(folder, "train"),
            tokenizer,
            cache_dir=cache,
            **EXAMPLES,
        )
    for index in random.Random(0).sample(range(len(dataset)), min(1000, len(dataset))):
        dataset[index]
    found = clock.read()
    file = Path(folder) / "train.jsonl"
    with file.open("rb") as lines:
        sentences = sum(1 for _ in lines)
    return found | {
        "sentences": sentences,
        "sentences_per_second": round(sentences / max(found["seconds"], 0.01)),
        "tokens": sum(sum(batch["length"]) for batch in dataset.select_columns("length").iter(10000)),
        "file_mb": round(file.stat().st_size / 2**20, 1),
        "cache_mb": round(sum(path.stat().st_size for path in cache.iterdir()) / 2**20, 1),
        "imported_mb": imported,
    }


MEASURES = {"start": measure_start, "preflight": measure_preflight, "stream": measure_stream}


def generate(sentences: int, split: str = "train") -> Iterator[Record]:
    """Sentences of 8 to 45 words of the sample corpus in random order, with two mentions on average."""
    words = sorted({word for record in read_corpus("sample")["train"] for word in record.text.split()})
    chance = random.Random(split)
    for number in range(sentences):
        chosen = chance.choices(words, k=chance.randrange(8, 46))
        spans: list[tuple[int, int]] = []
        position = 0
        for word in chosen:
            if chance.random() < 0.075:
                spans.append((position, position + len(word)))
            position += len(word) + 1
        yield Record(" ".join(chosen), tuple(spans), f"{split}{number // 10}", "generated")


def run(name: str, *arguments: str) -> dict[str, Any]:
    """A measurement in a process of its own."""
    load = os.getloadavg()[0]
    words = [sys.executable, "-m", "benchmarks.data_speed", "--measure", name, *arguments]
    done = subprocess.run(words, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"load": round(load, 1)}


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The page's lines."""
    yield from (
        "# Speed and memory of the data path",
        "",
        f"Written by `{report['command']}` on {report['device']}, commit `{report['commit']}`.",
        "`load` is the machine's when the measurement began. The cores were shared with other work: seconds are upper",
        "bounds, and CPU seconds (of all threads) are what the work costs.",
        "",
    )
    if corpora := report.get("corpora"):
        first, second, preflight = (corpora[name] for name in ("first", "second", "preflight"))
        rows = []
        for name, found in corpora.items():
            what = "; ".join(f"{title} {found[stage]}" for stage, title in STAGES.items() if stage in found)
            what = what or f"{preflight['train_records']:,} training records, dev and test"
            rows.append([name, found["seconds"], found["cpu_seconds"], what, found["load"]])
        yield from (
            f"## The five IOB corpora: {first['sentences_converted']:,} sentences, of which "
            f"{first['sentences_tokenised']:,} (train and dev) are tokenised",
            "",
            markdown_table(["start", "seconds", "CPU seconds", "of which seconds", "load"], rows),
            "",
            f"Importing transformers and datasets took {first['import_seconds']} and {second['import_seconds']} s more "
            "(preflight needs neither).",
            "",
        )
    if report["scale"]:
        columns = {
            "sentences": "sentences",
            "file_mb": "JSONL MB",
            "seconds": "seconds",
            "cpu_seconds": "CPU seconds",
            "sentences_per_second": "sentences/s",
            "tokens": "tokens",
            "cache_mb": "cache MB",
            "peak_mb": "peak MB",
            "imported_mb": "of which imports",
            "reopened": "reopened: s, peak MB",
            "preflight": "preflight: s, peak MB",
            "load": "load",
        }
        brief = lambda cell: f"{cell['seconds']}, {cell['peak_mb']}" if isinstance(cell, dict) else cell  # noqa: E731
        rows = [[brief(row[name]) for name in columns] for row in report["scale"]]
        yield from ("## Generated JSONL, read and tokenised into the cache", "")
        yield markdown_table(columns.values(), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", help="folder of the five corpora (bc5cdr_iob, ...)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="numbers of generated sentences")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.measure:
        name, *arguments = options.measure
        print(json.dumps(MEASURES[name](*arguments)))
        return
    report: dict[str, Any] = origin("data_speed") | {"scale": []}
    with tempfile.TemporaryDirectory() as scratch:
        if options.corpora:
            folder = f"{scratch}/union"
            report["corpora"] = {
                "first": run("start", folder, options.corpora),
                "second": run("start", folder),
                "preflight": run("preflight", folder),
            }
            print(json.dumps(report["corpora"]))
        for size in options.sizes:
            folder = f"{scratch}/{size}"
            write_records(Path(folder) / "train.jsonl", generate(size))
            write_records(Path(folder) / "dev.jsonl", islice(generate(size, "dev"), 1000))
            row = run("stream", folder)
            row |= {"reopened": run("stream", folder), "preflight": run("preflight", folder)}
            report["scale"].append(row)
            print(json.dumps(row))
    write_report(REPORTS / "data_speed.json", report, describe(report))
    print(REPORTS / "data_speed.md")


if __name__ == "__main__":
    main()
