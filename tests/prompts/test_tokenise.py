"""The data module's tensors align: labels live on the answer and EOS only, word labels on each word's last token."""

from dataclasses import replace
from itertools import product

import pytest

from biomerge_lib.core.prompt_format import ANCHOR_STYLES
from biomerge_lib.core.records import Record
from biomerge_lib.prompts.ner_span import SpanCollator, build_dataset, encode_example
from biomerge_lib.prompts.prompt import IGNORE, encode, merge_chunks, split_record, word_labels
from tests.conftest import ASPIRIN, START, render

B, I, O = 1, 2, 0  # noqa: E741


@pytest.mark.parametrize("style", ANCHOR_STYLES)
def test_labels_are_the_answer_and_eos_and_nothing_else(tokenizer, style):
    example = encode_example(ASPIRIN, tokenizer, replace(START, offset_anchors=style))
    tag = tokenizer.convert_tokens_to_ids("<TAG>")
    assert len(example["input_ids"]) == len(example["labels"]) == len(example["token_labels"])
    first = example["labels"].index(next(label for label in example["labels"] if label != IGNORE))
    assert example["input_ids"][first - 1] == tag and tag not in example["input_ids"][first:]
    assert example["labels"][:first] == [IGNORE] * first
    assert example["labels"][first:] == example["input_ids"][first:]
    assert example["labels"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example["labels"][first:-1]) == " 0-7 ; 20-34"


def test_plain_rendering_gives_known_tokens_and_labels(tokenizer):
    record = Record("a b", ((2, 3),), "d", "x")
    example = encode_example(record, tokenizer, replace(START, offset_anchors="none"))
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert tokens == ["<NER>", "Ġa", "Ġb", "<TAG>", "Ġ2", "-", "3", "</s>"]
    ids = tokenizer.convert_tokens_to_ids(["Ġ2", "-", "3", "</s>"])
    assert example["labels"] == [IGNORE] * 4 + ids
    assert example["token_labels"] == [IGNORE, O, B] + [IGNORE] * 5


@pytest.mark.parametrize("style", ANCHOR_STYLES)
def test_word_labels_sit_on_the_last_token_of_each_word(tokenizer, style):
    encoding = encode(ASPIRIN, tokenizer, replace(START, offset_anchors=style))
    example = encode_example(ASPIRIN, tokenizer, replace(START, offset_anchors=style))
    labelled = [(i, label) for i, label in enumerate(example["token_labels"]) if label != IGNORE]
    assert [label for _, label in labelled] == [B, O, O, B, I, O]
    for (position, _), (start, end) in zip(labelled, encoding.words, strict=True):
        word = ASPIRIN.text[start:end]
        assert word.endswith(tokenizer.decode([encoding.prompt_ids[position]]).strip())


def test_rendered_words_are_the_texts_words():
    text = "IL-2  gene\u00a0x , β-cells ."
    for style in ANCHOR_STYLES:
        for cue in (None, "jnlpba"):
            rendering = render(text, style, cue)
            cut = [rendering.prompt[start:end] for start, end in rendering.rendered_words]
            assert cut == [text[start:end] for start, end in rendering.words]
    assert render(text, "none").prompt == "<NER> " + text


def test_renderings_are_spelled_as_documented():
    spelled = {style: render("Aspirin can.", style).prompt for style in ANCHOR_STYLES}
    assert spelled == {
        "none": "<NER> Aspirin can.",
        "start": "<NER> 0 Aspirin 8 can.",
        "echo_start": "<NER> Aspirin can. | 0 Aspirin 8 can.",
        "echo_pieces": "<NER> Aspirin can. | 0 Aspirin 8 can 11 .",
    }


@pytest.mark.parametrize("style", [style for style in ANCHOR_STYLES if style != "none"])
def test_no_two_texts_have_the_same_prompt(style):
    words, gaps = ("a", "1", "a1", "a11"), (1, 2, 3, 10, 11, 12, 13)  # a + 1 + 3 must not read as a + 13
    texts = {
        first + " " * left + second + " " * right + third
        for first, left, second, right, third in product(words, gaps, words, gaps, words)
    }
    assert len({render(text, style).prompt for text in texts}) == len(texts) == 4**3 * 7**2


@pytest.mark.parametrize("style", ["start", "echo_start"])
def test_words_keep_the_tokens_of_the_plain_sentence(tokenizer, sample_records, style):
    odd = [
        Record(text, (), "d", "x")
        for text in ("CYP2D6 in 1998 2 mg , H² .", "19 19 19", "a1", "β-cell’s 5′-UTR")
    ]
    for record in [*sample_records["dev"], *odd]:
        text = " ".join(record.text.split())
        rendering = render(text, style)
        encoded = tokenizer(rendering.prompt, return_offsets_mapping=True)
        kept = [
            token
            for token, (left, right) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if any(start - 1 < right and left < end for start, end in rendering.rendered_words)
        ]
        assert kept == tokenizer("<NER> " + text)["input_ids"][1:]


def test_word_labels_of_adjacent_and_inner_spans():
    words = [(0, 4), (5, 9), (10, 14), (15, 19)]
    assert word_labels(words, [(0, 4), (5, 14)]) == [B, B, I, O]
    assert word_labels(words, [(6, 8)]) == [O, B, O, O]
    assert word_labels(words, []) == [O, O, O, O]


def test_a_batch_is_padded_on_the_right_and_masked_by_length(tokenizer):
    records = [ASPIRIN, Record("No entity here at all in this longer sentence .", (), "d", "x")]
    examples = [encode_example(r, tokenizer, START) for r in records]
    batch = SpanCollator(tokenizer.pad_token_id)(examples)
    longest = max(len(example["input_ids"]) for example in examples)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        name: (2, longest) for name in ("input_ids", "attention_mask", "labels", "token_labels")
    } | {"lengths": (2,)}
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["attention_mask"][row].sum() == length
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert batch["labels"][row, length:].tolist() == [IGNORE] * (longest - length)
        # Pad is EOS: the real EOS keeps its label although it is the pad id.
        assert batch["labels"][row, length - 1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_a_record_without_entity_is_answered_with_eos(tokenizer):
    example = encode_example(Record("No entity .", (), "d", "x"), tokenizer, START)
    assert [label for label in example["labels"] if label != IGNORE] == [tokenizer.eos_token_id]


def test_long_records_are_cut_between_words_and_never_through_a_mention(tokenizer, sample_records):
    long = max(sample_records["train"], key=lambda record: len(record.text))
    prompt_format = replace(START, max_input_tokens=200)
    chunks = split_record(long, tokenizer, prompt_format, max_target_tokens=40)
    assert len(chunks) > 2
    assert "".join(chunk.record.text for chunk in chunks) == long.text
    assert merge_chunks(chunks, [chunk.record.spans for chunk in chunks]) == list(long.spans)
    dataset = build_dataset([long], tokenizer, prompt_format, max_target_tokens=40)
    assert len(dataset) == len(chunks)
    for example in dataset:
        assert sum(label == IGNORE for label in example["labels"]) <= 200
        assert sum(label != IGNORE for label in example["labels"]) <= 40
