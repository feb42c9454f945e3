"""Knows how a corpus becomes records and what every reader must refuse; knows nothing of prompts or models.

source --[sources]--> files of each split --[format_*]--> documents --[documents, sentences]--> records

``sources`` says how a corpus is spelled and found and which formats there are, ``format_*`` how each is read,
``tags`` and ``documents`` what is done with tags and mentions, ``sentences`` how documents are cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from biomerge_lib.core.errors import DataError, ParameterError, nearest
from biomerge_lib.core.records import SPLITS, Record
from biomerge_lib.corpora.documents import BAD_MENTIONS, DISCONTINUOUS, ReadCounts, read_spans
from biomerge_lib.corpora.draws import document_of
from biomerge_lib.corpora.formats import Reading, Source
from biomerge_lib.corpora.leakage import check_documents
from biomerge_lib.corpora.sentences import SPLITTERS, split_document
from biomerge_lib.corpora.sources import FORMATS, find_source


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
    optional: Collection[str] = (),
    may_lack_types: bool = False,
    **options: Any,
) -> Corpus:
    """Read a corpus: a folder, ``format:folder``, ``hub:owner/name``, or ``sample`` for the bundled one.

    The records' data set is the folder's name less its format (``anatem_brat``: anatem); JSONL keeps its own.

    Args:
        types: the entity types to keep; None or nothing keeps all. A sentence without any stays, as a negative one.
        splits: the splits to read, each of which must be there but for the ``optional`` ones.
        may_lack_types: that the corpus has one of the types is enough.
        options: the other fields of :class:`~biomerge_lib.corpora.formats.Reading`.

    Raises:
        DataError: a split is missing or has two candidates, a file is malformed (named as ``file:line``), a document
            is in two splits, a type is in none, or nothing is annotated.
        ParameterError: an unknown ``sentence_split``, ``discontinuous`` or ``bad_mentions``.
    """
    types = [types] if isinstance(types, str) else types
    how = Reading(types=frozenset(types) if types else None, **options)
    valid_values = {"sentence_split": SPLITTERS, "discontinuous": DISCONTINUOUS, "bad_mentions": BAD_MENTIONS}
    for name, valid in valid_values.items():
        if (value := getattr(how, name)) not in valid:
            near = nearest(value, valid)
            raise ParameterError(f"{name} must be one of {', '.join(valid)}, not {value!r}.{near}")
    found = find_source(source, splits=splits, optional=optional)
    splits = [split for split in splits if split in (found.streams or found.files)]
    counts = {split: ReadCounts() for split in splits}
    records = {split: list(iter_source(found, split, how, counts[split])) for split in splits}
    check_documents(records)
    corpus = Corpus(found, records, counts)
    if not (may_lack_types and set(types or ()) & set(corpus.types)):
        refuse_unknown(types or (), corpus.types, found.location)
    if not any(split_counts.annotated for split_counts in counts.values()):
        raise DataError(f"{found.location}: no entity in {', '.join(splits)}; is this an annotated corpus?")
    return corpus


def refuse_unknown(types: Collection[str], known: Collection[str], where: str) -> None:
    """Raise DataError if a type is not among the known ones."""
    for name in sorted(set(types) - set(known)):
        problem = f"no mention has type {name!r}.{nearest(name, known)}"
        raise DataError(f"{where}: {problem} Types: {', '.join(sorted(known))}.")


def iter_source(source: Source, split: str, how: Reading, counts: ReadCounts) -> Iterator[Record]:
    """Read one split record by record, counting into ``counts`` (memory holds one file and the documents' names).

    Raises:
        DataError: as :func:`read_corpus`, for what one split can show.
    """
    documents = set()
    reading: dict[str, Any] = {
        name: getattr(how, name) for name in ("types", "discontinuous", "bad_mentions")
    }
    cutting: dict[str, Any] = {"dataset": source.name, "sentence_split": how.sentence_split}
    for item in FORMATS[source.format].read(source, split, how, counts):
        records: Iterable[Record] = ()
        if isinstance(item, Record):
            records = [item]
        elif item.text.strip() or item.mentions:
            spans = read_spans(item, counts=counts, **reading)
            records = split_document(item, spans, counts=counts, **cutting)
        else:
            counts.empty_documents += 1
        for record in records:
            documents.add(document_of(record))
            yield record
    counts.documents = len(documents)
    if not counts.sentences:
        raise DataError(f"{source.location}: {split} has no text.")
