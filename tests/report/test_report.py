"""The report ranks finished runs only, says what is broken, escapes what it shows, and loads nothing."""

import base64
import itertools
import json
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook, new_output

from biomerge_lib.__main__ import main
from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import SPLITS, Record, write_records
from biomerge_lib.core.spans import parse_spans
from biomerge_lib.decoding.predictions import Prediction, read_predictions, write_predictions
from biomerge_lib.experiment.provenance import data_hashes
from biomerge_lib.report import report_notebooks
from biomerge_lib.report.answer_figures import draw_weaknesses
from biomerge_lib.report.display import MARKS, highlight, highlight_errors, show_html
from biomerge_lib.report.page import read_answers, write_page, write_report
from biomerge_lib.report.report_figures import as_svg, draw_curves, draw_scores, draw_sweep, show_figures
from biomerge_lib.report.report_notebooks import link_notebooks
from biomerge_lib.report.report_runs import collect_runs, group_runs, runs_table, seeds_table
from biomerge_lib.scoring.breakdown import find_weaknesses
from tests.conftest import ROOT

ASPIRIN = "Aspirin can trigger asthma attacks in sensitive patients ."
PROVENANCE = {
    "commit": "0123456789ab",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
    "device": "1 x NVIDIA H200",
}


def make_run(runs_dir, name, f1, *, glued=None, status="finished", notebook=True, **parameters):
    """A run folder as 03_train leaves it, with the F1's interval 0.018 to either side."""
    folder = runs_dir / name
    folder.mkdir(parents=True)
    parameters = {"learning_rate": 0.002, "lora_rank": 8, "fast_metrics": True, "run_id": name} | parameters
    metrics = {
        "greedy_dev_ner_f1": f1,
        "greedy_dev_ner_f1_low": f1 - 0.018,
        "greedy_dev_ner_f1_high": f1 + 0.018,
        "eval_ner_f1": f1 + 0.004,
        "train_seconds": 183.25,
        "train_tokens_per_second": 20345.2,
        "peak_memory_gb": 11.31,
    }
    stage = {"status": status, "started": "2026-11-20T10:00:00+00:00", "provenance": PROVENANCE}
    stages = {"03_train": stage | ({"metrics": metrics} if status == "finished" else {})}
    recorded = {"run_id": name, "parameters": parameters, "data": {"dev": "ab" * 32}, "stages": stages}
    (folder / "metrics.json").write_text(json.dumps(recorded))
    (folder / "parameters.yaml").write_text(yaml.safe_dump(parameters))
    log = [{"step": step, "loss": 2 / step, "greedy_dev_ner_f1": f1 * step / 9} for step in range(1, 10)]
    (folder / "log_history.json").write_text(json.dumps(log))
    if notebook:
        glue(folder / "03_train.ipynb", metrics | (glued or {}))
    return folder


def glue(path, scraps):
    outputs = [
        new_output(
            "display_data",
            data={"application/scrapbook.scrap.json+json": dict(name=k, data=v, encoder="json", version=1)},
            metadata={"scrapbook": {"name": k, "data": True, "display": False}},
        )
        for k, v in scraps.items()
    ]
    nbformat.write(new_notebook(cells=[new_code_cell("run.finish(metrics)", outputs=outputs)]), path)


def prediction(index, text, gold, pred, dataset="bc5cdr", **fields):
    doc_id = fields.pop("doc_id", f"{dataset}_{index}")
    return Prediction(index, text, doc_id, dataset, gold, pred, [""], [[]], ["eos"], 0, 0, 0, **fields)


FILE = "predictions-dev-greedy.jsonl"
GOLD = [(0, 7), (20, 34)]


def make_pair(runs_dir):
    """Two runs with predictions of six documents of two sentences; the second one misses a mention of each."""
    for name, f1, pred in (("best", 0.8, GOLD), ("second", 0.6, GOLD[:1])):
        found = [
            prediction(
                n,
                ASPIRIN,
                GOLD,
                pred,
                doc_id=f"d{n // 2}",
                probabilities=[0.9] * len(pred),
                gold_types=["Chemical", "Disease"],
            )
            for n in range(12)
        ]
        write_predictions(make_run(runs_dir, name, f1) / FILE, found)
    return [runs_dir / "best", runs_dir / "second"]


def test_the_page_says_whether_runs_differ_by_more_than_chance_and_where_the_best_fails(tmp_path):
    make_pair(tmp_path / "runs")
    page = page_of(tmp_path / "runs", tmp_path / "report.html")
    assert "paired over 6 documents" in page
    # All 24 found, and 12 of 24: F1 1 and 2/3. Six documents differ in one direction: p = 2 / 2**6.
    assert "<td>0.6667</td><td>-0.3333</td><td>-0.3333 to -0.3333</td><td>0.0312</td>" in page.replace(
        "\n", ""
    )
    assert 'aria-label="Gold type: Chemical 1.000 of 12, Disease 1.000 of 12."' in page
    assert 'aria-label="Boundary errors: left 0, right 0, both 0."' in page
    assert "calibration error 0.100" in page
    assert "seen and unseen mentions are not told apart" in page and "string in training:" not in page


