r"""Knows how found mentions are written so that the readers read them back; knows nothing of models.

    Tagged --[write_jsonl | write_iob | write_brat]--> what iter_records, read_iob and read_brat read

Every writer takes a stream, in which a long text may come in parts, and writes what it has before it asks for more:
write_iob each part, the others each text (what there is of it, when the stream is interrupted).
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import TextIO

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.prompt_format import find_pieces, find_words
from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import FoundMention, Span
from biomerge_lib.corpora.documents import UNTYPED
from biomerge_lib.corpora.sentences import find_sentences, join_cut

log = logging.getLogger("biomerge")


@dataclass(frozen=True, slots=True)
class Tagged:
    """A text, or the part of one that begins at ``start``, with its sorted spans as offsets in ``text``.

    ``scores`` are the spans' probabilities; empty where none is known.
    """

    doc_id: str
    text: str
    spans: Sequence[Span]
    start: int = 0
    is_last: bool = True
    scores: Sequence[float | None] = ()


def join_parts(tagged: Iterable[Tagged]) -> Iterator[Tagged]:
    """Whole texts; when the user interrupts, first what there is of the text in hand."""
    parts: list[Tagged] = []
    try:
        for part in tagged:
            parts.append(part)
            if part.is_last:
                yield _join(parts)
                parts = []
    except KeyboardInterrupt:
        if parts and not parts[-1].is_last:
            cut = _join(parts)
            log.warning("%s: only its first %s characters were read", cut.doc_id, f"{len(cut.text):,}")
            yield cut
        raise


def _join(parts: Sequence[Tagged]) -> Tagged:
    spans = [(part.start + start, part.start + end) for part in parts for start, end in part.spans]
    scores = tuple(score for part in parts for score in part.scores)
    return Tagged(parts[0].doc_id, "".join(part.text for part in parts), spans, scores=scores)


def write_jsonl(tagged: Iterable[Tagged], out: TextIO) -> None:
    """One record a text, the project's JSONL, with the text itself and its mentions, whose offsets are the text's.

    ``{"task": "NER", "input": "<NER> Aspirin can", "target": "<TAG> 0-7", "doc_id": "d", "dataset": "predicted",
    "text": "Aspirin can", "mentions": [{"start": 0, "end": 7, "text": "Aspirin", "score": 0.98}]}``
    """
    for text in join_parts(tagged):
        record = Record(text.text, tuple(text.spans), text.doc_id, "predicted")
        scores = text.scores or [None] * len(text.spans)
        mentions = [
            FoundMention(start, end, text.text[start:end], score)._asdict()
            for (start, end), score in zip(text.spans, scores, strict=True)
        ]
        fields = json.loads(record.to_json()) | {"text": text.text, "mentions": mentions}
        print(json.dumps(fields, ensure_ascii=False), file=out, flush=True)


def write_iob(tagged: Iterable[Tagged], out: TextIO, *, spaced: bool = True) -> None:
    r"""CoNLL: ``token<TAB>start<TAB>end<TAB>tag`` lines, IOB2 tags, offsets in the text, a blank line after a sentence.

    ``-DOCSTART- (doc_id)`` begins a text. ``spaced`` sets punctuation apart; either way a token also ends where a
    span does. IOB cannot say that spans overlap: of two that do, the longer one is written and the other counted in a
    warning.
    """
    for text in tagged:
        spans = keep_longest(text.spans)
        if len(spans) < len(text.spans):
            lost = len(text.spans) - len(spans)
            log.warning("%s: %d overlapping mentions cannot be written as IOB", text.doc_id, lost)
        if not text.start:
            print(f"-DOCSTART- ({' '.join(text.doc_id.split()) or 'text'})\n", file=out)
        for start, end in join_cut(find_sentences(text.text), spans):
            for (first, last), tag in _tag_tokens(text.text, (start, end), spans, spaced):
                print(text.text[first:last], text.start + first, text.start + last, tag, sep="\t", file=out)
            print(file=out, flush=True)


def write_brat(tagged: Iterable[Tagged], folder: Path | str) -> None:
    """BRAT: ``NAME.txt``, the text to the character, and ``NAME.ann`` for each text; of one name the second is NAME-2.

    A span that goes over a line break is written as one part a line, as BRAT wants it.

    Raises:
        DataError: a file is there already. Gold annotations are never overwritten.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for text in join_parts(tagged):
        own = re.sub(r"[^\w.-]+", "_", text.doc_id).lstrip(".") or "text"
        name = next(name for n in count(1) if (name := own if n == 1 else f"{own}-{n}") not in seen)
        seen.add(name)
        for ending, content in ((".txt", text.text), (".ann", "".join(_brat_lines(text)))):
            try:
                with (folder / f"{name}{ending}").open("x", encoding="utf-8", newline="") as out:
                    out.write(content)
            except FileExistsError:
                there = "is there already and is not overwritten; name another --out."
                raise DataError(f"{folder / name}{ending} {there}") from None


def keep_longest(spans: Iterable[Span]) -> list[Span]:
    """Sorted spans without overlaps; of two that overlap the longer one stays, of equally long ones the first.

    >>> keep_longest([(0, 4), (0, 9), (10, 12)])
    [(0, 9), (10, 12)]
    """
    kept: list[Span] = []  # sorted, and apart from each other
    for start, end in sorted(set(spans), key=lambda span: (span[0] - span[1], span)):
        place = bisect_left(kept, (start, end))
        before_is_apart = place == 0 or kept[place - 1][1] <= start
        if before_is_apart and (place == len(kept) or end <= kept[place][0]):
            kept.insert(place, (start, end))
    return kept


def _tag_tokens(text: str, sentence: Span, spans: Sequence[Span], spaced: bool) -> Iterator[tuple[Span, str]]:
    """The tokens of a sentence with their tags; a token is cut where a span begins or ends inside it."""
    first, last = sentence
    inside = spans[bisect_left(spans, (first, first)) : bisect_left(spans, (last, last))]
    edges = sorted({position for span in inside for position in span})
    starts = {span[0] for span in inside}
    find = find_pieces if spaced else find_words
    for start, end in find(text[first:last]):
        start, end = start + first, end + first
        cuts = [start, *(edge for edge in edges if start < edge < end), end]
        for left, right in pairwise(cuts):
            is_inside = any(a <= left < b for a, b in inside)
            prefix = "B-" if left in starts else "I-"
            yield (left, right), f"{prefix}{UNTYPED}" if is_inside else "O"


def _brat_lines(text: Tagged) -> Iterator[str]:
    for number, (start, end) in enumerate(text.spans, start=1):
        parts = [match.span() for match in re.finditer(r"[^\r\n]+", text.text[start:end])]
        offsets = ";".join(f"{a + start} {b + start}" for a, b in parts)
        words = " ".join(text.text[start:end].split())
        yield f"T{number}\t{UNTYPED} {offsets}\t{words}\n"
