"""The README and the pages name only what exists, and the results are those of the files in reports/."""

import json
import re
import shlex
from pathlib import Path

import pytest

from biomerge_lib.__main__ import build_parser
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import DataError
from biomerge_lib.core.parameters import NOT_IDENTITY, PARAMETER_NAMES
from biomerge_lib.experiment.notebooks import find_notebook
from biomerge_lib.report.published import (
    BEGIN,
    END,
    folder_of_reports,
    publish_run,
    results_table,
    write_results,
)
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Made by runs, or standing for the reader's own.
GENERATED = (
    "runs/",
    "slurm/site.sh",  # a site's own
    "data/",
    "tokenizers/",
    "path/to",
    ".venv",
    "out.ipynb",
    "reports/<run>",
    "reports/report.html",
    "checkpoints/",
    "ENTITY/",
    "aaditya/",  # on the hub
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_points_to_something(page):
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    local = [(link, anchor) for link, anchor in links if not link.startswith("http")]
    assert local
    missing = [link for link, _ in local if not (page.parent / link).exists()]
    assert not missing
    targets = [(page.parent / link, anchor) for link, anchor in local if anchor]
    assert not [anchor for target, anchor in targets if anchor not in _anchors(target)]


def test_the_readme_leads_to_every_page():
    links = set(re.findall(r"\]\(([^)#]+)", README))
    assert {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md"} <= links


def test_the_clusters_page_names_what_exists():
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", page)
    paths = re.findall(r"(?:slurm|parameters)/[\w/.]+\w", page)
    assert len(links) > 3 and len(paths) > 10
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]
    assert not [path for path in paths if not path.startswith(GENERATED) and not (ROOT / path).exists()]
    site = (ROOT / "slurm/common.sh").read_text(encoding="utf-8")
    variables = re.findall(r"`([A-Z_]+)`", re.search(r"\| variable .*?\n\n", page, flags=re.S)[0])
    assert len(variables) > 8 and not [name for name in variables if f"{name}=${{{name}" not in site]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_a_command_exists(page):
    words = " ".join(commands_of(page)).split()
    paths = [word for word in words if re.fullmatch(r"[\w./<>-]+/[\w./<>*-]+", word)]
    if page.name == "README.md":
        assert "parameters/sweep/lora_ner_span.yaml" in paths
    missing = [path for path in paths if not path.startswith(GENERATED) and not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_override_is_known(page):
    for command in commands_of(page):
        if not command.startswith("python -m biomerge_lib "):
            continue
        words = shlex.split(command, comments=True)[3:]
        build_parser().parse_args([word for word in words if word != "--help"])
        overrides = [word for word in words if "=" in word]
        if words[0] == "run":
            find_notebook(words[1])
        if words[0] in ("run", "preflight", "parameters"):
            compose_parameters([word for word in overrides if "path/to" not in word])
            names = {word.partition("=")[0] for word in overrides}
            assert names <= PARAMETER_NAMES | {"task", "model", "runtime"}


def test_the_pages_have_commands():
    counts = {page.name: len(commands_of(page)) for page in PAGES}
    assert counts["README.md"] > 15 and counts["corpora.md"] > 3 and counts["backbones.md"] > 1


def test_every_make_target_on_a_page_exists():
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    named = {
        target
        for page in PAGES
        for command in commands_of(page)
        for target in re.findall(r"^make (\w+)", command)
    }
    assert {"debug", "test", "lint", "lab"} <= named <= targets


def commands_of(page: Path) -> list[str]:
    """The lines of a page's bash blocks, and the commands that stand in its text."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
    return lines + re.findall(r"`((?:python|papermill|wandb|bash|sbatch|make|pytest) [^`\n]+)`", text)


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_results_table_is_made_from_the_files():
    between = (ROOT / "reports/README.md").read_text().split(BEGIN, 1)[1].split(END, 1)[0].strip()
    assert between == results_table().strip()


def test_the_figures_are_those_of_the_page_of_results_and_of_the_command_beside_them():
    result = README.split("## Results", 1)[1].split("\n## ", 1)[0]
    command = next(line for line in commands_of(ROOT / "README.md") if "model=smollm2_135m" in line)
    assert command in result
    given = compose_parameters([word for word in command.split() if "=" in word]).model_dump()
    figures = []
    for seed in (42, 43, 44):
        run = json.loads((ROOT / f"reports/learning-headline-seed-{seed}/metrics.json").read_text())
        trained = {name: value for name, value in run["parameters"].items() if name not in NOT_IDENTITY}
        assert trained == {name: given.get(name, value) for name, value in trained.items()} | {"seed": seed}
        figures.append(f"{run['stages']['03_train']['metrics']['greedy_dev_ner_f1']:.3f}")
    assert f"{figures[0]}, {figures[1]} and {figures[2]} (three seeds; a linear-chain CRF 0.819)" in result
    page = (ROOT / "reports/results.md").read_text()
    others = set(re.findall(r"0\.\d{3}", result.partition("```bash")[0])) - {*figures, "0.819"}
    assert others and [figure for figure in others if figure not in page] == []


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
    with pytest.raises(DataError, match="no such run folder"):
        publish_run(run / "misspelt", tmp_path / "reports")
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
                "status": "finished",
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
    assert "smollm2-135m, r = 8, learning rate 0.002" in table
    metrics["parameters"] |= {"trainable": "all", "learning_rate": 3e-4}
    (tmp_path / "mine/metrics.json").write_text(json.dumps(metrics))
    assert "smollm2-135m, all weights, learning rate 0.0003" in (table := results_table(tmp_path))
    (tmp_path / "again").mkdir()
    metrics["parameters"]["seed"], metrics["stages"]["03_train"]["metrics"]["greedy_dev_ner_f1"] = 7, 0.7
    (tmp_path / "again/metrics.json").write_text(json.dumps(metrics))
    assert "| again, mine | 7, 42 | 0.600 ± 0.141 |" in (table := results_table(tmp_path))
    readme = tmp_path / "README.md"
    write_results(tmp_path)  # the first runs of a folder
    assert f"{BEGIN}\n{table}{END}\n" in readme.read_text()
    readme.write_text(f"a\n{BEGIN}\nold\n{END}\nz")
    write_results(tmp_path)
    assert readme.read_text() == f"a\n{BEGIN}\n{table}{END}\nz"


def finished_run(folder):
    folder.mkdir(parents=True)
    metrics = {"run_id": folder.name, "stages": {"03_train": {"status": "finished"}}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize(("where", "given"), [("runs/mine", "."), ("runs/mine/checkpoints", "..")])
def test_publishing_from_inside_a_run_publishes_that_run_and_removes_nothing(
    tmp_path, monkeypatch, where, given
):
    finished_run(tmp_path / "runs/mine")
    (tmp_path / where).mkdir(exist_ok=True)
    other = tmp_path / "reports/other/kept.md"
    other.parent.mkdir(parents=True)
    other.write_text("kept")
    monkeypatch.chdir(tmp_path / where)
    assert publish_run(Path(given), tmp_path / "reports") == tmp_path / "reports/mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reports", "runs"]
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["mine", "other"]
    assert other.read_text() == "kept"


@pytest.mark.parametrize(
    "make",
    [
        lambda out: finished_run(out / "another"),
        lambda out: (out.mkdir(parents=True), (out / "README.md").write_text("by hand")),
        lambda out: (finished_run(out), (out / "metrics.json").write_text('{"run_id": "another"}')),
        lambda out: (out.parent.mkdir(), out.symlink_to(finished_run(out.parent / "elsewhere"))),
        lambda out: (out.parent.mkdir(), out.write_text("a file")),
    ],
)
def test_what_is_no_earlier_copy_of_a_run_is_not_replaced(tmp_path, make):
    make(tmp_path / "reports/mine")
    before = sorted(tmp_path.rglob("*"))
    run = finished_run(tmp_path / "runs/mine")
    with pytest.raises(DataError, match=r"reports/mine: .*left alone"):
        publish_run(run, tmp_path / "reports")
    assert sorted(path for path in tmp_path.rglob("*") if "runs" not in path.parts) == before


def test_an_earlier_copy_is_replaced_as_a_whole(tmp_path):
    run = finished_run(tmp_path / "runs/mine")
    (run / "04_greedy_dev.ipynb").write_text('{"metadata": {}}')
    publish_run(run, tmp_path / "reports")
    (run / "04_greedy_dev.ipynb").unlink()
    out = publish_run(run, tmp_path / "reports")
    assert [path.name for path in out.iterdir()] == ["metrics.json"]
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["..", ".", "../docs", "/tmp", "bc5cdr-h200"])
def test_a_group_of_reports_is_a_folder_inside_them(name):
    with pytest.raises(DataError, match="that is no published run"):
        folder_of_reports(name)
