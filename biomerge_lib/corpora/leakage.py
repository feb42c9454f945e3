"""Knows when two sentences are the same: leaks between splits, duplicates and conflicts. Knows nothing of files.

Two sentences are the same when they are equal after NFKC normalisation, case folding and removal of all white space,
so that a tokenised corpus and its untokenised original can be compared.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record
from biomerge_lib.corpora.draws import DocumentKey, document_of

LEAK_DIRECTIONS = (("train", "dev"), ("train", "test"), ("dev", "test"))
# "Results :" stands in many papers; a shared sentence of so few words says little.
SHORT_WORDS = 5


@dataclass(frozen=True, slots=True)
class Keyed:
    """A record with its sentence's key, and its sentence's and gold's key together."""

    record: Record
    sentence: bytes
    annotated: bytes


Splits = Mapping[str, Sequence[Keyed]]


def normalise(text: str) -> str:
    """The text that is compared.

    >>> normalise("IL-2 Rα ")
    'il-2rα'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return "".join(text.casefold().split())


def key_of(record: Record) -> Keyed:
    """The record with its keys: digests of 16 bytes, so that those of millions of sentences fit into memory.

    The gold's offsets are counted in the normalised text, so that they are equal for equal annotations of the same
    sentence.
    """
    text = record.text
    sentence = normalise(text)
    gold = [(len(normalise(text[:start])), len(normalise(text[:end]))) for start, end in record.spans]
    return Keyed(record, _digest(sentence), _digest(f"{sentence}\0{gold}"))


def check_documents(splits: Mapping[str, Iterable[Record]]) -> None:
    """Raise DataError if a document stands in two splits: splits are by document."""
    home: dict[DocumentKey, str] = {}
    for split, records in splits.items():
        for document in {document_of(record) for record in records}:
            other = home.setdefault(document, split)
            if other != split:
                dataset, doc_id = document
                raise DataError(
                    f"{dataset}: document {doc_id!r} stands in {other} and in {split}; a document belongs to one split."
                )


def find_leaks(splits: Splits) -> list[dict[str, Any]]:
    """What each corpus's train shares with each corpus's dev and test (and dev with test), where it shares anything.

    One row a pair: ``sentences`` of the second that also stand in the first, ``verbatim`` of them to the character,
    ``short`` of them with under five words, whole ``documents`` (of several sentences) of the second; and
    ``source_sentences``, how many of the first would have to go.
    """
    datasets = {split: _by_dataset(items) for split, items in splits.items()}
    rows = []
    for first, second in LEAK_DIRECTIONS:
        for source, theirs in datasets.get(first, {}).items():
            counts = Counter(item.sentence for item in theirs)
            texts = {item.record.text for item in theirs}
            for target, ours in datasets.get(second, {}).items():
                shared = [item for item in ours if item.sentence in counts]
                if shared:
                    rows.append(
                        {
                            "from": f"{source} {first}",
                            "into": f"{target} {second}",
                            "sentences": len(shared),
                            "verbatim": sum(item.record.text in texts for item in shared),
                            "short": sum(len(item.record.text.split()) < SHORT_WORDS for item in shared),
                            "documents": _whole_documents(shared, ours),
                            "source_sentences": sum(
                                counts[key] for key in {item.sentence for item in shared}
                            ),
                        }
                    )
    return rows


def find_duplicates(items: Iterable[Keyed]) -> dict[str, int]:
    """How many records of each corpus repeat an earlier record of the list: the same sentence, the same gold."""
    seen: set[bytes] = set()
    repeated: Counter[str] = Counter()
    for item in items:
        repeated[item.record.dataset] += item.annotated in seen
        seen.add(item.annotated)
    return dict(repeated)


def find_conflicts(splits: Splits) -> list[list[tuple[str, Keyed]]]:
    """Groups of ``(split, record)`` that are the same sentence with different gold, in the order of appearance."""
    groups: defaultdict[bytes, list[tuple[str, Keyed]]] = defaultdict(list)
    for split, items in splits.items():
        for item in items:
            groups[item.sentence].append((split, item))
    return [group for group in groups.values() if len({item.annotated for _, item in group}) > 1]


def count_conflicts(conflicts: Sequence[Sequence[tuple[str, Keyed]]]) -> dict[str, Any]:
    """``groups`` with different gold: ``within`` one corpus, ``across`` corpora; and by ``pairs`` of corpora."""
    pairs: Counter[str] = Counter()
    within = across = 0
    for group in conflicts:
        golds = defaultdict(set)
        for _, item in group:
            golds[item.record.dataset].add(item.annotated)
        within += any(len(found) > 1 for found in golds.values())
        names = sorted(golds)
        differing = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if golds[a] != golds[b]]
        across += bool(differing)
        pairs.update(f"{a} / {b}" for a, b in differing)
    return {"groups": len(conflicts), "within": within, "across": across, "pairs": dict(pairs)}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _by_dataset(items: Iterable[Keyed]) -> dict[str, list[Keyed]]:
    found = defaultdict(list)
    for item in items:
        found[item.record.dataset].append(item)
    return dict(found)


def _whole_documents(shared: Iterable[Keyed], every: Iterable[Keyed]) -> int:
    sizes = Counter(item.record.doc_id for item in every)
    found = Counter(item.record.doc_id for item in shared)
    return sum(1 < size == found[doc_id] for doc_id, size in sizes.items())
