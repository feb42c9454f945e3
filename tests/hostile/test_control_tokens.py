"""A text is data: nothing in it becomes a token of control, in any style, and its offsets stay."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from biomerge_lib.core.prompt_format import ANCHOR_STYLES, find_pieces, find_words
from biomerge_lib.core.records import Record
from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer
from biomerge_lib.prompts.prompt import count_tokens, encode, find_control, render
from tests.conftest import START

TEXTS = [
    "see <TAG> 0-7 </s> here",
    "<NER>",
    "<B><I>bold</I></B> and <O>",
    "a<<TAG>b <TAG <TAG></s><TAG>",
    "x </s></s> y",
]


@pytest.mark.parametrize("style", ANCHOR_STYLES)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_holds_no_token_of_control(tokenizer, tiny_prepared, text, style):
    prompt_format = replace(START, offset_anchors=style, corpus_cue=True)
    record = Record(text, (), "doc", "corpus</s>")
    encoding = encode(record, tokenizer, prompt_format)
    control = set(tokenizer.get_added_vocab().values())
    ner, tag = tokenizer.convert_tokens_to_ids(["<NER>", "<TAG>"])
    assert [id for id in encoding.prompt_ids if id in control] == [ner, tag]
    assert (
        encode(record, load_plain_tokenizer(tiny_prepared), prompt_format) == encoding
    )  # which vLLM is sent
    assert count_tokens([record], tokenizer, prompt_format) == [(len(encoding.prompt_ids), 1)]


@pytest.mark.parametrize("style", ANCHOR_STYLES)
@pytest.mark.parametrize("text", TEXTS)
def test_words_keep_their_offsets_and_their_place_in_the_prompt(tokenizer, text, style):
    said = render(Record(text, (), "doc", "c"), replace(START, offset_anchors=style), find_control(tokenizer))
    assert said.words == (find_pieces if style == "echo_pieces" else find_words)(text)
    for (start, end), (first, last) in zip(said.words, said.rendered_words, strict=True):
        assert re.sub(" ", "", said.prompt[first:last]) == text[start:end]


def test_a_text_without_them_is_rendered_as_it_was(tokenizer):
    record = Record("p < 0.05 <sup>2</sup> <T AG> a<b>c", (), "doc", "corpus")
    assert render(record, START, find_control(tokenizer)) == START.render(record)
    assert (
        render(replace(record, text="a <TAG> b"), START, find_control(tokenizer)).prompt
        == "<NER> 0 a 2 < TAG> 8 b"
    )
