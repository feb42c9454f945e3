"""Knows files of a token and its tag on a line (CoNLL, IOB); knows nothing of folders, nor what a tag means.

Tokens are taken as they are but for white space at their edges; one that is nothing else (a lone non-breaking space)
is left out (``blank_tokens``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

from biomerge_lib.core.errors import DataError, nearest
from biomerge_lib.core.records import Record
from biomerge_lib.corpora.documents import ReadCounts
from biomerge_lib.corpora.formats import (
    READ_ALL,
    Column,
    Format,
    Reading,
    Source,
    ending_of,
    first_lines,
    named_files,
    read_text,
    split_lines,
)
from biomerge_lib.corpora.tags import (
    GAPS,
    LOOKED_AT,
    TAG,
    TAG_COLUMNS,
    ParsedTag,
    find_implausible,
    is_repetitive,
    make_record,
    parse_tag,
    refuse_implausible,
)

# A document begins: CoNLL-2003 and JNLPBA, with an id in brackets or without; GENIA's original files; comments as
# CoNLL-U, bconv and others have them ("# newdoc id = 7", "# doc_id = 7", "#begin document (7); part 000").
_DOCUMENT = re.compile(
    r"-DOCSTART-(?:\s+\((.+)\))?(?:\s+\S+)*\s*|###MEDLINE:(\S+)|"
    r"#+\s*(?:new ?doc(?: id)?(?:\s*=|$)|(?:doc(?:ument)?|pm)[ _-]?id\s*[=:]|begin document\s)"
    r"\s*(.*?)(?:; part \d+)?\s*",
    re.IGNORECASE,
)
_NAMES = frozenset([*TAG_COLUMNS, "tag", "label", "ner_tag"])  # of a column of tags
_NO_ROW = ("#", "-DOCSTART-")
# What a column of syntactic chunks holds (CoNLL-2000); such a column beside the entities' makes no doubt.
_PHRASES = frozenset(["NP", "VP", "PP", "ADVP", "ADJP", "SBAR", "PRT", "CONJP", "INTJ", "LST", "UCP"])
_TABLES = (".tsv", ".conll", ".conllu", ".iob", ".iob2", ".iobes", ".bio", ".bioes", ".bilou", ".bmes")
_OTHERS = (".txt", ".eng", ".train", ".dev", ".devel", ".valid", ".test", ".testa", ".testb")  # eng.testa


def read_iob(
    path: Path, counts: ReadCounts, name: str, *, dataset: str, how: Reading = READ_ALL
) -> Iterator[Record]:
    r"""Read the sentences of a file with a token and its tag on a line (``Aspirin\tB-Chemical``).

    Two columns or more, apart by tabs where the first line has one, else by blanks; tags with a type or without. A
    blank line ends a sentence. ``-DOCSTART- (id)``, ``###MEDLINE:id``, ``# doc_id = id`` and ``# newdoc id = id`` lines
    begin a document, as does another id in a column before the tokens. One without an id is called ``name`` and a
    number, one whose file counts from 0 or 1 ``name`` and that; without any, each sentence is its own. Lines that begin
    with ``#`` and are no token with its tag are comments (``other_lines``).

    A column is a number (from 0, or from -1 at the end) or a name, which the first line then has. Without any, the tags
    are the one column that holds tags, and the tokens the first column that can be text (no running numbers, say).

    Raises:
        DataError: not UTF-8, a missing column or token, an unknown tag, columns that must be named, or a file without
            sentences.
    """
    lines = split_lines(read_text(path))
    layout = _find_layout(lines, how, path)
    rows: dict[str, tuple[str, str, ParsedTag]] = {}  # most lines of a corpus are repeated
    document: str | None = None
    id_before = None
    documents = sentences = 0
    tokens: list[str] = []
    tags: list[ParsedTag] = []
    for number, line in layout.number(lines):
        if (row := rows.get(line)) is None:
            marker = _DOCUMENT.fullmatch(line) if line.startswith(_NO_ROW) else None
            if marker or not line.strip():
                if tokens:
                    sentences += 1
                    doc_id = document or f"{name}_s{sentences:05d}"
                    yield make_record(tokens, tags, doc_id, dataset, types=how.types, counts=counts)
                    tokens, tags = [], []
                if marker:
                    documents += 1
                    document = _name_document(next(filter(None, marker.groups()), None), documents, name)
                continue
            if number <= layout.names_line or (line.startswith("#") and not layout.is_token(line)):
                counts.other_lines += line.startswith("#")
                continue
            row = rows[line] = layout.read(line, f"{path}:{number}")
        first, token, tag = row
        if not token:
            counts.blank_tokens += 1
            continue
        if layout.has_ids and not tokens and first != id_before:
            documents, id_before = documents + 1, first
            document = _name_document(first.strip(), documents, name)
        tokens.append(token)
        tags.append(tag)
    if not sentences:
        raise DataError(f"{path}: the file has no sentences.")


def _name_document(found: str | None, number: int, prefix: str) -> str:
    """A document's id as the file has it; where it has none, or only counts them, the file's name stands before it."""
    if found in (None, str(number - 1), str(number)):
        return f"{prefix}_{found or f'{number:05d}'}"
    return found


@dataclass(slots=True)
class _Layout:
    """How a file's lines are cut, and which column is what; ``names_line`` is the line of the columns' names."""

    has_tabs: bool
    width: int = 2
    token_at: int = 0
    tag_at: int = 1
    has_ids: bool = False  # of documents, in the first column
    ends_at: str = ""  # what ends a sentence where no blank line does: "another" id, or a number that "falls"
    has_types: bool = False
    names_line: int = 0

    def split(self, line: str) -> list[str]:
        """The line's columns; empty ones beyond the width (a tab at the end) are none."""
        if not self.has_tabs:  # a no-break space is part of a token
            return [cell for cell in line.replace("\t", " ").split(" ") if cell]
        row = line.split("\t")
        return row[: self.width] if len(row) > self.width and not any(row[self.width :]) else row

    def number(self, lines: Sequence[str]) -> Iterator[tuple[int, str]]:
        """The lines with their numbers, and a blank one at the end and where the first column ends a sentence."""
        before = ""
        for number, line in enumerate([*lines, ""], start=1):
            if self.ends_at and line.strip() and not line.startswith(_NO_ROW):
                first = self.split(line)[0].strip() or before
                place = _number_of(first)
                if 0 <= place <= _number_of(before) if self.ends_at == "falls" else first != before:
                    yield number, ""
                before = first if place >= 0 or self.ends_at == "another" else before
            yield number, line

    def read(self, line: str, where: str) -> tuple[str, str, ParsedTag]:
        """The line's first column, its token without white space around it, and its tag."""
        row = self.split(line)
        if len(row) != self.width:
            expected = f"{self.width} columns by {'tabs' if self.has_tabs else 'blanks'}, token<TAB>tag"
            raise DataError(f"{where}: expected {expected}, found {line[:60]!r}.")
        if not row[self.token_at]:
            raise DataError(f"{where}: the token is missing in {line[:60]!r}.")
        return row[0], row[self.token_at].strip(), parse_tag(row[self.tag_at], where)

    def is_token(self, line: str) -> bool:
        """Whether a line that begins with # is a token and its tag. ``#hepatitis B`` is not, where tags have types."""
        row = self.split(line)
        if re.match(r"##\w\S*\t", line):  # a piece of a word, whatever its tag
            return len(row) == self.width
        tag = TAG.fullmatch(row[self.tag_at].strip()) if len(row) == self.width else None
        return tag is not None and not (self.has_types and tag[1] and tag[2] is None)


