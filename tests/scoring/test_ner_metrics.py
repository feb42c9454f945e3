"""Scores of hand-made answers, to four digits."""

import json
from dataclasses import replace

import numpy as np
import pytest

from biomerge_lib.core.errors import DataError
from biomerge_lib.decoding.predictions import Prediction, read_predictions, write_predictions
from biomerge_lib.scoring.ner_metrics import (
    bootstrap,
    count_units,
    find_errors,
    score_forced_answers,
    score_overlaps,
    score_predictions,
    score_spans,
    score_word_labels,
)


def prediction(index, gold, pred, text="Aspirin can trigger asthma attacks .", **fields):
    values = {"doc_id": "d", "dataset": "x", "answers": [""], "answer_ids": [[]], "finish": ["eos"]}
    faults = {"unreadable": 0, "out_of_text": 0, "unsorted": 0}
    return Prediction(index=index, text=text, gold=gold, pred=pred, **values | faults | fields)


def test_micro_scores_of_three_sentences():
    score = score_spans([([(0, 7), (20, 34)], [(0, 7), (20, 26)]), ([(3, 5)], []), ([], [(1, 2)])])
    assert (score.true_positives, score.false_positives, score.false_negatives) == (1, 2, 2)
    assert score.precision == pytest.approx(1 / 3) and score.recall == pytest.approx(1 / 3)
    assert score.f1 == pytest.approx(0.3333, abs=5e-5)


def test_nothing_predicted_and_nothing_there_scores_zero_not_an_error():
    assert score_spans([([], [])]).f1 == 0.0
    assert set(score_overlaps([]).values()) == set(score_overlaps([([], [])]).values()) == {0.0}


def test_all_scores_of_a_split():
    predictions = [
        prediction(0, [(0, 7), (20, 34)], [(0, 7), (19, 33)]),
        prediction(1, [(0, 7)], [(0, 7)], dataset="y"),
        prediction(2, [], [(0, 99)], out_of_text=1, finish=["length"], unreadable=2, unsorted=1),
        prediction(3, [(20, 34)], []),
    ]
    scores = score_predictions(predictions)
    assert scores["ner_precision"] == pytest.approx(2 / 4)
    assert scores["ner_recall"] == pytest.approx(2 / 4)
    assert scores["ner_f1"] == pytest.approx(0.5)
    # (19, 33) touches "trigger", "asthma" and "attacks"? It starts at the blank before "asthma".
    assert scores["ner_f1_snapped"] == pytest.approx(2 * 3 / (4 + 4))
    # Hits and overlaps: (0, 7) twice, (19, 33) over (20, 34); (0, 99) and the fourth gold span stand alone.
    assert scores["ner_f1_overlap"] == pytest.approx(2 * 3 / (4 + 4))
    assert scores["ner_f1_partial"] == pytest.approx(2 * 2.5 / (4 + 4))
    assert scores["unreadable_rate"] == scores["out_of_text_rate"] == scores["unsorted_rate"] == 0.25
    assert scores["truncated_rate"] == 0.25
    assert scores["dataset/y/ner_f1"] == 1.0 and scores["dataset/x/ner_f1"] == pytest.approx(1 / 3)
    assert (scores["records"], scores["gold_spans"], scores["pred_spans"]) == (4, 4, 4)
    assert scores["ner_f1_low"] <= 0.5 <= scores["ner_f1_high"]


def test_spans_that_only_touch_do_not_overlap():
    scores = score_overlaps([([(0, 7)], [(7, 12)]), ([], []), ([(3, 9)], [(8, 9)])])
    assert scores == {"ner_f1_overlap": pytest.approx(0.5), "ner_f1_partial": pytest.approx(0.25)}


