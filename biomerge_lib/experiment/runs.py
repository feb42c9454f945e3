"""Knows run folders: how a notebook opens its run and records what it does; knows nothing of models.

runs/<run_id>/  parameters.yaml  metrics.json  03_train.ipynb  checkpoints/  merged/  predictions-*.jsonl
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from biomerge_lib.core.composition import read_notebook_parameters
from biomerge_lib.core.errors import DataError, ModelError, ParameterError
from biomerge_lib.core.files import fingerprint_weights, write_json, write_text
from biomerge_lib.core.parameters import NOT_IDENTITY, SCORING, Parameters
from biomerge_lib.experiment import jobs
from biomerge_lib.experiment.checkpoints import find_resumable_checkpoint
from biomerge_lib.experiment.execution import (
    UNWATCHED,
    keep_executed_copy,
    kernel_shell,
    refuse_other_checkout,
)
from biomerge_lib.experiment.guarded_process import name_process
from biomerge_lib.experiment.provenance import (
    PROJECT_DIR,
    TEST_LOG,
    data_hashes,
    device_name,
    log_test_scoring,
    provenance,
)
from biomerge_lib.experiment.recorded import load_run_parameters, outdated_stages, read_metrics
from biomerge_lib.experiment.replaced import place_aside
from biomerge_lib.experiment.stages import BEFORE_TRAINING, DATA, SCORING_STAGES, TRAIN

REFUSALS = {kind.__name__ for kind in (ParameterError, DataError, ModelError)}  # of what a notebook is given
log = logging.getLogger("biomerge")
Check = Callable[[Parameters], object]


class Run:
    """One notebook's part of a run folder: knows where to write, and records status, metrics and provenance."""

    def __init__(self, folder: Path, stage: str, parameters: Parameters):
        self.folder = folder
        self.stage = stage
        self.parameters = parameters
        self.checkpoints, self.merged = folder / "checkpoints", folder / "merged"
        self._begin()

    def predictions(self, split: str, decoder: str) -> Path:
        """``predictions-dev-greedy.jsonl`` or ``predictions-dev-vllm.jsonl``."""
        return self.folder / f"predictions-{split}-{decoder}.jsonl"

    def start(self) -> None:
        """Record that the stage runs, with where its numbers will come from, and (04, 05) hashes of what it scores."""
        self._begin()
        read = {}
        if self.stage in SCORING_STAGES:
            split = self.parameters.split
            data = {name: value for name, value in self._data().items() if name == split}
            read = {"input": {"model": fingerprint_weights(self.merged), "data": data}}
            if split == "test":
                log_test_scoring(self.folder, self.stage, self.parameters.data_dir)
        process = name_process(os.getpid())
        self._write(status="running", metrics={}, provenance=provenance(), process=process, **read)
        _watch_cells(self)

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Record the stage's metrics in ``metrics.json`` and glue its scalars into the notebook (scrapbook)."""
        seconds = round(time.monotonic() - self._clock, 2)
        left: dict[str, Any] = {}
        if self.stage == DATA:
            left = {"data": self._data()}
        elif self.stage == TRAIN:
            left = {"model": fingerprint_weights(self.merged)}
        metrics = {**metrics, "stage_seconds": seconds}
        self._write(status="finished", metrics=metrics, provenance=provenance(), **left)
        _glue(metrics)

    def fail(self, reason: str, status: str = "failed") -> None:
        self._write(status=status, error=reason)

    def interrupt(self) -> str:
        """Record that the user stopped the stage; say what is kept."""
        kept = find_resumable_checkpoint(self.checkpoints) if self.stage == TRAIN else None
        told = f"interrupted; {f'{kept} is kept, and ' if kept else ''}running {self.stage} again "
        told += "goes on from there" if kept else "begins anew"
        self.fail(told, "interrupted")
        return told

    def _begin(self) -> None:
        self._started, self._clock = datetime.now(UTC), time.monotonic()

    def _data(self) -> dict[str, str]:
        return data_hashes(PROJECT_DIR / self.parameters.data_dir)

    def _write(self, **fields: Any) -> None:
        everything = read_metrics(self.folder)
        stage = everything.setdefault("stages", {}).get(self.stage, {})
        stage = {name: value for name, value in stage.items() if name not in ("error", "process")} | fields
        self.is_open = stage["status"] == "running"
        stage["started"] = self._started.isoformat(timespec="seconds")
        everything["run_id"] = self.folder.name
        everything["stages"][self.stage] = stage
        # What a run was trained with is 03's to say; the notebooks before it only announce it.
        if self.stage == TRAIN or ("parameters" not in everything and self.stage in BEFORE_TRAINING):
            everything["parameters"] = self.parameters.model_dump()
            everything["data"] = self._data()
        write_json(self.folder / "metrics.json", everything)


