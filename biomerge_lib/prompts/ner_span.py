"""Knows how JSONL becomes batches of tensors: the data module. Knows nothing of models.

{train,dev,test}.jsonl --[read_split]--> records --[build_dataset]--> examples --[SpanCollator]--> batches

A data set is a file that is mapped into memory; ``datasets`` writes it and finds it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomerge_lib.core.files import file_sha256, remember
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record, iter_records
from biomerge_lib.corpora.draws import document_of, draw_share, place_in_draw
from biomerge_lib.corpora.leakage import normalise
from biomerge_lib.experiment.provenance import data_hashes
from biomerge_lib.prompts.manifest import Manifest
from biomerge_lib.prompts.prompt import BATCH, IGNORE, Encoding, encode, encode_chunks, word_labels

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from biomerge_lib.core.parameters import Parameters

# The source code that an example depends on.
EXAMPLES_CODE = (
    "core/prompt_format.py",
    "core/records.py",
    "core/spans.py",
    "prompts/ner_span.py",
    "prompts/prompt.py",
)
log = logging.getLogger("biomerge")


def read_split(
    data_dir: Path | str,
    split: str,
    *,
    subsample: float = 1.0,
    limit: int | None = None,
    seed: int = 42,
    default_cue: str | None = None,
    cue_dropout: float = 0.0,
    trained: Collection[str] | None = None,
) -> list[Record]:
    """Records of a split; the file is parsed once a process, however often and with what options it is read.

    ``subsample`` keeps that share of each corpus's documents (at least one), drawn with ``seed``; ``limit`` keeps so
    many records, spread evenly over the split. With ``default_cue`` the records of corpora that were not ``trained``
    on (None: those that ``train.jsonl`` beside the split lacks), and the share ``cue_dropout`` of all others, are cued
    with it.

    Raises:
        DataError: the file is missing, empty, or a line is bad.
    """
    records = list(_parse(Path(data_dir) / f"{split}.jsonl"))
    if subsample < 1.0:
        documents = draw_share(map(document_of, records), subsample, seed)
        records = [record for record in records if document_of(record) in documents]
    if limit is not None and limit < len(records):
        records = [records[index * len(records) // limit] for index in range(limit)]
    if default_cue is not None:
        trained = train_datasets(data_dir) if trained is None else trained
        cues: dict[str, Any] = {"default_cue": default_cue, "cue_dropout": cue_dropout, "seed": seed}
        records = [cue_record(record, trained=trained, **cues) for record in records]
    return records


@remember
def _parse(path: Path) -> tuple[Record, ...]:
    return tuple(iter_records(path))


def read_training_records(parameters: Parameters) -> list[Record]:
    """The records that a run trains on: train's, and with ``train_on=train_dev`` dev's that test does not have too."""
    options = _cue_options(parameters)
    options |= {"subsample": parameters.subsample, "cue_dropout": parameters.cue_dropout}
    records = read_split(parameters.data_dir, "train", **options)
    if parameters.train_on == "train_dev":
        test = {normalise(record.text) for record in _parse(Path(parameters.data_dir) / "test.jsonl")}
        dev = read_split(parameters.data_dir, "dev", **options)
        records += [record for record in dev if normalise(record.text) not in test]
    return records


def read_training_splits(parameters: Parameters) -> dict[str, list[Record]]:
    """The records that a run trains on and is scored on, as its parameters choose them; no dev that is trained on."""
    records = {"train": read_training_records(parameters)}
    scored = {"dev": parameters.train_on == "train", "test": parameters.run_test_eval}
    for split in [split for split in scored if scored[split]]:
        records[split] = read_split(parameters.data_dir, split, **scoring_options(parameters))
    return records


def scoring_options(parameters: Parameters) -> dict[str, Any]:
    """The options of :func:`read_split` for the records that a run is scored on, whatever decodes them."""
    return _cue_options(parameters) | {"limit": parameters.eval_limit}


def _cue_options(parameters: Parameters) -> dict[str, Any]:
    default_cue = parameters.default_cue if parameters.corpus_cue else None
    return {"default_cue": default_cue, "seed": parameters.seed}


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
    """The data sets of the training records.

    Raises:
        DataError: ``train.jsonl`` is missing or broken.
    """
    return frozenset(record.dataset for record in _parse(Path(data_dir) / "train.jsonl"))


def trained_datasets(data_dir: Path | str, hashes: Mapping[str, str]) -> list[str]:
    """:func:`train_datasets` of a run that recorded these ``hashes``; none where its data are not there any more."""
    then = hashes.get("train")
    return sorted(train_datasets(data_dir)) if then and then == data_hashes(data_dir).get("train") else []


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
    return _label(record, encode(record, tokenizer, prompt_format))


def _label(record: Record, encoding: Encoding) -> dict[str, list[int]]:
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


def build_dataset(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    prompt_format: PromptFormat,
    *,
    max_target_tokens: int,
    cache_dir: Path | str | None = None,
) -> Dataset:
    """The records' examples with ``length`` and ``prompt_length``; tokenised once and then read from ``cache_dir``.

    Over-long records are chunked, never truncated.
    A cache file is named by a hash of everything that its contents depend on, so that it is never stale: the records,
    the tokenizer, the format of prompts, the limits, and the source code that turns one into the other. Without
    ``cache_dir`` the examples stay in memory.

    Raises:
        DataError: a word or a gold span that fits no chunk.
    """
    from datasets import Dataset, Features, List, Value, disable_progress_bars

    said = [hash_records(records), hash_tokenizer(tokenizer), asdict(prompt_format), max_target_tokens]
    name = hashlib.sha256(json.dumps([*said, _code_hash()]).encode()).hexdigest()[:24]

    def tokenise(batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in features}
        chosen = [records[i] for i in batch["record"]]
        for pieces in encode_chunks(chosen, tokenizer, prompt_format, max_target_tokens=max_target_tokens):
            for chunk, encoding in pieces:
                example: dict[str, Any] = {**_label(chunk.record, encoding)}
                example |= {"length": len(example["labels"]), "prompt_length": len(encoding.prompt_ids)}
                for name, column in columns.items():
                    column.append(example[name])
        return columns

    ids, number = List(Value("int32")), Value("int32")
    features = {"input_ids": ids, "labels": ids, "token_labels": List(Value("int8"))}
    features |= {"length": number, "prompt_length": number}
    disable_progress_bars()
    with _all_cores():
        dataset = Dataset.from_dict({"record": list(range(len(records)))}).map(
            tokenise,
            batched=True,
            batch_size=BATCH,
            remove_columns="record",
            features=Features(features),
            keep_in_memory=cache_dir is None,
            cache_file_name=None if cache_dir is None else str(Path(cache_dir) / f"{name}.arrow"),
            new_fingerprint=name,
        )
    if len(dataset) > len(records):
        log.info("%d records became %d examples: long ones are cut into chunks", len(records), len(dataset))
    return dataset


def hash_records(records: Iterable[Record]) -> str:
    """A name of the records' content: text, spans, data set and cue, in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.text, record.spans, record.dataset, record.cue)).encode())
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """A name of what a fast tokenizer does: vocabulary, merges, added tokens, and EOS."""
    import tokenizers

    backend = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return f"{backend}-{tokenizer.eos_token_id}-{tokenizers.__version__}"


@cache
def _code_hash() -> str:
    library = Path(__file__).parents[1]
    return file_sha256(*(library / name for name in EXAMPLES_CODE))


@dataclass(frozen=True)
class SpanCollator:
    """Pads a list of examples on the right to the batch's longest: ``(B, T)`` int64 tensors, and ``lengths`` (B,).

    The attention mask comes from the lengths, never from the pad id (which is EOS, a label).
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        fills = {"input_ids": self.pad_token_id, "labels": IGNORE, "token_labels": IGNORE}
        batch = {}
        for name, fill in fills.items():
            rows = [torch.as_tensor(example[name], dtype=torch.int64) for example in examples]
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch | {"attention_mask": mask, "lengths": lengths}


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use every core, and then no longer: a process that forks data loaders must not."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"
