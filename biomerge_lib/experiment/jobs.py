"""Knows what a cluster job and the run inside it tell each other; knows nothing of notebooks or models.

job --stop--> run --interrupted | failure--> job;    kernel --progress--> the command that started it
archive --[fetch_run]--> the run's folder, as the last job left it

``slurm/common.sh`` is the job's side. Outside a job there is nobody but the command that started a kernel.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from math import inf
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Event, Thread
from typing import IO, Any

from biomerge_lib.core.errors import BioMergeError
from biomerge_lib.core.files import OBJECT, locked, read_values, whole_folder, write_json, write_text

JOB_DIR = "BIOMERGE_JOB_DIR"  # folder of the messages
PROGRESS = "BIOMERGE_PROGRESS"  # file of lines for who waits
ARCHIVE = "BIOMERGE_ARCHIVE"  # where the job copies run folders back to, when runs_dir is the node's own disk
INTERRUPTED = 75  # exit status: stopped on request, to be continued (EX_TEMPFAIL of sysexits.h)
# Made anew from the rest, too large to fetch, or another job's: 03 merges again, W&B's logs are only added to.
NOT_FETCHED = ("merged", "wandb", "*.partial", ".ipynb_checkpoints", ".lock")
LOCK = ".lock"


class RunInterrupted(BioMergeError):
    """Training stopped because the job asked for it; the same command goes on from the checkpoint."""


def requeued() -> bool:
    """This job has begun before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def stop_requested() -> bool:
    """The job wants training to write a checkpoint and end (time limit, preemption, scancel)."""
    return _told("stop")


def note_interrupted(message: str) -> None:
    """Tell the job that training stopped on its request, with a checkpoint."""
    _tell("interrupted", message)


def was_interrupted() -> bool:
    return _told("interrupted")


def note_progress(message: str) -> None:
    """Say a line to the terminal or into the job's log, where what a notebook's cell prints is not seen.

    What cannot be written (a full disk, a file that was tidied away) is not said: it is worth no training.
    """
    if path := os.environ.get(PROGRESS):
        with suppress(OSError), open(path, "a", encoding="utf-8") as lines:
            lines.write(message + "\n")


@contextmanager
def progress_shown() -> Iterator[None]:
    """Print what is noted inside the block, by this process and those that it starts, to standard error."""
    ended = Event()
    line_begins = "\r\x1b[K" if sys.stderr.isatty() else ""  # over papermill's bar

    def show(lines: IO[str]) -> None:
        goes_on = True
        while goes_on:
            goes_on = not ended.wait(0.5)
            for line in lines:
                print(line_begins + line, end="", file=sys.stderr, flush=True)

    with NamedTemporaryFile("r", prefix="biomerge-", encoding="utf-8") as lines:
        os.environ[PROGRESS] = lines.name
        shower = Thread(target=show, args=(lines,), daemon=True)
        shower.start()
        try:
            yield
        finally:
            ended.set()
            shower.join()
            del os.environ[PROGRESS]


def progress_bar(total: int, says: str | None, *, done: int = 0) -> Any:
    """tqdm's bar of sentences, and a noted line at the first ones and twice a minute; ``says=None`` shows neither.

    The first tick comes at once, for rate and time left, later ones every two seconds: each is a line in a log.
    """
    from tqdm.auto import tqdm

    class Bar(tqdm):
        noted_at = -inf

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            self.mininterval = 2.0
            if not self.disable and time.monotonic() > self.noted_at + 30:
                self.noted_at = time.monotonic()
                pace = max(1e-3, self.format_dict["elapsed"]) / max(1, self.n - done)
                left = timedelta(seconds=round(pace * (total - self.n)))
                note_progress(
                    f"{says}: {self.n:,} of {total:,} sentences, {1 / pace:.2f} a second, {left} left"
                )
            return shown

    return Bar(total=total, initial=done, desc=says, unit="sentence", disable=says is None, mininterval=0)


def note_failure(message: str) -> None:
    """Tell the job what its log should end with: the executed notebook, then (from line 2) cell and error."""
    _tell("failure", message)


def archived_run(folder: Path) -> Path:
    """Where a run's files are now: its folder, or what an earlier job left in the archive."""
    archive = os.environ.get(ARCHIVE)
    kept = Path(archive) / folder.name if archive else folder
    # 01 and 02 of this job may have written metrics.json already; parameters.yaml is the training's.
    return kept if not (folder / "parameters.yaml").is_file() and kept.is_dir() else folder


def kept_path(path: Path) -> Path:
    """Where a file of a run folder will lie after the job."""
    archive = os.environ.get(ARCHIVE)
    # Without a copy on the node's disk, runs/ of the job's workplace is a link to the archive, and goes with it.
    return Path(archive) / path.parent.name / path.name if archive else path.resolve()


def fetch_run(folder: Path) -> None:
    """Bring an earlier job's run folder back from the archive, whole or not at all; add what this job has written.

    Raises:
        BioMergeError: it could not be copied; then the folder is as it was.
    """
    kept = archived_run(folder)
    if kept == folder or not (kept / "parameters.yaml").is_file():
        return
    leave_out = shutil.ignore_patterns(*NOT_FETCHED)
    try:
        with whole_folder(folder, partial=folder.with_name(f".{folder.name}.partial")) as partial:
            shutil.copytree(kept, partial, ignore=leave_out)
            if folder.is_dir():
                shutil.copytree(folder, partial, dirs_exist_ok=True, ignore=leave_out)
            paths = [path for path in (kept / "metrics.json", folder / "metrics.json") if path.is_file()]
            if len(paths) == 2:
                then, now = (read_values(path, OBJECT) for path in paths)
                then["stages"] |= now["stages"]
                write_json(partial / "metrics.json", then)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise BioMergeError(f"{kept} could not be copied to {folder.parent}: {error}") from error
    print(f"fetched {folder.name} from {kept.parent}")


@contextmanager
def only_one(folder: Path) -> Iterator[IO]:
    """Refuse to train in a run folder, here or in the archive, while another process does.

    Raises:
        BioMergeError: another process holds the folder's lock.
    """
    kept = Path(os.environ[ARCHIVE]) / folder.name if ARCHIVE in os.environ else folder
    taken = BioMergeError(f"{kept}: another process is training this run; wait for it or end it.")
    with locked(kept / LOCK, or_raise=taken) as held:
        yield held


def _tell(name: str, message: str) -> None:
    if folder := os.environ.get(JOB_DIR):
        write_text(Path(folder) / name, message + "\n")


def _told(name: str) -> bool:
    folder = os.environ.get(JOB_DIR)
    return bool(folder and (Path(folder) / name).is_file())
