"""Knows how JSONL becomes batches of tensors: the data module. Knows nothing of models.

{train,dev,test}.jsonl --[iter_split]--> records --[encode_example]--> examples --[SpanCollator]--> batches

Everything streams: records come from the file one by one, examples go to the cache in batches, and a data set is a
file that is mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomerge_lib.core.files import file_sha256, remember
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record, iter_records
from biomerge_lib.corpora.draws import DocumentKey, document_of, draw_share, place_in_draw
from biomerge_lib.prompts.manifest import Manifest
from biomerge_lib.prompts.prompt import (
    BATCH,
    IGNORE,
    Encoding,
    batched,
    encode,
    encode_chunks,
    word_labels,
)
from biomerge_lib.prompts.token_cache import (
    cache_path,
    collect_examples,
    hash_records,
    hash_tokenizer,
    open_examples,
    write_examples,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from biomerge_lib.core.parameters import Parameters

log = logging.getLogger("biomerge")


def iter_split(
    data_dir: Path | str,
    split: str,
    *,
    subsample: float = 1.0,
    limit: int | None = None,
    seed: int = 42,
    default_cue: str | None = None,
    cue_dropout: float = 0.0,
    trained: Collection[str] | None = None,
) -> Iterator[Record]:
    """Records of a split, checked line by line; memory does not grow with the file.

    ``subsample`` keeps that share of each corpus's documents (at least one), drawn with ``seed``; ``limit`` keeps so
    many records, spread evenly over the split. With ``default_cue`` the records of corpora that were not ``trained``
    on (None: those that ``train.jsonl`` beside the split lacks), and the share ``cue_dropout`` of all others, are cued
    with it.

    Raises:
        DataError: the file is missing, empty, or a line is bad.
    """
    path = Path(data_dir) / f"{split}.jsonl"
    if default_cue is not None and trained is None:
        trained = train_datasets(data_dir)
    documents: set[DocumentKey] | None = None
    total = 0
    if path.is_file() and (subsample < 1.0 or limit is not None):
        sizes = _count_documents(path)
        documents = draw_share(sizes, subsample, seed)
        total = sum(sizes[document] for document in documents)
    index = -1
    for record in iter_records(path):
        if documents is not None and document_of(record) not in documents:
            continue
        index += 1
        if limit is not None and limit < total and not _is_picked(index, limit, total):
            continue
        if default_cue is not None and trained is not None:
            record = cue_record(
                record, trained=trained, default_cue=default_cue, cue_dropout=cue_dropout, seed=seed
            )
        yield record


def read_split(data_dir: Path | str, split: str, **options: Any) -> list[Record]:
    """The records of :func:`iter_split`, all at once."""
    return list(iter_split(data_dir, split, **options))


def training_options(parameters: Parameters) -> dict[str, Any]:
    """The options of :func:`iter_split` for the records that a run trains on."""
    draw = {"subsample": parameters.subsample, "seed": parameters.seed}
    return (
        _cue_options(parameters)
        | draw
        | ({"cue_dropout": parameters.cue_dropout} if parameters.corpus_cue else {})
    )


def scoring_options(parameters: Parameters) -> dict[str, Any]:
    """The options of :func:`iter_split` for the records that a run is scored on, whatever decodes them."""
    return _cue_options(parameters) | {"limit": parameters.eval_limit}


def _cue_options(parameters: Parameters) -> dict[str, Any]:
    return {"default_cue": parameters.default_cue, "seed": parameters.seed} if parameters.corpus_cue else {}


def describe_model(parameters: Parameters) -> Manifest:
    """What a trained model must be asked with, to be kept beside its weights."""
    cues = parameters.corpus_cue
    return Manifest(
        prompt_format=parameters.prompt_format,
        max_new_tokens=parameters.max_new_tokens,
        backbone=parameters.backbone,
        cues=sorted(train_datasets(parameters.data_dir)) if cues else None,
        default_cue=parameters.default_cue if cues else None,
    )


def train_datasets(data_dir: Path | str) -> frozenset[str]:
    """The data sets of the training records: from the data card while it fits ``train.jsonl``, else by reading.

    Raises:
        DataError: ``train.jsonl`` is missing or broken.
    """
    path = Path(data_dir) / "train.jsonl"
    card_path = Path(data_dir) / "data_card.json"
    if path.is_file() and card_path.is_file():
        card = json.loads(card_path.read_text(encoding="utf-8"))["splits"]["train"]
        if "datasets" in card and card["sha256"] == file_sha256(path):
            return frozenset(dataset for dataset, sizes in card["datasets"].items() if sizes["sentences"])
    return frozenset(record.dataset for record in iter_records(path))


def cue_record(
    record: Record, *, trained: Collection[str], default_cue: str, cue_dropout: float = 0.0, seed: int = 42
) -> Record:
    """The record with ``default_cue`` if its corpus was not trained on, or by chance (always the same records).

    A model learns what the default cue means from the records that get it by chance in training; none do where it is
    the name of a trained corpus, whose policy it then means. A record that names a cue of its own keeps it.
    """
    if record.cue is not None:
        return record
    share = 1.0 if record.dataset not in trained else 0.0 if default_cue in trained else cue_dropout
    if place_in_draw(f"{record.dataset}\0{record.doc_id}\0{record.text}", seed) < share:
        return replace(record, cue=default_cue)
    return record


def encode_example(
    record: Record, tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat
) -> dict[str, list[int]]:
    """Token ids and labels of one record, each list as long as prompt and completion together (T).

    ``labels``: IGNORE on the prompt (``<NER>`` ... ``<TAG>``), the completion's ids up to and with EOS.
    ``token_labels``: B/I/O (0 = O, 1 = B, 2 = I) on the last token of each word, IGNORE elsewhere.
    """
    return label_encoding(record, encode(record, tokenizer, prompt_format))


def label_encoding(record: Record, encoding: Encoding) -> dict[str, list[int]]:
    """The example of :func:`encode_example` from a record's token ids."""
    prompt_ids, completion_ids = encoding.prompt_ids, encoding.completion_ids
    token_labels = [IGNORE] * (len(prompt_ids) + len(completion_ids))
    labels = word_labels(encoding.words, record.spans)
    for position, label in zip(encoding.word_last_tokens, labels, strict=True):
        token_labels[position] = label
    return {
        "input_ids": prompt_ids + completion_ids,
        "labels": [IGNORE] * len(prompt_ids) + completion_ids,  # loss on completion + EOS only
        "token_labels": token_labels,
    }


