"""Knows which gold mentions are found and which not, by what they are, and how boundaries are missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf

import pandas as pd

from biomerge_lib.core.records import Record
from biomerge_lib.decoding.predictions import Prediction
from biomerge_lib.scoring.ner_metrics import find_errors

TYPE, SEEN, BOUNDARIES = "Gold type", "The mention's string in training", "Boundary errors"
LENGTHS = {10: "1-10", 20: "11-20", 30: "21-30", 40: "31-40", 60: "41-60", inf: ">60"}  # words, at most


def find_weaknesses(
    predictions: Sequence[Prediction], train: Iterable[Record] | None = None
) -> dict[str, pd.DataFrame]:
    """Tables by their titles: recall of exact spans by what the gold mentions are, then the boundary errors.

    A mention of two types (``Cell|Tissue``) counts for both. A string, in lower case, is a mention ``again in the
    sentence`` (where only offsets tell one from the other), else ``in other sentences`` of the document, or ``once``.
    Without ``train`` there is no table of seen and unseen strings, and without gold types none of them.
    """
    known = {record.text[start:end].lower() for record in train or () for start, end in record.spans}
    strings = [[p.text[start:end].lower() for start, end in p.gold] for p in predictions]
    pairs = list(zip(predictions, strings, strict=True))
    in_documents = Counter((prediction.document, string) for prediction, own in pairs for string in own)
    rows = []
    for prediction, own in pairs:
        in_sentence = Counter(own)
        sentence_words = len(prediction.text.split())
        kinds = prediction.gold_types or [""] * len(own)
        for span, string, kind in zip(prediction.gold, own, kinds, strict=True):
            words = len(string.split())
            others = "in other sentences" if in_documents[prediction.document, string] > 1 else "once"
            rows.append(
                {
                    "found": span in prediction.pred,
                    TYPE: kind.split("|") if kind else None,
                    "Words in the mention": str(words) if words < 3 else "3 or more",
                    SEEN: None if train is None else "seen" if string in known else "unseen",
                    "The string is a mention": "again in the sentence" if in_sentence[string] > 1 else others,
                    "Words in the sentence": next(
                        name for most, name in LENGTHS.items() if sentence_words <= most
                    ),
                }
            )
    mentions = pd.DataFrame(rows)
    tables = {}
    for title in mentions.columns[1:]:
        known_of = mentions.explode(title).dropna(subset=title)
        table = known_of.groupby(title)["found"].agg(gold="size", found="sum")
        if len(table):
            tables[title] = table.assign(recall=table["found"] / table["gold"])
    return tables | {BOUNDARIES: _count_boundary_errors(predictions)}


def _count_boundary_errors(predictions: Sequence[Prediction]) -> pd.DataFrame:
    """Where one mention and one prediction overlap: which boundary is wrong, and how often by one character."""
    rows = {name: [0, 0] for name in ("left", "right", "both")}
    for error in find_errors(predictions):
        if (len(error.gold), len(error.pred)) == (1, 1):
            (start, end), (first, last) = error.gold[0], error.pred[0]
            wrong = "both" if start != first and end != last else "left" if start != first else "right"
            rows[wrong][0] += 1
            rows[wrong][1] += max(abs(start - first), abs(end - last)) == 1
    return pd.DataFrame.from_dict(rows, orient="index", columns=["errors", "off by one character"])
