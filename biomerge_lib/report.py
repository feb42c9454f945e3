"""Knows the page that compares runs; reads run folders through ``report_runs``, draws with ``report_figures``.

runs/ --[collect_runs]--> ReportedRun --[write_page]--> report.html (one file, loads nothing)
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from biomerge_lib import __version__
from biomerge_lib import report_figures as figures
from biomerge_lib.display import ERROR_KINDS, LEGEND, STYLE, highlight_errors
from biomerge_lib.errors import DataError
from biomerge_lib.files import write_text
from biomerge_lib.markup import INERT
from biomerge_lib.ner_metrics import score_spans
from biomerge_lib.parameters import as_override, compose_parameters
from biomerge_lib.predictions import Prediction, read_predictions
from biomerge_lib.prompt import find_words
from biomerge_lib.records import SPLITS
from biomerge_lib.report_notebooks import link_notebooks
from biomerge_lib.report_runs import (
    COST_COLUMNS,
    F1_COLUMNS,
    GREEDY,
    READINGS,
    VLLM,
    ReportedRun,
    collect_runs,
    is_number,
    read_file,
    varying_parameters,
)

CURVES = {
    "Training loss": "loss",
    "Dev loss": "eval_loss",
    "Answer F1 on dev (teacher-forced)": "eval_answer_ner_f1",
    "Token head F1 on dev": "eval_head_ner_f1",
    "Greedy F1 on dev": "greedy_dev_ner_f1",
}
PREDICTION_FILES = [f"predictions-{split}-{way}.jsonl" for split in SPLITS[1:] for way in ("greedy", "vllm")]
WRITERS = {"greedy.jsonl": GREEDY, "vllm.jsonl": VLLM}
LENGTHS = ((0, 10), (11, 20), (21, 30), (31, 40), (41, 60), (61, 10**9))  # words, as score_by_length has them
COMPARED = figures.STYLES  # runs that curves and tables set side by side


def write_report(paths: Iterable[Path | str] | Path | str, out: Path | str) -> Path:
    """Write the page about the runs in ``paths``; see :func:`collect_runs`."""
    return write_page(collect_runs(paths), out)


def write_page(runs: Sequence[ReportedRun], out: Path | str) -> Path:
    """Write the page about collected runs, atomically, as one HTML file that loads nothing else."""
    from jinja2 import Environment, FileSystemLoader

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    ranked = [run for run in runs if run.rank]
    answers = read_answers(ranked)
    curves = draw_curves(ranked)
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page.globals.update(F1_COLUMNS=F1_COLUMNS, COST_COLUMNS=COST_COLUMNS, ERROR_KINDS=ERROR_KINDS)
    page.filters |= {"show": show_value, "ranks": _ranges}
    html = page.get_template("report.html.j2").render(
        ranked=ranked,
        others=[run for run in runs if not run.rank],
        varying=varying_parameters(ranked),
        command=_command(ranked[0]) if ranked else "",
        style=STYLE + figures.FIGURE_STYLE,
        legend=LEGEND,
        curves=curves,
        scores=draw_scores(ranked),
        sweep=draw_sweep(ranked),
        links=link_notebooks(runs, out),
        environments=_group(ranked, lambda run: run.provenance),
        data=_group(ranked, lambda run: {"data_dir": run.parameters.get("data_dir"), **run.data}),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        inert=INERT,
        notes=_page_notes(ranked),  # reading answers and curves adds to the runs' notes
        **answers,
    )
    write_text(out, html)
    return out


def draw_curves(ranked: Sequence[ReportedRun], *, background: int = 40) -> list[str]:
    """A figure a quantity: the five best runs carry their rank, ``background`` more are drawn faintly."""
    lines: defaultdict[str, list[figures.Series]] = defaultdict(list)
    for run in ranked[: COMPARED + background]:
        rank = cast(int, run.rank)
        style = rank - 1 if rank <= COMPARED else None
        history = read_file(run.folder / "log_history.json", list, run.notes)
        for title, key in CURVES.items():
            if key == "eval_head_ner_f1" and run.watch_metric == "token_head":
                key = "eval_ner_f1"
            entries = [entry for entry in history if isinstance(entry, dict) and is_number(entry.get(key))]
            points = [(entry["step"], entry[key]) for entry in entries if is_number(entry.get("step"))]
            stride = len(points) // 200 + 1
            if points:
                lines[title].append(figures.Series(str(run.rank), points[::stride] + points[-1:], style))
    drawn = [title for title in CURVES if lines[title]]
    return [figures.line_chart(title, lines[title], x_label="optimiser step") for title in drawn]


def draw_scores(ranked: Sequence[ReportedRun], *, most: int = 15) -> str:
    """Greedy, vLLM and test F1 of the best runs side by side, with the greedy F1's interval."""
    rows: list[tuple[str, dict[str, float], figures.Point | None]] = []
    marks: list[str] = []
    for run in ranked[:most]:
        scores = {name: run.value(sources) for name, sources in F1_COLUMNS.items() if name not in READINGS}
        named = {name: score for name, score in scores.items() if score is not None}
        marks = [name for name in F1_COLUMNS if name in marks or name in named]
        short = run.name if len(run.name) <= 16 else f"…{run.name[-14:]}"  # names differ at their end
        rows.append((f"{run.rank}  {short}", named, run.interval()))
    return figures.dot_plot(rows, marks, title="F1 with 95 % interval") if rows else ""