def _find_layout(lines: Sequence[str], how: Reading, path: Path) -> _Layout:
    """How the file is laid out, from its first rows; where there are more than two columns, from all of them.

    Raises:
        DataError: a column that was named is missing, or it is not clear which column is which.
    """
    numbered = _rows_of(lines)
    number, line = next(numbered, (0, ""))
    where, first = f"{path}:{number}", line.rstrip("\t")
    layout = _Layout("\t" in first)
    if not number:
        return layout
    names = [cell.strip() for cell in layout.split(first)]
    layout.width = max(len(names), 2)
    looked_at = [line, *(line for _, line in islice(numbered, LOOKED_AT if layout.width == 2 else None))]
    rows = [row for line in looked_at if len(row := layout.split(line)) == layout.width]
    if str in (type(how.token_column), type(how.tag_column)):
        layout.names_line, rows = number, rows[1:]
    columns = [[row[at].strip() for row in rows] for at in range(layout.width)]
    kinds = {at: found for at, cells in enumerate(columns) if (found := _kinds_of(cells)) is not None}
    token_at = _place_of("token_column", how.token_column, names, where)
    tag_at = _place_of("tag_column", how.tag_column, names, where)
    layout.tag_at = _find_tags(kinds, layout.width, where) if tag_at is None else tag_at
    if len(names) > 1 and names[layout.tag_at].lower() in _NAMES:
        layout.names_line = number
    layout.has_types = bool(kinds.get(layout.tag_at, set()) - {""})
    if token_at is None:
        others = [at for at in range(layout.width) if at not in kinds and at != layout.tag_at]
        token_at = next((at for at in others if not find_implausible(columns[at][:LOOKED_AT])), 0)
    tokens = columns[token_at][:LOOKED_AT]
    if how.token_column is None or find_implausible(tokens) == "tags":
        refuse_implausible(tokens, where, f"column {token_at}")
    if token_at == layout.tag_at:
        raise DataError(f"{where}: token_column and tag_column are both {token_at}: set both of them.")
    layout.token_at = token_at
    if 0 not in (token_at, layout.tag_at):
        layout.has_ids = is_repetitive(columns[0]) or find_implausible(columns[0]) == GAPS
        layout.ends_at = _find_sentence_ends(lines, columns[0], has_ids=layout.has_ids)
    return layout


