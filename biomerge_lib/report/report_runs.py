"""Knows what run folders say, whole or broken, and in which order runs rank; knows nothing of pages or figures.

runs/<run_id>/{metrics.json, parameters.yaml, *.ipynb} --[collect_runs]--> ReportedRun
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

import pandas as pd

from biomerge_lib.core.composition import as_overrides, compose_parameters
from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import read_values
from biomerge_lib.core.parameters import NOT_IDENTITY, watch_metric_of
from biomerge_lib.experiment.recorded import outdated_stages, read_metrics
from biomerge_lib.experiment.stages import GREEDY, REPORT, TRAIN, VLLM

# Where a run is kept or watched is no hyperparameter; how much of dev is scored matters to the reader.
HIDDEN = NOT_IDENTITY - {"eval_limit", "max_new_tokens", "vllm_dtype"}
FEW_STEPS = 20  # of an optimiser: fewer check that everything works together, and teach little
Sources = tuple[tuple[str, str], ...]  # (stage, metric)
SCORE = (TRAIN, "greedy_dev_ner_f1"), (GREEDY, "greedy_dev_ner_f1")
READINGS = {  # of one forward pass
    "answer F1": ((TRAIN, "eval_answer_ner_f1"),),
    "token head F1": ((TRAIN, "eval_head_ner_f1"),),
}
F1_COLUMNS = {
    "greedy dev F1": SCORE,
    "precision": ((TRAIN, "greedy_dev_ner_precision"), (GREEDY, "greedy_dev_ner_precision")),
    "recall": ((TRAIN, "greedy_dev_ner_recall"), (GREEDY, "greedy_dev_ner_recall")),
    **READINGS,
    "04 greedy dev F1": ((GREEDY, "greedy_dev_ner_f1"),),
    "05 vLLM dev F1": ((VLLM, "vllm_dev_ner_f1"),),
    "05 sentences that differ": ((VLLM, "parity_differing_sentences"),),
    "test F1": ((TRAIN, "test_ner_f1"), (GREEDY, "greedy_test_ner_f1"), (VLLM, "vllm_test_ner_f1")),
}
COST_COLUMNS = {
    "training s": ((TRAIN, "train_seconds"),),
    "steps": ((TRAIN, "steps"),),
    "tokens/s": ((TRAIN, "train_tokens_per_second"),),
    "sentences/s": ((TRAIN, "train_sentences_per_second"),),
    "peak memory GB": ((TRAIN, "peak_memory_gb"),),
    "trainable weights": ((TRAIN, "trainable_parameters"),),
    "greedy decoding s": ((GREEDY, "decode_seconds"), (TRAIN, "greedy_dev_seconds")),
    "vLLM sentences/s": ((VLLM, "vllm_sentences_per_second"),),
    "vLLM start-up s": ((VLLM, "vllm_startup_seconds"),),
}


@dataclass(eq=False)
class ReportedRun:
    """What a run folder says. ``rank`` counts from 1 and is None unless ``status`` is ``finished``.

    ``outdated``: the stages whose input is not what lies there now, and why; they have no ``metrics``.
    """

    folder: Path
    status: Literal["finished", "partial", "failed", "outdated"]
    reason: str
    parameters: dict[str, Any]
    data: dict[str, str]
    stages: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    outdated: dict[str, str] = field(default_factory=dict)
    rank: int | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name  # the folder may be "."

    @property
    def provenance(self) -> dict[str, Any]:
        return self.stages.get(TRAIN, {}).get("provenance", {})

    @property
    def watch_metric(self) -> str:
        return watch_metric_of(self.parameters)

    @property
    def scored_on(self) -> str:
        """The records behind the score and the F1 that chose the checkpoint."""
        records = self.value(tuple((stage, "greedy_dev_records") for stage, _ in SCORE))
        sentences = records or self.parameters.get("eval_limit") or "all"
        dev = str(self.data.get("dev"))[:12]
        return f"{sentences} sentences of dev {dev}, watch_metric={self.watch_metric}"

    @property
    def gpu_hours(self) -> float | None:
        """Hours of its stages, since their last starts, times the GPUs that 03 had; None on a CPU."""
        gpus, _, card = str(self.provenance.get("device")).partition(" x ")
        seconds = sum(metrics.get("stage_seconds", 0) for metrics in self.metrics.values())
        return int(gpus) * seconds / 3600 if card and seconds else None

    @property
    def score(self) -> float | None:
        return self.value(SCORE)

    def value(self, sources: Sources) -> float | None:
        """The first finite number among (stage, metric) pairs."""
        for stage, name in sources:
            value = self.metrics.get(stage, {}).get(name)
            if is_number(value):
                return value
        return None

    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the score, from the stage that the score comes from."""
        for stage, name in SCORE:
            if self.value(((stage, name),)) is not None:
                low, high = (self.value(((stage, f"{name}_{edge}"),)) for edge in ("low", "high"))
                return None if low is None or high is None else (low, high)
        return None


