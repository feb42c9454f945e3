"""Knows how a record becomes token ids, once for training, greedy decoding and vLLM.

    prompt_ids = ids of ``<NER> Aspirin can ... | 0 Aspirin 8 can ...`` + [<TAG>]
    completion_ids = ids of `` 0-7 ; 20-34`` + [EOS]

Knows nothing of models, files or metrics. Offsets always refer to the record's own text, whatever the
rendering writes around it.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.prompt_format import PromptFormat, Rendering
from biomerge_lib.core.records import NER_PREFIX, Record
from biomerge_lib.core.spans import TAG, Span, format_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from biomerge_lib.prompts.plain_tokenizer import PlainTokenizer

    Tokenizer = PreTrainedTokenizerFast | PlainTokenizer

BATCH = 1000  # records tokenised at a time
IGNORE = -100
B_I_O = {"O": 0, "B": 1, "I": 2}
_SENTENCE_END = re.compile(r"[.!?][\"')\]}’”]*$")


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of one record.

    ``prompt_ids``: (P,), ends with ``<TAG>``. ``completion_ids``: (C,), ends with EOS.
    ``word_last_tokens``: for each word of the text the index in ``prompt_ids`` of its last token, the
    first position at which a causal model has read the whole word.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    words: list[Span]
    word_last_tokens: list[int]


def find_control(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds where in a text something begins that the tokenizer takes for one of its added tokens (``<TAG>``, EOS)."""
    added = sorted(tokenizer.get_added_vocab())
    tokens = (token for token in added if len(token) > 1 and not token.isspace())
    return re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in tokens))


def render(record: Record, prompt_format: PromptFormat, control: re.Pattern[str]) -> Rendering:
    """The record as the model sees it. A text is data: what :func:`find_control` finds in it is broken up by a space.

    ``see <TAG>`` becomes ``<NER> see < TAG>``.
    """
    said = prompt_format.render(record)
    if not (breaks := [match.end() for match in control.finditer(said.prompt, len(NER_PREFIX))]):
        return said
    pieces = [said.prompt[start:end] for start, end in pairwise([0, *breaks, len(said.prompt)])]
    moved = [
        (start + bisect_right(breaks, start), end + bisect_left(breaks, end))
        for start, end in said.rendered_words
    ]
    return replace(said, prompt=" ".join(pieces), rendered_words=moved)


def count_tokens(
    records: Sequence[Record], tokenizer: Tokenizer, prompt_format: PromptFormat
) -> list[tuple[int, int]]:
    """The lengths of each record's prompt and completion in token ids, in half the time of :func:`encode_many`."""
    lengths: list[tuple[int, int]] = []
    control = find_control(tokenizer)
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        prompts = tokenizer([render(record, prompt_format, control).prompt for record in batch])["input_ids"]
        completions = _tokenise_completions(batch, tokenizer)
        lengths += [(len(p) + 1, len(c) + 1) for p, c in zip(prompts, completions, strict=True)]
    return lengths


def encode_completion(spans: Iterable[Span], tokenizer: Tokenizer) -> list[int]:
    """Token ids of what the model must write after ``<TAG>``: `` 0-7 ; 20-34`` and EOS."""
    completion = _completion(spans)
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"] if completion else []
    return [*ids, tokenizer.eos_token_id]


def encode(record: Record, tokenizer: Tokenizer, prompt_format: PromptFormat) -> Encoding:
    """Token ids of one record, uncut; training, greedy decoding and vLLM take those of :func:`encode_chunks`."""
    return encode_many([record], tokenizer, prompt_format)[0]


def encode_many(
    records: Sequence[Record], tokenizer: Tokenizer, prompt_format: PromptFormat
) -> list[Encoding]:
    """What :func:`encode` gives for each record, in two calls of the tokenizer."""
    if not records:
        return []
    control = find_control(tokenizer)
    renderings = [render(record, prompt_format, control) for record in records]
    prompts = tokenizer([rendering.prompt for rendering in renderings], return_offsets_mapping=True)
    completions = _tokenise_completions(records, tokenizer)
    tag: Any = tokenizer.convert_tokens_to_ids(TAG)
    eos: Any = tokenizer.eos_token_id
    columns = zip(renderings, prompts["input_ids"], prompts["offset_mapping"], completions, strict=True)
    return [
        Encoding([*ids, tag], [*answer, eos], said.words, _last_tokens(offsets, said.rendered_words))
        for said, ids, offsets, answer in columns
    ]


def encode_chunks(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    *,
    max_target_tokens: int | None = None,
) -> Iterator[list[tuple[Chunk, Encoding]]]:
    """For each record its chunks (:func:`split_record`), one for most, with their token ids; tokenised in batches.

    Raises:
        DataError: a single word, or a single gold span, is longer than the limits allow.
    """
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        for record, encoding in zip(batch, encode_many(batch, tokenizer, prompt_format), strict=True):
            yield _split(record, encoding, tokenizer, prompt_format, max_target_tokens)


