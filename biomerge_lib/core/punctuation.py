"""Knows how punctuation is set apart in a text, and its spans with it; knows nothing of prompts or models.

record --[set_apart]--> record of words and signs with single spaces between;    span of that --[map_back]--> span
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import Span

# No token is longer than a prompt may be, whatever stands in a text (a sequence, a URL). Accents stay at their letters.
_TOKEN = re.compile(r"[^\W_](?:[^\W_]|[\u0300-\u036f]){0,59}|[^\w\s]|_")


def find_tokens(text: str) -> list[Span]:
    """Words, and each sign of punctuation by itself.

    >>> find_tokens("asthma attacks.")
    [(0, 6), (7, 14), (14, 15)]
    """
    return [match.span() for match in _TOKEN.finditer(text)]


def set_apart(record: Record) -> Record:
    """The record with single spaces between its tokens.

    Raises:
        DataError: a span begins or ends with white space.
    """
    tokens = find_tokens(record.text)
    places: dict[int, int] = {}  # where each character of the text stands in the new one
    position = 0
    for start, end in tokens:
        places |= dict(zip(range(start, end), range(position, position + end - start), strict=True))
        position += end - start + 1
    if any(place not in places for start, end in record.spans for place in (start, end - 1)):
        raise DataError(
            f"{record.dataset}/{record.doc_id}: a mention in {record.text[:60]!r} begins or ends with white space. "
            "Correct its offsets, or leave punctuation=as_is."
        )
    spans = tuple((places[start], places[end - 1] + 1) for start, end in record.spans)
    return replace(record, text=" ".join(record.text[start:end] for start, end in tokens), spans=spans)


def map_back(span: Span, tokens: Sequence[Span]) -> Span:
    """A span of the tokens joined by single spaces, as a span of the text that they were found in.

    >>> map_back((7, 14), [(0, 6), (7, 14), (14, 15)])
    (7, 14)
    >>> map_back((15, 16), [(0, 6), (7, 14), (14, 15)])
    (14, 15)
    """
    start, end = span
    sources: list[int] = []  # the text's character behind each shown one inside the span
    position = 0
    for first, last in tokens:
        sources += range(first + max(0, start - position), first + max(0, min(end - position, last - first)))
        position += last - first + 1
        if position >= end:
            break
    # A span of nothing but the space between two tokens points at where they meet.
    return (sources[0], sources[-1] + 1) if sources else (0, 0)
