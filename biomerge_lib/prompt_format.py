"""Knows how a text is written as a prompt; knows nothing of tokens, models or files.

    Aspirin can ... --[render]--> <NER> Aspirin can ... | 0 Aspirin 8 can ...

Offsets always refer to the text itself, whatever is written around it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from biomerge_lib.records import NER_PREFIX
from biomerge_lib.spans import Span

ANCHOR_STYLES = ("none", "start", "echo_start")
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


def check_style(style: str) -> str:
    """The style, where it is one of ``ANCHOR_STYLES``.

    Raises:
        ValueError: it is not, or no longer.
    """
    if style in GONE_STYLES:
        raise ValueError(
            f"the anchor style {style!r} was removed, as it gained nothing: train anew with one of "
            f"{', '.join(ANCHOR_STYLES)} (or use the commit that a run's metrics.json names)."
        )
    if style not in ANCHOR_STYLES:
        raise ValueError(f"{style!r} is none of {', '.join(ANCHOR_STYLES)}.")
    return style


def render(text: str, *, offset_anchors: str, cue: str | None = None) -> Rendering:
    """Write a text as the model sees it (without the closing ``<TAG>``).

    ``none`` is the plain sentence, to the character (but for white space at its end). ``start`` writes each
    word's start offset before it, so that the model copies offsets instead of counting characters. ``echo_start``
    writes the plain sentence first and the anchored one after it: a causal model then reads every anchored word knowing
    the whole sentence (the echo of Springer et al. 2024, "Repetition improves language model embeddings"). ``cue``
    names the corpus whose annotation policy is wanted.

    >>> render("Aspirin can", offset_anchors="start", cue="bc5cdr").prompt
    '<NER> bc5cdr | 0 Aspirin 8 can'
    """
    check_style(offset_anchors)
    words = find_words(text)
    head = NER_PREFIX + (f"{cue} | " if cue else "")
    plain = text.rstrip()  # a chunk ends where the next word starts, a sentence ends with its last word
    if offset_anchors == "none":
        shift = len(head)
        return Rendering(head + plain, words, [(start + shift, end + shift) for start, end in words])
    if offset_anchors == "echo_start":
        head += f"{plain} | "
    parts, rendered, position, gap = [head], [], len(head), ""
    for start, end in words:
        before = f"{gap}{start} "
        rendered.append((position + len(before), position + len(before) + end - start))
        parts += [before, text[start:end]]
        position += len(before) + end - start
        gap = " "
    return Rendering("".join(parts), words, rendered)


def prompt_bytes(text: str, *, offset_anchors: str, cue: str | None = None) -> int:
    """At least as many as the rendered prompt has bytes, without rendering it: a bound of its tokens (but for BOS).

    >>> prompt_bytes("Aspirin can", offset_anchors="none")
    17
    """
    plain = len(text) if text.isascii() else len(text.encode())
    size = len(NER_PREFIX) + (len(cue.encode()) + 3 if cue else 0) + plain
    if offset_anchors == "none":
        return size
    anchor = len(str(len(text))) + 2
    echo = plain + 3 if offset_anchors == "echo_start" else 0
    return size + echo + len(text.split()) * anchor
