"""What the benchmarks share: the command that was given, a report's two files, a run's logged losses."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from biomerge_lib.core.files import write_json, write_text
from biomerge_lib.experiment.runs import PROJECT_DIR

REPORTS = PROJECT_DIR / "reports"


def command(name: str) -> str:
    """The command line that started this process, as a report names it."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def write_report(path: Path, report: Any, page: Iterable[str]) -> None:
    """Write a JSON file, and its page's lines beside it."""
    write_json(path, report)
    write_text(path.with_suffix(".md"), "\n".join(page).rstrip() + "\n")


def read_log(run: Path) -> list[dict[str, Any]]:
    """The Trainer's log history that 03_train left in a run folder; empty where it has not finished."""
    path = run / "log_history.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
