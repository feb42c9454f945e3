"""Knows span strings and texts; knows nothing of models, prompts or files.

A span is a pair ``(start, end)`` of 0-based, half-open offsets in Unicode code points, so that
``text[start:end]`` is the mention. A span string is what the model writes: ``<TAG> 0-7 ; 20-34``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

Span = tuple[int, int]

TAG = "<TAG>"
SEPARATOR = " ; "
# ASCII hyphen first, then what editors and PDF converters put in its place (the brief itself has U+2011).
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212\ufe58\ufe63\uff0d"
OFFSET = re.compile("[0-9]{1,9}")  # as it may stand in a file
_PAIR = re.compile(rf"\s*([0-9]{{1,9}})\s*[{_DASHES}]\s*([0-9]{{1,9}})\s*")


class FoundMention(NamedTuple):
    """A predicted mention: ``text`` is ``document[start:end]``, ``score`` its probability (None: not known)."""

    start: int
    end: int
    text: str
    score: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model's answer says about a text.

    ``spans``: every pair that could be read, sorted, without duplicates; pairs that point outside the
    text are kept, because they are wrong predictions and must be scored as such.
    ``unreadable``: the parts between semicolons that are not a pair.
    ``out_of_text``: the spans with ``start >= end`` or ``end > len(text)``.
    ``is_sorted``: whether the pairs came in ascending order without repetition.
    """

    spans: list[Span]
    unreadable: list[str]
    out_of_text: list[Span]
    is_sorted: bool


def format_spans(spans: Iterable[Span]) -> str:
    """Write spans as a span string: sorted by start, then end; duplicates collapse.

    >>> format_spans([(20, 34), (0, 7)])
    '<TAG> 0-7 ; 20-34'
    >>> format_spans([])
    '<TAG>'
    """
    pairs = SEPARATOR.join(f"{start}-{end}" for start, end in sorted(set(spans)))
    return f"{TAG} {pairs}" if pairs else TAG


def parse_spans(answer: str) -> list[Span]:
    """Read the spans of a span string; the inverse of :func:`format_spans`.

    Reads any dash and any white space; what is not a pair is left out here and reported by
    :func:`parse_answer`.

    >>> parse_spans('<TAG> 0\u20117 ;20 - 34')
    [(0, 7), (20, 34)]
    """
    return parse_answer(answer, 0).spans


def parse_answer(answer: str, text_length: int) -> Answer:
    """Read a model's answer to a text of ``text_length`` characters, with everything wrong about it."""
    parts = read_parts(answer)
    pairs = [span for _, span in parts if span is not None]
    spans = sorted(set(pairs))
    return Answer(
        spans=spans,
        unreadable=[part for part, span in parts if span is None and part],
        out_of_text=[span for span in spans if not is_inside(span, text_length)],
        is_sorted=pairs == spans,
    )


def is_inside(span: Span, text_length: int) -> bool:
    """Whether ``0 <= start < end <= text_length``."""
    start, end = span
    return 0 <= start < end <= text_length


def snap_to_words(span: Span, words: list[Span]) -> Span:
    """Widen a span to the words it touches (offsets that are a character or two off become right).

    ``words`` are the ``(start, end)`` of the text's words in order. A span that touches no word is
    returned as it is.
    """
    start, end = span
    touched = [word for word in words if word[0] < end and word[1] > start]
    return (touched[0][0], touched[-1][1]) if touched else span


def read_parts(answer: str) -> list[tuple[str, Span | None]]:
    """Each part between semicolons, stripped, and its span (None when it is no pair, an empty part among them).

    >>> read_parts(' 0-7 ; x')
    [('0-7', (0, 7)), ('x', None)]
    """
    parts = []
    for part in answer.replace(TAG, " ").split(";"):
        match = _PAIR.fullmatch(part)
        parts.append((part.strip(), (int(match[1]), int(match[2])) if match else None))
    return parts
