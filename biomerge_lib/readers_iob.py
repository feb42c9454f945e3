"""Knows token/tag sentences (CoNLL, IOB, IOB2, IOBES, BILOU) and makes records of them; knows nothing of folders.

A sentence is its tokens joined by one space. A mention runs from a tag that begins it (B, S, U) to before the next O,
the next beginning, or a tag of another type; E, L, S and U also end it. A tag that would continue (I, E, L) but has
nothing before it to continue begins a mention, as in conlleval; so IOB1 files are read rightly too (``begun_by_inside``
counts them). Adjacent mentions stay two, a repeated mention is marked wherever it is tagged, nesting cannot be written
in this format. Tokens are taken as they are but for white space at their edges; one that is nothing else
(a lone non-breaking space) is left out (``blank_tokens``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path

from biomerge_lib.documents import UNTYPED, ReadCounts
from biomerge_lib.errors import DataError
from biomerge_lib.records import Record
from biomerge_lib.spans import Span

TAG = re.compile(r"O|([BIESLU])(?:-(.*))?")
_BEGINS, _CONTINUES, _ENDS = frozenset("BSU"), frozenset("IEL"), frozenset("ESLU")
# A document begins: CoNLL-2003 and JNLPBA, with an id in brackets or without; GENIA's original files.
_DOCUMENT = re.compile(r"-DOCSTART-(?:\s+\((.+)\))?(?:\s+\S+)*\s*|###MEDLINE:(\S+)")
MARKERS = ("-DOCSTART-", "###MEDLINE:", "#")
ParsedTag = tuple[str | None, str]
OUTSIDE: ParsedTag = (None, "")


def read_iob(
    path: Path,
    *,
    dataset: str,
    types: Collection[str] | None = None,
    token_column: int = 0,
    tag_column: int = -1,
    doc_prefix: str | None = None,
    counts: ReadCounts | None = None,
) -> Iterator[Record]:
    r"""Read the sentences of a file with a token and its tag on a line (``Aspirin\tB-Chemical``).

    Two columns or more, apart by tabs where the first line has one, else by white space; tags with a type or without.
    A blank line ends a sentence. ``-DOCSTART- (id)`` and ``###MEDLINE:id`` lines begin a document; without any, each
    sentence is its own. Lines that begin with ``#`` and have no columns are comments (``other_lines``).

    Raises:
        DataError: not UTF-8, a missing column or token, an unknown tag, or a file without sentences.
    """
    counts = ReadCounts() if counts is None else counts
    prefix = doc_prefix or f"{dataset}_{path.name.split('.')[0]}"
    parsed_tags: dict[str, ParsedTag] = {}  # by what stands in the tag column, line end included
    document: str | None = None
    documents = sentences = width = 0
    separator: str | None = None
    tokens: list[str] = []
    tags: list[ParsedTag] = []
    for number, line in enumerate(chain(_lines(path), [""]), start=1):  # "" ends the last sentence
        columns = line.split(separator)
        token = columns[token_column].strip() if len(columns) == width > 0 else ""
        if not token or line.startswith(MARKERS):
            line = line.rstrip("\r\n")
            marker = _DOCUMENT.fullmatch(line)
            is_blank = not line.strip()
            if tokens and (marker or is_blank):
                sentences += 1
                counts.documents += document is None
                doc_id = document or f"{prefix}_s{sentences:05d}"
                yield make_record(tokens, tags, doc_id, dataset, types=types, counts=counts)
                tokens, tags = [], []
            if marker:
                documents += 1
                counts.documents += 1
                document = marker[1] or marker[2] or f"{prefix}_{documents:05d}"
            if marker or is_blank:
                continue
            separator = separator if width else "\t" if "\t" in line else None
            columns = line.split(separator)
            has_tag = len(columns) > 1 and (separator or TAG.fullmatch(columns[-1]))
            if line.startswith("#") and not has_tag:
                counts.other_lines += 1
                continue
            width = width or _check_columns(len(columns), token_column, tag_column, f"{path}:{number}")
            if len(columns) != width:
                expected = f"{width} columns by {'tabs' if separator else 'white space'}, token<TAB>tag"
                raise DataError(f"{path}:{number}: expected {expected}, found {line[:60]!r}.")
            token = columns[token_column].strip()
            if not token and not columns[token_column]:
                raise DataError(f"{path}:{number}: the token is missing in {line[:60]!r}.")
        try:
            tag = parsed_tags[columns[tag_column]]
        except KeyError:
            tag = parsed_tags[columns[tag_column]] = parse_tag(columns[tag_column], f"{path}:{number}")
        if token:
            tokens.append(token)
            tags.append(tag)
        else:
            counts.blank_tokens += 1
    if not sentences:
        raise DataError(f"{path}: the file has no sentences.")


def parse_tag(tag: str, where: str) -> ParsedTag:
    """``B-Chemical`` as ``("B", "Chemical")``, ``O`` as ``(None, "")``.

    Raises:
        DataError: an unknown tag.
    """
    match = TAG.fullmatch(tag.strip())
    if match is None:
        tags = "tags are O, B-Type, I-Type, E-Type, S-Type (or L-, U-), with or without a type"
        raise DataError(f"{where}: unknown tag {tag.strip()!r}; {tags}.")
    return (match[1], match[2] or UNTYPED) if match[1] else OUTSIDE


def _check_columns(found: int, token_column: int, tag_column: int, where: str) -> int:
    """How many columns each line must have, from the first one's."""
    for name, column in (("token_column", token_column), ("tag_column", tag_column)):
        if found > 1 and not -found <= column < found:
            raise DataError(f"{where}: {name} is {column}, but there are {found} columns (0 to {found - 1}).")
    return max(found, 2)


def make_record(
    tokens: Sequence[str],
    tags: Sequence[ParsedTag],
    doc_id: str,
    dataset: str,
    *,
    types: Collection[str] | None,
    counts: ReadCounts,
) -> Record:
    """The record of a sentence; mentions of types that are not asked for are left out."""
    counts.sentences += 1
    if tags.count(OUTSIDE) == len(tags):  # half of all sentences
        return Record(" ".join(tokens), (), doc_id, dataset)
    spans: list[Span] = []
    kinds: list[str] = []
    current: str | None = None
    position = 0
    for token, (prefix, kind) in zip(tokens, tags, strict=True):
        end = position + len(token)
        if prefix is None:
            current = None
        else:
            if prefix in _CONTINUES and current == kind:
                spans[-1] = (spans[-1][0], end)
            else:
                counts.begun_by_inside += prefix in _CONTINUES
                spans.append((position, end))
                kinds.append(kind)
            current = None if prefix in _ENDS else kind
        position = end + 1
    counts.annotated += len(kinds)
    counts.types.update(kinds)
    if types is not None:
        spans = [span for span, kind in zip(spans, kinds, strict=True) if kind in types]
        counts.other_types += len(kinds) - len(spans)
    counts.spans += len(spans)
    return Record(" ".join(tokens), tuple(spans), doc_id, dataset)


def _lines(path: Path) -> Iterator[str]:
    r"""The file's lines with their end (only ``\n`` is one), decoded."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            yield from lines
    except UnicodeDecodeError:
        with path.open("rb") as raw_lines:
            for number, raw in enumerate(raw_lines, start=1):
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    at = f"byte {error.start + 1} of the line"
                    raise DataError(f"{path}:{number}: not UTF-8 ({at}).") from None
        raise
