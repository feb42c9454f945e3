"""Trains runs in processes of their own: each is forked from one that has imported everything, which takes seconds.

A process trains with one thread: of whole runs with two, one in eight had gradients that differed in the last bits.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from biomerge_lib.experiment.recorded import load_run_parameters
from biomerge_lib.experiment.runs import quiet_libraries
from biomerge_lib.training import launch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "peft", "transformers.trainer", "transformers.models.llama"])


def die_at(moment: str) -> None:
    """SIGKILL when a function is called the nth time: ``module:Class.method:n``; with ``:after``, when it returns."""
    module, name, nth, *after = moment.split(":")
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    real, calls = getattr(holder, last), itertools.count(1)

    @functools.wraps(real)
    def call(*args, **kwargs):
        is_now = next(calls) == int(nth)
        if is_now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if is_now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, last, call)


def train(folder: Path, *, ranks: int = 0, kill_at: str | None = None) -> str:
    """Train the run in ``folder`` as its parameters say, or with ``ranks`` as each of torchrun's processes does.

    ``kill_at`` is a moment of :func:`die_at`. The ranks are DeepSpeed's and have no compiler, as on many clusters.

    Returns what it printed.
    """
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    environments: list[dict[str, str]] = [{}]
    if ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "CXX": "false"}
        environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [
        FORKS.Process(target=_train, args=(folder, log, environment, kill_at), daemon=True)
        for environment in environments
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    said = log.read_text(encoding="utf-8")
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert [process.exitcode for process in processes] == [expected] * len(processes), said[-5000:]
    return said


def _train(folder: Path, log: Path, environment: dict[str, str], kill_at: str | None) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    quiet_libraries()
    if kill_at is not None:
        die_at(kill_at)
    if environment:
        import deepspeed

        # On a CPU it would compile one for a minute; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        sys.argv[1:] = [str(folder)]
        sys.exit(launch.main())
    launch.train_run(folder, load_run_parameters(folder))
