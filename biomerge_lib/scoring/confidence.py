"""Knows how far the spans' probabilities can be trusted: precision against coverage, calibration, a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from biomerge_lib.core.errors import DataError
from biomerge_lib.decoding.predictions import Prediction, keep_probable
from biomerge_lib.scoring.ner_metrics import score_spans


def rank_spans(predictions: Sequence[Prediction]) -> list[tuple[float, bool]]:
    """Each predicted span's probability and whether gold has it, the most probable first.

    Raises:
        DataError: no probabilities (predictions of an earlier version, or of a server that gives none).
    """
    ranked = []
    for prediction in predictions:
        if len(prediction.probabilities) != len(prediction.pred):
            raise DataError(f"prediction {prediction.index} carries no probabilities: decode again.")
        gold = set(prediction.gold)
        ranked += [
            (p, span in gold) for span, p in zip(prediction.pred, prediction.probabilities, strict=True)
        ]
    return sorted(ranked, key=lambda pair: -pair[0])


def score_thresholds(predictions: Sequence[Prediction]) -> list[dict[str, float]]:
    """One row for each probability that occurs, falling: what keeping the spans at or above it scores.

    ``coverage`` is the share of the predicted spans kept; ``precision``, ``recall`` and ``ner_f1`` are of those.
    """
    ranked = rank_spans(predictions)
    gold_count = sum(len(prediction.gold) for prediction in predictions)
    rows, kept, right = [], 0, 0
    for probability, group in groupby(ranked, key=lambda pair: pair[0]):
        hits = [hit for _, hit in group]
        kept, right = kept + len(hits), right + sum(hits)
        rows.append(
            {
                "threshold": probability,
                "coverage": kept / len(ranked),
                "precision": right / kept,
                "recall": right / gold_count if gold_count else 0.0,
                "ner_f1": 2 * right / (kept + gold_count),
            }
        )
    return rows


def choose_threshold(predictions: Sequence[Prediction]) -> float | None:
    """The ``span_threshold`` with the best F1 on these predictions (of dev, then used on test); None to keep all.

    Of equal ones the lowest, so that nothing is dropped without a gain.
    """
    rows = score_thresholds(predictions)
    if not rows:
        return None
    best = max(reversed(rows), key=lambda row: row["ner_f1"])
    return None if best is rows[-1] else best["threshold"]


def score_threshold(predictions: Sequence[Prediction], threshold: float | None) -> dict[str, float]:
    """Spans kept, precision, recall and F1 without the spans below a threshold; None keeps all.

    Raises:
        DataError: spans without probabilities.
    """
    kept = [keep_probable(prediction, threshold) for prediction in predictions]
    score = score_spans((prediction.gold, prediction.pred) for prediction in kept)
    spans = sum(len(prediction.pred) for prediction in kept)
    return {"spans": spans, "precision": score.precision, "recall": score.recall, "ner_f1": score.f1}


def calibrate(predictions: Sequence[Prediction], *, bins: int = 10) -> list[dict[str, float]]:
    """Bins of equally many spans, the least probable first: mean ``probability``, ``precision`` and ``spans``."""
    ranked = rank_spans(predictions)[::-1]
    parts = np.array_split(np.array(ranked, dtype=float).reshape(-1, 2), min(bins, len(ranked)) or 1)
    return [
        {"probability": float(part[:, 0].mean()), "precision": float(part[:, 1].mean()), "spans": len(part)}
        for part in parts
        if len(part)
    ]


def calibration_error(predictions: Sequence[Prediction], *, bins: int = 10) -> float:
    """Expected calibration error: the mean distance of probability and precision over equally filled bins."""
    rows = calibrate(predictions, bins=bins)
    spans = sum(row["spans"] for row in rows)
    gaps = (row["spans"] * abs(row["probability"] - row["precision"]) for row in rows)
    return sum(gaps) / spans if spans else 0.0
