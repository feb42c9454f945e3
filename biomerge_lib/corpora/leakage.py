"""Knows when sentences and documents are the same: leaks, duplicates and conflicts. Knows nothing of files.

Two sentences are the same when they are equal after NFKC normalisation, case folding and removal of all white space,
so that a tokenised corpus and its untokenised original can be compared. A document stands in another corpus when half
of what lies between its punctuation marks does: then neither document ids nor the ends of sentences need to agree. (Of
BioRED's 600 abstracts the 204 in BC5CDR, by their PubMed ids, share all of it with BC5CDR, the others at most a tenth.)
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record
from biomerge_lib.corpora.draws import DocumentKey, document_of

LEAK_DIRECTIONS = (("train", "dev"), ("train", "test"), ("dev", "test"))
# "Results :" stands in many papers; a shared sentence of so few words says little.
SHORT_WORDS = 5
_PIECE = re.compile(r"\w{15,}")  # of a normalised text: some three words between punctuation marks


@dataclass(frozen=True, slots=True)
class Keyed:
    """A record with its sentence's key, its sentence's and gold's key together, and the ``corpus`` it was read from.

    That is not its data set's name where a corpus is one that was merged before.
    """

    record: Record
    sentence: bytes
    annotated: bytes
    corpus: str = ""


Splits = Mapping[str, Sequence[Keyed]]
Place = str  # data set and split: "bc5cdr train"
DocumentAt = tuple[Place, str]  # with its doc_id; a sentence is one where a corpus has no documents


@dataclass(slots=True)
class Traced:
    """A document's sentences, their ``pieces`` (hashes of this process), and the other places where it stands."""

    items: list[Keyed]
    pieces: array[int]
    copies: set[Place] = field(default_factory=set)

    def is_made_of(self, found: int) -> bool:
        """Whether so many of its pieces are enough to know it: half of a document's, all of a lone sentence's."""
        return 0 < len(self.pieces) <= found * min(len(self.items), 2)


Documents = Mapping[DocumentAt, Traced]


def normalise(text: str) -> str:
    """The text that is compared.

    >>> normalise("IL-2 Rα ")
    'il-2rα'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return "".join(text.casefold().split())


def key_of(record: Record, corpus: str = "") -> Keyed:
    """The record with its keys: digests of 16 bytes, so that those of millions of sentences fit into memory.

    The gold's offsets are counted in the normalised text, so that they are equal for equal annotations of the same
    sentence.
    """
    text = record.text
    sentence = normalise(text)
    # Much faster, where nothing but single spaces went.
    if text.isascii() and len(sentence) + text.count(" ") == len(text):
        gold = [(a - text.count(" ", 0, a), b - text.count(" ", 0, b)) for a, b in record.spans]
    else:
        gold = [(len(normalise(text[:start])), len(normalise(text[:end]))) for start, end in record.spans]
    key = _digest(sentence.encode())
    return Keyed(record, key, _digest(key + str(gold).encode()), corpus)


def check_documents(splits: Mapping[str, Iterable[Record]]) -> None:
    """Raise DataError if a document stands in two splits: splits are by document."""
    home: dict[DocumentKey, str] = {}
    for split, records in splits.items():
        for dataset, doc_id in set(map(document_of, records)):
            if (other := home.setdefault((dataset, doc_id), split)) != split:
                both = f"document {doc_id!r} stands in {other} and in {split}"
                raise DataError(f"{dataset}: {both}; a document belongs to one split.")


def find_documents(splits: Splits) -> Documents:
    """The documents of each data set's splits, and where else they stand."""
    grouped: defaultdict[DocumentAt, list[Keyed]] = defaultdict(list)
    for split, items in splits.items():
        for item in items:
            grouped[f"{item.record.dataset} {split}", item.record.doc_id].append(item)
    documents: dict[DocumentAt, Traced] = {}
    holders: dict[int, tuple[Place, ...]] = {}
    for at, items in grouped.items():
        found = (_PIECE.findall(normalise(item.record.text)) for item in items)
        pieces = array("q", map(hash, chain.from_iterable(found)))
        documents[at] = Traced(items, pieces)
        here = at[:1]
        for piece in pieces:
            held = holders.setdefault(piece, here)
            if held is not here and at[0] not in held:
                holders[piece] = held + here
    for (place, _), document in documents.items():
        counts = Counter(other for piece in document.pieces for other in holders[piece] if other != place)
        document.copies = {other for other, count in counts.items() if document.is_made_of(count)}
    return documents


