"""Knows annotation tools' JSON and JSONL: doccano, GLiNER, Label Studio, Prodigy, PubAnnotation, spaCy (and DocBin).

A row has a text and its mentions, a mention its start, end and type; ``FIELDS`` has what the tools call them. Offsets
count characters, GLiNER's tokens. A row's ``id`` is a number of the tool's, and names no document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.spans import Span
from biomerge_lib.corpora.documents import UNTYPED, Document, Mention, ReadCounts
from biomerge_lib.corpora.format_hub import has_tags
from biomerge_lib.corpora.formats import Format, by_file, ending_of, first_line, id_of, iter_json, json_keys

# What a field may be called, and what it may be; the first name that there is counts.
_MENTIONS = ("spans", "entities", "denotations", "ents", "ner", "label", "labels")
_TYPES = ("label", "labels", "obj", "type", "tag", "category", "entity_type", "entity_group", "entity")
FIELDS: dict[str, tuple[tuple[str, ...], tuple[type, ...]]] = {
    "text": (("tokenized_text", "text", "data", "content", "sentence", "document"), (str, list)),
    "mentions": ((*_MENTIONS, "annotations", "annotation", "mentions"), (list,)),
    "start": (("start", "start_offset", "begin"), (int,)),
    "end": (("end", "end_offset"), (int,)),
    "words": (("text",), (str, type(None))),
    "type": (_TYPES, (str, int, list, type(None))),
}
_WORDS = ("word", "value", "mention", "surface")
_DOCBIN = ".spacy"


def read_json(path: Path, counts: ReadCounts, name: str) -> Iterator[Document]:
    """A file's texts with their mentions; one that an annotator rejected or skipped is counted (``other_lines``).

    Raises:
        DataError: not JSON, a row or mention lacks a field, a task has two annotations (each named by its line or
            number), or spaCy is needed and not installed.
    """
    rows = _iter_docbin(path) if ending_of(path) == _DOCBIN else iter_json(path)
    for number, (where, row) in enumerate(rows, start=1):
        if isinstance(row, list) and len(row) == 2:  # spaCy: [text, {"entities": ...}]
            row = {"text": row[0], "entities": _mentions_in(row[1], where)}
        elif isinstance(row, dict) and isinstance(row.get("data"), dict):
            row = _label_studio_row(row, where, counts)
        text = _field(row, "text", where)
        if row.get("answer", "accept") != "accept":  # Prodigy
            counts.other_lines += 1
            continue
        items = _mentions_in(row, where)
        places = None
        if isinstance(text, list):  # GLiNER: numbers of tokens, the last one included
            tokens = list(map(str, text))
            ends = list(accumulate(len(token) + 1 for token in tokens))
            places, text = list(zip([0, *ends], [end - 1 for end in ends], strict=False)), " ".join(tokens)
        mentions = tuple(_mention_of(item, places, where, text) for item in items)
        doc_id = id_of(row, f"{name}_{number:05d}")
        yield Document(doc_id, text, mentions, where, is_sentence=places is not None)


def _mentions_in(row: Any, where: str) -> list[Any]:
    """The mentions of a row, of whose fields one may hold any; spaCy's span groups are joined with its entities."""
    fields = row if isinstance(row, dict) else {}
    if isinstance(groups := fields.get("spans"), dict):
        ents = [one for one in (fields.get("ents"), *groups.values()) if isinstance(one, list)]
        fields = {"ents": list(chain.from_iterable(ents))}
    lists = {name: fields[name] for name in FIELDS["mentions"][0] if isinstance(fields.get(name), list)}
    found = [name for name, items in lists.items() if any(isinstance(item, dict | list) for item in items)]
    if len(found) > 1:
        raise DataError(f"{where}: mentions stand in {' and in '.join(found)}; keep one of them.")
    is_prodigy = "answer" in fields and not fields.get("spans")
    is_pubannotation = "sourcedb" in fields and not {"denotations", "tracks"} & fields.keys()
    if not found and (is_prodigy or is_pubannotation):  # which leave the field out where there are none
        return []
    return lists[found[0]] if found else _field(fields or row, "mentions", where)


