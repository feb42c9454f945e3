"""A real one-node SLURM and a W&B stand-in; every job has keys planted in its environment."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fake_wandb import Server
from tests.cluster.mini_cluster import SECRETS, Cluster, copy_project, prepare_data
from tests.support.shared_corpora import skip_but_fail_in_ci

MINISLURM = Path(__file__).with_name("minislurm.sh")


@pytest.fixture(scope="session")
def wandb_server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def cluster(tiny_backbone, sample_records, wandb_server, tmp_path_factory) -> Iterator[Cluster]:
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "rsync"))):
        skip_but_fail_in_ci("a SLURM of our own needs root and: apt-get install slurm-wlm munge rsync")
    place = tmp_path_factory.mktemp("cluster")
    daemons = Path(tempfile.mkdtemp(prefix="slurm-"))
    daemons.chmod(0o755)  # munge wants everybody to reach its socket
    project = copy_project(place / "project")
    tiny = prepare_data(project, tiny_backbone, sample_records)
    for name in ("home", "node"):
        (place / name).mkdir()
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB", "SLURM", "BIOMERGE"))
    }
    environment = (
        clean
        | SECRETS
        | {
            "SLURM_CONF": str(daemons / "slurm.conf"),
            "HOME": str(place / "home"),
            "TMPDIR": str(place / "node"),
            "VENV": sys.prefix,
            "MIN_TMP_GB": "1",
            "COPY_SECONDS": "2",
            "STOP_SECONDS": "300",
            "TERM_SECONDS": "300",
            "WANDB_BASE_URL": wandb_server.url,
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        }
    )
    try:
        subprocess.run(["bash", MINISLURM, "start", daemons], check=True)
        yield Cluster(project, environment, tiny)
    finally:
        subprocess.run(["bash", MINISLURM, "stop", daemons], check=False)
        shutil.rmtree(daemons, ignore_errors=True)


@pytest.fixture(scope="session")
def campaign(cluster) -> dict[str, str]:
    """Jobs of every kind, submitted together and ended: name -> job.

    ``whole``: a chain's 03_train, undisturbed; ``scored``: the chain's 04. ``broken`` fails; ``after`` waits for it.
    ``limited`` hangs at checkpoint-4 until SLURM warns it of its time limit, and is requeued with more time.
    ``cancelled`` hangs there until scancel, ``expired`` until SLURM ends it at its time limit without a warning.
    The limits are set when the jobs hang, so that no job reaches one before, however slow the machine is.
    ``bereft`` trains on when its W&B server is killed.
    """
    data = cluster.project / "data"
    shutil.copytree(data / "tiny", data / "broken")
    with (data / "broken/dev.jsonl").open("a") as lines:
        lines.write("not json\n")
    online = "wandb_mode=online"
    single = ["slurm/job_single_ner.sbatch", *cluster.tiny]
    jobs = {}
    jobs["expired"] = cluster.submit("--signal=B:CONT@10", *single, "run_id=expired")
    mortal, url = start_mortal_server()
    jobs["bereft"] = cluster.submit(*single, "run_id=bereft", online, WANDB_BASE_URL=url)
    chain = cluster.call(
        "bash", "slurm/submit_chain.sh", "03_train", "04_greedy_dev", *cluster.tiny, "run_id=whole", online
    )
    broken = [word for word in cluster.tiny if not word.startswith("data_dir")]
    failing = cluster.call(
        "bash",
        "slurm/submit_chain.sh",
        "03_train",
        "06_report",
        *broken,
        "data_dir=data/broken",
        "run_id=broken",
    )
    jobs |= dict(zip(("whole", "scored"), job_numbers(chain), strict=True))
    jobs |= dict(zip(("broken", "after"), job_numbers(failing), strict=True))
    hours = ("--time=600", "--signal=B:USR1@12000")  # is warned 200 minutes before the end
    jobs["limited"] = cluster.submit(*hours, *single, "run_id=limited", online)
    jobs["cancelled"] = cluster.submit(*single, "run_id=cancelled")
    waiting = [
        (cluster.hang_at, jobs["cancelled"], "checkpoint-4", "scancel", jobs["cancelled"]),
        (cluster.hang_at, jobs["expired"], "checkpoint-4", *limit(jobs["expired"], 1)),
        (kill_server, cluster, jobs["bereft"], mortal),
    ]
    threads = [threading.Thread(target=target, args=arguments) for target, *arguments in waiting]
    for thread in threads:
        thread.start()
    with cluster.held(jobs["limited"], "checkpoint-4"):
        cluster.call(*limit(jobs["limited"], 190))
        cluster.wait_until_asked(jobs["limited"])
        cluster.call(*limit(jobs["limited"], 600))
    for thread in threads:
        thread.join()
    cluster.wait(*jobs.values())
    return jobs


def limit(job: str, minutes: int) -> tuple[str, ...]:
    return ("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


def start_mortal_server() -> tuple[subprocess.Popen, str]:
    """A W&B stand-in that is a process of its own, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("fake_wandb.py"), str(port)])
    return server, f"http://127.0.0.1:{port}"


def kill_server(cluster: Cluster, job: str, server: subprocess.Popen) -> None:
    """Kill a job's W&B server when training has got to checkpoint-4."""
    try:
        with cluster.held(job, "checkpoint-4"):
            server.kill()
    finally:
        server.kill()
        server.wait()


def job_numbers(output: str) -> list[str]:
    return re.findall(r": job (\d+),", output)
