"""Which mentions are found, by hand."""

import io

import pytest

from biomerge_lib.core.records import Record
from biomerge_lib.corpora.writers import Tagged, write_iob
from biomerge_lib.scoring.breakdown import BOUNDARIES, SEEN, TYPE, find_weaknesses
from biomerge_lib.scoring.ner_metrics import score_spans
from tests.scoring.test_ner_metrics import prediction

TEXT = "Aspirin can trigger asthma attacks ."
TWICE = "asthma , then asthma , then chronic obstructive lung disease"
PREDICTIONS = [
    prediction(
        0, [(0, 7), (20, 34)], [(0, 7), (20, 26)], text=TEXT, doc_id="a", gold_types=["Drug", "Sign|Disease"]
    ),
    prediction(
        1,
        [(0, 6), (14, 20), (28, 60)],
        [(14, 20)],
        text=TWICE,
        doc_id="a",
        gold_types=["Disease", "Disease", "Disease"],
    ),
    prediction(2, [(0, 7)], [], text=TEXT, doc_id="a", gold_types=["Drug"]),
    prediction(3, [(0, 7)], [(0, 7)], text=TEXT, doc_id="b", gold_types=["Drug"]),
]


WORDS, AGAIN, SENTENCE = "Words in the mention", "The string is a mention", "Words in the sentence"


def counts(predictions, title, train=None):
    table = find_weaknesses(predictions, train)[title]
    assert list(table["recall"]) == pytest.approx(list(table["found"] / table["gold"]))
    return {label: (row["gold"], row["found"]) for label, row in table.iterrows()}


def test_recall_by_what_mentions_are():
    # "asthma attacks" has two types and counts for both.
    assert counts(PREDICTIONS, TYPE) == {"Disease": (4, 1), "Drug": (3, 2), "Sign": (1, 0)}
    assert counts(PREDICTIONS, WORDS) == {"1": (5, 3), "2": (1, 0), "3 or more": (1, 0)}
    assert counts(PREDICTIONS, SENTENCE) == {"1-10": (7, 3)}
    train = [Record("aspirin", ((0, 7),), "t", "x"), Record("Asthma attacks", ((0, 14),), "t", "x")]
    assert counts(PREDICTIONS, SEEN, train) == {"seen": (4, 2), "unseen": (3, 1)}
    # Twice in a sentence: asthma. In two sentences of document a: Aspirin, but not in b.
    assert counts(PREDICTIONS, AGAIN) == {
        "again in the sentence": (2, 1),
        "in other sentences": (2, 1),
        "once": (3, 1),
    }


def test_mentions_and_sentences_are_sorted_by_their_words():
    found = [prediction(n, [(0, 5 * n - 1)], [], text=" ".join(["word"] * n)) for n in (1, 2, 3, 4, 10)]
    assert counts(found, WORDS) == {"1": (1, 0), "2": (1, 0), "3 or more": (3, 0)}
    found = [prediction(n, [(0, 4)], [], text=" ".join(["word"] * n)) for n in (1, 10, 11, 60, 61)]
    assert counts(found, SENTENCE) == {"1-10": (2, 0), "11-20": (1, 0), "41-60": (1, 0), ">60": (1, 0)}


def test_what_is_not_known_has_no_table():
    old = [
        prediction(0, [(0, 7)], [], text=TEXT, doc_id=""),
        prediction(1, [(0, 7)], [], text=TEXT, doc_id=""),
    ]
    tables = find_weaknesses(old)
    assert list(tables) == [WORDS, AGAIN, SENTENCE, BOUNDARIES]
    assert counts(old, AGAIN) == {"once": (2, 0)}  # documents are not known
    assert list(find_weaknesses([])) == [BOUNDARIES]


def test_boundary_errors_are_told_by_side_and_distance():
    gold = [(10, 20), (30, 40)]
    pairs = [
        (gold[:1], [(11, 20)]),  # left, by one
        (gold[:1], [(5, 20)]),  # left
        (gold[:1], [(10, 19)]),  # right, by one
        (gold[:1], [(9, 21)]),  # both, each by one
        (gold[:1], [(11, 25)]),  # both
        (gold[:1], [(10, 12), (14, 20)]),  # split: no boundary of one prediction
        (gold, [(10, 40)]),  # merged
        (gold[:1], [(20, 25)]),  # apart
        (gold, gold),
    ]
    table = find_weaknesses([prediction(n, *pair) for n, pair in enumerate(pairs)])[BOUNDARIES]
    assert table.to_dict("index") == {
        "left": {"errors": 2, "off by one character": 1},
        "right": {"errors": 1, "off by one character": 1},
        "both": {"errors": 2, "off by one character": 1},
    }


def test_scores_of_exported_iob_are_seqevals():
    """Gold and predictions as IOB2: found, missed, spurious, another boundary, mentions side by side."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    pairs = [
        (TEXT, [(0, 7), (20, 34)], [(0, 7), (20, 26)]),
        (TWICE, [(0, 6), (14, 20), (28, 60)], [(14, 20), (28, 60)]),
        (TEXT, [], [(12, 19)]),
        ("Aspirin asthma cough", [(0, 7), (8, 14)], [(0, 7), (8, 14), (15, 20)]),
        ("Aspirin asthma cough", [(0, 14)], [(0, 7), (8, 14)]),
    ]
    score = score_spans((gold, pred) for _, gold, pred in pairs)
    assert (score.true_positives, score.false_positives, score.false_negatives) == (5, 5, 3)
    tokens, tags = zip(*(exported([(pair[0], pair[side]) for pair in pairs]) for side in (1, 2)), strict=True)
    assert tokens[0] == tokens[1]
    precision, recall, f1, _ = precision_recall_fscore_support(*tags, average="micro")
    assert (precision, recall, f1) == pytest.approx((score.precision, score.recall, score.f1))


def exported(texts):
    """The tokens and the tags, a list a text, of what the CoNLL writer writes."""
    tokens, tags = [], []
    for number, (text, spans) in enumerate(texts):
        out = io.StringIO()
        write_iob([Tagged(f"d{number}", text, spans)], out)
        rows = [line.split("\t") for line in out.getvalue().splitlines() if "\t" in line]
        tokens.append([row[0] for row in rows])
        tags.append([row[-1] for row in rows])
    return tokens, tags
