"""What a terminal or a cluster job's log says while 03_train runs."""

import re
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from biomerge_lib.experiment import jobs
from biomerge_lib.training.trainer_callbacks import LiveView


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.PROGRESS, str(tmp_path / "progress"))
    return LiveView()


def tell(log, step, process=0, **logs):
    state = TrainerState(global_step=step, max_steps=900, is_world_process_zero=process == 0)
    log.on_log(SimpleNamespace(), state, None, logs=logs)


def begin(log, step=0):
    log.on_train_begin(SimpleNamespace(), TrainerState(global_step=step, max_steps=900), None)


def test_a_line_has_step_loss_rate_and_time_left(log, tmp_path, monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    begin(log, step=200)
    monkeypatch.setattr("time.monotonic", lambda: 1200.0)
    tell(log, 300, loss=0.231)
    line = "step 300 of 900, 0.50 steps/s, 0:20:00 left, loss 0.231\n"
    assert (tmp_path / "progress").read_text() == line


def test_losses_are_told_now_and_then_scores_and_the_last_step_always(log, tmp_path):
    tell(log, 0, eval_ner_f1=0.1)  # no training has begun
    begin(log)
    for step in (50, 100, 150):
        tell(log, step, loss=0.5)
    tell(log, 150, eval_ner_f1=0.75, eval_loss=0.4)
    tell(log, 900, loss=0.25)
    tell(log, 900, process=1, greedy_dev_ner_f1=0.8)
    tell(log, 900, train_runtime=3.0)
    lines = (tmp_path / "progress").read_text().splitlines()
    assert [
        re.match(r"step (\S+) of 900, [\d.]+ steps/s, .* left, (.*)", line).groups() for line in lines
    ] == [
        ("50", "loss 0.500"),
        ("150", "eval_ner_f1 0.750"),
        ("900", "loss 0.250"),
    ]


def test_where_nobody_waits_nothing_is_written(log, tmp_path, monkeypatch):
    monkeypatch.delenv(jobs.PROGRESS)
    begin(log)
    tell(log, 50, loss=0.5)
    assert not list(tmp_path.iterdir())
