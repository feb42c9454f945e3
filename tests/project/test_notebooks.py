"""Notebooks are narrative and calls: small cells, no definitions, no outputs, one parameters cell."""

import json
import re

import pytest

from biomerge_lib.experiment.stages import STAGES
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_table_of_stages_is_the_notebooks_and_the_readmes():
    assert [path.stem for path in NOTEBOOKS] == list(STAGES)
    readme = (NOTEBOOKS[0].parent.parent / "docs/pipeline.md").read_text(encoding="utf-8")
    rows = [f"| {name} | {stage.reads} | {stage.writes} |\n" for name, stage in STAGES.items()]
    assert "| notebook | reads | writes |\n|---|---|---|\n" + "".join(rows) in readme


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_house_rules(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert 8 <= len(notebook["cells"]) <= 27
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["source"][0].startswith("# Parameters")
    for cell in code:
        assert not cell["outputs"] and cell["execution_count"] is None
        source = "".join(cell["source"])
        assert cell is tagged[0] or len(source.splitlines()) <= 20, source
        assert "\ndef " not in f"\n{source}" and "\nclass " not in f"\n{source}"
    assert f'open_run("{path.stem}", globals()' in "".join(code[1]["source"])
    assert "run.finish(" in "".join(code[-1]["source"])
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert notebook["cells"][0]["source"][0].startswith(f"# {path.stem[:2]} ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_six_figures_at_most_and_folds_the_rest(path):
    """All go through ``show_figures``, which gives them alternative texts and the ink of a dark theme."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "pyplot" not in source and "plt." not in source
    calls = re.findall(r"show_figures\((\[figure\]|.*shown=(\d))\)", source)
    assert len(calls) == source.count("show_figures(")
    live = path.stem == "03_train"
    assert sum(int(shown or 1) for _, shown in calls) + live <= 6
    named = source.count("figure.set_label(")
    assert named == sum(call == "[figure]" for call, _ in calls)
