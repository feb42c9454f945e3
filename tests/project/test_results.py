"""The page of results has no figure of ours but from a run folder, and is refused while one is missing."""

import argparse
import json
import re
import shutil

import pytest

from benchmarks import results
from benchmarks.common import choose_names, run_side_by_side
from benchmarks.controls import CONTROLS
from benchmarks.results import SETS, write_page
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import DataError
from biomerge_lib.experiment.provenance import TEST_LOG
from biomerge_lib.experiment.sweeps import read_sweep

WHERE = {"commit": "abc123", "device": "1 x Card", "versions": {"torch": "2.11.0", "peft": "0.21.0"}}


def record(runs, name, words, metrics):
    """What a run folder says, with an F1 of its own."""
    folder = runs / name
    folder.mkdir(parents=True)
    parameters = compose_parameters([*words, f"run_id={name}"]).model_dump()
    stage = {"status": "finished", "metrics": metrics, "provenance": WHERE}
    told = {"run_id": name, "parameters": parameters, "stages": {"03_train": stage}}
    (folder / "metrics.json").write_text(json.dumps(told))
    (folder / TEST_LOG).write_text("{}\n")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """(A folder of every run that the page wants, each with an F1 of its own; the F1s as the page has them.)"""
    (tmp_path / "README.md").write_text(
        "before <!-- test results: begin -->old<!-- test results: end --> after"
    )
    monkeypatch.setattr(results, "PROJECT_DIR", tmp_path)
    monkeypatch.setattr(results, "REPORTS", tmp_path)
    folder, numbers, shown = tmp_path / "results", iter(range(401, 900)), []

    def scores(prefix):
        f1 = next(numbers) / 1000
        shown.append(f"{f1:.3f}")
        return {f"{prefix}_f1": f1, f"{prefix}_f1_low": f1 - 0.3, f"{prefix}_f1_high": f1 + 0.3}

    sizes = {"test_ner_precision": 0.1, "test_ner_recall": 0.2, "test_records": 4797, "test_documents": 500}
    for group in ("test", "qwen"):
        for name, words in SETS[group].items():
            record(folder, f"results-{name}", words.split(), scores("test_ner") | sizes)
    for name, words in SETS["dev"].items():
        last = {word.partition("=")[0]: word for word in words.split()}
        record(folder, f"results-{name}", last.values(), scores("greedy_dev_ner"))
    work = dict.fromkeys(["train_seconds", "control_answer_seconds", "control_tokens_read"], 7.0)
    work |= {"control_tokens_written": 3.0, "control_invalid_rate": 0.25}
    for name, control in CONTROLS.items():
        found = {"control": name} | work | scores("control_test_ner")
        record(folder, f"controls-test-{name}", control.changes.split(), found)
    sweep = read_sweep(results.FILE)
    for number in range(len(sweep.points)):
        name = sweep.parameters(number).run_name
        record(folder, name, sweep.point_overrides(number), scores("greedy_dev_ner"))
    for seed in results.SEEDS:
        record(folder, f"{sweep.name}-best-{seed}", [], scores("greedy_dev_ner"))
    (folder / "agreement").mkdir()
    agreed = {"f1": 0.9, "low": 0.8, "high": 0.95, "documents": 204}
    stage = {"status": "finished", "metrics": agreed, "provenance": WHERE}
    (folder / "agreement/metrics.json").write_text(json.dumps({"stages": {"agreement": stage}}))
    return folder, shown


def test_every_run_folder_has_its_row_and_its_origin(runs, tmp_path):
    folder, shown = runs
    write_page(folder, tmp_path / "results.md", partial=False)
    page = (tmp_path / "results.md").read_text()
    assert [f1 for f1 in shown if f1 not in page] == []
    assert set(re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)) == {path.name for path in folder.iterdir()}
    assert "agree at 0.900 [0.800, 0.950] on the chemicals and diseases of the 204 abstracts" in page
    assert page.count("| 1 |") == len(SETS["test"]) + len(SETS["qwen"])  # how often test was scored
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before <!--") and readme.endswith("--> after") and readme.count("LoRA") == 3


@pytest.mark.parametrize(
    "name", ["results-qwen-bc2gm", "controls-test-quotes", "agreement", "bc5cdr_smollm2-best-43"]
)
def test_a_figure_without_a_run_folder_is_refused(runs, tmp_path, name):
    folder, _ = runs
    shutil.rmtree(folder / name)
    with pytest.raises(DataError, match=rf"no finished run folder for {name}\. Train and publish"):
        write_page(folder, tmp_path / "results.md", partial=False)
    assert not (tmp_path / "results.md").exists()
    write_page(folder, tmp_path / "results.md", partial=True)
    assert f"\n**Not measured yet**: `{name}`.\n" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "README.md").read_text().count("LoRA") == 3  # of the runs that are there


def test_the_readme_has_no_figure_of_a_run_that_is_not_published(runs, tmp_path):
    folder, _ = runs
    write_page(folder.rename(tmp_path / "runs"), tmp_path / "other.md", partial=True)
    assert "old" in (tmp_path / "README.md").read_text()


def test_a_run_that_has_not_finished_is_no_result(runs, tmp_path):
    folder, _ = runs
    path = folder / "results-smollm2-jnlpba/metrics.json"
    path.write_text(path.read_text().replace('"finished"', '"running"'))
    with pytest.raises(DataError, match="no finished run folder for results-smollm2-jnlpba"):
        write_page(folder, tmp_path / "results.md", partial=False)


def test_all_trainings_of_a_set_compose_and_score_what_they_should():
    for group, names in SETS.items():
        for words in names.values():
            parameters = compose_parameters(
                [*{word.partition("=")[0]: word for word in words.split()}.values()]
            )
            assert parameters.run_test_eval == (parameters.train_on == "train_dev") == (group != "dev")
            assert parameters.keep_checkpoint == "last"


def test_commands_stand_side_by_side_until_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.common.PROJECT_DIR", tmp_path)
    sleep = ["sleep", "60"]
    failed = run_side_by_side({"one": ["true"], "two": sleep, "three": sleep}, at_once=1, budget=60, stop=1.0)
    assert failed == ["three", "two"]
    assert "two: ended with -2" in capsys.readouterr().out  # an interrupt
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one.log", "two.log"]


def test_values_behind_the_names_are_values(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--names", nargs="+", default=[])
    parser.add_argument("extra", nargs="*")
    options = parser.parse_args(["--names", "two", "num_train_epochs=4"])
    assert choose_names(parser, options, ["one", "two"]) == ["two"] and options.extra == [
        "num_train_epochs=4"
    ]
    assert choose_names(parser, parser.parse_args([]), ["one", "two"]) == ["one", "two"]
    with pytest.raises(SystemExit):
        choose_names(parser, parser.parse_args(["--names", "tow"]), ["one", "two"])
    assert "tow is none of one, two" in capsys.readouterr().err
