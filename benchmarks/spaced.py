"""Sets a corpus's punctuation apart, as `predict` does with its texts: the splits of a data folder, in another one.

    python -m benchmarks.spaced data/bc5cdr_original/ner data/bc5cdr_spaced/ner

In untokenised text a third of BC5CDR's mentions end inside a word ("clonidine."), where no anchor stands. Each span of
the new text is one of the old text (`map_back` in apply/tagger), so that scores are those of the original offsets.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from biomerge_lib.apply.tagger import find_pieces
from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import SPLITS, Record, read_records, write_records


def space(record: Record) -> Record:
    """The record with single spaces between words and signs of punctuation.

    Raises:
        DataError: a span begins or ends with white space.
    """
    pieces = find_pieces(record.text, spaced=True)
    places: dict[int, int] = {}  # where each character of the text stands in the new one
    position = 0
    for start, end in pieces:
        places |= dict(zip(range(start, end), range(position, position + end - start), strict=True))
        position += end - start + 1
    if any(place not in places for start, end in record.spans for place in (start, end - 1)):
        raise DataError(
            f"{record.dataset}/{record.doc_id}: a span of {record.text[:60]!r} begins or ends with space."
        )
    spans = tuple((places[start], places[end - 1] + 1) for start, end in record.spans)
    return replace(record, text=" ".join(record.text[start:end] for start, end in pieces), spans=spans)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="folder of train.jsonl, dev.jsonl and test.jsonl, by 02_data"
    )
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    for split in SPLITS:
        count = write_records(
            options.out / f"{split}.jsonl", map(space, read_records(options.source / f"{split}.jsonl"))
        )
        print(f"{options.out}/{split}.jsonl: {count:,} records")


if __name__ == "__main__":
    main()
