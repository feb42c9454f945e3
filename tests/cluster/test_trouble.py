"""What may go wrong around a training: each is named in the log's first lines, and what can go on goes on."""

import pytest

from .mini_cluster import wait_for, with_light_training

pytestmark = pytest.mark.integration
SINGLE = "slurm/job_single_ner.sbatch"
FINISH = """run.finish({"eval_ner_f1": 0.5})"""
BE_INTERRUPTED = """from biomerge_lib import jobs

jobs.note_interrupted("checkpoint-1 of 2 steps")
raise jobs.RunInterrupted("stopped")"""
HANG = """import time
from biomerge_lib.runs import write_json

write_json(run.checkpoints / "checkpoint-1/adapter_config.json", {})
time.sleep(600)"""


@pytest.fixture(scope="module")
def requeued(cluster, tmp_path_factory):
    """A job that is interrupted whenever it starts; SLURM takes its time between two starts."""
    light = with_light_training(cluster, tmp_path_factory.mktemp("again") / "project", BE_INTERRUPTED)
    return light, light.submit(SINGLE, *light.tiny, "run_id=again", MAX_REQUEUES="1")


@pytest.fixture(scope="module")
def troubled(cluster, requeued, tmp_path_factory):
    """The project, and a job with each trouble: name -> job."""
    light = with_light_training(cluster, tmp_path_factory.mktemp("trouble") / "project", FINISH)
    troubles = {
        "archive": {"ARCHIVE": "/dev/null/archive"},
        "disk": {"MIN_TMP_GB": "1000000"},
        "module": {"BASH_FUNC_module%%": "() { [[ $1 == purge ]]; }"},
        "venv": {"VENV": "/nowhere/venv"},
    }
    jobs = {
        name: light.submit(SINGLE, *light.tiny, f"run_id={name}", **environment)
        for name, environment in troubles.items()
    }
    light.wait(*jobs.values())
    return light, jobs


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("archive", "COMPLETED", "WARNING: the archive /dev/null/archive cannot be written: results go to "),
        ("disk", "COMPLETED", " is full ("),
        ("module", "COMPLETED", "WARNING: module load 2024 "),
        ("venv", "FAILED", "ERROR: no environment at VENV=/nowhere/venv or "),
    ],
)
def test_the_first_lines_name_the_trouble_and_results_are_kept(troubled, name, state, message):
    cluster, jobs = troubled
    log = cluster.log(jobs[name])
    assert message in "".join(log.splitlines(keepends=True)[:5])
    assert cluster.state(jobs[name]) == state
    assert (cluster.runs / name / "metrics.json").is_file() == (state == "COMPLETED")


def test_a_node_that_dies_costs_one_interval(cluster, tmp_path):
    light = with_light_training(cluster, tmp_path / "project", HANG)
    job = light.submit(SINGLE, *light.tiny, "run_id=lost")
    copied = light.runs / "lost/checkpoints/checkpoint-1/adapter_config.json"
    wait_for(copied.is_file, light, job)
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
