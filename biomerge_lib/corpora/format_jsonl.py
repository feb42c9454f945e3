"""Knows the project's own records as a corpus: they come back as they are, with their own data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record, iter_records
from biomerge_lib.corpora.documents import ReadCounts
from biomerge_lib.corpora.formats import Format, Reading, Source


def _read(source: Source, split: str, how: Reading, counts: ReadCounts) -> Iterator[Record]:
    for path in source.files[split]:
        for record in iter_records(path):
            counts.sentences += 1
            counts.annotated += len(record.spans)
            counts.types.update(record.types)
            if how.types and record.spans:
                if not record.types:
                    where = f"{path}: document {record.doc_id}"
                    raise DataError(f"{where} has no entity types to filter by (key types of its records).")
                kept = [pair for pair in zip(record.spans, record.types, strict=True) if pair[1] in how.types]
                counts.other_types += len(record.spans) - len(kept)
                spans, types = zip(*kept, strict=True) if kept else ((), ())
                record = replace(record, spans=spans, types=types)
            counts.spans += len(record.spans)
            yield record


JSONL = Format((".jsonl",), _read)
