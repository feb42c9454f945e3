"""Notebooks are narrative and calls: small cells, no definitions, no outputs, one parameters cell."""

import json

import pandas as pd
import pytest

from biomerge_lib.decoding.predictions import Prediction
from biomerge_lib.experiment.stages import STAGES
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_table_of_stages_is_the_notebooks_and_the_readmes():
    assert [path.stem for path in NOTEBOOKS] == list(STAGES)
    readme = (NOTEBOOKS[0].parent.parent / "README.md").read_text(encoding="utf-8")
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
        assert len(source.splitlines()) <= (25 if cell is tagged[0] else 20), source
        assert "\ndef " not in f"\n{source}" and "\nclass " not in f"\n{source}"
    assert f'open_run("{path.stem}", globals()' in "".join(code[1]["source"])
    assert "run.finish(" in "".join(code[-1]["source"])
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert notebook["cells"][0]["source"][0].startswith(f"# {path.stem[:2]} ")


def test_an_f1_of_zero_is_seen_in_the_plot_over_length(monkeypatch):
    """A bar of no height is not: each says its number."""
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)
    notebook = json.loads(NOTEBOOKS[3].read_text(encoding="utf-8"))
    (source,) = (s for cell in notebook["cells"] if "by_length[" in (s := "".join(cell["source"])))
    missed = Prediction(0, "Aspirin .", "d", "x", [(0, 7)], [], [""], [[]], ["eos"], 0, 0, 0)
    found = Prediction(1, "Aspirin can " * 6, "d", "x", [(0, 7)], [(0, 7)], [""], [[]], ["eos"], 0, 0, 0)
    namespace = {"pd": pd, "predictions": [missed, found]}
    exec(source, namespace)
    axis = namespace["axis"]
    bars = [
        (tick.get_text(), bar.get_text())
        for tick, bar in zip(axis.get_xticklabels(), axis.texts, strict=True)
    ]
    plt.close(namespace["figure"])
    assert bars == [("1-10", "0.00"), ("11-20", "1.00")]
