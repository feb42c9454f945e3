"""Knows one annotated text and checks its mentions against it; knows nothing of files, sentences or records.

What every reader of documents keeps to:

- Offsets are 0-based, half-open, in code points of the text as its file has it: each half of CRLF counts one. Files
  that count otherwise (UTF-8 bytes, UTF-16 units, CRLF as one, no byte order mark, or two of these) are understood
  where more mentions then fit their words; such texts are counted (``offset_units``).
- ``text[start:end]`` is the annotated mention. White space may be written differently in the annotation (a space for
  a line break, or nothing; counted as ``respaced``), and so may letters (``TNF-a`` for ``TNF-α``, one ``é`` for ``e``
  with an accent; ``folded``). White space at a mention's edges is left out (``trimmed``). A mention whose file does not
  say its words is ``unchecked``.
- A mention that does not fit stops the run, or with ``bad_mentions="skip"`` is left out and listed (``bad_mentions``).
  Of mentions that are left out anyway the words may be wrong (``misplaced``), or the place missing
  (``without_location``).
- Nested, crossing and adjacent mentions are all kept, and spans are never widened to words. Two mentions of the same
  characters (two types, say) are one span (``duplicates``).
- A discontinuous mention whose parts are only white space apart is an ordinary one. Others are left out, because no
  span holds exactly their characters (``discontinuous_skipped``), or with ``discontinuous="cover"`` become the span
  from the first part's start to the last one's end (``discontinuous_covered``).
- BioC's individual parts of a composite mention are left out: the composite holds them (``composite_parts``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, product
from typing import Any, NamedTuple
from unicodedata import normalize

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.spans import Span

DISCONTINUOUS = ("skip", "cover")
BAD_MENTIONS = ("stop", "skip")
UNTYPED = "Entity"  # the type of a mention that has none
BOM = "\ufeff"


@dataclass(frozen=True, slots=True)
class Mention:
    """An annotation as its file has it: ``parts`` in the file's offsets (none: no place), ``words`` (None: unknown)."""

    parts: tuple[Span, ...]
    type: str
    words: str | None
    where: str
    is_composite_part: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its mentions; a sentence already where ``is_sentence``. ``where`` names its file and line."""

    doc_id: str
    text: str
    mentions: tuple[Mention, ...]
    where: str
    is_sentence: bool = False


@dataclass(slots=True)
class ReadCounts:
    """What reading a split found and did. ``annotated`` mentions = ``spans`` + the six ways not to be a span."""

    documents: int = 0
    sentences: int = 0
    annotated: int = 0
    spans: int = 0
    # Not spans of their own:
    other_types: int = 0
    composite_parts: int = 0
    discontinuous_skipped: int = 0
    without_location: int = 0
    duplicates: int = 0
    bad_mentions: list[str] = field(default_factory=list)  # what is wrong with each
    misplaced: int = 0  # of those above: their words are not where they should be
    # Spans that took some reading:
    discontinuous_covered: int = 0
    overlapping: int = 0  # spans that share a character with an earlier one of their text
    trimmed: int = 0
    respaced: int = 0
    folded: int = 0
    unchecked: int = 0
    begun_by_inside: int = 0  # IOB: an I- (or E-) tag that continues nothing
    # Texts and lines:
    boundaries_joined: int = 0  # proposed sentence ends that would have cut a mention
    empty_documents: int = 0
    blank_tokens: int = 0
    other_lines: int = 0  # relations, events, attributes, comments
    offset_units: Counter[str] = field(default_factory=Counter)  # documents whose offsets are not code points
    types: Counter[str] = field(default_factory=Counter)  # all annotated mentions, before the filter

    def to_dict(self) -> dict[str, Any]:
        """The counts that are not zero (the first four always), for printing and data cards."""
        counts = {field.name: getattr(self, field.name) for field in fields(self)}
        counts |= {"offset_units": dict(self.offset_units), "types": dict(sorted(self.types.items()))}
        always = ("documents", "sentences", "annotated", "spans")
        return {name: value for name, value in counts.items() if value or name in always}


def read_spans(
    document: Document,
    *,
    types: Collection[str] | None,
    discontinuous: str,
    counts: ReadCounts,
    bad_mentions: str = "stop",
) -> dict[Span, str]:
    """The document's spans with their types, sorted, each once; ``types`` None takes all types.

    Raises:
        DataError: a mention is empty, outside the text, or differs from its words (named as ``file:line``).
    """
    text = document.text
    tried: list[tuple[list[str], int, str, list[_Placed]]] = []
    for unit, places in _units(text):
        placed = [_place(mention, places, document, types, discontinuous) for mention in document.mentions]
        problems = [one.problem for one in placed if one.problem and not one.left_out]
        folded = sum(one.is_folded and not one.left_out for one in placed)
        tried.append((problems, folded, unit, placed))
        if not (problems or folded) or all(mention.words is None for mention in document.mentions):
            break
    problems, _, unit, placed = min(tried, key=lambda way: (len(way[0]), way[1]))
    if problems and bad_mentions == "stop":
        raise DataError(tried[0][0][0])
    if unit:
        counts.offset_units[unit] += 1
    found: dict[Span, set[str]] = {}
    for mention, (parts, left_out, problem, is_folded) in zip(document.mentions, placed, strict=True):
        counts.annotated += 1
        counts.types[mention.type] += 1
        if left_out:
            setattr(counts, left_out, getattr(counts, left_out) + 1)
            counts.misplaced += problem is not None
        elif problem:
            counts.bad_mentions.append(problem)
        else:
            start, end = trim(text, parts[0][0], parts[-1][1])
            counts.discontinuous_covered += len(parts) > 1
            counts.trimmed += (start, end) != (parts[0][0], parts[-1][1])
            counts.unchecked += mention.words is None
            counts.folded += is_folded
            if len(parts) == 1 and mention.words is not None and not is_folded:
                counts.respaced += text[start:end] != mention.words.strip()
            counts.duplicates += (start, end) in found
            found.setdefault((start, end), set()).add(mention.type)
    unique = sorted(found)
    counts.spans += len(unique)
    reaches = accumulate((end for _, end in unique), max)
    counts.overlapping += sum(start < reach for (start, _), reach in zip(unique[1:], reaches, strict=False))
    return {span: "|".join(sorted(found[span])) for span in unique}


class _Placed(NamedTuple):
    """A mention in a text: its parts in code points, the count of those left out that it belongs to, what is wrong.

    ``is_folded``: the text has other letters than the mention says.
    """

    parts: list[Span]
    left_out: str | None
    problem: str | None
    is_folded: bool = False


def _place(
    mention: Mention,
    places: tuple[dict[int, int], dict[int, int]] | None,
    document: Document,
    types: Collection[str] | None,
    discontinuous: str,
) -> _Placed:
    if not mention.parts or mention.is_composite_part:
        # Individual parts of composites are often cut a character short (BC5CDR).
        return _Placed([], "composite_parts" if mention.parts else "without_location", None)
    parts = list(mention.parts)
    if places:  # -1: an offset falls inside a code point
        parts = [(places[0].get(start, -1), places[1].get(end, -1)) for start, end in parts]
    closed = _close_gaps(parts, document.text)
    left_out = None
    if types is not None and mention.type not in types:
        left_out = "other_types"
    elif len(closed) > 1 and discontinuous == "skip":
        left_out = "discontinuous_skipped"
    said = "".join(document.text[start:end] for start, end in parts)
    is_folded = mention.words is not None and "".join(said.split()) != "".join(mention.words.split())
    problem = _find_problem(mention, parts, document)
    return _Placed(closed, left_out, problem, is_folded=is_folded and problem is None)


def _find_problem(mention: Mention, parts: Sequence[Span], document: Document) -> str | None:
    """What is wrong with a mention that does not fit the text; None where it does."""
    text = document.text
    offsets = ";".join(f"{start}-{end}" for start, end in parts)
    if not all(0 <= start < end <= len(text) for start, end in parts):
        length = f"the text of {len(text)} characters ({document.where})"
        return f"{mention.where}: offsets {offsets} are not inside {length}."
    found = " ".join(text[start:end] for start, end in parts)
    if not found.replace(BOM, "").strip():
        return f"{mention.where}: the mention at {offsets} is only white space."
    if mention.words is None or found == mention.words:
        return None
    for glue in (" ", ""):  # tools drop line breaks, and differ in how they join parts and write accents
        one, other = (glue.join(normalize("NFKC", words).split()) for words in (found, mention.words))
        pairs = zip(one, other, strict=False)
        # One of them may have characters in ASCII: TNF-a for TNF-α.
        is_same = (a == b or (a.isascii() != b.isascii() and a.isalpha() == b.isalpha()) for a, b in pairs)
        if len(one) == len(other) and all(is_same):
            return None
    return (
        f"{mention.where}: the mention is {mention.words!r}, but the text at {offsets} is {found!r}. "
        "Offsets count code points from 0, the end is exclusive. If it is one of few: bad_mentions=skip."
    )


# How wide a code point is where offsets are not code points.
OFFSET_UNITS: dict[str, Callable[[str], int]] = {
    "": lambda char: 1,
    "utf-8 bytes": lambda char: len(char.encode("utf-8")),
    "utf-16 units": lambda char: 1 + (char > "\uffff"),
}


def _units(text: str) -> Iterator[tuple[str, tuple[dict[int, int], dict[int, int]] | None]]:
    """What offsets may count, and where in the text each then begins and ends a mention; first code points: None."""
    yield "", None
    line_ends = ["", "CRLF as one"] if "\r\n" in text else [""]
    marks = ["", "no byte order mark"] if BOM in text else [""]
    units = [""] if text.isascii() else OFFSET_UNITS
    for line_end, mark, unit in list(product(line_ends, marks, units))[1:]:
        widths = list(map(OFFSET_UNITS[unit], text))
        for place, char in enumerate(text):
            if (mark and char == BOM) or (line_end and text[place : place + 2] == "\r\n"):
                widths[place] = 0
        places = list(enumerate(accumulate(widths, initial=0)))
        # Of code points without width a mention takes none: an offset's last place begins it, its first one ends it.
        starts, ends = ({offset: place for place, offset in order} for order in (places, places[::-1]))
        yield ", ".join(filter(None, (unit, line_end, mark))), (starts, ends)


def _close_gaps(parts: Sequence[Span], text: str) -> list[Span]:
    """The parts in order; those that touch, overlap or have only white space between them become one."""
    closed: list[Span] = []
    for start, end in sorted(parts):
        if closed and not text[closed[-1][1] : start].strip():
            closed[-1] = (closed[-1][0], max(closed[-1][1], end))
        else:
            closed.append((start, end))
    return closed


def trim(text: str, start: int, end: int) -> Span:
    """Leave out the white space (and byte order marks) at the edges; ``(end, end)`` where there is nothing else."""
    while start < end and (text[start].isspace() or text[start] == BOM):
        start += 1
    while start < end and (text[end - 1].isspace() or text[end - 1] == BOM):
        end -= 1
    return start, end
