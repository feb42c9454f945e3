"""W&B without a key, without a network, or with a server that dies: training goes on, the rest is sent later."""

import json
import socket

import pytest

from biomerge_lib.core.files import write_json
from biomerge_lib.experiment import tracking
from tests.cluster.fake_wandb import Server

pytestmark = pytest.mark.integration
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    """A run folder as 03_train leaves it."""
    folder = tmp_path / "runs/tiny"
    checkpoint = folder / "checkpoints/checkpoint-4"
    checkpoint.mkdir(parents=True)
    for path in (
        checkpoint / "adapter_model.safetensors",
        checkpoint / "optimizer.pt",
        folder / "03_train.ipynb",
    ):
        path.write_text("x")
    stage = {"status": "finished", "metrics": {"eval_ner_f1": 0.5, "best_checkpoint": "checkpoint-4"}}
    write_json(folder / "metrics.json", {"stages": {"03_train": stage}})
    return folder


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A server, a key, and a home without ``.netrc``; what the test session says of W&B is undone."""
    server = start_server()
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    use(server.url, monkeypatch)
    yield server
    stop_server(server)


def start_server():
    import threading

    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def stop_server(server):
    server.shutdown()
    server.server_close()


def use(url, monkeypatch):
    """What a new process would do with WANDB_BASE_URL."""
    import wandb

    monkeypatch.setenv("WANDB_BASE_URL", url)
    wandb.teardown()


def log(parameters, folder, steps, **finish):
    run = tracking.open_wandb_run(parameters, folder)
    for step in steps:
        run.log({"loss": 1 / step}, step=step)
    tracking.close_run(run, folder, **finish)


def test_without_a_key_a_run_is_offline_and_can_be_sent_later(
    tiny_parameters, folder, online, monkeypatch, capsys
):
    parameters = tiny_parameters(wandb_mode="online")
    monkeypatch.delenv("WANDB_API_KEY")
    log(parameters, folder, [1, 2], exit_code=75)
    log(parameters, folder, [3, 4])  # after a requeue
    tracking.upload_stage(folder, "03_train")
    said = capsys.readouterr().out
    assert "W&B: offline (no API key: `wandb login`, or WANDB_API_KEY)" in said
    assert "python -m biomerge_lib wandb-sync runs/tiny" in said
    assert not online.runs and len(list((folder / "wandb").glob("offline-run-*"))) == 2

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracking.sync_run(folder)
    known = json.loads((folder / "wandb.json").read_text())
    run = online.runs[known["id"]]
    assert [(entry["_step"], entry["loss"]) for entry in run["history"]] == [(s, 1 / s) for s in (1, 2, 3, 4)]
    assert run["summary"]["eval_ner_f1"] == 0.5 and run["project"] == "TaskMerge"
    files = {name for artifact in online.artifacts.values() for name in artifact["files"]}
    assert files == {"adapter_model.safetensors", "03_train.ipynb", "metrics.json"}
    assert "optimizer.pt" not in files and not online.unknown


def test_without_a_network_a_run_is_offline(tiny_parameters, folder, online, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        log(tiny_parameters(wandb_mode="online"), folder, [1])
    assert "W&B: offline (no network: 127.0.0.1 cannot be reached" in capsys.readouterr().out
    assert list((folder / "wandb").glob("offline-run-*"))


@pytest.mark.timeout(300)  # wandb by itself would wait for a day
def test_a_server_that_dies_in_the_middle_costs_seconds_and_nothing_else(
    tiny_parameters, folder, online, monkeypatch, capsys
):
    monkeypatch.setattr(tracking, "CURVE_SECONDS", 3)
    run = tracking.open_wandb_run(tiny_parameters(wandb_mode="online"), folder)
    run.log({"loss": 1.0}, step=1)
    stop_server(online)
    run.log({"loss": 0.5}, step=2)
    tracking.close_run(run, folder)
    tracking.upload_stage(folder, "03_train")
    said = capsys.readouterr().out
    assert "the server did not take everything" in said and "03_train was not sent (no network" in said

    again = start_server()
    use(again.url, monkeypatch)
    tracking.sync_run(folder)
    [run] = again.runs.values()
    assert [entry["loss"] for entry in run["history"]] == [1.0, 0.5] and run["summary"]["eval_ner_f1"] == 0.5
    stop_server(again)


def test_disabled_means_that_nothing_is_written(tiny_parameters, folder, online):
    assert tracking.open_wandb_run(tiny_parameters(wandb_mode="disabled"), folder) is None
    tracking.upload_stage(folder, "03_train")
    assert not online.runs and not (folder / "wandb").exists()
