"""Runs are listed newest first, and only what is named, whole and not running goes."""

import io
import json
import os

import pytest

from biomerge_lib.__main__ import main
from biomerge_lib.core.errors import BioMergeError
from biomerge_lib.experiment import jobs
from biomerge_lib.report.run_list import choose_runs, describe_runs, list_runs, remove_runs

REPLACED = ".replaced-old-20261130T181659123456"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Finished, running elsewhere, refused, moved aside, a page alone; beside them what is no run."""
    finished = {"status": "finished", "metrics": {"greedy_dev_ner_f1": 0.5, "steps": 100}}
    stages = {
        "done": {"03_train": finished},
        "busy": {"03_train": {"status": "running", "process": ["elsewhere", 1, "5"]}},
        "broken": {"03_train": {"status": "failed", "error": "DataError: train.jsonl:3"}},
        REPLACED: {"03_train": finished},
        "page": {"06_report": {"status": "finished"}},
        "data": {
            "01_tokenizer": {"status": "finished"},
            "02_data": {"status": "failed", "error": "DataError: corpora"},
        },
    }
    for age, (name, found) in enumerate(stages.items()):
        (tmp_path / "runs" / name).mkdir(parents=True)
        path = tmp_path / "runs" / name / "metrics.json"
        path.write_text(json.dumps({"stages": found}))
        os.utime(path, (2e9 - 7200 * age, 2e9 - 7200 * age))
    (tmp_path / "runs/done/merged").mkdir()
    (tmp_path / "runs/done/merged/model.safetensors").write_bytes(b"0" * 2_000_000)
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/link").symlink_to(tmp_path / "runs/done")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_no_age_is_below_zero_where_another_machines_clock_is_ahead(runs):
    assert "0.0 h" in describe_runs(list_runs(runs)[:1])  # written in 2033


def test_runs_are_listed_newest_first(runs, capsys):
    found = {run.run_id: (run.status, run.f1) for run in list_runs(runs)}
    assert list(found.items()) == [
        ("done", ("finished", 0.5)),
        ("busy", ("running", None)),
        ("broken", ("failed", None)),
        (REPLACED, ("replaced", None)),
        ("page", ("report", None)),
        ("data", ("failed", None)),
    ]
    assert main(["runs", "--json"]) == 0
    first, *_ = json.loads(capsys.readouterr().out)
    assert (first["run_id"], first["f1"], first["changed"]) == ("done", 0.5, "2033-05-18T03:33:20+00:00")
    assert first["bytes"] > 2_000_000
    assert main(["runs"]) == 0
    said = capsys.readouterr().out
    assert "broken" in said and "DataError: train.jsonl:3" in said and "6 runs in runs, 2.0 MB" in said
    assert "02_data failed: DataError: corpora" in said
    assert main(["runs", "runs/done"]) == 2
    assert "give the folder that holds the run folders" in capsys.readouterr().err


def test_only_what_is_named_is_removed_and_only_when_told(runs, capsys, monkeypatch):
    before = sorted(os.listdir(runs))
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert main(["runs", "--remove", "done"]) == 0
        assert "nothing was removed" in capsys.readouterr().out
    for other in ("other", "link", ".", "..", "", "../runs", "done/merged", "busy", "runs/busy"):
        assert main(["runs", "--yes", "--remove", "done", other]) == 2
        assert "nothing was removed" in capsys.readouterr().err
    assert main(["runs", "--yes", "--remove", "doen"]) == 2
    assert "Did you mean 'done'?" in capsys.readouterr().err
    with jobs.only_one(runs / "broken"), pytest.raises(BioMergeError, match="is training this run"):
        remove_runs(runs, choose_runs(list_runs(runs), runs, ["broken"]))
    (runs / "broken/.lock").unlink()
    assert sorted(os.listdir(runs)) == before
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["runs", "--remove", "runs/done/", "done", REPLACED]) == 0
    assert main(["runs", "--yes", "--remove", "broken"]) == 0
    assert sorted(os.listdir(runs)) == sorted(set(before) - {"done", REPLACED, "broken"})


def test_a_folder_without_runs_is_an_empty_list(tmp_path, capsys):
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"
    assert main(["runs", str(tmp_path / "none")]) == 2
