"""The README names only what exists, and its results are those of the files in reports/."""

import json
import re
from pathlib import Path

import pytest

from biomerge_lib.errors import DataError
from biomerge_lib.parameters import PARAMETER_NAMES, compose_parameters
from biomerge_lib.published import BEGIN, END, publish_run, results_table, write_results

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Made by runs, or standing for the reader's own.
GENERATED = (
    "runs/",
    "data/",
    "tokenizers/",
    "path/to",
    ".venv",
    "out.ipynb",
    "reports/<run>",
    "checkpoints/",
)


def test_every_link_points_to_something():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 15
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_clusters_page_names_what_exists():
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", page)
    paths = re.findall(r"(?:slurm|parameters)/[\w/.]+\w", page)
    assert len(links) > 3 and len(paths) > 10
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]
    assert not [path for path in paths if not (ROOT / path).exists()]
    site = (ROOT / "slurm/common.sh").read_text(encoding="utf-8")
    variables = re.findall(r"`([A-Z_]+)`", re.search(r"\| variable .*?\n\n", page, flags=re.S)[0])
    assert len(variables) > 8 and not [name for name in variables if f"{name}=${{{name}" not in site]


def test_every_path_in_a_command_exists():
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S)) + "\n".join(
        re.findall(r"`((?:python|papermill|wandb|bash|sbatch) [^`]+)`", README)
    )
    paths = [
        word for word in re.findall(r"[\w./<>-]+/[\w./<>-]+", commands) if not word.startswith(GENERATED)
    ]
    assert "parameters/sweep/lora_ner_span.yaml" in paths
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_every_override_in_a_command_is_a_parameter():
    commands = re.findall(r"python -m biomerge_lib (?:run \w+|preflight) ([^`\n]*)", README)
    assert len(commands) >= 4
    names = {word.partition("=")[0] for command in commands for word in command.split() if "=" in word}
    assert names <= PARAMETER_NAMES | {"task", "model", "runtime"}
    for command in commands:
        compose_parameters([word for word in command.split() if "=" in word])


def test_the_results_table_is_made_from_the_files():
    between = README.split(BEGIN, 1)[1].split(END, 1)[0].strip()
    assert between == results_table().strip()


def test_every_published_run_says_where_its_numbers_come_from():
    runs = [json.loads(path.read_text()) for path in (ROOT / "reports").glob("*/metrics.json")]
    runs = [run for run in runs if "03_train" in run.get("stages", {})]
    assert runs
    for run in runs:
        for stage in run["stages"].values():
            assert stage["status"] == "finished"
            assert {"commit", "device", "versions", "python"} <= stage["provenance"].keys()
            assert stage["provenance"]["commit"]
        assert run["data"].keys() == {"train", "dev", "test"}


def test_only_finished_runs_are_published(tmp_path):
    run = tmp_path / "runs/x"
    run.mkdir(parents=True)
    with pytest.raises(DataError, match="has not finished"):
        publish_run(run, tmp_path / "reports")
    (run / "metrics.json").write_text(json.dumps({"stages": {"03_train": {"status": "failed"}}}))
    with pytest.raises(DataError, match="has not finished"):
        publish_run(run, tmp_path / "reports")


def test_a_published_run_names_no_folder_of_the_machine_that_made_it(tmp_path):
    run = tmp_path / "elsewhere/project/runs/x"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps({"stages": {"03_train": {"status": "finished"}}}))
    notebook = {
        "cells": [{"outputs": [f"read {tmp_path}/corpora/bc5cdr_iob and {ROOT}/data"]}],
        "metadata": {
            "papermill": {
                "input_path": f"{tmp_path}/elsewhere/project/notebooks/03_train.ipynb",
                "output_path": f"{run}/03_train.ipynb",
                "parameters": {"corpora": [f"{tmp_path}/corpora/bc5cdr_iob"]},
            }
        },
    }
    (run / "03_train.ipynb").write_text(json.dumps(notebook))
    text = (publish_run(run, tmp_path / "reports") / "03_train.ipynb").read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text
    assert "read bc5cdr_iob and data" in text and '"runs/x/03_train.ipynb"' in text


def test_the_table_holds_what_metrics_json_says(tmp_path):
    f1 = {"ner_f1": 0.5, "ner_f1_low": 0.4, "ner_f1_high": 0.6, "records": 64}
    metrics = {
        "parameters": compose_parameters([]).model_dump(),
        "stages": {
            "02_data": {"metrics": {"train_sentences": 4560}},
            "03_train": {
                "metrics": {f"greedy_dev_{name}": value for name, value in f1.items()}
                | {"train_seconds": 61.5},
                "provenance": {"device": "1 x NVIDIA H200"},
            },
            "05_vllm_eval": {"metrics": {f"vllm_dev_{name}": value for name, value in f1.items()}},
        },
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/metrics.json").write_text(json.dumps(metrics))
    table = results_table(tmp_path)
    assert "sample, 100% of 4,560" in table and "1 x NVIDIA H200, 62" in table
    assert table.count("**0.500** [0.400, 0.600], 64 sentences") == 2 and "| — |" in table
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{BEGIN}\nold\n{END}\nz")
    write_results(readme, tmp_path)
    assert readme.read_text() == f"a\n{BEGIN}\n{table}{END}\nz"
