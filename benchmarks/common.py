"""What the benchmarks share: where a report's numbers come from, its two files, a run's logged losses."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from biomerge_lib.core.files import file_sha256, write_json, write_text
from biomerge_lib.core.records import Record
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


def read_log(run: Path) -> list[dict[str, Any]]:
    """The Trainer's log history that 03_train left in a run folder; empty where it has not finished."""
    path = run / "log_history.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
