"""Trains runs in processes of their own: each is forked from one that has imported everything, which takes seconds.

A process trains with one thread: of whole runs with two, one in eight had gradients that differed in the last bits.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from biomerge_lib.experiment.runs import load_run_parameters, quiet_libraries
from biomerge_lib.training import launch
from biomerge_lib.training import run as training

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "peft", "transformers.trainer", "transformers.models.llama"])


class Kill(TrainerCallback):
    """SIGKILL at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, *, ranks: int = 0, kill_at_step: int | None = None) -> str:
    """Train the run in ``folder`` as its parameters say, or with ``ranks`` as each of torchrun's processes does.

    The ranks are DeepSpeed's and have no compiler, as on many clusters.

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
        FORKS.Process(target=_train, args=(folder, log, environment, kill_at_step), daemon=True)
        for environment in environments
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    said = log.read_text(encoding="utf-8")
    expected = 0 if kill_at_step is None else -signal.SIGKILL
    assert [process.exitcode for process in processes] == [expected] * len(processes), said[-5000:]
    return said


def _train(folder: Path, log: Path, environment: dict[str, str], kill_at_step: int | None) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    quiet_libraries()
    if kill_at_step is not None:
        build_trainer = training.build_trainer

        def with_kill(*args, **kwargs):
            trainer = build_trainer(*args, **kwargs)
            trainer.add_callback(Kill(kill_at_step))
            return trainer

        training.build_trainer = with_kill
    if environment:
        import deepspeed

        # On a CPU it would compile one for a minute; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        sys.argv[1:] = [str(folder)]
        sys.exit(launch.main())
    launch.train_run(folder, load_run_parameters(folder))
