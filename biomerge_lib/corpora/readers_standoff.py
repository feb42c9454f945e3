"""Knows the files that hold documents and mentions apart: BRAT, PubTator, BioC XML. Gives documents, not records.

Read here and not by a converter library, which was measured first on BC5CDR and AnatEM (counts of their README):
bconv 1.2.1 reads one of BC5CDR's six files (an assertion stops it at parts of composite mentions in two BioC files,
the composite column in all three PubTator files), has no BRAT reader and holds lxml below 5. bioc 2.1 finds every
mention of BC5CDR, but strips lines (a title that ends in a blank shifts the whole abstract), splits at U+2028, opens
files in the locale's encoding, checks no mention against its text and names no line: the errors below need the lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.spans import Span
from biomerge_lib.corpora.documents import UNTYPED, Document, Mention, ReadCounts, split_lines

_BRAT_OTHER = "EARMNC#*"  # events, attributes, relations, modifications, normalisations, notes, equivalences
_BRAT_PARTS = re.compile(r"(\S+) (\d+ \d+(?:;\d+ \d+)*)")
_PUBTATOR_TEXT = re.compile(r"([^|\t]+)\|([a-z])\|(.*)", re.DOTALL)


def read_brat(paths: Sequence[Path], counts: ReadCounts) -> Iterator[Document]:
    r"""Read BRAT standoff: ``NAME.txt`` and ``NAME.ann`` (``T1\tCell 336 341\tcells``) beside each other.

    ``paths`` are the folder's .txt and .ann files, the document's id is NAME. Parts of a discontinuous mention are
    ``Cell 0 3;8 12``. Lines other than T (events, attributes, notes) are counted.

    Raises:
        DataError: a .txt without its .ann or the reverse, not UTF-8, or a line that is not BRAT's.
    """
    there = set(paths)
    for path in paths:
        partner = path.with_suffix(".ann" if path.suffix == ".txt" else ".txt")
        if partner not in there:
            raise DataError(
                f"{path}: no {partner.name} beside it; each .txt needs its .ann, each .ann its .txt."
            )
    for path in paths:
        if path.suffix == ".txt":
            mentions = tuple(_brat_mentions(path.with_suffix(".ann"), counts))
            yield Document(path.stem, read_text(path), mentions, str(path))


def _brat_mentions(path: Path, counts: ReadCounts) -> Iterator[Mention]:
    for number, line in split_lines(read_text(path)):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        if line[0] in _BRAT_OTHER:
            counts.other_lines += 1
            continue
        columns = line.split("\t", 2)
        match = _BRAT_PARTS.fullmatch(columns[1]) if len(columns) == 3 and line[0] == "T" else None
        if match is None:
            raise DataError(f"{where}: expected ID<TAB>Type START END<TAB>mention, found {line[:60]!r}.")
        parts = [part.split(" ") for part in match[2].split(";")]
        yield Mention(tuple((int(start), int(end)) for start, end in parts), match[1], columns[2], where)


def read_pubtator(path: Path, counts: ReadCounts) -> Iterator[Document]:
    """Read PubTator: ``ID|t|title`` and ``ID|a|abstract`` lines, then ``ID START END mention type ...`` by tabs.

    The text is the title, a line break, the abstract (offsets count one character between them). Relations
    (``ID CID ...``) are counted; a blank line or the next title ends a document.

    Raises:
        DataError: not UTF-8, a line that is neither, or one of another document.
    """
    doc_id, start = "", 0
    texts: list[str] = []
    mentions: list[Mention] = []
    for number, line in split_lines(read_text(path).removeprefix("\ufeff")):
        where = f"{path}:{number}"
        text = _PUBTATOR_TEXT.fullmatch(line)
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
        elif (
            len(columns) < 5
            or not columns[1].isdecimal()
            or not columns[2].isdecimal()
            or not columns[4].strip()
        ):
            raise DataError(f"{where}: expected ID, START, END, mention, type by tabs, found {line[:60]!r}.")
        else:
            span = (int(columns[1]), int(columns[2]))
            mentions.append(Mention((span,), columns[4].strip(), columns[3], where))
    if texts:
        yield Document(doc_id, "\n".join(texts), tuple(mentions), f"{path}:{start}")


def read_bioc(path: Path, counts: ReadCounts) -> Iterator[Document]:
    """Read BioC XML: each passage, or each of its sentences where it has them, becomes a document of its own.

    Passages share their document's id. A mention's type is its infon ``type``; an annotation without words is not
    checked against the text. Relations are counted.

    Raises:
        DataError: broken XML, an undefined entity, an element or a number missing.
    """
    for element in _iter_bioc_documents(path):
        doc_id = _child(element, "id", path)
        for passage in element.iterfind("passage"):
            sentences = passage.findall("sentence")
            counts.other_lines += len(passage.findall("relation"))
            for block in sentences or [passage]:
                where = f"{path}:{block.get(_LINE)}"
                offset = _number(_child(block, "offset", path), where)
                text = block.findtext("text") or ""
                mentions = tuple(_bioc_mention(node, offset, path) for node in block.iterfind("annotation"))
                yield Document(doc_id, text, mentions, where, is_sentence=bool(sentences))
            if sentences and (stray := passage.find("annotation")) is not None:
                where = f"{path}:{stray.get(_LINE)}"
                raise DataError(
                    f"{where}: an annotation beside sentences; move it into the sentence that holds it."
                )
        counts.other_lines += len(element.findall("relation"))
        if (stray := element.find("annotation")) is not None:
            where = f"{path}:{stray.get(_LINE)}"
            raise DataError(
                f"{where}: an annotation beside passages; move it into the passage that holds it."
            )


def _bioc_mention(node: ElementTree.Element, offset: int, path: Path) -> Mention:
    where = f"{path}:{node.get(_LINE)}"
    infons = {infon.get("key"): infon.text or "" for infon in node.iterfind("infon")}
    parts: list[Span] = []
    for location in node.iterfind("location"):
        start = _number(location.get("offset", ""), where) - offset
        parts.append((start, start + _number(location.get("length", ""), where)))
    if not parts:
        raise DataError(f"{where}: the annotation has no location.")
    is_part = infons.get("CompositeRole") == "IndividualMention"
    return Mention(tuple(parts), infons.get("type") or UNTYPED, node.findtext("text"), where, is_part)


_LINE = "{biomerge}line"  # the attribute that remembers an element's line


def _iter_bioc_documents(path: Path) -> Iterator[ElementTree.Element]:
    """The file's ``document`` elements one after the other (memory holds one), each element knowing its line."""
    parser = expat.ParserCreate()
    parser.buffer_text = True
    builder: ElementTree.TreeBuilder | None = None  # inside a document
    done: list[ElementTree.Element] = []
    depth = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal builder, depth
        if depth == 0 and name != "collection":
            raise DataError(
                f"{path}:{parser.CurrentLineNumber}: expected BioC's <collection>, found <{name}>."
            )
        depth += 1
        if name == "document":
            builder = ElementTree.TreeBuilder()
        if builder is not None:
            builder.start(name, attributes | {_LINE: str(parser.CurrentLineNumber)})

    def end(name: str) -> None:
        nonlocal builder, depth
        depth -= 1
        if builder is not None:
            builder.end(name)
        if name == "document" and builder is not None:
            done.append(builder.close())
            builder = None

    def data(text: str) -> None:
        if builder is not None:
            builder.data(text)

    def stop_at_entity(name: str, _: bool) -> None:  # expat would leave it out and shift all that follows
        raise DataError(f"{path}:{parser.CurrentLineNumber}: the entity &{name}; is not defined in the file.")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, data
    parser.SkippedEntityHandler = stop_at_entity
    with path.open("rb") as stream:
        try:
            for block in iter(lambda: stream.read(1 << 16), b""):
                parser.Parse(block, False)
                yield from done
                done.clear()
            parser.Parse(b"", True)
        except expat.ExpatError as error:
            reason = expat.ErrorString(error.code)
            raise DataError(
                f"{path}:{error.lineno}: broken XML ({reason}, column {error.offset + 1})."
            ) from None
    yield from done


def _child(element: ElementTree.Element, name: str, path: Path) -> str:
    content = (element.findtext(name) or "").strip()
    if not content:
        raise DataError(f"{path}:{element.get(_LINE)}: <{element.tag}> has no <{name}>.")
    return content


def _number(digits: str, where: str) -> int:
    if not digits.isdecimal():
        raise DataError(f"{where}: expected an offset or length, found {digits!r}.")
    return int(digits)


def read_text(path: Path) -> str:
    """The file's characters as they are (no line end is changed).

    Raises:
        DataError: not UTF-8 (named as ``file:line``).
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {error.start + 1} of the file). "
            f"If it is Latin-1: iconv -f latin1 -t UTF-8 {path} > NEW_FILE"
        ) from None
