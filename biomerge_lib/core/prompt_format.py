"""Knows how a record is written as a prompt; knows nothing of tokens, models or files.

    Aspirin can ... --[PromptFormat.render]--> <NER> Aspirin can ... | 0 Aspirin 8 can ...

Offsets always refer to the text itself, whatever is written around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from biomerge_lib.core.records import NER_PREFIX, Record
from biomerge_lib.core.spans import Span

# Measured without gain (reports/learning.md): a model that was trained with one is refused by name.
GONE_STYLES = ("start_end", "start_colon", "start_before_space", "echo_start_before_space")
_WORD = re.compile(r"\S+")
_PIECE = re.compile(r"[^\W_]+|\S")


@dataclass(frozen=True, slots=True)
class Rendering:
    """A prompt string and where the text's words stand in it.

    ``words[i]`` is a word's ``(start, end)`` in the record's text, ``rendered_words[i]`` the same word's
    ``(start, end)`` in ``prompt``.
    """

    prompt: str
    words: list[Span]
    rendered_words: list[Span]


def find_words(text: str) -> list[Span]:
    """The ``(start, end)`` of the white-space separated words of a text.

    >>> find_words("Aspirin can")
    [(0, 7), (8, 11)]
    """
    return [match.span() for match in _WORD.finditer(text)]


def find_pieces(text: str) -> list[Span]:
    """The words cut at their punctuation, for texts that are not tokenised: runs of letters and digits, single signs.

    >>> find_pieces("(Aspirin), β-blocker")
    [(0, 1), (1, 8), (8, 9), (9, 10), (11, 12), (12, 13), (13, 20)]
    """
    return [match.span() for match in _PIECE.finditer(text)]


def _write_plain(head: str, text: str) -> Rendering:
    """The sentence to the character, but for white space at its end."""
    words, shift = find_words(text), len(head)
    return Rendering(head + text.rstrip(), words, [(start + shift, end + shift) for start, end in words])


def _write_anchored(head: str, text: str, find: Callable[[str], list[Span]] = find_words) -> Rendering:
    """Each word after its start offset, so that the model copies offsets instead of counting characters."""
    words = find(text)
    parts, rendered, position = [], [], len(head)
    for start, end in words:
        parts.append(f"{start} {text[start:end]}")
        position += len(parts[-1])
        rendered.append((position - (end - start), position))
        position += 1
    return Rendering(head + " ".join(parts), words, rendered)


def _write_twice(head: str, text: str, find: Callable[[str], list[Span]] = find_words) -> Rendering:
    """The plain sentence, then the anchored one: a causal model reads every anchored word knowing the whole sentence.

    The echo of Springer et al. 2024, "Repetition improves language model embeddings".
    """
    return _write_anchored(f"{head}{text.rstrip()} | ", text, find)


class Style(NamedTuple):
    """How a text is written after a prompt's head, how often it stands there, and which of its words have offsets."""

    write: Callable[[str, str], Rendering]
    texts: int
    anchored: Callable[[str], list[Any]] | None = None


STYLES = {
    "none": Style(_write_plain, texts=1),
    "start": Style(_write_anchored, texts=1, anchored=str.split),
    "echo_start": Style(_write_twice, texts=2, anchored=str.split),
    # Mentions of a text that is not tokenised end at pieces of its words.
    "echo_pieces": Style(partial(_write_twice, find=find_pieces), texts=2, anchored=find_pieces),
}
ANCHOR_STYLES = tuple(STYLES)


def check_style(style: str) -> str:
    """The style, where it is one of ``ANCHOR_STYLES``.

    Raises:
        ValueError: it is not, or no longer.
    """
    if style in GONE_STYLES:
        raise ValueError(
            f"the anchor style {style!r} was removed, as it gained nothing: train anew with one of "
            f"{', '.join(STYLES)} (or use the commit that a run's metrics.json names)."
        )
    if style not in ANCHOR_STYLES:
        raise ValueError(f"{style!r} is none of {', '.join(STYLES)}.")
    return style


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a record becomes a prompt: what a model was trained with and must be asked with.

    A prompt of more than ``max_input_tokens`` is cut into several. How long a target may be is no part of it: that
    shapes examples of training alone, and gold may not shape a prompt that is scored.

    >>> prompt_format = PromptFormat(offset_anchors="start", corpus_cue=True, max_input_tokens=512)
    >>> prompt_format.render(Record("Aspirin can", (), "doc", "bc5cdr")).prompt
    '<NER> bc5cdr | 0 Aspirin 8 can'
    """

    offset_anchors: str
    corpus_cue: bool
    max_input_tokens: int

    def __post_init__(self) -> None:
        check_style(self.offset_anchors)

    @property
    def sets_apart(self) -> bool:
        """Whether punctuation of raw texts is set apart for the model: not where pieces of words have offsets."""
        return STYLES[self.offset_anchors].anchored is not find_pieces

    def cue(self, record: Record) -> str | None:
        """The corpus whose annotation policy is wanted: the record's cue, else its data set; None without cues."""
        return (record.cue or record.dataset) if self.corpus_cue else None

    def render(self, record: Record) -> Rendering:
        """Write a record as the model sees it (without the closing ``<TAG>``)."""
        cue = self.cue(record)
        head = NER_PREFIX + (f"{cue} | " if cue else "")
        return STYLES[self.offset_anchors].write(head, record.text)

    def most_bytes(self, record: Record, *, text_size: int | None = None) -> int:
        """At least as many as the prompt has bytes, without rendering it: a bound of its tokens (but for BOS).

        With the text's number of tokens as ``text_size`` a closer one.
        """
        _, texts, anchored = STYLES[self.offset_anchors]
        cue, text = self.cue(record), record.text
        plain = len(text) if text.isascii() else len(text.encode())
        plain = plain if text_size is None else text_size
        size = len(NER_PREFIX) + (len(cue.encode()) + 3 if cue else 0) + texts * (plain + 3) - 3
        return size + (len(anchored(text)) * (len(str(len(text))) + 2) if anchored else 0)
