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
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from biomerge_lib.core.files import write_json
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record, write_records
from biomerge_lib.corpora.readers import read_corpus
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance, quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Result = TypeVar("Result")
CORPORA = ("bc5cdr", "bc2gm", "jnlpba", "anatem", "bionlp13cg")
TOKENIZER = PROJECT_DIR / "tokenizers" / "smollm2_biomerge_tok"
EXAMPLES: dict[str, Any] = {
    "prompt_format": PromptFormat(offset_anchors="start", corpus_cue=True, max_input_tokens=512),
    "max_target_tokens": 128,
}
REPORT = PROJECT_DIR / "reports" / "data_speed.json"


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return round(time.perf_counter() - started, 2), result


def cpu_since(start: float) -> float:
    """CPU seconds of all threads of this process: what a stage costs, however busy the machine is."""
    return round(time.process_time() - start, 2)


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def load_libraries() -> tuple[float, PreTrainedTokenizerFast]:
    """The tokenizer, and the seconds that importing transformers and datasets for it took."""

    def load() -> PreTrainedTokenizerFast:
        import datasets  # noqa: F401

        from biomerge_lib.prompts.tokenizer import load_tokenizer

        return load_tokenizer(TOKENIZER)

    return timed(load)


def measure_conversion(corpora: str, folder: str) -> dict:
    """The corpora to tokenised train and dev sets, from nothing."""
    from biomerge_lib.corpora.conversion import write_corpus
    from biomerge_lib.prompts.ner_span import build_dataset, read_split

    imports, tokenizer = load_libraries()
    cpu = time.process_time()
    sources = [str(Path(corpora) / f"{name}_iob") for name in CORPORA]
    convert, card = timed(
        lambda: write_corpus(sources, folder, drop_leaks="train", deduplicate=True, conflicts="keep")
    )
    check, splits = timed(lambda: {split: read_split(folder, split) for split in ("train", "dev")})
    cache = Path(folder) / "cache"
    tokenise, sets = timed(
        lambda: [build_dataset(found, tokenizer, cache_dir=cache, **EXAMPLES) for found in splits.values()]
    )
    return {
        "sentences_converted": sum(
            counts["sentences"] for source in card["sources"].values() for counts in source["splits"].values()
        ),
        "sentences_tokenised": sum(map(len, splits.values())),
        "examples": sum(map(len, sets)),
        "import_seconds": imports,
        "convert_seconds": convert,
        "check_seconds": check,
        "tokenise_seconds": tokenise,
        "seconds": round(convert + check + tokenise, 2),
        "cpu_seconds": cpu_since(cpu),
    }


def measure_second_start(folder: str) -> dict:
    """The same train and dev sets again, in a new process: lines are checked, tokens come from the cache."""
    from biomerge_lib.prompts.ner_span import build_dataset, read_split

    imports, tokenizer = load_libraries()
    cpu = time.process_time()
    check, splits = timed(lambda: {split: read_split(folder, split) for split in ("train", "dev")})
    cache = Path(folder) / "cache"
    before = len(list(cache.iterdir()))
    reopen, sets = timed(
        lambda: [build_dataset(found, tokenizer, cache_dir=cache, **EXAMPLES) for found in splits.values()]
    )
    assert len(list(cache.iterdir())) == before, "the cache was missed"
    return {
        "examples": sum(map(len, sets)),
        "import_seconds": imports,
        "check_seconds": check,
        "open_seconds": reopen,
        "seconds": round(check + reopen, 2),
        "cpu_seconds": cpu_since(cpu),
    }


def measure_preflight(folder: str) -> dict:
    """Preflight on the same data, imports and all."""
    from biomerge_lib.core.parameters import compose_parameters
    from biomerge_lib.training.preflight import check_training

    cpu = time.process_time()
    words = [f"data_dir={folder}", "eval_limit=null", "corpus_cue=true", f"tokenizer_dir={TOKENIZER}"]
    seconds, found = timed(lambda: check_training(compose_parameters(words)))
    records = found.numbers["train_records"]
    return {"seconds": seconds, "cpu_seconds": cpu_since(cpu), "train_records": records, "peak_mb": peak_mb()}


def measure_stream(folder: str) -> dict:
    """A JSONL split read and tokenised into the cache."""
    from biomerge_lib.prompts.ner_span import build_dataset, read_split

    _, tokenizer = load_libraries()
    cpu = time.process_time()
    before = peak_mb()
    build, dataset = timed(
        lambda: build_dataset(
            read_split(folder, "train"),
            tokenizer,
            cache_dir=Path(folder) / "cache",
            **EXAMPLES,
        )
    )
    cpu_seconds = cpu_since(cpu)
    sentences = sum(1 for _ in (Path(folder) / "train.jsonl").open("rb"))
    return {
        "sentences": sentences,
        "seconds": build,
        "cpu_seconds": cpu_seconds,
        "sentences_per_second": round(sentences / build),
        "tokens": sum(sum(batch["length"]) for batch in dataset.select_columns("length").iter(10000)),
        "file_mb": round((Path(folder) / "train.jsonl").stat().st_size / 2**20, 1),
        "cache_mb": round(sum(path.stat().st_size for path in (Path(folder) / "cache").iterdir()) / 2**20, 1),
        "imported_mb": before,
        "peak_mb": peak_mb(),
    }


