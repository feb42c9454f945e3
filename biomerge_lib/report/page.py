"""Knows the page that compares runs; ``report_runs`` reads, ``report_figures`` draws.

runs/ --[collect_runs]--> ReportedRun --[write_page]--> report.html (one file, loads nothing)
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from biomerge_lib import __version__
from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import write_text
from biomerge_lib.core.markup import INERT
from biomerge_lib.core.parameters import OF_THE_DATA
from biomerge_lib.core.records import SPLITS, Record
from biomerge_lib.decoding.predictions import Prediction, read_predictions
from biomerge_lib.experiment.provenance import PROJECT_DIR, data_hashes
from biomerge_lib.experiment.stages import SCORING_STAGES, STAGES
from biomerge_lib.prompts.ner_span import read_split, trained_datasets
from biomerge_lib.report.answer_figures import draw_confidence, draw_weaknesses
from biomerge_lib.report.display import ERROR_KINDS, LEGEND, STYLE, highlight_errors
from biomerge_lib.report.report_figures import (
    COMPARED,
    DARK,
    LIGHT,
    as_svg,
    draw_curves,
    draw_scores,
    draw_sweep,
)
from biomerge_lib.report.report_notebooks import link_notebooks
from biomerge_lib.report.report_runs import (
    COST_COLUMNS,
    ReportedRun,
    changed_words,
    collect_runs,
    group_runs,
    is_number,
    runs_table,
    seeds_table,
    values_table,
)
from biomerge_lib.scoring.breakdown import find_weaknesses
from biomerge_lib.scoring.confidence import calibrate
from biomerge_lib.scoring.ner_metrics import score_spans
from biomerge_lib.scoring.significance import compare_predictions

# Of an adapter's answers, by apply/adapter_answers: name, hash of the adapter, hash of what was asked.
ADAPTERS = re.compile(r"(.+)-[0-9a-f]{12}-[0-9a-f]{8}")


def write_report(paths: Iterable[Path | str] | Path | str, out: Path | str) -> Path:
    """Write the page about the runs in ``paths``; see :func:`collect_runs`."""
    return write_page(collect_runs(paths), out)


def write_page(runs: Sequence[ReportedRun], out: Path | str) -> Path:
    """Write the page about collected runs, atomically, as one HTML file that loads nothing else."""
    out = Path(out)
    groups, others = group_runs(runs)
    ranked = groups[0] if groups else []
    answers = read_answers(ranked)
    figures = {"scores": draw_scores(ranked), "sweep": draw_sweep(ranked), "curves": draw_curves(ranked)}
    figures |= {"confidence": answers["confidence"]}
    link = Markup('<a href="{}">{}</a>')
    notebooks = {
        run: Markup(" ").join(link.format(at, name) for name, at in found) or None
        for run, found in link_notebooks(runs, out).items()
    }
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page.filters |= {"show": show_value, "quote": shlex.quote}
    html = page.get_template("report.html.j2").render(
        ranked=ranked,
        finished=sum(map(len, groups)),
        gpu_hours=sum(run.gpu_hours or 0 for group in groups for run in group),
        others=others,
        command_of=command_of,
        style=STYLE,
        colours=(LIGHT, DARK),
        legend=LEGEND,
        figures={name: list(map(as_svg, drawn)) for name, drawn in figures.items()},
        weak={title: as_svg(figure) for title, figure in draw_weaknesses(answers["weaknesses"]).items()},
        groups=[_describe_group(group, notebooks) for group in groups],
        apart=pd.DataFrame(
            [(run.name, run.status, run.reason, notebooks[run]) for run in others],
            columns=["run", "status", "reason", "executed notebooks"],
            dtype=object,
        ).dropna(axis=1, how="all"),
        tables=_tables(ranked) if ranked else {},
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        inert=INERT,
        # Reading answers and curves adds to the runs' notes; a notebook that draws before it writes reads twice.
        notes=list(dict.fromkeys(f"Run {run.rank}: {note}." for run in ranked for note in run.notes)),
        **answers,
    )
    write_text(out, html)
    return out


def _describe_group(
    group: Sequence[ReportedRun], notebooks: Mapping[ReportedRun, Markup | None]
) -> dict[str, Any]:
    """What the page says of runs that can be compared with each other."""
    kept = {"executed notebooks": pd.Series([notebooks[run] for run in group], dtype=object)}
    seeds = seeds_table(group, ("greedy dev F1", "precision", "recall", "test F1"))
    return {
        "on": group[0].scored_on,
        "runs": runs_table(group).assign(**kept).dropna(axis=1, how="all"),
        "seeds": seeds,
    }


def _tables(ranked: Sequence[ReportedRun]) -> dict[str, pd.DataFrame]:
    """What else the page tabulates of ranked runs; Markup, in columns of objects, may hold elements."""
    code = Markup('<code title="{}">{}</code>')
    device, made_with = [], dict[str, dict[str, Any]]()
    for run in ranked:
        made = run.provenance
        versions = {"Python": made.get("python"), **made.get("versions", {})}
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        device.append(made.get("device"))
        row = {"commit": made.get("commit"), "device": device[-1], "versions": listed}
        row["data"] = run.parameters.get("data_dir")
        row |= {
            split: code.format(run.data[split], run.data[split][:12]) for split in SPLITS if split in run.data
        }
        made_with.setdefault(str(row), {"runs": [], **row})["runs"].append(run.rank)
    cost = values_table(ranked, COST_COLUMNS)
    cost.insert(2, "GPU hours", pd.Series([run.gpu_hours for run in ranked], dtype=float))
    best = ranked[0]
    corpora = trained_datasets(PROJECT_DIR / str(best.parameters.get("data_dir")), best.data)
    parameters = {"trained on": ", ".join(corpora)} if corpora else {}
    parameters |= {name: value for name, value in best.parameters.items() if name not in OF_THE_DATA}
    tables = {
        "parameters": pd.DataFrame(parameters.items(), columns=["parameter", "value"], dtype=object),
        "cost": cost.assign(device=device),
        "provenance": pd.DataFrame(
            [{**row, "runs": ", ".join(map(str, row["runs"]))} for row in made_with.values()], dtype=object
        ),
    }
    return {name: table.dropna(axis=1, how="all") for name, table in tables.items()}


def show_value(value: Any, column: str = "") -> str:
    """A cell as people write it: ``0.002``, ``1,234``, ``–`` for nothing, F1s with three digits."""
    if value is None or value != value:  # NaN
        return "–"
    if not is_number(value):
        return value if isinstance(value, str) else str(value)
    if "F1" in column or column in ("precision", "recall"):
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def read_answers(ranked: Sequence[ReportedRun]) -> dict[str, Any]:
    """Predictions of the best runs: per corpus, and against the first of them; where that one fails."""
    compared: list[tuple[ReportedRun, list[Prediction]]] = []
    file: str | None = None
    differences: list[dict[str, Any]] = []
    units = ""
    for run in ranked[:COMPARED]:
        decoders = [STAGES[stage].decoder for stage in SCORING_STAGES if stage not in run.outdated]
        current = [f"predictions-{split}-{decoder}.jsonl" for split in SPLITS[1:] for decoder in decoders]
        names = [name for name in current if name == (file or name) and (run.folder / name).is_file()]
        if not names:
            continue
        name = names[0]
        try:
            predictions = read_predictions(run.folder / name)
            against = compare_predictions(compared[0][1], predictions) if compared else None
        except (DataError, OSError) as error:
            reason = str(error).replace(f"{run.folder}/", "").rstrip(".")
            run.notes.append(f"{name} is left out ({reason})")
            continue
        file = name
        compared.append((run, predictions))
        if against:
            differences.append({"rank": run.rank, "run": run.name, **against.cells()})
            units = against.units
    first = compared[0][1] if compared else []
    for path in sorted(compared[0][0].folder.glob(f"{str(file)[:-6]}-*.jsonl")) if compared else ():
        adapter = ADAPTERS.fullmatch(path.stem.removeprefix(f"{str(file)[:-6]}-"))
        with suppress(DataError):  # of other records, from before
            if adapter:
                against = compare_predictions(first, read_predictions(path))
                differences.append({"rank": None, "run": f"the adapter {adapter[1]}", **against.cells()})
                units = against.units
    examples = highlight_errors(first) if first else {}
    kinds = [(kind, count, ERROR_KINDS[kind]) for kind, (count, _) in examples.items()]
    return {
        "compared": [run for run, _ in compared],
        "answers_file": file,
        "sentences": len(first),
        "by_corpus": _score_corpora(compared) if len({p.dataset for p in first}) > 1 else pd.DataFrame(),
        "errors": pd.DataFrame(kinds, columns=["kind", "errors", "meaning"]),
        "examples": examples,
        "differences": pd.DataFrame(differences),
        "units": units,
        "weaknesses": find_weaknesses(first, _read_train(compared[0][0])) if first else {},
        "confidence": (confidence := draw_confidence(first)),
        "calibration": pd.DataFrame(calibrate(first) if confidence else []),
    }


def _read_train(run: ReportedRun) -> list[Record] | None:
    """What a run was trained on; None, with a note, where that does not lie here any more."""
    folder = PROJECT_DIR / str(run.parameters.get("data_dir"))
    if run.data.get("train") and data_hashes(folder).get("train") == run.data["train"]:
        options = {name: run.parameters[name] for name in ("subsample", "seed") if name in run.parameters}
        return read_split(folder, "train", **options)
    run.notes.append("its train.jsonl is not there, so that seen and unseen mentions are not told apart")
    return None


def _score_corpora(compared: Sequence[tuple[ReportedRun, list[Prediction]]]) -> pd.DataFrame:
    """F1 of the compared runs on each corpus."""
    rows = []
    for corpus in sorted({p.dataset for p in compared[0][1]}):
        parts = {run.rank: [p for p in found if p.dataset == corpus] for run, found in compared}
        first = next(iter(parts.values()))
        row = {"corpus": corpus, "sentences": len(first), "gold mentions": sum(len(p.gold) for p in first)}
        scores = {
            f"F1 of run {rank}": score_spans((p.gold, p.pred) for p in part).f1
            for rank, part in parts.items()
        }
        rows.append(row | scores if row["gold mentions"] else row)
    return pd.DataFrame(rows)


def command_of(run: ReportedRun, **other: Any) -> str:
    """The command that trains the run, or one with ``other`` parameters."""
    words = changed_words(
        run.parameters | {"run_id": run.name} | other, leave_out={"existing_run"} | OF_THE_DATA
    )
    return " \\\n  ".join(["python -m biomerge_lib run 03_train", *map(shlex.quote, words)])
