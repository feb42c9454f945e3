"""Knows how raw texts get their mentions: sentences, words apart as in the corpora, a model's answers, offsets back.

    texts --[iter_sentences, find_tokens]--> records --[prompts, greedy decoding | vLLM]--> spans of each text

Knows nothing of files, gold spans or scores.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from biomerge_lib.apply.ready_models import ask_server, decode_here, find_manifest, find_model
from biomerge_lib.core.errors import DataError, ParameterError
from biomerge_lib.core.prompt_format import PromptFormat, find_words
from biomerge_lib.core.punctuation import find_tokens, map_back
from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import FoundMention, Span, is_inside
from biomerge_lib.corpora.sentences import iter_sentences
from biomerge_lib.decoding.predictions import Prompt, RawAnswer, build_prompts, collect_predictions

_SPACE = re.compile(r"\s*")
# The first answers come soon: so many sentences are asked at first, then this times as many.
FIRST, GROWTH = 4, 4
_Found = dict[Span, float | None]  # spans of a sentence, with their probabilities
log = logging.getLogger("biomerge")


@dataclass(frozen=True, slots=True)
class Part:
    """The sorted mentions between ``start`` and ``end`` of a text, with offsets in that text."""

    start: int
    end: int
    mentions: list[FoundMention]
    is_last: bool


@dataclass(slots=True)
class _Open:
    """A text whose sentences are being answered; ``found`` is what was found since ``given``, its last part's end."""

    text: str
    found: list[FoundMention] = field(default_factory=list)
    waiting: int = 0
    is_read: bool = False
    answered: int = 0
    given: int = 0


