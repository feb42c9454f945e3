"""Knows files of a token and its tag on a line (CoNLL, IOB); knows nothing of folders, nor what a tag means.

Tokens are taken as they are but for white space at their edges; one that is nothing else (a lone non-breaking space)
is left out (``blank_tokens``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
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
    first_line,
    read_text,
    split_lines,
    split_of,
)
from biomerge_lib.corpora.tags import (
    LOOKED_AT,
    TAG,
    ParsedTag,
    find_implausible,
    make_record,
    parse_tag,
    refuse_implausible,
)

# A document begins: CoNLL-2003 and JNLPBA, with an id in brackets or without; GENIA's original files; comments as
# CoNLL-U, bconv and others have them ("# newdoc id = 7", "# doc_id = 7", "#begin document (7); part 000").
_DOCUMENT = re.compile(
    r"-DOCSTART-(?:\s+\((.+)\))?(?:\s+\S+)*\s*|###MEDLINE:(\S+)|"
    r"#+\s*(?:new ?doc(?: id)?|(?:doc(?:ument)?|pm)[ _-]?id|begin document)(?:\s*[=:]\s*|\s+|$)(.*?)(?:; part \d+)?\s*",
    re.IGNORECASE,
)
_MARKERS = ("-DOCSTART-", "###MEDLINE:")
# What a column of syntactic chunks holds (CoNLL-2000); such a column beside the entities' makes no doubt.
_PHRASES = frozenset(["NP", "VP", "PP", "ADVP", "ADJP", "SBAR", "PRT", "CONJP", "INTJ", "LST", "UCP"])


def read_iob(
    path: Path,
    *,
    dataset: str,
    doc_prefix: str | None = None,
    how: Reading = READ_ALL,
    counts: ReadCounts | None = None,
) -> Iterator[Record]:
    r"""Read the sentences of a file with a token and its tag on a line (``Aspirin\tB-Chemical``).

    Two columns or more, apart by tabs where the first line has one, else by white space; tags with a type or without.
    A blank line ends a sentence. ``-DOCSTART- (id)``, ``###MEDLINE:id``, ``# doc_id = id`` and ``# newdoc id = id``
    lines begin a document, which without an id is called ``doc_prefix`` and a number, as are those that are counted
    from 0 or 1; without any, each sentence is its own. Lines that begin with ``#`` and have no columns are comments
    (``other_lines``).

    A column is a number (from 0, or from -1 at the end) or a name, which the first line then has. Without any it is the
    first and the last one, unless what stands there looks like no token, or two columns look like tags.

    Raises:
        DataError: not UTF-8, a missing column or token, an unknown tag, columns that must be named, or a file without
            sentences.
    """
    counts = ReadCounts() if counts is None else counts
    doc_prefix = doc_prefix or f"{dataset}_{path.name.split('.')[0]}"
    columns: _Columns | None = None
    separator: str | None = None
    width = token_at = tag_at = 0
    parsed_tags: dict[str, ParsedTag] = {}
    document: str | None = None
    documents = sentences = 0
    is_numbered = False  # documents: such ids say nothing outside their file
    is_open = True
    tokens: list[str] = []
    tags: list[ParsedTag] = []
    lines = chain(split_lines(read_text(path)), [""])  # "" ends the last sentence
    for number, line in enumerate(lines, start=1):
        row = line.split(separator)
        token = row[token_at].strip() if len(row) == width > 0 else ""
        if not token or columns is None or line.startswith((*_MARKERS, "#")):
            marker = _DOCUMENT.fullmatch(line)
            if marker or not line.strip():
                if tokens:
                    sentences += 1
                    doc_id = document or f"{doc_prefix}_s{sentences:05d}"
                    yield make_record(tokens, tags, doc_id, dataset, types=how.types, counts=counts)
                    tokens, tags = [], []
                if marker:
                    documents += 1
                    document = next(filter(None, marker.groups()), None)
                    is_numbered = is_numbered or document in ("0", "1")
                    if is_numbered or document is None:
                        document = f"{doc_prefix}_{document or f'{documents:05d}'}"
                continue
            where = f"{path}:{number}"
            if columns is None:
                separator = "\t" if "\t" in line else None
                row = line.split(separator)
            if line.startswith("#") and (len(row) == 1 or not (separator or TAG.fullmatch(row[-1]))):
                counts.other_lines += 1
                continue
            if columns is None:
                columns = _Columns(row, how, where)
                width, token_at, tag_at = columns.width, columns.token_at, columns.tag_at
                if str in (type(how.token_column), type(how.tag_column)):
                    continue  # the line of the names
            if len(row) != width:
                expected = f"{width} columns by {'tabs' if separator else 'white space'}, token<TAB>tag"
                raise DataError(f"{where}: expected {expected}, found {line[:60]!r}.")
            if not row[token_at]:
                raise DataError(f"{where}: the token is missing in {line[:60]!r}.")
            token = row[token_at].strip()
        word = row[tag_at]
        if word not in parsed_tags:
            parsed_tags[word] = parse_tag(word, f"{path}:{number}")
        if not token:
            counts.blank_tokens += 1
            continue
        tokens.append(token)
        tags.append(parsed_tags[word])
        is_open = is_open and columns.look_at(row)
    if columns is None or not sentences:
        raise DataError(f"{path}: the file has no sentences.")
    columns.refuse_doubtful({kind for prefix, kind in parsed_tags.values() if prefix})


class _Columns:
    """Where a file has tokens and tags, as its first line shows, and what speaks against it in the lines after."""

    def __init__(self, first_row: Sequence[str], how: Reading, where: str):
        self.how, self.where, self.width = how, where, max(len(first_row), 2)
        self.token_at, self.tag_at = _find_columns(first_row, how.token_column, how.tag_column, where)
        self.tokens: list[str] = []
        others = set(range(self.width)) - {self.token_at, self.tag_at} if how.tag_column is None else ()
        self.rivals: dict[int, set[str]] = {column: set() for column in others}  # hold nothing but tags

    def look_at(self, row: Sequence[str]) -> bool:
        """Remember what may speak against the columns; returns whether there is more to look at."""
        if len(self.tokens) < LOOKED_AT:
            self.tokens.append(row[self.token_at].strip())
        for column, found in list(self.rivals.items()):
            found.add(row[column].strip())
            if not TAG.fullmatch(row[column].strip()):
                del self.rivals[column]
        return bool(self.rivals) or len(self.tokens) < LOOKED_AT

    def refuse_doubtful(self, kinds_in_tags: set[str]) -> None:
        """Refuse columns that may not be what they were taken for.

        Raises:
            DataError: the tokens look like none, or two columns hold tags.
        """
        if self.how.token_column is None or find_implausible(self.tokens) == "tags":
            refuse_implausible(self.tokens, self.where, f"column {self.token_at}")
        kinds = {self.tag_at: kinds_in_tags}
        for column, found in self.rivals.items():
            kinds[column] = {TAG.sub(r"\2", tag) for tag in found - {"O"}}
        tagged = [column for column, found in sorted(kinds.items()) if found and not found <= _PHRASES]
        if len(tagged) > 1 or (tagged and self.tag_at not in tagged):
            both = " and ".join(map(str, sorted({self.tag_at, *tagged})))
            raise DataError(
                f"{self.where}: columns {both} hold tags: set tag_column to the one that is meant."
            )


def _find_columns(columns: Sequence[str], token_column: Column, tag_column: Column, where: str) -> list[int]:
    """The positions of tokens and tags, from the first line; of names it is the line that has them."""
    names, places = [column.strip() for column in columns], []
    for name, column, default in (("token_column", token_column, 0), ("tag_column", tag_column, -1)):
        place = default if column is None else column
        if isinstance(place, str):
            if place not in names:
                raise DataError(
                    f"{where}: {name}={place} is none of {', '.join(names)}.{nearest(place, names)}"
                )
            place = names.index(place)
        if len(names) > 1 and not -len(names) <= place < len(names):
            there = f"there are {len(names)} columns (0 to {len(names) - 1})"
            raise DataError(f"{where}: {name} is {place}, but {there}.")
        places.append(place % max(len(names), 2))
    if places[0] == places[1]:
        raise DataError(f"{where}: token_column and tag_column are both {places[0]}: set both of them.")
    return places


def _read(source: Source, split: str, how: Reading, counts: ReadCounts) -> Iterator[Record]:
    paths = source.files[split]
    for path in paths:
        # Files of a split's folder may have the same names in all folders: documents without an id need the split's.
        tells_split = len(paths) == 1 and split_of(path.name) == split
        prefix = None if tells_split else f"{source.name}_{split}_{path.stem}"
        yield from read_iob(path, dataset=source.name, doc_prefix=prefix, how=how, counts=counts)


def _has(path: Path) -> bool:
    """A .txt needs a tag at the first line's end."""
    line = first_line(path, but=("#", *_MARKERS))
    columns = line.split("\t" if "\t" in line else None)
    return path.suffix != ".txt" or (len(columns) > 1 and TAG.fullmatch(columns[-1].strip()) is not None)


IOB = Format((".tsv", ".conll", ".iob", ".iob2", ".iobes", ".bio", ".txt"), _read, _has)
