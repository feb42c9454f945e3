"""Knows how raw texts get their mentions: sentences, words apart as in the corpora, a model's answers, offsets back.

    text --[find_sentences, space_words]--> records --[prompts, greedy decoding | vLLM]--> spans of the text

Knows nothing of gold spans or scores.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from biomerge_lib.errors import DataError
from biomerge_lib.ner_span import cue_record
from biomerge_lib.predictions import Prompt, RawAnswer, build_prompts, collect_predictions
from biomerge_lib.prompt import find_words
from biomerge_lib.records import Record
from biomerge_lib.sentences import find_sentences
from biomerge_lib.spans import Span, is_inside

SHIPPED = Path(__file__).parent / "adapters" / "bc5cdr-smollm2-135m"
SENTENCES_AT_ONCE = 256
_PIECE = re.compile(r"[^\W_]+|[^\w\s]|_")
_LATIN_OR_GREEK = re.compile(r"[A-Za-zÀ-ɏͰ-Ͽ]")
log = logging.getLogger("biomerge")


@dataclass(frozen=True, slots=True)
class Tagger:
    """A model that can be asked: its tokenizer, how its prompts are rendered, and who answers them."""

    tokenizer: Any
    rendering: dict[str, Any]
    cues: dict[str, Any] | None
    answer: Callable[[list[Prompt]], list[RawAnswer]]

    def find_mentions(self, texts: Sequence[str], *, spaced: bool = True) -> Iterator[list[Span]]:
        """The mentions of each text, in order, as sorted offsets in that text; long texts go in batches.

        ``spaced`` sets punctuation apart for the model, as the corpora it was trained on have it; spans are mapped
        back either way. Answers that point outside a sentence are left out.

        Raises:
            DataError: a word alone is over the model's limit.
            ServerError: a vLLM server cannot be reached or refuses.
        """
        for text in texts:
            _warn_about(text)
            sentences = iter(find_sentences(text))
            found: list[Span] = []
            while batch := list(islice(sentences, SENTENCES_AT_ONCE)):
                for (start, _), spans in zip(batch, self._ask(text, batch, spaced), strict=True):
                    found += [(first + start, last + start) for first, last in spans]
            yield sorted(set(found))

    def _ask(self, text: str, sentences: Sequence[Span], spaced: bool) -> Iterator[list[Span]]:
        words = [find_pieces(text[start:end], spaced=spaced) for start, end in sentences]
        records = []
        for (start, end), pieces in zip(sentences, words, strict=True):
            sentence = text[start:end]
            shown = " ".join(sentence[a:b] for a, b in pieces) if spaced else sentence
            records.append(Record(shown, (), "text", "text"))
        if self.cues:
            records = [cue_record(record, **self.cues) for record in records]
        options = {
            name: self.rendering[name] for name in ("offset_anchors", "corpus_cue", "max_input_tokens")
        }
        prompts = build_prompts(records, self.tokenizer, **options)
        for prediction, pieces in zip(
            collect_predictions(records, prompts, self.answer(prompts)), words, strict=True
        ):
            inside = [span for span in prediction.pred if is_inside(span, len(prediction.text))]
            yield [map_back(span, pieces) for span in inside] if spaced else inside


def find_pieces(sentence: str, *, spaced: bool) -> list[Span]:
    """The words that the model is shown; with ``spaced`` each sign of punctuation is one of its own.

    >>> find_pieces("asthma attacks.", spaced=True)
    [(0, 6), (7, 14), (14, 15)]
    """
    return [match.span() for match in _PIECE.finditer(sentence)] if spaced else find_words(sentence)


def map_back(span: Span, pieces: Sequence[Span]) -> Span:
    """A span of the pieces joined by single spaces, as a span of the sentence that they were found in.

    >>> map_back((7, 14), [(0, 6), (7, 14), (14, 15)])
    (7, 14)
    >>> map_back((15, 16), [(0, 6), (7, 14), (14, 15)])
    (14, 15)
    """
    start, end = span
    sources: list[int] = []  # the sentence's character behind each shown one inside the span
    position = 0
    for first, last in pieces:
        sources += range(first + max(0, start - position), first + max(0, min(end - position, last - first)))
        position += last - first + 1
        if position >= end:
            break
    # A span of nothing but the space between two pieces points at where they meet.
    return (sources[0], sources[-1] + 1) if sources else (0, 0)


def load_tagger(
    *,
    adapter: Path | str | None = None,
    model: Path | str | None = None,
    base_url: str | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
) -> Tagger:
    """The shipped adapter, another ``adapter`` folder, or a ``model`` (run folder or merged model).

    With ``base_url`` a running vLLM server answers, and the folder only says how to ask it. An adapter's backbone is
    prepared on first use and kept.

    Raises:
        ModelError: no model or adapter in the folder.
        ServerError: the server cannot be reached.
    """
    from biomerge_lib.eval_vllm import read_cues, read_model_folder

    if model is not None:
        folder, rendering = read_model_folder(Path(model))
        described = folder
    else:
        described = Path(adapter or SHIPPED)
        rendering = read_rendering(described)
        folder = prepare_folder(rendering["backbone"])
    cues = read_cues(described) if rendering["corpus_cue"] else None
    if base_url:
        tokenizer, answer = _serve(folder, base_url, rendering["max_new_tokens"])
    else:
        tokenizer, answer = _decode(folder, described, rendering["max_new_tokens"], batch_size, dtype)
    return Tagger(tokenizer, rendering, cues, answer)


def read_rendering(adapter: Path) -> dict[str, Any]:
    """What ``biomerge.json`` of an exported adapter says.

    Raises:
        DataError: it is missing.
    """
    path = adapter / "biomerge.json"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. `python -m biomerge_lib export-adapter RUN OUT` writes adapter folders."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def prepare_folder(backbone: str) -> Path:
    """The prepared backbone in the project's folder; made on first use."""
    from biomerge_lib.backbones import SMOLLM2, backbone_name, build_tokenizer, prepare_backbone
    from biomerge_lib.parameters import compose_parameters
    from biomerge_lib.runs import PROJECT_DIR

    defaults = compose_parameters([])
    name = backbone_name(backbone)
    tokenizer_dir = PROJECT_DIR / (defaults.tokenizer_dir if backbone == SMOLLM2 else f"tokenizers/{name}")
    backbones_dir = PROJECT_DIR / defaults.backbones_dir
    if not (backbones_dir / name / "config.json").is_file():
        log.info("preparing the backbone %s in %s (once)", backbone, backbones_dir / name)
    build_tokenizer(backbone, tokenizer_dir)
    return prepare_backbone(backbone, tokenizer_dir, backbones_dir)


