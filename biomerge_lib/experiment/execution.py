"""Knows how notebooks are executed, by papermill or by hand in JupyterLab; knows nothing of runs or parameters.

notebook + parameters --[execute_notebook]--> executed notebook | NotebookFailed(cell, reason)
notebook as JupyterLab saves it --[keep_executed_copy]--> executed notebook
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

from biomerge_lib.core.errors import BioMergeError, DataError, ParameterError
from biomerge_lib.core.files import OBJECT, read_values, write_text
from biomerge_lib.experiment.provenance import PROJECT_DIR

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


def kernel_shell() -> Any:
    """The IPython shell of the notebook that this process runs; None in a terminal or a job's process."""
    return sys.modules["IPython"].get_ipython() if "ipykernel" in sys.modules else None


def notebook_file() -> Path | None:
    """The file of a notebook that a Jupyter server runs, as it was named when its kernel started; None elsewhere."""
    path = Path(os.environ.get("JPY_SESSION_NAME", ""))
    return path if path.suffix == ".ipynb" and path.is_file() else None


def refuse_other_checkout() -> None:
    """The notebook's project must be the library's: two clones may share an environment.

    Raises:
        ParameterError: the notebook lies in another checkout than the library that it imports.
    """
    path = (notebook_file() or Path.cwd() / "notebook").resolve()
    own = next((folder for folder in path.parents if (folder / "biomerge_lib/__init__.py").is_file()), None)
    if own not in (None, PROJECT_DIR):
        raise ParameterError(
            f"this notebook lies in {own}, but imports biomerge_lib from {PROJECT_DIR}. Start JupyterLab with "
            f"`make lab` in {own} (or set PYTHONPATH={own}), and restart the kernel."
        )


def keep_executed_copy(executed: Path) -> None:
    """From now on, whatever JupyterLab saves of this notebook stands in ``executed``, too.

    A kernel knows neither the notebook in the browser nor how to have it saved, so the copy is as old as Lab's last
    save (every two minutes, while a browser is open), and ends with the kernel.
    """
    _copied[:] = [executed]
    if (path := notebook_file()) and UNWATCHED not in os.environ:
        Thread(target=_copy_when_saved, args=(path, executed, path.stat().st_mtime_ns), daemon=True).start()


def _copy_when_saved(path: Path, executed: Path, seen: int) -> None:
    while True:
        time.sleep(1)
        if _copied[0] is not executed:  # the kernel has opened a run again
            return
        # Renamed, deleted, half written at this moment, or a full disk: the next look may do.
        with suppress(OSError, ValueError):
            if (saved := path.stat().st_mtime_ns) != seen:
                text = path.read_text(encoding="utf-8")
                json.loads(text)
                write_text(executed, text)
                seen = saved


_copied: list[Path] = []  # where the kernel's notebook is copied now