def draw_sweep(ranked: Sequence[ReportedRun]) -> list[str]:
    """A heat map of the two numeric hyperparameters that matter most, and parallel coordinates where more vary.

    Nothing below 4 runs, and no heat map of more than 25 rows or columns, or where hardly two runs share a value.
    """
    varying = {name: values for name, values in varying_parameters(ranked).items() if name != "seed"}
    numeric = [name for name, values in varying.items() if all(map(is_number, values))]
    varying = {name: v if name in numeric else [str(x) for x in v] for name, v in varying.items()}
    scores = [run.score for run in ranked if run.score is not None]  # ranked runs have one
    gridded = [name for name in numeric if len(set(varying[name])) <= min(25, len(ranked) / 2)]
    drawn = []
    if len(ranked) >= 4 and len(gridded) >= 2:
        chosen = sorted(gridded, key=lambda name: -_explained(varying[name], scores))[:2]
        x_name, y_name = sorted(chosen, key=numeric.index)
        cells: defaultdict[figures.Point, list[float]] = defaultdict(list)
        for x, y, score in zip(varying[x_name], varying[y_name], scores, strict=True):
            cells[x, y].append(score)
        drawn.append(figures.heat_map(x_name, y_name, cells, score="greedy dev F1"))
    if len(ranked) >= 4 and (len(varying) > 2 or (len(numeric) == 2 and not drawn)):
        drawn.append(figures.parallel_coordinates(varying, scores, score="greedy dev F1"))
    return drawn


def _explained(values: Sequence[float], scores: Sequence[float]) -> float:
    """How far the mean scores of a parameter's values lie apart."""
    by_value: defaultdict[float, list[float]] = defaultdict(list)
    for value, score in zip(values, scores, strict=True):
        by_value[value].append(score)
    means = [sum(found) / len(found) for found in by_value.values()]
    return max(means) - min(means)


