"""With trainable=all every weight trains, and all that follows a training works as it does with LoRA."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from biomerge_lib.__main__ import main
from biomerge_lib.core.errors import ModelError, ParameterError
from biomerge_lib.decoding.graphed_decoding import GraphedDecoder
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import build_prompts
from biomerge_lib.experiment.checkpoints import best_checkpoint, find_damage, seal_checkpoint
from biomerge_lib.model.merging import merge_checkpoint
from biomerge_lib.model.packing import PackedCollator
from biomerge_lib.model.unsloth_lora_ner import load_causal_lm
from biomerge_lib.prompts.ner_span import encode_example
from biomerge_lib.training.run import build_model, build_trainer, train
from tests.conftest import ASPIRIN, MANIFEST, START

UP_PROJ = "model.layers.1.mlp.up_proj.weight"
CURVE = ("loss", "eval_loss", "eval_ner_f1", "greedy_dev_ner_f1", "grad_norm", "learning_rate")


@pytest.fixture
def batch(tokenizer):
    """A packed row of the same sentence twice."""
    example = encode_example(ASPIRIN, tokenizer, START)
    return PackedCollator(tokenizer.pad_token_id)([example, example])


@pytest.fixture
def make_trainer(tiny_prepared, tokenizer, sample_records, tiny_parameters, tmp_path):
    """A trainer of 12 steps, with an evaluation and a checkpoint every second one, in a run folder."""
    short = [record for record in sample_records["train"] if len(record.text) < 90 and record.spans]
    records = {"train": short[:12], "dev": short[12:16]}

    def make(name: str, **overrides):
        values = {
            "run_id": name,
            "trainable": "all",
            "learning_rate": 3e-3,
            "eval_steps": 2,
            "save_steps": 2,
            "num_train_epochs": 2.0,
            "per_device_train_batch_size": 2,
            "early_stopping_patience": 100,
        }
        parameters = tiny_parameters(**values | overrides)
        folder = tmp_path / "runs" / name
        model = build_model(parameters, tiny_prepared)
        trainer = build_trainer(model, tokenizer, records, parameters, checkpoints=folder / "checkpoints")
        return trainer, folder

    return make


class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


def curve(folder) -> list[tuple]:
    history = json.loads((folder / "log_history.json").read_text())
    return [(entry["step"], name, entry[name]) for entry in history for name in CURVE if name in entry]


def test_all_weights_begin_at_loras_loss_and_all_of_them_train(tiny_prepared, tiny_parameters, batch):
    losses = {}
    for trainable in ("lora", "all"):
        for head in (True, False):
            chosen = tiny_parameters(trainable=trainable, fast_metrics=head, lora_dropout=0.0)
            model = build_model(chosen, tiny_prepared)
            losses[trainable, head] = model(**batch)["lm_loss" if head else "loss"].item()
    assert losses["all", True] == losses["all", False] == pytest.approx(losses["lora", True], abs=1e-5)
    assert losses["lora", True] == losses["lora", False] > 1

    model = build_model(tiny_parameters(trainable="all"), tiny_prepared)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = model(**batch)["loss"]
    first.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == before.keys() and UP_PROJ in moved and "token_head.weight" in moved
    assert model(**batch)["loss"] < first


@pytest.mark.integration
def test_a_stopped_training_resumes_to_the_same_weights_and_is_kept_as_one_model(
    make_trainer, tiny_prepared, tokenizer, tmp_path, capsys
):
    trainer, whole = make_trainer("whole")
    metrics = train(trainer, whole)
    assert metrics["steps"] == 12 and metrics["trainable_parameters"] == trainer.model.num_parameters()

    trainer, stopped = make_trainer("stopped")
    trainer.add_callback(Die())
    with pytest.raises(KeyboardInterrupt):
        train(trainer, stopped)
    trainer, stopped = make_trainer("stopped")
    assert train(trainer, stopped)["best_checkpoint"] == metrics["best_checkpoint"]
    assert "checkpoint-6" in capsys.readouterr().out
    assert curve(stopped) == curve(whole)
    last = [load_file(run / "checkpoints/checkpoint-12/model.safetensors") for run in (whole, stopped)]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    assert not torch.equal(
        last[0][UP_PROJ], load_causal_lm(tiny_prepared, dtype="float32").state_dict()[UP_PROJ]
    )

    best = best_checkpoint(whole, metrics)
    prompts = build_prompts(trainer.records["dev"], tokenizer, START)
    merging = {"manifest": MANIFEST, "probe_ids": prompts[0].prompt_ids}
    check = merge_checkpoint(tiny_prepared, best, tmp_path / "merged", dtype="float32", **merging)
    assert check.max_logit_difference == 0 and check.same_answer
    answers = [
        [
            answer.text
            for answer in greedy_decode(
                load_causal_lm(folder, dtype="float32"), tokenizer, prompts, max_new_tokens=16, batch_size=4
            )
        ]
        for folder in (best, tmp_path / "merged")
    ]
    assert answers[0] == answers[1] and any(answers[0])
    kept = load_file(tmp_path / "merged/model.safetensors")
    assert not any("token_head" in name for name in kept) and torch.equal(
        kept[UP_PROJ], load_file(best / "model.safetensors")[UP_PROJ]
    )
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "biomerge_packed" not in str(config)
    rounded = merge_checkpoint(tiny_prepared, best, tmp_path / "rounded", dtype="bfloat16", **merging)
    assert 0 < rounded.relative_change < 0.2


def test_a_merge_that_loses_the_training_is_refused(make_trainer, tiny_prepared, tmp_path, monkeypatch):
    trainer, _ = make_trainer("lost")
    torch.nn.init.normal_(trainer.model.model.layers[0].mlp.up_proj.weight)
    trainer.save_model(tmp_path / "checkpoint")
    untrained = load_causal_lm(tiny_prepared, dtype="float32")

    def lose(model, target):
        return untrained if isinstance(target, torch.dtype) else model

    monkeypatch.setattr("transformers.PreTrainedModel.to", lose)
    with pytest.raises(ModelError, match="changed what the model says"):
        merge_checkpoint(
            tiny_prepared,
            tmp_path / "checkpoint",
            tmp_path / "out",
            dtype="float32",
            manifest=MANIFEST,
            probe_ids=[1, 2, 3],
        )


def test_bfloat16_is_computed_with_float32_weights(tiny_prepared, tiny_parameters, batch, monkeypatch):
    model = build_model(tiny_parameters(trainable="all", dtype="bfloat16"), tiny_prepared)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    attend = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def watch(query, key, value, **kwargs):
        seen.append((query.dtype, key.dtype, value.dtype))
        return attend(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    exact = model(**batch)["loss"]
    assert set(seen) == {(torch.float32,) * 3}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)["loss"]
        ids = batch["input_ids"][:, :20]
        decoder = GraphedDecoder(model.eval(), eos_token_id=-1)
        written, _ = decoder.decode(ids, torch.ones_like(ids), max_new_tokens=3)
    assert set(seen) == {(torch.bfloat16,) * 3}
    assert written.shape == (1, 3) and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2) and loss != exact


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_clipping_and_dropping_gradients_reach_every_trained_weight(make_trainer, trainable):
    trainer, _ = make_trainer("gradients", trainable=trainable)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    weights = sum(parameter.numel() for parameter in trained)
    assert float(trainer._clip_grad_norm(trainer.model)) == pytest.approx(weights**0.5)
    squares = sum(float(parameter.grad.square().sum()) for parameter in trained)
    assert squares == pytest.approx(trainer.args.max_grad_norm**2, rel=1e-4)
    trainer.model.zero_grad()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_step_launch_compiles_every_decoder_layer(make_trainer, trainable):
    trainer, _ = make_trainer("compiled", trainable=trainable, step_launch="compiled")
    decoder = [module for module in trainer.model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    assert trainer.launch == "compiled" and len(decoder) == 2
    assert all(layer._compiled_call_impl is not None for layer in decoder)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"backend": "unsloth"}, "trainable=all needs backend=peft"),
        (
            {"deepspeed": "parameters/deepspeed/zero2_offload.json"},
            "trainable=all does not go with deepspeed",
        ),
    ],
)
def test_what_does_not_go_with_all_weights_is_refused(tiny_parameters, changes, named):
    with pytest.raises(ParameterError, match=named):
        tiny_parameters(trainable="all", **changes)


def test_there_is_no_adapter_to_export(tiny_parameters, tmp_path, capsys):
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    (folder / "parameters.yaml").write_text(yaml.safe_dump(tiny_parameters(trainable="all").model_dump()))
    (folder / "metrics.json").write_text(json.dumps({"stages": {"03_train": {"status": "finished"}}}))
    assert main(["export-adapter", str(folder), str(tmp_path / "mine")]) == 2
    assert "there is no adapter. Share" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.mark.integration
def test_a_checkpoint_of_other_weights_is_refused(make_trainer, tiny_prepared, tmp_path):
    trainer, folder = make_trainer("moved", watch_metric="token_head")
    trainer.add_callback(Die())
    with pytest.raises(KeyboardInterrupt):
        train(trainer, folder)
    checkpoint = folder / "checkpoints/checkpoint-6"
    assert find_damage(checkpoint) is None
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors is missing" in find_damage(checkpoint)
    note = folder / "checkpoints/checkpoint-4/backbone.json"
    note.write_text(json.dumps({"sha256": "0"}))
    seal_checkpoint(note.parent)
    trainer, _ = make_trainer("moved", watch_metric="token_head")
    with pytest.raises(ModelError, match=r"checkpoint-4 was trained on another backbone: .*other weights"):
        train(trainer, folder)