def collect_runs(paths: Iterable[Path | str] | Path | str) -> list[ReportedRun]:
    """Read run folders, or folders of run folders: the finished runs first, best first, then the others.

    A run is ranked by its greedy dev F1, if its 03_train finished, among those that were ``scored_on`` the same; the
    largest such group comes first. F1s come from the executed notebooks (scrapbook), all else from ``metrics.json``; a
    disagreement between the two becomes one of the run's ``notes``.

    Raises:
        DataError: a path does not exist, or there is no run in any of them.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for path in given:
        if not path.is_dir():
            raise DataError(
                f"{path}: no such folder. Give run folders, or the folder that holds them (runs)."
            )
    folders = {folder.resolve(): folder for path in given for folder in _run_folders(path)}
    runs = [run for run in map(_read_run, folders.values()) if run]
    if not runs:
        where = ", ".join(map(str, given))
        raise DataError(f"{where}: no run here. Train one first: python -m biomerge_lib run 03_train")
    finished = [run for run in runs if run.status == "finished"]
    finished.sort(key=lambda run: (-cast(float, run.score), run.name))
    groups: dict[str, list[ReportedRun]] = {}
    for run in finished:
        groups.setdefault(run.scored_on, []).append(run)
        run.rank = len(groups[run.scored_on])
    ranked = chain(*sorted(groups.values(), key=len, reverse=True))
    others = sorted((run for run in runs if run.rank is None), key=lambda run: (run.status, run.name))
    return [*ranked, *others]


def group_runs(runs: Sequence[ReportedRun]) -> tuple[list[list[ReportedRun]], list[ReportedRun]]:
    """Of :func:`collect_runs`: a ranking each for the runs that can be compared, and the runs that have no rank."""
    groups = groupby((run for run in runs if run.rank), key=lambda run: run.scored_on)
    return [list(group) for _, group in groups], [run for run in runs if not run.rank]


def seeds_table(ranked: Sequence[ReportedRun], columns: Sequence[str] = ("greedy dev F1",)) -> pd.DataFrame:
    """Runs of one ranking that differ by their seed alone: mean and standard deviation of ``columns``."""
    groups: dict[str, list[ReportedRun]] = {}
    for run in ranked:
        shared = sorted(item for item in run.parameters.items() if item[0] not in HIDDEN | {"seed"})
        groups.setdefault(f"{run.scored_on} {shared}", []).append(run)
    rows = []
    for group in groups.values():
        seeds = [str(run.parameters.get("seed")) for run in group]
        if len(set(seeds)) > 1:
            row = {"runs": ", ".join(run.name for run in group), "seeds": ", ".join(seeds)}
            values = values_table(group, {name: F1_COLUMNS[name] for name in columns})[list(columns)]
            for name in values.dropna(axis=1):
                row[f"{name}, mean ± SD"] = f"{values[name].mean():.3f} ± {values[name].std():.3f}"
            rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def runs_table(runs: Sequence[ReportedRun]) -> pd.DataFrame:
    """Ranked runs as a pandas table: F1, precision, recall, the parameters that vary, then every other F1."""
    ranked = [run for run in runs if run.rank]
    table = values_table(ranked, F1_COLUMNS)
    edges = [run.interval() for run in ranked]
    table.insert(3, "95 % interval", [f"{pair[0]:.3f}–{pair[1]:.3f}" if pair else None for pair in edges])
    for place, (name, values) in enumerate(varying_parameters(ranked).items(), start=6):
        table.insert(place, name, values)
    return table.dropna(axis=1, how="all")


def values_table(runs: Sequence[ReportedRun], columns: Mapping[str, Sources]) -> pd.DataFrame:
    """A row a run, with the first number of each column's sources; NaN where there is none."""
    rows = [[run.rank, run.name, *map(run.value, columns.values())] for run in runs]
    return pd.DataFrame(rows, columns=["rank", "run", *columns])


