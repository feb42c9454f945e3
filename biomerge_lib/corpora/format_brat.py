r"""Knows BRAT standoff: ``NAME.txt`` and ``NAME.ann`` (``T1\tCell 336 341\tcells``) beside each other.

BioNLP's shared tasks call the mentions ``NAME.a1``, and the events, which are not read, ``NAME.a2``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from biomerge_lib.core.errors import DataError
from biomerge_lib.corpora.documents import Document, Mention, ReadCounts
from biomerge_lib.corpora.formats import Format, Reading, Source, ending_of, read_text, split_lines, stem_of

_ANNOTATIONS = (".ann", ".a1")
_OTHER = "EARMNC#*"  # events, attributes, relations, modifications, normalisations, notes, equivalences
_PARTS = re.compile(r"(\S+) ([0-9]{1,9} [0-9]{1,9}(?:;[0-9]{1,9} [0-9]{1,9})*)")


def read_brat(paths: Sequence[Path], counts: ReadCounts) -> Iterator[Document]:
    """Read a folder's .txt and .ann (or .a1) files; a document's id is its files' name.

    Parts of a discontinuous mention are ``Cell 0 3;8 12``. Lines other than T (events, attributes, notes) are counted.

    Raises:
        DataError: a .txt without its .ann or the reverse, not UTF-8, or a line that is not BRAT's.
    """
    pairs: dict[str, dict[bool, Path]] = {}
    for path in sorted(paths, key=lambda path: ending_of(path) == ".ann"):  # which comes before .a1
        pair, is_text = pairs.setdefault(stem_of(path), {}), ending_of(path) == ".txt"
        if is_text in pair and ending_of(pair[is_text]) == ending_of(path):  # .ann and .ann.gz
            raise DataError(f"{path}: {pair[is_text].name} stands beside it; keep one of them.")
        pair[is_text] = path
    for name, pair in pairs.items():
        if len(pair) < 2:
            path, missing = next(iter(pair.values())), f"{name}.txt" if False in pair else f"{name}.ann"
            needs = "each .txt needs its .ann (or .a1), and each of these its .txt"
            raise DataError(f"{path}: no {missing} beside it; {needs}.")
    for name, pair in pairs.items():
        mentions = tuple(_iter_mentions(pair[False], counts))
        yield Document(name, read_text(pair[True]), mentions, str(pair[True]))


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
    names = [stem_of(path) + one for end in _ANNOTATIONS for one in (end, end.upper(), f"{end}.gz")]
    return ending_of(path) != ".txt" or any(path.with_name(name).exists() for name in names)


BRAT = Format((".txt", *_ANNOTATIONS), _read, _has, is_document_a_file=True)
