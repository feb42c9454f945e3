"""What probabilities are worth, on hand-made predictions."""

from dataclasses import replace

import pytest

from biomerge_lib.core.errors import DataError
from biomerge_lib.decoding.predictions import keep_probable, read_predictions, write_predictions
from biomerge_lib.scoring.confidence import (
    calibrate,
    calibration_error,
    choose_threshold,
    score_threshold,
    score_thresholds,
)
from biomerge_lib.scoring.ner_metrics import score_predictions
from tests.scoring.test_ner_metrics import prediction

PREDICTIONS = [
    prediction(0, [(0, 7), (20, 34)], [(0, 7), (20, 26)], probabilities=[0.9, 0.3]),
    prediction(1, [(0, 7)], [(0, 7)], probabilities=[0.8]),
    prediction(2, [], [(12, 19)], probabilities=[0.3]),
]


def test_precision_against_coverage():
    rows = score_thresholds(PREDICTIONS)
    assert [row["threshold"] for row in rows] == [0.9, 0.8, 0.3]
    assert [row["coverage"] for row in rows] == [0.25, 0.5, 1.0]
    assert [row["precision"] for row in rows] == [1.0, 1.0, 0.5]
    assert [row["recall"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert [row["ner_f1"] for row in rows] == pytest.approx([2 / 4, 4 / 5, 4 / 7])


def test_the_threshold_chosen_on_dev_does_on_test_what_the_curve_says(tmp_path):
    write_predictions(tmp_path / "dev.jsonl", PREDICTIONS)
    threshold = choose_threshold(read_predictions(tmp_path / "dev.jsonl"))
    assert threshold == 0.8
    kept = [keep_probable(one, threshold) for one in PREDICTIONS]
    assert [one.pred for one in kept] == [[(0, 7)], [(0, 7)], []]
    assert [one.probabilities for one in kept] == [[0.9], [0.8], []]
    assert score_predictions(kept)["ner_f1"] == pytest.approx(4 / 5)
    assert keep_probable(PREDICTIONS[0], None) is PREDICTIONS[0]
    assert score_threshold(PREDICTIONS, threshold) == {
        "spans": 2,
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "ner_f1": pytest.approx(4 / 5),
    }
    assert score_threshold(PREDICTIONS, None)["spans"] == 4


def test_no_threshold_where_dropping_gains_nothing():
    assert choose_threshold(PREDICTIONS[1:2]) is None
    assert choose_threshold([prediction(0, [(0, 7)], [])]) is None


def test_calibration():
    assert calibrate(PREDICTIONS, bins=2) == [
        {"probability": pytest.approx(0.3), "precision": 0.0, "spans": 2},
        {"probability": pytest.approx(0.85), "precision": 1.0, "spans": 2},
    ]
    assert calibration_error(PREDICTIONS, bins=2) == pytest.approx((0.3 + 0.15) / 2)
    assert calibrate([prediction(0, [(0, 7)], [])]) == [] and calibration_error([]) == 0.0


def test_predictions_without_probabilities_are_refused():
    without = [replace(PREDICTIONS[0], probabilities=[])]
    with pytest.raises(DataError, match="prediction 0 carries no probabilities: decode again"):
        score_thresholds(without)
    with pytest.raises(DataError, match=r"span_threshold=0.5 needs probabilities"):
        keep_probable(without[0], 0.5)
