"""Knows run folders as a list, newest first, and how those that nobody wants go for good; knows nothing of pages.

runs/ --[list_runs]--> what there is --[remove_runs]--> nothing
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from biomerge_lib.core.errors import DataError, nearest
from biomerge_lib.experiment.jobs import only_one
from biomerge_lib.experiment.replaced import folder_size, list_replaced
from biomerge_lib.report.report_runs import collect_runs


class ListedRun(NamedTuple):
    """A run folder: ``f1`` is its greedy dev F1, ``changed`` when it was last written (ISO, UTC).

    ``status``: finished, running, partial, failed, outdated; replaced: moved aside; report: no run, but a page.
    """

    run_id: str
    status: str
    f1: float | None
    bytes: int
    changed: str
    reason: str


def list_runs(runs_dir: Path) -> list[ListedRun]:
    """Every run in a folder of runs, the one that was written last first; also those that were moved aside.

    Raises:
        DataError: no such folder, or it is a run itself.
    """
    replaced = list_replaced(runs_dir)
    if (runs_dir / "metrics.json").is_file() or (runs_dir / "parameters.yaml").is_file():
        raise DataError(f"{runs_dir} is a run: give the folder that holds the run folders.")
    try:
        known = {run.name: run for run in collect_runs(runs_dir)}
    except DataError:  # no run among them
        known = {}
    listed = []
    for folder in runs_dir.iterdir():
        run, metrics = known.get(folder.name), folder / "metrics.json"
        is_listed = run or folder.name in replaced or (metrics.is_file() and not folder.name.startswith("."))
        if is_listed and not folder.is_symlink():
            changed = (metrics if metrics.is_file() else folder).stat().st_mtime
            written = datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds")
            status, f1, reason = (run.status, run.score, run.reason) if run else ("report", None, "")
            if run and any(stage.get("status") == "running" for stage in run.stages.values()):
                status = "running"
            status = "replaced" if folder.name in replaced else status
            listed.append(ListedRun(folder.name, status, f1, folder_size(folder), written, reason))
    return sorted(listed, key=lambda run: run.changed, reverse=True)


def choose_runs(runs: Sequence[ListedRun], runs_dir: Path, names: Sequence[str]) -> list[ListedRun]:
    """Those of the runs that have these names (``mine`` or ``runs/mine``), for :func:`remove_runs`.

    Raises:
        DataError: there is no such run, or it is running.
    """
    known = {run.run_id: run for run in runs}
    known |= {str(runs_dir / name): run for name, run in known.items()}
    chosen: dict[str, ListedRun] = {}
    for name in (name.rstrip("/") for name in names):
        if name not in known:
            raise DataError(f"{name}: no such run in {runs_dir}; nothing was removed.{nearest(name, known)}")
        if known[name].status == "running":
            cure = "End it, or wait; one that died on another machine you remove by hand."
            raise DataError(f"{name}: it is running; nothing was removed. {cure}")
        chosen[known[name].run_id] = known[name]
    return list(chosen.values())


def remove_runs(runs_dir: Path, runs: Sequence[ListedRun]) -> None:
    """Remove run folders with all that is in them; BioMergeError where one is being trained."""
    for run in runs:
        with only_one(runs_dir / run.run_id):
            shutil.rmtree(runs_dir / run.run_id)


def describe_runs(runs: Sequence[ListedRun]) -> str:
    """A line a run: name, status, F1, size, age, and why it is not finished."""
    rows = []
    for run in runs:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(run.changed)).total_seconds()
        hours = max(0, seconds) / 3600  # another machine's clock may be ahead
        age = f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.1f} h"
        f1 = "" if run.f1 is None else f"{run.f1:.3f}"
        why = "" if run.status in ("finished", "running") else " ".join(run.reason.split())[:60]
        rows.append((run.run_id, run.status, f1, f"{run.bytes / 1e6:,.1f} MB", age, why))
    table = pd.DataFrame(rows, columns=["run", "status", "F1", "size", "age", "why"])
    for name in ("run", "status", "why"):  # pandas sets all to the right
        table[name] = table[name].str.ljust(max(map(len, table[name]), default=0))
    return table.to_string(index=False, justify="left") if rows else "no runs"