def count_shared_documents(documents: Documents) -> Counter[tuple[Place, Place]]:
    """How many documents of several sentences of one place also stand in another."""
    several = ((place, document) for (place, _), document in documents.items() if len(document.items) > 1)
    return Counter((place, other) for place, document in several for other in document.copies)


def find_leaking(documents: Documents) -> list[DocumentAt]:
    """The documents of train (sentences, where it has none) that are made of scored ones that stand in train."""
    scored: set[int] = set()
    for (place, _), document in documents.items():
        if not place.endswith(" train") and any(other.endswith(" train") for other in document.copies):
            scored.update(document.pieces)
    return [
        (place, doc_id)
        for (place, doc_id), document in documents.items()
        if place.endswith(" train") and document.is_made_of(sum(map(scored.__contains__, document.pieces)))
    ]


def find_trained(documents: Documents) -> list[DocumentAt]:
    """The documents of dev and test that also stand in the train of another corpus (short sentences stay)."""
    return [
        (place, doc_id)
        for (place, doc_id), document in documents.items()
        if not place.endswith(" train")
        and (len(document.items) > 1 or len(document.items[0].record.text.split()) >= SHORT_WORDS)
        and any(other.endswith(" train") for other in document.copies - {f"{place.rpartition(' ')[0]} train"})
    ]


def find_leaks(splits: Splits, documents: Documents | None = None) -> list[dict[str, Any]]:
    """What each corpus's train shares with each corpus's dev and test (and dev with test), where it shares anything.

    One row a pair: ``sentences`` of the second that also stand in the first, ``verbatim`` of them to the character,
    ``short`` of them with under five words, ``documents`` (of several sentences) of the second, or of the first where
    the second knows sentences alone; and ``source_sentences``, how many of the first would have to go.
    """
    copied = count_shared_documents(find_documents(splits) if documents is None else documents)
    places = _by_place(splits)
    rows = []
    for first, second in LEAK_DIRECTIONS:
        for source in [place for place in places if place.endswith(f" {first}")]:
            counts = Counter(item.sentence for item in places[source])
            texts = {item.record.text for item in places[source]}
            for target in [place for place in places if place.endswith(f" {second}")]:
                shared = [item for item in places[target] if item.sentence in counts]
                row = {
                    "from": source,
                    "into": target,
                    "sentences": len(shared),
                    "verbatim": sum(item.record.text in texts for item in shared),
                    "short": sum(len(item.record.text.split()) < SHORT_WORDS for item in shared),
                    "documents": copied[target, source] or copied[source, target],
                    "source_sentences": sum(counts[key] for key in {item.sentence for item in shared}),
                }
                rows += [row] if shared else []
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
    every = [(split, item) for split, items in splits.items() for item in items]
    gold: dict[bytes, bytes] = {}
    differing = {i.sentence for _, i in every if gold.setdefault(i.sentence, i.annotated) != i.annotated}
    groups: defaultdict[bytes, list[tuple[str, Keyed]]] = defaultdict(list)
    for split, item in every:
        if item.sentence in differing:
            groups[item.sentence].append((split, item))
    return list(groups.values())


def count_conflicts(conflicts: Sequence[Sequence[tuple[str, Keyed]]]) -> dict[str, Any]:
    """``groups`` with different gold: ``within`` one corpus, ``across`` corpora; and by ``pairs`` of corpora."""
    pairs: Counter[str] = Counter()
    within = across = 0
    for group in conflicts:
        golds = defaultdict(set)
        for _, item in group:
            golds[item.record.dataset].add(item.annotated)
        within += any(len(found) > 1 for found in golds.values())
        differing = [(a, b) for a, b in combinations(sorted(golds), 2) if golds[a] != golds[b]]
        across += bool(differing)
        pairs.update(f"{a} / {b}" for a, b in differing)
    return {"groups": len(conflicts), "within": within, "across": across, "pairs": dict(pairs)}


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _by_place(splits: Splits) -> dict[Place, list[Keyed]]:
    found = defaultdict(list)
    for split, items in splits.items():
        for item in items:
            found[f"{item.record.dataset} {split}"].append(item)
    return found
