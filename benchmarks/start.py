"""How long people wait for an answer: whole processes from nothing to a sentence's mentions; threads on busy machines.

    python -m benchmarks.readiness --start      # reports/start.md; the CPU alone, some minutes
    python -m benchmarks.readiness --threads    # reports/threads.md; wants an otherwise idle machine

The processor's seconds of a process count also where other programs run; the wall's only on an idle machine.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import REPORTS, origin, write_report
from biomerge_lib.experiment.runs import PROJECT_DIR
from biomerge_lib.report.display import markdown_table

TEXT = "Aspirin can trigger asthma attacks ."
PREDICT = f"from biomerge_lib.__main__ import main; main(['predict', {TEXT!r}])"
# Without the backbone that this checkout may have prepared already.
FIRST_USE = f"import biomerge_lib.experiment.provenance as p, pathlib; p.PROJECT_DIR = pathlib.Path('/none'); {PREDICT}"
IMPORT = "import torch; from transformers import LlamaForCausalLM"
BESIDE = {
    "GLiNER: `import gliner`": "import gliner",
    "spaCy: `spacy.blank('en')` and its tokens of the sentence": f"import spacy; spacy.blank('en')({TEXT!r})",
}
ROUNDS, ROUNDS_OF_THREADS = 5, 3
LOADS = (0, 2, 6)
THREADS: dict[str, dict[str, str]] = {
    "one": {"OMP_NUM_THREADS": "1"},
    "all, spinning as OpenMP does": {"GOMP_SPINCOUNT": "300000"},
    "all, 100,000 spins": {"GOMP_SPINCOUNT": "100000"},
    "all, 30,000 spins": {"GOMP_SPINCOUNT": "30000"},
    "all, 10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "all, sleeping": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "chosen (what predict does)": {},
}
ANSWER = """
import sys, time
from statistics import median
from biomerge_lib.apply import ready_models
from biomerge_lib.apply.tagger import load_tagger
if sys.argv[1] != "chosen":
    ready_models.FreeCores.count = lambda self, most: most
tagger = load_tagger()
seconds = []
for number in range(int(sys.argv[2])):
    started = time.monotonic()
    tagger.predict(f"Aspirin can trigger asthma attacks in {number} sensitive patients .")
    seconds.append(time.monotonic() - started)
print(median(seconds))
"""


def measure(program: str, python: str = sys.executable, **environment: str) -> tuple[float, float]:
    """The processor's and the wall's seconds of a whole process that runs a program."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [python, "-c", program],
        cwd=PROJECT_DIR,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{program}\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def compare_starts(beside: str | None) -> None:
    """Write reports/start.md: each round runs every program once, so that all of them meet the same machine."""
    programs: dict[str, tuple[str, str]] = {
        "`import torch`": (sys.executable, "import torch"),
        "`import torch` and transformers' Llama": (sys.executable, IMPORT),
        "`predict` of a sentence": (sys.executable, PREDICT),
        "`predict`, first use": (sys.executable, FIRST_USE),
    }
    if beside:
        programs |= {name: (beside, program) for name, program in BESIDE.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    measure(PREDICT)  # merges once where that has not been done
    for _ in range(ROUNDS):
        for name, (python, program) in programs.items():
            with TemporaryDirectory() as cache:
                fresh = {"BIOMERGE_CACHE": cache} if program is FIRST_USE else {}
                seconds[name].append(measure(program, python, **fresh))
    imported = median(cpu for cpu, _ in seconds["`import torch` and transformers' Llama"])
    rows = [
        {
            "process": name,
            "processor_seconds": round(median(cpu for cpu, _ in found), 2),
            "of_the_import": round(median(cpu for cpu, _ in found) / imported, 2),
            "wall_seconds": round(median(wall for _, wall in found), 2),
        }
        for name, found in seconds.items()
    ]
    write(
        "start",
        "From nothing to a sentence's mentions",
        f"Whole processes, median of {ROUNDS}, taking turns; `of_the_import` compares the processor's seconds.",
        rows,
    )


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """So many programs beside, each of which wants a core all the time."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def compare_threads(sentences: int) -> None:
    """Write reports/threads.md: seconds a sentence by threads, beside 0, 2 and 6 busy programs."""
    rows = []
    for load in LOADS:
        print(f"beside {load} busy programs", flush=True)
        with busy(load):
            found = {
                name: answer_seconds(name, environment, sentences) for name, environment in THREADS.items()
            }
        rows.append({"busy_programs": load, **{name: round(seconds, 3) for name, seconds in found.items()}})
    write(
        "threads",
        "Threads beside other programs",
        f"Seconds a sentence in `predict`, median of {ROUNDS_OF_THREADS} processes of {sentences} sentences each, on "
        f"{os.cpu_count()} cores beside so many programs that want a core all the time.",
        rows,
    )


def answer_seconds(name: str, environment: Mapping[str, str], sentences: int) -> float:
    command = [sys.executable, "-c", ANSWER, name.split()[0], str(sentences)]
    seconds = []
    for _ in range(ROUNDS_OF_THREADS):
        done = subprocess.run(
            command, cwd=PROJECT_DIR, env=os.environ | environment, capture_output=True, text=True, check=True
        )
        seconds.append(float(done.stdout.splitlines()[-1]))
    print(f"{name}: {median(seconds):.3f} s a sentence", flush=True)
    return median(seconds)


def write(name: str, title: str, said: str, rows: list[dict[str, Any]]) -> None:
    where = origin("readiness")
    path: Path = REPORTS / f"{name}.json"
    page = [
        f"# {title}",
        "",
        f"Written by `{where['command']}` on {where['device']}, commit `{where['commit'][:12]}`. {said}",
        "",
        markdown_table(rows[0], [row.values() for row in rows]),
    ]
    write_report(path, {"provenance": where, "rows": rows}, page)