def varying_parameters(runs: Sequence[ReportedRun]) -> dict[str, list[Any]]:
    """The hyperparameters that differ between runs, each with its values in the runs' order (None = not recorded)."""
    names = dict.fromkeys(name for run in runs for name in run.parameters if name not in HIDDEN)
    columns = {name: [run.parameters.get(name) for run in runs] for name in names}
    return {
        name: values
        for name, values in columns.items()
        if len({str(run.parameters[name]) for run in runs if name in run.parameters}) > 1
    }


def changed_words(parameters: Mapping[str, Any], *, leave_out: Collection[str]) -> list[str]:
    """``name=value``, as a command takes it, for every parameter that differs from the defaults."""
    defaults = compose_parameters([]).model_dump()
    own = {name: value for name, value in parameters.items() if name not in leave_out}
    changed = [name for name in own if name not in defaults or own[name] != defaults[name]]
    return as_overrides({name: own[name] for name in changed})


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def read_file(path: Path, kind: type, notes: list[str]) -> Any:
    """A JSON or YAML file's list or object; an empty one where it is missing, or broken (that becomes a note)."""
    if not path.is_file():
        return kind()
    try:
        return read_values(path, kind)
    except DataError as error:
        notes.append(f"{path.name} is half-written or broken ({' '.join(str(error).split())})")
        return kind()


def _run_folders(path: Path) -> list[Path]:
    marks = ("metrics.json", "parameters.yaml", f"{TRAIN}.ipynb")
    folders = [path, *sorted(path.glob("[!.]*"))]
    found = [folder for folder in folders if any((folder / mark).is_file() for mark in marks)]
    return found[:1] if path in found else found


def _read_run(folder: Path) -> ReportedRun | None:
    """A run folder's report, or None where nothing but a report was made in it."""
    notes: list[str] = []
    try:
        recorded = read_metrics(folder)
    except DataError as broken:
        notes.append(f"metrics.json is half-written or broken ({broken})")
        recorded = {}
    stages = recorded.get("stages", {})
    if set(stages) == {REPORT} and not (folder / "parameters.yaml").is_file():
        return None
    # parameters.yaml is written by the training alone; later notebooks rewrite metrics.json.
    parameters = read_file(folder / "parameters.yaml", dict, notes) or recorded.get("parameters", {})
    run = ReportedRun(folder, "partial", "", parameters, recorded.get("data", {}), stages, {}, notes)
    run.outdated = outdated_stages({"stages": stages, "data": run.data, "parameters": parameters}, folder)
    for stage in run.outdated:
        stages[stage]["status"] = "out of date"
    training = stages.get(TRAIN, {})
    status, error = training.get("status"), training.get("error")
    if status not in ("finished", "out of date"):
        error = error or _notebook_error(folder / f"{TRAIN}.ipynb")
    if TRAIN in run.outdated:
        run.status, run.reason = "outdated", f"03_train is out of date: {run.outdated[TRAIN]}"
    elif status == "finished":
        _read_metrics(run)
    elif status in ("failed", "killed") or error:
        run.status, run.reason = "failed", error or "03_train failed; no reason was recorded"
    elif status == "running":
        run.reason = f"03_train is running, or was killed (started {training.get('started', 'unknown')})"
    elif notes or not recorded:
        run.reason = "; ".join(notes) or "no metrics.json: stopped before it began, or copied incompletely"
    elif failed := [stage for stage in sorted(stages) if stages[stage].get("status") == "failed"]:
        why = stages[failed[0]].get("error", "no reason was recorded")
        run.status, run.reason = "failed", f"{failed[0]} failed: {why}"
    else:
        run.reason = f"03_train has not run (found: {', '.join(sorted(stages)) or 'no stage'})"
    return run


