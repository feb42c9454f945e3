"""Knows PubTator: ``ID|t|title`` and ``ID|a|abstract`` lines, then ``ID START END mention type ...`` by tabs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.spans import OFFSET
from biomerge_lib.corpora.documents import Document, Mention, ReadCounts
from biomerge_lib.corpora.formats import Format, by_file, ending_of, first_line, read_text, split_lines

_TEXT = re.compile(r"([^|\t]+)\|([a-z])\|(.*)", re.DOTALL)
_TITLE = re.compile(r"[^|\t]+\|t\|")


def read_pubtator(path: Path, counts: ReadCounts, name: str = "") -> Iterator[Document]:
    """Read a file's documents, all of which have ids; a blank line or the next title ends one.

    The text is the title, a line break, the abstract (offsets count one character between them). Relations
    (``ID CID ...``) are counted.

    Raises:
        DataError: not UTF-8, a line that is neither, or one of another document.
    """
    doc_id, start = "", 0
    texts: list[str] = []
    mentions: list[Mention] = []
    for number, line in enumerate([*split_lines(read_text(path)), ""], start=1):  # "" ends the last document
        where = f"{path}:{number}"
        text = _TEXT.fullmatch(line)
        if texts and (not line.strip() or (text and (text[2] == "t" or text[1] != doc_id))):
            yield Document(doc_id, "\n".join(texts), tuple(mentions), f"{path}:{start}")
            texts, mentions = [], []
        if not line.strip():
            continue
        if text and not mentions:
            if not texts:
                doc_id, start = text[1], number
            texts.append(text[3])
            continue
        columns = line.split("\t")
        if not texts or columns[0] != doc_id or len(columns) < 4:
            expected = f"a line of document {doc_id!r}" if texts else "ID|t|title"
            raise DataError(f"{where}: expected {expected} (PubTator), found {line[:60]!r}.")
        if columns[1][:1].isalpha():
            counts.other_lines += 1
        elif len(columns) < 5 or not (all(map(OFFSET.fullmatch, columns[1:3])) and columns[4].strip()):
            raise DataError(f"{where}: expected ID, START, END, mention, type by tabs, found {line[:60]!r}.")
        else:
            span = (int(columns[1]), int(columns[2]))
            mentions.append(Mention((span,), columns[4].strip(), columns[3], where))


def is_pubtator(path: Path) -> bool:
    """By its ending or its first line."""
    return ending_of(path) == ".pubtator" or _TITLE.match(first_line(path)) is not None


PUBTATOR = Format((".txt", ".pubtator"), by_file(read_pubtator), is_pubtator)