@pytest.mark.integration
def test_tables_fit_a_laptop_and_scroll_in_their_boxes_on_a_phone(tmp_path, browser):
    for run in make_pair(tmp_path / "runs"):
        recorded = json.loads((run / "metrics.json").read_text())
        versions = {"torch": "2.13.0", "transformers": "5.1.0", "peft": "0.20.0", "papermill": "2.7.0"}
        trained = recorded["stages"]["03_train"]
        trained["provenance"] = PROVENANCE | {"versions": versions}
        measured = (
            "greedy_dev_ner_precision",
            "greedy_dev_ner_recall",
            "eval_answer_ner_f1",
            "eval_head_ner_f1",
        )
        trained["metrics"] |= dict.fromkeys(measured, 0.5)
        recorded["stages"]["04_greedy_dev"] = {"status": "finished", "metrics": {"greedy_dev_ner_f1": 0.5}}
        recorded["parameters"]["data_dir"] = "data/a-corpus-of-mine/ner"
        recorded["data"] = {split: "ab" * 32 for split in SPLITS}
        (run / "metrics.json").write_text(json.dumps(recorded))
    page = write_report(tmp_path / "runs", tmp_path / "report.html")
    too_wide = """return [...document.querySelectorAll("body, .box, .wide")]
        .filter(box => box.scrollWidth > box.clientWidth).map(box => box.ariaLabel || box.tagName)"""
    for width, wide in ((1280, []), (390, ["Finished runs"])):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.as_uri())
        found = browser.execute_script(too_wide)
        assert set(wide) <= set(found) if wide else not found
        assert "BODY" not in found
    style = "return getComputedStyle(document.querySelector('.box'))"
    assert browser.execute_script(f"{style}.scrollbarWidth") == "thin"
    assert browser.execute_script(f"{style}.backgroundAttachment") == "local, scroll"


def test_the_page_says_what_the_data_hold_and_nothing_of_02s_parameters(tmp_path):
    """03's own ``corpora`` is a default, whatever it was trained on."""
    data = tmp_path / "data"
    record = Record(ASPIRIN, ((0, 7),), "d", "mine")
    for split in SPLITS:
        write_records(data / f"{split}.jsonl", [record])
    folder = make_run(tmp_path / "runs", "best", 0.8, corpora=["sample"], data_dir=str(data))
    recorded = json.loads((folder / "metrics.json").read_text())
    trained_on = '<th scope="row">trained on</th>'
    assert trained_on not in (page := page_of(folder, tmp_path / "report.html")) and "corpora" not in page
    (folder / "metrics.json").write_text(json.dumps(recorded | {"data": data_hashes(data)}))
    page = page_of(folder, tmp_path / "report.html").replace("\n", "")
    assert f"{trained_on}<td>mine</td>" in page and "sample" not in page


def test_an_adapter_that_answered_the_best_runs_sentences_stands_beside_it(tmp_path):
    best, second = make_pair(tmp_path / "runs")
    theirs = read_predictions(second / FILE)
    write_predictions(best / "predictions-dev-greedy-bc-135m-0123456789ab-01234567.jsonl", theirs)
    write_predictions(best / "predictions-dev-greedy-gone-0123456789ab-01234567.jsonl", theirs[:3])
    page = page_of(best, tmp_path / "report.html").replace("\n", "")
    row = '<th scope="row">the adapter bc-135m</th><td>0.6667</td><td>-0.3333</td>'
    assert row in page and "The second" not in page and "gone" not in page


def test_vllms_answers_one_by_one_are_no_adapters(tmp_path):
    best, second = make_pair(tmp_path / "runs")
    (best / FILE).rename(best / "predictions-dev-vllm.jsonl")
    shutil.copy(second / FILE, best / "predictions-dev-vllm-one-by-one.jsonl")
    page = page_of(best, tmp_path / "report.html")
    assert "predictions-dev-vllm.jsonl" in page and "the adapter" not in page


def test_a_recall_of_zero_is_seen_and_a_types_name_is_no_formula():
    """A bar of no height is not: each says its number."""
    found = [prediction(0, ASPIRIN, GOLD, GOLD[:1], gold_types=["Chemical", "Di$ea_$e"])]
    figure = draw_weaknesses(find_weaknesses(found))["Gold type"]
    texts = re.findall(r"<text[^>]*>(.*?)</text>", as_svg(figure))
    assert {"Chemical", "1.000 of 1", "Di$ea_$e", "0.000 of 1"} <= set(texts)


