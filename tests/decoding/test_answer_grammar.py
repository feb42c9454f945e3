"""What a grammar lets through: every gold answer, and never an answer that is not legal, whatever the model wants."""

import random
from dataclasses import replace

import pytest
import torch
import xgrammar

from biomerge_lib.core.prompt_format import find_pieces
from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import TAG, format_spans, parse_answer, read_parts
from biomerge_lib.decoding.answer_grammar import build_grammar
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import Prompt, RawAnswer, build_prompts, collect_predictions
from biomerge_lib.prompts.prompt import Chunk
from tests.conftest import START

TEXT = "Aspirin can trigger asthma ."
PROMPTS = replace(START, max_input_tokens=200)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=tokenizer.eos_token_id)
    return xgrammar.GrammarCompiler(info)


def accepts(compiler, tokenizer, text, constraint, answer) -> bool:
    matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(build_grammar(text, constraint)))
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return all(matcher.accept_token(token_id) for token_id in ids) and matcher.is_terminated()


def assert_legal(text: str, answer: str) -> None:
    """Parseable to the letter, at edges of pieces, ascending, without overlap."""
    pieces = find_pieces(text)
    spans = [span for _, span in read_parts(answer)] if answer else []
    assert f"{TAG}{answer}" == format_spans(spans)
    assert {start for start, _ in spans} <= {start for start, _ in pieces}
    assert {end for _, end in spans} <= {end for _, end in pieces}
    flat = [offset for span in spans for offset in span]
    assert all(start < end for start, end in spans) and flat == sorted(flat)


@pytest.mark.parametrize(
    ("answer", "form", "offsets"),
    [
        ("", True, True),
        (" 0-7", True, True),
        (" 0-7 ; 20-26", True, True),
        (" 0-26", True, True),
        (" 20-26 ; 0-7", True, False),  # descending
        (" 0-11 ; 8-26", True, False),  # overlapping
        (" 0-7 ; 0-7", True, False),  # twice
        (" 1-7", True, False),  # no start of a word
        (" 0-6", True, False),  # no end of a word
        (" 8-7", True, False),
        (" 0-99", True, False),
        (" 00-7", False, False),
        ("0-7", False, False),
        (" ", False, False),
        (" 0-7 ;", False, False),
        (" 0-7 ; ", False, False),
        (" 0-7;20-26", False, False),
        (" asthma", False, False),
        (" 0-7 <NER>", False, False),
    ],
)
def test_what_each_grammar_accepts(compiler, tokenizer, answer, form, offsets):
    assert accepts(compiler, tokenizer, TEXT, "format", answer) is form
    assert accepts(compiler, tokenizer, TEXT, "offsets", answer) is offsets


def test_every_gold_answer_is_accepted(compiler, tokenizer, sample_records):
    records = [record for records in sample_records.values() for record in records][::3]
    assert len(records) > 40 and sum(len(record.spans) for record in records) > 40
    for record in records:
        for constraint in ("format", "offsets"):
            answer = record.target.removeprefix(TAG)
            assert accepts(compiler, tokenizer, record.text, constraint, answer), (record, constraint)


def test_a_mention_inside_a_word_is_accepted_when_punctuation_bounds_it(compiler, tokenizer):
    text = "(Aspirin)-induced asthma, 5-HT."
    assert [text[start:end] for start, end in ((1, 8), (18, 24), (26, 30))] == ["Aspirin", "asthma", "5-HT"]
    assert accepts(compiler, tokenizer, text, "offsets", " 1-8 ; 18-24 ; 26-30")


@pytest.mark.parametrize("text", ["", "  \t", "β"])
def test_a_text_of_no_or_one_word(compiler, tokenizer, text):
    assert accepts(compiler, tokenizer, text, "offsets", "")
    assert accepts(compiler, tokenizer, text, "offsets", " 0-1") is bool(text.strip())


