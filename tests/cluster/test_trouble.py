"""What may go wrong around a training: each is named in the log's first lines, and what can go on goes on."""

import subprocess
import warnings

import pytest

from tests.cluster.mini_cluster import wait_for, with_light_training

pytestmark = pytest.mark.integration
SINGLE = "slurm/job_single_ner.sbatch"
FINISH = """run.finish({"eval_ner_f1": 0.5})"""
BE_INTERRUPTED = """from biomerge_lib.experiment import jobs

jobs.note_interrupted("checkpoint-1 of 2 steps")
raise jobs.RunInterrupted("stopped")"""
HANG = """import time
from biomerge_lib.core.files import write_json

write_json(run.checkpoints / "checkpoint-1/adapter_config.json", {})
time.sleep(600)"""


FILL = """import json

(run.checkpoints / "checkpoint-1").mkdir(parents=True)
(run.checkpoints / "checkpoint-1/trainer_state.json").write_text("{}")
with open("filler", "wb") as filler:
    for _ in range(64):
        filler.write(bytes(2**20))
        filler.flush()
raise OSError(28, "No space left on device")"""


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """Makes a folder that is a disk of so many megabytes; None where nothing can be mounted."""
    mounted = []

    def make(megabytes):
        folder = tmp_path_factory.mktemp("disk")
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            warnings.warn("no tmpfs can be mounted here: a full disk is only simulated", stacklevel=2)
            return None
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=False)


@pytest.fixture(scope="module")
def requeued(cluster, tmp_path_factory):
    """A job that is interrupted whenever it starts; SLURM takes its time between two starts."""
    light = with_light_training(cluster, tmp_path_factory.mktemp("again") / "project", BE_INTERRUPTED)
    return light, light.submit(SINGLE, *light.tiny, "run_id=again", MAX_REQUEUES="1")


@pytest.fixture(scope="module")
def troubled(cluster, requeued, small_disk, tmp_path_factory):
    """The project, and a job with each trouble: name -> job."""
    light = with_light_training(cluster, tmp_path_factory.mktemp("trouble") / "project", FINISH)
    full = small_disk(2)  # less than the project's code
    troubles = {
        "archive": {"ARCHIVE": "/dev/null/archive"},
        "disk": {"MIN_TMP_GB": "1000000"},
        "copy": {"MIN_TMP_GB": "0", "TMPDIR": str(full)} if full else {"MIN_TMP_GB": "1000000"},
        "network": {"WANDB_BASE_URL": "http://127.0.0.1:9"},
        "module": {"MODULES": "2024 NCCL", "BASH_FUNC_module%%": "() { [[ $1 == purge ]]; }"},
        "venv": {"VENV": "/nowhere/venv"},
    }
    jobs = {
        name: light.submit(SINGLE, *light.tiny, f"run_id={name}", "wandb_mode=online", **environment)
        for name, environment in troubles.items()
    }
    light.wait(*jobs.values())
    return light, jobs


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("archive", "COMPLETED", "WARNING: the archive /dev/null/archive cannot be written: results go to "),
        ("disk", "COMPLETED", " is full ("),
        ("copy", "COMPLETED", ": the job works in "),
        ("network", "COMPLETED", "W&B: offline (no network: 127.0.0.1 cannot be reached"),
        ("module", "COMPLETED", "WARNING: module load 2024 NCCL failed"),
        ("venv", "FAILED", "ERROR: no environment at VENV=/nowhere/venv or "),
    ],
)
def test_the_first_lines_name_the_trouble_and_results_are_kept(troubled, name, state, message):
    cluster, jobs = troubled
    log = cluster.log(jobs[name])
    assert message in "".join(log.splitlines(keepends=True)[:8])
    assert cluster.state(jobs[name]) == state
    assert (cluster.runs / name / "metrics.json").is_file() == (state == "COMPLETED")


def test_a_disk_that_fills_in_the_middle_is_named_and_what_was_written_is_kept(cluster, small_disk, tmp_path):
    light = with_light_training(cluster, tmp_path / "project", FILL)
    disk = small_disk(32)
    environment = {"TMPDIR": str(disk), "MIN_TMP_GB": "0"} if disk else {}
    job = light.submit(SINGLE, *light.tiny, "run_id=filled", **environment)
    assert light.wait(job) == ["FAILED"]
    assert (light.runs / "filled/checkpoints/checkpoint-1/trainer_state.json").is_file()
    end = light.log(job)[-1500:]
    assert "No space left on device" in end and str(light.runs / "filled/03_train.ipynb") in end
    assert (f"disk      {disk} is full" in end) == bool(disk)


def test_a_run_has_one_job_at_a_time_and_a_node_that_dies_costs_one_interval(cluster, tmp_path):
    light = with_light_training(cluster, tmp_path / "project", HANG)
    job = light.submit(SINGLE, *light.tiny, "run_id=lost")
    copied = light.runs / "lost/checkpoints/checkpoint-1/adapter_config.json"
    wait_for(copied.is_file, light, job)
    second = light.submit(SINGLE, *light.tiny, "run_id=lost")
    light.wait(second)
    assert "another process is training this run" in light.log(second) and light.state(second) == "FAILED"
    light.kill(job)
    light.wait(job)
    assert copied.is_file() and "results are in" not in light.log(job)


def test_a_job_is_requeued_at_most_so_many_times(requeued):
    light, job = requeued
    light.wait(job)
    log = light.log(job)
    assert light.show(job)["Restarts"] == "1" and light.state(job) == "FAILED"
    assert log.count("stopped after") == 2 and log.count(": requeue 1 of at most 1\n") == 1
    assert "requeued 1 times already (MAX_REQUEUES=1): submit the same command again to go on" in log
