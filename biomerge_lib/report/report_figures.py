"""Knows the figures that compare runs, drawn by matplotlib, and how a page shows them in light and dark.

Runs differ in colour (Okabe and Ito 2008) and also in dash; other values of a run in colour and marker.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from biomerge_lib.core.composition import as_override
from biomerge_lib.report.report_runs import (
    F1_COLUMNS,
    ReportedRun,
    is_number,
    read_file,
    values_table,
    varying_parameters,
)

if TYPE_CHECKING:
    from IPython.display import HTML

CURVES = {
    "Training loss": "loss",
    "Greedy F1 on dev": "greedy_dev_ner_f1",
    "Answer F1 on dev (teacher-forced)": "eval_answer_ner_f1",
    "Dev loss": "eval_loss",
    "Token head F1 on dev": "eval_head_ner_f1",
    "Learning rate": "learning_rate",
}
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b8578c", "#b37400")  # a run's or a value's colour on light paper
DARK = ("#56b4e9", "#f0803c", "#2cc295", "#e3a0c6", "#e69f00")
DASHES, MARKERS = ("-", (0, (7, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)), (0, (4, 2))), "osD^v"
INK = "#777777"  # of a notebook's figures: readable on white and on black, as LIGHT is
COMPARED = len(LIGHT)  # runs that curves and tables set side by side
SCORE = "greedy dev F1"


def as_svg(figure: Figure) -> str:
    """A figure as an element of a page: its text is text, black is the page's ink and white its paper."""
    for artist in figure.findobj():
        artist.set_clip_on(False)  # a clip path is a reference by url()
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "biomerge"}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue().partition("<svg")[2].partition(">")[2]
    dropped = r"<defs>\s*<style.*?</defs>| id=\"(?!m[0-9a-f]{8})[^\"]*\"| font-family: [^;<>\"]*;|\n\s*"
    svg = re.sub(dropped, "", svg, flags=re.DOTALL)
    for number, colour in enumerate(LIGHT):
        svg = svg.replace(colour, f"var(--c{number})")
    svg = svg.replace("#000000", "currentColor").replace("#ffffff", "var(--paper, Canvas)")
    width, height = (72 * inches for inches in figure.get_size_inches())
    label = escape(str(figure.get_label()), quote=True)
    # On a phone, a figure shrinks until its text would be too small to read; then the box around it scrolls.
    style = f"max-width:{1.7 * width:.0f}px;min-width:{0.85 * width if width > 330 else 0:.0f}px"
    head = f'<svg class="bm-figure" role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}"'
    return f'{head} style="{style}">{svg}'


def show_figures(figures: Iterable[Figure], shown: int = 6) -> HTML:
    """Figures in a notebook's output: ``shown`` of them, and the rest folded; their labels are their alternative texts.

    They are pictures, as Lab takes elements of SVG out of notebooks that were run elsewhere.
    """
    from IPython.display import HTML

    images = list(map(_as_image, figures))
    folded = f"<details><summary>{len(images) - shown} more</summary>{''.join(images[shown:])}</details>"
    return HTML("".join(images[:shown]) + (folded if images[shown:] else ""))


def _as_image(figure: Figure) -> str:
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = as_svg(figure).replace("<svg ", f'<svg {names} fill="{INK}" font-family="sans-serif" ', 1)
    for number, colour in enumerate(LIGHT):
        svg = svg.replace(f"var(--c{number})", colour)
    svg = svg.replace("currentColor", INK).replace("var(--paper, Canvas)", "none")
    data = base64.b64encode(svg.encode()).decode()
    label, width = escape(str(figure.get_label())), 90 * figure.get_figwidth()
    return f'<img alt="{label}" width="{width:.0f}" style="display: inline" src="data:image/svg+xml;base64,{data}">'


def draw_curves(ranked: Sequence[ReportedRun], *, background: int = 40) -> list[Figure]:
    """A figure a quantity: the five best runs in their own colours, ``background`` more faintly."""
    shown = ranked[: COMPARED + background]
    logs = [(run, read_file(run.folder / "log_history.json", list, run.notes)) for run in shown]
    figures = []
    for title, key in CURVES.items():
        figure, axis = new_axes(4.5, 2.9, title)
        ends = []
        for rank, (run, log) in reversed(list(enumerate(logs, start=1))):
            name = "eval_ner_f1" if (key, run.watch_metric) == ("eval_head_ner_f1", "token_head") else key
            pairs = [(entry.get("step"), entry.get(name)) for entry in log if isinstance(entry, dict)]
            points = [pair for pair in pairs if all(map(is_number, pair))]
            if points:
                dots = len(points) <= 40 and rank <= COMPARED
                axis.plot(*zip(*points, strict=True), marker="o" if dots else "", ms=3, **_line(rank))
                ends.append(f"{rank} ends at {points[-1][1]:.3g}")
        if ends:
            axis.set(xlabel="optimiser step", xlim=(0, None))
            _name_ranks(axis)
            figure.set_label(f"{title} against optimiser step: {', '.join(ends[: -COMPARED - 1 : -1])}.")
            figures.append(figure)
    return figures


