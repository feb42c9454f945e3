"""A copy of the project with the tiny model on a real one-node SLURM, as a user works with it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import nbformat

from tests.conftest import ROOT

# What a user's environment may hold; none of it may be found in anything that a run leaves.
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_PlantedTokenOfTheHubXXXXXXXXXXXXXX",
    "OPENAI_API_KEY": "sk-planted-key-of-a-server",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/access/key",
    "DATABASE_PASSWORD": "planted-correct-horse-battery",
}


@dataclass
class Cluster:
    """Submits from ``project`` with ``environment``; a job's log is at ``logs/<name>-<job>.out``."""

    project: Path
    environment: dict[str, str]
    tiny: list[str]
    jobs: list[str] = field(default_factory=list)

    @property
    def runs(self) -> Path:
        return self.project / "runs"

    def call(self, *command: str, expect: int = 0, **environment: str) -> str:
        for _ in range(5):
            done = subprocess.run(
                command,
                cwd=self.project,
                env=self.environment | environment,
                capture_output=True,
                text=True,
                check=False,
            )
            # A busy slurmctld may drop a client's connection, which ends the client: asking again changes nothing.
            if done.returncode != -signal.SIGPIPE or command[0] not in ("squeue", "scontrol", "scancel"):
                break
            time.sleep(1)
        assert done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *words: str, **environment: str) -> str:
        job = self.call("sbatch", "--parsable", *words, **environment).strip()
        self.jobs.append(job)
        return job

    def show(self, job: str) -> dict[str, str]:
        found = self.call("scontrol", "show", "job", job, "--oneliner").splitlines()[-1]
        return dict(re.findall(r"(\w+)=(\S*)", found))

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, *jobs: str, seconds: float = 800) -> list[str]:
        """Wait until the jobs (all tasks of an array) have ended; their states."""
        deadline = time.monotonic() + seconds
        while left := self.call("squeue", "--noheader", "--format=%i %T", "--jobs", ",".join(jobs)):
            assert time.monotonic() < deadline, f"{left}\n" + "\n".join(self.log(job)[-3000:] for job in jobs)
            time.sleep(0.5)
        return [self.state(job) for job in jobs]

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted((self.project / "logs").glob(f"*-{job}*.out")))

    def workplace(self, job: str) -> Path:
        return Path(self.environment["TMPDIR"]) / f"biomerge-{job}"

    def kernel(self, job: str) -> int | None:
        """The process that runs the notebook's cells in a job."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if b"ipykernel" in (process / "cmdline").read_bytes() and (
                    process / "cwd"
                ).readlink() == self.workplace(job):
                    return int(process.name)
            except OSError:
                continue
        return None

    def kill(self, job: str) -> None:
        """End all of a job's processes at once, its script first, as a node's failure does: no trap runs."""
        mark = f"SLURM_JOB_ID={job}".encode()
        for pid in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*")):
            with suppress(OSError):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)

    @contextmanager
    def held(self, job: str, checkpoint: str) -> Iterator[None]:
        """A job's kernel, stopped (SIGSTOP) from a checkpoint on, as if a step took long."""
        written = f"runs/*/checkpoints/{checkpoint}/trainer_state.json"
        wait_for(lambda: self._asked(job) or list(self.workplace(job).glob(written)), self, job)
        kernel = self.kernel(job)  # none yet, when a slow machine is asked to stop before it has begun
        if kernel:
            os.kill(kernel, signal.SIGSTOP)
        try:
            yield
        finally:
            if kernel:
                os.kill(kernel, signal.SIGCONT)

    def hang_at(self, job: str, checkpoint: str, *then: str) -> None:
        """Hold a job's kernel until the job asks it to stop; ``then`` is a command for the time between."""
        with self.held(job, checkpoint):
            if then:
                self.call(*then)
            self.wait_until_asked(job)

    def wait_until_asked(self, job: str) -> None:
        """Wait until the job's script has asked its training to stop."""
        wait_for(lambda: self._asked(job), self, job)

    def _asked(self, job: str) -> bool:
        return (self.workplace(job) / ".messages/stop").is_file()


def wait_for(condition: Callable[[], object], cluster: Cluster, job: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, cluster.log(job)[-4000:]
        time.sleep(0.05)


def copy_project(target: Path) -> Path:
    """What a clone would hold: the project's files that git knows or would add."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def prepare_data(project: Path, backbone: Path, records: dict) -> list[str]:
    """A few short sentences and the tiny backbone in a project; the parameters of a run on them."""
    from biomerge_lib.core.records import write_records
    from biomerge_lib.model.backbones import build_tokenizer, prepare_backbone

    for split, number in (("train", 24), ("dev", 4), ("test", 4)):
        short = [record for record in records[split] if len(record.text) < 90 and record.spans]
        write_records(project / f"data/tiny/{split}.jsonl", short[:number])
    build_tokenizer(str(backbone), project / "tokenizers/tiny")
    prepare_backbone(str(backbone), project / "tokenizers/tiny", project / "backbones")
    values = {
        "model": "smollm2_135m",
        "runtime": "cpu_debug",
        "backbone": backbone,
        "tokenizer_dir": "tokenizers/tiny",
        "data_dir": "data/tiny",
        "cache_dir": "null",
        "num_train_epochs": "2",
        "eval_limit": "4",
        "per_device_train_batch_size": "2",  # 12 steps an epoch: a job that is held at step 4 is far from its end
        "eval_steps": "4",
        "save_steps": "4",
        "max_new_tokens": "16",
        "max_target_tokens": "16",
        "early_stopping_patience": "100",
    }
    return [f"{name}={value}" for name, value in values.items()]


def with_light_training(cluster: Cluster, project: Path, cell: str) -> Cluster:
    """The cluster with a copy of the project whose 03_train opens its run and then executes ``cell`` alone."""
    shutil.copytree(cluster.project, project, ignore=shutil.ignore_patterns("runs", "logs"))
    (project / "logs").mkdir()
    notebook = nbformat.read(project / "notebooks/03_train.ipynb", 4)
    opening = [found for found in notebook.cells if found.cell_type == "code"][:2]
    notebook.cells = [*opening, nbformat.v4.new_code_cell(cell)]
    nbformat.write(notebook, project / "notebooks/03_train.ipynb")
    return replace(cluster, project=project)
