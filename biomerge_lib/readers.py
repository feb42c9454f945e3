"""Knows corpus formats and turns their files into records; knows nothing of prompts, tokenizers or models.

Reads CoNLL-style TSV (``token<TAB>tag``, blank line between sentences, IOB2 tags). Sentences are their tokens
joined by one space; entity types are merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from biomerge_lib.errors import DataError
from biomerge_lib.records import Record
from biomerge_lib.spans import Span

SAMPLE = "sample"
SAMPLE_DIR = Path(__file__).parent / "sample_corpus"
# File name stems a split is known by; JNLPBA's train.tsv is distributed as train.reconstructed.tsv.
SPLIT_STEMS = {"train": ("train",), "dev": ("devel", "dev", "valid", "validation"), "test": ("test",)}
_TAG = re.compile(r"O|([BI])-?(.*)")
_DOCSTART = re.compile(r"-DOCSTART-(?: \((.+)\))?")


def read_corpus(source: str) -> dict[str, list[Record]]:
    """Read the splits of one corpus: a folder of TSV files, or ``sample`` for the bundled corpus.

    The data set's name is the folder's, without ``_iob``.

    Raises:
        DataError: the folder or a split's file is missing, or a line is bad (named as ``file:line``).
    """
    folder = SAMPLE_DIR if source == SAMPLE else Path(source).expanduser()
    dataset = SAMPLE if source == SAMPLE else folder.resolve().name.removesuffix("_iob")
    return {split: list(read_iob(path, dataset=dataset)) for split, path in find_splits(folder).items()}


def find_splits(folder: Path) -> dict[str, Path]:
    """The TSV file of each split in a corpus folder.

    Raises:
        DataError: the folder or one of the three files is missing, or a split has several.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such corpus folder. Set corpora=[folder, ...], or corpora=[sample].")
    found = {}
    for split, stems in SPLIT_STEMS.items():
        paths = [path for path in sorted(folder.glob("*.tsv")) if path.name.split(".")[0] in stems]
        if len(paths) != 1:
            names = " or ".join(f"{stem}.tsv" for stem in stems)
            problem = "no" if not paths else f"{len(paths)} files"
            raise DataError(
                f"{folder}: {problem} {names}; a corpus folder has one TSV file for each of train, dev, test."
            )
        found[split] = paths[0]
    return found


def read_iob(path: Path, *, dataset: str) -> Iterator[Record]:
    """Read sentences of a TSV file with IOB tags (``O``, ``B-Type``, ``I-Type``, with or without a type).

    A mention ends before ``O``, ``B-`` or an ``I-`` of another type; an ``I-`` that continues nothing begins a
    mention, as in conlleval. Lines ``-DOCSTART- (id)`` begin a document; without them each sentence is its own.

    Raises:
        DataError: not UTF-8, a line without a tab, an unknown tag, or a file without sentences.
    """
    stem = path.name.split(".")[0]
    document: str | None = None
    documents = sentences = 0
    for start_line, rows in _blocks(path):
        marker = _DOCSTART.fullmatch(rows[0][0])
        if marker:
            documents += 1
            document = marker[1] or f"{dataset}_{stem}_{documents:05d}"
            rows = rows[1:]
            if not rows:
                continue
        sentences += 1
        text, spans = _join_tokens(rows, path, start_line + (1 if marker else 0))
        doc_id = document or f"{dataset}_{stem}_s{sentences:05d}"
        yield Record(text=text, spans=tuple(spans), doc_id=doc_id, dataset=dataset)
    if not sentences:
        raise DataError(f"{path}: the file has no sentences.")


def _blocks(path: Path) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """The file's sentences: number of the first line, and ``(token, tag)`` rows."""
    rows: list[tuple[str, str]] = []
    first = 1
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line).") from None
            if not line.strip():
                if rows:
                    yield first, rows
                    rows = []
                continue
            columns = line.split("\t")
            if len(columns) < 2 or not columns[0].strip():
                raise DataError(f"{where}: expected token<TAB>tag, found {line[:60]!r}.")
            if not rows:
                first = number
            rows.append((columns[0], columns[-1].strip()))
    if rows:
        yield first, rows


def _join_tokens(rows: Sequence[tuple[str, str]], path: Path, first: int) -> tuple[str, list[Span]]:
    spans: list[Span] = []
    current: str | None = None
    position = 0
    for offset, (token, tag) in enumerate(rows):
        match = _TAG.fullmatch(tag)
        if match is None:
            raise DataError(f"{path}:{first + offset}: unknown tag {tag!r}; tags are O, B-Type and I-Type.")
        prefix, kind = match[1], match[2]
        end = position + len(token)
        if prefix is None:
            current = None
        elif prefix == "I" and current == kind:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((position, end))
            current = kind
        position = end + 1
    return " ".join(token for token, _ in rows), spans
