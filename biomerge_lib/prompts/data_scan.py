"""Knows what a split holds: counts, repeated sentences, token lengths. Knows nothing of files or training."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record
from biomerge_lib.corpora.draws import DocumentKey, document_of
from biomerge_lib.corpora.leakage import key_of
from biomerge_lib.prompts.prompt import count_tokens, find_control, find_cut_spans, split_record

if TYPE_CHECKING:
    from biomerge_lib.prompts.plain_tokenizer import PlainTokenizer

SAMPLE_SIZE = 1000
# What a prompt's tokens can be more than its bytes: <TAG>, BOS and the like.
EXTRA_TOKENS = 4


@dataclass
class Scan:
    """What a split's records are.

    ``gold``: sentence key and cue -> the first gold key, i.e. what a model would learn to answer to this prompt.
    ``repeated`` and ``contradicting`` count the records whose prompt came before, with the same and with other gold.
    ``reserved``: texts that hold a token of the tokenizer literally (``<B>`` in HTML, say); prompts break it up.
    ``examples``: records and chunks; ``chunked``: records that are cut; ``cut_spans``: mentions that the cuts of
    evaluation go through. ``prompt_tokens`` and ``target_tokens`` are totals, estimated unless ``is_exact``.
    ``impossible``: why some records fit no limit.
    """

    records: int = 0
    spans: int = 0
    empty: int = 0
    datasets: Counter[str] = field(default_factory=Counter)
    cues: Counter[str | None] = field(default_factory=Counter)
    documents: set[DocumentKey] = field(default_factory=set)
    gold: dict[tuple[bytes, str | None], bytes] = field(default_factory=dict)
    repeated: int = 0
    contradicting: int = 0
    reserved: int = 0
    long_prompts: int = 0
    long_targets: int = 0
    chunked: int = 0
    examples: int = 0
    cut_spans: int = 0
    prompt_tokens: float = 0
    target_tokens: float = 0
    is_exact: bool = True
    impossible: list[str] = field(default_factory=list)
    sample: Sequence[Record] = ()

    def sentences(self) -> set[bytes]:
        return {sentence for sentence, _ in self.gold}


def scan_records(
    records: Sequence[Record],
    tokenizer: PlainTokenizer,
    prompt_format: PromptFormat,
    *,
    max_target_tokens: int,
    for_training: bool,
) -> Scan:
    """Count a split. ``for_training`` holds the targets to their limit too and cuts no mention.

    A token is at least a byte long, so only a record with more bytes than ``max_input_tokens`` (or a target with more
    than ``max_target_tokens``) can be over a limit. Of these each word is tokenised once, and then the records that
    may be too long by their words' tokens, so that all over the limits are counted exactly. Of the others a sample is.
    """
    scan = Scan(sample=_sample(records))
    chunk_limit = max_target_tokens if for_training else None
    control = find_control(tokenizer)
    short: list[Record] = []
    maybe_long: list[Record] = []
    for record in records:
        count_record(scan, record, prompt_format)
        broken_up = len(control.findall(f"{prompt_format.cue(record)} {record.text}"))
        scan.reserved += broken_up > 0
        most = prompt_format.most_bytes(record) + 2 * broken_up + EXTRA_TOKENS  # a text may stand there twice
        is_short = most <= prompt_format.max_input_tokens and len(record.target) <= max_target_tokens
        (short if is_short else maybe_long).append(record)
    maybe_longer: list[Record] = []
    for record, most in zip(maybe_long, _most_tokens(maybe_long, tokenizer, prompt_format), strict=True):
        is_short = most <= prompt_format.max_input_tokens and len(record.target) <= max_target_tokens
        (short if is_short else maybe_longer).append(record)
    lengths = count_tokens(maybe_longer, tokenizer, prompt_format)
    for record, (prompt, target) in zip(maybe_longer, lengths, strict=True):
        is_long, has_long_target = prompt > prompt_format.max_input_tokens, target > max_target_tokens
        scan.prompt_tokens += prompt
        scan.target_tokens += target
        scan.long_prompts += is_long
        scan.long_targets += has_long_target
        if not (is_long or (for_training and has_long_target)):
            scan.examples += 1
            continue
        try:
            chunks = split_record(record, tokenizer, prompt_format, max_target_tokens=chunk_limit)
        except DataError as error:
            scan.impossible.append(str(error))
            continue
        scan.examples += len(chunks)
        scan.chunked += len(chunks) > 1
        scan.cut_spans += len(find_cut_spans(record, chunks))
    scan.examples += len(short)
    if sample := count_tokens(_sample(short), tokenizer, prompt_format):
        share = len(short) / len(sample)
        scan.is_exact = share == 1
        scan.prompt_tokens += share * sum(prompt for prompt, _ in sample)
        scan.target_tokens += share * sum(target for _, target in sample)
    return scan


def _most_tokens(
    records: Sequence[Record], tokenizer: PlainTokenizer, prompt_format: PromptFormat
) -> Iterator[int]:
    """For each record at least as many tokens as its prompt has: those of its words, as no token goes over a space."""
    words = ["a", *{word for record in records for word in record.text.split()}]
    plain = PromptFormat(offset_anchors="none", corpus_cue=False, max_input_tokens=0)
    lengths = count_tokens([Record(word, (), "", "") for word in words], tokenizer, plain)
    around = lengths[0][0] - 1  # <NER> and <TAG>; "a" is one token
    sizes = {word: prompt - around for word, (prompt, _) in zip(words, lengths, strict=True)}
    for record in records:
        own = record.text.split()
        size = sum(map(sizes.__getitem__, own)) if " ".join(own) == record.text else None
        yield prompt_format.most_bytes(record, text_size=size) + EXTRA_TOKENS


def _sample(records: Sequence[Record]) -> Sequence[Record]:
    return records if len(records) <= SAMPLE_SIZE else random.Random(0).sample(records, SAMPLE_SIZE)


def count_record(scan: Scan, record: Record, prompt_format: PromptFormat) -> None:
    """Count a record in: everything but its tokens."""
    scan.records += 1
    scan.spans += len(record.spans)
    scan.empty += not record.spans
    scan.datasets[record.dataset] += 1
    scan.documents.add(document_of(record))
    cue = prompt_format.cue(record)
    scan.cues[cue] += 1
    keyed = key_of(record)
    prompt = keyed.sentence, cue
    if prompt in scan.gold:
        same = scan.gold[prompt] == keyed.annotated
        scan.repeated += same
        scan.contradicting += not same
    else:
        scan.gold[prompt] = keyed.annotated
