"""Packed rows: the same losses and gradients as padded batches, and no sentence that sees another."""

from dataclasses import replace

import pytest
import torch

from biomerge_lib.core.records import Record
from biomerge_lib.model.packing import PackedCollator, unpack_rows
from biomerge_lib.model.unsloth_lora_ner import load_lora_model
from biomerge_lib.prompts.ner_span import SpanCollator, encode_example
from biomerge_lib.prompts.prompt import IGNORE
from tests.conftest import ASPIRIN, START

OPTIONS = {
    "backend": "peft",
    "dtype": "float32",
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "head_loss_weight": 0.5,
    "token_head": True,
    "max_length": 256,
    "seed": 1,
}
RECORDS = [
    ASPIRIN,
    Record("Nausea and TNF-α .", ((0, 6), (11, 16)), "d", "x"),
    Record("None .", (), "d", "x"),
]


def encode_all(tokenizer, anchors="start"):
    return [encode_example(r, tokenizer, replace(START, offset_anchors=anchors)) for r in RECORDS]


def test_a_packed_row_by_hand():
    examples = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7], "token_labels": [1, IGNORE, IGNORE]},
        {"input_ids": [8, 9], "labels": [IGNORE, 9], "token_labels": [0, IGNORE]},
    ]
    batch = PackedCollator(0, row_multiple=4, target_multiple=2, sentences=3)(examples)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 0, 0, 0]],
        "labels": [[IGNORE, 6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]],
        "token_labels": [[1, IGNORE, IGNORE, 0, IGNORE, IGNORE, IGNORE, IGNORE]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2]],
        "cu_seq_lens": [0, 3, 5, 5, 8],
        "lengths": [3, 2],
        "target_positions": [0, 1, 3, 0],
        "targets": [6, 7, 9, IGNORE],
    }
    assert unpack_rows(batch["token_labels"], batch["lengths"]).tolist() == [
        [1, IGNORE, IGNORE],
        [0, IGNORE, IGNORE],
    ]


@pytest.mark.parametrize(
    "tokens, cu_seq_lens, position_ids",
    [
        (3, [0, 3, 5, 7, 8, 8], [0, 1, 2, 0, 1, 0, 1, 0]),
        (8, [0, 8, 8, 8, 8, 8], [0, 1, 2, 3, 4, 5, 6, 7]),
        (9, [0, 9, 11, 13, 15, 16], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_what_fills_a_row_is_never_longer_than_the_longest_sentence(tokens, cu_seq_lens, position_ids):
    example = {"input_ids": [5] * tokens, "labels": [IGNORE] * tokens, "token_labels": [0] * tokens}
    batch = PackedCollator(0, row_multiple=8, filler_length=2)([example])
    assert batch["cu_seq_lens"].tolist() == cu_seq_lens
    assert batch["position_ids"].tolist() == [position_ids]


@pytest.mark.parametrize("anchors", ["none", "start"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_and_padded_batches_have_the_same_loss_and_gradients(
    tiny_prepared, tokenizer, anchors, checkpointing
):
    examples = encode_all(tokenizer, anchors)
    model = load_lora_model(tiny_prepared, gradient_checkpointing=checkpointing, **OPTIONS)
    randomise_lora_b(model)
    model.train()
    padded = pass_of(model, SpanCollator(tokenizer.pad_token_id)(examples))
    for sizes in ((1, 1, None), (64, 32, 5)):
        packed = pass_of(model, PackedCollator(tokenizer.pad_token_id, *sizes)(examples))
        assert packed[0] == pytest.approx(padded[0], abs=1e-5)
        assert len(packed[1]) == len(padded[1]) > 30
        for name, gradient in padded[1].items():
            assert torch.allclose(packed[1][name], gradient, atol=1e-5), name


def test_what_one_sentence_says_does_not_depend_on_its_neighbours(tiny_prepared, tokenizer):
    model = load_lora_model(tiny_prepared, gradient_checkpointing=False, **OPTIONS).eval()
    examples = encode_all(tokenizer)
    changed = [{**examples[0], "input_ids": [7] * len(examples[0]["input_ids"])}, *examples[1:]]
    with torch.no_grad():
        before, after = (
            model(**PackedCollator(tokenizer.pad_token_id)(rows))["token_logits"][0]
            for rows in (examples, changed)
        )
    first = len(examples[0]["input_ids"])
    assert torch.equal(before[first:], after[first:])
    assert not torch.allclose(before[:first], after[:first])


def test_trained_rows_are_read_in_place_as_peft_reads_them(tiny_prepared, tokenizer):
    model = load_lora_model(tiny_prepared, gradient_checkpointing=False, **OPTIONS).eval()
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.lm_head
    with torch.no_grad():
        for values in embedding.token_adapter.trainable_tokens_delta.values():
            values.normal_()
    ids = torch.tensor([encode_all(tokenizer)[0]["input_ids"]])
    hidden = torch.randn(1, 3, base.config.hidden_size)
    for module, inputs in ((embedding, ids), (head, hidden)):
        own, pefts = module(inputs), type(module).forward(module, inputs)
        assert torch.allclose(own, pefts, atol=1e-6)
        with model.disable_adapter():
            assert not torch.allclose(module(inputs), own)


def randomise_lora_b(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def pass_of(model, batch):
    model.zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
