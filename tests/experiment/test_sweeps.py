"""A sweep file's grid, its states and its ranking, without a server."""

import json
from itertools import product

import pytest
import yaml

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import ParameterError
from biomerge_lib.experiment import sweeps
from biomerge_lib.experiment.sweeps import (
    describe_ranking,
    pending_points,
    rank_points,
    read_point,
    read_sweep,
)

SHIPPED = "parameters/sweep/lora_ner_span.yaml"


def test_the_shipped_sweep_is_the_briefs_grid():
    sweep = read_sweep(SHIPPED)
    assert (sweep.metric, sweep.maximize) == ("eval_ner_f1", True)
    assert len(sweep.points) == 18
    found = {(p["learning_rate"], p["lora_rank"], p["lora_dropout"], p["subsample"]) for p in sweep.points}
    assert found == set(product([1e-4, 2e-4, 3e-4], [4, 8, 16], [0.05, 0.1], [0.2]))


def test_a_point_is_the_same_run_as_with_an_agent():
    command = yaml.safe_load((sweeps.PROJECT_DIR / SHIPPED).read_text())["command"]
    assert (
        command[1:6] == ["python", "-m", "biomerge_lib", "run", "03_train"]
        and command[-1] == "${args_no_hyphens}"
    )
    sweep = read_sweep(SHIPPED)
    for number, point in enumerate(sweep.points):
        agents_words = [*command[6:-1], *(f"{name}={value}" for name, value in point.items())]
        assert compose_parameters(agents_words).run_name == sweep.parameters(number).run_name
    assert len({sweep.parameters(number).run_name for number in range(18)}) == 18


@pytest.fixture
def tiny_sweep(tmp_path):
    def make(overrides=(), **changes):
        config = yaml.safe_load((sweeps.PROJECT_DIR / SHIPPED).read_text())
        config["parameters"] = {"learning_rate": {"values": [1e-3, 2e-3]}, "lora_rank": {"values": [2, 4, 8]}}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(config | changes))
        return read_sweep(
            path, [f"runs_dir={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}", *overrides]
        )

    return make


def test_points_of_different_watch_metrics_are_not_ranked_by_what_they_watch(tiny_sweep):
    grid = {"watch_metric": {"values": ["answer", "token_head"]}}
    with pytest.raises(ParameterError, match=r"means another F1 for each watch_metric.*greedy_dev_ner_f1"):
        tiny_sweep(parameters=grid)
    assert (
        len(tiny_sweep(parameters=grid, metric={"name": "greedy_dev_ner_f1", "goal": "maximize"}).points) == 2
    )


def finish(sweep, number, score, status="finished", **fields):
    parameters = sweep.parameters(number)
    parameters.run_folder.mkdir(parents=True)
    (parameters.run_folder / "parameters.yaml").write_text(yaml.safe_dump(parameters.model_dump()))
    stage = {"status": status, "metrics": {"eval_ner_f1": score, "best_checkpoint": f"checkpoint-{number}"}}
    metrics = {"stages": {"03_train": stage | fields}, "data": {"train": "0" * 64}}
    (parameters.run_folder / "metrics.json").write_text(json.dumps(metrics))


def test_points_rank_by_the_metric_and_the_unfinished_are_pending(tiny_sweep):
    sweep = tiny_sweep()
    assert pending_points(sweep) == "0,1,2,3,4,5"
    finish(sweep, 1, 0.5)
    finish(sweep, 4, 0.7)
    finish(sweep, 5, 0.0, status="failed", error="DataError: no entity")
    assert pending_points(sweep) == "0,2,3,5"
    points = rank_points(sweep)
    assert [point.number for point in points] == [4, 1, 0, 2, 3, 5]
    assert [point.status for point in points] == [
        "finished",
        "finished",
        "waiting",
        "waiting",
        "waiting",
        "failed",
    ]
    lines = describe_ranking(sweep, points).splitlines()
    assert lines[0] == "lora_ner_span: 2 of 6 points finished"
    assert lines[2].split()[:5] == ["1", "0.7000", "0.002", "4", "4"]
    assert lines[7].endswith("(DataError: no entity)")
    assert lines[8] == f"best checkpoint: {points[0].folder}/checkpoints/checkpoint-4"
    assert [
        point.number for point in rank_points(tiny_sweep(metric={"name": "eval_ner_f1", "goal": "minimize"}))
    ][:2] == [1, 4]


def test_a_finished_point_with_other_data_or_another_dev_set_counts_no_more(tiny_sweep, tmp_path):
    sweep = tiny_sweep()
    finish(sweep, 0, 0.5)
    assert read_point(sweep, 0).status == "finished"
    assert read_point(tiny_sweep(["eval_limit=3"]), 0).reason == "scored with eval_limit=None"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("other\n")
    assert (read_point(sweep, 0).status, read_point(sweep, 0).reason) == (
        "outdated",
        "train.jsonl changed since",
    )


def test_what_cannot_be_enumerated_is_refused(tiny_sweep):
    with pytest.raises(ParameterError, match=r"unknown parameter 'Dropout'\. Did you mean 'lora_dropout'"):
        tiny_sweep(parameters={"Dropout": {"values": [0.05]}})
    with pytest.raises(ParameterError, match="method=bayes needs the W&B server"):
        tiny_sweep(method="bayes")
    with pytest.raises(ParameterError, match="learning_rate has neither values"):
        tiny_sweep(parameters={"learning_rate": {"min": 1e-4, "max": 1e-3}})
    with pytest.raises(ParameterError, match="learning_rate=1: the sweep sets that"):
        tiny_sweep(["learning_rate=1"])
    with pytest.raises(ParameterError, match="points are chosen on dev; test is scored once"):
        tiny_sweep(metric={"name": "test_ner_f1"})
    with pytest.raises(ParameterError, match="train_on=train_dev leaves no dev to rank points by"):
        tiny_sweep(["train_on=train_dev", "keep_checkpoint=last"])
    with pytest.raises(ParameterError, match="run_id=x: the sweep sets that"):
        tiny_sweep(["run_id=x"])
    with pytest.raises(
        ParameterError, match=r"no such sweep file\. Did you mean 'parameters/sweep/lora_ner_span\.yaml'"
    ):
        read_sweep("parameters/sweep/lora_ner_spam.yaml")
