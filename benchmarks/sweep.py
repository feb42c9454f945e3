"""The brief's sweep, run: a grid through real `wandb agent` processes on one card, and its best point on all data.

    python -m benchmarks.sweep --agents 9 --budget 480                     # again, until all points are finished
    python -m benchmarks.sweep --confirm --budget 480                      # the best point, all data, three seeds
    python -m benchmarks.sweep --file parameters/sweep/smollm2_135m.yaml --agents 2 wandb_mode=online

The server is the tests' (tests/cluster/fake_wandb.py), which lives as long as the command. An agent asks it for a
point and runs `python -m biomerge_lib run 03_train` with it. A second call gives out all points anew: finished ones are
found in their run folders, an unfinished one goes on from its checkpoint. `python -m biomerge_lib sweep FILE` ranks
them, `report` makes their page.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.common import run_side_by_side, train_command
from biomerge_lib.core.composition import as_overrides
from biomerge_lib.core.errors import BioMergeError
from biomerge_lib.experiment.runs import PROJECT_DIR, quiet_libraries
from biomerge_lib.experiment.sweeps import Sweep, describe_ranking, rank_points, read_sweep

FILE = "parameters/sweep/bc5cdr_smollm2.yaml"
SEEDS = (42, 43, 44)


def run_agents(path: Path, extra: list[str], *, agents: int, budget: float) -> None:
    """Let ``agents`` processes train the file's points until none is left or ``budget`` seconds are over.

    ``extra`` words go into the sweep's command, as agents take none themselves. An agent that is stopped leaves its
    point to the next call.
    """
    deadline = time.monotonic() + budget
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
    environment = (
        os.environ | address | {"WANDB_DIR": str(PROJECT_DIR / "runs"), "PYTHONPATH": str(PROJECT_DIR)}
    )
    if inherited := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + inherited
    runs = PROJECT_DIR / "runs"
    runs.mkdir(exist_ok=True)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    *words, macro = [sys.executable if word == "python" else word for word in config["command"]]
    config["command"] = [*words, *extra, macro]
    told = runs / f"sweep-{path.name}"
    told.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    started = [subprocess.Popen([sys.executable, PROJECT_DIR / "tests/cluster/fake_wandb.py", str(port)])]
    try:
        _wait_for(port)
        create = [sys.executable, "-m", "wandb", "sweep", "--project", "TaskMerge", str(told)]
        made = subprocess.run(
            create, env=environment, cwd=PROJECT_DIR, capture_output=True, text=True, check=False
        )
        if not (found := re.search(r"wandb agent (\S+)", made.stdout + made.stderr)):
            raise SystemExit(f"no sweep was made:\n{made.stdout}{made.stderr}")
        agent = [sys.executable, "-m", "wandb", "agent", found[1]]
        for number in range(agents):
            with (runs / f"sweep-agent-{number}.log").open("w") as log:
                options: dict[str, Any] = {
                    "stdout": log,
                    "stderr": subprocess.STDOUT,
                    "cwd": PROJECT_DIR,
                    "env": environment,
                }
                started.append(subprocess.Popen(agent, **options))
        while time.monotonic() < deadline and any(process.poll() is None for process in started[1:]):
            time.sleep(1)
    finally:
        stop_agents(started[1:])
        started[0].terminate()


def stop_agents(agents: Sequence[subprocess.Popen], seconds: float = 60) -> None:
    """Interrupt agents, which then take no more points, and their trainings, which keep their checkpoints."""
    running = [agent for agent in agents if agent.poll() is None]
    below = [child for agent in running for child in psutil.Process(agent.pid).children(recursive=True)]
    trainings = [child for child in below if "03_train" in child.cmdline()]
    for process in (*running, *trainings):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGINT)
    psutil.wait_procs(trainings, timeout=seconds)
    for agent in running:
        agent.terminate()
        agent.wait()


def _wait_for(port: int) -> None:
    for _ in range(200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise SystemExit("the W&B stand-in did not start.")


def confirm(sweep: Sweep, *, budget: float) -> None:
    """Train the best point on all data and score it on all of dev, with each seed."""
    best = rank_points(sweep)[0]
    if best.status != "finished":
        raise SystemExit("no point is finished: nothing to confirm.")
    words = [*sweep.overrides, *as_overrides(best.values), "subsample=1.0", "eval_limit=null"]
    commands = {
        name: train_command(name, *words, f"seed={seed}")
        for seed in SEEDS
        for name in [f"{sweep.name}-best-{seed}"]
    }
    if failed := run_side_by_side(commands, at_once=len(SEEDS), budget=budget):
        raise SystemExit(f"not finished: {', '.join(failed)} (runs/NAME.log); the same command goes on.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", default=FILE, help="(%(default)s)")
    parser.add_argument("extra", nargs="*", metavar="NAME=VALUE", help="parameters of all points")
    parser.add_argument("--agents", type=int, default=9, help="processes of `wandb agent` (%(default)s)")
    parser.add_argument(
        "--budget", type=float, default=3600, help="seconds after which the agents are stopped"
    )
    parser.add_argument("--confirm", action="store_true", help="train the best point on all data instead")
    options = parser.parse_args()
    quiet_libraries()
    try:
        sweep = read_sweep(options.file, options.extra)
    except BioMergeError as error:
        raise SystemExit(f"error: {error}") from None
    if options.confirm:
        return confirm(sweep, budget=options.budget)
    path = PROJECT_DIR / options.file
    run_agents(path, options.extra, agents=options.agents, budget=options.budget)
    print(describe_ranking(sweep, rank_points(sweep)))


if __name__ == "__main__":
    main()
