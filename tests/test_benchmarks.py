"""Laws of the benchmarks: each starts and says how it is used."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from benchmarks.training_speed import Stopwatch
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


@pytest.mark.parametrize(
    "captures, first_measured",
    [([], 21), ([3, 5, 12], 33), ([3, 5, 16, 23], 44), (list(range(1, 200)), 121)],
)
def test_a_graphed_way_is_measured_when_its_captures_are_done(captures, first_measured):
    steps = 0
    watch = Stopwatch(
        16,
        120,
        10,
        60,
        count=lambda: (100 * steps, steps),
        compiled=lambda: sum(step <= steps for step in captures),
        when_warm=lambda: None,
    )
    control = SimpleNamespace(should_training_stop=False)
    while not control.should_training_stop:
        steps += 1
        watch.callback.on_step_end(None, SimpleNamespace(global_step=steps, max_steps=200), control)
    assert watch.warm == first_measured - 1
    assert watch.read()["measured_steps"] == 10
    assert watch.read()["tokens_a_step"] == 100
