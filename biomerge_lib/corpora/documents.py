"""Knows one annotated text and checks its mentions against it; knows nothing of files, sentences or records.

What every reader of documents (BRAT, BioC, PubTator, hub) keeps to:

- Offsets are 0-based, half-open, in code points of the text as its file has it: a combining character, an emoji, a
  non-breaking space, a tab and each half of CRLF count one. Files that count otherwise (UTF-8 bytes, UTF-16 units,
  CRLF as one, no byte order mark) are understood where code points fail and every mention of the text then fits
  its annotated words; such texts are counted (``offset_units``). Anything else that does not fit stops the run.
- ``text[start:end]`` is the annotated mention. White space may be written differently in the annotation (a space for
  a line break; counted as ``respaced``), and white space at a mention's edges is left out (``trimmed``).
- Nested, crossing, adjacent and repeated mentions are all kept, and so are mentions that begin or end inside a word:
  spans are never widened. Two mentions of the same characters (two types, say) are one span (``duplicates``).
- A discontinuous mention whose parts are only white space apart is an ordinary one. Others are left out, because no
  span holds exactly their characters (``discontinuous_skipped``), or with ``discontinuous="cover"`` become the span
  from the first part's start to the last one's end (``discontinuous_covered``).
- BioC's individual parts of a composite mention are left out: the composite holds them (``composite_parts``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.spans import Span

DISCONTINUOUS = ("skip", "cover")
UNTYPED = "Entity"  # the type of a mention that has none
BOM = "\ufeff"


@dataclass(frozen=True, slots=True)
class Mention:
    """An annotation as its file has it: ``parts`` in the file's offsets, ``words`` (None: the file has none)."""

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
    """What reading a split found and did. ``annotated`` mentions = ``spans`` + the four ways not to be a span."""

    documents: int = 0
    sentences: int = 0
    annotated: int = 0
    spans: int = 0
    # Not spans of their own:
    other_types: int = 0
    composite_parts: int = 0
    discontinuous_skipped: int = 0
    duplicates: int = 0
    # Spans that took some reading:
    discontinuous_covered: int = 0
    overlapping: int = 0  # spans that share a character with an earlier one of their text
    trimmed: int = 0
    respaced: int = 0
    begun_by_inside: int = 0  # IOB: an I- (or E-) tag that continues nothing
    # Texts and lines:
    boundaries_joined: int = 0  # proposed sentence ends that would have cut a mention
    empty_documents: int = 0
    blank_tokens: int = 0
    other_lines: int = 0  # relations, events, attributes, comments
    offset_units: Counter[str] = field(default_factory=Counter)  # documents whose offsets are not code points
    types: Counter[str] = field(default_factory=Counter)  # all annotated mentions, before the filter

    @property
    def unaccounted(self) -> int:
        """Annotated mentions that are neither spans nor counted as left out; always 0."""
        left_out = self.other_types + self.composite_parts + self.discontinuous_skipped + self.duplicates
        return self.annotated - self.spans - left_out

    def to_dict(self) -> dict[str, Any]:
        """The counts that are not zero (the first four always), for printing and data cards."""
        counts = asdict(self) | {
            "offset_units": dict(self.offset_units),
            "types": dict(sorted(self.types.items())),
        }
        always = ("documents", "sentences", "annotated", "spans")
        return {name: value for name, value in counts.items() if value or name in always}