def _mention_of(item: Any, places: list[Span] | None, where: str, text: str) -> Mention:
    if isinstance(item, list):
        item = dict(zip(("start", "end", "label", "word"), item, strict=False))
    inner = item.get("span", item) if isinstance(item, dict) else item  # PubAnnotation
    parts = inner if isinstance(inner, list) else [inner]  # several of a discontinuous mention
    spans = [(_field(part, "start", where), _field(part, "end", where)) for part in parts]
    if places is not None:
        inside = range(len(places))
        spans = [(places[a][0], places[b][1]) if a in inside and b in inside else (-1, -1) for a, b in spans]
    kind = _field(item, "type", where, "")
    kind = "|".join(map(str, kind if isinstance(kind, list) else ["" if kind is None else kind]))
    if kind == "O":
        raise DataError(f"{where}: a mention has type O, as a tag outside of mentions; give mentions alone.")
    words = _field(item, "words", where, None)
    if words is None:  # what may be a normalised form is believed where the text has it
        words = next((str(item[name]) for name in _WORDS if item.get(name) and str(item[name]) in text), None)
    return Mention(tuple(spans), kind or UNTYPED, words, where)


def _label_studio_row(row: dict[str, Any], where: str, counts: ReadCounts) -> dict[str, Any]:
    """A task as a row: its text, and the labels of its one annotation (the ground truth where there are several)."""
    tasks = _objects(row.get("annotations", row.get("completions")))
    done = [one for one in tasks if not one.get("was_cancelled")]
    done = [one for one in done if one.get("ground_truth")] or done
    if len(done) > 1:
        problem = f"{len(done)} annotations of one task; mark one as ground truth, or export one."
        raise DataError(f"{where}: {problem}")
    results = _objects(done[0].get("result")) if done else []
    labelled = [one.get("value") for one in results if str(one.get("type", "labels")).endswith("labels")]
    spans = [value for value in _objects(labelled) if "start" in value]
    counts.other_lines += len(results) - len(spans)
    texts = [value for value in row["data"].values() if isinstance(value, str)]
    text = {"text": texts[0]} if len(texts) == 1 else {}  # under any name
    return {**text, **row["data"], "spans": spans, "answer": "accept" if done else "skipped"}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _field(fields: Mapping[str, Any], kind: str, where: str, *default: Any) -> Any:
    """The field under one of its names; ``default`` where it has none of them.

    Raises:
        DataError: it is missing, or not of its type.
    """
    names, types = FIELDS[kind]
    found = [fields[name] for name in names if name in fields] if isinstance(fields, dict) else []
    if not found and not default:
        raise DataError(f"{where}: no {kind} ({', '.join(names)}) in {str(fields)[:60]}.")
    value = [*found, *default][0]
    if not isinstance(value, types):
        raise DataError(f"{where}: the {kind} cannot be {str(value)[:40]!r}.")
    return value


def _iter_docbin(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        spacy = import_module("spacy")
    except ImportError:
        missing = "only spaCy reads a DocBin, and is not installed: pip install spacy."
        raise DataError(f"{path}: {missing}") from None
    docs = spacy.tokens.DocBin().from_disk(path).get_docs(spacy.blank("xx").vocab)
    for number, doc in enumerate(docs, start=1):
        yield f"{path} item {number}", doc.to_json()


def _has(path: Path) -> bool:
    """A text and mentions, and neither a hub row's nor a record's keys."""
    if ending_of(path) == _DOCBIN:
        return True
    keys = json_keys(path)
    is_list = first_line(path).lstrip().startswith("[")
    has_text = is_list or not keys.isdisjoint({*FIELDS["text"][0], "classes"})
    has_mentions = not keys.isdisjoint({*FIELDS["mentions"][0], "result", "sourcedb", "answer"})
    return has_text and has_mentions and not has_tags(keys) and keys.isdisjoint({"input", "passages"})


JSON = Format((".json", ".jsonl", _DOCBIN), by_file(read_json), _has)
