"""One model for several corpora: it is asked with every cue, and its page has no figure but from a run folder."""

import json
import re
import shutil

import pytest
import yaml

from benchmarks import union
from benchmarks.union import ANSWERS, SETS, ask, pool, write_page
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record, read_records, write_records
from biomerge_lib.prompts.manifest import write_manifest
from biomerge_lib.prompts.ner_span import describe_model

WHERE = {"commit": "abc123", "device": "1 x Card", "versions": {}}


@pytest.mark.parametrize("group", SETS)
def test_every_training_composes(group):
    for words in SETS[group].values():
        last = {word.partition("=")[0]: word for word in words.split()}
        assert compose_parameters([*last.values()]).train_on == "train"


def test_the_part_to_share_has_no_sentence_of_another_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(union, "PROJECT_DIR", tmp_path / "project")
    monkeypatch.setattr(union, "CORPORA", {"one": "{}/one_original", "two": "{}/two_iob"})
    monkeypatch.setattr(union, "PARTS", {"one": ["one"], "two": ["two"], "shipped": ["one"]})
    for folder in ("one_original", "two_iob"):
        (tmp_path / folder).mkdir()
        for split in ("train", "dev", "test"):
            rows = "".join(f"{split}{folder}\tB-Drug\nhelped\tO\n{n}\tO\n\n" for n in range(3))
            (tmp_path / folder / f"{split}.tsv").write_text(rows)
    union.make_data(str(tmp_path))
    names = {}
    for name in ("union7", "union7_even", *(f"union7_{part}" for part in union.PARTS)):
        records = read_records(tmp_path / f"project/data/{name}/ner/train.jsonl")
        names[name] = [record.dataset for record in records]
    both, one, two = ["one"] * 3 + ["two"] * 3, ["one"] * 3, ["two"] * 3
    assert names["union7"] == names["union7_even"] == both
    assert (names["union7_one"], names["union7_two"], names["union7_shipped"]) == (one, two, one)
    card = json.loads((tmp_path / "project/data/union7_shipped/ner/data_card.json").read_text())
    assert card == {"command": "python -m benchmarks.union --data path/to/corpora"}


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
            write_records(tmp_path / f"{union.DATA}/ner/{split}.jsonl", records)  # at last those of two alone
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
    cues = {name: ["two", "any"] if has_cues else [name] for name in ("one", "two")}
    asked = {f"{name} as {cue}{end}" for name in cues for cue in cues[name] for end in ("", "_low", "_high")}
    assert told[ANSWERS]["metrics"].keys() == asked


def write_run(folder, trained, asked):
    stages = {"03_train": {"status": "finished", "metrics": trained, "provenance": WHERE}}
    stages[ANSWERS] = stages["03_train"] | {"metrics": asked}
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"run_id": folder.name, "stages": stages}))


def test_the_page_has_each_figure_of_the_folders_and_is_refused_while_one_is_missing(tmp_path):
    names = [name for group in SETS.values() for name in group]
    shown, runs = [], tmp_path / "runs"
    for number, name in enumerate(names):
        metrics = {"greedy_dev_ner_f1": (401 + number) / 1000}
        shown.append(f"**{metrics['greedy_dev_ner_f1']:.3f}**")
        cues = {"union": [*union.CORPORA, "any"], "union-shipped": [*union.SHIPPED, "any"]}
        asked = {f"{corpus} as {cue}": 0.111 for corpus in union.CORPORA for cue in cues.get(name, [corpus])}
        write_run(runs / name, metrics, asked)
    out = tmp_path / "page.md"
    write_page(runs, out, partial=False)
    page = out.read_text()
    assert set(shown) <= set(re.findall(r"\*\*0\.\d{3}\*\*", page))
    # The corpora's models and both unions on each corpus, and the unions with each cue that they know.
    assert page.count("**0.111**") == len(union.CORPORA) * (9 + 8 + len(union.SHIPPED) + 1)
    shutil.rmtree(runs / "union-even")
    with pytest.raises(DataError, match="not finished: union-even"):
        write_page(runs, out, partial=False)
    write_page(runs, out, partial=True)
    assert "Not measured yet: union-even." in out.read_text()


def test_the_models_of_one_corpus_are_pooled_by_their_counts():
    """Of 10 and 30 predicted spans 8 and 15 are right, and 12 and 20 are gold: 2 * 23 / (40 + 32)."""
    runs = [
        {"greedy_dev_ner_precision": share, "greedy_dev_pred_spans": pred, "greedy_dev_gold_spans": gold}
        for share, pred, gold in ((0.8, 10, 12), (0.5, 30, 20))
    ]
    assert pool(runs) == "**0.639**"
    assert pool([*runs, {}]) == ""


def test_the_cue_for_texts_of_unknown_origin_is_the_best_one_on_corpora_that_are_not_its_own(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(union, "CORPORA", {"one": "", "two": "", "three": ""})
    scores = {
        "one": (0.9, 0.2, 0.4),
        "two": (0.5, 0.9, 0.2),
        "three": (0.1, 0.2, 0.9),
        "any": (0.1, 0.8, 0.3),
    }
    asked = {
        f"{name} as {cue}": s
        for cue, row in scores.items()
        for name, s in zip(union.CORPORA, row, strict=True)
    }
    write_run(tmp_path / "all", {}, asked)
    write_run(tmp_path / "some", {}, {pair: s for pair, s in asked.items() if not pair.endswith("three")})
    page = union.Page(tmp_path)
    told = "\n".join(page.by_cue("all", "all"))
    assert "| two | **0.500** | **0.900** | **0.200** | 0.350, 0.200 |" in told
    assert "unknown origin: **two**, 0.350 where any has 0.200." in told  # any's 0.400 of all is two's own
    told = "\n".join(page.by_cue("some", "one, two"))  # judged by three alone, which it does not know
    assert "| mean of three, and of any there |" in told
    assert "| one | **0.900** | **0.200** | **0.400** | 0.400, 0.300 |" in told
    assert "unknown origin: **one**, 0.400 where any has 0.300." in told


def test_only_corpora_are_shared_whose_own_licence_lets_everyone_use_them():
    assert union.SHIPPED == ["bc5cdr", "bc2gm", "jnlpba", "nlmgene"]
    notes = yaml.safe_load(union.NOTES.read_text())
    assert notes.keys() >= union.CORPORA.keys()
    for name in union.CORPORA:
        assert notes[name].keys() == {"title", "entities", "source", "licence", "shared"}
        assert notes[name]["shared"] is not any(w in notes[name]["licence"] for w in ("not known", "BY-SA"))
