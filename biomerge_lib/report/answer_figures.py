"""Knows the figures of one run's answers: which mentions are found, boundaries, and how far to trust probabilities."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from biomerge_lib.decoding.predictions import Prediction
from biomerge_lib.report.report_figures import DASHES, LIGHT, literal, new_axes
from biomerge_lib.scoring.breakdown import BOUNDARIES
from biomerge_lib.scoring.confidence import calibrate, calibration_error, score_thresholds

WHOLE = (-0.04, 1.04)  # of an axis of shares


def draw_weaknesses(tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """A figure of bars for each table of :func:`find_weaknesses`."""
    figures = {}
    for title, table in tables.items():
        names = [literal(textwrap.fill(str(name), 26)) for name in table.index]
        height = 0.8 + 0.28 * len(table) + 0.12 * sum(name.count("\n") for name in names)
        figure, axis = new_axes(4.5, height, title, grid="x")
        rows = range(len(table))
        if title == BOUNDARIES:
            labels = [f"{errors:,}" for errors in table["errors"]]
            bars = axis.barh(rows, table["errors"], height=0.62, label="farther", color=LIGHT[0])
            near = table["off by one character"]
            axis.barh(rows, near, height=0.62, label=near.name, color=LIGHT[1])
            axis.set(xlabel="mentions", xlim=(0, 1.2 * max(1, table["errors"].max())))
            figure.legend(loc="outside lower left", ncols=2, frameon=False)
        else:
            pairs = zip(table["recall"], table["gold"], strict=True)
            labels = [f"{recall:.3f} of {gold:,}" for recall, gold in pairs]
            bars = axis.barh(rows, table["recall"], height=0.62, color=LIGHT[0])
            axis.set(xlabel="recall", xlim=(0, 1.42), xticks=[0, 0.25, 0.5, 0.75, 1])
        axis.bar_label(bars, labels, padding=4)
        axis.set_yticks(rows, names)
        axis.invert_yaxis()
        said = ", ".join(f"{name} {label}" for name, label in zip(table.index, labels, strict=True))
        figure.set_label(f"{title}: {said}.")
        figures[title] = figure
    return figures


def draw_confidence(predictions: Sequence[Prediction]) -> list[Figure]:
    """What the most probable spans score, and precision against probability; nothing where no span has one."""
    if not all(len(p.pred) == len(p.probabilities) for p in predictions):
        return []
    rows, bins = pd.DataFrame(score_thresholds(predictions)), pd.DataFrame(calibrate(predictions))
    if rows.empty:
        return []
    coverage, curve = new_axes(4.5, 2.9, "The most probable spans only")
    for name, colour, dashes in zip(("precision", "recall", "ner_f1"), LIGHT, DASHES, strict=False):
        label = name.replace("ner_f1", "F1")
        curve.plot(rows["coverage"], rows[name], label=label, color=colour, linestyle=dashes)
    curve.set(xlabel="share of the predicted spans kept", ylim=WHOLE, xlim=WHOLE)
    coverage.legend(frameon=False, loc="outside lower left", ncols=3)
    error = calibration_error(predictions)
    calibration, axis = new_axes(4.5, 2.9, f"Calibration (error {error:.3f})")
    axis.plot([0, 1], [0, 1], color="black", alpha=0.4, linestyle=DASHES[2], linewidth=1, label="perfect")
    axis.plot(bins["probability"], bins["precision"], "o-", ms=4, color=LIGHT[0], label="tenths of the spans")
    axis.set(xlabel="mean probability", ylabel="precision", xlim=WHOLE, ylim=WHOLE)
    axis.legend(frameon=False, loc="upper left")
    coverage.set_label(
        "Precision, recall and F1 against the share of the spans kept, the most probable first."
    )
    calibration.set_label(f"Precision against probability in tenths; calibration error {error:.3f}.")
    return [coverage, calibration]
