"""Knows what a corpus format is: what its reader is given and gives. Which formats there are stands in ``sources``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import file_sha256, open_bytes, parse_json
from biomerge_lib.core.records import Record
from biomerge_lib.corpora.documents import BOM, Document, ReadCounts

Column = int | str | None
# "id" is a row number in most data sets.
_ID_COLUMNS = ("document_id", "doc_id", "docid", "pmid", "sourceid")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "dev": ("dev", "devel", "develop", "development", "val", "valid", "validation", "testa"),
    "test": ("test", "testing", "testb"),
}
_SPLIT_PATTERNS = {
    split: re.compile(r"(?<![a-z])(?:{0})(?![a-z])|(?:{0})set(?![a-z])".format("|".join(words)))
    for split, words in SPLIT_WORDS.items()
}
# How text in wide characters begins; without a byte order mark it is taken to begin in ASCII.
_WIDE = {
    "UTF-32": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
    "UTF-16LE": rb"([\t\n\r -~]\0){2}",
    "UTF-16BE": rb"(\0[\t\n\r -~]){2}",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A corpus that was found and not yet read: ``files`` (or the hub's ``streams``) of each split."""

    name: str
    format: str
    location: str
    files: Mapping[str, Sequence[Path]]
    streams: Mapping[str, Any] = field(default_factory=dict)

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of each split's file; of a split's folder, one over the names and hashes of its files."""
        folder, hashes = Path(self.location), {}
        for paths in filter(None, self.files.values()):
            place = paths[0] if len(paths) == 1 else paths[0].parent
            name = place.name if place == folder else place.relative_to(folder).as_posix()
            if len(paths) == 1:
                hashes[name] = file_sha256(place)
            else:
                lines = "".join(f"{path.name} {file_sha256(path)}\n" for path in paths)
                hashes[f"{name}/"] = hashlib.sha256(lines.encode()).hexdigest()
        return hashes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a corpus is read: the choices that docs/corpora.md explains.

    ``types`` None keeps all. A column is a number from 0 (``iob``) or a name (of the first line; ``hub``); None finds
    it.
    """

    types: frozenset[str] | None = None
    sentence_split: str = "segtok"
    discontinuous: str = "skip"
    bad_mentions: str = "stop"
    token_column: Column = None
    tag_column: Column = None


READ_ALL = Reading()
ReadSplit = Callable[[Source, str, Reading, ReadCounts], Iterator[Record | Document]]


@dataclass(frozen=True, slots=True)
class Format:
    """A corpus format, as the module of its reader describes it.

    ``has(path)`` says whether a file with one of the ``endings`` is of the format (None: every one is).
    ``read(source, split, how, counts)`` reads a split and counts what it finds: sentences come as records, documents
    with their mentions as they are. With ``is_document_a_file`` a split is always a folder.

    Raises:
        DataError: (``read``) whatever is malformed, named as ``file:line``.
    """

    endings: tuple[str, ...]
    read: ReadSplit
    has: Callable[[Path], bool] | None = None
    is_document_a_file: bool = False


def splits_of(name: str) -> list[str]:
    """The splits that a file or folder name tells.

    >>> splits_of("CDR_TrainingSet.BioC.xml"), splits_of("traindev.PubTator"), splits_of("strains.txt")
    (['train'], ['train', 'dev'], [])
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=train)(?=dev|val)", "_", name).lower()
    return [split for split, pattern in _SPLIT_PATTERNS.items() if pattern.search(spaced)]


def first_lines(path: Path, size: int = 1 << 14) -> list[str]:
    """The whole lines among a file's first bytes; of a first line that is longer its beginning."""
    with open_bytes(path) as stream:
        content = stream.read(size)
    lines = split_lines(content.decode("utf-8", errors="replace"))
    return lines[:-1] if len(content) == size and len(lines) > 1 else lines


def first_line(path: Path) -> str:
    """The first line of a file that is not blank (of 16 kB; nothing beyond)."""
    return next(filter(str.strip, first_lines(path)), "")


