"""Knows a sweep file: its grid, which of its points are done, and how they rank. Needs no server.

parameters/sweep/NAME.yaml --[read_sweep]--> Sweep --[run_point]--> runs/<run_id>/ --[rank_points]--> Point, best first

The file is what ``wandb sweep`` takes; a point has the same parameters, and so the same run folder, on either way.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel

from biomerge_lib.core.composition import as_override, as_overrides, compose_parameters
from biomerge_lib.core.errors import ParameterError, nearest
from biomerge_lib.core.files import OBJECT, read_values
from biomerge_lib.core.parameters import PARAMETER_NAMES, PARAMETERS_DIR, Parameters, check_names
from biomerge_lib.experiment import jobs
from biomerge_lib.experiment.checkpoints import best_checkpoint
from biomerge_lib.experiment.provenance import PROJECT_DIR, changed_splits, data_hashes
from biomerge_lib.experiment.recorded import load_run_parameters, read_metrics
from biomerge_lib.experiment.runs import Check
from biomerge_lib.experiment.stages import TRAIN
from biomerge_lib.experiment.tracking import run_tracked_notebook


@dataclass(frozen=True)
class Sweep:
    """``overrides`` are those of the file's command and the caller's; ``grid`` maps parameters to their values."""

    name: str
    metric: str
    maximize: bool
    overrides: tuple[str, ...]
    grid: dict[str, list[Any]]

    @property
    def points(self) -> list[dict[str, Any]]:
        combinations = itertools.product(*self.grid.values())
        return [dict(zip(self.grid, values, strict=True)) for values in combinations]

    def point_overrides(self, number: int) -> list[str]:
        """``["task=ner_span", ..., "learning_rate=0.0001"]``."""
        return [*self.overrides, *as_overrides(self.points[number])]

    def parameters(self, number: int) -> Parameters:
        return compose_parameters(self.point_overrides(number))


class _Metric(BaseModel):
    name: str = "eval_ner_f1"
    goal: Literal["maximize", "minimize"] = "maximize"


class _SweepFile(BaseModel):
    parameters: OBJECT
    method: str = ""
    metric: _Metric = _Metric()
    name: str | None = None
    command: list[Any] = []


@dataclass(frozen=True)
class Point:
    """A point's state: finished, failed, interrupted, killed, running, outdated (other data) or waiting."""

    number: int
    values: dict[str, Any]
    folder: Path
    status: str
    reason: str = ""
    score: float | None = None
    checkpoint: Path | None = None