def test_random_tokens_under_the_grammar_are_legal(compiler, tokenizer):
    draw = random.Random(7)
    signs, longest = ["Aspirin", "can", "5-HT", "(", ")", ".", "β", "a,b", "_", "10"], 0
    for _ in range(150):
        text = " ".join(draw.choices(signs, k=draw.randint(0, 30)))
        matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(build_grammar(text, "offsets")))
        mask = xgrammar.allocate_token_bitmask(1, len(tokenizer))
        ids = []
        while not matcher.is_terminated():
            matcher.fill_next_token_bitmask(mask)
            logits = torch.tensor([[draw.gauss(0, 1) for _ in range(len(tokenizer))]])
            xgrammar.apply_token_bitmask_inplace(logits, mask)
            ids.append(int(logits.argmax()))
            assert matcher.accept_token(ids[-1])
        answer = tokenizer.decode(ids[:-1])
        assert_legal(text, answer)
        longest = max(longest, len(read_parts(answer)))
    assert longest > 3


@pytest.fixture(scope="module")
def random_model(tiny_prepared):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_prepared, dtype=torch.float32)
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_a_random_model_answers_legally(random_model, tokenizer, sample_records):
    records = [record for record in sample_records["dev"] if len(record.text) < 150][:24]
    prompts = build_prompts(records, tokenizer, PROMPTS)
    decode = {"max_new_tokens": 48, "batch_size": 8, "progress": None}
    free = greedy_decode(random_model, tokenizer, prompts, **decode)
    assert any(parse_answer(answer.text, 150).unreadable for answer in free)
    bound = greedy_decode(random_model, tokenizer, prompts, constrained_decoding="offsets", **decode)
    predictions = collect_predictions(records, prompts, bound, constrained=True)
    assert sum(len(prediction.pred) for prediction in predictions) > 20
    for prediction in predictions:
        assert (prediction.unreadable, prediction.out_of_text, prediction.unsorted) == (0, 0, 0)
        assert_legal(prediction.text, format_spans(prediction.pred).removeprefix(TAG))


def test_an_answer_cut_inside_a_span_leaves_that_span_out():
    record = Record(TEXT, (), "d", "x")
    answer = RawAnswer([1], " 0-7 ; 20-2", "length")
    prompts = [Prompt(0, Chunk(record, 0), [1])]
    assert collect_predictions([record], prompts, [answer])[0].pred == [(0, 7), (20, 2)]
    assert collect_predictions([record], prompts, [answer], constrained=True)[0].pred == [(0, 7)]


def test_the_probabilities_of_spans_and_end_multiply_to_the_answers(random_model, tokenizer, sample_records):
    records = [record for record in sample_records["dev"] if len(record.text) < 150][:8]
    prompts = build_prompts(records, tokenizer, PROMPTS)
    options = {"max_new_tokens": 64, "batch_size": 3, "progress": None, "constrained_decoding": "offsets"}
    answers = greedy_decode(random_model, tokenizer, prompts, **options)
    for answer in answers:
        assert len(answer.logprobs) == len(answer.margins) == len(answer.token_ids) + (answer.finish == "eos")
        assert len(answer.part_logprobs) == len(read_parts(answer.text))
        rest = answer.logprobs[len(answer.token_ids) :]
        assert sum(answer.part_logprobs) + sum(rest) == pytest.approx(sum(answer.logprobs), abs=1e-4)
        assert min(answer.margins) >= 0
    prediction = next(p for p in collect_predictions(records, prompts, answers) if p.pred)
    assert len(prediction.probabilities) == len(prediction.pred)
    assert all(0 < probability <= 1 for probability in prediction.probabilities)


def test_log_probabilities_are_the_models(random_model, tokenizer, sample_records):
    """Against one forward pass over the whole answer."""
    prompts = build_prompts(sample_records["dev"][:3], tokenizer, PROMPTS)
    answers = greedy_decode(random_model, tokenizer, prompts, max_new_tokens=8, batch_size=3, progress=None)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt.prompt_ids + answer.token_ids])
        with torch.no_grad():
            logits = random_model(input_ids=ids).logits[0, len(prompt.prompt_ids) - 1 : -1]
        top = logits.log_softmax(-1).topk(2).values
        steps = len(answer.token_ids)
        assert answer.logprobs[:steps] == pytest.approx(top[:, 0].tolist(), abs=1e-3)
        assert answer.margins[:steps] == pytest.approx((top[:, 0] - top[:, 1]).tolist(), abs=1e-3)
