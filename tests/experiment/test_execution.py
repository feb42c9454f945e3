"""Notebooks execute beside others on one machine; a kernel that dies says where."""

import json
import multiprocessing
import os
import signal
import threading
import time

import nbformat
import pytest
import yaml
from papermill import execute_notebook as papermill_alone
from papermill.exceptions import PapermillExecutionError

from biomerge_lib.__main__ import main
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import BioMergeError, DataError, ModelError, ParameterError
from biomerge_lib.experiment import execution, notebooks, runs
from biomerge_lib.experiment.execution import NotebookFailed, execute_notebook
from biomerge_lib.experiment.notebooks import run_notebook
from biomerge_lib.experiment.runs import open_run
from biomerge_lib.training.preflight import check_training
from tests.support.notebooks import write_notebook

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def execute(tmp_path):
    def run(*sources):
        notebook = write_notebook(tmp_path / "in.ipynb", *sources)
        execute_notebook(notebook, tmp_path / "out.ipynb", {"x": 2}, cwd=tmp_path)
        return nbformat.read(tmp_path / "out.ipynb", 4)

    return run


def test_a_failing_cell_and_a_dying_kernel_are_named(execute):
    with pytest.raises(NotebookFailed) as failed:
        execute("y = x", "y / 0")
    assert (failed.value.cell, failed.value.reason) == ("In [4]", "ZeroDivisionError: division by zero")
    with pytest.raises(NotebookFailed, match=r"cell In \[3\]: the kernel died \(out of memory"):
        execute("import os; os.kill(os.getpid(), 9)", "x")


def test_a_kernel_that_is_not_quite_done_ends_in_silence(execute, capfd):
    """papermill's last question is kernel_info; jupyter_client interrupts the kernel as soon as that is answered."""
    execute(
        "import time\n"
        "handlers = get_ipython().kernel.shell_handlers\n"
        "answer = handlers['kernel_info_request']\n"
        "async def answer_slowly(*request):\n"
        "    await answer(*request)\n"
        "    time.sleep(60)\n"
        "handlers['kernel_info_request'] = answer_slowly"
    )
    assert capfd.readouterr().err == ""


def test_an_interrupt_reaches_the_running_cell(execute, tmp_path):
    """So that what the cell holds (child processes, a W&B run) is let go of."""
    source = (
        "import pathlib, time\n"
        "pathlib.Path('begun').touch()\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: pathlib.Path('interrupted').touch()"
    )

    def interrupt():
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        execute(source)
    assert (tmp_path / "interrupted").exists()


def test_a_notebook_imports_what_lies_beside_it_before_what_is_installed(execute, tmp_path, monkeypatch):
    (tmp_path / "biomerge_lib.py").write_text("here = True")
    monkeypatch.setenv("PYTHONPATH", str(runs.PROJECT_DIR))
    assert (
        execute("from biomerge_lib import here; here")["cells"][-1]["outputs"][0]["data"]["text/plain"]
        == "True"
    )
    assert os.environ["PYTHONPATH"] == str(runs.PROJECT_DIR)


def test_a_kernel_that_dies_at_its_start_is_started_again(execute, tmp_path, monkeypatch):
    """As it does when another kernel takes one of its ports ("Address already in use")."""
    died = tmp_path / "died"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if 'ipykernel' in ' '.join(sys.orig_argv) and os.environ['DEATHS'] > str(os.path.getsize({str(died)!r})):\n"
        f"    open({str(died)!r}, 'a').write('x')\n"
        "    os._exit(1)\n"
    )
    died.touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(execution.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("DEATHS", "1")
    assert execute("x")["cells"][-1]["outputs"][0]["data"]["text/plain"] == "2"
    assert died.read_text() == "x"
    monkeypatch.setenv("DEATHS", "9")
    with pytest.raises(BioMergeError, match="no kernel could be started"):
        execute("x")
    assert died.read_text() == "x" * 4


def _run_light(number):
    notebooks.run_notebook("01_tokenizer", [f"run_id=r{number}", f"runs_dir={os.environ['LIGHT_RUNS']}"])


def test_ten_notebooks_at_four_at_a_time(tmp_path, monkeypatch):
    """01_tokenizer without its middle: what papermill, the kernel and the run folder do is all there."""
    notebook = nbformat.read(notebooks.NOTEBOOKS_DIR / "01_tokenizer.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[-1].source = 'run.finish({"process": __import__("os").getpid()})'
    notebook.cells = [code[0], code[1], code[-1]]
    nbformat.write(notebook, tmp_path / "01_tokenizer.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS_DIR", tmp_path)
    monkeypatch.setenv("LIGHT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_run_light, range(10), chunksize=1)
    stages = [
        json.loads((tmp_path / f"runs/r{number}/metrics.json").read_text())["stages"]["01_tokenizer"]
        for number in range(10)
    ]
    assert [stage["status"] for stage in stages] == ["finished"] * 10
    assert len({stage["metrics"]["process"] for stage in stages}) == 10


def test_a_refused_run_touches_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    parameters = compose_parameters([f"runs_dir={tmp_path / 'runs'}", "run_id=mine"])
    kept = {
        "parameters.yaml": yaml.safe_dump(parameters.model_dump()),
        "metrics.json": '{"stages": {"03_train": {"status": "finished"}}}',
        "03_train.ipynb": "{}",
    }
    for name, text in kept.items():
        (folder / name).write_text(text)
    where = [f"runs_dir={tmp_path / 'runs'}", "run_id=mine"]
    with pytest.raises(ParameterError, match=r"run mine exists with lora_rank=8 \(not 4\)"):
        run_notebook("03_train", [*where, "lora_rank=4"])
    with pytest.raises(ParameterError, match=r"run mine was trained with lora_rank=8 \(not 4\)"):
        run_notebook("04_greedy_dev", [*where, "lora_rank=4"])
    with pytest.raises(DataError, match=r"no such run .* Did you mean 'mine'"):
        run_notebook("04_greedy_dev", [where[0], "run_id=mime"])
    # What would replace it cannot train, as there is no such data: it stays where it is.
    replacing = {
        "runs_dir": f"{tmp_path}/runs",
        "run_id": "mine",
        "data_dir": str(tmp_path),
        "existing_run": "replace",
    }
    assert main(["run", "03_train", *(f"{name}={value}" for name, value in replacing.items())]) == 2
    cell = "\n".join(["# Parameters (mine)", *(f"{name} = {value!r}" for name, value in replacing.items())])
    monkeypatch.chdir(runs.PROJECT_DIR)
    with pytest.raises(DataError, match=r"train.jsonl: no such file"):
        open_run("03_train", replacing | {"In": [cell]}, check=check_training)
    assert {path.name: path.read_text() for path in folder.iterdir() if path.name in kept} == kept
    assert os.listdir(tmp_path / "runs") == ["mine"]


def test_a_mistyped_start_leaves_no_folder(tmp_path, monkeypatch, capsys):
    """What preflight refuses before a kernel starts, on each way to begin a training."""
    values = {"runs_dir": str(tmp_path / "runs"), "run_id": "typo", "data_dir": str(tmp_path / "none")}
    words = [f"{name}={value}" for name, value in values.items()]
    for wrong in ([], ["learning_rat=1"], ["lora_rank=x"], [f"tokenizer_dir={tmp_path}/none"]):
        assert main(["run", "03_train", *words, *wrong]) == 2
        assert main(["run", "03_train", *words, *wrong, "--dry-run"]) == 2
    cell = "\n".join(["# Parameters (mine)", *(f"{name} = {value!r}" for name, value in values.items())])
    monkeypatch.chdir(runs.PROJECT_DIR)
    with pytest.raises((DataError, ModelError)):
        open_run("03_train", values | {"In": [cell]}, check=check_training)
    point = {
        "command": ["run", "03_train", *words, "${args_no_hyphens}"],
        "parameters": {"seed": {"value": 7}},
    }
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"method": "grid", "metric": {"name": "eval_ner_f1"}} | point)
    )
    assert main(["sweep", "--run", str(tmp_path / "s.yaml")]) == 2
    assert not (tmp_path / "runs").exists()


