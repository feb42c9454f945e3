"""The paired test and its interval, by hand."""

import time
from dataclasses import replace

import numpy as np
import pytest

from biomerge_lib.core.errors import DataError
from biomerge_lib.scoring.significance import compare_predictions, randomisation_p
from tests.scoring.test_ner_metrics import prediction

RIGHT, WRONG = [1, 0, 0], [0, 1, 1]


def wins_and_losses(wins, losses, ties=0):
    """Counts of two systems: the first one is right in ``wins`` documents, the second one in ``losses``."""
    first = [RIGHT] * wins + [WRONG] * losses + [RIGHT] * ties
    second = [WRONG] * wins + [RIGHT] * losses + [RIGHT] * ties
    return np.array(first).reshape(-1, 3), np.array(second).reshape(-1, 3)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (3, 0, 2 / 8),  # only all and none swapped differ as much
        (2, 1, 1.0),  # an odd sum of three signs is never smaller than one
        (4, 1, 2 * (1 + 5) / 32),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (0, 0, 1.0),
    ],
)
def test_p_of_few_documents_is_exact(wins, losses, p):
    for ties in (0, 400):  # documents that both answer alike change nothing
        first, second = wins_and_losses(wins, losses, ties)
        assert randomisation_p(first, second) == randomisation_p(second, first) == p


def test_p_of_many_documents_is_near_the_exact_one():
    first, second = wins_and_losses(10, 2)
    assert randomisation_p(first, second, permutations=4000) == pytest.approx(158 / 4096, abs=0.01)
    first, second = wins_and_losses(40, 0)
    assert randomisation_p(first, second, permutations=99) == 1 / 100  # never 0: the observed one counts


def test_swaps_are_of_counts_not_of_f1s():
    """Two documents of unequal size: swapping the small one changes little."""
    first, second = np.array([[8, 0, 0], [1, 0, 0]]), np.array([[6, 2, 2], [0, 0, 1]])
    # F1s as they are: 1 and 12/17; the small one swapped: 16/17 and 14/18; the large one: 14/18 and 16/17.
    assert randomisation_p(first, second) == 2 / 4


def test_ten_thousand_permutations_over_500_documents_take_seconds():
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 9, (500, 3)), rng.integers(0, 9, (500, 3))
    began = time.process_time()
    assert 0 < randomisation_p(first, second) <= 1
    assert time.process_time() - began < 4


def answers(right, *, documents=20, sentences=5):
    """Sentences of two mentions, of which one is always found and the other where ``right`` says so."""
    gold = [(0, 7), (20, 34)]
    return [
        prediction(n, gold, gold if right(n // sentences) else gold[:1], doc_id=f"d{n // sentences}")
        for n in range(documents * sentences)
    ]


def test_two_files_are_compared_over_documents():
    better, worse = answers(lambda document: True), answers(lambda document: document >= 10)
    found = compare_predictions(better, worse)
    assert found.units == "20 documents"
    assert (found.first_f1, found.second_f1) == (1.0, pytest.approx(2 * 150 / 350))
    assert found.difference == pytest.approx(-1 / 7)
    assert found.p == 2 / 2**10  # ten documents differ, all in one direction
    assert found.low < -1 / 7 < found.high < 0
    back = compare_predictions(worse, better)
    assert (back.difference, back.p) == (-found.difference, found.p)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.01)
    assert compare_predictions(better, better) == replace(found, second_f1=1.0, low=0.0, high=0.0, p=1.0)


def test_files_without_documents_are_compared_over_sentences_and_borrow_documents_where_one_has_them():
    better, worse = answers(lambda document: True), answers(lambda document: document >= 10)
    old = [replace(one, doc_id="") for one in better]
    assert compare_predictions(old, [replace(one, doc_id="") for one in worse]).units == "100 sentences"
    assert compare_predictions(old, worse) == compare_predictions(better, worse)


def test_predictions_of_other_records_are_refused():
    some = answers(lambda document: True)
    with pytest.raises(
        DataError, match=r"predictions of 100 and of 99 records cannot be compared\. Score the same"
    ):
        compare_predictions(some, some[1:])
    other = [replace(some[0], text="Aspirin can cause asthma attacks ."), *some[1:]]
    with pytest.raises(
        DataError, match="predictions of other records: number 0 is x/d0 'Aspirin can trigger"
    ):
        compare_predictions(some, other)
    with pytest.raises(DataError, match="predictions of 0 and of 0 records"):
        compare_predictions([], [])
