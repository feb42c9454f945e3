"""How `predict` treats a document of megabytes: how soon it answers, how fast, in how much memory, how it stops.

    python -m benchmarks.long_document --corpus ../shared/corpora/bc5cdr_original --seconds 240

The document is the corpus's abstracts, shuffled anew for each repetition. The shipped adapter reads the first part of
it, until it is interrupted; then all of it goes the same way with a model that answers nothing at once, so that what is
left is everything but the model. Writes reports/long_document.json.

``sentences_a_second`` counts the start-up in, and nothing of the batch that the interrupt met: it is a lower bound, and
``extrapolated_hours`` an upper one.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from biomerge_lib.predictions import RawAnswer
from biomerge_lib.readers import read_corpus
from biomerge_lib.ready_models import SHIPPED, merge_for_use, read_rendering
from biomerge_lib.runs import PROJECT_DIR, provenance, quiet_libraries, write_json
from biomerge_lib.sentences import find_sentences
from biomerge_lib.tagger import Tagger
from biomerge_lib.tokenizer import load_tokenizer

REPORT = PROJECT_DIR / "reports/long_document.json"


def build_document(corpus: Path, characters: int) -> str:
    """A text of so many characters or a little more, of the corpus's documents."""
    documents: dict[str, str] = {}
    for records in read_corpus(f"pubtator:{corpus}").values():
        for record in records:
            documents[record.doc_id] = f"{documents.get(record.doc_id, '')}{record.text} "
    text, order = "", sorted(documents)
    draw = random.Random(0)
    while len(text) < characters:
        draw.shuffle(order)
        text += "\n\n".join(documents[name] for name in order) + "\n\n"
    return text[:characters]


def read_first_part(path: Path, seconds: int) -> dict[str, Any]:
    """``predict`` of a file, interrupted after some seconds, as a user does it with Ctrl-C."""
    with tempfile.TemporaryDirectory() as folder:
        found, said = Path(folder) / "out", Path(folder) / "err"
        command = [sys.executable, "-m", "biomerge_lib", "predict", "--file", str(path)]
        start = time.perf_counter()
        with found.open("wb") as out, said.open("wb") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, cwd=PROJECT_DIR)
            first, memory = None, {}
            while (elapsed := time.perf_counter() - start) < seconds and process.poll() is None:
                time.sleep(0.2)
                if first is None and found.stat().st_size:
                    first = elapsed
                memory[round(elapsed)] = _resident_mb(process.pid)
            process.send_signal(signal.SIGINT)
            code = process.wait(timeout=120)
        answered = found.read_text(encoding="utf-8")
        last_line = said.read_text(encoding="utf-8").strip().splitlines()[-1]
        traceback = "Traceback" in said.read_text(encoding="utf-8")
    characters = len(re.sub(r"[\[\]]", "", answered))
    sentences = len(find_sentences(answered))
    return {
        "seconds": round(elapsed, 1),
        "seconds_to_first_answer": first and round(first, 1),
        "characters": characters,
        "sentences": sentences,
        "sentences_a_second": first and round(sentences / elapsed, 3),
        "resident_mb_by_second": {
            second: memory[second] for second in list(memory)[:: max(1, len(memory) // 12)]
        },
        "peak_resident_mb": max(memory.values()),
        "exit_code": code,
        "traceback": traceback,
        "last_line": last_line,
    }


def read_all_without_model(path: Path) -> None:
    """Print seconds, sentences and peak memory of all that `predict` does but the model."""
    quiet_libraries()
    tokenizer = load_tokenizer(merge_for_use(SHIPPED))
    silence = RawAnswer([], "", "eos")
    silent = Tagger(tokenizer, read_rendering(SHIPPED), None, lambda prompts: [silence] * len(prompts))
    text = path.read_text(encoding="utf-8")
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in silent.find_parts([text])]
    peak_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    figures = {"seconds": round(times[-1], 1), "seconds_to_first_part": round(times[0], 3)}
    print(json.dumps(figures | {"parts": len(times), "peak_resident_mb": peak_mb}))


def _resident_mb(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() >> 20
    except (OSError, IndexError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="folder of a PubTator corpus")
    parser.add_argument("--characters", type=int, default=5_000_000, help="of the document (%(default)s)")
    parser.add_argument("--seconds", type=int, default=240, help="until the interrupt (%(default)s)")
    parser.add_argument("--without-model", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.without_model:
        read_all_without_model(options.without_model)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.txt"
        text = build_document(options.corpus, options.characters)
        path.write_text(text, encoding="utf-8")
        short = path.with_name("short.txt")
        short.write_text(text[: options.characters // 50], encoding="utf-8")
        rest = [sys.executable, "-m", "benchmarks.long_document", "--without-model"]
        without = {
            name: json.loads(subprocess.run([*rest, str(file)], capture_output=True, check=True).stdout)
            for name, file in (("a_fiftieth", short), ("all", path))
        }
        first_part = read_first_part(path, options.seconds)
    sentences = len(find_sentences(text))
    speed = first_part["sentences_a_second"]
    where = provenance()
    report = {
        "command": f"python -m benchmarks.long_document --corpus ../shared/corpora/{options.corpus.name} "
        f"--characters {options.characters} --seconds {options.seconds}",
        **{name: where[name] for name in ("commit", "device", "python", "versions")},
        "document": {"characters": len(text), "sentences": sentences},
        "first_part": first_part,
        "extrapolated_hours": speed and round(sentences / speed / 3600, 1),
        "without_model": without,
    }
    write_json(REPORT, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