def _read_metrics(run: ReportedRun) -> None:
    """Of a run that is trained: what its stages measured, unless it is out of date."""
    for stage, why in run.outdated.items():
        run.notes.append(f"{stage} is out of date, and its numbers are left out: {why}")
    for stage in (TRAIN, GREEDY, VLLM):
        run.metrics[stage] = {} if stage in run.outdated else _stage_metrics(run, stage)
        fields = run.stages.get(stage, {})
        if fields.get("status", "finished") not in ("finished", "out of date"):
            run.notes.append(f"{stage} did not finish: {fields.get('error', 'no reason recorded')}")
    if run.watch_metric == "token_head":  # all that runs older than the parameter have
        run.metrics[TRAIN].setdefault("eval_head_ner_f1", run.metrics[TRAIN].get("eval_ner_f1"))
    steps, records = (run.metrics[TRAIN].get(name) for name in ("steps", "greedy_dev_records"))
    if steps is not None and is_number(steps) and steps < FEW_STEPS:
        begun = run.parameters.get("init_adapter")
        says = f"a check of the wiring, {steps} optimiser steps scored on {records} dev sentences"
        run.notes.append(says + (f": its F1 is that of the adapter it began with ({begun})" if begun else ""))
    if run.score is None:
        run.reason = "03_train finished, but no greedy dev F1 was recorded"
    else:
        run.status = "finished"


def _stage_metrics(run: ReportedRun, stage: str) -> dict[str, Any]:
    values = dict(run.stages.get(stage, {}).get("metrics", {}))
    notebook = run.folder / f"{stage}.ipynb"
    for name, glued in _read_scraps(notebook, run.notes).items() if stage in run.stages else ():
        if "_f1" in name and is_number(glued):
            if is_number(values.get(name)) and abs(values[name] - glued) > 1e-6:
                run.notes.append(
                    f"{name} disagrees: {notebook.name} says {glued:.4f}, metrics.json {values[name]:.4f}; "
                    "the notebook's is shown"
                )
            values[name] = glued
    return values


def _read_scraps(notebook: Path, notes: list[str]) -> dict[str, Any]:
    """What scrapbook, or papermill before it, glued into an executed notebook."""
    # Read here, as scrapbook validates every output: two seconds for what takes a tenth of one.
    scraps: dict[str, Any] = {}
    for output in _outputs(notebook, notes):
        data = _object(output.get("data"))
        glued = _object(data.get("application/scrapbook.scrap.json+json"))
        scraps |= _object(data.get("application/papermill.record+json"))
        scraps |= {glued["name"]: glued.get("data")} if "name" in glued else {}
    return scraps


def _notebook_error(notebook: Path) -> str:
    """The error that an executed notebook stopped at; empty where there is none."""
    errors = [output for output in _outputs(notebook, []) if output.get("output_type") == "error"]
    return "".join(f"{error.get('ename')}: {error.get('evalue')}" for error in errors[:1])


def _outputs(notebook: Path, notes: list[str]) -> list[dict[str, Any]]:
    cells = read_file(notebook, dict, notes).get("cells")
    cells = cells if isinstance(cells, list) else []
    return [_object(output) for cell in cells for output in _object(cell).get("outputs") or []]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
