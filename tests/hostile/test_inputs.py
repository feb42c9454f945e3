"""Whatever comes in, a function gives what its name says or an error that a user can mend, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from biomerge_lib.apply.texts import iter_texts
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import BioMergeError, DataError, ParameterError, ServerError
from biomerge_lib.core.files import OBJECT, read_values
from biomerge_lib.core.parameters import Parameters, check_parameters
from biomerge_lib.core.prompt_format import ANCHOR_STYLES, PromptFormat
from biomerge_lib.core.records import Record, parse_record
from biomerge_lib.core.spans import format_spans, is_inside, parse_answer, parse_spans
from biomerge_lib.corpora.readers import read_corpus
from biomerge_lib.corpora.sentences import find_sentences
from biomerge_lib.decoding.partial_answers import PartialAnswers
from biomerge_lib.decoding.predictions import (
    Prompt,
    RawAnswer,
    collect_predictions,
    read_predictions,
    write_predictions,
)
from biomerge_lib.decoding.vllm_client import GreedyClient, read_models
from biomerge_lib.experiment.checkpoints import find_damage, seal_checkpoint
from biomerge_lib.experiment.recorded import current_stages, load_run_parameters, read_metrics
from biomerge_lib.experiment.sweeps import rank_points, read_sweep
from biomerge_lib.experiment.tracking import upload_stage
from biomerge_lib.prompts.manifest import Manifest, read_manifest, read_model_folder
from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer
from biomerge_lib.prompts.prompt import encode, merge_chunks, split_record
from biomerge_lib.report.page import write_report
from biomerge_lib.report.published import publish_run
from tests.conftest import ROOT
from tests.hostile.damage import TRIED, damaged, damaged_json, distorted, hostile_text, hostile_value, inputs
from tests.support.tiny_vllm import make_records, save_tokenizer_files

pytestmark = pytest.mark.slow

spans = st.lists(st.tuples(st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def tiny_tokenizer(place):
    return load_plain_tokenizer(save_tokenizer_files(place / "tokenizer"))


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- spans, records, prompts


@inputs(260)
@given(spans, hostile_text, st.integers(0, 100))
def test_spans(pairs, answer, length):
    TRIED["span strings"] += 1
    assert parse_spans(format_spans(pairs)) == sorted(set(pairs))
    said = parse_answer(answer, length)
    assert said.spans == sorted(set(said.spans))
    assert said.out_of_text == [span for span in said.spans if not is_inside(span, length)]


@inputs(200)
@given(damaged_json(json.loads(make_records(1)[0].to_json()) | {"cue": "c"}))
def test_records(line):
    TRIED["records"] += 1
    try:
        record = parse_record(line.decode("utf-8"), "f:1")
    except UnicodeDecodeError:
        return  # iter_lines says so
    except DataError as error:
        assert str(error).startswith("f:1: ")
    else:
        assert all(is_inside(span, len(record.text)) for span in record.spans)
        assert parse_record(record.to_json(), "again") == record


@st.composite
def records(draw: st.DrawFn) -> Record:
    text = " ".join(draw(st.lists(hostile_text, min_size=1, max_size=12))) + "."
    edges = st.integers(0, len(text))
    pairs = draw(st.lists(st.tuples(edges, edges), max_size=6))
    found = {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}
    return Record(text, tuple(sorted(found)), "d", draw(hostile_text) or "c")


@inputs(200)
@given(
    records(), st.sampled_from(ANCHOR_STYLES), st.booleans(), st.sampled_from([32, 64, 4000]), st.booleans()
)
def test_prompts_and_their_chunks(tiny_tokenizer, record, style, cue, longest, training):
    TRIED["prompts and their chunks"] += 1
    prompt_format = PromptFormat(offset_anchors=style, corpus_cue=cue, max_input_tokens=longest)
    vocabulary = tiny_tokenizer.get_added_vocab()
    encoding = encode(record, tiny_tokenizer, prompt_format)
    seen = [id for id in encoding.prompt_ids if id in set(vocabulary.values())]
    assert seen == [vocabulary["<NER>"], vocabulary["<TAG>"]]
    try:
        limit = 2000 if training else None
        chunks = split_record(record, tiny_tokenizer, prompt_format, max_target_tokens=limit)
    except DataError as error:
        assert "cannot be cut" in str(error)
        return
    assert "".join(chunk.record.text for chunk in chunks) == record.text
    if training:
        assert merge_chunks(chunks, [chunk.record.spans for chunk in chunks]) == list(record.spans)


@inputs(60)
@given(
    st.lists(
        st.sampled_from(["a.b. ", "Dr. ", "(", ")", "x ", "1. ", "\n", "Aspirin. ", '" ']), max_size=3000
    )
)
def test_sentences_cover_a_text(parts):
    TRIED["sentences"] += 1
    text, last = "".join(parts), 0
    for start, end in find_sentences(text):
        assert text[last:start].strip() == "" and start < end
        last = end
    assert text[last:].strip() == ""


# --- corpora and texts

BIOC = """<?xml version="1.0"?><collection><source>s</source><document><id>d1</id><passage><offset>0</offset>
<text>Aspirin helps.</text><annotation id="1"><infon key="type">Chemical</infon><location offset="0" length="7"/>
<text>Aspirin</text></annotation></passage></document></collection>"""
CORPORA = {
    "train.tsv": b"Aspirin\tB-Chemical\nhelps\tO\n\nNo\tO\n",
    "train.PubTator.txt": b"1|t|Aspirin helps.\n1|a|Yes.\n1\t0\t7\tAspirin\tChemical\tD1\n\n",
    "train.xml": BIOC.encode(),
    "train/d1.ann": b"T1\tChemical 0 7\tAspirin\n",
    "train/d1.txt": b"Aspirin helps.\n",
    "train.jsonl": "".join(record.to_json() + "\n" for record in make_records(3)).encode(),
    "train.json": b'{"tokens": ["Aspirin", "helps"], "ner_tags": ["B-Chemical", "O"]}\n',
}


@inputs(300)
@given(st.data())
def test_corpora(place, data):
    TRIED["corpora"] += 1
    name = data.draw(st.sampled_from(sorted(CORPORA)))
    folder = place / "corpora" / name.replace("/", "-").replace(".", "-")
    for other in CORPORA if "/" in name else [name]:
        if other.split("/")[0] == name.split("/")[0]:
            write(folder / other, CORPORA[other])
    write(folder / name, data.draw(damaged(CORPORA[name])))
    try:
        corpus = read_corpus(folder, splits=("train",))
    except DataError:
        return
    for record in corpus["train"]:
        assert all(is_inside(span, len(record.text)) for span in record.spans)
        assert parse_record(record.to_json(), "again").spans == record.spans


@inputs(100)
@given(st.data(), st.sampled_from(["a.txt", "a.jsonl", "a.pubtator", "a.csv"]))
def test_texts_to_predict(place, data, name):
    TRIED["texts to predict"] += 1
    content = {
        "a.jsonl": b'{"text": "Aspirin helps.", "doc_id": "d"}\n',
        "a.pubtator": CORPORA["train.PubTator.txt"],
    }
    path = write(place / "texts" / name, data.draw(damaged(content.get(name, b"Aspirin helps.\n"))))
    try:
        texts = list(iter_texts([path]))
    except DataError:
        return
    assert all(text.text.encode() for text in texts)


# --- parameters

DEFAULTS = compose_parameters([]).model_dump()
LINES = yaml.safe_dump(DEFAULTS | {"run_id": "r"}, sort_keys=False)


@inputs(250)
@given(distorted(DEFAULTS))
def test_parameters(values):
    TRIED["parameters"] += 1
    try:
        assert isinstance(check_parameters(values), Parameters)
    except ParameterError as error:
        assert len(str(error)) < 20_000
    except TypeError:
        assert not isinstance(values, dict)


@inputs(20)
@given(st.sampled_from(sorted(DEFAULTS)), hostile_text | hostile_value)
def test_overrides(name, value):
    TRIED["overrides"] += 1
    try:
        compose_parameters([f"{name}={value}"])
    except ParameterError as error:
        assert str(error)


# --- our own files

METRICS = {
    "run_id": "r",
    "parameters": {"data_dir": "data/x", "learning_rate": 1e-3, "run_test_eval": False},
    "data": {"train": "a", "dev": "b"},
    "stages": {
        "02_data": {"status": "finished", "metrics": {}, "data": {"train": "a"}},
        "03_train": {
            "status": "finished",
            "metrics": {
                "greedy_dev_ner_f1": 0.5,
                "eval_ner_f1": 0.4,
                "steps": 3,
                "best_checkpoint": "checkpoint-3",
            },
            "provenance": {"commit": "c", "device": "CPU", "versions": {"torch": "2"}},
            "started": "2026-11-30T10:00:00+00:00",
            "model": "m",
        },
        "04_greedy_dev": {
            "status": "finished",
            "metrics": {"greedy_dev_ner_f1": 0.5},
            "input": {"model": "m", "data": {}},
        },
    },
}
NOTEBOOK = {"metadata": {"papermill": {}}, "cells": [], "nbformat": 4, "nbformat_minor": 5}
WANDB = {"id": "a", "online": False, "project": "p", "entity": None, "name": "n", "group": None}
SWEEP = (ROOT / "parameters" / "sweep" / "lora_ner_span.yaml").read_bytes()


@inputs(150)
@given(st.data())
def test_run_folders(place, data):
    TRIED["run folders"] += 1
    run = place / "runs" / "r"
    files = {
        "metrics.json": (json.dumps(METRICS).encode(), damaged_json(METRICS)),
        "parameters.yaml": (LINES.encode(), damaged(LINES.encode())),
        "wandb.json": (json.dumps(WANDB).encode(), damaged_json(WANDB)),
        "03_train.ipynb": (
            b"",
            damaged_json(NOTEBOOK),
        ),
    }
    broken = data.draw(st.sampled_from(sorted(files)))
    for name, (good, bad) in files.items():
        write(run / name, data.draw(bad) if name == broken else good)
    uses = [
        lambda: current_stages(read_metrics(run), run),
        lambda: load_run_parameters(run),
        lambda: write_report(run, place / "page.html"),
        lambda: upload_stage(run, "03_train"),
        lambda: publish_run(run, place / "reports"),
    ]
    try:
        data.draw(st.sampled_from(uses))()
    except BioMergeError as error:
        assert str(error)


@inputs(10)
@given(damaged(SWEEP))
def test_sweep_files(place, content):
    TRIED["sweep files"] += 1
    path = write(place / "sweep.yaml", content)
    try:
        rank_points(read_sweep(path, [f"runs_dir={place}/none"]))
    except BioMergeError as error:
        assert str(error)


@inputs(90)
@given(
    damaged_json(
        {
            "offset_anchors": "start",
            "corpus_cue": True,
            "max_input_tokens": 512,
            "max_new_tokens": 64,
            "backbone": "b",
            "cues": ["c"],
            "default_cue": "c",
        }
    )
)
def test_manifests(place, content):
    TRIED["biomerge.json"] += 1
    write(place / "merged" / "config.json", "{}")
    write(place / "merged" / "biomerge.json", content)
    try:
        Manifest.of(read_model_folder(place / "merged")[1], where=place).cue_options()
        read_manifest(place / "merged")
    except BioMergeError as error:
        assert str(error)


@inputs(100)
@given(st.binary(max_size=60) | damaged(LINES.encode()[:400]), st.sampled_from(["a.json", "a.yaml"]))
def test_any_file_as_json_or_yaml(place, content, name):
    TRIED["any file as JSON or YAML"] += 1
    path = write(place / name, content)
    try:
        assert isinstance(read_values(path, OBJECT), dict)
    except DataError as error:
        assert str(error).startswith(str(path))


def make_answers(tokenizer) -> list[RawAnswer]:
    ids = tokenizer(" 0-7", add_special_tokens=False)["input_ids"]
    return [
        RawAnswer(ids, " 0-7", "eos", [-0.1] * (len(ids) + 1), [0.5] * (len(ids) + 1), [-0.3])
        for _ in range(4)
    ]


@inputs(90)
@given(st.data())
def test_predictions(place, tiny_tokenizer, data):
    TRIED["predictions"] += 1
    some, prompt_format = (
        make_records(4),
        PromptFormat(offset_anchors="none", corpus_cue=False, max_input_tokens=99),
    )
    chunks = [split_record(record, tiny_tokenizer, prompt_format)[0] for record in some]
    prompts = [Prompt(number, chunk, [1]) for number, chunk in enumerate(chunks)]
    path = place / "predictions.jsonl"
    write_predictions(path, whole := collect_predictions(some, prompts, make_answers(tiny_tokenizer)))
    assert read_predictions(path) == whole
    write(path, data.draw(damaged(path.read_bytes())))
    try:
        read_predictions(path)
    except DataError as error:
        assert str(error).startswith(str(path))


@inputs(80)
@given(st.data())
def test_partial_answers_are_as_they_were_written_or_refused(place, tiny_tokenizer, data):
    TRIED["partial answers"] += 1
    path, answers = place / "p.partial.jsonl", make_answers(tiny_tokenizer)
    path.unlink(missing_ok=True)
    with PartialAnswers(path, {"split": "dev"}) as partial:
        for number, answer in enumerate(answers):
            partial.add(number, answer)
    write(path, data.draw(damaged(path.read_bytes())))
    try:
        with PartialAnswers(path, {"split": "dev"}) as partial:
            assert all(answers[number] == answer for number, answer in partial.answers.items())
    except DataError as error:
        assert str(error).startswith(str(path))


# --- what a server says


@inputs(200)
@given(st.data())
def test_answers_of_a_server(tiny_tokenizer, data):
    TRIED["answers of a server"] += 1
    prompt = Prompt(0, split_record(make_records(1)[0], tiny_tokenizer, PLAIN)[0], [1, 2])
    body = {
        "choices": [
            {
                "text": " 0-7",
                "finish_reason": "stop",
                "prompt_token_ids": [1, 2],
                "token_ids": [5, 6],
                "logprobs": {"token_logprobs": [-0.1, -0.2, 0], "top_logprobs": [{"a": -0.1, "b": -2}] * 3},
            }
        ]
    }
    client = GreedyClient(server=SimpleNamespace(), tokenizer=tiny_tokenizer, max_new_tokens=8)  # type: ignore
    try:
        answer = client._read_answer(SimpleNamespace(content=data.draw(damaged_json(body))), prompt)
        [prediction] = collect_predictions(make_records(1), [prompt], [answer])
        assert all(0 <= probability <= 1.1 for probability in prediction.probabilities)
        json.dumps(answer.logprobs + answer.margins, allow_nan=False)
    except ServerError as error:
        assert str(error)


PLAIN = PromptFormat(offset_anchors="none", corpus_cue=False, max_input_tokens=99)


@inputs(60)
@given(damaged_json({"object": "list", "data": [{"id": "m", "root": "/m", "max_model_len": 512}]}))
def test_lists_of_models(content):
    TRIED["lists of models"] += 1
    try:
        assert all(isinstance(model.id, str) for model in read_models(content, "http://h/v1"))
    except ServerError as error:
        assert "http://h/v1" in str(error)


# --- checkpoints


@inputs(90)
@given(
    st.data(),
    st.sampled_from(["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]),
)
def test_no_damaged_checkpoint_is_whole(place, data, name):
    TRIED["checkpoints"] += 1
    folder = place / "checkpoint-1"
    for number, file in enumerate(
        ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
    ):
        write(folder / file, bytes([number]) * 50)
    seal_checkpoint(folder)
    assert find_damage(folder) is None
    content = data.draw(damaged(before := (folder / name).read_bytes()))
    write(folder / name, content)
    assert (find_damage(folder) is None) == (content == before)
    write(folder / name, before)
    write(folder / "checksums.json", data.draw(damaged((folder / "checksums.json").read_bytes())))
    find_damage(folder)
