"""Knows how to run a server program so that nothing of it outlives its caller; knows nothing of what it serves.

The program gets a process group of its own. A watchdog, a small shell, waits for the end of the calling process,
however that comes (SIGKILL too, which no handler of ours could see), and then stops the group.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from platform import node
from typing import IO, cast

STOP_SECONDS = 15
# The read ends when the pipe from the calling process closes.
_WATCHDOG = """read _; kill -s TERM -- -$1; left=$2
while [ $left -gt 0 ] && kill -s 0 -- -$1; do sleep 1; left=$((left - 1)); done; kill -s KILL -- -$1"""


class GuardedProcess:
    """A program with its children, from construction until :meth:`stop` or the end of the calling process.

    Its output goes to ``log_path``, whose folder is also its working folder.
    """

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], log_path: Path):
        self._watchdog: subprocess.Popen[bytes] | None = None
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=log_path.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.stop)
        try:
            self._watchdog = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHDOG, "watchdog", str(self.group), str(STOP_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            self.stop()
            raise

    @property
    def group(self) -> int:
        """The process group's id, which is the program's own."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the program runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask the program to end (it ends its children), then kill what is left of its group; may be repeated."""
        if self.exit_code is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        deadline = time.monotonic() + STOP_SECONDS
        while find_group_members(self.group) and time.monotonic() < deadline:
            with suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.05)
        atexit.unregister(self.stop)
        if self._watchdog is not None:
            # Only now: an interrupt above leaves the watchdog to finish the work.
            self._watchdog.kill()
            self._watchdog.wait()
            cast(IO[bytes], self._watchdog.stdin).close()  # a pipe
            self._watchdog = None


def find_group_members(group: int) -> list[int]:
    """Ids of a process group's members that are no zombies (which nobody may reap in a container)."""
    numbers = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [pid for pid in numbers if (stat := _read_stat(pid)) and int(stat[2]) == group]


def name_process(pid: int) -> tuple[str, int, str]:
    """Machine, number and the clock tick at which it began, as numbers come again; "" of one that has ended."""
    stat = _read_stat(pid)
    return node(), pid, stat[19] if stat else ""


def _read_stat(pid: int) -> list[str]:
    """What /proc says of a process after the command's closing bracket: state, parent, group, ...; [] of a zombie."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return stat if stat[0] != "Z" else []
    return []
