"""A notebook run by hand: another checkout's library is refused, and what JupyterLab saves is kept with the run."""

import time

import pytest

from biomerge_lib.core.errors import ParameterError
from biomerge_lib.experiment.execution import UNWATCHED, keep_executed_copy, refuse_other_checkout
from biomerge_lib.experiment.provenance import PROJECT_DIR


def test_a_notebook_of_another_checkout_is_refused(tmp_path, monkeypatch):
    (tmp_path / "biomerge_lib").mkdir()
    (tmp_path / "biomerge_lib/__init__.py").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(
        ParameterError, match=f"lies in {tmp_path}, but imports biomerge_lib from {PROJECT_DIR}"
    ):
        refuse_other_checkout()
    own = PROJECT_DIR / "notebooks/03_train.ipynb"
    monkeypatch.setenv("JPY_SESSION_NAME", str(own))  # the notebook counts, not where its kernel stands
    refuse_other_checkout()


def test_what_jupyterlab_saves_is_copied_to_the_run_that_is_open(tmp_path, monkeypatch):
    notebook, first, second = (tmp_path / name for name in ("my.ipynb", "first.ipynb", "second.ipynb"))
    monkeypatch.setenv("JPY_SESSION_NAME", str(notebook))
    monkeypatch.delenv(UNWATCHED, raising=False)

    def save(text: str, copy) -> None:
        notebook.write_text(text)
        deadline = time.monotonic() + 60
        while not copy.is_file() or copy.read_text() != text:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    notebook.write_text('"as committed"')
    keep_executed_copy(first)
    assert not first.exists()  # nothing has run yet
    save('"some cells"', first)
    notebook.unlink()  # renamed, or a save that replaces the file
    notebook.write_text("")  # a save that has just begun
    time.sleep(1.5)
    assert first.read_text() == '"some cells"'
    save('"all cells"', first)
    keep_executed_copy(second)
    save('"another run"', second)
    assert first.read_text() == '"all cells"'
    monkeypatch.setenv(UNWATCHED, "1")  # papermill keeps its own
    keep_executed_copy(tmp_path / "third.ipynb")
    notebook.write_text('"more"')
    assert not (tmp_path / "third.ipynb").exists() and second.read_text() == '"another run"'
