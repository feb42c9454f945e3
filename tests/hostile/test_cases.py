"""The smallest case of each kind that was found."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from platform import node

import pytest
from safetensors import SafetensorError

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import DataError, DiskFull, ParameterError
from biomerge_lib.core.files import OBJECT, names_full_disk, read_values, whole_file, whole_folder, write_text
from biomerge_lib.core.parameters import check_parameters
from biomerge_lib.core.records import Record
from biomerge_lib.corpora.readers import read_corpus
from biomerge_lib.corpora.sentences import WINDOW, find_sentences
from biomerge_lib.decoding.vllm_client import RunningServer
from biomerge_lib.experiment.recorded import read_metrics
from biomerge_lib.prompts.prompt import split_record
from biomerge_lib.report.display import bracket
from tests.conftest import START
from tests.support.notebooks import write_notebook

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b"", "a.json:1: not JSON"),
        ("a.json", b'{"a": "\\ud800"}', "a.json:1: not JSON"),
        ("a.json", b'{\n"a": ' + b"9" * 5000 + b"}", "a.json:2: not JSON"),
        ("a.json", b'{"a":' * 5000, "a.json:1: not JSON"),
        ("a.json", b"[1]", "a.json: Input should be an object"),
        ("a.yaml", b"", "a.yaml: Input should be a valid dictionary"),
        ("a.yaml", b"a: 1\nb: &x [*x]\n", "a.yaml:2: not YAML"),
        ("a.yaml", b"[" * 100_000, "a.yaml:1: not YAML"),
        ("a.yaml", b"a: !!timestamp x", "a.yaml: a value cannot be read"),
        ("a.yaml", b"1: 2", "a.yaml: 1.[key]: Input should be a valid string"),
    ],
)
def test_a_broken_file_is_named_with_its_line_and_what_to_do(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as found:
        read_values(tmp_path / name, OBJECT, cure=" Delete it.")
    assert str(found.value).startswith(f"{tmp_path}/{problem}") and str(found.value).endswith(". Delete it.")


# --- full disks


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_recognised_however_it_shows_and_leaves_nothing(tmp_path, error):
    assert names_full_disk(error)
    with (
        pytest.raises(DiskFull, match=r"no space left on the disk .* Free some"),
        whole_folder(tmp_path / "m") as made,
    ):
        made.mkdir()
        raise RuntimeError("while saving") from error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DiskFull), whole_file(tmp_path / "f") as out:
        out.write("x")
        raise FULL
    assert not (tmp_path / "f").exists()


def test_another_error_is_none_of_a_full_disk(tmp_path):
    assert not names_full_disk(RuntimeError("PytorchStreamReader failed reading zip archive"))
    with pytest.raises(PermissionError), whole_file(tmp_path / "f"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    pipe, said = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: said.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "all of it")
    reader.join()
    assert said == ["all of it"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


# --- parameters


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("learning_rate", float("nan"), "finite number"),
        ("num_train_epochs", float("inf"), "finite number"),
        ("seed", 2**32, "seed is too large"),
        ("runs_dir", "a" * 300, "can be no path (File name too long)"),
        ("backbone", "~nosuchuser/x", "can be no path"),
        ("corpora", ["~nosuchuser/x"], "can be no path"),
        ("data_dir", "a\0b", "can be no path"),
        ("data_dir", "a\ud800", "valid string"),
        ("base_url", "http://me:secret@host:8001/v1", "base_url holds a user's name or password"),
    ],
)
def test_what_is_no_number_and_no_path_is_refused_by_name(name, value, problem):
    with pytest.raises(ParameterError) as found:
        check_parameters(compose_parameters([]).model_dump() | {name: value})
    assert name in str(found.value) and problem in str(found.value)
    assert "secret" not in str(found.value)


def test_an_integer_of_thousands_of_digits_on_the_command_line():
    with pytest.raises(ParameterError, match="4300 digits"):
        compose_parameters(["eval_limit=" + "9" * 5000])


def test_what_the_environment_holds_is_never_stored(monkeypatch):
    monkeypatch.setenv("SECRET", "hush")
    for word in (
        "wandb_project=${oc.env:SECRET}",
        "wandb_project=x${oc.env:SECRET,y}",
        "corpora=[${oc.env:SECRET}]",
    ):
        with pytest.raises(ParameterError, match="would be stored with the run") as found:
            compose_parameters([word])
        assert "hush" not in str(found.value)


def test_an_address_with_a_password_is_asked_nothing():
    with pytest.raises(ParameterError, match="base_url holds a user's name or password"):
        RunningServer("http://me:secret@127.0.0.1:1/v1")


# --- corpora


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ('<?xml version="1.0" encoding="klingon"?>', "train.xml: its XML encoding cannot be read"),
        (
            '<?xml version="1.0"?>\n<!DOCTYPE collection [<!ENTITY x SYSTEM "file:///etc/hostname">]>',
            "the entity &x;",
        ),
    ],
)
def test_xml_that_would_lose_text_is_refused(tmp_path, head, problem):
    passage = "<passage><offset>0</offset><text>a &x; b</text></passage>"
    body = f"<collection><document><id>1</id>{passage}</document></collection>"
    (tmp_path / "train.xml").write_text(head + (body if "DOCTYPE" in head else body.replace("&x;", "c")))
    with pytest.raises(DataError, match=problem):
        read_corpus(tmp_path, splits=("train",))


# --- a run that was killed


def test_a_killed_run_does_not_say_that_it_runs(tmp_path):
    def status_of(*process):
        (tmp_path / "metrics.json").write_text(
            json.dumps({"stages": {"03_train": {"status": "running", "process": process}}})
        )
        return read_metrics(tmp_path)["stages"]["03_train"]["status"]

    assert status_of(node(), os.getpid(), "0") == "killed"  # another process had this number
    assert status_of(node(), 2**22 + 1, "5") == "killed"
    assert status_of("elsewhere", 1, "5") == "running"


@pytest.mark.integration
def test_an_interrupt_is_one_line_and_a_failing_cell_is_recorded(tmp_path):
    import nbformat

    from biomerge_lib.experiment.execution import NotebookFailed, execute_notebook

    begin = (
        "from pathlib import Path\nfrom biomerge_lib.core.composition import compose_parameters\n"
        "from biomerge_lib.experiment.runs import Run\n"
        "run = Run(Path('run'), '03_train', compose_parameters([]))\nrun.start()"
    )
    ends = {
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)": "interrupted",
        "1 / 0": "failed",
    }
    for cell, status in ends.items():
        notebook = write_notebook(tmp_path / "in.ipynb", begin, cell)
        with pytest.raises(NotebookFailed):
            execute_notebook(notebook, tmp_path / "out.ipynb", {"x": 2}, cwd=tmp_path)
        stage = read_metrics(tmp_path / "run")["stages"]["03_train"]
        assert stage["status"] == status
        [error] = [
            o
            for c in nbformat.read(tmp_path / "out.ipynb", 4).cells
            for o in c.get("outputs", [])
            if "ename" in o
        ]
        if status == "interrupted":
            assert (
                error["traceback"] == ["interrupted; running 03_train again begins anew"] == [stage["error"]]
            )
        else:
            assert stage["error"] == "ZeroDivisionError: division by zero"


# --- time


def grows_by(work: Callable[[int], object], size: int) -> float:
    """How many times the CPU seconds of eight times the work are those of the work."""
    seconds = []
    for factor in (1, 8):
        started = time.process_time()
        work(factor * size)
        seconds.append(time.process_time() - started)
    return seconds[1] / max(seconds[0], 0.01)


@pytest.mark.slow
def test_time_grows_with_the_length_and_not_with_its_square(tokenizer):
    def cut(count: int) -> None:
        spans = tuple((12 * i, 12 * i + 7) for i in range(count))
        split_record(Record("aspirin and " * count, spans, "d", "c"), tokenizer, START, max_target_tokens=64)

    assert grows_by(lambda n: bracket("abc " * n, [(4 * i, 4 * i + 3) for i in range(n)]), 2000) < 24
    assert grows_by(lambda n: find_sentences("a.b. " * n), 1000) < 24
    assert grows_by(cut, 250) < 24


def test_a_long_line_has_the_sentences_of_its_parts():
    sentence = "In (cf. Fig. 2) IL-2 rose, as Dr. A. Smith et al. said. "
    line = sentence * (3 * WINDOW // len(sentence))
    assert len(line) > 2.9 * WINDOW
    assert {line[start:end] for start, end in find_sentences(line)} == {sentence.strip()}
