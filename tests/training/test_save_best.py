"""Three evaluations with rising F1 leave only the highest checkpoint; then training goes on and can be resumed."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerState

from biomerge_lib.core.errors import DataError, ModelError
from biomerge_lib.core.records import Record, write_records
from biomerge_lib.experiment.provenance import TEST_LOG
from biomerge_lib.model.backbones import backbone_sha256
from biomerge_lib.prompts.ner_span import read_training_splits
from biomerge_lib.training.launch import train_run
from biomerge_lib.training.outcome import explain_early_stop, explain_gap
from biomerge_lib.training.run import build_model, build_trainer, train
from biomerge_lib.training.trainer import NerTrainer

pytestmark = pytest.mark.integration


@pytest.fixture
def make_trainer(tiny_prepared, tokenizer, sample_records, tiny_parameters, tmp_path):
    def make(records=None, **overrides):
        values = {
            "eval_steps": 2,
            "save_steps": 2,
            "save_total_limit": 1,
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": 2,
            "backend": "peft",
        }
        parameters = tiny_parameters(**values | overrides)
        model = build_model(parameters, tiny_prepared)
        short = [record for record in sample_records["train"] if len(record.text) < 90 and record.spans]
        records = records or {"train": short[:12], "dev": short[12:16]}
        return build_trainer(
            model, tokenizer, records, parameters, checkpoints=tmp_path / "runs/tiny/checkpoints"
        )

    return make


def test_tokenised_data_are_kept_for_the_next_start(make_trainer, tmp_path):
    first = make_trainer()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "token_cache").iterdir()}
    second = make_trainer()
    assert len(kept) == 2
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "token_cache").iterdir()}
    assert list(first.train_dataset) == list(second.train_dataset) and len(first.train_dataset) == 12


def test_only_the_best_checkpoint_remains(make_trainer, monkeypatch):
    scores = iter([0.1, 0.2, 0.3])

    def rising(self, *args, metric_key_prefix="eval", **kwargs):
        metrics = {f"{metric_key_prefix}_ner_f1": next(scores)}
        self.log(metrics)
        return metrics

    monkeypatch.setattr(NerTrainer, "evaluate", rising)
    monkeypatch.setattr(NerTrainer, "evaluate_greedily", lambda trainer, checkpoint=None: {})
    trainer = make_trainer()
    trainer.train()
    kept = [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")]
    assert kept == ["checkpoint-6"]
    assert trainer.state.best_metric == 0.3
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")


def test_the_best_checkpoint_stays_when_later_ones_are_worse(make_trainer, monkeypatch):
    scores = iter([0.3, 0.2, 0.1])
    weights = {}

    def falling(self, *args, metric_key_prefix="eval", **kwargs):
        step = self.state.global_step
        weights[step] = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        metrics = {f"{metric_key_prefix}_ner_f1": next(scores)}
        self.log(metrics)
        return metrics

    monkeypatch.setattr(NerTrainer, "evaluate", falling)
    monkeypatch.setattr(NerTrainer, "evaluate_greedily", lambda trainer, checkpoint=None: {})
    trainer = make_trainer()
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, weights[2][name], msg=name)


@pytest.mark.parametrize("best", [0, 1])
def test_dev_is_decoded_once_with_the_same_weights(make_trainer, monkeypatch, tmp_path, best):
    watched = iter([0.3 if number == best else 0.1 for number in range(2)])
    decoded = []

    def evaluate(self, *args, metric_key_prefix="eval", **kwargs):
        self.log(metrics := {f"{metric_key_prefix}_ner_f1": next(watched)})
        return metrics

    def score_greedily(self, split):
        decoded.append(self.state.global_step)
        return {"ner_f1": self.state.global_step / 100}

    monkeypatch.setattr(NerTrainer, "evaluate", evaluate)
    monkeypatch.setattr(NerTrainer, "score_greedily", score_greedily)
    trainer = make_trainer(num_train_epochs=2.0, eval_steps=100, save_steps=100)
    metrics = train(trainer, tmp_path / "runs/tiny")
    ends = [6, 12]
    assert decoded == ends and metrics["best_checkpoint"] == f"checkpoint-{ends[best]}"
    assert metrics["greedy_dev_ner_f1"] == ends[best] / 100
    logged = [e["greedy_dev_ner_f1"] for e in trainer.state.log_history if "greedy_dev_ner_f1" in e]
    assert logged == ([0.06, 0.12, 0.06] if best == 0 else [0.06, 0.12])  # the kept one is what was said last


def test_the_last_checkpoint_is_kept_however_dev_falls(make_trainer, monkeypatch, tmp_path):
    scores = iter([0.3, 0.2, 0.1])

    def falling(self, *args, metric_key_prefix="eval", **kwargs):
        metrics = {f"{metric_key_prefix}_ner_f1": next(scores)}
        self.log(metrics)
        return metrics

    monkeypatch.setattr(NerTrainer, "evaluate", falling)
    trainer = make_trainer(keep_checkpoint="last", early_stopping_patience=1)
    metrics = train(trainer, tmp_path / "runs/tiny")
    assert (metrics["best_checkpoint"], metrics["eval_ner_f1"]) == ("checkpoint-6", 0.1)
    assert metrics["steps"] == 6 and not metrics["stopped_early"]
    saved = load_file(tmp_path / "runs/tiny/checkpoints/checkpoint-6/adapter_model.safetensors")
    own = get_peft_model_state_dict(trainer.model)
    torch.testing.assert_close(own, {name: saved[name] for name in own})


def test_what_is_trained_on_dev_too_is_not_evaluated_and_scores_test_once(
    make_trainer, monkeypatch, sample_records, tmp_path
):
    monkeypatch.setattr(NerTrainer, "evaluate", None)
    records = {"train": sample_records["train"][:12], "test": sample_records["test"][:2]}
    protocol = {"train_on": "train_dev", "keep_checkpoint": "last", "run_test_eval": True}
    metrics = train(make_trainer(records, **protocol), tmp_path / "runs/tiny")
    assert metrics["best_checkpoint"] == "checkpoint-6" and "test_ner_f1" in metrics
    assert not [name for name in metrics if name.startswith(("eval_", "greedy_dev"))]
    assert explain_gap(metrics) == "dev was trained on: there is nothing to compare."
    [line] = (tmp_path / "runs/tiny" / TEST_LOG).read_text().splitlines()
    assert json.loads(line)["by"] == "03_train"


def test_dev_is_trained_on_but_for_the_sentences_that_test_has(tiny_parameters, tmp_path):
    texts = {"train": ["Aspirin helps"], "dev": ["Codeine helps", "Results :"], "test": ["results:"]}
    for split, found in texts.items():
        records = [Record(text, ((0, 7),), f"{split}{text}", "a") for text in found]
        write_records(tmp_path / f"{split}.jsonl", records)
    protocol = {"data_dir": str(tmp_path), "train_on": "train_dev", "keep_checkpoint": "last"}
    splits = read_training_splits(tiny_parameters(**protocol))
    assert [record.text for record in splits.pop("train")] == ["Aspirin helps", "Codeine helps"]
    assert not splits
    assert list(read_training_splits(tiny_parameters(**protocol, run_test_eval=True))) == ["train", "test"]


def test_a_full_disk_stops_the_run_and_the_next_start_goes_on(make_trainer, monkeypatch, tmp_path, capsys):
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ModelError, match=r"no space for a checkpoint at step 4 .*save_total_limit"):
        train(make_trainer(), tmp_path / "runs/tiny")
    monkeypatch.undo()
    metrics = train(make_trainer(), tmp_path / "runs/tiny")
    assert "going on from" in (printed := capsys.readouterr().out) and "checkpoint-2" in printed
    assert metrics["steps"] == 6


def test_out_of_memory_says_what_to_lower(make_trainer, monkeypatch, tmp_path):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(NerTrainer, "training_step", full)
    with pytest.raises(ModelError, match=r"step 0: lower row_tokens \(here 2048;.*Tried to allocate"):
        train(make_trainer(), tmp_path / "runs/tiny")


def test_the_last_loss_is_logged_however_seldom_losses_are(make_trainer, tmp_path):
    metrics = train(make_trainer(logging_steps=50), tmp_path / "runs/tiny")
    history = json.loads((tmp_path / "runs/tiny/log_history.json").read_text())
    assert [(entry["step"], entry["loss"]) for entry in history if "loss" in entry] == [
        (6, metrics["train_loss"])
    ]


def test_training_writes_metrics_and_a_finished_run_is_not_trained_again(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    metrics = train(trainer, tmp_path / "runs/tiny")
    assert metrics["steps"] == 6 and metrics["best_checkpoint"].startswith("checkpoint-")
    assert {"eval_ner_f1", "greedy_dev_ner_f1", "train_tokens_per_second"} <= metrics.keys()
    history = json.loads((tmp_path / "runs/tiny/log_history.json").read_text())
    assert [entry["step"] for entry in history if "eval_ner_f1" in entry] == [2, 4, 6]
    # Once at the epoch's end; once more when the best checkpoint is an earlier one.
    passes = 1 if metrics["best_checkpoint"] == "checkpoint-6" else 2
    assert [entry["step"] for entry in history if "greedy_dev_ner_f1" in entry] == [6] * passes
    monkeypatch.setattr("biomerge_lib.training.launch.prepare_backbone", None)  # what a training begins with
    assert train_run(tmp_path / "runs/tiny", trainer.parameters) == metrics


def test_a_checkpoint_is_an_adapter_not_a_copy_of_the_backbone(make_trainer, tiny_prepared, tmp_path):
    trainer = make_trainer()
    trainer.train()
    from safetensors import safe_open

    [checkpoint] = (tmp_path / "runs/tiny/checkpoints").glob("checkpoint-*")
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
    assert any("lora_A" in name for name in names) and any("token_head" in name for name in names)
    assert not any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in names)
    assert json.loads((checkpoint / "backbone.json").read_text()) == {
        "sha256": backbone_sha256(tiny_prepared)
    }
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 200_000


def test_a_loss_that_is_not_finite_stops_and_saves_the_batch(make_trainer, tmp_path):
    trainer = make_trainer()
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ModelError, match=r"bad_batch_step0\.pt"):
        trainer.train()
    saved = torch.load(tmp_path / "runs/tiny/checkpoints/bad_batch_step0.pt")
    assert {"input_ids", "labels"} <= saved.keys()


def test_an_empty_dev_and_one_without_an_entity_are_refused(make_trainer, sample_records):
    without = [record for record in sample_records["train"] if not record.spans][:3]
    for dev in (without, []):
        with pytest.raises(DataError, match="no entity"):
            make_trainer(records={"train": sample_records["train"][:4], "dev": dev})


def test_a_training_without_improvement_says_why_it_ended(tiny_parameters):
    state = TrainerState(
        global_step=2000, max_steps=3000, best_metric=0.71234, best_model_checkpoint="runs/x/checkpoint-500"
    )
    said = explain_early_stop(tiny_parameters(), state)
    assert said.startswith(
        "stopped early at step 2000 of 3000: 3 evaluations without a gain of 0.001 over eval_ner_f1"
    )
    assert "0.712 (checkpoint-500)" in said


def test_a_gap_between_fast_and_greedy_is_explained():
    metrics = {
        "watch_metric": "answer",
        "eval_ner_f1": 0.8,
        "greedy_dev_ner_f1": 0.795,
        "greedy_dev_ner_f1_snapped": 0.8,
    }
    rates = ("unreadable_rate", "truncated_rate", "out_of_text_rate", "unsorted_rate")
    metrics |= {f"greedy_dev_{name}": 0.0 for name in rates}
    assert "agree within 0.01" in explain_gap(metrics)
    nothing = metrics | {"eval_ner_f1": 0.0, "greedy_dev_ner_f1": 0.0}
    assert "neither reading finds a mention" in explain_gap(nothing)
    cut = metrics | {"greedy_dev_ner_f1": 0.5, "greedy_dev_truncated_rate": 0.25}
    assert "max_new_tokens (no EOS): 25.0% of sentences" in explain_gap(cut)
