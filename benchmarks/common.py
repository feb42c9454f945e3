"""What the benchmarks share: where a report's numbers come from, its two files, runs side by side and their losses."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.files import file_sha256, write_json, write_text
from biomerge_lib.core.records import Record
from biomerge_lib.experiment.recorded import read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance

REPORTS = PROJECT_DIR / "reports"


def command(name: str) -> str:
    """The command line that started this process, as a report names it."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def origin(name: str) -> dict[str, Any]:
    """What a report says of itself: command, commit, device and versions."""
    return {"command": command(name), **provenance()}


def origin_of_dev(data_dir: Path, records: list[Record]) -> dict[str, Any]:
    """Which records of a dev file were answered."""
    return {
        "records": len(records),
        "data": f"{data_dir.parent.name} dev",
        "data_sha256": file_sha256(data_dir / "dev.jsonl"),
    }


def write_report(path: Path, report: Any, page: Iterable[str]) -> None:
    """Write a JSON file, and its page's lines beside it."""
    write_json(path, report)
    write_text(path.with_suffix(".md"), "\n".join(page).rstrip() + "\n")


def run_side_by_side(
    commands: Mapping[str, Sequence[str]], *, at_once: int, budget: float, stop: float | None = None
) -> list[str]:
    """Run commands, ``at_once`` side by side and in order, output in runs/NAME.log; the names of those that failed.

    After ``budget`` seconds none is started, and those that were not count as failed; what runs is waited for, and
    after ``stop`` seconds interrupted.
    """
    begun, waiting, failed = time.monotonic(), list(commands.items()), []
    running: dict[str, subprocess.Popen] = {}
    (PROJECT_DIR / "runs").mkdir(exist_ok=True)
    while waiting or running:
        seconds = time.monotonic() - begun
        for name in [name for name, process in running.items() if process.poll() is not None]:
            code = running.pop(name).returncode
            failed += [name] if code else []
            print(f"{seconds:5.0f} s  {name}: ended with {code}", flush=True)
        late = seconds >= min(budget, stop or budget)
        while waiting and len(running) < at_once and not late:
            name, words = waiting.pop(0)
            with (PROJECT_DIR / "runs" / f"{name}.log").open("w") as output:
                running[name] = subprocess.Popen(
                    words,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=PROJECT_DIR,
                    # A shell's background command ignores it, and so would all that it starts.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
        if waiting and late:
            print(f"out of time: {len(waiting)} not started", flush=True)
            failed += [name for name, _ in waiting]
            waiting.clear()
        if stop is not None and seconds >= stop:
            for process in running.values():
                process.send_signal(signal.SIGINT)
            stop = None
        time.sleep(0.5)
    return failed


def train_command(run_id: str, *words: str) -> list[str]:
    """03_train with ``name=value`` words, of which a later one replaces an earlier one of its name."""
    last = {word.partition("=")[0]: word for word in words}
    return [sys.executable, "-m", "biomerge_lib", "run", "03_train", *last.values(), f"run_id={run_id}"]


def train_runs(runs: Mapping[str, str], options: argparse.Namespace) -> None:
    """Train those of the runs (their words by run_id) that are not finished; each goes on where it was cut off."""
    commands = {}
    for run_id, words in runs.items():
        stages = read_metrics(PROJECT_DIR / "runs" / run_id).get("stages", {})
        if stages.get("03_train", {}).get("status") == "finished":
            print(f"{run_id} is finished")
            continue
        commands[run_id] = train_command(run_id, *words.split(), *options.extra)
        compose_parameters(commands[run_id][5:])  # refused before any is started
    if failed := run_side_by_side(commands, at_once=options.at_once, budget=36_000, stop=options.stop):
        raise SystemExit(f"not finished: {', '.join(failed)} (runs/NAME.log); the same command goes on.")


def page_parser(about: str, sets: Mapping[str, Mapping[str, str]], runs: Path) -> argparse.ArgumentParser:
    """Options of a benchmark that trains sets of runs and makes a page of the published ones, beside their folder."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=list(sets), help="train a set's runs instead of making the page")
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="only these of the set")
    parser.add_argument("--at-once", type=int, default=5, help="trainings side by side (%(default)s)")
    parser.add_argument(
        "--stop", type=float, help="seconds after which what runs is interrupted, to be gone on with"
    )
    parser.add_argument("--runs", type=Path, default=runs, help="folder of run folders (%(default)s)")
    parser.add_argument("--partial", action="store_true", help="name what is missing instead of refusing")
    page = runs.with_name(f"{runs.name.replace('-', '_')}.md")
    parser.add_argument("--out", type=Path, default=page, help="(%(default)s)")
    parser.add_argument("extra", nargs="*", metavar="NAME=VALUE", help="parameters of all trainings")
    return parser


def choose_names(
    parser: argparse.ArgumentParser, options: argparse.Namespace, known: Iterable[str]
) -> list[str]:
    """Those of ``known`` that --names names, or all; a NAME=VALUE behind --names is one of ``options.extra``."""
    known = list(known)
    options.extra += [word for word in options.names if "=" in word]
    names = [word for word in options.names if "=" not in word]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{unknown[0]} is none of {', '.join(known)}")
    return names or known


def read_log(run: Path) -> list[dict[str, Any]]:
    """The Trainer's log history that 03_train left in a run folder; empty where it has not finished."""
    path = run / "log_history.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
