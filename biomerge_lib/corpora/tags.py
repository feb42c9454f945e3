"""Knows tag schemes (IOB, IOB2, IOBES, BMES, BILOU), and makes records of tagged sentences; knows nothing of files.

A sentence is its tokens joined by one space. A mention runs from a tag that begins it (B, S, U, W) to before the next
O, the next beginning, or a tag of another type; E, L, S, U and W also end it. A tag that would continue (I, M, E, L)
but has nothing before it to continue begins a mention, as in conlleval; so IOB1 files are read rightly too
(``begun_by_inside`` counts them). Adjacent mentions stay two, a repeated mention is marked wherever it is tagged,
nesting cannot be written with tags.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import Span
from biomerge_lib.corpora.documents import UNTYPED, ReadCounts

TAG_COLUMNS = ("ner_tags", "tags", "labels", "ner")  # what a table calls them
TAG = re.compile(r"O|([BIESLUMW])(?:-(.*))?")
_MORE = re.compile(r"[;|,](O$|[BIESLUMW]-)|[^\w-](0?\.\d+|1\.0+)$")  # a second tag, or a probability
_CONTINUES, _ENDS = frozenset("IELM"), frozenset("ESLUW")
_NUMBER = re.compile(r"\d+(?:[-.:_]\d+)*")
_NOTHING = re.compile("")
GAPS = "gaps"
LOOKED_AT = 1000  # tokens
ParsedTag = tuple[str | None, str]
OUTSIDE: ParsedTag = (None, "")


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
    for what, pattern in (("tags", TAG), ("running numbers", _NUMBER), (GAPS, _NOTHING)):
        if 2 * sum(pattern.fullmatch(token) is not None for token in tokens) > len(tokens) > 2:
            return what
    return "repetitions" if is_repetitive(tokens) else None


def is_repetitive(cells: Sequence[str]) -> bool:
    """Whether more than half of some cells are as the one before (an id of the document on each line)."""
    return 2 * sum(one == other for one, other in pairwise(cells)) > len(cells) > 2


def parse_tag(tag: str, where: str) -> ParsedTag:
    """``B-Chemical`` as ``("B", "Chemical")``, ``O`` as ``(None, "")``.

    Raises:
        DataError: an unknown tag.
    """
    match = TAG.fullmatch(tag.strip())
    if match is None:
        tags = "tags are O, B-Type, I-Type, E-Type, S-Type (or M-, L-, U-, W-), with or without a type"
        raise DataError(f"{where}: unknown tag {tag.strip()!r}; {tags}. In another column: set tag_column.")
    if _MORE.search(tag.strip()):
        raise DataError(f"{where}: the tag {tag.strip()!r} holds two tags, or a probability; keep one tag.")
    return (match[1], match[2] or UNTYPED) if match[1] else OUTSIDE


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
    kept = [(span, kind) for span, kind in zip(spans, kinds, strict=True) if types is None or kind in types]
    counts.other_types += len(kinds) - len(kept)
    counts.spans += len(kept)
    spans, kinds = [span for span, _ in kept], [kind for _, kind in kept]
    return Record(" ".join(tokens), tuple(spans), doc_id, dataset, types=tuple(kinds))