def test_what_a_first_cell_refuses_leaves_no_folder_and_a_fault_does(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "NOTEBOOKS_DIR", tmp_path)
    words = [f"runs_dir={tmp_path}/runs", "run_id=mine"]
    refuse = "from biomerge_lib.core.errors import DataError; raise DataError('no such corpus')"
    notebook = write_notebook(tmp_path / "02_data.ipynb", refuse)
    notebook.write_text(text := notebook.read_text().replace("x = 1", "seed = 42"))
    with pytest.raises(BioMergeError, match=r"02_data\.ipynb: DataError: no such corpus"):
        run_notebook("02_data", words)
    assert not (tmp_path / "runs/mine").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs/link").symlink_to(tmp_path / "elsewhere")  # not ours to remove
    with pytest.raises(BioMergeError, match="DataError: no such corpus"):
        run_notebook("02_data", [words[0], "run_id=link"])
    assert (tmp_path / "elsewhere").is_dir() and (tmp_path / "runs/link").is_symlink()
    notebook.write_text(text.replace(refuse, "1 / 0"))
    with pytest.raises(BioMergeError, match=r"failed in cell In \[3\]: ZeroDivisionError"):
        run_notebook("02_data", words)
    assert {"02_data.ipynb", "metrics.json"} <= set(os.listdir(tmp_path / "runs/mine"))
    notebook.write_text(text)
    (tmp_path / "runs/mine/01_tokenizer.ipynb").touch()
    with pytest.raises(BioMergeError, match="to see it in place"):
        run_notebook("02_data", words)
    assert (tmp_path / "runs/mine/01_tokenizer.ipynb").is_file()


def test_what_a_notebook_refuses_in_jupyterlab_leaves_no_folder(tmp_path):
    """As papermill alone, which begins no run of its own."""
    begin = "from biomerge_lib.experiment.runs import open_run; run = open_run('02_data', globals())"
    refuse = "from biomerge_lib.core.errors import DataError; raise DataError('no such corpus')"
    for last, is_left in ((refuse, False), ("1 / 0", True)):
        notebook = write_notebook(tmp_path / "in.ipynb", begin, last)
        text = notebook.read_text().replace("# Parameters", "# Parameters (mine)")
        notebook.write_text(text.replace("x = 1", f"runs_dir = '{tmp_path}/runs'; run_id = 'mine'"))
        with pytest.raises(PapermillExecutionError):
            papermill_alone(str(notebook), None, cwd=str(runs.PROJECT_DIR), progress_bar=False)
        assert (tmp_path / "runs/mine/metrics.json").is_file() == (tmp_path / "runs/mine").is_dir() == is_left


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(tmp_path, capsys):
    words = [f"runs_dir={tmp_path}/runs", "run_id=mine", "offset_anchors=start"]
    assert main(["run", "02_data", *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        "offset_anchors = 'start'" in said
        and f"02_data would run in {tmp_path}/runs/mine/ (a new folder)" in said
    )
    assert "and write 02_data.ipynb, metrics.json, `data_dir/" in said
    assert main(["run", "--dry-run", "04_greedy_dev", *words]) == 2
    assert os.listdir(tmp_path) == []
