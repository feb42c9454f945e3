"""Knows how a corpus becomes records and what every reader must refuse; knows nothing of prompts or models.

source --[sources]--> files of each split --[readers_*]--> documents --[documents, sentences]--> records

``sources`` says how a corpus is spelled and found, ``documents`` what is done with mentions, ``sentences`` how
documents are cut, ``readers_iob``, ``readers_standoff`` and ``readers_hub`` what each format is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from biomerge_lib.core.errors import DataError, ParameterError, nearest
from biomerge_lib.core.records import SPLITS, Record, iter_records
from biomerge_lib.corpora.documents import DISCONTINUOUS, Document, ReadCounts, read_spans
from biomerge_lib.corpora.readers_hub import read_hub
from biomerge_lib.corpora.readers_iob import Column, read_iob
from biomerge_lib.corpora.readers_standoff import read_bioc, read_brat, read_pubtator
from biomerge_lib.corpora.sentences import SPLITTERS, split_document
from biomerge_lib.corpora.sources import SAMPLE, SAMPLE_DIR, Source, find_source, find_splits, split_of

__all__ = [
    "SAMPLE",
    "SAMPLE_DIR",
    "Corpus",
    "Source",
    "find_source",
    "find_splits",
    "read_corpus",
    "read_iob",
    "read_split",
]


class Corpus(dict[str, list[Record]]):
    """The records of each split, with the ``source`` that they came from and each split's ``counts``."""

    def __init__(self, source: Source, records: Mapping[str, list[Record]], counts: Mapping[str, ReadCounts]):
        super().__init__(records)
        self.source = source
        self.counts = dict(counts)

    @property
    def types(self) -> Counter[str]:
        """The entity types in the files and how many mentions each has (before a filter)."""
        return sum((counts.types for counts in self.counts.values()), Counter())


def read_corpus(
    source: str | Path,
    *,
    types: Collection[str] | None = None,
    splits: Sequence[str] = SPLITS,
    dataset: str | None = None,
    sentence_split: str = "segtok",
    discontinuous: str = "skip",
    token_column: Column = None,
    tag_column: Column = None,
) -> Corpus:
    """Read a corpus: a folder, ``format:folder``, ``hub:owner/name``, or ``sample`` for the bundled one.

    Args:
        types: the entity types to keep; None or nothing keeps all. A sentence without any stays, as a negative one.
        splits: the splits to read, each of which must be there.
        dataset: the records' data set; without it the folder's name less its format (``anatem_brat``: anatem). The
            project's JSONL keeps its own.
        sentence_split: how documents become sentences: ``segtok``, ``lines`` or ``document`` (no cut).
        discontinuous: ``skip`` or ``cover`` mentions of several parts.
        token_column, tag_column: where ``iob`` (number from 0, or name in the first line) and ``hub`` (name) have
            tokens and tags; None finds them, or refuses.

    Raises:
        DataError: a split is missing or has two candidates, a file is malformed (named as ``file:line``), a document
            is in two splits, a type is in none, or nothing is annotated.
        ParameterError: an unknown ``sentence_split`` or ``discontinuous``.
    """
    types = [types] if isinstance(types, str) else types
    found = find_source(source, splits=splits, dataset=dataset)
    records: dict[str, list[Record]] = {}
    counts = {split: ReadCounts() for split in splits}
    split_of_document: dict[tuple[str, str], str] = {}
    for split in splits:
        records[split] = list(
            read_split(
                found,
                split,
                types=types,
                sentence_split=sentence_split,
                discontinuous=discontinuous,
                token_column=token_column,
                tag_column=tag_column,
                counts=counts[split],
            )
        )
        for document in dict.fromkeys((record.dataset, record.doc_id) for record in records[split]):
            other = split_of_document.setdefault(document, split)
            if other != split:
                raise DataError(
                    f"{found.location}: document {document[1]!r} is in {other} and in {split}; "
                    "a document belongs to one split (rename or remove one)."
                )
    corpus = Corpus(found, records, counts)
    for name in types or ():
        if name not in corpus.types:
            raise DataError(
                f"{found.location}: no mention has type {name!r}.{nearest(name, corpus.types)} "
                f"Types: {', '.join(sorted(corpus.types))}."
            )
    if not any(split_counts.spans for split_counts in counts.values()):
        raise DataError(f"{found.location}: no entity in {', '.join(splits)}; is this an annotated corpus?")
    return corpus