def open_run(stage: str, namespace: Mapping[str, Any], check: Check | None = None) -> Run:
    """Begin a notebook: go to the project folder, check the parameters, open the run folder.

    Args:
        stage: the notebook's name, e.g. ``03_train``.
        namespace: the notebook's ``globals()``, after its parameters cell.
        check: refuses parameters that cannot work, before anything is written; what it returns is printed.

    Raises:
        ParameterError: see :func:`read_notebook_parameters`; a scoring notebook's training parameter differs
            from the run's.
        DataError: a scoring notebook's run does not exist.
    """
    refuse_other_checkout()
    os.chdir(PROJECT_DIR)
    quiet_libraries()
    parameters, given = read_notebook_parameters(namespace)
    folder = parameters.run_folder
    if stage in SCORING_STAGES:
        parameters = scoring_parameters(folder, parameters, given)
    found = check(parameters) if check else None
    run = Run(folder, stage, parameters)
    if stage == TRAIN:
        prepare_run_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    keep_executed_copy(PROJECT_DIR / folder / f"{stage}.ipynb")
    print(*[found] if check else [], f"{stage} of {PROJECT_DIR}/", sep="\n")
    run.start()
    print(f"run {folder.name} in {folder}/ on {device_name()}")
    return run


def _watch_cells(run: Run) -> None:
    """From now on the notebook's failing cells are recorded, and an interrupt is one line instead of a traceback."""

    def note(shell: Any, kind: type, error: BaseException, trace: Any, tb_offset: int | None = None) -> None:
        if not run.is_open:
            pass
        elif isinstance(error, KeyboardInterrupt):
            told, trace = run.interrupt(), None
            error._render_traceback_ = lambda: [told]  # type: ignore[attr-defined]  # IPython asks for it
            if UNWATCHED in os.environ:  # papermill has gone, and what the kernel says of that is noise
                logging.disable()
        elif UNWATCHED in os.environ or not forget_refused(run, kind.__name__, {"metrics.json"}):
            run.fail(f"{kind.__name__}: {error}")
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    if shell := kernel_shell():
        shell.set_custom_exc((KeyboardInterrupt, Exception), note)


def forget_refused(run: Run, error: str, known: set[str]) -> bool:
    """Remove a folder in which a notebook refused its input, where it holds no more than ``known`` files of it."""
    is_own = run.folder.is_dir() and not run.folder.is_symlink()
    left = {path.name for path in run.folder.iterdir()} - known if is_own else known
    if error not in REFUSALS or left or read_metrics(run.folder).get("stages", {}).keys() - {run.stage}:
        return False
    shutil.rmtree(run.folder)
    return True


