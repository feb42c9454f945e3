"""Knows checkpoint folders: which are whole, which is newest, which is best. Loads no model."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from biomerge_lib.core.errors import DataError, ModelError
from biomerge_lib.core.files import OBJECT, file_sha256, read_values, write_json

SUMS = "checksums.json"
log = logging.getLogger("biomerge")


def find_resumable_checkpoint(folder: Path) -> Path | None:
    """The newest whole ``checkpoint-<step>``; torn or corrupt newer ones are named in a warning and passed over."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for checkpoint in sorted(checkpoints, key=lambda path: -int(path.name.split("-")[1])):
        problem = find_damage(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("%s is damaged (%s) and is not used", checkpoint, problem)
    return None


def seal_checkpoint(checkpoint: Path) -> None:
    """Write the SHA-256 of each of a checkpoint's files beside them, by which :func:`find_damage` knows them again."""
    write_json(checkpoint / SUMS, {name: file_sha256(path) for name, path in _files(checkpoint).items()})


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it can be resumed from.

    A sealed one is as it was written. In others (older, or the run was killed in between) the Trainer writes
    ``trainer_state.json`` last; files cut short are found by their own containers: a safetensors header says how long
    the file must be, and PyTorch's files are zip archives with their directory at the end.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if (checkpoint / SUMS).is_file():
            return _find_change(checkpoint, "*")
        read_values(checkpoint / "trainer_state.json", OBJECT)
        weights = sorted(checkpoint.glob("*model*.safetensors"))
        for path in weights:
            with safe_open(path, "pt") as tensors:
                tensors.keys()
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (DataError, SafetensorError, OSError) as error:
        return str(error)
    if not weights:
        return "adapter_model.safetensors or model.safetensors is missing"
    with_deepspeed = any(checkpoint.glob("global_step*"))
    for name in ("rng_state*.pth", *(() if with_deepspeed else ("optimizer.pt", "scheduler.pt"))):
        paths = sorted(checkpoint.glob(name))
        if torn := [path.name for path in paths if not zipfile.is_zipfile(path)]:
            return f"{torn[0]} is cut short"
        if not paths:
            return f"{name} is missing"
    return None


def _find_change(checkpoint: Path, pattern: str) -> str | None:
    """The first file of a sealed checkpoint that is not as it was written, among those whose names match."""
    there = _files(checkpoint)
    for name, digest in read_values(checkpoint / SUMS, dict[str, str]).items():
        if Path(name).match(pattern) and (name not in there or file_sha256(there[name]) != digest):
            return f"{name} is missing or not as it was written"
    return None


def _files(checkpoint: Path) -> dict[str, Path]:
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SUMS)
    return {str(path.relative_to(checkpoint)): path for path in paths}


def best_checkpoint(run_folder: Path, metrics: dict[str, Any], *, must_exist: bool = True) -> Path:
    """The folder of the best checkpoint named in a run's training metrics.

    Raises:
        ModelError: it is gone, or its weights are not as they were written.
    """
    folder = run_folder / "checkpoints" / str(metrics.get("best_checkpoint"))
    problem = None if folder.is_dir() else "it is gone"
    if must_exist and (folder / SUMS).is_file():
        problem = _find_change(folder, "*.safetensors")
    if must_exist and problem:
        raise ModelError(
            f"{folder}: the best checkpoint, and {problem}; existing_run=replace trains it anew."
        )
    return folder
