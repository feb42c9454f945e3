"""Knows run folders: opening a notebook's run, executing notebooks, ``metrics.json``; knows nothing of models.

runs/<run_id>/  parameters.yaml  metrics.json  03_train.ipynb  checkpoints/  merged/  predictions-*.jsonl
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from platform import node
from typing import IO, Any

import yaml
from pydantic import BaseModel, model_validator

from biomerge_lib.core.errors import BioMergeError, DataError, ModelError, ParameterError, nearest
from biomerge_lib.core.files import OBJECT, fingerprint_weights, read_values, write_json, write_text
from biomerge_lib.core.parameters import (
    NOT_IDENTITY,
    SCORING,
    Parameters,
    check_parameters,
    compose_parameters,
    notebook_parameter_names,
    override_names,
    read_notebook_parameters,
    watch_metric_of,
)
from biomerge_lib.core.records import SPLITS
from biomerge_lib.experiment import jobs
from biomerge_lib.experiment.checkpoints import find_resumable_checkpoint
from biomerge_lib.experiment.execution import (
    UNWATCHED,
    NotebookFailed,
    execute_notebook,
    keep_executed_copy,
    kernel_shell,
    refuse_other_checkout,
)
from biomerge_lib.experiment.guarded_process import name_process
from biomerge_lib.experiment.provenance import (
    PROJECT_DIR,
    TEST_LOG,
    changed_splits,
    data_hashes,
    device_name,
    log_test_scoring,
    provenance,
)
from biomerge_lib.experiment.replaced import place_aside
from biomerge_lib.experiment.stages import BEFORE_TRAINING, DATA, SCORING_STAGES, STAGES, TRAIN

NOTEBOOKS_DIR = PROJECT_DIR / "notebooks"
KILLED = "its process ended without a word (killed, or out of memory?); run it again"
REFUSALS = {kind.__name__ for kind in (ParameterError, DataError, ModelError)}  # of what a notebook is given
log = logging.getLogger("biomerge")
Check = Callable[[Parameters], object]


class _Scored(BaseModel, extra="allow"):
    model: str | None = None
    data: dict[str, str] = {}


class _Provenance(BaseModel, extra="allow"):
    versions: dict[str, str] = {}


class _Stage(_Scored):
    status: str = ""
    started: str = ""
    process: tuple[str, int, str] | None = None
    error: str = ""
    metrics: OBJECT = {}
    provenance: _Provenance = _Provenance()
    input: _Scored | None = None

    @model_validator(mode="after")
    def _see_whether_it_runs(self) -> _Stage:
        by = self.process
        if self.status == "running" and by and by[0] == node() and by != name_process(by[1]):
            self.status, self.error = "killed", KILLED
        return self


class RecordedRun(BaseModel, extra="allow"):
    """What ``metrics.json`` may hold; :func:`read_metrics` gives what it does hold."""

    run_id: str = ""
    stages: dict[str, _Stage] = {}
    parameters: OBJECT = {}
    data: dict[str, str] = {}


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
        parameters = _scoring_parameters(folder, parameters, given)
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
        elif UNWATCHED in os.environ or not _forget(run, kind.__name__, {"metrics.json"}):
            run.fail(f"{kind.__name__}: {error}")
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    if shell := kernel_shell():
        shell.set_custom_exc((KeyboardInterrupt, Exception), note)


def _forget(run: Run, error: str, known: set[str]) -> bool:
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
    _refuse_other_training(folder, parameters)
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


def load_run_parameters(folder: Path) -> Parameters:
    """The parameters that a run was trained with.

    Raises:
        DataError: no such run.
        ParameterError: a value is none any more.
    """
    path = folder / "parameters.yaml"
    if not path.is_file():
        known = sorted(other.parent.name for other in folder.parent.glob("*/parameters.yaml"))
        there = f" There are: {', '.join(known[:8])}." if known else ""
        hint = nearest(folder.name, known) or there
        raise DataError(f"{folder}: no such run (run notebooks/03_train.ipynb first, or set run_id).{hint}")
    # A parameter that is younger than the run has its default: what it chooses was not there to choose.
    stored = read_values(path, OBJECT, cure=" Delete it: 03_train with the run's parameters writes it anew.")
    defaults = compose_parameters([]).model_dump() | {"watch_metric": watch_metric_of(stored)}
    try:
        return check_parameters(defaults | stored)
    except ParameterError as error:
        raise ParameterError(f"{path}: {error}") from None


def describe_start(name: str, overrides: Sequence[str], check: Check | None = None) -> tuple[Parameters, str]:
    """The parameters with which :func:`run_notebook` would run, and what it would make; nothing is made.

    Raises:
        ParameterError, DataError: as :func:`run_notebook`, before it starts.
    """
    notebook, parameters = find_notebook(name), compose_parameters(overrides)
    folder, stage, found = PROJECT_DIR / parameters.run_folder, notebook.stem, ""
    if stage == TRAIN:
        found = _check_start(check, parameters) + "\n"
        _refuse_other_training(folder, parameters)
    elif stage in SCORING_STAGES:
        parameters = _scoring_parameters(folder, parameters, override_names(overrides))
    there = f"is there: existing_run={parameters.existing_run}" if folder.is_dir() else "a new folder"
    writes = STAGES[stage].writes.replace("<run_id>", folder.name)
    made = f"{stage} would run in {folder}/ ({there})\nand write {notebook.name}, metrics.json, {writes}"
    return parameters, found + made


def _check_start(check: Check | None, parameters: Parameters) -> str:
    """What the notebook's first cell would print; what it would refuse is refused, and a job is told why."""
    try:
        with chdir(PROJECT_DIR):
            return str(check(parameters)) if check else ""
    except BioMergeError as error:
        jobs.note_failure(f"\n{error}")
        raise


