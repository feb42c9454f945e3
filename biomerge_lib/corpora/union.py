"""Knows how several corpora become one training set that does not contradict itself; knows nothing of files.

    corpora --drop_leaks--> --conflicts--> --deduplicate--> --corpus_weights--> --max_per_corpus--> train

Dev and test stay as their corpora have them, so that scores can be compared with the literature. Only
``drop_leaks="test"`` takes documents out of them, for a test on documents that no other corpus has trained.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from biomerge_lib.core.errors import DataError, ParameterError
from biomerge_lib.core.records import SPLITS, Record
from biomerge_lib.corpora.draws import document_of, draw_sentences
from biomerge_lib.corpora.leakage import (
    Documents,
    Keyed,
    count_conflicts,
    count_shared_documents,
    find_conflicts,
    find_documents,
    find_duplicates,
    find_leaking,
    find_leaks,
    find_trained,
    key_of,
)

SEED = 42
log = logging.getLogger("biomerge")


@dataclass
class Union:
    """The splits of a union, and what was done to them.

    ``steps``: one entry a step, ``{"step": ..., "removed": {corpus: sentences}, "left": {corpus: sentences}}``.
    ``conflicts``: groups of ``(split, record)`` with the same sentence and different gold, as the corpora came.
    ``report``: leaks and conflicts before and after, duplicates (the data card's ``union``).
    """

    splits: dict[str, list[Keyed]]
    steps: list[dict[str, Any]] = field(default_factory=list)
    conflicts: list[list[tuple[str, Keyed]]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def build_union(
    corpora: Mapping[str, Mapping[str, Sequence[Record]]],
    *,
    drop_leaks: str = "none",
    deduplicate: bool = False,
    conflicts: str = "keep",
    corpus_weights: Sequence[float] = (),
    max_per_corpus: int | None = None,
    seed: int = SEED,
) -> Union:
    """Merge corpora in the order of their priority. Without options nothing is removed.

    Args:
        corpora: data set name -> split -> records; the first corpus wins a conflict.
        drop_leaks: ``train`` takes sentences of any dev or test set out of train, ``documents`` also what is left of
            their documents; ``test`` takes documents that stand in another corpus's train out of dev and test.
        deduplicate: keep a training sentence with the same gold once.
        conflicts: ``first`` keeps, of one training sentence with different gold, what the first corpus says.
        corpus_weights: the corpora's proportions in train, as large as the corpora allow; no sentence is repeated.
        max_per_corpus: draw documents up to so many training sentences of each corpus.

    Raises:
        DataError: nothing is left of a split, or corpora are weighted and one has no training sentence left.
    """
    splits: dict[str, list[Keyed]] = {split: [] for split in SPLITS}
    for (name, corpus), split in product(corpora.items(), SPLITS):
        splits[split] += [key_of(record, name) for record in corpus[split]]
    union = Union(splits)
    union.report["duplicates"] = {split: find_duplicates(records) for split, records in union.splits.items()}
    documents = _describe(union, "before")
    _note(union, "corpora as they are")
    find = {"documents": find_leaking, "test": find_trained}.get(drop_leaks)
    leaving = find(documents) if find else []
    union.report["documents"]["dropped"] = Counter(place for place, _ in leaving)
    gone = {id(item) for document in leaving for item in documents[document].items}
    for split, items in union.splits.items():
        union.splits[split] = [item for item in items if id(item) not in gone]
    if drop_leaks in ("train", "documents"):
        evaluated = {item.sentence for split in ("dev", "test") for item in union.splits[split]}
        _keep(union, "drop_leaks", lambda item: item.sentence not in evaluated)
    if conflicts == "first":
        gold: dict[bytes, bytes] = {}
        is_first = lambda item: gold.setdefault(item.sentence, item.annotated) == item.annotated  # noqa: E731
        _keep(union, "conflicts", is_first)
    if deduplicate:
        first: dict[bytes, Keyed] = {}
        _keep(union, "deduplicate", lambda item: first.setdefault(item.annotated, item) is item)
    if corpus_weights:
        targets = _weighted_sizes(_counts(union.splits["train"]), list(corpora), corpus_weights)
        _draw(union, "corpus_weights", targets, seed)
    if max_per_corpus:
        _draw(union, "max_per_corpus", dict.fromkeys(corpora, max_per_corpus), seed)
    left = _counts(union.splits["train"])
    for dataset, corpus in corpora.items():
        if corpus["train"] and not left[dataset]:
            log.warning(
                "%s: no training sentence is left (see the steps). Put it before the corpora that it shares "
                "sentences with, or set conflicts=keep and train with corpus_cue=true.",
                dataset,
            )
    removed = ", ".join(f"{step['step']} {sum(step['removed'].values()):,}" for step in union.steps[1:])
    for split, items in union.splits.items():
        if not items and any(corpus[split] for corpus in corpora.values()):
            raise DataError(
                f"nothing is left of {split} (training sentences taken out: {removed or 'none'}). "
                f"drop_leaks={drop_leaks} takes out what also stands in another split: set drop_leaks=none, or "
                "check that the splits' files differ."
            )
    leaking = find_leaking(_describe(union, "after"))
    if leaking and drop_leaks == "train":
        counts = Counter(place for place, _ in leaking)
        listed = ", ".join(f"{place} {count}" for place, count in counts.items())
        log.warning("documents are in part both trained and scored (%s): drop_leaks=documents.", listed)
    union.report["steps"] = union.steps
    return union


def _describe(union: Union, when: str) -> Documents:
    """Report leaks, shared documents and conflicts; return the documents."""
    documents = find_documents(union.splits)
    shared = count_shared_documents(documents).items()
    everywhere = find_conflicts(union.splits)
    own = [item for group in everywhere for split, item in group if split == "train"]
    found = {
        "leaks": find_leaks(union.splits, documents),
        "documents": [{"of": place, "in": other, "documents": count} for (place, other), count in shared],
        "conflicts": {
            "train": count_conflicts(find_conflicts({"train": own})),
            "all splits": count_conflicts(everywhere),
        },
    }
    for name, value in found.items():
        union.report.setdefault(name, {})[when] = value
    union.conflicts = union.conflicts or everywhere
    return documents


def _weighted_sizes(
    sizes: Mapping[str, int], corpora: Sequence[str], weights: Sequence[float]
) -> dict[str, int]:
    """Sentences to draw of each corpus, so that they are to each other as the weights and none is repeated."""
    if len(weights) != len(corpora):
        said = f"{len(weights)} values for {len(corpora)} corpora"
        raise ParameterError(f"corpus_weights has {said}: one each.")
    if empty := [name for name in corpora if not sizes[name]]:
        raise DataError(f"corpus_weights: no training sentence of {', '.join(empty)} is left to weigh.")
    unit = min(sizes[name] / weight for name, weight in zip(corpora, weights, strict=True))
    return {name: max(1, round(unit * weight)) for name, weight in zip(corpora, weights, strict=True)}


def _draw(union: Union, step: str, targets: Mapping[str, int], seed: int) -> None:
    drawn = {}
    for corpus, sentences in targets.items():
        records = [item.record for item in union.splits["train"] if item.corpus == corpus]
        drawn[corpus] = draw_sentences(records, sentences, seed)
    _keep(union, step, lambda item: document_of(item.record) in drawn[item.corpus])


def _keep(union: Union, step: str, keep: Callable[[Keyed], bool]) -> None:
    union.splits["train"] = [item for item in union.splits["train"] if keep(item)]
    _note(union, step)


def _note(union: Union, step: str) -> None:
    left = _counts(union.splits["train"])
    before = union.steps[-1]["left"] if union.steps else left
    removed = {dataset: count - left[dataset] for dataset, count in before.items()}
    union.steps.append({"step": step, "removed": removed, "left": {name: left[name] for name in before}})


def _counts(items: Sequence[Keyed]) -> Counter[str]:
    return Counter(item.corpus for item in items)