def read_spans(
    document: Document, *, types: Collection[str] | None, discontinuous: str, counts: ReadCounts
) -> dict[Span, str]:
    """The document's spans with their types, sorted, each once; ``types`` None takes all types.

    Raises:
        DataError: a mention is empty, outside the text, or differs from its words (named as ``file:line``).
    """
    found: dict[Span, set[str]] = {}
    spans = 0
    for mention, located in zip(document.mentions, _locate(document, counts), strict=True):
        counts.annotated += 1
        counts.types[mention.type] += 1
        if mention.is_composite_part:
            counts.composite_parts += 1
            continue
        parts = _close_gaps(located, document.text)
        start, end = trim(document.text, parts[0][0], parts[-1][1])
        if types is not None and mention.type not in types:
            counts.other_types += 1
        elif len(parts) > 1 and discontinuous == "skip":
            counts.discontinuous_skipped += 1
        else:
            counts.discontinuous_covered += len(parts) > 1
            counts.trimmed += (start, end) != (parts[0][0], parts[-1][1])
            if len(parts) == 1 and mention.words is not None:
                counts.respaced += document.text[start:end] != mention.words.strip()
            spans += 1
            found.setdefault((start, end), set()).add(mention.type)
    unique = sorted(found)
    counts.duplicates += spans - len(unique)
    counts.spans += len(unique)
    reaches = accumulate((end for _, end in unique), max)
    counts.overlapping += sum(start < reach for (start, _), reach in zip(unique[1:], reaches, strict=False))
    return {span: "|".join(sorted(found[span])) for span in unique}


def _locate(document: Document, counts: ReadCounts) -> list[tuple[Span, ...]]:
    """The parts of each mention in code points."""
    parts = [mention.parts for mention in document.mentions]
    problem = _find_problem(document, parts)
    if problem is None:
        return parts
    if all(mention.words is not None for mention in document.mentions):
        for unit, widths in OFFSET_UNITS.items():
            try:
                converted = _to_code_points(parts, widths(document.text))
            except KeyError:
                continue
            if converted != parts and _find_problem(document, converted) is None:
                counts.offset_units[unit] += 1
                return converted
    raise DataError(problem)


def _find_problem(document: Document, parts_of_mentions: list[tuple[Span, ...]]) -> str | None:
    """What is wrong with the first mention that does not fit the text; None where all fit."""
    text = document.text
    for mention, parts in zip(document.mentions, parts_of_mentions, strict=True):
        offsets = ";".join(f"{start}-{end}" for start, end in parts)
        for start, end in parts:
            if not 0 <= start < end <= len(text):
                length = f"the text of {len(text)} characters ({document.where})"
                return f"{mention.where}: offsets {offsets} are not inside {length}."
        found = " ".join(text[start:end] for start, end in parts)
        if not found.replace(BOM, "").strip():
            return f"{mention.where}: the mention at {offsets} is only white space."
        # Individual parts of composites are often cut a character short (BC5CDR), and are left out anyway.
        if mention.words is None or mention.is_composite_part or found == mention.words:
            continue
        glue = "" if len(parts) > 1 else " "  # formats differ in how they join parts
        if glue.join(found.split()) != glue.join(mention.words.split()):
            return (
                f"{mention.where}: the mention is {mention.words!r}, but the text at {offsets} is {found!r}. "
                "Offsets count code points from 0, the end is exclusive."
            )
    return None


def _to_code_points(parts_of_mentions: list[tuple[Span, ...]], widths: list[int]) -> list[tuple[Span, ...]]:
    """Convert offsets that give each code point a width; KeyError where one falls inside a code point."""
    places = list(enumerate(accumulate(widths, initial=0)))
    # Of code points without width a mention takes none: the last place of an offset begins it, the first one ends it.
    starts, ends = ({offset: place for place, offset in order} for order in (places, reversed(places)))
    return [tuple((starts[start], ends[end]) for start, end in parts) for parts in parts_of_mentions]


# How wide the code points of a text are where offsets are not code points.
OFFSET_UNITS: dict[str, Callable[[str], list[int]]] = {
    "utf-8 bytes": lambda text: [len(char.encode("utf-8")) for char in text],
    "utf-16 units": lambda text: [1 + (char > "\uffff") for char in text],
    "CRLF as one": lambda text: [int(text[i : i + 2] != "\r\n") for i in range(len(text))],
    "no byte order mark": lambda text: [int(char != BOM) for char in text],
}


def _close_gaps(parts: tuple[Span, ...], text: str) -> list[Span]:
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