def test_compare_reads_run_folders_and_files(tmp_path, capsys):
    best, second = make_pair(tmp_path)
    assert (
        main(
            [
                "compare",
                str(second),
                str(best / FILE),
            ]
        )
        == 0
    )
    page = capsys.readouterr().out
    assert "| 1.0000 | +0.3333 | +0.3333 to +0.3333 | 0.0312 |" in page
    assert (
        "Exact-span micro F1 of 12 records; differences from the first line, paired over 6 documents." in page
    )
    found = [replace(one, doc_id="") for one in read_predictions(best / FILE)]
    write_predictions(tmp_path / "old.jsonl", found)
    assert main(["compare", str(tmp_path / "old.jsonl"), str(tmp_path / "old.jsonl")]) == 0
    assert "paired over 12 sentences (documents are not known, or have one each)." in capsys.readouterr().out


def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys):
    best, second = make_pair(tmp_path)
    write_predictions(tmp_path / "few.jsonl", read_predictions(best / FILE)[:3])
    (second / FILE).rename(second / "predictions-test-vllm.jsonl")
    for places, why in (
        ([best, tmp_path / "nowhere"], "nowhere: no such file."),
        ([best, second], f"second/{FILE}: no such file. 04_greedy_dev and 05_vllm_eval write predictions."),
        ([best, tmp_path / "few.jsonl"], "predictions of 12 and of 3 records cannot be compared."),
        ([best], "compare takes two runs or more"),
    ):
        assert main(["compare", *map(str, places)]) == 2
        assert why in capsys.readouterr().err


def page_of(paths, out):
    return write_report(paths, out).read_text(encoding="utf-8")


def test_finished_runs_are_ranked_by_greedy_dev_f1_and_no_others(tmp_path):
    make_run(tmp_path, "middle", 0.70)
    make_run(tmp_path, "best", 0.73)
    make_run(tmp_path, "worst", 0.10)
    make_run(tmp_path, "going", 0.99, status="running", notebook=False)
    broke = make_run(tmp_path, "broke", 0.99, status="failed", notebook=False)
    recorded = json.loads((broke / "metrics.json").read_text())
    recorded["stages"]["03_train"]["error"] = "OutOfMemoryError: <b>2 GiB</b>"
    (broke / "metrics.json").write_text(json.dumps(recorded))

    runs = collect_runs(tmp_path)

    assert [(run.rank, run.name) for run in runs if run.rank] == [(1, "best"), (2, "middle"), (3, "worst")]
    assert [(run.name, run.status) for run in runs if not run.rank] == [
        ("broke", "failed"),
        ("going", "partial"),
    ]
    assert runs_table(runs)["greedy dev F1"].tolist() == [0.73, 0.70, 0.10]
    page = page_of([tmp_path], tmp_path / "report.html")
    assert "<h1>best</h1>" in page
    assert "95 % interval 0.712–0.748" in page
    assert "3 finished, 1 failed, 1 partial" in page
    assert "OutOfMemoryError: &lt;b&gt;2 GiB&lt;/b&gt;" in page
    assert page.count("executed notebooks") == 1  # the two others kept none
    assert "was killed (started 2026-11-20T10:00:00+00:00)" in page
    assert "0.990" not in page


def test_the_command_names_what_differs_from_the_defaults(tmp_path):
    make_run(tmp_path, "best", 0.73, lora_rank=16, deepspeed="a b.json")
    page = page_of(tmp_path, tmp_path / "report.html")
    command = re.search(r'<pre[^>]*"Command of the best run">(.*?)</pre>', page, re.S)[1]
    assert command == (
        "python -m biomerge_lib run 03_train \\\n  deepspeed=a b.json \\\n  lora_rank=16 \\\n  run_id=best"
    ).replace("deepspeed=a b.json", "&#39;deepspeed=a b.json&#39;")


def test_the_best_runs_errors_stand_highlighted_and_escaped_in_the_page(tmp_path):
    folder = make_run(tmp_path, "best", 0.73)
    script = "<script>alert(1)</script> harms patients ."
    write_predictions(
        folder / "predictions-dev-greedy.jsonl",
        [
            prediction(0, ASPIRIN, [(0, 7), (20, 34)], [(0, 7), (20, 26)]),
            prediction(1, script, [], [(32, 40)], dataset="jnlpba"),
            prediction(2, "No disease here .", [(3, 10)], []),
        ],
    )
    page = page_of(tmp_path, tmp_path / "report.html")
    assert '<mark class="overlap">asthma</mark><mark class="missed"> attacks</mark>' in page
    assert "bc5cdr_0: gold 20-34 “asthma attacks”, predicted 20-26 “asthma”" in page
    assert '&lt;script&gt;alert(1)&lt;/script&gt; harms <mark class="spurious">patients</mark>' in page
    assert "<script" not in page
    for kind, count in (("missed", 1), ("spurious", 1), ("boundary", 1), ("merged", 0), ("split", 0)):
        assert f'<tr><th scope="row">{kind}</th><td class="n">{count}</td>' in page
    # By corpus: bc5cdr has 1 of 3 gold right and 1 spurious prediction, 2 * 1 / (2 + 1 + 2) = 0.4.
    assert (
        '<th scope="row">bc5cdr</th><td class="n">2</td><td class="n">3</td><td class="n">0.400</td>' in page
    )
    assert "Words in the sentence: 1-10 0.333 of 3." in page


