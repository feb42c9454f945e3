"""Each control's way to say where mentions are is read back as it was written, and all train and score the same way."""

import json

import pytest

from benchmarks import controls
from benchmarks.controls import (
    CONTROLS,
    read_brackets,
    read_quotes,
    run_control,
    spans_of_labels,
    write_brackets,
)
from biomerge_lib.core.files import write_json
from biomerge_lib.core.prompt_format import find_words
from biomerge_lib.core.records import Record, write_records
from biomerge_lib.experiment.provenance import TEST_LOG
from biomerge_lib.prompts.prompt import word_labels

TEXTS = {
    "Aspirin can trigger asthma attacks .": ((0, 7), (20, 34)),
    "pain , no pain": ((10, 14),),
    "no mention": (),
    'a "5 [[ 2]" receptor \\ and β-blocker ; 7': ((2, 20), (2, 11), (27, 36)),
    "a nested receptor kinase .": ((2, 17), (9, 24), (9, 17)),
}


@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if control.write])
@pytest.mark.parametrize("text", TEXTS)
def test_what_a_control_writes_it_reads(name, text):
    record = Record(text, tuple(sorted(TEXTS[text])), "doc", "corpus")
    control = CONTROLS[name]
    spans, whole = control.read(control.write(record), text)
    crossing = name == "brackets" and "nested" in text  # brackets cannot cross
    assert whole and (crossing or spans == sorted(TEXTS[text]))


@pytest.mark.parametrize(
    ("read", "answer", "spans"),
    [
        (read_brackets, " [[Aspirin]] can trigger asthma", [(0, 7)]),  # stops early
        (read_brackets, " [[Aspirin]] may [[trigger]] asthma attacks .", [(0, 7)]),  # says other words
        (read_brackets, " [[Aspirin can trigger asthma attacks .", []),  # never closes
        (read_quotes, ' "Aspirin" 1 ; "asthma" 2', [(0, 7)]),  # is there once
        (read_quotes, ' "Aspirin" 1 ; "ibuprofen" 1', [(0, 7)]),
        (read_quotes, ' "Aspirin" 1 ; "" 1', [(0, 7)]),
        (read_quotes, ' "Aspirin" 1 ; "asth', [(0, 7)]),
        (read_quotes, ' "\\u12" 1', []),
    ],
)
def test_an_answer_that_cannot_be_read_counts_as_invalid_and_its_readable_part_counts(read, answer, spans):
    assert read(answer, "Aspirin can trigger asthma attacks .") == (spans, False)


def test_longer_brackets_open_first():
    record = Record("a b c", ((0, 1), (0, 5), (4, 5)), "doc", "corpus")
    assert write_brackets(record) == " [[[[a]] b [[c]]]]"


def test_spans_of_labels_are_those_that_gave_the_labels():
    words = find_words("lung cancer cells and breast cancer")
    spans = [(0, 11), (12, 17), (22, 35)]
    assert spans_of_labels(words, word_labels(words, spans)) == spans
    assert spans_of_labels(words[:2], [0, 2]) == [(5, 11)]


@pytest.mark.integration
def test_controls_train_and_score_test_once_on_a_tiny_model(
    tiny_backbone, tiny_prepared, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(controls, "PROJECT_DIR", tmp_path)
    for split, head in {"train": "", "dev": "Then ", "test": "Later "}.items():
        records = []
        for number, (text, spans) in enumerate(TEXTS.items()):
            moved = tuple((start + len(head), end + len(head)) for start, end in sorted(spans))
            records.append(Record(head + text, moved, f"{split}{number}", "a"))
        write_records(tmp_path / f"data/{split}.jsonl", records)
    extra = [
        "runtime=cpu_debug",
        "step_launch=auto",
        f"data_dir={tmp_path}/data",
        f"backbone={tiny_backbone}",
        f"tokenizer_dir={tiny_prepared.parents[1]}/tok",
        f"backbones_dir={tiny_prepared.parent}",
        f"runs_dir={tmp_path}/runs",
        f"cache_dir={tmp_path}/cache",
        "max_target_tokens=256",
        "max_new_tokens=256",
        "num_train_epochs=1",
        "eval_limit=3",
    ]
    for name in ("brackets", "head-echo", "start"):
        with pytest.raises(SystemExit, match="no finished run on dev"):
            controls.parameters_of(name, "test", None, extra)
        for rate, f1 in ((1e-3, 0.5), (3e-3, 0.6), (2e-3, 0.4)):
            metrics = {"control": name, "control_dev_ner_f1": f1}
            ended = {"parameters": {"learning_rate": rate}, "stages": {"03_train": {"metrics": metrics}}}
            write_json(tmp_path / f"runs/controls-dev-{name}-{rate}/metrics.json", ended)
        parameters = controls.parameters_of(name, "test", None, extra)
        assert parameters.learning_rate == 3e-3
        run_control(name, "test", parameters)
        folder = tmp_path / f"runs/controls-test-{name}"
        stage = json.loads((folder / "metrics.json").read_text())["stages"]["03_train"]
        metrics = stage["metrics"]
        assert stage["status"] == "finished" and metrics["control_train_records"] == 10
        assert (metrics["control_tokens_written"] > 0) == (name != "head-echo")
        assert metrics["control_tokens_read"] > 0 and 0 <= metrics["control_test_ner_f1"] <= 1
        assert len((folder / TEST_LOG).read_text().splitlines()) == 1
        assert len((folder / "predictions-test-control.jsonl").read_text().splitlines()) == 3
    assert "controls-test-start: F1" in capsys.readouterr().out