def prepare_run_folder(run: Run) -> None:
    """Make the folder of a training run, or move an older run of that name aside (``existing_run=replace``)."""
    folder, parameters = run.folder, run.parameters
    if parameters.existing_run == "replace" and (folder / "parameters.yaml").is_file():
        set_aside(folder)
    refuse_other_training(folder, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(parameters.model_dump() | {"run_id": folder.name}, sort_keys=False)
    head = "# papermill notebooks/03_train.ipynb out.ipynb -f this file\n"
    write_text(folder / "parameters.yaml", head + text)


def set_aside(folder: Path) -> None:
    """Move a run to a hidden folder beside it; what 01 and 02 left, and the log of test scorings, is copied there."""
    aside, stages = place_aside(folder), read_metrics(folder).get("stages", {})
    aside.mkdir()
    for path in sorted(folder.iterdir()):
        if path.name == TEST_LOG or (path.suffix == ".ipynb" and path.stem in BEFORE_TRAINING):
            shutil.copy2(path, aside)
        elif path.name != jobs.LOCK:
            shutil.move(path, aside / path.name)
    if kept := {name: stages[name] for name in BEFORE_TRAINING if name in stages}:
        write_json(folder / "metrics.json", {"run_id": folder.name, "stages": kept})
    lists = f"`python -m biomerge_lib replaced {folder.parent}`"
    print(f"existing_run=replace: the earlier run was moved to {aside}/")
    print(f"{lists} lists such runs, with their sizes, and removes them")


def quiet_libraries() -> None:
    """Keep third-party chatter out of notebooks and logs; warnings that matter stay."""
    # nbformat's jsonschema imports it where it can, and it compiles a grammar for three seconds each time.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # typeshed leaves None out
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PyTorch's threads on a CPU sleep while they wait; spinning, they take the cores from whom they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    for noisy in ("torchao", "torch.utils._pytree", "httpx", "httpx2", "unsloth", "bitsandbytes"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    shell = kernel_shell()
    # In a notebook, stderr is shown on red.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout if shell else sys.stderr)
    logging.captureWarnings(shell is not None)
    for chatty in ("hydra", "datasets", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It sets a level of its own when it is imported, and warns of a machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # Its warnings are about names that a notebook's parameters cell does not list; they are checked here.
    logging.getLogger("papermill").setLevel(logging.ERROR)


PARAMETERS_OF_TRAINING = frozenset(Parameters.model_fields) - NOT_IDENTITY


def refuse_other_training(folder: Path, parameters: Parameters) -> None:
    """Raise ParameterError if the folder holds a run of other parameters or data, and is not to be replaced."""
    if parameters.existing_run == "replace" or not (folder / "parameters.yaml").is_file():
        return
    if changed := _differences(load_run_parameters(folder), parameters, PARAMETERS_OF_TRAINING):
        problem = f"exists with {changed}"
    elif why := outdated_stages(read_metrics(folder), folder).get(TRAIN):
        problem = f"is out of date: {why}"
    else:
        return
    raise ParameterError(f"run {folder.name} {problem}. Choose another run_id, or set existing_run=replace.")


def scoring_parameters(folder: Path, parameters: Parameters, given: frozenset[str]) -> Parameters:
    """Those that the run was trained with, and of ``parameters`` what is ``given`` and only scores.

    Raises:
        ParameterError: the run was trained with others, or on the split that is to be scored.
        DataError: no such run, or it has no merged model.
    """
    stored = load_run_parameters(folder)
    if changed := _differences(stored, parameters, given & PARAMETERS_OF_TRAINING):
        raise ParameterError(
            f"run {folder.name} was trained with {changed}. Leave these out, or name another run_id."
        )
    chosen = stored.model_copy(update={name: getattr(parameters, name) for name in given & SCORING})
    if (chosen.train_on, chosen.split) == ("train_dev", "dev"):
        raise ParameterError(
            f"run {folder.name} was trained on dev, which says nothing of it: set split=test."
        )
    if not (folder / "merged/config.json").is_file():
        again = f"papermill notebooks/{TRAIN}.ipynb {folder}/{TRAIN}.ipynb -f {folder}/parameters.yaml -p merge True"
        raise DataError(f"{folder}/merged: no merged model. 03_train makes it of the checkpoint: {again}")
    return chosen


def _differences(stored: Parameters, parameters: Parameters, names: frozenset[str]) -> str:
    return ", ".join(
        f"{name}={getattr(stored, name)!r} (not {getattr(parameters, name)!r})"
        for name in sorted(names)
        if getattr(stored, name) != getattr(parameters, name)
    )


def _glue(metrics: Mapping[str, Any]) -> None:
    if kernel_shell() is None:
        return
    import scrapbook

    for name, value in metrics.items():
        if isinstance(value, (bool, int, float, str)):
            scrapbook.glue(name, value)
