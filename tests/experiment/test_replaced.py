"""A run that is replaced goes as a whole, and what was made of another model or other data is out of date."""

import json
import re

import pytest
import yaml

from biomerge_lib.__main__ import main
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import DataError, ParameterError
from biomerge_lib.core.records import Record, write_records
from biomerge_lib.experiment.notebooks import describe_start
from biomerge_lib.experiment.provenance import TEST_LOG, data_hashes, log_test_scoring
from biomerge_lib.experiment.recorded import current_stages, read_metrics
from biomerge_lib.experiment.replaced import list_replaced
from biomerge_lib.experiment.runs import Run, open_run, prepare_run_folder
from biomerge_lib.report.page import read_answers, write_page
from biomerge_lib.report.published import results_table
from biomerge_lib.report.report_runs import collect_runs

SCORES = {"greedy_dev_ner_f1": 0.5, "greedy_dev_ner_f1_low": 0.4, "greedy_dev_ner_f1_high": 0.6}


@pytest.fixture
def parameters(tmp_path):
    for split in ("train", "dev", "test"):
        write_records(tmp_path / f"data/{split}.jsonl", [Record(f"Aspirin {split}", ((0, 7),), split, "a")])
    values = compose_parameters([]).model_dump()
    values |= {"runs_dir": f"{tmp_path}/runs", "run_id": "mine", "data_dir": f"{tmp_path}/data"}
    return lambda **others: type(compose_parameters([])).model_validate(values | others)


def train(parameters, weights):
    """What 03_train leaves."""
    run = Run(parameters.run_folder, "03_train", parameters)
    prepare_run_folder(run)
    run.start()
    run.merged.mkdir(exist_ok=True)
    (run.merged / "model.safetensors").write_bytes(weights)
    (run.folder / "checkpoints/checkpoint-9").mkdir(parents=True, exist_ok=True)
    (run.folder / "training.json").write_text("{}")
    run.finish(SCORES | {"train_seconds": 1.0})
    return run.folder


def score(parameters, stage, decoder):
    run = Run(parameters.run_folder, stage, parameters)
    run.start()
    run.predictions("dev", decoder).write_text("")
    (run.folder / f"{stage}.ipynb").write_text("{}")
    run.finish({name.replace("greedy", decoder): value + 0.1 for name, value in SCORES.items()})


def test_each_scoring_of_test_is_logged_and_training_anew_does_not_forget_it(parameters, capsys):
    folder = train(parameters(), b"old")
    score(parameters(), "04_greedy_dev", "greedy")
    assert not (folder / TEST_LOG).exists()
    score(parameters(split="test"), "04_greedy_dev", "greedy")
    prepare_run_folder(Run(folder, "03_train", parameters(existing_run="replace", seed=7)))
    train(parameters(seed=7), b"new")
    score(parameters(split="test", seed=7), "05_vllm_eval", "vllm")
    assert "05_vllm_eval scores test, for the 2. time in this run" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / TEST_LOG).read_text().splitlines()]
    assert [line["by"] for line in lines] == ["04_greedy_dev", "05_vllm_eval"]
    assert {line["test_sha256"] for line in lines} == {data_hashes(parameters().data_dir)["test"]}


def test_dev_is_not_scored_with_a_model_that_was_trained_on_it(parameters):
    folder = train(parameters(train_on="train_dev", keep_checkpoint="last"), b"weights")
    names = {"run_id": "mine", "runs_dir": str(folder.parent)}
    names["In"] = ["\n".join(["# Parameters (mine)", *(f"{name} = {names[name]!r}" for name in names)])]
    with pytest.raises(ParameterError, match=r"run mine was trained on dev, .*set split=test"):
        open_run("04_greedy_dev", names)


def test_a_run_without_its_merged_model_says_how_to_make_it(parameters):
    folder = train(parameters(merge=False), b"weights")
    words = [f"runs_dir={folder.parent}", f"run_id={folder.name}"]
    with pytest.raises(
        DataError, match=rf"mine/merged: no merged model\..* -f {folder}/parameters.yaml -p merge True"
    ):
        describe_start("04_greedy_dev", words)
    (folder / "merged/config.json").touch()
    assert not describe_start("04_greedy_dev", words)[0].merge


def test_a_replaced_run_goes_with_all_that_was_made_of_it(parameters):
    Run(parameters().run_folder, "02_data", parameters()).finish({"train_sentences": 1})
    folder = train(parameters(), b"old")
    (folder / "02_data.ipynb").write_text("{}")
    score(parameters(), "04_greedy_dev", "greedy")
    score(parameters(), "05_vllm_eval", "vllm")
    (folder / "report.html").write_text("old")
    before = {path.name for path in folder.iterdir()}

    prepare_run_folder(Run(folder, "03_train", parameters(existing_run="replace", seed=7)))

    assert {path.name for path in folder.iterdir()} == {"metrics.json", "parameters.yaml", "02_data.ipynb"}
    assert list(read_metrics(folder)["stages"]) == ["02_data"]
    [aside] = list_replaced(folder.parent)
    assert {path.name for path in (folder.parent / aside).iterdir()} == before
    assert list(read_metrics(folder.parent / aside)["stages"])[1:] == [
        "03_train",
        "04_greedy_dev",
        "05_vllm_eval",
    ]
    [run] = collect_runs(folder.parent)  # a replaced run is no run of its own
    assert (run.name, run.status, run.metrics) == ("mine", "partial", {})


