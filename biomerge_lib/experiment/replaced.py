"""Knows where runs lie that ``existing_run=replace`` moved aside, and how they go for good; knows nothing of stages.

runs/my-run  --[set_aside]-->  runs/.replaced-my-run-20261130T181659123456  --[remove_replaced]-->  nothing
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path

from biomerge_lib.core.errors import DataError, nearest

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


def remove_replaced(runs_dir: Path, names: Sequence[str]) -> None:
    """Remove replaced runs that :func:`list_replaced` names, and nothing else.

    Raises:
        DataError: a name is not among them; then nothing is removed.
    """
    refuse_unknown(names, list_replaced(runs_dir), f"replaced run in {runs_dir}")
    for name in names:
        shutil.rmtree(runs_dir / name)


def refuse_unknown(names: Sequence[str], known: Collection[str], what: str) -> None:
    """Raise DataError where a name to be removed is not ``known``."""
    for name in names:
        if name not in known:
            raise DataError(f"{name}: no {what}; nothing was removed.{nearest(name, known)}")


def folder_size(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