def run_notebook(name: str, overrides: Sequence[str], check: Check | None = None) -> Path:
    """Execute a notebook with papermill into its run folder; return the executed notebook's path.

    ``check`` refuses training parameters that cannot work before anything is made, or an earlier run moved aside. A
    folder with nothing but a notebook that refused its input is gone again.

    Raises:
        ParameterError: unknown notebook or parameter, or a run of other parameters, before anything starts.
        DataError: 04 or 05 of a run that does not exist.
        RunInterrupted: a job asked training to stop; it left a checkpoint.
        BioMergeError: a cell failed; says which cell and which executed notebook to open.
    """
    notebook = find_notebook(name)
    parameters = compose_parameters(overrides)
    if jobs.requeued():  # what there is now is this job's own beginning
        parameters = parameters.model_copy(update={"existing_run": "resume"})
    training, scoring = notebook.stem == TRAIN, notebook.stem in SCORING_STAGES
    explicit = override_names(overrides)
    values = parameters.model_dump() | {"run_id": parameters.run_name}
    told = {"run_id", *explicit}
    if not scoring:  # which takes from the run what it is not told
        defaults = compose_parameters([]).model_dump()
        told = {name for name in values if values[name] != defaults[name]}
        told.update(notebook_parameter_names(notebook))
    folder = PROJECT_DIR / parameters.run_folder
    executed = folder / notebook.name
    if training:
        _check_start(check, parameters)
    with jobs.only_one(folder) if training else nullcontext() as lock:
        if training and parameters.existing_run == "resume":
            jobs.fetch_run(folder)
        elif training and (jobs.archived_run(folder) / "parameters.yaml").is_file():
            set_aside(jobs.archived_run(folder))
        # What the notebook's first cell would refuse is refused before its executed copy or metrics.json is touched.
        if training:
            _refuse_other_training(folder, parameters)
        elif scoring:
            _scoring_parameters(folder, parameters, explicit)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {name: values[name] for name in sorted(told)}
        held = [lock] if lock else []
        _execute(Run(folder, notebook.stem, parameters), notebook, executed, chosen, held)
    return executed


