"""Knows how corpora become one data set: the three JSONL files and their data card. Knows nothing of formats.

corpora --[readers]--> records --[write_corpus]--> {train,dev,test}.jsonl + data_card.json
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from biomerge_lib.errors import DataError
from biomerge_lib.readers import SAMPLE, SAMPLE_DIR, find_splits, read_corpus
from biomerge_lib.records import SPLITS, Record, file_sha256, write_records
from biomerge_lib.runs import write_json


def write_corpus(sources: Sequence[str], data_dir: Path | str) -> dict[str, Any]:
    """Convert corpora to ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``; return (and write) the data card.

    Raises:
        DataError: no source is named, or one cannot be read; then nothing is written.
    """
    if not sources:
        raise DataError(
            "no corpus named: set corpora=[folder, ...], or corpora=[sample] for the bundled one."
        )
    corpora = [(source, read_corpus(source)) for source in sources]
    data_dir = Path(data_dir)
    card: dict[str, Any] = {"sources": {}, "splits": {}}
    for source, splits in corpora:
        folder = SAMPLE_DIR if source == SAMPLE else Path(source).expanduser()
        dataset = splits["train"][0].dataset
        if dataset in card["sources"]:
            raise DataError(f"two corpora are called {dataset!r}; rename one of the folders.")
        files = {path.name: file_sha256(path) for path in find_splits(folder).values()}
        card["sources"][dataset] = {
            "files": files,
            "splits": {split: describe_records(records) for split, records in splits.items()},
        }
    for split in SPLITS:
        records = [record for _, splits in corpora for record in splits[split]]
        path = data_dir / f"{split}.jsonl"
        write_records(path, records)
        card["splits"][split] = describe_records(records) | {"file": path.name, "sha256": file_sha256(path)}
    write_json(data_dir / "data_card.json", card)
    return card


def describe_records(records: Iterable[Record]) -> dict[str, Any]:
    """Counts of a split: documents, sentences, spans, empty sentences, lengths in words and characters."""
    records = list(records)
    spans = [len(record.spans) for record in records]
    words = [len(record.text.split()) for record in records]
    return {
        "documents": len({(record.dataset, record.doc_id) for record in records}),
        "sentences": len(records),
        "spans": sum(spans),
        "empty_share": round(spans.count(0) / max(len(records), 1), 4),
        "spans_per_sentence_max": max(spans, default=0),
        "words_mean": round(statistics.fmean(words), 2) if words else 0,
        "words_max": max(words, default=0),
        "characters": sum(len(record.text) for record in records),
    }


def unseen_share(train: Iterable[Record], other: Iterable[Record]) -> float:
    """Share of ``other``'s mentions whose text is no mention of ``train`` (compared in lower case)."""
    seen = {record.text[start:end].lower() for record in train for start, end in record.spans}
    mentions = [record.text[start:end].lower() for record in other for start, end in record.spans]
    return sum(mention not in seen for mention in mentions) / max(len(mentions), 1)


def data_card_table(card: Mapping[str, Any]):
    """The data card's counts as a table: one row a source and split."""
    import pandas as pd

    rows = [
        {"dataset": dataset, "split": split, **counts}
        for dataset, source in card["sources"].items()
        for split, counts in source["splits"].items()
    ]
    return pd.DataFrame(rows).set_index(["dataset", "split"])
