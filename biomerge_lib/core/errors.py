"""The errors a user can mend: each says what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BioMergeError(Exception):
    """Base of all errors that are the input's fault, not the program's."""


class DataError(BioMergeError):
    """A corpus, JSONL or predictions file is missing, broken or contradicts itself."""


class ParameterError(BioMergeError):
    """A parameter is unknown, of the wrong type, or contradicts another one."""


class ModelError(BioMergeError):
    """A backbone, tokenizer, checkpoint or merged model is missing or does not fit."""


class ServerError(BioMergeError):
    """A vLLM server did not start, died, or serves something else."""


class DiskFull(BioMergeError):
    """A disk, or a quota on it, is full."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """``" Did you mean 'learning_rate'?"`` for a near miss, an empty string otherwise."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""
