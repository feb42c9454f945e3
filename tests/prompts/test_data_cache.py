"""Splits are parsed once, draws repeat, cues reach the prompt, and tokens are cached until something changes."""

import json
from dataclasses import replace

import pytest

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record, parse_record, read_records, write_records
from biomerge_lib.corpora.conversion import write_corpus
from biomerge_lib.prompts import ner_span
from biomerge_lib.prompts.ner_span import (
    build_dataset,
    cue_record,
    describe_model,
    encode_example,
    hash_records,
    hash_tokenizer,
    read_split,
    train_datasets,
)
from tests.conftest import ASPIRIN

PROMPTS = PromptFormat(offset_anchors="start", corpus_cue=True, max_input_tokens=300)
PLAIN = replace(PROMPTS, corpus_cue=False)
EXAMPLES = {"prompt_format": PROMPTS, "max_target_tokens": 64}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_corpus(["sample"], folder)
    return folder


def test_a_subsample_is_a_share_of_the_documents(data_dir):
    everything = read_split(data_dir, "train")
    assert everything == read_records(data_dir / "train.jsonl")
    half = read_split(data_dir, "train", subsample=0.5, seed=1)
    assert len({record.doc_id for record in half}) == 28
    chosen = {record.doc_id for record in half}
    assert half == [record for record in everything if record.doc_id in chosen]
    assert half == read_split(data_dir, "train", subsample=0.5, seed=1)
    assert half != read_split(data_dir, "train", subsample=0.5, seed=2)
    assert len({record.doc_id for record in read_split(data_dir, "train", subsample=0.001)}) == 1


