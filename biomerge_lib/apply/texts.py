"""Knows the files that raw texts come from; knows nothing of models or spans.

    .txt, a BRAT folder (.ann ignored), JSONL, PubTator --[iter_texts]--> (doc_id, text), one at a time

Offsets count in the text as given here: a file's own characters, the title and abstract of PubTator joined by a line
break, ``text`` of a JSONL line or what follows ``<NER> `` in the ``input`` of a record.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import open_bytes, parse_json
from biomerge_lib.core.records import NER_PREFIX, iter_lines
from biomerge_lib.corpora.documents import ReadCounts
from biomerge_lib.corpora.format_pubtator import is_pubtator, read_pubtator
from biomerge_lib.corpora.formats import ending_of, entries_of, read_text, refuse_utf16, stem_of

STDIN = "-"
ENDINGS = (".txt", ".jsonl", ".pubtator")
NO_PROSE = (".json", ".csv", ".tsv", ".xml", ".html", ".ann", ".conll", ".iob")
EXPECTED = ' Expected: {"text": "...", "doc_id": "..."}, or the project\'s record.'
log = logging.getLogger("biomerge")


class _TextLine(BaseModel):
    text: str | None = None
    input: str | None = None
    doc_id: str | int | None = None
    id: str | int | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A text and the name of its document."""

    doc_id: str
    text: str


def iter_texts(paths: Iterable[Path | str], *, name_empty: bool = True) -> Iterator[Text]:
    """The texts of files and folders in order; memory holds one file, or one line of JSONL.

    ``-`` is one text from standard input. A folder gives its .txt, .jsonl and .pubtator files (.gz, too) by name. A
    .txt that begins with ``ID|t|`` is PubTator. Texts of nothing but white space are left out, with a warning if
    ``name_empty``.

    Raises:
        DataError: a path or every text is missing, a file is binary, not UTF-8 or of a kind that is no prose (.csv), a
            line is broken (``file:line``).
    """
    found = 0
    for path in paths:
        for text in _read_path(path):
            found += 1
            if text.text.strip():
                yield text
            elif name_empty:
                log.warning("%s: document %r is empty and is left out", str(path), text.doc_id)
    if not found:
        raise DataError("there is no text in what was given.")


def _read_path(path: Path | str) -> Iterator[Text]:
    if str(path) == STDIN:
        content = sys.stdin.buffer.read()
        _refuse_binary(content, "standard input")
        try:
            yield Text("stdin", content.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: not UTF-8 (byte {error.start + 1}).") from None
        return
    path = Path(path)
    inside = entries_of(path) if path.is_dir() else []
    inside = [file for file in inside if ending_of(file) in ENDINGS and file.is_file()]
    files = [path] if path.is_file() else inside
    if not files:
        no = f"no {', '.join(ENDINGS)} file in this folder" if path.is_dir() else "no such file or folder"
        no = f"a pipe, which is read once: --file - < {path}" if path.is_fifo() else no
        raise DataError(f"{path}: {no}.")
    for file in files:
        with open_bytes(file) as stream:
            _refuse_binary(stream.read(1 << 16), file)
        if ending_of(file) == ".jsonl":
            yield from _read_jsonl(file)
        elif is_pubtator(file):
            for document in read_pubtator(file, ReadCounts()):
                yield Text(document.doc_id, document.text)
        elif ending_of(file) in NO_PROSE:
            raise DataError(
                f"{file}: {', '.join(ENDINGS)} are read. As plain text, all the same: --file - < {file}"
            )
        else:
            yield Text(stem_of(file), read_text(file))


def _read_jsonl(path: Path) -> Iterator[Text]:
    for number, line in iter_lines(path):
        where = f"{path}:{number}"
        fields = parse_json(line, where, _TextLine, cure=EXPECTED)
        text, prefix = (fields.input, NER_PREFIX) if fields.text is None else (fields.text, "")
        if text is None:
            raise DataError(f"{where}: no text.{EXPECTED}")
        doc_id = fields.id if fields.doc_id is None else fields.doc_id
        yield Text(f"{stem_of(path)}-{number}" if doc_id is None else str(doc_id), text.removeprefix(prefix))


def _refuse_binary(start: bytes, path: Path | str) -> None:
    refuse_utf16(start, path)
    if b"\0" in start:
        raise DataError(f"{path}: a binary file; text (UTF-8) is needed.")