def test_the_bootstrap_is_certain_of_what_never_varies_and_reproducible():
    perfect = np.array([[1, 0, 0]] * 30)
    assert bootstrap(perfect) == (1.0, 1.0)
    mixed = np.array([[1, 0, 0]] * 30 + [[0, 1, 1]] * 30)
    low, high = bootstrap(mixed)
    assert (low, high) == bootstrap(mixed)
    assert 0.35 < low < 0.5 < high < 0.65
    # Four units, three of them right: F1 is k/4, k binomial (4, 3/4); P(k = 0) = 0.004, P(k <= 1) = 0.051.
    assert bootstrap(np.array([[1, 0, 0]] * 3 + [[0, 1, 1]])) == (0.25, 1.0)
    assert bootstrap(np.zeros((0, 3))) == (0.0, 0.0)


def test_a_documents_sentences_are_counted_together():
    pairs = [([(0, 7)], [(0, 7)]), ([(0, 7)], [(1, 7)]), ([(3, 9)], []), ([], [(1, 2)])]
    unit, counts = count_units(pairs, [("x", "a"), ("x", "b"), ("x", "a"), ("y", "a")])
    assert (unit, counts.tolist()) == ("documents", [[1, 0, 1], [0, 1, 1], [0, 1, 0]])
    for documents in ([("x", "a")] * 4, [("x", str(number)) for number in range(4)]):
        unit, counts = count_units(pairs, documents)
        assert (unit, counts.tolist()) == ("sentences", [[1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 1, 0]])