def iter_examples(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerFast,
    prompt_format: PromptFormat,
    *,
    max_target_tokens: int,
) -> Iterator[dict[str, Any]]:
    """Tokenised examples, with their ``length`` and ``prompt_length``; over-long records are chunked, never truncated.

    How many were chunked is logged at the end.

    Raises:
        DataError: a word or a gold span that fits no chunk.
    """
    seen = chunked = 0
    for pieces in encode_chunks(records, tokenizer, prompt_format, max_target_tokens=max_target_tokens):
        seen += 1
        chunked += len(pieces) > 1
        for chunk, ids in pieces:
            example = label_encoding(chunk.record, ids)
            sizes = {"length": len(example["input_ids"]), "prompt_length": len(ids.prompt_ids)}
            yield {**example, **sizes}
    if chunked:
        log.info("%d of %d records were over the token limits and were cut into chunks", chunked, seen)


def build_dataset(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerFast,
    prompt_format: PromptFormat,
    *,
    max_target_tokens: int,
    cache_dir: Path | str | None = None,
    data_hash: str | None = None,
) -> Dataset:
    """The examples of :func:`iter_examples` as a data set; tokenised once and then read from ``cache_dir``.

    Args:
        records: a list; or an iterator, whose content ``data_hash`` names (:func:`hash_split`).
        cache_dir: folder of tokenised data; None keeps them in memory.

    Raises:
        DataError: a word or a gold span that fits no chunk.
    """
    examples = iter_examples(records, tokenizer, prompt_format, max_target_tokens=max_target_tokens)
    batches = batched(examples, BATCH)
    if cache_dir is None:
        with _all_cores():
            return collect_examples(batches)
    path = cache_path(
        cache_dir,
        records=data_hash or hash_records(records),
        tokenizer=hash_tokenizer(tokenizer),
        prompt_format=asdict(prompt_format),
        max_target_tokens=max_target_tokens,
    )
    if path.is_file():
        log.info("tokenised data from %s", path)
        return open_examples(path)
    with _all_cores():
        return write_examples(path, batches)


def hash_split(data_dir: Path | str, split: str, **options: Any) -> str:
    """A name of the content of :func:`iter_split` with these options, without reading it."""
    if options.get("default_cue"):
        options["trained"] = sorted(options.get("trained") or train_datasets(data_dir))
    content = file_sha256(Path(data_dir) / f"{split}.jsonl"), sorted(options.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class SpanCollator:
    """Pads a list of examples on the right to the batch's longest: ``(B, T)`` int64 tensors, and ``lengths`` (B,).

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
            "lengths": torch.tensor(lengths),
        }
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            batch["attention_mask"][row, :length] = 1
            for name in ("input_ids", "labels", "token_labels"):
                batch[name][row, :length] = torch.as_tensor(example[name])
        return batch


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use every core, and then no longer: a process that forks data loaders must not."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


@remember  # preflight draws the same documents as the reading proper
def _count_documents(path: Path) -> Counter[DocumentKey]:
    """Records a document, from a pass that leaves the checks to the reading proper."""
    sizes: Counter[DocumentKey] = Counter()
    with path.open("rb") as lines:
        for line in lines:
            try:
                fields = json.loads(line)
                sizes[fields["dataset"], fields["doc_id"]] += 1
            except (ValueError, KeyError, TypeError):
                continue
    return sizes


def _is_picked(index: int, limit: int, total: int) -> bool:
    """Whether a record is one of the ``limit`` at the positions ``k * total // limit``."""
    return (-(-index * limit // total)) * total // limit == index
