"""Knows how JSONL becomes batches of tensors: the data module. Knows nothing of models.

{train,dev,test}.jsonl --[read_split]--> records --[encode_example]--> examples --[SpanCollator]--> batches
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomerge_lib.prompt import IGNORE, encode, split_record, word_labels
from biomerge_lib.records import Record, iter_records

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("biomerge")


def read_split(
    data_dir: Path | str, split: str, *, subsample: float = 1.0, limit: int | None = None, seed: int = 42
) -> list[Record]:
    """Records of a split, checked line by line.

    ``subsample`` keeps that share of the documents (at least one), drawn with ``seed``; ``limit`` keeps so many
    records, spread evenly over the split.

    Raises:
        DataError: the file is missing, empty, or a line is bad.
    """
    records = list(iter_records(Path(data_dir) / f"{split}.jsonl"))
    if subsample < 1.0:
        documents = sorted({(record.dataset, record.doc_id) for record in records})
        keep = set(random.Random(seed).sample(documents, max(1, round(subsample * len(documents)))))
        records = [record for record in records if (record.dataset, record.doc_id) in keep]
    if limit is not None and limit < len(records):
        records = [records[index * len(records) // limit] for index in range(limit)]
    return records


def encode_example(
    record: Record, tokenizer: PreTrainedTokenizerFast, *, offset_anchors: str, corpus_cue: bool
) -> dict[str, list[int]]:
    """Token ids and labels of one record, each list as long as prompt and completion together (T).

    ``labels``: IGNORE on the prompt (``<NER>`` ... ``<TAG>``), the completion's ids up to and with EOS.
    ``token_labels``: B/I/O (0 = O, 1 = B, 2 = I) on the last token of each word, IGNORE elsewhere.
    """
    encoding = encode(record, tokenizer, offset_anchors=offset_anchors, corpus_cue=corpus_cue)
    input_ids = encoding.prompt_ids + encoding.completion_ids
    token_labels = [IGNORE] * len(input_ids)
    for position, label in zip(
        encoding.word_last_tokens, word_labels(encoding.words, record.spans), strict=True
    ):
        token_labels[position] = label
    return {
        "input_ids": input_ids,
        "labels": [IGNORE] * len(encoding.prompt_ids)
        + encoding.completion_ids,  # loss on completion + EOS only
        "token_labels": token_labels,
    }


def build_dataset(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    *,
    offset_anchors: str,
    corpus_cue: bool,
    max_input_tokens: int,
    max_target_tokens: int,
) -> Dataset:
    """Tokenised examples of a split, with their ``length``; over-long records are chunked, never truncated.

    Raises:
        DataError: a word or a gold span that fits no chunk.
    """
    from datasets import Dataset

    rendering = {"offset_anchors": offset_anchors, "corpus_cue": corpus_cue}
    examples, chunked = [], 0
    for record in records:
        chunks = split_record(
            record,
            tokenizer,
            **rendering,
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
        )
        chunked += len(chunks) > 1
        examples += [encode_example(chunk.record, tokenizer, **rendering) for chunk in chunks]
    if chunked:
        log.info(
            "%d of %d records were over the token limits and were cut into chunks", chunked, len(records)
        )
    for example in examples:
        example["length"] = len(example["input_ids"])
    return Dataset.from_list(examples)


@dataclass(frozen=True)
class SpanCollator:
    """Pads a list of examples on the right to the batch's longest: ``(B, T)`` int64 tensors.

    The attention mask comes from the lengths, never from the pad id (which is EOS, a label).
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        lengths = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(lengths))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE),
            "token_labels": torch.full(shape, IGNORE),
        }
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            batch["attention_mask"][row, :length] = 1
            for name in ("input_ids", "labels", "token_labels"):
                batch[name][row, :length] = torch.as_tensor(example[name])
        return batch