def read_text_file(path: Path | str) -> str:
    """A UTF-8 text file, to the character.

    Raises:
        DataError: no such file, binary, or another encoding.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    raw = path.read_bytes()
    if b"\0" in raw:
        raise DataError(f"{path}: a binary file; text (UTF-8) is needed.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}).") from None


def _decode(folder: Path, described: Path, max_new_tokens: int, batch_size: int, dtype: str):
    from biomerge_lib.decoding import greedy_decode
    from biomerge_lib.tokenizer import load_tokenizer
    from biomerge_lib.unsloth_lora_ner import load_adapter, load_causal_lm

    tokenizer = load_tokenizer(folder)
    if folder == described:
        model = load_causal_lm(folder, dtype=dtype)
    else:  # merged in memory, where decoding is faster
        model = load_adapter(folder, described, dtype=dtype).merge_and_unload()

    def answer(prompts: list[Prompt]) -> list[RawAnswer]:
        progress = "decoding" if len(prompts) > batch_size else None
        options = dict(max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
        return greedy_decode(model, tokenizer, prompts, **options)

    return tokenizer, answer


def _serve(folder: Path, base_url: str, max_new_tokens: int):
    from biomerge_lib.plain_tokenizer import load_plain_tokenizer
    from biomerge_lib.vllm_client import GreedyClient, complete_url, find_served_model

    tokenizer = load_plain_tokenizer(folder)
    server = dict(base_url=complete_url(base_url), api_key=os.environ.get("VLLM_API_KEY") or "EMPTY")
    model_id = find_served_model(**server).id
    limits = dict(max_new_tokens=max_new_tokens, concurrency=64, request_seconds=120, max_retries=5)
    client = GreedyClient(**server, model_id=model_id, tokenizer=tokenizer, **limits)

    def answer(prompts: list[Prompt]) -> list[RawAnswer]:
        answers: dict[int, RawAnswer] = {}
        client.answer_all(dict(enumerate(prompts)), answers.__setitem__)
        return [answers[number] for number in range(len(prompts))]

    return tokenizer, answer


def _warn_about(text: str) -> None:
    letters = sum(map(str.isalpha, text))
    if letters and len(_LATIN_OR_GREEK.findall(text)) < letters / 2:
        log.warning("a text is mostly in another script than English (%r): do not trust its spans", text[:40])
