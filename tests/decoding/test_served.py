"""The real vLLM against transformers, on a tiny Llama that was trained; and what is wrong on purpose is named."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import chain

import pytest
import torch

from biomerge_lib import eval_vllm, predict
from biomerge_lib.__main__ import main
from biomerge_lib.core.errors import ServerError
from biomerge_lib.core.files import write_json
from biomerge_lib.core.records import parse_record
from biomerge_lib.core.spans import TAG, format_spans
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import build_prompts, collect_predictions
from biomerge_lib.decoding.vllm_client import GreedyClient
from biomerge_lib.decoding.vllm_server import VllmServer
from biomerge_lib.eval_vllm import evaluate_split
from biomerge_lib.experiment.guarded_process import find_group_members
from biomerge_lib.prompts.ner_span import SpanCollator, encode_example
from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer
from biomerge_lib.prompts.tokenizer import save_tokenizer
from biomerge_lib.scoring.parity import NEAR_TIE, check_parity
from tests.conftest import START, spans_of
from tests.decoding.test_answer_grammar import assert_legal
from tests.support.shared_corpora import skip_but_fail_in_ci
from tests.support.tiny_vllm import save_tokenizer_files

pytestmark = [pytest.mark.integration, pytest.mark.slow]
PROMPTS = replace(START, max_input_tokens=256)
NEW_TOKENS = 40


def short(records, count):
    return [record for record in records if 0 < len(record.spans) < 5 and len(record.text) < 110][:count]


@pytest.fixture(scope="module")
def records(sample_records):
    """Some that the model learns, and some that leave it in doubt, so that other arithmetic shows."""
    return short(sample_records["train"], 16) + short(sample_records["dev"], 24)


@pytest.fixture(scope="module")
def model(tiny_prepared, tokenizer, sample_records):
    """All weights trained for some seconds, until it knows some sentences by heart."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_prepared, dtype=torch.float32)
    examples = [encode_example(record, tokenizer, START) for record in short(sample_records["train"], 32)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collate = SpanCollator(tokenizer.pad_token_id)
    torch.manual_seed(0)
    for _ in range(160):
        batch = collate([examples[i] for i in torch.randint(len(examples), (16,))])
        keys = ("input_ids", "attention_mask", "labels")
        loss = model(**{key: batch[key] for key in keys if key in batch}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    return model.eval()


@pytest.fixture(scope="module")
def served_folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny-llama" / "merged"
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def decode(model, tokenizer, records):
    def run(constraint="off", model=model):
        prompts = build_prompts(records, tokenizer, PROMPTS)
        options = {"max_new_tokens": NEW_TOKENS, "batch_size": 8, "progress": None}
        answers = greedy_decode(model, tokenizer, prompts, constrained_decoding=constraint, **options)
        return collect_predictions(records, prompts, answers, constrained=constraint != "off")

    return run


@pytest.fixture(scope="module")
def greedy(decode):
    return decode()


@pytest.fixture(scope="module")
def plain(served_folder):
    return load_plain_tokenizer(served_folder)


@pytest.fixture(scope="module")
def server(served_folder, tmp_path_factory):
    if find_spec("vllm") is None:
        skip_but_fail_in_ci("vLLM is not installed")
    log_path = tmp_path_factory.mktemp("log") / "vllm.log"
    with VllmServer(served_folder, dtype="float32", log_path=log_path, max_model_len=512) as server:
        group = server._process.group
        assert len(find_group_members(group)) > 1
        yield server
    assert find_group_members(group) == []


@pytest.fixture
def ask(records, plain, tmp_path):
    def run(server, tokenizer=plain, **options):
        options = {"max_new_tokens": NEW_TOKENS} | options
        client = GreedyClient(server=server, tokenizer=tokenizer, **options)
        out = tmp_path / "predictions.jsonl"
        return evaluate_split(records, client, PROMPTS, split="dev", out=out, progress=None).predictions

    return run


def compare(greedy, served, tokenizer):
    return check_parity(greedy, served, tokenizer, reference_dtype="float32", served_dtype="float32")


def flat(steps):
    return [value for answer in steps for chunk in answer for value in chunk]


def test_vllm_answers_as_transformers_does(server, ask, greedy, plain, tokenizer, records):
    assert build_prompts(records, plain, PROMPTS) == build_prompts(records, tokenizer, PROMPTS)
    served = ask(server)
    parity = compare(greedy, served, plain)
    assert (parity.passed, parity.differences) == (True, [])
    assert [p.answer_ids for p in served] == [p.answer_ids for p in greedy]
    assert parity.reference.f1 > 0.1  # it has learnt something
    assert len({tuple(p.answer_ids[0]) for p in greedy}) > 10
    for name in ("logprobs", "margins"):
        ours, theirs = (flat(getattr(p, name) for p in found) for found in (greedy, served))
        assert theirs == pytest.approx(ours, abs=1e-3)
    spans = [(p.probabilities, q.probabilities) for p, q in zip(served, greedy, strict=True)]
    assert sum(len(theirs) for theirs, _ in spans) > 20
    assert all(theirs == pytest.approx(ours, abs=1e-3) for theirs, ours in spans)


@pytest.mark.parametrize("constraint", ["format", "offsets"])
def test_one_grammar_binds_both_decoders(server, ask, decode, plain, constraint):
    bound, served = decode(constraint), ask(server, constrained_decoding=constraint)
    assert compare(bound, served, plain).differences == []
    assert flat(p.logprobs for p in served) == pytest.approx(flat(p.logprobs for p in bound), abs=1e-3)
    assert sum(p.unreadable for p in served) == 0 and sum(len(p.pred) for p in served) > 20
    if constraint == "offsets":
        assert sum(p.unsorted + p.out_of_text for p in served) == 0
        for prediction in served:
            assert_legal(prediction.text, format_spans(prediction.pred).removeprefix(TAG))


def test_a_taken_port_is_named(server, served_folder, tmp_path):
    second = VllmServer(
        served_folder, dtype="float32", log_path=tmp_path / "log", max_model_len=512, port=server.port
    )
    with pytest.raises(ServerError, match=f"port {server.port} on 127.0.0.1 is in use"):
        second.start()


def test_a_truncated_answer_is_named(server, ask, greedy, plain):
    parity = compare(greedy, ask(server, max_new_tokens=8), plain)
    assert set(parity.causes) == {"truncation"} and not parity.passed
    assert {difference.served_token for difference in parity.differences} == {"<cut>"}


def test_a_wrong_tokenizer_is_named(server, ask, greedy, plain, tmp_path):
    wrong = load_plain_tokenizer(save_tokenizer_files(tmp_path / "wrong"))
    parity = compare(greedy, ask(server, wrong), plain)
    assert set(parity.causes) == {"tokenisation"} and not parity.passed


def test_a_dropped_tag_is_named(server, ask, greedy, plain, monkeypatch):
    def without_tag(*arguments, **options):
        prompts = build_prompts(*arguments, **options)
        return [type(p)(p.record_index, p.chunk, p.prompt_ids[:-1]) for p in prompts]

    monkeypatch.setattr(eval_vllm, "build_prompts", without_tag)
    parity = compare(greedy, ask(server), plain)
    assert set(parity.causes) == {"tokenisation"} and not parity.passed


def test_other_arithmetic_is_named_whatever_it_claims(server, ask, greedy, decode, model, plain):
    """A server in bfloat16 would be a second start: transformers rounds, and the server answers exactly."""
    rounded, served = decode(model=deepcopy(model).to(torch.bfloat16)), ask(server)
    for claim in ("bfloat16", "float32", None):
        parity = check_parity(rounded, served, plain, reference_dtype=claim, served_dtype="float32")
        assert set(parity.causes) == {"dtype"}
        assert all(0 <= difference.margin <= NEAR_TIE for difference in parity.differences)
    assert not compare(rounded, served, plain).passed and compare(greedy, served, plain).passed


def test_predict_asks_a_server_as_it_asks_the_model(
    server, served_folder, records, monkeypatch, tmp_path, capsys
):
    write_json(served_folder / "biomerge.json", asdict(PROMPTS) | {"max_new_tokens": NEW_TOKENS})
    monkeypatch.setenv("VLLM_API_KEY", server.api_key)
    documents = ["\n".join(record.text for record in records[start : start + 8]) for start in (0, 8, 16)]
    served = predict(documents, model=served_folder, base_url=server.base_url.removesuffix("/v1"))
    ours = predict(documents, model=served_folder)
    assert spans_of(served) == spans_of(ours)
    for mine, its in zip(chain(*ours), chain(*served), strict=True):
        assert mine.score == pytest.approx(its.score, abs=1e-3)
    assert all(len(spans) > 3 for spans in served)
    (tmp_path / "a.txt").write_text(documents[0], encoding="utf-8")
    arguments = ["predict", "--model", str(served_folder), "--file", str(tmp_path / "a.txt")]
    out = ["--format", "jsonl", "--base-url", server.base_url]
    assert main([*arguments, *out]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert parse_record(line, "out").spans == tuple(spans_of(served)[0])
    assert main([*arguments, "--base-url", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9/v1: no connection to the server" in capsys.readouterr().err


def test_one_server_answers_for_several_models_one_after_the_other(model, tokenizer, ask, decode, tmp_path):
    """Untied ones, whose weights it reads in place; in each the output table has noise of its own."""
    if find_spec("vllm") is None:
        skip_but_fail_in_ci("vLLM is not installed")
    models, folders = [], []
    for seed in (0, 1):
        untied = deepcopy(model)
        torch.manual_seed(seed)
        untied.config.tie_word_embeddings = False
        table = model.lm_head.weight.detach()
        untied.lm_head.weight = torch.nn.Parameter(table + 0.2 * table.std() * torch.randn_like(table))
        models.append(untied)
        folders.append(tmp_path / f"model-{seed}" / "merged")
        untied.save_pretrained(folders[-1])
        save_tokenizer(tokenizer, folders[-1])
    options = {"dtype": "float32", "log_path": tmp_path / "log", "max_model_len": 512, "others": folders[1:]}
    expected = [decode(model=model) for model in models]
    assert sum(p.answer_ids != q.answer_ids for p, q in zip(*expected, strict=True)) > 5
    with VllmServer(folders[0], **options) as server:
        process = server._process
        for number in (0, 1, 0):
            server.load(folders[number])
            assert server.model_id == f"model-{number}"
            found = [(p.answer_ids, p.logprobs) for p in ask(server)]
            for (ids, logprobs), wanted in zip(found, expected[number], strict=True):
                assert logprobs[0][0] == pytest.approx(wanted.logprobs[0][0], abs=1e-3)
                assert ids == wanted.answer_ids or min(wanted.margins[0]) < 1e-3
        assert server._process is process
