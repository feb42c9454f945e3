"""Knows BioC, as XML and as JSON; docs/corpora.md says why no converter library reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import open_bytes
from biomerge_lib.core.spans import OFFSET, Span
from biomerge_lib.corpora.documents import UNTYPED, Document, Mention, ReadCounts
from biomerge_lib.corpora.formats import Format, by_file, ending_of, iter_json, json_keys


def read_bioc(path: Path, counts: ReadCounts, name: str) -> Iterator[Document]:
    """Read a file: each passage, or each of its sentences where it has them, becomes a document of its own.

    Passages share their document's id; each has one. A mention's type is its infon ``type``; an annotation without
    words is not checked against the text, one without a location (NLM-Chem's MeSH headings) is left out. Relations
    are counted.

    Raises:
        DataError: broken XML or JSON, an undefined entity, an element or a number missing.
    """
    rows = () if ending_of(path) == ".xml" else iter_json(path)
    as_xml = (_to_element("document", row, where.removeprefix(f"{path}").lstrip(": ")) for where, row in rows)
    for element in as_xml if rows else _iter_bioc_documents(path):
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
            if sentences:
                _refuse_annotation(passage, "sentence", path)
        counts.other_lines += len(element.findall("relation"))
        _refuse_annotation(element, "passage", path)


def _refuse_annotation(element: ElementTree.Element, inside: str, path: Path) -> None:
    if (stray := element.find("annotation")) is not None:
        move = f"an annotation beside {inside}s; move it into the {inside} that holds it."
        raise DataError(f"{path}:{stray.get(_LINE)}: {move}")


def _bioc_mention(node: ElementTree.Element, offset: int, path: Path) -> Mention:
    where = f"{path}:{node.get(_LINE)}"
    infons = {infon.get("key"): infon.text or "" for infon in node.iterfind("infon")}
    parts: list[Span] = []
    for location in node.iterfind("location"):
        start = _number(location.get("offset", ""), where) - offset
        parts.append((start, start + _number(location.get("length", ""), where)))
    words = node.findtext("text")
    if not words and all(start == end for start, end in parts):
        parts = []
    is_part = infons.get("CompositeRole") == "IndividualMention"
    return Mention(tuple(parts), infons.get("type") or UNTYPED, words or None, where, is_part)


_LINE = "{biomerge}line"  # the attribute that remembers an element's line


def _iter_bioc_documents(path: Path) -> Iterator[ElementTree.Element]:
    """The file's ``document`` elements one after the other (memory holds one), each element knowing its line."""
    parser = expat.ParserCreate()
    parser.buffer_text = True
    builder = ElementTree.TreeBuilder()
    opened: list[ElementTree.Element] = []  # the collection
    done: list[ElementTree.Element] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        element = builder.start(name, attributes | {_LINE: str(parser.CurrentLineNumber)})
        if not opened:
            opened.append(element)
            if name != "collection":
                line = f"{path}:{parser.CurrentLineNumber}"
                raise DataError(f"{line}: expected BioC's <collection>, found <{name}>.")

    def end(name: str) -> None:
        element = builder.end(name)
        if name == "document":
            done.append(element)
            opened[0].clear()

    def stop_at_entity(name: str, *_: object) -> int:  # expat would leave it out and shift all that follows
        raise DataError(f"{path}:{parser.CurrentLineNumber}: the entity &{name}; is not defined in the file.")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.SkippedEntityHandler = parser.ExternalEntityRefHandler = stop_at_entity
    with open_bytes(path) as stream:
        try:
            for block in iter(lambda: stream.read(1 << 16), b""):
                parser.Parse(block, False)
                yield from done
                done.clear()
            parser.Parse(b"", True)
        except (LookupError, ValueError) as error:
            raise DataError(f"{path}: its XML encoding cannot be read ({error}); save it as UTF-8.") from None
        except expat.ExpatError as error:
            reason = f"{expat.ErrorString(error.code)}, column {error.offset + 1}"
            raise DataError(f"{path}:{error.lineno}: broken XML ({reason}).") from None
    yield from done


def _to_element(tag: str, fields: Any, place: str) -> ElementTree.Element:
    """``{"passages": [{"offset": 0}]}`` as ``<passage><offset>0</offset></passage>``; a location has attributes."""
    if not isinstance(fields, dict):
        element = ElementTree.Element(tag, {_LINE: place})
        element.text = None if fields is None else str(fields)
        return element
    numbers = {name: str(value) for name, value in fields.items() if tag == "location"}
    element = ElementTree.Element(tag, {_LINE: place} | numbers)
    for name, value in fields.items():
        if name == "infons" and isinstance(value, dict):
            for key, said in value.items():
                infon = ElementTree.SubElement(element, "infon", {"key": key})
                infon.text = None if said is None else str(said)
        else:
            for one in value if isinstance(value, list) else [value]:
                element.append(_to_element(name.removesuffix("s"), one, place))
    return element


def _child(element: ElementTree.Element, name: str, path: Path) -> str:
    content = (element.findtext(name) or "").strip()
    if not content:
        raise DataError(f"{path}:{element.get(_LINE)}: <{element.tag}> has no <{name}>.")
    return content


def _number(digits: str, where: str) -> int:
    if not OFFSET.fullmatch(digits):
        raise DataError(f"{where}: expected an offset or length, found {digits!r}.")
    return int(digits)


def _has(path: Path) -> bool:
    return ending_of(path) == ".xml" or {"passages", "infons"} <= json_keys(path)


BIOC = Format((".xml", ".json", ".jsonl"), by_file(read_bioc), _has)
