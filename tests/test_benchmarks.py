"""Laws of the benchmarks: each starts and says how it is used."""

import importlib
import sys

import pytest

from biomerge_lib.runs import PROJECT_DIR

FILES = sorted((PROJECT_DIR / "benchmarks").glob("*.py"))
PROGRAMS = [path.stem for path in FILES if "\ndef main(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_benchmark_shows_its_usage(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(PROJECT_DIR)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    benchmark = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")