def _find_sentence_ends(lines: Sequence[str], first: Sequence[str], *, has_ids: bool) -> str:
    """What in the first column ends a sentence where no blank line does, as ``ends_at`` has it."""
    if "\n\n" in "\n".join(map(str.strip, lines)).strip():
        return ""
    numbers = [number for number in map(_number_of, first) if number >= 0]
    is_numbered = 2 * len(numbers) > len(first)
    if is_numbered and not has_ids and any(one > other for one, other in pairwise(numbers)):
        return "falls"
    return "another" if has_ids or (is_numbered and len(set(numbers)) < len(numbers)) else ""


def _number_of(cell: str) -> int:
    """A running number; -1 for what is none."""
    return int(cell) if re.fullmatch("[0-9]{1,9}", cell) else -1


def _rows_of(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The lines that are neither blank nor a comment, with their numbers."""
    return ((n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith(_NO_ROW))


def _place_of(parameter: str, column: Column, names: Sequence[str], where: str) -> int | None:
    """The position of a column that was named; of a name it is the first line that has it."""
    if isinstance(column, str):
        if column not in names:
            near = nearest(column, names)
            raise DataError(f"{where}: {parameter}={column} is none of {', '.join(names)}.{near}")
        return names.index(column)
    if column is not None and not -len(names) <= column < max(len(names), 2):
        there = f"there are {len(names)} columns (0 to {len(names) - 1})"
        raise DataError(f"{where}: {parameter} is {column}, but {there}.")
    return None if column is None else column % max(len(names), 2)


def _kinds_of(cells: Sequence[str]) -> set[str] | None:
    """The types in a column ("" for a tag without one) where most of its cells are tags, else None."""
    counts = Counter(cells)
    tags = {cell for cell in counts if TAG.fullmatch(cell)}
    is_tags = 2 * sum(counts[tag] for tag in tags) > len(cells)
    return {TAG.sub(r"\2", tag) for tag in tags - {"O"}} if is_tags else None


def _find_tags(kinds: Mapping[int, set[str]], width: int, where: str) -> int:
    """The column of the tags: the one that holds entities, else the last one of tags, else the last one.

    Raises:
        DataError: two columns hold entities, or one does and the last one only O.
    """
    last = max(kinds, default=width - 1)
    tagged = [at for at, found in kinds.items() if found and not found <= _PHRASES]
    if tagged and not kinds[last]:
        tagged.append(last)
    if len(tagged) > 1:
        both = " and ".join(map(str, tagged))
        raise DataError(f"{where}: columns {both} hold tags: set tag_column to the one that is meant.")
    return tagged[0] if tagged else last


def _read(source: Source, split: str, how: Reading, counts: ReadCounts) -> Iterator[Record]:
    for path, name in named_files(source, split):
        yield from read_iob(path, counts, name, dataset=source.name, how=how)


def _has(path: Path) -> bool:
    """A table needs a tag somewhere, a file with another ending a column of tags."""
    rows = [_Layout("\t" in line).split(line) for _, line in _rows_of(first_lines(path))]
    if ending_of(path) in _OTHERS:
        width = min(map(len, rows), default=0)
        return width > 1 and any(_kinds_of([row[at] for row in rows]) is not None for at in range(width))
    return any(len(row) < 2 or any(TAG.fullmatch(cell.strip()) for cell in row) for row in rows) or not rows


IOB = Format((*_TABLES, *_OTHERS), _read, _has)
