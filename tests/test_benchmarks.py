"""Laws of the benchmarks: each starts and says how it is used."""

import importlib
import sys

import pytest

from biomerge_lib.runs import PROJECT_DIR

NAMES = sorted(path.stem for path in (PROJECT_DIR / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_shows_its_usage(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(PROJECT_DIR)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    benchmark = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")
