"""Knows the project's own records as a corpus: they come back as they are, with their own data set."""

from __future__ import annotations

from collections.abc import Iterator

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record, iter_records
from biomerge_lib.corpora.documents import ReadCounts
from biomerge_lib.corpora.formats import Format, Reading, Source


def _read(source: Source, split: str, how: Reading, counts: ReadCounts) -> Iterator[Record]:
    if how.types:
        raise DataError(f"{source.location}: the project's JSONL has no entity types to filter by.")
    for path in source.files[split]:
        for record in iter_records(path):
            counts.sentences += 1
            counts.annotated += len(record.spans)
            counts.spans += len(record.spans)
            yield record


JSONL = Format((".jsonl",), _read)
