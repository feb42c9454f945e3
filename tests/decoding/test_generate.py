"""Greedy decoding gives proper tag strings, whatever the batch."""

import re
from dataclasses import replace

import pytest
import torch

from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import format_spans, parse_spans
from biomerge_lib.decoding.graphed_decoding import GraphedDecoder, can_graph
from biomerge_lib.decoding.greedy import decoding_mode, greedy_decode, read_answer
from biomerge_lib.decoding.predictions import build_prompts, collect_predictions
from biomerge_lib.model.unsloth_lora_ner import load_lora_model
from biomerge_lib.prompts.ner_span import SpanCollator, encode_example
from tests.conftest import START

RECORDS = [
    Record("Aspirin can trigger asthma attacks .", ((0, 7), (20, 34)), "d1", "x", types=("Drug", "Sign")),
    Record("Nausea followed .", ((0, 6),), "d2", "x"),
    Record("Nothing was found .", (), "d3", "x"),
]
PROMPTS = replace(START, max_input_tokens=200)


@pytest.fixture(scope="module")
def trained(tiny_prepared, tokenizer):
    """The tiny model, all of its weights trained until it knows three sentences by heart (some seconds)."""
    model = load_lora_model(
        tiny_prepared,
        backend="peft",
        dtype="float32",
        lora_rank=8,
        lora_alpha=16,
        lora_dropout=0.0,
        token_head=True,
        head_loss_weight=0.1,
        gradient_checkpointing=False,
        max_length=256,
        seed=1,
    )
    batch = SpanCollator(tokenizer.pad_token_id)([encode_example(r, tokenizer, START) for r in RECORDS])
    model.requires_grad_(True)  # LoRA alone cannot move a random backbone far enough
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_trained_model_writes_its_sentences_spans(trained, tokenizer, batch_size):
    prompts = build_prompts(RECORDS, tokenizer, PROMPTS)
    answers = greedy_decode(
        trained, tokenizer, prompts, max_new_tokens=40, batch_size=batch_size, progress=None
    )
    assert [answer.finish for answer in answers] == ["eos"] * 3
    assert [f"<TAG>{answer.text}" for answer in answers] == ["<TAG> 0-7 ; 20-34", "<TAG> 0-6", "<TAG>"]
    predictions = collect_predictions(RECORDS, prompts, answers)
    assert [format_spans(p.pred) for p in predictions] == [record.target for record in RECORDS]
    assert [parse_spans(record.target) for record in RECORDS] == [p.pred for p in predictions]
    assert [(p.doc_id, p.gold_types) for p in predictions] == [
        ("d1", ["Drug", "Sign"]),
        ("d2", []),
        ("d3", []),
    ]


def test_rate_and_time_left_are_shown_before_the_first_batch_has_ended(
    trained, tokenizer, capsys, monkeypatch
):
    """On a CPU one sentence of middling length goes first; its answer moves the bar."""
    rows = []
    generate = trained.generate
    monkeypatch.setattr(
        trained, "generate", lambda **given: rows.append(len(given["input_ids"])) or generate(**given)
    )
    prompts = build_prompts(RECORDS * 2, tokenizer, PROMPTS)
    answers = greedy_decode(trained, tokenizer, prompts, max_new_tokens=40, batch_size=4)
    assert rows == [1, 4, 1]
    assert [f"<TAG>{answer.text}" for answer in answers] == ["<TAG> 0-7 ; 20-34", "<TAG> 0-6", "<TAG>"] * 2
    shown = capsys.readouterr().err.split("\r")
    assert re.search(r"decoding:  17%.* 1/6 \[00:\d\d<\d\d:\d\d, +[\d.]+\w+/", shown[2])


def test_decoding_leaves_the_model_in_training_mode(trained, tokenizer):
    trained.train()
    prompts = build_prompts(RECORDS[:1], tokenizer, PROMPTS)
    greedy_decode(trained, tokenizer, prompts, max_new_tokens=4, batch_size=1, progress=None)
    assert trained.training


def test_an_answer_without_eos_is_reported_as_cut(trained, tokenizer):
    prompts = build_prompts(RECORDS[:1], tokenizer, PROMPTS)
    [answer] = greedy_decode(trained, tokenizer, prompts, max_new_tokens=3, batch_size=1, progress=None)
    assert answer.finish == "length" and len(answer.token_ids) == 3


