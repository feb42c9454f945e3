"""Knows the project's own records as a corpus: they come back as they are, with their own data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record, iter_records
from biomerge_lib.corpora.documents import ReadCounts
from biomerge_lib.corpora.formats import Format, Reading, Source, json_keys


def _read(source: Source, split: str, how: Reading, counts: ReadCounts) -> Iterator[Record]:
    if how.types:
        raise DataError(f"{source.location}: records are not filtered by entity_types; name their corpora.")
    for path in source.files[split]:
        for record in iter_records(path):
            counts.sentences += 1
            counts.annotated += len(record.spans)
            counts.spans += len(record.spans)
            counts.types.update(record.types)
            yield record


def _has(path: Path) -> bool:
    return not json_keys(path) or "input" in json_keys(path)


JSONL = Format((".jsonl",), _read, _has)
