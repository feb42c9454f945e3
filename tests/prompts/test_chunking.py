"""Texts over the limits are cut, answered in pieces and mapped back without losing or moving a single span."""

import random
from dataclasses import replace

import pytest

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.prompt_format import ANCHOR_STYLES, PromptFormat, find_words
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.predictions import RawAnswer, build_prompts, collect_predictions
from biomerge_lib.prompts.data_scan import _most_tokens
from biomerge_lib.prompts.prompt import (
    count_tokens,
    encode,
    encode_completion,
    encode_many,
    find_cut_spans,
    merge_chunks,
    split_record,
)
from tests.conftest import ASPIRIN, START, render

# Combining marks, emoji with joiners, Greek, CJK, non-breaking and other spaces, tabs, line breaks, hyphens.
PIECES = [
    "IL-2",
    "β-cell",
    "e\u0301tude",
    "👩🏽‍🔬",
    "naïve",
    "腫瘍",
    "TNF-α/β",
    "a",
    "…",
    "5′-UTR",
    "p.V600E",
    "x" * 30,
]
GAPS = [" ", " ", " ", "  ", "\u00a0", "\u2009", "\t", "\n", "\r\n", " . "]


def random_record(seed: int, words: int) -> Record:
    """A text of odd words and gaps, with spans that nest, touch, start inside words and reach over gaps."""
    chance = random.Random(seed)
    parts = [piece for _ in range(words) for piece in (chance.choice(PIECES), chance.choice(GAPS))]
    text = "".join(parts).strip()
    spans = set()
    for start, end in chance.sample(find_words(text), words // 6):
        spans.add((start, end))
        if chance.random() < 0.3 and end - start > 2:
            spans.add((start + 1, end))  # inside a word, nested
        if chance.random() < 0.3:
            spans.add((start, min(len(text), end + chance.randrange(1, 25))))  # over gaps
    return Record(text, tuple(sorted(spans)), f"doc{seed}", "odd")


def document(sample_records, sentences: int = 80) -> Record:
    """Many sentences in one text, with their spans."""
    text, spans = "", []
    for record in sample_records["train"][:sentences]:
        spans += [(start + len(text), end + len(text)) for start, end in record.spans]
        text += record.text + " "
    return Record(text.strip(), tuple(spans), "document", "sample")


def answers_of_a_perfect_model(prompts, tokenizer) -> list[RawAnswer]:
    found = []
    for prompt in prompts:
        ids = encode_completion(prompt.chunk.record.spans, tokenizer)[:-1]
        found.append(RawAnswer(ids, tokenizer.decode(ids), "eos"))
    return found


@pytest.mark.parametrize("style", ANCHOR_STYLES)
@pytest.mark.parametrize(("inputs", "targets"), [(190, 48), (300, 64)])
def test_training_chunks_hold_every_gold_span_once(tokenizer, sample_records, style, inputs, targets):
    prompt_format = PromptFormat(offset_anchors=style, corpus_cue=True, max_input_tokens=inputs)
    for record in (document(sample_records), random_record(1, 300), random_record(2, 300)):
        chunks = split_record(
            record,
            tokenizer,
            prompt_format,
            max_target_tokens=targets,
        )
        assert len(chunks) > 5
        assert "".join(chunk.record.text for chunk in chunks) == record.text
        assert merge_chunks(chunks, [chunk.record.spans for chunk in chunks]) == list(record.spans)
        assert sum(len(chunk.record.spans) for chunk in chunks) == len(record.spans)
        assert find_cut_spans(record, chunks) == []
        for chunk in chunks:
            assert chunk.record.text == record.text[chunk.offset :][: len(chunk.record.text)]
            encoding = encode(chunk.record, tokenizer, prompt_format)
            assert len(encoding.prompt_ids) <= inputs and len(encoding.completion_ids) <= targets


@pytest.mark.parametrize("style", ANCHOR_STYLES)
def test_evaluation_maps_every_answer_back_and_counts_the_mentions_it_cuts(tokenizer, sample_records, style):
    for record in (document(sample_records), *(random_record(seed, 200) for seed in range(5))):
        prompt_format = replace(START, offset_anchors=style, max_input_tokens=150)
        prompts = build_prompts([record], tokenizer, prompt_format)
        chunks = [prompt.chunk for prompt in prompts]
        assert len(chunks) > 5 and all(len(prompt.prompt_ids) <= 150 for prompt in prompts)
        [prediction] = collect_predictions([record], prompts, answers_of_a_perfect_model(prompts, tokenizer))
        cut = find_cut_spans(record, chunks)
        assert sorted([*prediction.pred, *cut]) == prediction.gold == list(record.spans)
        assert not set(cut) & set(prediction.pred)
        assert prediction.unreadable == prediction.out_of_text == prediction.unsorted == 0


def test_some_mentions_are_cut_in_evaluation_and_none_in_training(tokenizer):
    text = " ".join(["word"] * 400)
    record = Record(text, tuple((start, start + 49) for start in range(0, len(text) - 49, 50)), "d", "x")
    prompt_format = replace(START, max_input_tokens=100)
    blind = split_record(record, tokenizer, prompt_format)
    assert len(find_cut_spans(record, blind)) > 0
    assert find_cut_spans(record, split_record(record, tokenizer, prompt_format, max_target_tokens=64)) == []


def test_the_cuts_of_evaluation_do_not_depend_on_the_gold(tokenizer, sample_records):
    record = document(sample_records)
    blank = Record(record.text, (), record.doc_id, record.dataset)
    prompt_format = replace(START, max_input_tokens=100)
    offsets = [
        [chunk.offset for chunk in split_record(one, tokenizer, prompt_format)] for one in (record, blank)
    ]
    assert offsets[0] == offsets[1]


def test_a_document_is_cut_after_its_sentences_where_it_can_be(tokenizer, sample_records):
    record = document(sample_records)
    chunks = split_record(
        record,
        tokenizer,
        replace(START, max_input_tokens=400),
        max_target_tokens=128,
    )
    ends = [chunk.record.text.rstrip()[-1] for chunk in chunks[:-1]]
    assert len(ends) > 20 and ends.count(".") > 0.85 * len(ends)  # a long sentence may lie around the middle


def test_a_chunk_keeps_its_records_name_and_cue_and_its_prompt_is_the_one_that_is_trained(tokenizer):
    base = random_record(3, 120)
    record = Record(base.text, base.spans, "d7", "odd", cue="any")
    prompt_format = replace(START, corpus_cue=True, max_input_tokens=150)
    prompts = build_prompts([record], tokenizer, prompt_format)
    assert len(prompts) > 3
    for prompt in prompts:
        chunk = prompt.chunk.record
        assert (chunk.doc_id, chunk.dataset, chunk.cue) == ("d7", "odd", "any")
        assert prompt.prompt_ids == encode(chunk, tokenizer, prompt_format).prompt_ids
        assert tokenizer.decode(prompt.prompt_ids).startswith("<NER> any | 0 ")


def test_white_space_at_a_chunks_end_is_not_in_its_prompt():
    for style in ANCHOR_STYLES:
        assert render("Aspirin can \n", style) == render("Aspirin can", style)


def test_what_cannot_be_cut_is_refused_with_its_place(tokenizer):
    prompt_format = replace(START, max_input_tokens=30)
    word = Record("ACGT" * 60, (), "gene7", "odd")
    with pytest.raises(DataError, match=r"odd/gene7: .* cannot be cut .* Raise max_input_tokens \(30\)"):
        split_record(word, tokenizer, prompt_format)
    mention = Record("a long mention " * 20, ((0, 299),), "d8", "odd")
    with pytest.raises(DataError, match="odd/d8"):
        split_record(mention, tokenizer, prompt_format, max_target_tokens=20)
    assert len(split_record(mention, tokenizer, prompt_format)) > 3  # evaluation does not know the gold


@pytest.mark.parametrize("style", ANCHOR_STYLES)
@pytest.mark.parametrize("corpus_cue", [False, True])
def test_a_batch_is_tokenised_as_its_records_are(tokenizer, sample_records, style, corpus_cue):
    records = [
        *sample_records["dev"],
        *(random_record(seed, 40) for seed in range(20)),
        Record("No entity", (), "d", "x"),
        Record(ASPIRIN.text, ASPIRIN.spans, "d", "x", cue="any"),
        *(
            Record(text, (), "d", "x")
            for text in ("two  spaces\u00a0and\tothers", "\U0001f600 x\u2028y", "<B>x <TAG>")
        ),
    ]
    prompt_format = replace(START, offset_anchors=style, corpus_cue=corpus_cue)
    one_by_one = [encode(record, tokenizer, prompt_format) for record in records]
    assert encode_many(records, tokenizer, prompt_format) == one_by_one
    assert encode_many([], tokenizer, prompt_format) == []
    lengths = [(len(encoding.prompt_ids), len(encoding.completion_ids)) for encoding in one_by_one]
    assert count_tokens(records, tokenizer, prompt_format) == lengths
    closer = list(_most_tokens(records, tokenizer, prompt_format))
    assert sum(closer) < 0.9 * sum(map(prompt_format.most_bytes, records))
    for record, (prompt_tokens, _), most in zip(records, lengths, closer, strict=True):
        assert prompt_tokens <= most
        bound = prompt_format.most_bytes(record)
        rendered = prompt_format.render(record).prompt
        assert len(rendered.encode()) <= bound and prompt_tokens <= bound + 4
