"""Knows how documents are drawn with a seed; knows nothing of files, tokens or models.

A document's place in the draw is a hash of the seed and its name. So a smaller draw is part of every larger one with
the same seed (0.1 of the data is inside 0.2), and a corpus's draw does not change when another corpus is added.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from biomerge_lib.core.records import Record

DocumentKey = tuple[str, str]  # (dataset, doc_id): an id names a document inside its data set


def document_of(record: Record) -> DocumentKey:
    return record.dataset, record.doc_id


def place_in_draw(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on ``name`` and ``seed`` alone."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def draw_share(documents: Iterable[DocumentKey], share: float, seed: int) -> set[DocumentKey]:
    """That share of each corpus's documents, and at least one document of each corpus."""
    by_dataset = defaultdict(set)
    for document in documents:
        by_dataset[document[0]].add(document)
    chosen: set[DocumentKey] = set()
    for found in by_dataset.values():
        chosen.update(_in_order(found, seed)[: max(1, round(share * len(found)))])
    return chosen


def draw_splits(records: Iterable[Record], shares: Sequence[float], seed: int) -> list[list[Record]]:
    """Records in as many parts as there are shares, by document: no document is in two parts.

    The shares need not add up to one. Every part gets a document, while there are as many.
    """
    records = list(records)
    names = _in_order({document_of(record) for record in records}, seed)
    cuts = [round(len(names) * sum(shares[: index + 1]) / sum(shares)) for index in range(len(shares))]
    for index in range(len(cuts) - 2, -1, -1):
        cuts[index] = min(cuts[index], cuts[index + 1] - 1)
    part_of = {name: bisect_right(cuts, place) for place, name in enumerate(names)}
    parts: list[list[Record]] = [[] for _ in shares]
    for record in records:
        parts[part_of[document_of(record)]].append(record)
    return parts


def draw_sentences(records: Iterable[Record], sentences: int, seed: int) -> set[DocumentKey]:
    """Documents of one corpus that together have at most ``sentences`` records (but at least one document).

    Documents are taken in the order of the draw until the next one no longer fits.
    """
    sizes = Counter(map(document_of, records))
    chosen: set[DocumentKey] = set()
    taken = 0
    for document in _in_order(sizes, seed):
        taken += sizes[document]
        if chosen and taken > sentences:
            break
        chosen.add(document)
    return chosen


def _in_order(documents: Iterable[DocumentKey], seed: int) -> list[DocumentKey]:
    return sorted(documents, key=lambda document: (place_in_draw("\0".join(document), seed), document))