def test_a_limit_is_spread_evenly(data_dir):
    everything = read_split(data_dir, "dev")
    for limit in (1, 8, 85, 86, 1000):
        expected = [everything[index * 86 // limit] for index in range(limit)] if limit < 86 else everything
        assert read_split(data_dir, "dev", limit=limit) == expected
    part = read_split(data_dir, "dev", subsample=0.5)
    assert read_split(data_dir, "dev", subsample=0.5, limit=5) == [part[i * len(part) // 5] for i in range(5)]


def test_a_split_is_parsed_once_and_a_bad_line_stops_it(tmp_path, monkeypatch):
    write_records(tmp_path / "train.jsonl", [ASPIRIN])
    assert read_split(tmp_path, "train") == [ASPIRIN]
    with monkeypatch.context() as patched:
        patched.setattr(ner_span, "iter_records", lambda path: pytest.fail("parsed again"))
        assert read_split(tmp_path, "train", subsample=0.5, limit=7) == [ASPIRIN]
        assert train_datasets(tmp_path) == {"example"}
    write_records(tmp_path / "train.jsonl", [ASPIRIN, ASPIRIN])  # a file that is written anew is another one
    assert read_split(tmp_path, "train") == [ASPIRIN, ASPIRIN]
    (tmp_path / "train.jsonl").write_text(ASPIRIN.to_json() + "\n{broken\n")
    with pytest.raises(DataError, match=r"train\.jsonl:2: not JSON"):
        read_split(tmp_path, "train", subsample=0.5)
    with pytest.raises(DataError, match=r"dev\.jsonl: no such file"):
        read_split(tmp_path, "dev", limit=3)


def test_a_records_cue_comes_from_its_line_or_its_corpus():
    assert PROMPTS.cue(ASPIRIN) == "example" and PLAIN.cue(ASPIRIN) is None
    line = json.dumps(json.loads(ASPIRIN.to_json()) | {"cue": "bc5cdr"})
    named = parse_record(line, "here:1")
    assert PROMPTS.cue(named) == "bc5cdr" and named.dataset == "example"
    assert json.loads(named.to_json())["cue"] == "bc5cdr" and "cue" not in ASPIRIN.to_json()
    with pytest.raises(DataError, match="here:1: cue: Input should be a valid string"):
        parse_record(line.replace('"bc5cdr"', "7"), "here:1")


def test_unseen_corpora_get_the_default_cue(tmp_path):
    mine, other = Record("a b", (), "d", "mine"), Record("c d", (), "d", "other", cue="mine")
    write_records(tmp_path / "train.jsonl", [ASPIRIN])
    write_records(tmp_path / "dev.jsonl", [ASPIRIN, mine, other])
    assert train_datasets(tmp_path) == {"example"}
    records = read_split(tmp_path, "dev", default_cue="any")
    assert [PROMPTS.cue(record) for record in records] == ["example", "any", "mine"]
    assert [record.dataset for record in records] == ["example", "mine", "other"]
    assert [record.cue for record in read_split(tmp_path, "dev")] == [None, None, "mine"]
    # Another model's corpora, where the data have a train split of their own.
    records = read_split(tmp_path, "dev", default_cue="any", trained=["mine"])
    assert [PROMPTS.cue(record) for record in records] == ["any", "mine", "mine"]


def test_a_run_trains_and_is_scored_with_the_cues_its_parameters_ask_for(tiny_parameters, tmp_path):
    from biomerge_lib.prompts.ner_span import read_training_splits

    mine = [Record(f"word {n}", ((0, 4),), f"d{n}", "mine") for n in range(200)]
    write_records(tmp_path / "train.jsonl", mine)
    write_records(tmp_path / "dev.jsonl", [ASPIRIN, *mine[:3]])
    parameters = tiny_parameters(data_dir=str(tmp_path), corpus_cue=True, eval_limit=None, subsample=1.0)
    assert describe_model(parameters).cues == ["mine"]
    cued = read_training_splits(parameters)
    assert {record.cue for record in cued["train"]} == {None, "any"}
    assert 5 < sum(record.cue == "any" for record in cued["train"]) < 40
    assert [record.cue for record in cued["dev"]] == ["any", None, None, None]
    plain = read_training_splits(tiny_parameters(data_dir=str(tmp_path), eval_limit=None, subsample=1.0))
    assert not any(record.cue for split in plain.values() for record in split)


def test_some_training_records_learn_the_default_cue_and_always_the_same_ones(data_dir):
    options = {"default_cue": "any", "cue_dropout": 0.25}
    records = read_split(data_dir, "train", **options, seed=3)
    dropped = [record.text for record in records if record.cue == "any"]
    assert 80 < len(dropped) < 145 and len(records) == 448
    assert records == read_split(data_dir, "train", **options, seed=3)
    assert dropped != [r.text for r in read_split(data_dir, "train", **options, seed=4) if r.cue == "any"]
    assert not any(r.cue for r in read_split(data_dir, "train", default_cue="any", cue_dropout=0.0))
    assert cue_record(ASPIRIN, trained=["example"], default_cue="any") is ASPIRIN
    # A trained corpus's name keeps its meaning.
    assert not any(r.cue for r in read_split(data_dir, "train", default_cue="sample", cue_dropout=0.9))


def test_a_data_set_is_its_records_examples_one_by_one(tokenizer, data_dir):
    records = [record for record in read_split(data_dir, "train") if len(record.text) < 150]
    dataset = build_dataset(records, tokenizer, **EXAMPLES)
    assert len(dataset) == len(records) == 395
    for record, example in zip(records, dataset, strict=True):
        expected = encode_example(record, tokenizer, PROMPTS)
        assert {name: example[name] for name in expected} == expected
        assert example["length"] == len(expected["input_ids"])
        assert example["prompt_length"] == expected["labels"].count(-100)


def test_memory_and_cache_hold_the_same_examples(tokenizer, data_dir, tmp_path):
    records = read_split(data_dir, "train")
    in_memory = list(build_dataset(records, tokenizer, **EXAMPLES))
    assert len(in_memory) > len(records)  # some are chunked
    assert list(build_dataset(records, tokenizer, cache_dir=tmp_path, **EXAMPLES)) == in_memory


def test_tokenised_data_are_read_again_only_when_nothing_changed(tokenizer, data_dir, tmp_path, monkeypatch):
    records = read_split(data_dir, "dev")

    def files_after(records, **changed) -> int:
        build_dataset(records, tokenizer, cache_dir=tmp_path, **(EXAMPLES | changed))
        return len(list(tmp_path.iterdir()))

    assert [files_after(records), files_after(records)] == [1, 1]
    monkeypatch.setattr(
        "biomerge_lib.prompts.prompt.encode_many", lambda *a, **k: pytest.fail("tokenised again")
    )
    assert len(build_dataset(records, tokenizer, cache_dir=tmp_path, **EXAMPLES)) >= len(records)
    monkeypatch.undo()
    assert files_after(records[:-1]) == 2
    assert files_after(records, prompt_format=replace(PROMPTS, offset_anchors="none")) == 3
    assert files_after(records, prompt_format=PLAIN) == 4
    assert files_after(records, max_target_tokens=48) == 5
    changed = Record(records[0].text, ((0, 3),), records[0].doc_id, records[0].dataset)
    assert files_after([changed, *records[1:]]) == 6
    monkeypatch.setattr(ner_span, "_code_hash", lambda: "other code")
    assert files_after(records) == 7


def test_an_interrupted_write_leaves_nothing_behind(tokenizer, data_dir, tmp_path):
    word = Record("ACGT" * 400, (), "gene", "x")
    with pytest.raises(DataError, match="cannot be cut"):
        build_dataset([*read_split(data_dir, "dev"), word], tokenizer, cache_dir=tmp_path, **EXAMPLES)
    assert not list(tmp_path.iterdir())


def test_names_of_content_tell_differences(tokenizer, plain_tokenizer, data_dir):
    a, b = Record("a b", ((0, 1),), "d", "x"), Record("a b", ((0, 3),), "d", "x")
    assert len({hash_records([one]) for one in (a, b, Record("a b", ((0, 1),), "d", "x", cue="y"))}) == 3
    assert hash_records([a, b]) != hash_records([b, a])
    assert hash_tokenizer(tokenizer) == hash_tokenizer(tokenizer) != hash_tokenizer(plain_tokenizer)