def test_the_interval_is_over_documents_where_they_are_known():
    """Ten documents of five sentences that are all right or all wrong say no more than ten sentences."""
    text = "Aspirin can trigger asthma attacks ."
    sentences = [
        prediction(n, [(0, 7)], [(0, 7)] if n % 10 < 5 else [], text=text, doc_id=str(n // 5))
        for n in range(50)
    ]
    known, alone = (
        score_predictions(part) for part in (sentences, [replace(one, doc_id="") for one in sentences])
    )
    assert (known["documents"], alone["documents"]) == (10, 0)
    assert known["ner_f1"] == alone["ner_f1"] == pytest.approx(2 / 3)
    wide, narrow = (scores["ner_f1_high"] - scores["ner_f1_low"] for scores in (known, alone))
    assert 1.8 < wide / narrow < 2.8  # the square root of five


def test_word_labels_are_scored_by_entity():
    # gold: [B I] O [B];  predicted: [B I] O O, then a lone I, which seqeval reads as an entity of its own
    scores = score_word_labels([[1, 2, 0, 1], [0, 0]], [[1, 2, 0, 0], [0, 2]])
    assert scores["ner_precision"] == pytest.approx(0.5)
    assert scores["ner_recall"] == pytest.approx(0.5)
    assert scores["ner_f1"] == pytest.approx(0.5)


DIGITS = {str(digit): digit for digit in range(10)}
TOKENS = {**DIGITS, "-": 10, ";": 11, ",;": 12, "EOS": 13, "20": 14, "34": 15, "35": 16, "200": 17}


def forced(*pairs):
    """(found, spurious, missed) of answers spelt token by token: ``0 - 7 ; 2 0 - 3 4 EOS``."""
    ids = [tuple([TOKENS[token] for token in side.split()] for side in pair) for pair in pairs]
    score = score_forced_answers(ids, eos_id=13, separator_ids={11, 12})
    return score.true_positives, score.false_positives, score.false_negatives


SPLIT, WHOLE = "0 - 7 ; 2 0 - 3 4 EOS", "0 - 7 ; 20 - 34 EOS"


@pytest.mark.parametrize(
    "gold, predicted, counts",
    [
        (SPLIT, SPLIT, (2, 0, 0)),
        (WHOLE, WHOLE, (2, 0, 0)),
        (SPLIT, "0 - 7 ,; 2 0 - 3 4 EOS", (2, 0, 0)),  # another spelling of the separator
        (SPLIT, "0 - 7 EOS 2 0 - 3 4 EOS", (1, 0, 1)),  # the last one missed
        (SPLIT, "0 - 7 EOS 5 0 - 3 4 EOS", (1, 0, 1)),  # what follows an early end does not count
        (SPLIT, "0 - 7 ; 2 0 - 3 4 ;", (2, 1, 0)),  # one more where the answer ends
        (SPLIT, "3 - 7 ; 2 0 - 3 4 EOS", (1, 1, 1)),  # a wrong first digit
        (SPLIT, "EOS - 7 ; 2 0 - 3 4 EOS", (1, 0, 1)),  # nothing where there is a first span
        (SPLIT, "0 - 7 ; 2 0 - 3 5 EOS", (1, 1, 1)),  # a wrong end
        (WHOLE, "0 - 7 ; 20 - 35 EOS", (1, 1, 1)),
        (WHOLE, "0 - 7 ; 200 - 34 EOS", (1, 1, 1)),
        (SPLIT, "0 - 7 0 2 0 - 3 4 EOS", (1, 1, 1)),  # 0-70: the first span's error alone
        (SPLIT, "0 - 7 ; 2 0 - 3 4 0", (1, 1, 1)),  # 20-340
        (SPLIT, "0 - 7 ; 2 0 - 5 4 0", (1, 1, 1)),  # wrong already
        (SPLIT, "1 - 7 ; 3 0 - 3 4 ;", (0, 3, 2)),
        ("EOS", "EOS", (0, 0, 0)),
        ("EOS", "5", (0, 1, 0)),
        ("EOS", ";", (0, 1, 0)),
    ],
)
def test_a_forced_answer_by_hand(gold, predicted, counts):
    assert forced((gold, predicted)) == counts


def test_forced_answers_of_a_batch_are_summed():
    batch = [(SPLIT, SPLIT), (SPLIT, "0 - 7 EOS 2 0 - 3 4 EOS"), ("EOS", "4"), (WHOLE, "0 - 7 ; 20 - 35 EOS")]
    batch += [(SPLIT, "0 - 7 ; 2 0 - 3 4 ;")]
    assert forced(*batch) == (6, 3, 2)
    ids = [tuple([TOKENS[token] for token in side.split()] for side in pair) for pair in batch]
    score = score_forced_answers(ids, eos_id=13, separator_ids={11})
    assert (score.precision, score.recall) == pytest.approx((0.6667, 0.75), abs=5e-5)
    assert score.f1 == pytest.approx(0.7059, abs=5e-5)
    assert score_forced_answers([], eos_id=13, separator_ids={11}).f1 == 0.0


def test_errors_are_named_by_what_overlaps():
    predictions = [
        prediction(0, [(0, 7), (20, 34)], [(0, 7), (20, 26)]),  # boundary
        prediction(1, [(0, 7)], [(20, 26)]),  # missed and spurious
        prediction(2, [(0, 7), (8, 11)], [(0, 11)]),  # merged
        prediction(3, [(20, 34)], [(20, 26), (27, 34)]),  # split
    ]
    found = [(error.index, error.kind) for error in find_errors(predictions)]
    assert found == [(0, "boundary"), (1, "missed"), (1, "spurious"), (2, "merged"), (3, "split")]


def test_predictions_survive_writing_and_reading(tmp_path):
    predictions = [prediction(0, [(0, 7)], [(20, 34)], text="α β"), prediction(1, [], [])]
    write_predictions(tmp_path / "p.jsonl", predictions)
    assert read_predictions(tmp_path / "p.jsonl") == predictions


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gold": [[0, "x"]]}, "gold.0.1: Input should be a valid integer"),
        ({"pred": None}, "pred: Input should be a valid array"),
        ({"gold_types": ["Chemical", "Disease"]}, "Value error, 2 gold_types for 1 gold spans"),
    ],
)
def test_a_line_that_is_no_prediction_is_named(tmp_path, change, why):
    path = tmp_path / "p.jsonl"
    write_predictions(path, [prediction(0, [], []), prediction(1, [(0, 7)], [])])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n")
    with pytest.raises(DataError, match=rf"p.jsonl:2: {why}"):
        read_predictions(path)


def test_predictions_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "p.jsonl"
    write_predictions(path, [prediction(0, [(0, 7)], [])])
    fields = json.loads(path.read_text())
    for name in ("gold_types", "probabilities", "logprobs", "margins", "prompt_hashes"):
        del fields[name]
    path.write_text(json.dumps(fields))
    assert read_predictions(path) == [prediction(0, [(0, 7)], [])]
