"""Knows how to score spans.

The headline is exact-span micro F1: a predicted span counts when start and end both equal a gold span's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from biomerge_lib.core.prompt_format import find_words
from biomerge_lib.core.spans import Span, snap_to_words
from biomerge_lib.decoding.predictions import Prediction

BIO_TAGS = ("O", "B-ENT", "I-ENT")


@dataclass(frozen=True, slots=True)
class SpanScore:
    """Micro-averaged counts over sentences; precision, recall and F1 are 0 where they are undefined."""

    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def precision(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        wrong = self.false_positives + self.false_negatives
        return _ratio(2 * self.true_positives, 2 * self.true_positives + wrong)


def score_spans(pairs: Iterable[tuple[Iterable[Span], Iterable[Span]]]) -> SpanScore:
    """Exact-span micro score of ``(gold, predicted)`` pairs, one pair a sentence."""
    true_positives = false_positives = false_negatives = 0
    for gold, predicted in pairs:
        gold, predicted = set(gold), set(predicted)
        true_positives += len(gold & predicted)
        false_positives += len(predicted - gold)
        false_negatives += len(gold - predicted)
    return SpanScore(true_positives, false_positives, false_negatives)


def score_predictions(predictions: Sequence[Prediction]) -> dict[str, float]:
    """All scores of a split's predictions.

    ``ner_f1`` (with ``ner_precision``, ``ner_recall``): exact offsets. ``ner_f1_snapped``: predicted offsets
    widened to the words they touch. ``ner_f1_overlap``: any overlap with a gold span counts; ``ner_f1_partial``: an
    inexact overlap counts one half (nervaluate's ``ent_type`` and ``partial``, SemEval-2013 task 9.1).
    ``ner_f1_low``, ``ner_f1_high``: 95 % bootstrap interval over ``documents``, of which 0 are known where it is over
    sentences (:func:`count_units`).
    ``unreadable_rate``, ``out_of_text_rate``, ``unsorted_rate``, ``truncated_rate``: share of records whose
    answer had such a fault. ``dataset/NAME/ner_f1``: per corpus, when there are several.
    """
    pairs = [(p.gold, p.pred) for p in predictions]
    exact = score_spans(pairs)
    unit, counts = count_units(pairs, [p.document for p in predictions])
    low, high = bootstrap(counts)
    count = max(len(predictions), 1)
    scores = {
        "ner_f1": exact.f1,
        "ner_precision": exact.precision,
        "ner_recall": exact.recall,
        "ner_f1_low": low,
        "ner_f1_high": high,
        "ner_f1_snapped": score_spans((p.gold, snap_prediction(p)) for p in predictions).f1,
        **score_overlaps(pairs),
        "unreadable_rate": sum(p.unreadable > 0 for p in predictions) / count,
        "out_of_text_rate": sum(p.out_of_text > 0 for p in predictions) / count,
        "unsorted_rate": sum(p.unsorted > 0 for p in predictions) / count,
        "truncated_rate": sum("length" in p.finish for p in predictions) / count,
        "documents": len(counts) if unit == "documents" else 0,
        "records": len(predictions),
        "gold_spans": sum(len(p.gold) for p in predictions),
        "pred_spans": sum(len(p.pred) for p in predictions),
    }
    datasets = sorted({p.dataset for p in predictions})
    if len(datasets) > 1:
        for name in datasets:
            own = score_spans((p.gold, p.pred) for p in predictions if p.dataset == name)
            scores[f"dataset/{name}/ner_f1"] = own.f1
    return scores


def score_overlaps(pairs: Sequence[tuple[Sequence[Span], Sequence[Span]]]) -> dict[str, float]:
    """Relaxed micro F1 of ``(gold, predicted)`` pairs, one pair a sentence; see :func:`score_predictions`."""
    from nervaluate import Evaluator

    if not pairs:
        return {"ner_f1_overlap": 0.0, "ner_f1_partial": 0.0}
    gold, predicted = (
        [[{"label": "ENT", "start": start, "end": end - 1} for start, end in spans] for spans in side]
        for side in zip(*pairs, strict=True)
    )
    overall = Evaluator(gold, predicted, tags=["ENT"], loader="dict").evaluate()["overall"]
    return {"ner_f1_overlap": overall["ent_type"].f1, "ner_f1_partial": overall["partial"].f1}


def snap_prediction(prediction: Prediction) -> list[Span]:
    """The predicted spans, each widened to the words that it touches."""
    words = find_words(prediction.text)
    return sorted({snap_to_words(span, words) for span in prediction.pred})


def count_units(
    pairs: Sequence[tuple[Sequence[Span], Sequence[Span]]], documents: Sequence[tuple[str, str]]
) -> tuple[Literal["documents", "sentences"], np.ndarray]:
    """What statistics resample: each document's counts, shape (units, 3): found, spurious, missed.

    A document's sentences depend on each other (its terms recur), so that they are drawn together. Where no document
    has two of the sentences, or all stand in one, the units are the sentences.
    """
    counts = np.array([astuple(score_spans([pair])) for pair in pairs], dtype=np.int64).reshape(-1, 3)
    numbers = {document: number for number, document in enumerate(dict.fromkeys(documents))}
    if not 1 < len(numbers) < len(counts):
        return "sentences", counts
    summed = np.zeros((len(numbers), 3), dtype=np.int64)
    np.add.at(summed, [numbers[document] for document in documents], counts)
    return "documents", summed


def f1_of(counts: np.ndarray) -> np.ndarray:
    """F1 of found, spurious and missed in the last axis; 0 where there is nothing."""
    found, spurious, missed = np.moveaxis(counts, -1, 0)
    total = 2 * found + spurious + missed
    return np.divide(2 * found, total, out=np.zeros(np.shape(total)), where=total > 0)


def bootstrap(
    counts: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray] = f1_of,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron and Tibshirani 1993) of a score of summed counts.

    Rows of ``counts`` are drawn with replacement; ``score`` takes their sums, shape (samples, columns).
    """
    if not len(counts):
        return 0.0, 0.0
    rng, shares = np.random.default_rng(seed), np.full(len(counts), 1 / len(counts))
    sums = [rng.multinomial(len(counts), shares, size=100) @ counts for _ in range(samples // 100)]
    low, high = np.percentile(score(np.concatenate(sums)), [2.5, 97.5])
    return float(low), float(high)


def score_word_labels(gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]]) -> dict[str, float]:
    """seqeval's entity-level precision, recall and F1 of B/I/O labels (0 = O, 1 = B, 2 = I), one list a sentence."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    tags = ([[BIO_TAGS[label] for label in sentence] for sentence in side] for side in (gold, predicted))
    precision, recall, f1, _ = precision_recall_fscore_support(*tags, average="micro", zero_division=0)
    return {"ner_f1": float(f1), "ner_precision": float(precision), "ner_recall": float(recall)}


def score_forced_answers(
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]], *, eos_id: int, separator_ids: Collection[int]
) -> SpanScore:
    """Span score of teacher-forced answers: what the model would write at each token, given the gold before it.

    A pair is a sentence's gold answer `` 0-7 ; 20-34`` + EOS as token ids, and the model's most likely token at each of
    them; ``separator_ids`` are the tokens that hold a semicolon. No text is generated, so one forward pass is enough.

    - A gold span is found when each of its tokens is the most likely one and the answer would end or separate after
      it; any other token there would make its end offset longer (``7`` becomes ``70``).
    - A gold span that is not found is missed. It also costs a spurious span, unless the model would end the answer
      where it is first wrong, the separator before the span included.
    - Another span where the gold answer ends is spurious.

    Each wrong token counts against one span only: a longer end is the error of the span before the separator.

    >>> wrong_end = ([10, 4, 17, 5, 12, 4, 19, 2], [10, 4, 17, 5, 12, 4, 18, 2])
    >>> score_forced_answers([wrong_end], eos_id=2, separator_ids={5})
    SpanScore(true_positives=1, false_positives=1, false_negatives=1)
    """
    found = spurious = missed = 0
    ends = {eos_id, *separator_ids}
    for gold, predicted in pairs:
        last = len(gold) - 1  # EOS
        separators = [place for place, token in enumerate(gold) if token in separator_ids]
        begins = [0, *(place + 1 for place in separators)] if last else []
        for begin, end in zip(begins, [*separators, last], strict=False):
            if begin and predicted[begin - 1] == eos_id:
                wrong = begin - 1
            else:
                wrong = next((place for place in range(begin, end) if predicted[place] != gold[place]), end)
            if wrong == end and predicted[end] in ends:
                found += 1
            else:
                missed += 1
                spurious += predicted[wrong] != eos_id
        spurious += predicted[last] in separator_ids or (not last and predicted[last] != eos_id)
    return SpanScore(found, spurious, missed)


@dataclass(frozen=True, slots=True)
class SpanError:
    """A span that is wrong, and how: ``missed``, ``spurious``, ``boundary``, ``merged`` or ``split``."""

    index: int
    kind: str
    gold: tuple[Span, ...]
    pred: tuple[Span, ...]


def find_errors(predictions: Sequence[Prediction]) -> list[SpanError]:
    """Every wrong span, grouped with the spans it overlaps.

    Wrong gold and predicted spans that overlap form a group: one gold with one prediction is ``boundary``, one
    prediction over several gold spans ``merged``, one gold span in several predictions ``split``; a span alone
    is ``missed`` (gold) or ``spurious`` (predicted).
    """
    errors = []
    for prediction in predictions:
        right = set(prediction.gold) & set(prediction.pred)
        gold = [span for span in prediction.gold if span not in right]
        pred = [span for span in prediction.pred if span not in right]
        for group_gold, group_pred in _overlap_groups(gold, pred):
            kind = _error_kind(len(group_gold), len(group_pred))
            errors.append(SpanError(prediction.index, kind, tuple(group_gold), tuple(group_pred)))
    return errors


def _error_kind(gold_count: int, pred_count: int) -> str:
    if pred_count == 0:
        return "missed"
    if gold_count == 0:
        return "spurious"
    if gold_count > 1 and pred_count == 1:
        return "merged"
    if gold_count == 1 and pred_count > 1:
        return "split"
    return "boundary"


def _overlap_groups(gold: list[Span], pred: list[Span]) -> list[tuple[list[Span], list[Span]]]:
    marked = sorted([(span, 0) for span in gold] + [(span, 1) for span in pred])
    groups: list[tuple[list[Span], list[Span]]] = []
    reach = -1
    for span, side in marked:
        if span[0] >= reach:
            groups.append(([], []))
        groups[-1][side].append(span)
        reach = max(reach, span[1])
    return groups


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
