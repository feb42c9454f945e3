"""Knows the way from records to prompts and from answers back to predictions, whoever decodes.

records --[build_prompts]--> prompts --(greedy decoding | vLLM)--> answers --[collect_predictions]--> predictions
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import parse_json, whole_file
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record, iter_lines
from biomerge_lib.core.spans import Span, parse_answer, read_parts
from biomerge_lib.prompts.prompt import Chunk, encode_chunks, merge_chunks

if TYPE_CHECKING:
    from biomerge_lib.prompts.prompt import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to a model: a record, or a chunk of a long one. ``record_index`` counts the split's records."""

    record_index: int
    chunk: Chunk
    prompt_ids: list[int]


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """What a decoder wrote after ``<TAG>``: ``token_ids`` without EOS, its text, and why it stopped.

    ``logprobs`` are the tokens' log-probabilities, EOS's last; ``margins`` how far each lay before the runner-up;
    ``part_logprobs`` the sums over the parts between semicolons (:func:`sum_parts`). Empty when the decoder gives
    none. Under a grammar they are probabilities among what it allows.
    """

    token_ids: list[int]
    text: str
    finish: Literal["eos", "length"]
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    part_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A record's gold and predicted spans. Written one a line to ``predictions-<split>-<decoder>.jsonl``.

    ``answers``, ``answer_ids`` and ``finish`` have one entry a chunk (one, for all but very long records).
    ``unreadable``, ``out_of_text`` and ``unsorted`` count what was wrong with the answers. ``prompt_hashes`` tell
    whether two decoders read the same token ids.

    ``probabilities`` has one entry a predicted span: the product of its tokens' probabilities, the separator before
    it included (empty when the decoder gave none). ``logprobs`` and ``margins`` are the answers' (``RawAnswer``).
    ``gold_types`` has one entry a gold span, ``Cell|Tissue`` for two types; empty where types are not known. Files of
    earlier versions lack it.
    """

    index: int
    text: str
    doc_id: str
    dataset: str
    gold: list[Span]
    pred: list[Span]
    answers: list[str]
    answer_ids: list[list[int]]
    finish: list[str]
    unreadable: int
    out_of_text: int
    unsorted: int
    prompt_hashes: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    margins: list[list[float]] = field(default_factory=list)
    gold_types: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.gold_types) not in (0, len(self.gold)):
            raise ValueError(f"{len(self.gold_types)} gold_types for {len(self.gold)} gold spans")

    @property
    def document(self) -> tuple[str, str]:
        """The record's document; one whose ``doc_id`` is empty is a document of its own."""
        return self.dataset, self.doc_id or f"\0{self.index}"


def build_prompts(
    records: Sequence[Record], tokenizer: Tokenizer, prompt_format: PromptFormat
) -> list[Prompt]:
    """The prompts of a split, in order; records over ``max_input_tokens`` become several prompts."""
    return [
        Prompt(index, chunk, encoding.prompt_ids)
        for index, pieces in enumerate(encode_chunks(records, tokenizer, prompt_format))
        for chunk, encoding in pieces
    ]


def collect_predictions(
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    answers: Sequence[RawAnswer],
    *,
    constrained: bool = False,
    span_threshold: float | None = None,
) -> list[Prediction]:
    """Parse the answers, map chunks back, and pair each record with its predicted spans.

    ``constrained``: a grammar held, so that only the length limit can leave a span unfinished; such a last part is
    left out (``finish`` still says "length"). ``span_threshold`` drops spans whose probability is lower.
    """
    answered: list[list[tuple[Prompt, RawAnswer]]] = [[] for _ in records]
    for prompt, answer in zip(prompts, answers, strict=True):
        answered[prompt.record_index].append((prompt, answer))
    predictions = []
    for index, (record, pairs) in enumerate(zip(records, answered, strict=True)):
        parsed = [
            parse_answer(_whole_parts(answer) if constrained else answer.text, len(prompt.chunk.record.text))
            for prompt, answer in pairs
        ]
        pred = merge_chunks([prompt.chunk for prompt, _ in pairs], [answer.spans for answer in parsed])
        probabilities = _span_probabilities(pairs)
        prediction = Prediction(
            index=index,
            text=record.text,
            doc_id=record.doc_id,
            dataset=record.dataset,
            gold=list(record.spans),
            pred=pred,
            answers=[answer.text for _, answer in pairs],
            answer_ids=[answer.token_ids for _, answer in pairs],
            finish=[answer.finish for _, answer in pairs],
            unreadable=sum(len(answer.unreadable) for answer in parsed),
            out_of_text=sum(len(answer.out_of_text) for answer in parsed),
            unsorted=sum(not answer.is_sorted for answer in parsed),
            prompt_hashes=[_hash_ids(prompt.prompt_ids) for prompt, _ in pairs],
            probabilities=[probabilities[span] for span in pred] if set(pred) <= set(probabilities) else [],
            logprobs=[answer.logprobs for _, answer in pairs],
            margins=[answer.margins for _, answer in pairs],
            gold_types=list(record.types),
        )
        predictions.append(keep_probable(prediction, span_threshold))
    return predictions