def _execute(run: Run, notebook: Path, executed: Path, chosen: Mapping[str, Any], held: Sequence[IO]) -> None:
    try:
        with jobs.progress_shown():
            execute_notebook(notebook, executed, chosen, cwd=PROJECT_DIR, held=held)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(run.interrupt()) from None
    except NotebookFailed as error:
        if jobs.was_interrupted():
            stopped = "stopped on the job's request"
            run.fail(f"{stopped}; the same command goes on from the checkpoint", "interrupted")
            raise jobs.RunInterrupted(f"{run.folder.name} {stopped}, with a checkpoint") from None
        if _forget(run, error.reason.partition(":")[0], {executed.name, "metrics.json", jobs.LOCK}):
            jobs.note_failure(f"\n{error.reason}")
            raise BioMergeError(f"{notebook.name}: {error.reason}") from None
        try:
            jobs.note_failure(f"{jobs.kept_path(executed)}\n{notebook.name}, {error}")
            run.fail(error.reason)
        except (OSError, BioMergeError) as full:  # the error below says it in their place
            log.warning("the failure could not be recorded in %s: %s", run.folder, full)
        raise BioMergeError(
            f"{notebook.name} failed in cell {error.cell}: {error.reason}\nOpen {jobs.kept_path(executed)} "
            "to see it in place."
        ) from None


def find_notebook(name: str) -> Path:
    """``03_train`` or a path to the notebook's file.

    Raises:
        ParameterError: there is none; names the nearest.
    """
    known = {path.stem: path for path in sorted(NOTEBOOKS_DIR.glob("*.ipynb"))}
    if found := known.get(stem := Path(name).stem):
        return found
    raise ParameterError(f"unknown notebook {name!r}.{nearest(stem, known)} There are: {', '.join(known)}.")


def read_metrics(folder: Path) -> dict[str, Any]:
    """``metrics.json`` of a run folder, or an empty one.

    Raises:
        DataError: it is cut short, or holds something else.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return {}
    cure = " Move it away: each notebook that is run again records its part anew."
    return read_values(path, RecordedRun, cure=cure).model_dump(exclude_unset=True)


def outdated_stages(recorded: Mapping[str, Any], folder: Path | None = None) -> dict[str, str]:
    """The stages whose input is not what lies there now, by hash; each with what is another.

    What lies there is the model and the data that 03_train recorded; with the ``folder`` of a run (not of a copy
    without its training), what the files are now.
    """
    stages, data = recorded.get("stages", {}), recorded.get("data", {})
    outdated: dict[str, str] = {}
    if data and changed_splits(stages.get(DATA, {}).get("data") or {}, data):
        outdated[DATA] = "it wrote other data than 03_train read"
    model, now = stages.get(TRAIN, {}).get("model"), {}
    parameters = recorded.get("parameters", {})
    if folder and _has_training(folder) and isinstance(parameters.get("data_dir"), str):
        model = model and (fingerprint_weights(folder / "merged") or model)
        now = data_hashes(PROJECT_DIR / parameters["data_dir"])
        used = [split for split in SPLITS if split != "test" or parameters.get("run_test_eval")]
        if changed := [split for split in changed_splits(data, now) if split in used]:
            outdated[TRAIN] = f"{' and '.join(changed)}.jsonl in {parameters['data_dir']} changed since"
    for stage in SCORING_STAGES:
        read = stages.get(stage, {}).get("input") or {}
        if stage in stages and model and read.get("model") != model:
            outdated[stage] = "it scored another model than the one that lies there now"
        elif changed := changed_splits(read.get("data") or {}, now):
            outdated[stage] = f"it scored another {changed[0]}.jsonl than the one that lies there now"
    return outdated


def _has_training(folder: Path) -> bool:
    return (folder / "training.json").is_file() or any(folder.glob("checkpoints/checkpoint-*"))


def current_stages(recorded: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """The recorded stages without those that are out of date (:func:`outdated_stages`)."""
    outdated = outdated_stages(recorded, folder)
    return {name: stage for name, stage in recorded.get("stages", {}).items() if name not in outdated}


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


def _refuse_other_training(folder: Path, parameters: Parameters) -> None:
    if parameters.existing_run == "replace" or not (folder / "parameters.yaml").is_file():
        return
    if changed := _differences(load_run_parameters(folder), parameters, PARAMETERS_OF_TRAINING):
        problem = f"exists with {changed}"
    elif why := outdated_stages(read_metrics(folder), folder).get(TRAIN):
        problem = f"is out of date: {why}"
    else:
        return
    raise ParameterError(f"run {folder.name} {problem}. Choose another run_id, or set existing_run=replace.")


def _scoring_parameters(folder: Path, parameters: Parameters, given: frozenset[str]) -> Parameters:
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
