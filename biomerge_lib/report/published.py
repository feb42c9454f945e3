"""Knows ``reports/``: publishes a run there and writes the table of its README from what is there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import OBJECT, read_values, whole_folder, write_text
from biomerge_lib.core.markup import in_markdown
from biomerge_lib.experiment.recorded import current_stages, outdated_stages, read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR, TEST_LOG
from biomerge_lib.report.display import markdown_table
from biomerge_lib.report.report_runs import collect_runs, seeds_table

REPORTS_DIR = PROJECT_DIR / "reports"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Numbers, parameters and executed notebooks; no weights and no corpus text beyond what the notebooks show.
NOTEBOOKS = "0*.ipynb"
PUBLISHED = ("metrics.json", "parameters.yaml", "log_history.json", "report.html", TEST_LOG)


def publish_run(folder: Path, reports_dir: Path = REPORTS_DIR) -> Path:
    """Copy a finished run's metrics, parameters and executed notebooks to ``reports/<run_id>/``, whole or not at all.

    Raises:
        DataError: the folder is no run, its training has not finished (a partial run is not a result), a stage is out
            of date, or what has its name in ``reports_dir`` is no earlier copy of it.
    """
    folder = folder.resolve()  # "." and ".." have no name of their own
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run folder.")
    recorded = read_metrics(folder)
    if recorded.get("stages", {}).get("03_train", {}).get("status") != "finished":
        raise DataError(f"{folder}: 03_train has not finished here; only finished runs are published.")
    if outdated := outdated_stages(recorded, folder):
        why = "; ".join(f"{stage}: {reason}" for stage, reason in outdated.items())
        raise DataError(f"{folder} is out of date ({why}). Run these stages again, then publish.")
    out = reports_dir / folder.name
    _refuse_other_content(out)
    paths = [*(folder / name for name in PUBLISHED), *sorted(folder.glob(NOTEBOOKS))]
    places = _machine_places(paths)
    with whole_folder(out) as new:
        new.mkdir(parents=True)
        for path in filter(Path.is_file, paths):
            text = path.read_text(encoding="utf-8")
            for place in places:
                text = text.replace(place, "")
            (new / path.name).write_text(text, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
    return out


def folder_of_reports(name: str) -> Path:
    """``reports/NAME/``.

    Raises:
        DataError: that is no folder inside ``reports/``, or it is a published run.
    """
    folder = (REPORTS_DIR / name).resolve()
    if REPORTS_DIR.resolve() not in folder.parents or (folder / "metrics.json").exists():
        raise DataError(f"--into {name}: name a folder inside {REPORTS_DIR}/ that is no published run.")
    return folder


def _refuse_other_content(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out}: is no folder, and is left alone. Rename the run's folder or move it away.")
    paths = sorted(out.iterdir()) if out.exists() else []
    ours = {path for path in paths if path.is_file() and (path.name in PUBLISHED or path.match(NOTEBOOKS))}
    other = [path.name for path in paths if path not in ours]
    if other or (paths and read_metrics(out).get("run_id") != out.name):
        holds = f" ({', '.join(other[:3])}{', ...' if len(other) > 3 else ''})" if other else ""
        raise DataError(
            f"{out}: holds other things than an earlier copy of this run{holds}, and is left alone. "
            "Rename the run's folder, or publish with --into NAME."
        )


class _Papermill(BaseModel):
    input_path: str | None = None
    parameters: OBJECT = {}


class _Metadata(BaseModel):
    papermill: _Papermill = _Papermill()


class _Notebook(BaseModel):
    metadata: _Metadata


def _machine_places(paths: Iterable[Path]) -> list[str]:
    """Folders of the machine that made the run, longest first; a published page names none of them."""
    places = {f"{PROJECT_DIR}/", f"{sys.prefix}/", f"{Path.home()}/"}
    for path in paths:
        if path.suffix == ".ipynb" and path.is_file():
            papermill = read_values(path, _Notebook).metadata.papermill
            places.add(f"{Path(papermill.input_path or '').parent.parent}/")
            values = papermill.parameters.values()
            for value in [item for v in values for item in (v if isinstance(v, list) else [v])]:
                if isinstance(value, str) and Path(value).is_absolute():
                    places.add(f"{Path(value).parent}/")
    return sorted((place for place in places if place.count("/") > 1), key=len, reverse=True)


def results_table(reports_dir: Path = REPORTS_DIR) -> str:
    """Markdown of the runs published in a folder; every figure comes from a ``metrics.json``.

    Runs that were scored on the same stand together, best first; those that differ by their seed alone have a mean.
    """
    folders = list(reports_dir.glob("*/metrics.json"))
    ranked = [run for run in (collect_runs(reports_dir) if folders else []) if run.rank]
    header = ["run", "data", "training", "device, seconds"]
    header += ["dev F1, Trainer", "dev F1, 04 greedy", "dev F1, 05 vLLM"]
    table = markdown_table(header, [_cells(run.folder, read_metrics(run.folder)) for run in ranked])
    seeds = seeds_table(ranked).map(in_markdown)
    return table + (f"\n\n{markdown_table(seeds.columns, seeds.to_numpy())}\n" if len(seeds) else "\n")


def write_results(reports_dir: Path = REPORTS_DIR) -> None:
    """Write the table between the markers of the folder's README, which is made where it is missing.

    Raises:
        DataError: the markers are missing.
    """
    readme = reports_dir / "README.md"
    new = f"# {reports_dir.name}\n\n{BEGIN}\n{END}\n"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else new
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"{readme}: the markers {BEGIN} and {END} are missing.")
    write_text(readme, f"{before}{BEGIN}\n{results_table(reports_dir)}{END}{after}")


def _cells(folder: Path, metrics: Mapping[str, Any]) -> list[str]:
    parameters, stages = metrics["parameters"], current_stages(metrics)
    training = stages["03_train"]
    split, has_notebook = parameters["split"], (folder / "03_train.ipynb").is_file()
    sentences = stages.get("02_data", {}).get("metrics", {}).get("train_sentences")
    of_train = f"{sentences:,} sentences" if sentences else "train"
    data = f"{Path(parameters['data_dir']).parent.name}, {parameters['subsample']:.0%} of {of_train}"
    batch = parameters["per_device_train_batch_size"] * parameters["gradient_accumulation_steps"]
    # Older runs, all of them LoRA's, do not say what was trained.
    trained = "all weights" if parameters.get("trainable") == "all" else f"r = {parameters['lora_rank']}"
    how = (
        f"{parameters['backbone']}, {trained}, learning rate {parameters['learning_rate']:g}, "
        f"batch {batch * parameters['num_processes']}, {parameters['num_train_epochs']:g} epochs, "
        f"anchors {parameters['offset_anchors']}, {'' if parameters['fast_metrics'] else 'no '}token head, "
        f"seed {parameters['seed']}"
    )
    provenance = training["provenance"]
    return [
        f"[{in_markdown(folder.name)}]({quote(folder.name)}/{'03_train.ipynb' if has_notebook else 'metrics.json'})",
        in_markdown(data),
        in_markdown(how),
        f"{in_markdown(provenance['device'])}, {training['metrics']['train_seconds']:,.0f}",
        _score(training["metrics"], "greedy_dev"),
        _score(stages.get("04_greedy_dev", {}).get("metrics", {}), f"greedy_{split}"),
        _score(stages.get("05_vllm_eval", {}).get("metrics", {}), f"vllm_{split}"),
    ]


def _score(metrics: Mapping[str, Any], prefix: str) -> str:
    if f"{prefix}_ner_f1" not in metrics:
        return "—"
    f1, low, high = (metrics[f"{prefix}_ner_f1{end}"] for end in ("", "_low", "_high"))
    records = metrics.get(f"{prefix}_records")
    return f"**{f1:.3f}** [{low:.3f}, {high:.3f}]" + (f", {records:,} sentences" if records else "")