def keep_probable(prediction: Prediction, span_threshold: float | None) -> Prediction:
    """The prediction without the spans whose probability is below the threshold; None keeps all.

    Raises:
        DataError: spans without probabilities.
    """
    if span_threshold is None:
        return prediction
    if len(prediction.probabilities) != len(prediction.pred):
        raise DataError(f"span_threshold={span_threshold} needs probabilities, and the answers carry none.")
    kept = [probability >= span_threshold for probability in prediction.probabilities]
    pred, probabilities = compress(prediction.pred, kept), compress(prediction.probabilities, kept)
    return replace(prediction, pred=list(pred), probabilities=list(probabilities))


def sum_parts(token_ids: Sequence[int], logprobs: Sequence[float], tokenizer: Tokenizer) -> list[float]:
    """Log-probability of each part between semicolons; a token with a semicolon begins the next part.

    So the parts' and EOS's probabilities multiply to the answer's.
    """
    if not logprobs:
        return []
    sums = [0.0]
    for token_id, logprob in zip(token_ids, logprobs, strict=False):  # logprobs ends with EOS's
        sums += [0.0] * tokenizer.decode([token_id]).count(";")
        sums[-1] += logprob
    return [round(total, 6) for total in sums]


def _hash_ids(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:12]


def margin_of(logprob: float, second: float) -> float:
    """How far a token's log-probability lies before the runner-up's; at most 99 (a grammar may leave no runner-up)."""
    return round(min(logprob - second, 99.0), 6)


def _whole_parts(answer: RawAnswer) -> str:
    return answer.text if answer.finish == "eos" else answer.text.rpartition(";")[0]


def _span_probabilities(pairs: Sequence[tuple[Prompt, RawAnswer]]) -> dict[Span, float]:
    """Of a span written twice, the more probable time counts."""
    found: dict[Span, float] = {}
    for prompt, answer in pairs:
        for (_, span), logprob in zip(read_parts(answer.text), answer.part_logprobs, strict=False):
            if span is not None:
                moved = (span[0] + prompt.chunk.offset, span[1] + prompt.chunk.offset)
                found[moved] = max(found.get(moved, 0.0), round(math.exp(logprob), 6))
    return found


def write_predictions(path: Path | str, predictions: Iterable[Prediction]) -> None:
    """Write predictions as JSONL, atomically."""
    with whole_file(path) as out:
        for prediction in predictions:
            out.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")


def read_predictions(path: Path | str) -> list[Prediction]:
    """Read what :func:`write_predictions` wrote.

    Raises:
        DataError: the file is missing, or a line is not a prediction.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. 04_greedy_dev and 05_vllm_eval write predictions.")
    cure = " This is no prediction: run 04_greedy_dev or 05_vllm_eval again."
    return [parse_json(line, f"{path}:{number}", Prediction, cure=cure) for number, line in iter_lines(path)]


def refuse_other_records(one: Sequence[Prediction], other: Sequence[Prediction], *, again: str) -> None:
    """Check that predictions are of the same records, in the same order; ``again`` says what to do.

    Raises:
        DataError: they are not, or there are none.
    """
    if not 0 < len(one) == len(other):
        sizes = f"{len(one)} and of {len(other)}"
        raise DataError(f"predictions of {sizes} records cannot be compared. {again}")
    for mine, its in zip(one, other, strict=True):
        if (mine.text, sorted(mine.gold)) != (its.text, sorted(its.gold)):
            raise DataError(
                f"predictions of other records: number {mine.index} is {mine.dataset}/{mine.doc_id} {mine.text[:40]!r} "
                f"in one file and {its.dataset}/{its.doc_id} {its.text[:40]!r} in the other. {again}"
            )
