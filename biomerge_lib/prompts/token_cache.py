"""Knows where tokenised data lie on disk and how their names are made; knows nothing of what is in them.

A cache file is named by a hash of everything that its contents depend on, so that it is never stale: the records, the
tokenizer, the rendering, the limits, and the source code that turns one into the other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from biomerge_lib.core import prompt_format, records, spans
from biomerge_lib.core.files import file_sha256, whole_file
from biomerge_lib.core.records import Record
from biomerge_lib.prompts import prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast


def hash_records(found: Iterable[Record]) -> str:
    """A name of the records' content: text, spans, data set and cue, in order."""
    digest = hashlib.sha256()
    for record in found:
        fields = record.text, record.spans, record.dataset, record.cue
        digest.update(repr(fields).encode())
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """A name of what a fast tokenizer does: vocabulary, merges, added tokens, and EOS."""
    import tokenizers

    backend = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return f"{backend}-{tokenizer.eos_token_id}-{tokenizers.__version__}"


def cache_path(cache_dir: Path | str, **content: Any) -> Path:
    """The file of tokenised data that depend on ``content`` (JSON values) and on the code."""
    name = json.dumps({**content, "code": _code_hash()}, sort_keys=True)
    return Path(cache_dir) / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.arrow"


def write_examples(path: Path, batches: Iterable[Sequence[Mapping[str, Any]]]) -> Dataset:
    """Write tokenised examples batch by batch (memory does not grow) and open the file.

    Processes that write the same file at once do the work twice and lose nothing.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with whole_file(path, "wb", partial=partial) as sink:
            _write_stream(sink, batches)
    finally:
        partial.unlink(missing_ok=True)
    return open_examples(path)


def open_examples(path: Path) -> Dataset:
    """The examples of a cache file, mapped into memory rather than read."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def collect_examples(batches: Iterable[Sequence[Mapping[str, Any]]]) -> Dataset:
    """The same without a file."""
    import pyarrow
    from datasets import Dataset

    sink = pyarrow.BufferOutputStream()
    _write_stream(sink, batches)
    return Dataset.from_buffer(sink.getvalue())


def _write_stream(sink: Any, batches: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema(
        {
            "input_ids": ids,
            "labels": ids,
            "token_labels": pyarrow.list_(pyarrow.int8()),
            "length": pyarrow.int32(),
            "prompt_length": pyarrow.int32(),
        }
    )
    with pyarrow.ipc.new_stream(sink, schema) as writer:
        for examples in batches:
            columns = [[example[name] for example in examples] for name in schema.names]
            arrays = [
                pyarrow.array(column, type=kind) for column, kind in zip(columns, schema.types, strict=True)
            ]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))


@cache
def _code_hash() -> str:
    from biomerge_lib.prompts import ner_span

    hashed = (ner_span, prompt, prompt_format, records, spans)
    files = sorted(Path(cast(str, module.__file__)) for module in hashed)
    return file_sha256(*files, __file__)