def draw_scores(ranked: Sequence[ReportedRun], *, most: int = 15) -> list[Figure]:
    """A row a run: the greedy F1 with its 95 % interval, and 04's, vLLM's and test F1s."""
    shown = ranked[:most]
    if not shown:
        return []
    title = "F1 with 95 % interval"
    figure, axis = new_axes(5.6, 0.9 + 0.42 * len(shown), title, grid="x")
    columns = {name: F1_COLUMNS[name] for name in F1_COLUMNS if name.endswith(("dev F1", "test F1"))}
    table = values_table(shown, columns)
    for number, name in enumerate(table.columns[2:]):
        if table[name].notna().any():  # each a little lower, so that equal values stay visible
            style = {"marker": MARKERS[number], "color": LIGHT[number], "label": name}
            axis.plot(table[name], table.index + 0.17 * number, linestyle="", zorder=3, **style)
    for row, run in enumerate(shown):
        if edges := run.interval():
            axis.plot(edges, [row, row], marker="|", color="black", alpha=0.5, linewidth=1)
        above: Any = {"textcoords": "offset points", "xycoords": axis.get_yaxis_transform()}
        axis.annotate(literal(run.name), (0, row), (2, 5), size=8.5, **above)
    axis.set_yticks(range(len(shown)), table["rank"])
    axis.set_ylim(len(shown) - 0.5, -0.8)
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    figure.set_label(f"{title}: {len(shown)} rows; the numbers are in the table of ranked runs.")
    return [figure]


def draw_sweep(ranked: Sequence[ReportedRun]) -> list[Figure]:
    """Heat maps over what was swept, up to three, the hyperparameters that matter most first.

    What was swept together makes a grid: of the runs that are alike in all else but the seed, four cells or more, and
    over two thirds of all.
    """
    varying = {name: values for name, values in varying_parameters(ranked).items() if name != "seed"}
    for name, values in varying.items():
        varying[name] = values if all(map(is_number, values)) else list(map(as_override, values))
    table = pd.DataFrame(varying | {SCORE: [run.score for run in ranked]})
    drawn: dict[Figure, float] = {}
    for pair in map(list, combinations(varying, 2)):
        others = table.drop(columns=[*pair, SCORE]).astype(str).agg(" ".join, axis=1)
        part = table[others == others.mode()[0]] if len(varying) > 2 else table
        for one, other in (pair, pair[::-1]):  # values that stand alone are of no grid
            part = part[part.groupby(one)[other].transform("nunique") > 1]
        (wide, high), cells = part[pair].nunique(), part.groupby(pair).ngroups
        if cells >= 4 and min(wide, high) > 1 and 3 * cells > 2 * wide * high:
            effects = [np.ptp(part.groupby(name)[SCORE].mean()) for name in pair]
            drawn[_heat_map(part, *pair)] = sum(effects)
    return sorted(drawn, key=lambda figure: -drawn[figure])[:3]


def _heat_map(table: pd.DataFrame, x_name: str, y_name: str) -> Figure:
    """The mean score of the runs in each cell; darker is higher, the best cell is framed."""
    scores = table.groupby([y_name, x_name])[SCORE].agg(["mean", "count"])
    ys, xs = (sorted(table[name].unique()) for name in (y_name, x_name))
    low, high = scores["mean"].min(), scores["mean"].max()
    best_y, best_x = scores["mean"].idxmax()
    figure, axis = new_axes(1.3 + 0.85 * len(xs), 1 + 0.5 * len(ys), f"{SCORE}, mean of each cell", grid="")
    for y, x, mean, count in scores.reset_index().itertuples(index=False):
        row, column = ys.index(y), xs.index(x)
        alpha = 0.06 + 0.6 * ((mean - low) / (high - low) if high > low else 1)
        axis.barh(row, 0.96, 0.94, column - 0.48, color=LIGHT[0], alpha=alpha)
        axis.text(column, row, f"{mean:.3f}" + (f" ({count})" if count > 1 else ""), ha="center", va="center")
    best = ys.index(best_y), 0.96, 0.94, xs.index(best_x) - 0.48
    axis.barh(*best, fill=False, edgecolor="black", linewidth=2)
    axis.set_xticks(range(len(xs)), [literal(textwrap.fill(str(x), 14)) for x in xs])
    axis.set_yticks(range(len(ys)), [literal(textwrap.fill(str(y), 22)) for y in ys])
    axis.set(xlabel=literal(x_name), ylabel=literal(y_name))
    axis.spines[:].set_visible(False)
    where = f"at {x_name} {best_x} and {y_name} {best_y}"
    figure.set_label(f"Heat map: best mean {SCORE} {high:.3f} {where}.")
    return figure


def new_axes(width: float, height: float, title: str, *, grid: Any = "y") -> tuple[Figure, Axes]:
    # Without pyplot, which may look for a window system and keeps every figure until it is closed.
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=10)
    axis.tick_params(length=0)
    axis.spines[["top", "right", *(["left"] if grid else [])]].set_visible(False)
    axis.set_axisbelow(True)
    if grid:
        axis.grid(axis=grid, color="black", alpha=0.14)
    return figure, axis


def _line(rank: int) -> dict[str, Any]:
    """How the line of a run looks: labelled, coloured and dashed if it is one of the best."""
    if rank > COMPARED:
        return {"color": "black", "alpha": 0.2, "linewidth": 0.8}
    return {"label": rank, "color": LIGHT[rank - 1], "linestyle": DASHES[rank - 1], "linewidth": 1.5}


def _name_ranks(axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:  # drawn last, so that they lie on top; named first
        axis.figure.legend(
            handles[::-1], labels[::-1], loc="outside right upper", title="rank", frameon=False
        )


def literal(text: str) -> str:
    r"""A text in which matplotlib finds no formula: it takes ``\$`` for a dollar sign."""
    return text.replace("$", r"\$")