def measure_reopened(folder: str) -> dict:
    """The same cache in a new process, and a thousand examples from all over it."""
    from biomerge_lib.prompts.ner_span import build_dataset, read_split

    _, tokenizer = load_libraries()
    cpu = time.process_time()
    seconds, dataset = timed(
        lambda: build_dataset(
            read_split(folder, "train"),
            tokenizer,
            cache_dir=Path(folder) / "cache",
            **EXAMPLES,
        )
    )
    for index in random.Random(0).sample(range(len(dataset)), min(1000, len(dataset))):
        dataset[index]
    return {"seconds": seconds, "cpu_seconds": cpu_since(cpu), "peak_mb": peak_mb()}


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


MEASURES = {name: value for name, value in globals().items() if name.startswith("measure_")}


def run(name: str, *arguments: str) -> dict:
    """A measurement in a process of its own."""
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "benchmarks.data_speed", "--measure", name, *arguments]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"load_at_start": round(load, 1)}


def write_page(report: dict) -> None:
    """The numbers as a page beside the JSON."""
    lines = [
        "# Speed and memory of the data path",
        "",
        f"Written by `{report['command']}` on {report['device']}, commit `{report['commit']}`.",
        "`load` is the machine's when the measurement began. The cores were shared with other work: seconds are upper",
        "bounds, and CPU seconds (of all threads) are what the work costs.",
        "",
    ]
    if "corpora" in report:
        first, second, preflight = (report["corpora"][name] for name in ("first", "second", "preflight"))
        stages = (
            f"converted, merged, deduplicated and written {first['convert_seconds']}; "
            f"read back and checked {first['check_seconds']}; tokenised {first['tokenise_seconds']}"
        )
        cached = f"read and checked {second['check_seconds']}; tokens from the cache {second['open_seconds']}"
        checked = f"{preflight['train_records']:,} training records, dev and test"
        lines += [
            f"## The five IOB corpora: {first['sentences_converted']:,} sentences, of which "
            f"{first['sentences_tokenised']:,} (train and dev) are tokenised",
            "",
            *table(
                ["", "seconds", "CPU seconds", "of which seconds", "load"],
                [
                    [name, found["seconds"], found["cpu_seconds"], what, found["load_at_start"]]
                    for name, found, what in (
                        ("first start", first, stages),
                        ("second start", second, cached),
                        ("preflight", preflight, checked),
                    )
                ],
            ),
            "",
            f"Importing transformers and datasets took {first['import_seconds']} and {second['import_seconds']} s more "
            "(preflight needs neither).",
            "",
        ]
    if report["scale"]:
        header = [
            "sentences",
            "JSONL MB",
            "seconds",
            "CPU seconds",
            "sentences/s",
            "tokens",
            "cache MB",
            "peak MB",
        ]
        header += ["of which imports", "reopened: s, peak MB", "preflight: s, peak MB", "load"]
        columns = (
            "sentences",
            "file_mb",
            "seconds",
            "cpu_seconds",
            "sentences_per_second",
            "tokens",
            "cache_mb",
        )
        rows = [
            [
                *(row[name] for name in (*columns, "peak_mb", "imported_mb")),
                *(f"{row[name]['seconds']}, {row[name]['peak_mb']}" for name in ("reopened", "preflight")),
                row["load_at_start"],
            ]
            for row in report["scale"]
        ]
        lines += ["## Generated JSONL, read and tokenised into the cache", "", *table(header, rows)]
    REPORT.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def table(header: list[str], rows: list[list]) -> list[str]:
    cells: list[list] = [
        header,
        ["---"] * len(header),
        *([f"{v:,}" if isinstance(v, int) else v for v in row] for row in rows),
    ]
    return ["| " + " | ".join(map(str, row)) + " |" for row in cells]


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
    where = provenance()
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.data_speed", *sys.argv[1:]]),
        "commit": where["commit"],
        "device": where["device"],
        "python": where["python"],
    }
    with tempfile.TemporaryDirectory() as scratch:
        if options.corpora:
            folder = f"{scratch}/union"
            report["corpora"] = {
                "first": run("measure_conversion", options.corpora, folder),
                "second": run("measure_second_start", folder),
                "preflight": run("measure_preflight", folder),
            }
            print(json.dumps(report["corpora"]))
        report["scale"] = []
        for size in options.sizes:
            folder = f"{scratch}/{size}"
            write_records(Path(folder) / "train.jsonl", generate(size))
            write_records(Path(folder) / "dev.jsonl", islice(generate(size, "dev"), 1000))
            row = run("measure_stream", folder)
            others = {
                "reopened": run("measure_reopened", folder),
                "preflight": run("measure_preflight", folder),
            }
            report["scale"].append(row | others)
            print(json.dumps(report["scale"][-1]))
    write_json(REPORT, report)
    write_page(report)
    print(REPORT.with_suffix(".md"))


if __name__ == "__main__":
    main()
