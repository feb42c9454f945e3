"""One model for several corpora: it is asked with every cue, and its page has no figure but from a run folder."""

import json
import re
import shutil

import pytest
import yaml

from benchmarks import union
from benchmarks.union import ANSWERS, SETS, ask, write_page
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record, write_records
from biomerge_lib.prompts.manifest import write_manifest
from biomerge_lib.prompts.ner_span import describe_model

WHERE = {"commit": "abc123", "device": "1 x Card", "versions": {}}


@pytest.mark.parametrize("group", SETS)
def test_every_training_composes(group):
    for words in SETS[group].values():
        last = {word.partition("=")[0]: word for word in words.split()}
        assert compose_parameters([*last.values()]).train_on == "train"


@pytest.mark.parametrize("has_cues", [True, False])
def test_a_model_is_asked_on_every_corpus_with_every_cue_that_it_knows(
    tiny_prepared, tmp_path, monkeypatch, has_cues
):
    monkeypatch.setattr(union, "PROJECT_DIR", tmp_path)
    monkeypatch.setattr(union, "CORPORA", {"one": "", "two": ""})
    for name in union.CORPORA:
        records = [Record(f"{name} reads {n} mg of it.", ((0, 3),), f"{name}{n}", name) for n in range(3)]
        for split in ("train", "dev"):
            write_records(tmp_path / f"{union.DATA}_{name}/ner/{split}.jsonl", records)
            write_records(tmp_path / f"{union.DATA}/ner/{split}.jsonl", records)
    words = [f"corpus_cue={str(has_cues).lower()}", f"data_dir={tmp_path / union.DATA}/ner"]
    parameters = compose_parameters([*words, "offset_anchors=echo_pieces", "max_new_tokens=64"])
    run = tmp_path / "runs/mine"
    shutil.copytree(tiny_prepared, run / "merged")
    write_manifest(run / "merged", describe_model(parameters))
    (run / "parameters.yaml").write_text(yaml.safe_dump(parameters.model_dump()))
    stage = {"status": "finished", "metrics": {}, "provenance": WHERE}
    told = {"run_id": "mine", "parameters": parameters.model_dump(), "stages": {"03_train": stage}}
    (run / "metrics.json").write_text(json.dumps(told))
    ask(run)
    told = json.loads((run / "metrics.json").read_text())["stages"]
    assert told["03_train"] == stage and told[ANSWERS]["status"] == "finished"
    cues = {name: ["one", "two", "any"] if has_cues else [name] for name in ("one", "two")}
    asked = {f"{name} as {cue}{end}" for name in cues for cue in cues[name] for end in ("", "_low", "_high")}
    assert told[ANSWERS]["metrics"].keys() == asked


def test_the_page_has_each_figure_of_the_folders_and_is_refused_while_one_is_missing(tmp_path):
    names = [name for group in SETS.values() for name in group]
    shown, runs = [], tmp_path / "runs"
    for number, name in enumerate(names):
        metrics = {"greedy_dev_ner_f1": (401 + number) / 1000}
        shown.append(f"**{metrics['greedy_dev_ner_f1']:.3f}**")
        stage = {"status": "finished", "metrics": metrics, "provenance": WHERE}
        asked = {f"{corpus} as {corpus}": 0.111 for corpus in union.CORPORA}
        stages = {"03_train": stage, ANSWERS: stage | {"metrics": asked}}
        (runs / name).mkdir(parents=True)
        (runs / name / "metrics.json").write_text(json.dumps({"run_id": name, "stages": stages}))
    out = tmp_path / "page.md"
    write_page(runs, out, partial=False)
    page = out.read_text()
    assert set(shown) <= set(re.findall(r"\*\*0\.\d{3}\*\*", page))
    assert page.count("**0.111**") == len(union.CORPORA) ** 2 + len(union.CORPORA)
    shutil.rmtree(runs / "union-even")
    with pytest.raises(DataError, match="not finished: union-even"):
        write_page(runs, out, partial=False)
    write_page(runs, out, partial=True)
    assert "Not measured yet: union-even." in out.read_text()
