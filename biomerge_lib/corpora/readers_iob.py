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
from itertools import chain, pairwise
from pathlib import Path

from biomerge_lib.core.errors import DataError, nearest
from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import Span
from biomerge_lib.corpora.documents import UNTYPED, ReadCounts

TAG = re.compile(r"O|([BIESLU])(?:-(.*))?")
_BEGINS, _CONTINUES, _ENDS = frozenset("BSU"), frozenset("IEL"), frozenset("ESLU")
# A document begins: CoNLL-2003 and JNLPBA, with an id in brackets or without; GENIA's original files.
_DOCUMENT = re.compile(r"-DOCSTART-(?:\s+\((.+)\))?(?:\s+\S+)*\s*|###MEDLINE:(\S+)")
MARKERS = ("-DOCSTART-", "###MEDLINE:", "#")
_NUMBER = re.compile(r"\d+(?:[-.:_]\d+)*")
# What a column of syntactic chunks holds (CoNLL-2000); such a column beside the entities' makes no doubt.
_PHRASES = frozenset(["NP", "VP", "PP", "ADVP", "ADJP", "SBAR", "PRT", "CONJP", "INTJ", "LST", "UCP"])
LOOKED_AT = 1000  # tokens
Column = int | str | None
ParsedTag = tuple[str | None, str]
OUTSIDE: ParsedTag = (None, "")


def read_iob(
    path: Path,
    *,
    dataset: str,
    types: Collection[str] | None = None,
    token_column: Column = None,
    tag_column: Column = None,
    doc_prefix: str | None = None,
    counts: ReadCounts | None = None,
) -> Iterator[Record]:
    r"""Read the sentences of a file with a token and its tag on a line (``Aspirin\tB-Chemical``).

    Two columns or more, apart by tabs where the first line has one, else by white space; tags with a type or without.
    A blank line ends a sentence. ``-DOCSTART- (id)`` and ``###MEDLINE:id`` lines begin a document; without any, each
    sentence is its own. Lines that begin with ``#`` and have no columns are comments (``other_lines``).

    A column is a number (from 0, or from -1 at the end) or a name, which the first line then has. Without any it is the
    first and the last one, unless what stands there looks like no token, or two columns look like tags.

    Raises:
        DataError: not UTF-8, a missing column or token, an unknown tag, columns that must be named, or a file without
            sentences.
    """
    counts = ReadCounts() if counts is None else counts
    prefix = doc_prefix or f"{dataset}_{path.name.split('.')[0]}"
    parsed_tags: dict[str, ParsedTag] = {}  # by what stands in the tag column, line end included
    document: str | None = None
    documents = sentences = width = at = tag_at = 0
    separator: str | None = None
    looked_at: list[str] = []
    rivals: dict[int, set[str]] = {}  # other columns that hold nothing but tags
    columns_at = ""
    tokens: list[str] = []
    tags: list[ParsedTag] = []
    for number, line in enumerate(chain(_lines(path), [""]), start=1):  # "" ends the last sentence
        columns = line.split(separator)
        token = columns[at].strip() if len(columns) == width > 0 else ""
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
            if not width:
                columns_at, width = f"{path}:{number}", max(len(columns), 2)
                at, tag_at = _find_columns(columns, token_column, tag_column, columns_at)
                rivals = {i: set() for i in range(width) if i not in (at, tag_at) and tag_column is None}
                if str in (type(token_column), type(tag_column)):
                    continue  # the line of the names
            if len(columns) != width:
                expected = f"{width} columns by {'tabs' if separator else 'white space'}, token<TAB>tag"
                raise DataError(f"{path}:{number}: expected {expected}, found {line[:60]!r}.")
            token = columns[at].strip()
            if not token and not columns[at]:
                raise DataError(f"{path}:{number}: the token is missing in {line[:60]!r}.")
        try:
            tag = parsed_tags[columns[tag_at]]
        except KeyError:
            tag = parsed_tags[columns[tag_at]] = parse_tag(columns[tag_at], f"{path}:{number}")
        for column, found in list(rivals.items()) if rivals else ():
            if (value := columns[column].strip()) not in found:
                found.add(value)
                if not TAG.fullmatch(value):
                    del rivals[column]
        if token:
            if len(looked_at) < LOOKED_AT:
                looked_at.append(token)
            tokens.append(token)
            tags.append(tag)
        else:
            counts.blank_tokens += 1
    if not sentences:
        raise DataError(f"{path}: the file has no sentences.")
    if token_column is None or find_implausible(looked_at) == "tags":
        refuse_implausible(looked_at, columns_at, f"column {at}")
    kinds = {tag_at: {kind for prefix, kind in parsed_tags.values() if prefix}}
    kinds |= {column: {TAG.sub(r"\2", tag) for tag in found - {"O"}} for column, found in rivals.items()}
    tagged = [column for column, found in sorted(kinds.items()) if found and not found <= _PHRASES]
    if len(tagged) > 1 or (tagged and tag_at not in tagged):
        both = " and ".join(map(str, sorted({tag_at, *tagged})))
        raise DataError(f"{columns_at}: columns {both} hold tags: set tag_column to the one that is meant.")


def refuse_implausible(tokens: Sequence[str], where: str, column: str) -> None:
    """Refuse what a column holds in place of tokens; numbers and repetitions may be meant where it was named.

    Raises:
        DataError: it says how to name the columns.
    """
    if problem := find_implausible(tokens):
        shown = ", ".join(map(repr, tokens[:4]))
        raise DataError(
            f"{where}: {column} should be the tokens, but holds {problem} ({shown}): set token_column (and tag_column) "
            "to the right one, a number from 0 or a name."
        )


def find_implausible(tokens: Sequence[str]) -> str | None:
    """What more than half of some tokens are, where that can be no text; two tokens or fewer say nothing."""
    found = {
        "tags": sum(TAG.fullmatch(token) is not None for token in tokens),
        "running numbers": sum(_NUMBER.fullmatch(token) is not None for token in tokens),
        "repetitions": sum(one == other for one, other in pairwise(tokens)),
    }
    return next((what for what, count in found.items() if 2 * count > len(tokens) > 2), None)


def parse_tag(tag: str, where: str) -> ParsedTag:
    """``B-Chemical`` as ``("B", "Chemical")``, ``O`` as ``(None, "")``.

    Raises:
        DataError: an unknown tag.
    """
    match = TAG.fullmatch(tag.strip())
    if match is None:
        tags = "tags are O, B-Type, I-Type, E-Type, S-Type (or L-, U-), with or without a type"
        raise DataError(f"{where}: unknown tag {tag.strip()!r}; {tags}. In another column: set tag_column.")
    return (match[1], match[2] or UNTYPED) if match[1] else OUTSIDE


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
