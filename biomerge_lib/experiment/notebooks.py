"""Knows how the command line runs a notebook: what would be refused is refused first, then papermill executes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from pathlib import Path
from typing import IO, Any

from biomerge_lib.core.composition import compose_parameters, notebook_parameter_names, override_names
from biomerge_lib.core.errors import BioMergeError, ParameterError, nearest
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.experiment import jobs
from biomerge_lib.experiment.execution import NotebookFailed, execute_notebook
from biomerge_lib.experiment.provenance import PROJECT_DIR
from biomerge_lib.experiment.runs import (
    Check,
    Run,
    forget_refused,
    refuse_other_training,
    scoring_parameters,
    set_aside,
)
from biomerge_lib.experiment.stages import SCORING_STAGES, STAGES, TRAIN

NOTEBOOKS_DIR = PROJECT_DIR / "notebooks"
log = logging.getLogger("biomerge")


def describe_start(name: str, overrides: Sequence[str], check: Check | None = None) -> tuple[Parameters, str]:
    """The parameters with which :func:`run_notebook` would run, and what it would make; nothing is made.

    Raises:
        ParameterError, DataError: as :func:`run_notebook`, before it starts.
    """
    notebook, parameters = find_notebook(name), compose_parameters(overrides)
    folder, stage, found = PROJECT_DIR / parameters.run_folder, notebook.stem, ""
    if stage == TRAIN:
        found = _check_start(check, parameters) + "\n"
        refuse_other_training(folder, parameters)
    elif stage in SCORING_STAGES:
        parameters = scoring_parameters(folder, parameters, override_names(overrides))
    there = f"is there: existing_run={parameters.existing_run}" if folder.is_dir() else "a new folder"
    writes = STAGES[stage].writes.replace("<run_id>", folder.name)
    made = f"{stage} would run in {folder}/ ({there})\nand write {notebook.name}, metrics.json, {writes}"
    return parameters, found + made


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
            refuse_other_training(folder, parameters)
        elif scoring:
            scoring_parameters(folder, parameters, explicit)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {name: values[name] for name in sorted(told)}
        held = [lock] if lock else []
        _execute(Run(folder, notebook.stem, parameters), notebook, executed, chosen, held)
    return executed


def _check_start(check: Check | None, parameters: Parameters) -> str:
    """What the notebook's first cell would print; what it would refuse is refused, and a job is told why."""
    try:
        with chdir(PROJECT_DIR):
            return str(check(parameters)) if check else ""
    except BioMergeError as error:
        jobs.note_failure(f"\n{error}")
        raise


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
        if forget_refused(run, error.reason.partition(":")[0], {executed.name, "metrics.json", jobs.LOCK}):
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
