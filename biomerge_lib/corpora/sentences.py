"""Knows where a document's sentences end and cuts it there, its spans with it; knows nothing of files or prompts.

A sentence is the document's own characters without the white space at its edges, so that offsets only shift. A line
break always ends a sentence (titles, headings, paragraphs; no sentence of AnatEM or BC5CDR goes over one), except
that a mention is never cut: the sentences that a mention touches become one (``boundaries_joined`` counts the ends
that went), and a line break inside it stays in the text as it is.

The splitter is segtok: rules, no model to download, exact substrings; docs/corpora.md compares it with others.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from segtok.segmenter import split_multi

from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import Span
from biomerge_lib.corpora.documents import Document, ReadCounts, trim

# Of a line, what segtok sees at a time: its time grows with the square of a sentence. Also the longest sentence.
WINDOW = 4000
_SPACE = re.compile(r"\s")


def split_document(
    document: Document, spans: Mapping[Span, str], *, dataset: str, sentence_split: str, counts: ReadCounts
) -> Iterator[Record]:
    """The document's sentences as records; ``spans`` (with types) are sorted and have no white space at their edges.

    ``sentence_split``: ``segtok``, ``lines`` (every line is a sentence) or ``document`` (no cut at all). A document
    that is a sentence already stays one.
    """
    propose = find_document if document.is_sentence else SPLITTERS[sentence_split]
    proposed = propose(document.text)
    sentences = join_cut(proposed, list(spans))
    counts.boundaries_joined += len(proposed) - len(sentences)
    counts.sentences += len(sentences)
    left = deque(spans.items())
    for start, end in sentences:
        inside = {}
        while left and left[0][0][0] < end:
            (span_start, span_end), kind = left.popleft()
            inside[span_start - start, span_end - start] = kind
        types = tuple(inside.values())
        yield Record(document.text[start:end], tuple(inside), document.doc_id, dataset, types=types)


def join_cut(sentences: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """Join the sentences that a span goes across.

    >>> join_cut([(0, 5), (6, 9), (10, 20)], [(3, 8), (12, 14)])
    [(0, 9), (10, 20)]
    """
    starts = [start for start, _ in sentences]
    joined_to_next: set[int] = set()
    for start, end in spans:
        joined_to_next.update(range(bisect_right(starts, start) - 1, bisect_right(starts, end - 1) - 1))
    joined: list[Span] = []
    for index, (start, end) in enumerate(sentences):
        if index - 1 in joined_to_next:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def find_sentences(text: str) -> list[Span]:
    """The sentences of a text, by segtok within each line, without white space at their edges.

    >>> find_sentences("IL-2 (cf. Fig. 1) rose. It fell.")
    [(0, 23), (24, 32)]
    """
    return list(iter_sentences(text))


def iter_sentences(text: str) -> Iterator[Span]:
    """:func:`find_sentences` one at a time: megabytes take seconds."""
    for position, line_end in find_lines(text):
        while position < line_end:
            space = _SPACE.search(text, min(position + WINDOW, line_end), line_end)
            seen = space.end() if space else line_end
            found = [sentence for sentence in split_multi(text[position:seen]) if sentence]
            # What is cut off may belong to the last one, and by its brackets to the one before.
            if seen < line_end:
                found = found[:-2] or found[:1]
            for sentence in found:  # segtok strips its sentences and changes nothing else
                start = text.index(sentence, position, line_end)
                position = start + len(sentence)
                yield start, position
            if not found:
                position = seen


def find_lines(text: str) -> list[Span]:
    """The lines of a text that are not blank, without white space at their edges."""
    lines = (trim(text, *line.span()) for line in re.finditer(r"[^\r\n]+", text))
    return [(start, end) for start, end in lines if start < end]


def find_document(text: str) -> list[Span]:
    """The whole text without white space at its edges; nothing for a blank one."""
    start, end = trim(text, 0, len(text))
    return [(start, end)] if start < end else []


SPLITTERS: dict[str, Callable[[str], list[Span]]] = {
    "segtok": find_sentences,
    "lines": find_lines,
    "document": find_document,
}
