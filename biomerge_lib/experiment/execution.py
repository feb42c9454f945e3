"""Knows how papermill executes a notebook beside others on one machine; knows nothing of runs or parameters.

notebook + parameters --[execute_notebook]--> executed notebook | NotebookFailed(cell, reason)
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from biomerge_lib.core.errors import BioMergeError, DataError
from biomerge_lib.core.files import OBJECT, read_values

KERNEL_STARTS = 3
UNWATCHED = "BIOMERGE_UNWATCHED"  # in the environment of a kernel whose output nobody sees as it comes
KERNEL_START_SECONDS = 300  # a loaded machine takes far longer than papermill's 60 s to import a kernel
SOCKET_PATH_LIMIT = 100  # a Unix socket's path may have 107 bytes
log = logging.getLogger("biomerge")


class NotebookFailed(BioMergeError):
    """A cell failed, or the kernel died in it. ``cell`` is what stands beside it: ``In [7]``."""

    def __init__(self, cell: str, reason: str):
        super().__init__(f"cell {cell}: {reason}")
        self.cell = cell
        self.reason = reason


def execute_notebook(
    notebook: Path, executed: Path, parameters: Mapping[str, Any], *, cwd: Path, held: Sequence[IO] = ()
) -> None:
    """Execute ``notebook`` with papermill into ``executed``. The kernel holds the open files ``held``, too.

    Raises:
        NotebookFailed: ``executed`` holds the cells up to the failing one, with its error; or the disk is full.
        BioMergeError: no kernel could be started, after several tries.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    for attempt in range(1, KERNEL_STARTS + 1):
        executed.unlink(missing_ok=True)
        try:
            with _kernel_sockets() as config:
                papermill.execute_notebook(
                    notebook,
                    executed,
                    parameters=dict(parameters),
                    cwd=str(cwd),
                    kernel_name="python3",
                    progress_bar=sys.stderr.isatty(),
                    start_timeout=KERNEL_START_SECONDS,
                    config=config,
                    kernel_manager_class=_kernel_manager(cwd, held),
                )
            return
        except PapermillExecutionError as error:
            raise NotebookFailed(f"In [{error.exec_count}]", f"{error.ename}: {error.evalue}") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # papermill writes the executed notebook after each cell, and so does not survive a full disk
            unwritten = f"{executed} could not be written: {error}"
            raise NotebookFailed(_running_cell(executed) or "In [?]", unwritten) from None
        except (DeadKernelError, RuntimeError) as error:
            cell = _running_cell(executed)
            if cell:
                raise NotebookFailed(
                    cell, "the kernel died (out of memory? the system's log or `scontrol show job` says more)"
                ) from None
            reason = error
            log.warning("the kernel did not start (%s), try %d of %d", error, attempt, KERNEL_STARTS)
            time.sleep(attempt)
    raise BioMergeError(f"{notebook.name}: no kernel could be started: {reason}") from reason


@contextmanager
def _kernel_sockets() -> Iterator[Any]:
    """Kernel settings with a private folder of Unix sockets.

    By default a kernel gets five TCP ports that are free when they are chosen and may be taken when it binds them
    ("Address already in use" with many kernels on a machine); anybody on the machine could connect to them, too.
    """
    from traitlets.config import Config

    longest = len(tempfile.gettempdir()) + len("/kernel-12345678/k-ipc-5")
    with tempfile.TemporaryDirectory(
        prefix="kernel-", dir=None if longest < SOCKET_PATH_LIMIT else "/tmp", ignore_cleanup_errors=True
    ) as folder:
        yield Config({"KernelManager": {"transport": "ipc", "connection_file": f"{folder}/k.json"}})


def _kernel_manager(folder: Path, held: Sequence[IO]) -> type:
    """Kernels that import what lies in ``folder`` first: two clones may share an environment.

    At their end they are interrupted only where the user interrupts a running cell.
    jupyter_client interrupts every kernel that it ends. When papermill has its last answer (kernel_info), the kernel
    may not be quite done with that, and prints "[IPKernelApp] ERROR | KeyboardInterrupt caught in kernel".
    """
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        async def start_kernel(self, **kw: Any) -> None:  # type: ignore[override]
            path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "PYTHONPATH": path, UNWATCHED: "1"}
            await super().start_kernel(**kw, env=environment, pass_fds=[file.fileno() for file in held])

        async def _async_interrupt_kernel(self) -> None:
            if isinstance(sys.exception(), KeyboardInterrupt):
                for talker in ("papermill", "asyncio", "traitlets"):  # of a kernel that goes
                    logging.getLogger(talker).disabled = True
            elif self.shutting_down:
                return
            await super()._async_interrupt_kernel()

    return Kernel


def _running_cell(executed: Path) -> str | None:
    """The cell that papermill left running; None if none had begun, or if that was never written."""
    try:
        cells = read_values(executed, OBJECT)["cells"]
    except (DataError, KeyError):
        return None
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    # Their status does not tell: papermill ends by calling all of them completed.
    begun = sum(cell["metadata"].get("papermill", {}).get("start_time") is not None for cell in code)
    return f"In [{begun}]" if begun else None
