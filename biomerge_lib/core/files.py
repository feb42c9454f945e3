"""Knows how files and folders appear whole or not at all, how JSON and YAML are read, hashes, and how processes wait.

What was being written when a process died lies beside its place as ``<name>.partial`` and is overwritten by the next
attempt. Nothing is forced to the disk: a crash of the machine may cost the newest file.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from biomerge_lib.core.errors import BioMergeError, DataError, DiskFull

T = TypeVar("T")
OBJECT = dict[str, Any]
Raised = type[BioMergeError]
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times faster
DEEPEST = 100  # levels of a YAML file
# How safetensors and PyTorch's archive writer wrap the system's error into text.
_FULL = re.compile(
    r"os error (28|122)\b|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos", re.S
)
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of a weights file: what training changes, it changes in every layer


def partial_of(path: Path | str) -> Path:
    """Where a file or folder lies until it is whole."""
    return Path(path).with_name(Path(path).name + ".partial")


def names_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a disk is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def raise_full_disk(path: Path | str, error: BaseException) -> None:
    """Raise DiskFull where that is what ``error``, met in writing ``path``, means."""
    if names_full_disk(error):
        raise DiskFull(
            f"{path}: no space left on the disk ({error}). Free some (`python -m biomerge_lib replaced` lists runs "
            "that were moved aside; merged/ of a finished run comes back with 03_train), then try again."
        ) from error


@contextmanager
def whole_file(path: Path | str, mode: str = "w") -> Iterator[Any]:
    """A file to write (text: UTF-8) that gets its name when the block ends; after an error the old one is still there.

    The folder is made. What is no file (``/dev/null``, a pipe) is written to as it is.

    Raises:
        DiskFull: there is no room for it.
    """
    path = Path(path)
    partial = partial_of(path) if path.is_file() or not path.exists() else path
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open(mode, encoding=encoding, newline=newline) as out:
            yield out
        os.replace(partial, path)
    except OSError as error:
        raise_full_disk(path, error)
        raise


@contextmanager
def whole_folder(path: Path, *, partial: Path | None = None) -> Iterator[Path]:
    """A folder to make and fill that is renamed to ``path`` when the block ends; an error removes it.

    Where ``path`` is there already, the block's last line removes it.

    Raises:
        DiskFull: there is no room for it.
    """
    partial = partial or partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise_full_disk(path, error)
        raise
    partial.rename(path)


@contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """A file to read, unpacked where its name ends in .gz.

    Raises:
        DataError: it is no gzip file, or a part of one.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}).") from None


def write_text(path: Path | str, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as out:
        out.write(text)


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_values(path: Path | str, shape: type[T], *, cure: str = "", raises: Raised = DataError) -> T:
    """What a JSON (by its ending) or YAML file holds, as a ``shape`` that pydantic knows: ``OBJECT``, a model, ...

    ``cure`` ends the error: what to do with a broken file.

    Raises:
        ``raises``: it cannot be read, is cut short or of another shape; names the file and the line (or key).
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise raises(f"{path}: cannot be read ({error.strerror}).") from None
    if path.suffix in (".json", ".ipynb"):
        return parse_json(content, path, shape, cure=cure, raises=raises)
    try:
        depth = 0
        for event in yaml.parse(content, YAML_LOADER):  # the loader in C would crash the process
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST or isinstance(event, yaml.AliasEvent):  # an alias may hold itself
                mark: Any = event.start_mark
                raise yaml.MarkedYAMLError(problem="an alias, or too many levels", problem_mark=mark)
        return _adapter(shape).validate_python(yaml.load(content, YAML_LOADER), strict=True)
    except ValidationError as error:
        raise raises(f"{path}: {_first_problem(error)}.{cure}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise raises(f"{path}{line}: not YAML ({reason}).{cure}") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # of a value like !!timestamp x
        raise raises(f"{path}: a value cannot be read ({error}).{cure}") from None


def parse_json(
    content: str | bytes, where: Path | str, shape: type[T], *, cure: str = "", raises: Raised = DataError
) -> T:
    """:func:`read_values` of JSON: a file's content (``where`` is its path) or a line of it (``file:line``).

    Refused, too: lone surrogates, numbers of thousands of digits, nesting of hundreds of levels.
    """
    try:
        return _adapter(shape).validate_json(content, strict=True)
    except ValidationError as error:
        problem = _first_problem(error)
        if found := re.fullmatch(r"Invalid JSON: (.*) at line (\d+) column (\d+)", problem, re.DOTALL):
            place = f"{where}:{found[2]}" if isinstance(where, Path) else where
            raise raises(f"{place}: not JSON ({found[1]} at column {found[3]}).{cure}") from None
        raise raises(f"{where}: {problem}.{cure}") from None
    except UnicodeEncodeError:  # a str of lone surrogates
        raise raises(f"{where}: not Unicode text (lone surrogates).{cure}") from None


_adapter: Callable[[Any], TypeAdapter] = lru_cache(maxsize=32)(TypeAdapter)


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


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
def locked(path: Path, *, or_raise: Exception | None = None) -> Iterator[IO]:
    """Hold a lock file, whose folder is made; see :func:`lock`. A process that inherits the open file holds it, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        lock(stream, or_raise=or_raise)
        yield stream


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
        if not path.is_file():
            return read(path)  # which says what is missing
        version = path.stat()
        return kept(path, version.st_ino, version.st_size, version.st_mtime_ns)

    return look


def fingerprint_weights(model_dir: Path | str) -> str | None:
    """A hash of a folder's weights (or a file), from samples: reading 16 GB would take longer than scoring.

    None without.
    """
    digest, folder = hashlib.sha256(), Path(model_dir)
    paths = (
        [folder] if folder.is_file() else sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    )
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as weights:
            for start in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                weights.seek(start)
                digest.update(weights.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16] if paths else None