def test_a_score_of_another_model_is_out_of_date_and_in_no_table(parameters, tmp_path):
    folder = train(parameters(), b"old")
    score(parameters(), "04_greedy_dev", "greedy")
    score(parameters(), "05_vllm_eval", "vllm")
    assert list(current_stages(read_metrics(folder), folder)) == [
        "03_train",
        "04_greedy_dev",
        "05_vllm_eval",
    ]
    (folder / "training.json").unlink()  # trained anew in its place, by hand
    train(parameters(), b"new")
    score(parameters(), "05_vllm_eval", "vllm")

    runs = collect_runs(folder.parent)
    assert list(runs[0].outdated) == ["04_greedy_dev"]
    assert (runs[0].score, runs[0].value([("05_vllm_eval", "vllm_dev_ner_f1")])) == (0.5, 0.6)
    assert runs[0].value([("04_greedy_dev", "greedy_dev_ner_f1")]) is None
    assert read_answers(runs)["answers_file"] == "predictions-dev-vllm.jsonl"
    page = write_page(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "04_greedy_dev is out of date, and its numbers are left out: it scored another model" in page
    assert "04_greedy_dev.html" not in page and "04_greedy_dev.ipynb" not in page
    # A published copy has no weights; what its stages recorded tells as much.
    assert results_table(folder.parent).count("**0.600**") == 1
    assert main(["publish", str(folder)]) == 2


@pytest.mark.parametrize(("split", "used"), [("train", True), ("dev", True), ("test", False)])
def test_a_run_whose_data_changed_is_out_of_date_and_not_gone_on_with(parameters, tmp_path, split, used):
    folder = train(parameters(), b"old")
    write_records(tmp_path / f"data/{split}.jsonl", [Record("Ibuprofen", ((0, 9),), "x", "a")])
    [run] = collect_runs(folder.parent)
    again = Run(folder, "03_train", parameters())
    if not used:  # run_test_eval is off
        assert (run.status, run.rank) == ("finished", 1)
        prepare_run_folder(again)
        return
    assert (run.status, run.rank) == ("outdated", None)
    assert run.reason == f"03_train is out of date: {split}.jsonl in {tmp_path}/data changed since"
    with pytest.raises(ParameterError, match=r"mine is out of date: .* or set existing_run=replace"):
        prepare_run_folder(again)
    prepare_run_folder(Run(folder, "03_train", parameters(existing_run="replace")))


def test_a_copy_without_data_or_weights_keeps_its_rank(parameters, tmp_path):
    folder = train(parameters(), b"old")
    score(parameters(), "04_greedy_dev", "greedy")
    for name in ("merged/model.safetensors", "training.json"):
        (folder / name).unlink()
    (folder / "checkpoints/checkpoint-9").rmdir()
    write_records(tmp_path / "data/dev.jsonl", [Record("Ibuprofen", ((0, 9),), "x", "a")])
    [run] = collect_runs(folder.parent)
    assert (run.rank, run.outdated) == (1, {})


def test_replaced_runs_are_listed_with_their_size_and_only_they_are_removed(tmp_path, capsys, monkeypatch):
    name = ".replaced-mine-20261130T181659123456"
    (tmp_path / "runs" / name / "merged").mkdir(parents=True)
    (tmp_path / "runs" / name / "merged/model.safetensors").write_bytes(b"0" * 2_000_000)
    (tmp_path / "runs/mine").mkdir()
    (tmp_path / "runs/.replaced-by-hand").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs/.replaced-link-20261130T181659123456").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert main(["replaced"]) == 0
    said = capsys.readouterr().out
    assert (
        re.search(rf"^{re.escape(name)} +replaced +2\.0 MB ", said, re.M) and "1 runs in runs, 2.0 MB" in said
    )
    for other in (
        "mine",
        ".",
        "..",
        "",
        "../elsewhere",
        ".replaced-by-hand",
        ".replaced-link-20261130T181659123456",
        f"{name}/merged",
        str(tmp_path),
    ):
        assert main(["replaced", "runs", "--remove", name, other]) == 2
        assert "no such run in runs; nothing was removed" in capsys.readouterr().err
    assert list_replaced(tmp_path / "runs") == {name: 2_000_000}
    assert main(["replaced", "runs", "--remove", name]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "runs"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        ".replaced-by-hand",
        ".replaced-link-20261130T181659123456",
        "mine",
    ]


def test_parameters_yaml_of_a_replaced_run_trains_it_again(parameters):
    folder = train(parameters(), b"old")
    prepare_run_folder(Run(folder, "03_train", parameters(existing_run="replace", seed=7)))
    [aside] = list_replaced(folder.parent)
    stored = yaml.safe_load((folder.parent / aside / "parameters.yaml").read_text())
    assert (stored["seed"], json.loads((folder.parent / aside / "metrics.json").read_text())["run_id"]) == (
        42,
        "mine",
    )


def test_a_test_set_is_scored_where_the_log_cannot_be_written(tmp_path, capsys):
    """As with the run of someone else; here a folder stands in its place."""
    (tmp_path / TEST_LOG).mkdir()
    log_test_scoring(tmp_path, "eval_vllm", tmp_path)
    assert f"{tmp_path / TEST_LOG} cannot say (Is a directory): note it yourself" in capsys.readouterr().out