def word_labels(words: Sequence[Span], spans: Iterable[Span]) -> list[int]:
    """B/I/O label of each word: a word belongs to the first span that it overlaps.

    >>> word_labels([(0, 7), (8, 11), (12, 18)], [(0, 7), (12, 18)])
    [1, 0, 1]
    """
    labels = [B_I_O["O"]] * len(words)
    ordered = sorted(spans)
    current = 0
    begun = None
    for index, (start, end) in enumerate(words):
        while current < len(ordered) and ordered[current][1] <= start:
            current += 1
        if current < len(ordered) and ordered[current][0] < end:
            labels[index] = B_I_O["I"] if begun == current else B_I_O["B"]
            begun = current
    return labels


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a longer record: ``record.text == source.text[offset : offset + len(record.text)]``."""

    record: Record
    offset: int


def split_record(
    record: Record, tokenizer: Tokenizer, prompt_format: PromptFormat, *, max_target_tokens: int | None = None
) -> list[Chunk]:
    """Cut a record whose prompt is over ``max_input_tokens`` between words; otherwise ``[record]``.

    Cuts fall after a full stop where there is one near the middle, so that chunks are sentences where they can be.

    With ``max_target_tokens`` (training: the gold is known) the completion is held to its limit too and
    no cut goes through a gold span. Without it (evaluation) the gold does not influence the cuts.
    :func:`merge_chunks` is the inverse.

    Raises:
        DataError: a single word, or a single gold span, is longer than the limits allow.
    """
    encoding = encode(record, tokenizer, prompt_format)
    return [chunk for chunk, _ in _split(record, encoding, tokenizer, prompt_format, max_target_tokens)]


def _split(
    record: Record,
    encoding: Encoding,
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    max_target_tokens: int | None,
) -> list[tuple[Chunk, Encoding]]:
    use_gold = max_target_tokens is not None
    pieces: list[tuple[Chunk, Encoding]] = []
    todo = [(Chunk(record, 0), encoding)]
    while todo:
        chunk, encoding = todo.pop()
        is_short = len(encoding.prompt_ids) <= prompt_format.max_input_tokens
        if is_short and (max_target_tokens is None or len(encoding.completion_ids) <= max_target_tokens):
            pieces.append((chunk, encoding))
            continue
        cut = _middle_cut(chunk.record, encoding.words, keep_spans=use_gold)
        if cut is None:
            or_target = f" or max_target_tokens ({max_target_tokens})" if use_gold else ""
            raise DataError(
                f"{record.dataset}/{record.doc_id}: {chunk.record.text[:60]!r} needs {len(encoding.prompt_ids)} prompt "
                f"and {len(encoding.completion_ids)} target tokens and cannot be cut between words or gold spans. "
                f"Raise max_input_tokens ({prompt_format.max_input_tokens}){or_target}."
            )
        halves = [_slice(chunk, cut, len(chunk.record.text)), _slice(chunk, 0, cut)]
        encodings = encode_many([half.record for half in halves], tokenizer, prompt_format)
        todo += zip(halves, encodings, strict=True)
    return pieces


def find_cut_spans(record: Record, chunks: Sequence[Chunk]) -> list[Span]:
    """The record's gold spans that no chunk holds whole: evaluation cuts without looking at the gold.

    They stay in the record's gold, so an answer cannot find them.
    """
    cuts = [chunk.offset for chunk in chunks[1:]]
    return [(start, end) for start, end in record.spans if any(start < cut < end for cut in cuts)]


def merge_chunks(chunks: Sequence[Chunk], spans_per_chunk: Sequence[Iterable[Span]]) -> list[Span]:
    """Map spans found in chunks back to the offsets of the text they were cut from, sorted."""
    both = zip(chunks, spans_per_chunk, strict=True)
    return sorted({(start + c.offset, end + c.offset) for c, spans in both for start, end in spans})


def _tokenise_completions(records: Sequence[Record], tokenizer: Tokenizer) -> list[list[int]]:
    """Without EOS; a record without spans has an empty one."""
    return tokenizer([_completion(record.spans) for record in records], add_special_tokens=False)["input_ids"]


def _completion(spans: Iterable[Span]) -> str:
    return format_spans(spans).removeprefix(TAG)


def _middle_cut(record: Record, words: list[Span], *, keep_spans: bool) -> int | None:
    """The word start nearest to the middle that cuts no gold span (halving keeps chunks of even length).

    A start after a sentence's end is taken if there is one in the middle half.
    """
    text = record.text
    middle, quarter = len(text) / 2, len(text) / 4
    cuts, after_sentence, inside_words = [], [], []
    spans, reach = deque(sorted(record.spans) if keep_spans else ()), 0
    for (before, before_end), (start, _) in pairwise(words):
        while spans and spans[0][0] < start:
            reach = max(reach, spans.popleft()[1])
        if start < reach:
            continue
        if start == before_end:
            inside_words.append(start)
            continue
        cuts.append(start)
        if abs(start - middle) <= quarter and _SENTENCE_END.search(text, before, before_end):
            after_sentence.append(start)
    return min(after_sentence or cuts or inside_words, key=lambda cut: abs(cut - middle), default=None)


def _slice(chunk: Chunk, start: int, end: int) -> Chunk:
    record = chunk.record
    inside = tuple((s - start, e - start) for s, e in record.spans if start <= s and e <= end)
    return Chunk(replace(record, text=record.text[start:end], spans=inside, types=()), chunk.offset + start)


def _last_tokens(token_offsets: Sequence[Span], rendered_words: Sequence[Span]) -> list[int]:
    """The last token that begins before each word's end; one that straddles two words is the last of both."""
    starts = [start for start, _ in token_offsets]
    return [bisect_left(starts, end) - 1 for _, end in rendered_words]
