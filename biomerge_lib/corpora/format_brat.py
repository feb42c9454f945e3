r"""Knows BRAT standoff: ``NAME.txt`` and ``NAME.ann`` (``T1\tCell 336 341\tcells``) beside each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from biomerge_lib.core.errors import DataError
from biomerge_lib.corpora.documents import Document, Mention, ReadCounts
from biomerge_lib.corpora.formats import Format, Reading, Source, read_text, split_lines

_OTHER = "EARMNC#*"  # events, attributes, relations, modifications, normalisations, notes, equivalences
_PARTS = re.compile(r"(\S+) ([0-9]{1,9} [0-9]{1,9}(?:;[0-9]{1,9} [0-9]{1,9})*)")


def read_brat(paths: Sequence[Path], counts: ReadCounts) -> Iterator[Document]:
    """Read a folder's .txt and .ann files; a document's id is its files' name.

    Parts of a discontinuous mention are ``Cell 0 3;8 12``. Lines other than T (events, attributes, notes) are counted.

    Raises:
        DataError: a .txt without its .ann or the reverse, not UTF-8, or a line that is not BRAT's.
    """
    there = set(paths)
    for path in paths:
        partner = path.with_suffix(".ann" if path.suffix == ".txt" else ".txt")
        if partner not in there:
            raise DataError(
                f"{path}: no {partner.name} beside it; each .txt needs its .ann, each .ann its .txt."
            )
    for path in paths:
        if path.suffix == ".txt":
            mentions = tuple(_iter_mentions(path.with_suffix(".ann"), counts))
            yield Document(path.stem, read_text(path), mentions, str(path))


def _iter_mentions(path: Path, counts: ReadCounts) -> Iterator[Mention]:
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        if line[0] in _OTHER:
            counts.other_lines += 1
            continue
        columns = line.split("\t", 2)
        match = _PARTS.fullmatch(columns[1]) if len(columns) == 3 and line[0] == "T" else None
        if match is None:
            raise DataError(f"{where}: expected ID<TAB>Type START END<TAB>mention, found {line[:60]!r}.")
        parts = [part.split(" ") for part in match[2].split(";")]
        yield Mention(tuple((int(start), int(end)) for start, end in parts), match[1], columns[2], where)


def _read(source: Source, split: str, how: Reading, counts: ReadCounts) -> Iterator[Document]:
    return read_brat(source.files[split], counts)


def _has(path: Path) -> bool:
    return path.suffix == ".ann" or path.with_suffix(".ann").exists()


BRAT = Format((".txt", ".ann"), _read, _has, is_document_a_file=True)
