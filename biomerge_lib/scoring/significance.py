"""Knows whether two systems differ by more than chance on the same records: a paired test and an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomerge_lib.decoding.predictions import Prediction, refuse_other_records
from biomerge_lib.scoring.ner_metrics import bootstrap, count_units, f1_of

PERMUTATIONS = 10_000


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems' exact-span micro F1 on the same records; both statistics resample ``units`` (``500 documents``).

    ``low`` and ``high``: 95 % interval of ``difference``, the second F1 less the first, by a bootstrap that draws the
    same units for both. ``p``: two-sided (:func:`randomisation_p`).
    """

    first_f1: float
    second_f1: float
    low: float
    high: float
    p: float
    units: str

    @property
    def difference(self) -> float:
        return self.second_f1 - self.first_f1

    def cells(self) -> dict[str, str]:
        """A table's row about the second system."""
        return {
            "F1": f"{self.second_f1:.4f}",
            "difference": f"{self.difference:+.4f}",
            "its 95 % interval": f"{self.low:+.4f} to {self.high:+.4f}",
            "p": f"{self.p:.4f}" if self.p >= 0.001 else f"{self.p:.1e}",
        }


def compare_predictions(first: Sequence[Prediction], second: Sequence[Prediction]) -> Comparison:
    """Compare two systems' predictions of the same records.

    Raises:
        DataError: they are predictions of other records, or there are none.
    """
    refuse_other_records(first, second, again="Score the same records: the same split, data and eval_limit.")
    documents = [p.document if p.doc_id else q.document for p, q in zip(first, second, strict=True)]
    (unit, mine), (_, its) = (
        count_units([(p.gold, p.pred) for p in side], documents) for side in (first, second)
    )
    both = np.hstack([mine, its])
    low, high = bootstrap(both, lambda sums: f1_of(sums[:, 3:]) - f1_of(sums[:, :3]), samples=2000)
    first_f1, second_f1 = (float(f1_of(counts.sum(axis=0))) for counts in (mine, its))
    p = randomisation_p(mine, its)
    return Comparison(first_f1, second_f1, low, high, p, f"{len(mine):,} {unit}")


def randomisation_p(
    first: np.ndarray, second: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> float:
    """Two-sided p of the difference in F1 by approximate randomisation (Noreen 1989, Yeh 2000).

    ``first`` and ``second`` are the systems' counts of the same units, shape (units, 3). If the systems were alike,
    their answers to a unit could be swapped: p is the share of swaps, the observed one among them, after which the F1s
    differ as much. Units of equal counts change nothing; where the others have no more than ``permutations`` swaps,
    each is tried once and p is exact.
    """
    changes = (second - first)[(first != second).any(axis=1)]
    sums = first.sum(axis=0), second.sum(axis=0)
    observed = abs(f1_of(sums[0]) - f1_of(sums[1])) - 1e-12
    is_exact = 2 ** len(changes) <= permutations
    total = 2 ** len(changes) if is_exact else permutations
    rng = np.random.default_rng(seed)
    as_large = 0
    for begin in range(0, total, 1000):  # a thousand at a time, so that memory stays small
        numbers = np.arange(begin, min(begin + 1000, total))
        swaps = numbers[:, None] >> np.arange(len(changes)) & 1
        if not is_exact:
            swaps = rng.integers(2, size=swaps.shape)
        moved = swaps.astype(float) @ changes
        as_large += int((abs(f1_of(sums[0] + moved) - f1_of(sums[1] - moved)) >= observed).sum())
    return as_large / total if is_exact else (as_large + 1) / (total + 1)