def test_the_page_loads_nothing_and_its_links_lead_to_files(tmp_path):
    make_run(tmp_path / "runs", "a run", 0.73)
    out = tmp_path / "reports" / "report.html"
    page = page_of([tmp_path / "runs" / "a run"], out)
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(|src=", page)
    links = [unquote(link) for link in re.findall(r'href="([^"#]+)"', page)]
    assert links == ["report_notebooks/a_run/03_train.html"]
    assert (out.parent / links[0]).is_file()


class Balance(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], 0

    def handle_starttag(self, tag, attributes):
        self.seen += 1
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_balanced_html_with_headings_and_named_figures(tmp_path):
    for number, (rate, rank) in enumerate(itertools.product((0.001, 0.002), (4, 8))):
        make_run(tmp_path, f"run{number}", 0.5 + number / 100, learning_rate=rate, lora_rank=rank)
    page = page_of(tmp_path, tmp_path / "report.html")
    checker = Balance()
    checker.feed(page)
    assert checker.open == []
    assert checker.seen > 100
    assert page.count("<h1>") == 1
    figures = re.findall(r"<svg[^>]*>", page)
    assert len(figures) == 4  # scores, heat map, loss, greedy F1
    assert all('role="img" aria-label="' in figure for figure in figures)


def test_an_empty_or_missing_folder_says_what_to_do(tmp_path, capsys):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_text('{"stages": {"06_report": {"status": "running"}}}')
    with pytest.raises(
        DataError, match=r"no run here\. Train one first: python -m biomerge_lib run 03_train"
    ):
        collect_runs([tmp_path])
    with pytest.raises(DataError, match="nowhere: no such folder"):
        collect_runs([tmp_path / "nowhere"])
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert "no run here" in capsys.readouterr().err


def test_a_broken_or_unfinished_run_is_listed_with_its_reason(tmp_path):
    no_f1 = '{"stages": {"03_train": {"status": "finished", "metrics": {"greedy_dev_ner_f1": NaN}}}}'
    broken = [
        ('{"run_id": "half", "stages": {"03_tr', "metrics.json is half-written or broken"),
        ("[1, 2]", "metrics.json is half-written or broken"),
        ('{"stages": ["03_train"]}', "stages: Input should be an object"),
        ('{"stages": {"02_data": {"status": "finished"}}}', "03_train has not run (found: 02_data)"),
        ('{"stages": {"03_train": {"status": "finished"}}}', "no greedy dev F1 was recorded"),
        (no_f1, "no greedy dev F1 was recorded"),
    ]
    make_run(tmp_path, "good", 0.5)
    for number, (content, _) in enumerate(broken):
        (tmp_path / f"half-{number}").mkdir()
        (tmp_path / f"half-{number}" / "metrics.json").write_text(content)
    good, *others = collect_runs(tmp_path)
    assert (good.name, good.rank) == ("good", 1)
    found = {run.name: run for run in others}
    page = page_of(tmp_path, tmp_path / "report.html")
    for number, (_, reason) in enumerate(broken):
        half = found.pop(f"half-{number}")
        assert (half.rank, half.status) == (None, "partial")
        assert reason in half.reason
        row = next(row for row in page.split("<tr") if half.name in row and half.reason in row)
        assert reason in row
    assert not found


def test_a_run_of_a_few_steps_is_called_a_check_of_the_wiring(tmp_path):
    folder = make_run(tmp_path, "debug", 0.968, notebook=False, init_adapter="shipped")
    recorded = json.loads((folder / "metrics.json").read_text())
    recorded["stages"]["03_train"]["metrics"] |= {"steps": 6, "greedy_dev_records": 8}
    (folder / "metrics.json").write_text(json.dumps(recorded))
    page = page_of(tmp_path, tmp_path / "report.html")
    assert (
        "a check of the wiring, 6 optimiser steps scored on 8 dev sentences: its F1 is that of the adapter it"
        in page
    )


def test_without_any_finished_run_the_page_says_so(tmp_path):
    make_run(tmp_path, "going", 0.5, status="running", notebook=False)
    assert "No finished run yet" in page_of(tmp_path, tmp_path / "report.html")


def test_a_notebook_that_stopped_at_an_error_makes_its_run_failed(tmp_path):
    folder = make_run(tmp_path, "stopped", 0.5, status="running", notebook=False)
    error = new_output("error", ename="ModelError", evalue="the loss is nan", traceback=[])
    notebook = new_notebook(cells=[new_code_cell("train()", outputs=[error])])
    nbformat.write(notebook, folder / "03_train.ipynb")
    [run] = collect_runs(folder)
    assert (run.status, run.reason) == ("failed", "ModelError: the loss is nan")


def test_a_notebook_that_disagrees_with_metrics_json_is_believed_and_reported(tmp_path):
    make_run(tmp_path, "steady", 0.70)
    make_run(tmp_path, "torn", 0.60, glued={"greedy_dev_ner_f1": 0.80})
    assert [(run.name, run.score) for run in collect_runs(tmp_path)] == [("torn", 0.80), ("steady", 0.70)]
    page = page_of(tmp_path, tmp_path / "report.html")
    assert "greedy_dev_ner_f1 disagrees: 03_train.ipynb says 0.8000, metrics.json 0.6000" in page


@pytest.mark.parametrize("content", ["", "{", '{"worksheets": [], "nbformat": 3}', "[]", '{"nbformat": 4}'])
def test_a_notebook_that_cannot_be_read_leaves_the_run_ranked_by_metrics_json(tmp_path, content):
    folder = make_run(tmp_path, "old", 0.61, notebook=False)
    (folder / "03_train.ipynb").write_text(content)
    [run] = collect_runs(tmp_path)
    assert (run.rank, run.score) == (1, 0.61)


def test_notebooks_of_nbformat_3_and_of_papermill_records_are_read(tmp_path):
    folder = make_run(tmp_path, "older", 0.61, notebook=False)
    record = new_output("display_data", data={"application/papermill.record+json": {"eval_ner_f1": 0.44}})
    nbformat.write(new_notebook(cells=[new_code_cell("", outputs=[record])]), folder / "03_train.ipynb")
    [run] = collect_runs(tmp_path)
    assert run.metrics["03_train"]["eval_ner_f1"] == 0.44
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": [], "metadata": {}}]}
    (folder / "03_train.ipynb").write_text(json.dumps(old))
    [run] = collect_runs(tmp_path)
    assert (run.metrics["03_train"]["eval_ner_f1"], run.notes) == (0.614, [])


def test_unreadable_predictions_are_named_and_left_out(tmp_path):
    folder = make_run(tmp_path, "best", 0.73)
    (folder / "predictions-dev-greedy.jsonl").write_text('{"index": 0}\n')
    other = make_run(tmp_path, "second", 0.70)
    found = [prediction(0, ASPIRIN, [(0, 7)], [])]
    write_predictions(other / "predictions-dev-greedy.jsonl", found)
    runs = collect_runs(tmp_path)
    read_answers(runs)
    page = write_page(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("predictions-dev-greedy.jsonl is left out") == 1
    assert "<h2>Errors of run 2</h2>" in page


def test_parameters_come_from_the_training_not_from_a_later_notebook(tmp_path):
    folder = make_run(tmp_path, "best", 0.73, lora_rank=32)
    recorded = json.loads((folder / "metrics.json").read_text())
    recorded["parameters"]["lora_rank"] = 8
    (folder / "metrics.json").write_text(json.dumps(recorded))
    assert collect_runs(folder)[0].parameters["lora_rank"] == 32


def test_only_runs_that_were_scored_on_the_same_are_ranked_against_each_other(tmp_path):
    make_run(tmp_path, "a", 0.70)
    make_run(tmp_path, "b", 0.60)
    make_run(tmp_path, "half", 0.99, eval_limit=800)
    folder = make_run(tmp_path, "other", 0.98)
    recorded = json.loads((folder / "metrics.json").read_text())
    recorded["data"]["dev"] = "cd" * 32
    (folder / "metrics.json").write_text(json.dumps(recorded))
    runs = collect_runs(tmp_path)
    assert [(run.rank, run.name) for run in runs] == [(1, "a"), (2, "b"), (1, "half"), (1, "other")]
    groups, others = group_runs(runs)
    assert ([[run.name for run in group] for group in groups], others) == (
        [["a", "b"], ["half"], ["other"]],
        [],
    )
    assert runs[2].scored_on == "800 sentences of dev abababababab, watch_metric=token_head"
    page = page_of(tmp_path, tmp_path / "report.html")
    assert "These were scored on different dev files" in page
    assert "4 finished, 0 failed" in page and "<h1>a</h1>" in page
    tables = re.findall(r'aria-label="(?:Finished runs|Ranked apart)">(.*?)</table>', page, re.S)
    found = [[name for name in ("a", "b", "half", "other") if f">{name}<" in table] for table in tables]
    assert found == [["a", "b"], ["half"], ["other"]]
    assert "1 run scored on all sentences of dev cdcdcdcdcdcd, watch_metric=token_head" in page


def test_the_page_says_what_to_do_next(tmp_path):
    """From a check of the wiring to the adapter that is shared: one line, with its command."""

    def todo() -> str:
        page = page_of(tmp_path / "runs", tmp_path / "report.html")
        found = re.search(r'<div class="next"><p><b>Next:</b> (.*?)</p><pre[^>]*>(.*?)</pre>', page, re.S)
        return " ".join(found.groups())

    def record(folder, stage, **metrics) -> None:
        recorded = json.loads((folder / "metrics.json").read_text())
        recorded["stages"].setdefault(stage, {"status": "finished", "metrics": {}})["metrics"] |= metrics
        (folder / "metrics.json").write_text(json.dumps(recorded))

    make_run(tmp_path / "runs", "stopped", 0, status="failed", notebook=False)
    assert todo().startswith("mend what stopped stopped (03_train failed;")
    best = make_run(tmp_path / "runs", "my best", 0.8)
    record(best, "03_train", steps=5, stage_seconds=1800)
    assert "checks that everything works" in todo()
    record(best, "03_train", steps=500)
    (best / "merged").mkdir()
    place = f"run_id=&#39;my best&#39; runs_dir={tmp_path / 'runs'}"
    assert f"run 04_greedy_dev {place}" in todo()
    for name in ("my best", "second"):
        folder = tmp_path / "runs" / name
        folder = folder if folder.exists() else make_run(tmp_path / "runs", name, 0.79, lora_rank=16)
        write_predictions(folder / FILE, [prediction(0, ASPIRIN, GOLD, GOLD)])
    assert todo().startswith("the best two runs do not differ by more than chance")
    page = (tmp_path / "report.html").read_text()
    assert "p = 1.0000 in a paired test over 1 sentences: no more than chance" in page
    assert "0.5 GPU hours" in page
    write_predictions(tmp_path / "runs/second" / FILE, [prediction(0, ASPIRIN, GOLD, [])])
    assert todo().startswith("the best two")  # one sentence says nothing
    many = [[prediction(n, ASPIRIN, GOLD, found) for n in range(12)] for found in (GOLD, [])]
    for name, found in zip(("my best", "second"), many, strict=True):
        write_predictions(tmp_path / "runs" / name / FILE, found)
    assert todo().startswith("one seed is one draw") and "seed=43" in todo()
    make_run(tmp_path / "runs", "again", 0.78, seed=43)
    recorded = yaml.safe_load((best / "parameters.yaml").read_text()) | {"seed": 42}
    (best / "parameters.yaml").write_text(yaml.safe_dump(recorded))
    assert todo().startswith("dev has chosen the best run")
    record(best, "03_train", test_ner_f1=0.7)
    assert todo().startswith("share the best run’s adapter")


def test_runs_that_differ_by_their_seed_alone_have_a_mean_and_a_deviation(tmp_path):
    for seed, f1 in ((42, 0.70), (43, 0.72), (44, 0.77)):
        make_run(tmp_path, f"seed{seed}", f1, seed=seed)
    make_run(tmp_path, "other", 0.75, seed=42, lora_rank=16)
    runs = collect_runs(tmp_path)
    # Mean 0.73; deviations -0.03, -0.01, 0.04: the root of 0.0026 / 2.
    assert seeds_table(runs).to_dict("records") == [
        {"runs": "seed44, seed43, seed42", "seeds": "44, 43, 42", "greedy dev F1, mean ± SD": "0.730 ± 0.036"}
    ]
    assert "0.730 ± 0.036" in page_of(tmp_path, tmp_path / "report.html")
    assert seeds_table(runs[:2]).empty


def test_what_different_watch_metrics_say_stands_in_different_columns(tmp_path):
    make_run(tmp_path, "old", 0.70)  # before the parameter: its eval_ner_f1 is the token head's
    folder = make_run(tmp_path, "new", 0.60, watch_metric="answer")
    readings = {"eval_answer_ner_f1": 0.604, "eval_head_ner_f1": 0.55}
    recorded = json.loads((folder / "metrics.json").read_text())
    recorded["stages"]["03_train"]["metrics"] |= readings
    (folder / "metrics.json").write_text(json.dumps(recorded))
    table = runs_table(collect_runs(tmp_path)).set_index("run")
    assert table.loc["new", "answer F1"] == 0.604 and table["answer F1"].count() == 1
    assert list(table["token head F1"]) == [pytest.approx(0.704), 0.55]
    page = page_of(tmp_path, tmp_path / "report.html")
    assert "watch_metric=answer" in page and "watch_metric=token_head" in page
    assert "<h3>Ranked apart</h3>" in page


def test_a_sweep_is_a_heat_map_over_what_was_swept(tmp_path):
    """Not over what other runs of the folder have otherwise; unfinished points leave their cells empty."""
    rates, ranks = (0.001, 0.002, 0.003), (4, 8)
    for number, (rate, rank) in enumerate(itertools.product(rates, ranks)):
        make_run(
            tmp_path, f"run{number}", 0.5 + number / 100, learning_rate=rate, lora_rank=rank, seed=number
        )
    make_run(
        tmp_path, "other", 0.9, learning_rate=0.01, lora_rank=64, lora_dropout=0.3, offset_anchors="none"
    )
    runs = collect_runs(tmp_path)
    best = "Heat map: best mean greedy dev F1 0.550 at learning_rate 0.003 and lora_rank 8."
    assert [figure.get_label() for figure in draw_sweep(runs)] == [best]
    assert best in page_of(tmp_path, tmp_path / "report.html")
    five = [run for run in runs if run.name != "run0"]
    assert [figure.get_label() for figure in draw_sweep(five)] == [best]
    assert draw_sweep([run for run in runs if run.name not in ("run0", "run3")]) == []  # 4 of 6


def test_a_heat_map_takes_a_value_that_some_runs_have_and_others_lack(tmp_path):
    for number, (adapter, rank) in enumerate(itertools.product((None, "shipped"), (4, 8))):
        point = {"init_adapter": adapter, "lora_rank": rank, "lora_dropout": 0.05}
        make_run(tmp_path, f"run{number}", 0.5 + number / 10, **point)
    make_run(tmp_path, "other", 0.9, init_adapter="shipped", lora_rank=4, lora_dropout=0.3)
    [figure] = draw_sweep(collect_runs(tmp_path))
    best = "Heat map: best mean greedy dev F1 0.800 at init_adapter shipped and lora_rank 8."
    assert figure.get_label() == best and "null" in as_svg(figure)


def test_a_heat_map_cell_is_the_mean_of_its_seeds_and_takes_names(tmp_path):
    scores = {("none", 4): (0.5, 0.7), ("start", 4): (0.4,), ("none", 8): (0.3,), ("start", 8): (0.2,)}
    for (anchors, rank), values in scores.items():
        for seed, f1 in enumerate(values):
            make_run(
                tmp_path, f"{anchors}{rank}{seed}", f1, offset_anchors=anchors, lora_rank=rank, seed=seed
            )
    [figure] = draw_sweep(collect_runs(tmp_path))
    texts = re.findall(r"<text[^>]*>(.*?)</text>", as_svg(figure))
    assert [text for text in texts if text.startswith("0.")] == ["0.600 (2)", "0.300", "0.400", "0.200"]
    assert {"none", "start", "4", "8"} <= set(texts)


def test_a_figure_has_the_pages_colours_and_takes_no_name_for_markup(tmp_path):
    make_run(tmp_path, "<b>$a_$", 0.5)
    [figure] = draw_scores(collect_runs(tmp_path))
    svg = as_svg(figure)
    assert ">&lt;b&gt;$a_$</text>" in svg
    assert "currentColor" in svg and "var(--c0)" in svg and "#0072b2" not in svg
    assert not re.search(r"https?:|url\(|<style|<image", svg)


def test_a_notebooks_figures_are_pictures_with_alternative_texts_and_the_rest_folded(tmp_path):
    """What JupyterLab leaves of a notebook that it did not run: pictures and inline styles, no elements of SVG."""
    make_run(tmp_path, "<b>$a_$", 0.5)
    drawn = [*draw_scores(collect_runs(tmp_path)), *draw_curves(collect_runs(tmp_path))]
    html = show_figures(drawn, shown=2).data
    seen, folded = html.split("<details><summary>1 more</summary>")
    assert [part.count("<img alt=") for part in (seen, folded)] == [2, 1]
    assert 'alt="Training loss against optimiser step: 1 ends at 0.222."' in seen and "<svg" not in html
    [picture, *_] = re.findall(r"base64,([^\"]*)", html)
    svg = ElementTree.fromstring(base64.b64decode(picture))
    assert "<b>$a_$" in "".join(svg.itertext())
    assert b"currentColor" not in base64.b64decode(picture) and b"var(" not in base64.b64decode(picture)
    marked = show_html([highlight(ASPIRIN, [(0, 7)], [])]).data
    assert f'<span style="{MARKS["missed"]}" class="missed">Aspirin</span> can' in marked


def test_highlight_tells_boundary_errors_from_missed_and_spurious_ones():
    html = highlight("abcdef", [(0, 4), (5, 6)], [(2, 5), (5, 6)])
    assert html == (
        '<div class="bm-text"><mark class="missed">ab</mark><mark class="overlap">cd</mark>'
        '<mark class="spurious">e</mark><mark class="right">f</mark></div>'
    )


def test_a_prediction_far_outside_its_text_is_shown_with_the_text():
    examples = highlight_errors([prediction(0, ASPIRIN, [], [(900, 910)])])
    count, [html] = examples["spurious"]
    assert count == 1
    assert html.startswith(f'<div class="bm-text">{ASPIRIN}')
    assert "predicted 900-910" in html


def test_a_long_text_is_cut_around_its_error():
    text = "word " * 400 + "Aspirin" + " word" * 400
    _, [html] = highlight_errors([prediction(0, text, [(2000, 2007)], [])])["missed"]
    assert '<mark class="missed">Aspirin</mark>' in html
    assert len(html) < 800
    assert "gold 2000-2007" in html


@pytest.mark.slow
def test_twelve_runs_with_predictions_take_under_ten_seconds(tmp_path):
    predictions = [prediction(i, ASPIRIN, [(0, 7), (20, 34)], [(0, 7), (20, 26)]) for i in range(1000)]
    for number in range(12):
        folder = make_run(
            tmp_path, f"run{number:02d}", 0.5 + number / 100, learning_rate=0.001 * (1 + number)
        )
        write_predictions(folder / "predictions-dev-greedy.jsonl", predictions)
    started = time.process_time()  # however busy the machine is
    page = page_of(tmp_path, tmp_path / "report.html")
    assert time.process_time() - started < 10
    assert "12 finished, 0 failed, 0 partial" in page


def test_the_readme_picture_marks_the_offsets_that_the_model_answers():
    sentence = "Cisplatin caused acute kidney injury and hearing loss ."
    path = ROOT / "docs" / "tagged_sentence.svg"
    name = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(path).getroot()
    lines = ["".join(text.itertext()) for text in root.iter(f"{name}text") if text.get("class") == "line"]
    assert lines == [f"<NER> {sentence}", "<TAG> 0-9 ; 17-36 ; 41-53"]
    words = [text for text in root.iter(f"{name}text") if text.get("class", "").startswith("mono")]
    assert " ".join(word.text for word in words) == sentence
    width = int(words[0].get("textLength")) / len("Cisplatin")
    offset = {word: (int(word.get("x")) - int(words[0].get("x"))) / width for word in words}
    assert all(sentence.startswith(word.text, int(offset[word])) for word in words)
    spans = parse_spans(lines[1])
    bold = [int(offset[word]) for word in words if word.get("class") == "mono mention"]
    assert bold == [
        m.start() for m in re.finditer(r"\S+", sentence) if any(a <= m.start() < b for a, b in spans)
    ]
    ticks = [int(text.text) for text in root.iter(f"{name}text") if text.get("class") == "offset"]
    assert ticks == [edge for span in spans for edge in span]
    marked = sentence
    for start, end in reversed(spans):
        marked = f"{marked[:start]}[{marked[start:end]}]{marked[end:]}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f'predict "{sentence}"' in readme and f"    {marked}\n" in readme


def test_the_best_runs_notebooks_are_rendered_and_the_rest_are_linked(tmp_path, monkeypatch):
    for name, f1 in (("best", 0.7), ("second", 0.6), ("third", 0.5)):
        make_run(tmp_path / "runs", name, f1)
    (tmp_path / "runs/second/03_train.ipynb").write_text('{"cells": [')
    monkeypatch.setattr(report_notebooks, "RENDERED", 2)
    runs = collect_runs(tmp_path / "runs")
    links = {run.name: found for run, found in link_notebooks(runs, tmp_path / "page.html").items()}
    assert links == {
        "best": [("03_train", "page_notebooks/best/03_train.html")],
        "second": [("03_train", "runs/second/03_train.ipynb")],
        "third": [("03_train", "runs/third/03_train.ipynb")],
    }
    page = tmp_path / "page_notebooks/best/03_train.html"
    assert "finish</span>" in page.read_text(encoding="utf-8")
    page.write_text(page.read_text(encoding="utf-8") + "kept")
    link_notebooks(runs, tmp_path / "page.html")
    assert page.read_text(encoding="utf-8").endswith("kept")  # of the notebook that lies there
    glue(tmp_path / "runs/best/03_train.ipynb", {"eval_ner_f1": 0.9})
    link_notebooks(runs, tmp_path / "page.html")
    assert "finish</span>" in (text := page.read_text(encoding="utf-8")) and not text.endswith("kept")
