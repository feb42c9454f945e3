"""A real JupyterLab in a real browser: open a notebook, change parameters in their cell, run all, see the plots."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from urllib.request import urlopen

import pytest

from biomerge_lib.experiment.guarded_process import GuardedProcess
from biomerge_lib.model.backbones import build_tokenizer
from tests.conftest import ROOT, notebook_cells

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SETTINGS = {
    # Every cell is in the page, also those that are scrolled out of sight.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
WAIT_SECONDS = 600  # a ceiling for a busy machine
FIGURES = """return [...document.querySelectorAll(".jp-OutputArea img")]
    .filter(image => image.complete && image.naturalWidth > 100 && image.alt.length > 20).length"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab in a copy of notebooks/, with settings of its own; ``(folder, address, token)``."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, token = free.getsockname()[1], "lab-of-a-test"
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    environment = os.environ | {name: str(folder / place) for name, place in places.items()}
    environment |= {"JUPYTER_CONFIG_DIR": str(folder / "config"), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "JUPYTER_TOKEN": token}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--notebook-dir={folder / 'notebooks'}"]
    server = GuardedProcess(command, environment=environment, log_path=folder / "lab.log")
    address = f"http://127.0.0.1:{port}"
    try:
        wait(lambda: is_up(f"{address}/api"), lambda: (folder / "lab.log").read_text()[-2000:])
        yield folder, address, token
    finally:
        server.stop()


def is_up(address: str) -> bool:
    try:
        return urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def wait(condition, explain=lambda: "nothing came"):
    """The first true value of ``condition``."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"after {WAIT_SECONDS} s: {explain()}")
        time.sleep(0.3)
    return value


def run_notebook(browser, lab, name: str, **parameters) -> dict:
    """Open a notebook, type parameters at the end of their cell, run all; the notebook that Lab has saved then."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    folder, address, token = lab
    path = folder / "notebooks" / name

    def seen(selector: str):
        found = browser.find_elements(By.XPATH, selector)
        return found and found[0].is_displayed() and found[0]

    def click(selector: str) -> None:
        wait(lambda: seen(selector), lambda: f"{selector} is not in {browser.title}").click()

    def keys(*typed: str) -> None:
        browser.switch_to.active_element.send_keys(*typed)

    def saved() -> dict | None:
        """Lab's own file once every cell has run or one has failed."""
        keys(Keys.CONTROL, "s")
        time.sleep(0.5)
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        outputs = [output for cell in code for output in cell["outputs"]]
        failed = any(output["output_type"] == "error" for output in outputs)
        return notebook if failed or all(cell["execution_count"] for cell in code) else None

    browser.get(f"{address}/lab/tree/{name}?token={token}&reset")
    wait(lambda: seen('//*[contains(@class, "kernelName")][@aria-label="Python 3 (ipykernel)"]'))
    wait(lambda: seen('//*[@data-status="idle"]'), lambda: "the kernel did not start")
    number = next(
        i for i, cell in enumerate(notebook_cells(name)) if "parameters" in cell["metadata"].get("tags", [])
    )
    cells = wait(lambda: browser.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell")[number:])
    cells[0].find_element(By.CSS_SELECTOR, ".cm-content").click()
    keys(Keys.CONTROL, Keys.END)
    for parameter, value in parameters.items():
        keys(Keys.END, Keys.ENTER, f"{parameter} = {value!r}")
    click('//*[contains(@class, "lm-MenuBar-itemLabel")][text()="Run"]')
    click('//*[contains(@class, "lm-Menu-itemLabel")][text()="Run All Cells"]')
    return wait(saved, lambda: (folder / "lab.log").read_text()[-2000:])


def printed(notebook: dict) -> str:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    errors = [output["evalue"] for output in outputs if output["output_type"] == "error"]
    on_red = ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
    assert (errors, on_red) == ([], [])
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def test_data_and_training_run_in_the_browser(lab, browser, tiny_backbone):
    """02_data, then 03_train on its files: the parameters typed into the cell are those of the runs."""
    folder = lab[0]
    build_tokenizer(str(tiny_backbone), folder / "tok")
    places = {"data_dir": "data", "tokenizer_dir": "tok", "runs_dir": "runs"}
    shared = {name: str(folder / place) for name, place in places.items()} | {"run_id": "in-lab"}
    data = printed(run_notebook(browser, lab, "02_data.ipynb", **shared, max_per_corpus=120))
    assert browser.execute_script(FIGURES) >= 1
    assert "Next: 03_train.ipynb" in data
    train = (folder / "data/train.jsonl").read_text().splitlines()
    assert 60 < len(train) <= 160  # whole documents up to 120 sentences, of 400

    model = {"backbone": str(tiny_backbone), "backbones_dir": str(folder / "backbones"), "subsample": 0.5}
    training = printed(run_notebook(browser, lab, "03_train.ipynb", **shared, **model))
    assert browser.execute_script(FIGURES) >= 1
    assert "Next: 04_greedy_dev.ipynb" in training
    metrics = json.loads((folder / "runs/in-lab/metrics.json").read_text())
    assert {name: stage["status"] for name, stage in metrics["stages"].items()} == {
        "02_data": "finished",
        "03_train": "finished",
    }
    assert (folder / "runs/in-lab/merged/config.json").is_file()
    kept = folder / "runs/in-lab/03_train.ipynb"  # as Lab saved it
    wait(lambda: kept.is_file() and "Next: 04_greedy_dev.ipynb" in printed(json.loads(kept.read_text())))
    assert f"03_train of {ROOT}/\n" in training
