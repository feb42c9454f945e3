r"""Knows WebAnno TSV 3 (WebAnno, INCEpTION): ``1-2\t8-11\tcan\t_`` below ``#Text=Aspirin can``.

Tokens are looked up in their sentence one after the other, so that it does not matter how the file counts offsets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby, takewhile
from pathlib import Path

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.spans import Span
from biomerge_lib.corpora.documents import UNTYPED, Document, Mention, ReadCounts
from biomerge_lib.corpora.formats import Format, by_file, first_line, read_text, split_lines

_TEXT = "#Text="
# What a feature is called that holds the type.
_TYPES = ("value", "label", "type", "tag", "class", "category")
_BUILT_IN = ("de.tudarmstadt.", "org.dkpro.")  # layers of words and pages
# What a backslash stands before, in texts and tokens.
_ESCAPED = {"\\": "\\", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "b": "\b"}


def read_webanno(path: Path, counts: ReadCounts, doc_id: str) -> Iterator[Document]:
    """Read a file's sentences; two values of a token (``A[1]|B[2]``) belong to two mentions.

    Raises:
        DataError: several layers hold spans and none is of named entities, a line is no token of its sentence, or a
            mention goes over its end (named as ``file:line``).
    """
    lines = list(enumerate(split_lines(read_text(path)), start=1))
    at = _find_column([line for _, line in lines if line.startswith("#T_")], path)
    reached: set[tuple[str, str]] = set()  # the mentions of the last token
    for is_sentence, block in groupby(lines, key=lambda numbered: numbered[1].strip() != ""):
        sentence = list(block)
        said = [line.removeprefix(_TEXT) for _, line in sentence if line.startswith(_TEXT)]
        text = _unescape("\n".join(said))
        found: dict[tuple[str, str], Span] = {}  # by type, and number of the mention or of the line
        start = end = 0
        for number, line in sentence if is_sentence else []:
            if line.startswith("#"):
                counts.other_lines += not line.startswith(_TEXT)
                continue
            columns = line.split("\t")
            is_part = "." in columns[0]  # 1-2.1 is a part of token 1-2
            words = _unescape(columns[2]) if len(columns) > at else ""
            start = text.find(words, start if is_part else end) if words else -1
            if start < 0:
                where = f"{path}:{number}"
                raise DataError(f"{where}: expected a token of {text[:40]!r}, found {line[:40]!r}.")
            is_first, token = end == 0, (start, start + len(words))
            end = end if is_part else token[1]
            before, reached = reached, set()
            for value in re.split(r"(?<!\\)\|", columns[at] if columns[at] != "_" else ""):
                kind, mention = (*re.split(r"(?<!\\)\[", value), "")[:2]
                key = (UNTYPED if kind == "*" else kind.replace("\\", ""), mention or f"line {number}")
                if kind:
                    found[key] = (found.get(key, token)[0], token[1])
                    reached.add(key)
            if is_first and before & reached:
                problem = f"the mention {columns[at]!r} begins in the sentence before"
                raise DataError(f"{path}:{number}: {problem}; end it there, or join the sentences.")
        where = f"{path}:{sentence[0][0]}"
        mentions = tuple(Mention((span,), kind, None, where) for (kind, _), span in found.items())
        if text:
            yield Document(doc_id, text, mentions, where, is_sentence=True)


def _unescape(text: str) -> str:
    return re.sub(r"\\([\\tnfrb])", lambda found: _ESCAPED[found[1]], text)


def _find_column(layers: list[str], path: Path) -> int:
    """The column of the mentions' types; ``layers`` are the header's lines on layers and their features.

    A feature is the type by its name (``value`` of ``NamedEntity|identifier|value``), else the last one before slots.
    """
    found: dict[str, int] = {}
    at = 3  # after number, offsets and token
    for layer in layers:
        name, *features = layer.split("|")
        own = (*_TYPES, re.split("[.=]", name)[-1].lower())
        simple = list(takewhile(lambda feature: not feature.startswith("ROLE_"), features))
        named = [place for place, feature in enumerate(simple) if feature.lower() in own]
        if name.startswith("#T_SP="):
            found[name.removeprefix("#T_SP=")] = at + (named or [max(len(simple) - 1, 0)])[0]
        at += max(len(features), 1)
    chosen = [name for name in found if name.endswith("NamedEntity")]
    chosen = chosen or [name for name in found if not name.startswith(_BUILT_IN)] or list(found)
    if len(chosen) != 1:
        raise DataError(f"{path}: {len(chosen)} layers hold spans ({', '.join(chosen)}); export one of them.")
    return found[chosen[0]]


def _has(path: Path) -> bool:
    return first_line(path).startswith("#FORMAT=WebAnno TSV 3")


WEBANNO = Format((".tsv",), by_file(read_webanno), _has)