def show_value(value: Any) -> str:
    """A parameter or cost as people write it: ``2e-3``, ``1,234``, ``–`` for nothing."""
    if value is None:
        return "–"
    if not is_number(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def read_answers(ranked: Sequence[ReportedRun]) -> dict[str, Any]:
    """Predictions of the best runs: per corpus, per length, and the errors of the best run that has any."""
    compared: list[tuple[ReportedRun, list[Prediction]]] = []
    file: str | None = None
    texts: list[str] | None = None
    examples: dict[str, Any] = {}
    for run in ranked[:COMPARED]:
        names = [file] if file else [name for name in PREDICTION_FILES if (run.folder / name).is_file()]
        names = [name for name in names if WRITERS[name.rpartition("-")[2]] not in run.outdated]
        for name in names[:1]:
            if not (run.folder / name).is_file():
                continue
            try:
                predictions = read_predictions(run.folder / name)
                found = highlight_errors(predictions)
            except (DataError, ValueError, TypeError, AttributeError, OSError) as error:
                reason = str(error).replace(f"{run.folder}/", "").rstrip(".")
                run.notes.append(f"{name} cannot be read and is left out ({reason})")
                continue
            texts = texts or [prediction.text for prediction in predictions]
            if texts != [prediction.text for prediction in predictions]:
                run.notes.append(f"{name} holds other sentences than the best run's and is left out")
                continue
            file, examples = name, examples or found
            compared.append((run, predictions))
    first = compared[0][1] if compared else []
    datasets = sorted({prediction.dataset for prediction in first})
    groups = {name: [p.dataset == name for p in first] for name in datasets} if len(datasets) > 1 else {}
    words = [len(find_words(prediction.text)) for prediction in first]
    buckets = {
        f"{max(low, 1)}–{high}" if high < 10**9 else f"over {low - 1}": [
            low <= count <= high for count in words
        ]
        for low, high in LENGTHS
    }
    return {
        "compared": [run for run, _ in compared],
        "answers_file": file,
        "sentences": len(first),
        "by_corpus": _score_groups(groups, compared),
        "by_length": _score_groups(buckets, compared),
        "examples": examples,
    }


def _score_groups(
    groups: Mapping[str, list[bool]], compared: Sequence[tuple[ReportedRun, list[Prediction]]]
) -> list[tuple[str, int, int, list[float]]]:
    rows = []
    for name, mask in groups.items():
        chosen = [[p for p, wanted in zip(found, mask, strict=True) if wanted] for _, found in compared]
        if any(mask):
            scores = [score_spans((p.gold, p.pred) for p in part).f1 for part in chosen]
            rows.append((name, len(chosen[0]), sum(len(p.gold) for p in chosen[0]), scores))
    return rows


def _page_notes(ranked: Sequence[ReportedRun]) -> list[str]:
    """What a reader must know before comparing the runs' numbers."""
    notes = []
    if len({run.data.get("dev") for run in ranked}) > 1:
        notes.append(
            "The runs were scored on different dev files (see Provenance): do not compare their F1s."
        )
    if len({run.parameters.get("eval_limit") for run in ranked}) > 1:
        notes.append("The runs scored different shares of dev (eval_limit): do not compare their F1s.")
    if len({run.watch_metric for run in ranked}) > 1:
        notes.append(
            "The runs chose their checkpoints by different F1s (watch_metric); all are ranked by greedy F1."
        )
    notes += [f"Run {run.rank}: {note}." for run in ranked for note in run.notes]
    return list(dict.fromkeys(notes))  # a notebook that draws before it writes reads, and notes, twice


def _command(run: ReportedRun) -> str:
    """The command that trains the run: every parameter that differs from the defaults."""
    defaults = compose_parameters().model_dump() | {"existing_run": run.parameters.get("existing_run")}
    values = {**run.parameters, "run_id": run.name}
    given = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    words = [shlex.quote(f"{name}={as_override(value)}") for name, value in given.items()]
    return " \\\n  ".join(["python -m biomerge_lib run 03_train", *words])


def _group(runs: Sequence[ReportedRun], key: Callable[[ReportedRun], dict]) -> list[tuple[list[int], dict]]:
    groups: dict[str, tuple[list[int], dict]] = {}
    for run in runs:
        value = key(run)
        groups.setdefault(str(value), ([], value))[0].append(cast(int, run.rank))
    return list(groups.values())


def _ranges(ranks: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1–3, 7``."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in parts)
