"""No key or token reaches anything that a run leaves: notebooks, logs, run folders, W&B's files, the server."""

import json
import subprocess

import pytest

from tests.cluster.mini_cluster import SECRETS

pytestmark = pytest.mark.integration


def test_no_secret_is_in_any_trace(cluster, campaign, wandb_server):
    page = cluster.call("python", "-m", "biomerge_lib", "report", "runs", "--out", "reports/report.html")
    assert "report.html" in page
    places = [cluster.project, cluster.environment["TMPDIR"], cluster.environment["HOME"]]
    kinds = subprocess.run(
        ["find", *places, "-type", "f", "-printf", "%f\n"], capture_output=True, text=True
    ).stdout
    for kind in (
        "03_train.ipynb",
        ".out\n",
        ".wandb\n",
        "metrics.json",
        "report.html",
        "chain-",
        "debug-internal.log",
    ):
        assert kind in kinds, kind
    patterns = [word for secret in SECRETS.values() for word in ("-e", secret)]
    found = subprocess.run(["grep", "-rlaF", *patterns, *places], capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stdout
    told = json.dumps(wandb_server.state()) + "".join(map(repr, wandb_server.files.values()))
    assert not [name for name, secret in SECRETS.items() if secret in told]


def test_the_planted_keys_do_reach_the_jobs(cluster):
    """Or the law above would hold for nothing."""
    shown = cluster.call("srun", "--mem=100", "printenv", "WANDB_API_KEY")
    assert SECRETS["WANDB_API_KEY"] in shown