@dataclass(frozen=True, slots=True)
class Tagger:
    """A model that can be asked: its tokenizer, its prompts, and who answers ``at_once`` of them."""

    tokenizer: Any
    prompt_format: PromptFormat
    cues: dict[str, Any] | None
    answer: Callable[[list[Prompt]], list[RawAnswer]]
    at_once: int = 64

    def predict(self, texts: str | Iterable[str], **options: Any) -> list:
        """The mentions of a text, or a list for each of several; ``options`` are those of :meth:`find_parts`.

        A mention has ``start``, ``end``, ``text`` and ``score``, its probability.
        """
        found = list(self.pipe([texts] if isinstance(texts, str) else texts, **options))
        return found[0] if isinstance(texts, str) else found

    def pipe(self, texts: Iterable[str], **options: Any) -> Iterator[list[FoundMention]]:
        """:meth:`predict` of texts that come one by one: memory holds a batch of them."""
        mentions: list[FoundMention] = []
        for part in self.find_parts(texts, **options):
            mentions += part.mentions
            if part.is_last:
                yield mentions
                mentions = []

    def find_parts(
        self,
        texts: Iterable[str],
        *,
        threshold: float | None = None,
        spaced: bool | None = None,
        note: Callable[[int], object] | None = None,
    ) -> Iterator[Part]:
        """The mentions of each text, in order, as far as they are known: a long text comes in many parts.

        Sentences of many texts share a batch; after each batch, what it has answered is given out, and memory holds
        no more texts than that. Parts end between sentences, and those of a text make up the whole of it. ``spaced``
        sets punctuation apart for the model, as tokenised corpora have it (None: unless it is shown offsets inside
        words, ``echo_pieces``); spans are mapped back either way. Answers that point outside a sentence are left out,
        and with a ``threshold`` those of a lower score. ``note`` is called with the number of characters that each
        batch has answered.

        Raises:
            TypeError: a text is no string.
            ParameterError: the threshold is no probability.
            DataError: a text has lone surrogates; a threshold, and a server that gives no probabilities.
            ServerError: a vLLM server cannot be reached or refuses.
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise ParameterError(f"threshold={threshold} is no probability: give one from 0 to 1.")
        spaced = self.prompt_format.sets_apart if spaced is None else spaced
        queue: deque[_Open] = deque()
        batch: list[tuple[_Open, Span]] = []
        at_once = min(FIRST, self.at_once)
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str):
                raise TypeError(f"text {number} is no string: {text!r:.60}")
            if re.search("[\ud800-\udfff]", text):
                raise DataError(f"text {number} is not Unicode (lone surrogates): {text!r:.60}")
            queue.append(_Open(text))
            for sentence in iter_sentences(text):
                queue[-1].waiting += 1
                batch.append((queue[-1], sentence))
                if len(batch) == at_once:
                    self._answer(batch, note, spaced=spaced, threshold=threshold)
                    batch = []
                    at_once = min(GROWTH * at_once, self.at_once)
                    yield from _take_parts(queue)
            queue[-1].is_read = True
            yield from _take_parts(queue)
        self._answer(batch, note, spaced=spaced, threshold=threshold)
        yield from _take_parts(queue)

    def _answer(
        self, batch: Sequence[tuple[_Open, Span]], note: Callable[[int], object] | None, **how: Any
    ) -> None:
        sentences = [item.text[start:end] for item, (start, end) in batch]
        for (item, (start, end)), found in zip(batch, self._ask(sentences, **how), strict=True):
            for (first, last), score in sorted(found.items()):
                words = item.text[start + first : start + last]
                item.found.append(FoundMention(start + first, start + last, words, score))
            item.waiting -= 1
            item.answered = end
        if note and batch:
            note(sum(map(len, sentences)))

    def _ask(self, sentences: Sequence[str], *, spaced: bool, threshold: float | None) -> Iterator[_Found]:
        pieces = [find_tokens(sentence) if spaced else find_words(sentence) for sentence in sentences]
        shown = [
            " ".join(sentence[a:b] for a, b in words) if spaced else sentence
            for sentence, words in zip(sentences, pieces, strict=True)
        ]
        records = [Record(text, (), "text", "text") for text in shown]
        if self.cues:
            from biomerge_lib.prompts.ner_span import cue_record

            records = [cue_record(record, **self.cues) for record in records]
        prompts = [prompt for index, record in enumerate(records) for prompt in self._prompts(index, record)]
        answers = self.answer(prompts) if prompts else []
        predictions = collect_predictions(records, prompts, answers, span_threshold=threshold)
        for prediction, words in zip(predictions, pieces, strict=True):
            found: _Found = {}
            scores: Sequence[float | None] = prediction.probabilities or [None] * len(prediction.pred)
            for span, score in zip(prediction.pred, scores, strict=True):
                if is_inside(span, len(prediction.text)):
                    place = map_back(span, words) if spaced else span
                    found[place] = max(filter(None, (score, found.get(place))), default=score)
            yield {(start, end): score for (start, end), score in found.items() if start < end}

    def _prompts(self, index: int, record: Record) -> list[Prompt]:
        try:
            prompts = build_prompts([record], self.tokenizer, self.prompt_format)
        except DataError:  # only where punctuation stays at its words
            limit = self.prompt_format.max_input_tokens
            log.warning("a word over %d tokens is left out with its sentence: %r", limit, record.text[:60])
            return []
        return [replace(prompt, record_index=index) for prompt in prompts]


def _take_parts(queue: deque[_Open]) -> Iterator[Part]:
    """What is known and not given yet: finished texts, which leave the queue, and the first part of the next one."""
    while queue and queue[0].is_read and not queue[0].waiting:
        item = queue.popleft()
        yield Part(item.given, len(item.text), item.found, is_last=True)
    if queue and queue[0].answered > queue[0].given:
        item = queue[0]
        space = _SPACE.match(item.text, item.answered)
        end = space.end() if space else item.answered
        yield Part(item.given, end, item.found, is_last=False)
        item.given, item.found = end, []


def load_tagger(
    *,
    adapter: Path | str | None = None,
    model: Path | str | None = None,
    base_url: str | None = None,
    cue: str | None = None,
    batch_size: int = 16,
) -> Tagger:
    """The shipped adapter, another ``adapter`` folder, or a ``model`` (run folder or merged model).

    With ``base_url`` a running vLLM server answers, and the folder only says how to ask it. ``cue`` names the corpus
    whose annotation policy is wanted, for a model that knows several.

    Raises:
        DataError, ModelError: no model or adapter in the folder.
        ParameterError: the model knows no such cue.
        ServerError: the server cannot be reached.
    """
    manifest = find_manifest(adapter=adapter, model=model)
    cues = manifest.cue_options(cue)  # refused before anything is merged
    folder = find_model(adapter=adapter, model=model)
    new_tokens, prompt_format = manifest.max_new_tokens, manifest.prompt_format
    if base_url:
        tokenizer, answer = ask_server(folder, base_url, max_new_tokens=new_tokens)
        return Tagger(tokenizer, prompt_format, cues, answer, at_once=512)
    tokenizer, answer = decode_here(folder, max_new_tokens=new_tokens, batch_size=batch_size)
    # Two batches at a time can be sorted by length; more would be lost to an interrupt.
    return Tagger(tokenizer, prompt_format, cues, answer, at_once=2 * batch_size)
