"""Knows what a run has recorded, ``metrics.json`` and ``parameters.yaml``, and what of it is out of date."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from platform import node
from typing import Any

from pydantic import BaseModel, model_validator

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import DataError, ParameterError, nearest
from biomerge_lib.core.files import OBJECT, fingerprint_weights, read_values
from biomerge_lib.core.parameters import Parameters, check_parameters, watch_metric_of
from biomerge_lib.core.records import SPLITS
from biomerge_lib.experiment.guarded_process import name_process
from biomerge_lib.experiment.provenance import PROJECT_DIR, changed_splits, data_hashes
from biomerge_lib.experiment.stages import DATA, SCORING_STAGES, TRAIN

KILLED = "its process ended without a word (killed, or out of memory?); run it again"


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