def read_split(
    source: Source,
    split: str,
    *,
    types: Collection[str] | None = None,
    sentence_split: str = "segtok",
    discontinuous: str = "skip",
    token_column: Column = None,
    tag_column: Column = None,
    counts: ReadCounts,
) -> Iterator[Record]:
    """Read one split record by record, counting into ``counts`` (memory holds one document and all their names).

    Raises:
        DataError: as :func:`read_corpus`, for what one split can show.
        ParameterError: an unknown ``sentence_split`` or ``discontinuous``.
    """
    for name, value, valid in (
        ("sentence_split", sentence_split, tuple(SPLITTERS)),
        ("discontinuous", discontinuous, DISCONTINUOUS),
    ):
        if value not in valid:
            raise ParameterError(
                f"{name} must be one of {', '.join(valid)}, not {value!r}.{nearest(value, valid)}"
            )
    wanted = frozenset(types) if types else None
    columns = {"token_column": token_column, "tag_column": tag_column}
    if source.format == "iob":
        yield from _iter_iob(source, split, wanted, counts, columns)
    elif source.format == "jsonl":
        yield from _iter_jsonl(source, split, wanted, counts)
    else:
        doc_ids: set[str] = set()
        for item in _iter_items(source, split, wanted, counts, columns):
            if isinstance(item, Record):
                doc_ids.add(item.doc_id)
                yield item
            elif item.text.strip() or item.mentions:
                doc_ids.add(item.doc_id)
                spans = read_spans(item, types=wanted, discontinuous=discontinuous, counts=counts)
                yield from split_document(
                    item, spans, dataset=source.name, sentence_split=sentence_split, counts=counts
                )
            else:
                counts.empty_documents += 1
        counts.documents += len(doc_ids)
    if not counts.sentences:
        raise DataError(f"{source.location}: {split} has no text.")


def _iter_iob(
    source: Source,
    split: str,
    types: Collection[str] | None,
    counts: ReadCounts,
    columns: Mapping[str, Column],
) -> Iterator[Record]:
    paths = source.files[split]
    for path in paths:
        # Files of a split's folder may have the same names in all folders: documents without an id need the split's.
        tells_split = len(paths) == 1 and split_of(path.name) == split
        prefix = None if tells_split else f"{source.name}_{split}_{path.stem}"
        yield from read_iob(
            path, dataset=source.name, types=types, doc_prefix=prefix, counts=counts, **columns
        )


def _iter_jsonl(
    source: Source, split: str, types: Collection[str] | None, counts: ReadCounts
) -> Iterator[Record]:
    if types:
        raise DataError(f"{source.location}: the project's JSONL has no entity types to filter by.")
    documents = set()
    for path in source.files[split]:
        for record in iter_records(path):
            documents.add((record.dataset, record.doc_id))
            counts.sentences += 1
            counts.annotated += len(record.spans)
            counts.spans += len(record.spans)
            yield record
    counts.documents += len(documents)


def _iter_items(
    source: Source,
    split: str,
    types: Collection[str] | None,
    counts: ReadCounts,
    columns: Mapping[str, Column],
) -> Iterator[Record | Document]:
    if source.format == "hub":
        where = f"hub:{source.location} {split}"
        stream = source.streams[split]
        options: dict[str, Any] = {"dataset": source.name, "split": split, **columns}
        yield from read_hub(stream, where=where, types=types, counts=counts, **options)
    elif source.format == "brat":
        yield from read_brat(source.files[split], counts)
    else:
        read = read_bioc if source.format == "bioc" else read_pubtator
        for path in source.files[split]:
            yield from read(path, counts)
