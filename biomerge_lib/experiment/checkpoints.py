"""Knows checkpoint folders: which are whole, which is newest, which is best. Loads no model."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, read_values

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


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it can be resumed from.

    The Trainer writes ``trainer_state.json`` last; a run that was killed while saving has none, or half of one.
    Files cut short by a full disk or a crashed node are found by their own containers: a safetensors header says
    how long the file must be, and PyTorch's files are zip archives with their directory at the end.
    """
    from safetensors import SafetensorError, safe_open

    try:
        read_values(checkpoint / "trainer_state.json", OBJECT)
        weights = sorted(checkpoint.glob("*model*.safetensors"))
        for path in weights:
            with safe_open(path, "pt") as tensors:
                tensors.keys()
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, SafetensorError, OSError) as error:
        return str(error)
    if not weights:
        return "adapter_model.safetensors or model.safetensors is missing"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        path = checkpoint / name
        if path.is_file() and not zipfile.is_zipfile(path):
            return f"{name} is cut short"
    if not any(checkpoint.glob("optimizer.pt")) and not any(checkpoint.glob("global_step*")):
        return "optimizer.pt is missing"
    return None


def best_checkpoint(run_folder: Path, metrics: dict[str, Any], *, must_exist: bool = True) -> Path:
    """The folder of the best checkpoint named in a run's training metrics.

    Raises:
        ModelError: it is gone.
    """
    folder = run_folder / "checkpoints" / str(metrics.get("best_checkpoint"))
    if must_exist and not folder.is_dir():
        raise ModelError(f"{folder}: the best checkpoint is gone; existing_run=replace trains it anew.")
    return folder
