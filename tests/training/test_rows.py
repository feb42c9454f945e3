"""An optimiser step is so many sentences, however they are cut into rows: the same losses, gradients and weights."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from biomerge_lib.core.errors import ModelError
from biomerge_lib.model.packing import PackedCollator, RowCollator, plan_rows
from biomerge_lib.training.batches import choose_rows
from biomerge_lib.training.run import build_model, build_trainer
from biomerge_lib.training.trainer_callbacks import SteadySpeed


@pytest.fixture
def train_steps(tiny_prepared, tokenizer, sample_records, tiny_parameters, tmp_path):
    """Losses, gradients' norms and trained weights of an epoch of 14 sentences in steps of 6: the last one has two."""

    def make(name, **changes):
        parameters = tiny_parameters(
            **{
                "backend": "peft",
                "lora_dropout": 0.0,
                "group_by_length": False,
                "eval_steps": 100,
                "save_steps": 100,
                "logging_steps": 1,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 3,
            }
            | changes
        )
        short = [record for record in sample_records["train"] if len(record.text) < 90 and record.spans]
        trainer = build_trainer(
            build_model(parameters, tiny_prepared),
            tokenizer,
            {"train": short[:14], "dev": short[14:16]},
            parameters,
            checkpoints=tmp_path / name / "checkpoints",
        )
        passes = []
        run = trainer._run_pass
        trainer._run_pass = lambda model, batch: passes.append(1) or run(model, batch)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        return [e["loss"] for e in logged], [e["grad_norm"] for e in logged], weights, len(passes)

    return make


@pytest.mark.integration
def test_rows_of_any_size_train_what_padded_parts_train(train_steps):
    losses, norms, weights, passes = train_steps("padded", packing=False)
    assert len(losses) == 3 and passes == 3 + 3 + 1
    for name, changes, rows in (("one row", {}, 3), ("short rows", {"row_tokens": 256}, None)):
        of_rows = train_steps(name, **changes)
        assert of_rows[0] == pytest.approx(losses, rel=1e-5), name
        assert of_rows[1] == pytest.approx(norms, rel=1e-4), name
        for weight, trained in of_rows[2].items():
            torch.testing.assert_close(trained, weights[weight], rtol=1e-3, atol=1e-5)
        assert of_rows[3] == rows if rows else of_rows[3] > 3


def test_a_row_is_filled_while_it_has_room_and_keeps_the_order():
    examples = [
        {"input_ids": [n] * n, "labels": [-100] * n, "token_labels": [-100] * n} for n in (3, 4, 9, 2, 1)
    ]
    rows = RowCollator(PackedCollator(0), row_tokens=7)(examples)["rows"]
    assert [row["lengths"].tolist() for row in rows] == [[3, 4], [9], [2, 1]]
    assert rows[2]["input_ids"].tolist() == [[2, 2, 1]]


LLAMA_8B = SimpleNamespace(
    num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, vocab_size=128_320, model_type="llama"
)


@pytest.mark.parametrize(
    "free_gb, compiled, fused, checkpointing, plan",
    [
        (31, True, False, True, (4250, 18)),  # an A100 of 48 GB: 14 of 32 layers recompute
        (31, True, True, True, (4250, 28)),  # fused LoRA keeps less: four of them
        (110, True, False, True, (4250, 32)),  # an H200: none does
        (110, True, False, False, (4250, 32)),
        (110, False, False, False, (4250, 32)),
        (31, True, False, False, (2749, 32)),  # too little for a step without recomputation: two rows
        (3, True, False, True, (2315, 0)),
    ],
)
def test_rows_and_recomputation_are_planned_by_the_free_memory(free_gb, compiled, fused, checkpointing, plan):
    found = plan_rows(
        LLAMA_8B,
        free_bytes=free_gb * 1e9,
        width=2,
        compiled=compiled,
        fused=fused,
        gradient_checkpointing=checkpointing,
        step_tokens=4250,
    )
    assert found == plan


def test_a_card_too_small_for_one_row_is_refused_before_training(monkeypatch, tiny_parameters):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("biomerge_lib.training.batches.free_gpu_bytes", lambda: 3e9)
    model = SimpleNamespace(config=LLAMA_8B, num_parameters=lambda only_trainable: 0, modules=list)
    options = {"dtype": "bfloat16", "row_tokens": "auto"}
    with pytest.raises(
        ModelError, match=r"about 266 tokens, .* has 400. Set gradient_checkpointing=true, or lower"
    ):
        choose_rows(tiny_parameters(**options), model, "compiled", [400])
    assert choose_rows(tiny_parameters(**options, gradient_checkpointing=True), model, "compiled", [400]) == (
        1600,
        31,
    )
    assert choose_rows(tiny_parameters(row_tokens=64), model, "eager", [400]) == (64, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_rows(tiny_parameters(gradient_checkpointing=True), model, "eager", [400]) == (2048, 32)


def test_every_module_trains_in_each_step_also_behind_an_evaluation(
    tiny_prepared, tokenizer, sample_records, tiny_parameters, tmp_path
):
    parameters = tiny_parameters(eval_steps=1, save_steps=1, backend="peft")
    short = [record for record in sample_records["train"] if len(record.text) < 90 and record.spans]
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(all(module.training for module in kwargs["model"].modules()))

    trainer = build_trainer(
        build_model(parameters, tiny_prepared),
        tokenizer,
        {"train": short[:12], "dev": short[12:14]},
        parameters,
        checkpoints=tmp_path / "checkpoints",
    )
    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [True] * 3


def test_steady_speed_leaves_out_what_is_no_step(monkeypatch):
    speed = SteadySpeed(lambda: (torch.tensor(tokens), compiled))
    clock, tokens, compiled = 0.0, 0, 0
    monkeypatch.setattr("biomerge_lib.training.trainer_callbacks.time.monotonic", lambda: clock)
    for step in range(20):
        clock, tokens = clock + 2.0, tokens + 100
        if step == 8:
            clock, compiled = clock + 60, 1  # a compilation within a step
        if step == 12:
            speed.on_evaluate(None, None, None)
            clock += 30
        speed.on_step_end(None, None, None)
    # 19 intervals between 20 ends, less the compiled and the evaluated one and five to warm up.
    assert speed.read() == {
        "steady_tokens_per_second": 50.0,
        "steady_step_ms": 2000.0,
        "steady_steps": 12,
    }
    assert SteadySpeed(speed.count).read() == {}