def read_sweep(path: Path | str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and check all of its points; ``overrides`` come after those of the file's command.

    Raises:
        ParameterError: no such file, no grid, a key that is no parameter, a point that contradicts itself.
    """
    path = _find(Path(path))
    cure = " A sweep file has method, metric, parameters and command."
    config = read_values(path, _SweepFile, cure=cure, raises=ParameterError)
    if config.method != "grid":
        raise ParameterError(
            f"{path}: method={config.method} needs the W&B server (wandb sweep); only a grid can be "
            "enumerated without it."
        )
    check_names(config.parameters)
    grid = {name: _values(path, name, found) for name, found in config.parameters.items()}
    for word in overrides:
        if word.partition("=")[0].lstrip("-+") in ({"run_id"} | grid.keys()):
            raise ParameterError(f"{word}: the sweep sets that for each point.")
    if len(grid.get("watch_metric", [])) > 1 and config.metric.name == "eval_ner_f1":
        raise ParameterError(
            f"{path}: eval_ner_f1 means another F1 for each watch_metric, so its points cannot be ranked by it: "
            "set metric: {name: greedy_dev_ner_f1}."
        )
    if config.metric.name.startswith("test_"):
        raise ParameterError(
            f"{path}: metric={config.metric.name}: points are chosen on dev; test is scored once."
        )
    sweep = Sweep(
        name=config.name or path.stem,
        metric=config.metric.name,
        maximize=config.metric.goal == "maximize",
        overrides=(*_command_overrides(config.command), *overrides),
        grid=grid,
    )
    for number in range(len(sweep.points)):
        if sweep.parameters(number).train_on == "train_dev":
            raise ParameterError(f"{path}: train_on=train_dev leaves no dev to rank points by.")
    return sweep


def read_point(sweep: Sweep, number: int) -> Point:
    """What there is of a point, here or (in a job) in the archive."""
    parameters = sweep.parameters(number)
    folder = jobs.archived_run(PROJECT_DIR / parameters.run_folder)
    stage = read_metrics(folder).get("stages", {}).get(TRAIN, {})
    metrics = stage.get("metrics", {})
    score = metrics.get(sweep.metric)
    status, reason = stage.get("status", "waiting"), stage.get("error", "")
    if not (folder / "parameters.yaml").is_file():
        status = "failed" if reason else "waiting"
    elif changed := _other_conditions(parameters, folder):
        status, reason = "outdated", changed
    elif status == "finished" and not (isinstance(score, int | float) and isfinite(score)):
        status, reason = "failed", f"it has no {sweep.metric}"
    point = Point(number, sweep.points[number], folder, status, reason)
    if status != "finished":
        return point
    return replace(point, score=score, checkpoint=best_checkpoint(folder, metrics, must_exist=False))


def run_point(sweep: Sweep, number: int, check: Check | None = None) -> None:
    """Train a point, unless it is finished with the same parameters and data; a failed one is tried again.

    ``check`` refuses parameters that cannot work before an outdated run is moved aside.

    Raises:
        ParameterError: there is no such point.
        BioMergeError: its notebook failed.
    """
    if not 0 <= number < len(sweep.points):
        raise ParameterError(
            f"{sweep.name} has the points 0 to {len(sweep.points) - 1}; there is no {number}."
        )
    point = read_point(sweep, number)
    label = " ".join(as_overrides(point.values))
    print(f"point {number} of {sweep.name} ({label}): {point.status} {point.reason}".rstrip(), flush=True)
    if point.status == "finished":
        print(f"{point.folder.name} has {sweep.metric} = {point.score:.4f}: nothing to do")
        return
    os.environ.setdefault("WANDB_RUN_GROUP", sweep.name)
    os.environ["WANDB_NAME"] = label
    again = ["existing_run=replace"] if point.status == "outdated" else []
    run_tracked_notebook(TRAIN, [*sweep.point_overrides(number), *again], check)


def rank_points(sweep: Sweep) -> list[Point]:
    """The finished points, best first, then the others in the grid's order."""
    points = [read_point(sweep, number) for number in range(len(sweep.points))]
    finished = [point for point in points if point.status == "finished"]
    sign = -1 if sweep.maximize else 1
    finished.sort(key=lambda point: (sign * cast(float, point.score), point.number))
    return finished + [point for point in points if point.status != "finished"]


def describe_ranking(sweep: Sweep, points: Sequence[Point]) -> str:
    """The ranking as text: a line a point, with the parameters that vary, and the best checkpoint's place."""
    from pandas import DataFrame

    varying = [name for name, values in sweep.grid.items() if len(values) > 1]
    finished = [point for point in points if point.status == "finished"]
    rows = [
        {
            "rank": str(rank) if point.status == "finished" else point.status,
            sweep.metric: "" if point.score is None else f"{point.score:.4f}",
            **{name: as_override(point.values[name]) for name in varying},
            "point": str(point.number),
            "run": point.folder.name + (f"  ({point.reason})" if point.reason else ""),
        }
        for rank, point in enumerate(points, start=1)
    ]
    best = f"best checkpoint: {finished[0].checkpoint}" if finished else "no point is finished yet"
    head = f"{sweep.name}: {len(finished)} of {len(points)} points finished"
    return "\n".join([head, DataFrame(rows).to_string(index=False), best])


def pending_points(sweep: Sweep) -> str:
    """The points still to run, as ``sbatch --array`` takes them: ``0,3,4``; empty when all are finished."""
    return ",".join(str(point.number) for point in rank_points(sweep) if point.status != "finished")


def _find(path: Path) -> Path:
    for candidate in (path, PROJECT_DIR / path):
        if candidate.is_file():
            return candidate
    known = [f"parameters/sweep/{found.name}" for found in sorted((PARAMETERS_DIR / "sweep").glob("*.yaml"))]
    raise ParameterError(
        f"{path}: no such sweep file.{nearest(str(path), known)} There are: {', '.join(known)}."
    )


def _values(path: Path, name: str, found: Any) -> list[Any]:
    if isinstance(found, dict) and "value" in found:
        return [found["value"]]
    if isinstance(found, dict) and isinstance(found.get("values"), list) and found["values"]:
        return found["values"]
    raise ParameterError(f"{path}: {name} has neither values (a list) nor value, so it is no grid.")


def _command_overrides(command: list[Any]) -> list[str]:
    """``task=ner_span`` and the like in the command that an agent would run."""
    words = [word for word in command if isinstance(word, str) and "=" in word]
    groups = {path.name for path in PARAMETERS_DIR.iterdir() if path.is_dir()}
    return [word for word in words if word.partition("=")[0] in groups | PARAMETER_NAMES]


def _other_conditions(parameters: Parameters, folder: Path) -> str:
    """Why a run with the same name is none of this point: other data, or a dev set of another size."""
    stored = load_run_parameters(folder)
    if stored.eval_limit != parameters.eval_limit:
        return f"scored with eval_limit={stored.eval_limit}"
    then, now = read_metrics(folder).get("data", {}), data_hashes(PROJECT_DIR / parameters.data_dir)
    changed = changed_splits(then, now)
    return f"{' and '.join(changed)}.jsonl changed since" if changed else ""
