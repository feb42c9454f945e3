"""A new user's first day: the cluster page's commands work with a site file alone."""

import shutil
import sys
from dataclasses import replace

import pytest

from tests.cluster.mini_cluster import with_light_training

pytestmark = pytest.mark.integration
FINISH = """run.finish({"eval_ner_f1": 0.5})"""
SITE = """export SBATCH_PARTITION=gpu
export SBATCH_GRES=gpu:h100:1
SBATCH_TIMELIMIT=00:30:00
CPU_OPTIONS="--time=00:10:00"
VENV={venv}
ARCHIVE={archive}
MIN_TMP_GB=1
WANDB_MODE=offline
"""
HELD = {"GPU_OPTIONS": "--hold"}


@pytest.fixture(scope="module")
def newcomer(cluster, tmp_path_factory):
    """A clone with a site file, and an environment that says nothing of the site but where SLURM is."""
    place = tmp_path_factory.mktemp("newcomer")
    light = with_light_training(cluster, place / "project", FINISH)
    shutil.copy(light.project / "slurm/site.example.sh", light.project / "slurm/site.sh")
    with (light.project / "slurm/site.sh").open("a") as site:
        site.write(SITE.format(venv=sys.prefix, archive=place / "archive"))
    named = ("VENV", "MIN_TMP_GB", "COPY_SECONDS", "STOP_SECONDS", "TERM_SECONDS", "ARCHIVE", "MODULES")
    kept = {name: value for name, value in light.environment.items() if name not in named}
    return replace(light, environment=kept | {"PYTHONPATH": str(light.project)}), place / "archive"


def checks(output):
    """verdict and text of each check; of one that comes several times, the last."""
    lines = [line.split(maxsplit=2) for line in output.splitlines()]
    return {line[1]: (line[0], line[2]) for line in lines if len(line) == 3}


def test_preflight_says_what_slurm_lacks_and_then_that_nothing_is(newcomer):
    login, archive = newcomer
    command = ("python", "-m", "biomerge_lib", "preflight", "--site", *login.tiny)
    found = checks(login.call(*command))
    assert found["sbatch"][0] == "ok" and "in partition gpu" in found["sbatch"][1]
    assert found["archive"] == ("ok", f"run folders are kept in {archive}")
    assert found["backbone"][0] == found["venv"][0] == "ok" and found["wandb"] == ("ok", "wandb_mode=offline")
    assert found["driver"][0] == "note" and found["cuda"][0] == "warning"
    wrong = checks(login.call(*command, expect=2, SBATCH_PARTITION="fast"))["sbatch"]
    assert wrong[0] == "refused" and "nvalid partition" in wrong[1]
    assert (
        "Set SBATCH_PARTITION" in wrong[1]
        and "there is partition gpu* with gpu:a100:6,gpu:h100:2" in wrong[1]
    )


def test_a_compute_node_is_asked_by_a_job(newcomer):
    login, _ = newcomer
    line = f"python -m biomerge_lib preflight --site {' '.join(login.tiny)}"
    job = login.submit("--output=logs/site-%j.out", f"--wrap={line}")
    assert login.wait(job) == ["COMPLETED"]
    found = checks((login.project / f"logs/site-{job}.out").read_text())
    assert found["TMPDIR"] == ("ok", f"{login.environment['TMPDIR']} has room for a copy of the project")


def test_a_chain_asks_slurm_for_what_the_site_file_says_and_keeps_runs_there(newcomer):
    login, archive = newcomer
    submitted = login.call(
        "bash", "slurm/submit_chain.sh", "03_train", "06_report", *login.tiny, "run_id=first", **HELD
    )
    train, report = (line.split("job ")[1].split(",")[0] for line in submitted.splitlines()[:2])
    shown = {job: login.show(job) for job in (train, report)}
    assert shown[train]["TimeLimit"] == "00:30:00" and shown[report]["TimeLimit"] == "00:10:00"
    assert "h100" in shown[train]["TresPerNode"] and "TresPerNode" not in shown[report]
    login.call("scancel", report)
    login.call("scontrol", "release", train)
    assert login.wait(train) == ["COMPLETED"]
    assert (archive / "first/metrics.json").is_file() and not (login.runs / "first").exists()
