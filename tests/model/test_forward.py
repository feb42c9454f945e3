"""Forward passes: finite losses that mean what they say, and that fall."""

import pytest
import torch
import torch.nn.functional as F

from biomerge_lib.core.records import Record
from biomerge_lib.model.unsloth_lora_ner import LINEAR_LAYERS, load_lora_model
from biomerge_lib.prompts.ner_span import SpanCollator, encode_example
from biomerge_lib.prompts.prompt import IGNORE
from biomerge_lib.prompts.tokenizer import ADDED_TOKENS
from tests.conftest import ASPIRIN, START

OPTIONS = {
    "backend": "peft",
    "dtype": "float32",
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "head_loss_weight": 1.0,
    "gradient_checkpointing": False,
    "max_length": 256,
    "seed": 1,
}


@pytest.fixture
def batch(tokenizer):
    records = [
        ASPIRIN,
        Record("Nausea and TNF-α .", ((0, 6), (11, 16)), "d", "x"),
        Record("None .", (), "d", "x"),
    ]
    examples = [encode_example(r, tokenizer, START) for r in records]
    return SpanCollator(tokenizer.pad_token_id)(examples)


def test_the_loss_is_finite_and_falls_after_one_step(tiny_prepared, batch):
    model = load_lora_model(tiny_prepared, token_head=True, **OPTIONS)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before = model(**batch)["loss"]
    assert torch.isfinite(before)
    before.backward()
    optimizer.step()
    assert model(**batch)["loss"] < before


def test_the_lm_loss_is_the_models_own_on_the_target_tokens(tiny_prepared, batch):
    model = load_lora_model(tiny_prepared, token_head=False, **OPTIONS).eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORE
    )
    torch.testing.assert_close(model(**batch)["loss"], expected)


def test_the_token_head_adds_its_weighted_cross_entropy(tiny_prepared, batch):
    model = load_lora_model(tiny_prepared, token_head=True, **OPTIONS | {"head_loss_weight": 0.5}).eval()
    output = model(**batch)
    labels = batch["token_labels"]
    expected = F.cross_entropy(output["token_logits"].reshape(-1, 3), labels.reshape(-1), ignore_index=IGNORE)
    torch.testing.assert_close(output["head_loss"], expected)
    torch.testing.assert_close(output["loss"], output["lm_loss"] + 0.5 * expected)


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_accumulated(tiny_prepared, batch):
    model = load_lora_model(tiny_prepared, token_head=True, **OPTIONS).eval()
    counts = {
        "num_items_in_batch": (batch["labels"][:, 1:] != IGNORE).sum(),
        "num_words_in_batch": (batch["token_labels"] != IGNORE).sum(),
    }
    whole = model(**batch, **counts)["loss"]
    parts = [model(**{name: t[i : i + 1] for name, t in batch.items()}, **counts)["loss"] for i in range(3)]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(model(**batch)["loss"], whole)


def test_what_is_trained_is_lora_the_five_rows_and_the_head(tiny_prepared, tokenizer):
    model = load_lora_model(tiny_prepared, token_head=True, **OPTIONS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if ".lora_" in name}
    llama = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert layers == set(LINEAR_LAYERS) == llama == model.peft_config["default"].target_modules
    assert sum(".lora_A" in name for name in trained) == 2 * len(LINEAR_LAYERS)
    rest = {name: p for name, p in trained.items() if ".lora_" not in name}
    rows = [p for name, p in rest.items() if "trainable_tokens" in name]
    head = [p for name, p in rest.items() if "token_head" in name]
    assert {tuple(p.shape) for p in rows} == {(len(ADDED_TOKENS), 64)}
    assert sorted(tuple(p.shape) for p in head) == [(3,), (3, 64)]
    assert len(rest) == len(rows) + len(head)


def test_without_fast_metrics_there_is_no_head(tiny_prepared, batch):
    model = load_lora_model(tiny_prepared, token_head=False, **OPTIONS)
    assert not any("token_head" in name for name, _ in model.named_parameters())
    assert "token_logits" not in model(**batch)
