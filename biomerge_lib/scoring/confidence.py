"""Knows how far the spans' probabilities can be trusted: precision against coverage, calibration, a threshold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from biomerge_lib.core.errors import DataError
from biomerge_lib.decoding.predictions import Prediction, keep_probable
from biomerge_lib.scoring.ner_metrics import score_spans


def rank_spans(predictions: Sequence[Prediction]) -> pd.DataFrame:
    """The predicted spans, the most probable first: ``probability``, and whether gold has it (``hit``).

    Raises:
        DataError: no probabilities (predictions of an earlier version, or of a server that gives none).
    """
    ranked: list[tuple[float, bool]] = []
    for prediction in predictions:
        if len(prediction.probabilities) != len(prediction.pred):
            raise DataError(f"prediction {prediction.index} carries no probabilities: decode again.")
        hits = [span in prediction.gold for span in prediction.pred]
        ranked += zip(prediction.probabilities, hits, strict=True)
    table = pd.DataFrame(ranked, columns=["probability", "hit"], dtype=float)
    return table.sort_values("probability", ascending=False, kind="stable", ignore_index=True)


def score_thresholds(predictions: Sequence[Prediction]) -> list[dict[str, float]]:
    """One row for each probability that occurs, falling: what keeping the spans at or above it scores.

    ``coverage`` is the share of the predicted spans kept; ``precision``, ``recall`` and ``ner_f1`` are of those.
    """
    ranked = rank_spans(predictions)
    gold = sum(len(prediction.gold) for prediction in predictions)
    table = ranked.assign(kept=ranked.index + 1, right=ranked["hit"].cumsum())
    table = table.drop_duplicates("probability", keep="last")
    kept, right = table["kept"], table["right"]
    scores = {"coverage": kept / len(ranked), "precision": right / kept, "recall": right / max(gold, 1)}
    scores |= {"threshold": table["probability"], "ner_f1": 2 * right / (kept + gold)}
    return pd.DataFrame(scores).to_dict("records")


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
    ranked = rank_spans(predictions)[::-1].to_numpy()
    return [
        {"probability": float(part[:, 0].mean()), "precision": float(part[:, 1].mean()), "spans": len(part)}
        for part in np.array_split(ranked, min(bins, len(ranked)) or 1)
        if len(part)
    ]


def calibration_error(predictions: Sequence[Prediction], *, bins: int = 10) -> float:
    """Expected calibration error: the mean distance of probability and precision over equally filled bins."""
    rows = calibrate(predictions, bins=bins)
    spans = sum(row["spans"] for row in rows)
    gaps = (row["spans"] * abs(row["probability"] - row["precision"]) for row in rows)
    return sum(gaps) / spans if spans else 0.0