def test_the_answer_ends_at_the_first_eos(tokenizer):
    ids = tokenizer(" 0-7", add_special_tokens=False)["input_ids"]
    answer = read_answer([*ids, tokenizer.eos_token_id, tokenizer.eos_token_id, *ids], tokenizer)
    assert (answer.text, answer.finish, answer.token_ids) == (" 0-7", "eos", ids)


def test_chunks_are_answered_apart_and_mapped_back(trained, tokenizer):
    text = " ".join(record.text for record in RECORDS) * 1
    gold = ((0, 7), (20, 34), (37, 43))
    assert [text[start:end] for start, end in gold] == ["Aspirin", "asthma attacks", "Nausea"]
    record = Record(text, gold, "long", "x")
    prompts = build_prompts([record], tokenizer, replace(START, max_input_tokens=60))
    assert len(prompts) > 1
    answers = [read_answer([], tokenizer) for _ in prompts]
    shifted = [
        type(answer)(token_ids=[], text=format_spans(prompt.chunk.record.spans), finish="eos")
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    [prediction] = collect_predictions([record], prompts, shifted)
    assert prediction.pred == sorted(set(gold) & set(prediction.pred)) and len(prediction.finish) == len(
        prompts
    )


def test_a_model_with_deepspeeds_hook_before_it_is_not_captured(trained, monkeypatch):
    """It waits for the GPU, which ends a capture with an error; Unsloth's, for one, does not."""

    def own(*_):
        return None

    def deepspeeds(*_):
        return None

    deepspeeds.__module__ = "deepspeed.runtime.engine"
    monkeypatch.setattr(type(trained), "device", torch.device("cuda"), raising=False)
    assert can_graph(trained)
    hooks = [trained.register_forward_pre_hook(own)]
    assert can_graph(trained)
    hooks.append(trained.register_forward_pre_hook(deepspeeds))
    assert not can_graph(trained)
    for hook in hooks:
        hook.remove()


def test_decoding_with_a_static_cache_writes_what_generate_writes(trained, tokenizer, monkeypatch):
    """As on a GPU, launch by launch: the same cache and attention, used for batch after batch."""
    aspirin, nausea, nothing = RECORDS
    records = [nausea, aspirin, nothing, nausea, nausea, nothing, nausea]
    prompts = build_prompts(records, tokenizer, PROMPTS)
    arguments = {"max_new_tokens": 40, "batch_size": 3, "progress": None}
    expected = greedy_decode(trained, tokenizer, prompts, **arguments)
    monkeypatch.setattr("biomerge_lib.decoding.graphed_decoding.can_graph", lambda model: True)
    monkeypatch.setattr(
        "biomerge_lib.decoding.greedy.SHARE_LEFT", 3
    )  # one of three is left to the next round
    rounds = []
    decode = GraphedDecoder.decode

    def watch(self, input_ids, attention_mask, **options):
        ids, logprobs = decode(self, input_ids, attention_mask, **options)
        rounds.append((len(ids), options["leave"]))
        return ids, logprobs

    monkeypatch.setattr(GraphedDecoder, "decode", watch)
    found = greedy_decode(trained, tokenizer, prompts, **arguments)
    # by length: the long answer stands beside two short ones, is left, and goes on alone
    assert rounds == [(3, 1), (3, 1), (1, 0), (1, 0)]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.finish) == (theirs.token_ids, theirs.finish)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.margins == pytest.approx(theirs.margins, abs=1e-3)
        assert ours.part_logprobs == pytest.approx(theirs.part_logprobs, abs=1e-3)


def test_a_batch_is_left_when_enough_rows_have_ended(trained, tokenizer):
    prompts = build_prompts(RECORDS, tokenizer, PROMPTS)
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    rows = torch.tensor([[0] * (longest - len(p.prompt_ids)) + p.prompt_ids for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p.prompt_ids)) + [1] * len(p.prompt_ids) for p in prompts])
    decoder = GraphedDecoder(trained, eos_token_id=tokenizer.eos_token_id)
    with decoding_mode(trained), torch.inference_mode():
        whole, _ = decoder.decode(rows, mask, max_new_tokens=40)
        left, _ = decoder.decode(rows, mask, max_new_tokens=40, leave=1)
    # looks come at 8 and 16 tokens: the two short answers have ended by the first
    assert (whole.shape, left.shape) == ((3, 16), (3, 8))
    assert (whole[:, :8] == left).all()
