"""The watch metric: read in one forward pass, the same packed and padded, and named with the run."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from transformers import EvalPrediction

from benchmarks import watch_metric
from benchmarks.common import read_log
from biomerge_lib.core.parameters import watch_metric_of
from biomerge_lib.core.records import write_records
from biomerge_lib.experiment.recorded import load_run_parameters
from biomerge_lib.experiment.runs import Run, prepare_run_folder
from biomerge_lib.model.backbones import build_tokenizer
from biomerge_lib.prompts.prompt import IGNORE, encode
from biomerge_lib.training.batches import rows_of
from biomerge_lib.training.launch import train_run
from biomerge_lib.training.run import build_model, build_trainer


@pytest.fixture
def make_trainer(tiny_prepared, tokenizer, sample_records, tiny_parameters, tmp_path):
    def make(**overrides):
        parameters = tiny_parameters(**{"backend": "peft", "per_device_eval_batch_size": 4} | overrides)
        records = {"train": sample_records["train"][:4], "dev": sample_records["train"][:6]}
        model = build_model(parameters, tiny_prepared)
        return build_trainer(model, tokenizer, records, parameters, checkpoints=tmp_path / "checkpoints")

    return make


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_each_sentences_answer_is_read_where_its_gold_stands(make_trainer, tokenizer, packing, head):
    trainer = make_trainer(packing=packing, fast_metrics=head)
    trainer.model.eval()
    rows = []
    for batch in trainer.get_eval_dataloader():
        _, predicted, gold = trainer.prediction_step(trainer.model, batch, False)
        assert len(predicted) == len(gold) == 1 + head
        for said, right in zip(predicted[0], gold[0], strict=True):
            rows.append((right[right != IGNORE].tolist(), said[right != IGNORE].tolist()))
    assert len(rows) == 6
    for (right, said), record in zip(rows, trainer.records["dev"], strict=True):
        ids = encode(record, tokenizer, trainer.parameters.prompt_format)
        assert right == ids.completion_ids
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([ids.prompt_ids + ids.completion_ids])).logits[0]
        assert said == logits.argmax(-1)[len(ids.prompt_ids) - 1 : -1].tolist()


def test_a_training_step_carries_no_answers(make_trainer):
    trainer = make_trainer()
    (batch,) = rows_of(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    assert "answer_ids" not in trainer.model.train()(**batch)
    assert "answer_ids" in trainer.model.eval()(**batch)


@pytest.mark.parametrize(
    "watch_metric, head, watched",
    [("answer", True, 1.0), ("answer", False, 1.0), ("token_head", True, 0.0), ("greedy", True, 0.25)],
)
def test_all_readings_are_logged_and_one_is_watched(make_trainer, monkeypatch, watch_metric, head, watched):
    trainer = make_trainer(watch_metric=watch_metric, fast_metrics=head)
    monkeypatch.setattr(trainer, "score_greedily", lambda split: {"ner_f1": 0.25})
    step = trainer.prediction_step

    def answer_rightly(*arguments, **options):
        loss, predicted, gold = step(*arguments, **options)
        return loss, (gold[0], *(torch.zeros_like(labels) for labels in predicted[1:])), gold

    monkeypatch.setattr(trainer, "prediction_step", answer_rightly)
    metrics = trainer.evaluate()
    assert metrics["eval_answer_ner_f1"] == metrics["eval_answer_ner_recall"] == 1.0
    assert metrics.get("eval_head_ner_f1") == (0.0 if head else None)
    assert metrics["eval_ner_f1"] == watched
    assert trainer.state.log_history[-1]["eval_answer_ner_precision"] == 1.0


def test_rows_of_batches_of_different_lengths_are_scored_together(make_trainer, tokenizer):
    trainer = make_trainer(fast_metrics=False)
    eos, (semicolon, *_) = tokenizer.eos_token_id, sorted(trainer.separator_ids)
    gold = np.array([[7, 8, semicolon, 9, eos], [eos, *[IGNORE] * 4]])
    said = np.array([[7, 8, semicolon, 5, eos], [eos, *[IGNORE] * 4]])
    scores = trainer.score_evaluation(EvalPrediction(predictions=(said,), label_ids=(gold,)))
    assert (scores["answer_ner_f1"], scores["ner_f1"]) == (0.5, 0.5)


def test_a_run_older_than_the_parameter_keeps_what_it_watched(tiny_parameters, tmp_path):
    for fast_metrics, watched in ((True, "token_head"), (False, "greedy")):
        stored = tiny_parameters(fast_metrics=fast_metrics).model_dump()
        del stored["watch_metric"]
        assert watch_metric_of(stored) == watched
        (tmp_path / "parameters.yaml").write_text(yaml.safe_dump(stored))
        assert load_run_parameters(tmp_path).watch_metric == watched
    assert watch_metric_of({"watch_metric": "answer", "fast_metrics": True}) == "answer"
    assert (
        tiny_parameters(run_id=None).run_name != tiny_parameters(run_id=None, watch_metric="greedy").run_name
    )


@pytest.mark.integration
@pytest.mark.parametrize("watched", ["answer", "greedy"])
def test_checkpoints_are_compared_by_every_metric(
    watched, tiny_backbone, tiny_parameters, sample_records, tmp_path, monkeypatch
):
    build_tokenizer(str(tiny_backbone), tmp_path / "tok")
    short = [record for record in sample_records["train"] if len(record.text) < 90 and record.spans]
    for split, chosen in (("train", short[:8]), ("dev", short[8:14])):
        write_records(tmp_path / f"data/{split}.jsonl", chosen)
    places = {"tokenizer_dir": "tok", "backbones_dir": "backbones", "data_dir": "data"}
    parameters = tiny_parameters(
        backbone=str(tiny_backbone),
        **{name: str(tmp_path / place) for name, place in places.items()},
        eval_steps=1,
        save_steps=1,
        save_total_limit=9,
        watch_metric=watched,
    )
    prepare_run_folder(Run(parameters.run_folder, "03_train", parameters))
    metrics = train_run(parameters.run_folder, parameters)
    assert metrics["watch_metric"] == watched
    assert {"eval_ner_f1", "eval_answer_ner_f1", "eval_head_ner_f1", "greedy_dev_ner_f1"} <= metrics.keys()
    out = tmp_path / "watch_metric.json"
    command = ["watch_metric", str(parameters.run_folder), "--sample", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    watch_metric.main()
    report = json.loads(out.read_text())
    assert [(row["step"], row["records"], row["sample"]) for row in report["rows"]] == [(1, 6, 3), (2, 6, 3)]
    assert [found["rows"] for found in report["correlations"]] == ["tiny", "all of echo_start", "all"]
    assert all((row["forward_seconds"] is None) == (watched == "greedy") for row in report["rows"])
    assert {choice["metric"] for choice in report["choices"]} == set(watch_metric.WATCHED)
    assert report["commit"] and report["device"] and report["versions"]["torch"]
    [logged, *_] = [
        e["greedy_dev_ner_f1"] for e in read_log(parameters.run_folder) if "greedy_dev_ner_f1" in e
    ]
    assert report["rows"][-1]["greedy_f1"] == pytest.approx(logged)
    monkeypatch.setattr(watch_metric, "score_checkpoint", None)  # a second call decodes nothing
    watch_metric.main()
    assert json.loads(out.read_text())["rows"] == report["rows"]


def test_rank_correlation_and_choices_by_hand():
    rows = [
        {
            "run": run,
            "offset_anchors": "start",
            "step": step,
            "answer_f1": a,
            "head_f1": h,
            "sample_f1": s,
            "greedy_f1": g,
        }
        for run, step, a, h, s, g in (
            ("a", 1, 0.1, 0.4, 0.2, 0.15),
            ("a", 2, 0.2, 0.3, 0.1, 0.25),
            ("a", 3, 0.3, 0.2, 0.3, 0.35),
            ("a", 4, 0.4, 0.1, 0.4, 0.45),
        )
    ]
    found = watch_metric.correlate(rows)
    assert [row["rows"] for row in found] == ["a", "all of start", "all"]
    assert [found[0][name] for name in watch_metric.WATCHED] == pytest.approx([1.0, -1.0, 0.8, 1.0])
    kept = {choice["metric"]: (choice["step"], choice["greedy_f1"]) for choice in watch_metric.choose(rows)}
    assert kept["head_f1"] == (1, 0.15) and kept["answer_f1"] == kept["greedy_f1"] == (4, 0.45)
