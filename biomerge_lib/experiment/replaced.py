"""Knows where runs lie that ``existing_run=replace`` moved aside, and how large they are; knows nothing of stages.

runs/my-run  --[set_aside]-->  runs/.replaced-my-run-20261130T181659123456
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from biomerge_lib.core.errors import DataError

_NAME = re.compile(r"\.replaced-.+-\d{8}T\d{12}")


def place_aside(folder: Path) -> Path:
    """Where a run is moved to now: a hidden folder beside it."""
    return folder.with_name(f".replaced-{folder.name}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")


def list_replaced(runs_dir: Path) -> dict[str, int]:
    """The name of each replaced run in a folder of runs, and the bytes of its files.

    Raises:
        DataError: no such folder.
    """
    if not runs_dir.is_dir():
        raise DataError(f"{runs_dir}: no such folder. Give the folder that holds the run folders (runs).")
    found = [path for path in sorted(runs_dir.iterdir()) if _NAME.fullmatch(path.name)]
    return {path.name: folder_size(path) for path in found if path.is_dir() and not path.is_symlink()}


def folder_size(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