def read_text(path: Path) -> str:
    """The file's characters as they are (no line end is changed).

    Raises:
        DataError: not UTF-8 (named as ``file:line``).
    """
    with open_bytes(path) as stream:
        content = stream.read()
    refuse_utf16(content, path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 (byte {error.start + 1} of the file). If it is Latin-1"
        raise DataError(f"{path}:{line}: {what}: iconv -f latin1 -t UTF-8 {path} > NEW_FILE") from None


def refuse_utf16(content: bytes, path: Path | str) -> None:
    """Raise DataError where a file's first bytes say that it is UTF-16 or UTF-32, with a byte order mark or without."""
    if found := next((code for code, begin in _WIDE.items() if re.match(begin, content)), None):
        raise DataError(f"{path}: {found} text; convert it: iconv -f {found} -t UTF-8 {path} > NEW_FILE")


def ending_of(path: Path) -> str:
    """A file name's ending in lower case, less ``.gz``: ``.tsv`` of ``TRAIN.TSV.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def stem_of(path: Path) -> str:
    """A file name without its ending and without ``.gz``."""
    return Path(re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE)).stem


def entries_of(folder: Path) -> list[Path]:
    """A folder's entries in order, without hidden ones (a Mac's ``._`` files); of a lone sub-folder those inside.

    Raises:
        DataError: one with an ending is neither a file nor a folder.
    """
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))
    if broken := next((one for one in entries if one.suffix and not (one.is_file() or one.is_dir())), None):
        raise DataError(f"{broken}: neither a file nor a folder, or a link to what is not there; remove it.")
    is_lone = len(entries) == 1 and entries[0].is_dir() and not splits_of(entries[0].name)
    return entries_of(entries[0]) if is_lone else entries


def named_files(source: Source, split: str) -> Iterator[tuple[Path, str]]:
    """A split's files, each with what its documents without an id are called before their number.

    Files of a split's folder may have the same names in all folders: then the split belongs to the name.
    """
    paths = source.files[split]
    for path in paths:
        name = path.name.split(".")[0]
        tells_split = len(paths) == 1 and splits_of(name) == [split]  # of eng.testa the ending tells it
        yield path, f"{source.name}_{name if tells_split else f'{split}_{stem_of(path)}'}"


def by_file(read: Callable[[Path, ReadCounts, str], Iterator[Document]]) -> ReadSplit:
    """A format's ``read`` from a function of a file, the counts, and what documents without an id are called."""

    def read_split(source: Source, split: str, how: Reading, counts: ReadCounts) -> Iterator[Document]:
        for path, name in named_files(source, split):
            yield from read(path, counts, name)

    return read_split


def id_of(row: Mapping[str, Any], otherwise: str) -> str:
    """The id of the document that a row of a table or of JSON belongs to."""
    return next((str(row[name]) for name in _ID_COLUMNS if row.get(name)), otherwise)


def iter_json(path: Path) -> Iterator[tuple[str, Any]]:
    """What a JSON file's list or a JSONL file's lines hold, with where it stands (``file:line``, ``file item 3``).

    Raises:
        DataError: not JSON.
    """
    text = read_text(path)
    lines = [(f"{path}:{n}", line) for n, line in enumerate(split_lines(text), start=1) if line.strip()]
    if ending_of(path) == ".jsonl" or (len(lines) > 1 and lines[0][1].rstrip().endswith("}")):
        for where, line in lines:
            yield from ((where, item) for item in _items_of(parse_json(line, where, object)))
        return
    whole = parse_json(text.removeprefix(BOM), path, object)
    items = chain.from_iterable(map(_items_of, whole if isinstance(whole, list) else [whole]))
    yield from ((f"{path} item {number}", item) for number, item in enumerate(items, start=1))


def _items_of(value: Any) -> list[Any]:
    """What a collection holds (BioC's, or what people annotate for spaCy); another value alone."""
    fields = value if isinstance(value, dict) else {}
    names = ("documents", "PubTator3", *(["annotations"] if "classes" in fields else []))
    return next((fields[name] for name in names if isinstance(fields.get(name), list)), [value])


def json_keys(path: Path) -> set[str]:
    """The keys in the first megabyte of a JSON file, at any depth: the first text may be long."""
    return set(re.findall(r'"(\w+)"\s*:', "\n".join(first_lines(path, 1 << 20))))


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, without byte order marks before them (of files that were joined).

    Only ``\n`` and ``\r\n`` end one (``str.splitlines`` also knows U+2028), or ``\r`` where there is no other.
    """
    text = text if "\n" in text else text.replace("\r", "\n")
    return text.removeprefix(BOM).replace("\r\n", "\n").replace(f"\n{BOM}", "\n").split("\n")
