"""Knows how files and folders appear whole or not at all, what their hashes are, and how processes wait for each other.

Knows nothing of what is in them. What was being written when a process died lies beside its place as ``<name>.partial``
and is overwritten by the next attempt. Nothing is forced to the disk: a crash of the machine may cost the newest file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of a weights file: what training changes, it changes in every layer


def partial_of(path: Path | str) -> Path:
    """Where a file or folder lies until it is whole."""
    return Path(path).with_name(Path(path).name + ".partial")


@contextmanager
def whole_file(path: Path | str, mode: str = "w") -> Iterator[Any]:
    """A file to write (text: UTF-8) that gets its name when the block ends; after an error the old one is still there.

    The folder is made.
    """
    partial = partial_of(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    with partial.open(mode, encoding=encoding, newline=newline) as out:
        yield out
    os.replace(partial, path)


@contextmanager
def whole_folder(path: Path, *, partial: Path | None = None) -> Iterator[Path]:
    """A folder to make and fill that is renamed to ``path`` when the block ends; an error removes it.

    Where ``path`` is there already, the block's last line removes it.
    """
    partial = partial or partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(path)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as out:
        out.write(text)


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def lock(stream: IO, *, or_raise: Exception | None = None) -> None:
    """Lock an open file until it is closed: wait for another process that has it, or raise.

    On a file system without locks nothing happens.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if or_raise else 0))
    except OSError as error:
        if or_raise and isinstance(error, BlockingIOError):
            raise or_raise from None


@contextmanager
def locked(path: Path, *, or_raise: Exception | None = None) -> Iterator[None]:
    """Hold a lock file, whose folder is made; see :func:`lock`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        lock(stream, or_raise=or_raise)
        yield


def file_sha256(*paths: Path | str) -> str:
    """The SHA-256 of a file, or of several one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def remember(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """What ``read`` makes of a file, kept until the file is another or has been written anew."""
    kept = lru_cache(maxsize=8)(lambda path, *_version: read(path))

    def look(path: Path) -> T:
        version = path.stat()
        return kept(path, version.st_ino, version.st_size, version.st_mtime_ns)

    return look


def fingerprint_weights(model_dir: Path | str) -> str | None:
    """A hash of a folder's weights, from samples (reading 16 GB whole would take longer than scoring); None without."""
    digest, paths = hashlib.sha256(), sorted(Path(model_dir).glob("*.safetensors"))
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as weights:
            for start in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                weights.seek(start)
                digest.update(weights.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16] if paths else None
