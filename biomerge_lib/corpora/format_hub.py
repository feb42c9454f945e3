"""Knows data sets in the hub's layout, streamed through ``datasets.load_dataset``; knows nothing of other formats.

A row is a sentence (``tokens`` and ``ner_tags``: numbers named by ClassLabel, or the tags themselves) or a document
(the ``bigbio_kb`` columns ``document_id``, ``passages`` and ``entities``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import Span
from biomerge_lib.corpora.documents import UNTYPED, Document, Mention, ReadCounts
from biomerge_lib.corpora.formats import (
    Column,
    Format,
    Reading,
    Source,
    ending_of,
    id_of,
    json_keys,
    splits_of,
)
from biomerge_lib.corpora.tags import (
    LOOKED_AT,
    TAG_COLUMNS,
    ParsedTag,
    make_record,
    parse_tag,
    refuse_implausible,
)

TOKEN_COLUMNS = ("tokens", "words")


def find_hub(name: str, dataset: str, splits: Sequence[str], optional: Collection[str] = ()) -> Source:
    """A data set, opened: ``name`` is a folder or a hub name, with ``#CONFIG`` where it has several.

    Raises:
        DataError: it is not there, cannot be reached, is not in a layout that ``datasets`` knows, or lacks a split.
    """
    from datasets import load_dataset, load_from_disk  # seconds to import

    path, _, config = name.partition("#")
    try:
        states = [*Path(path).glob("state.json"), *sorted(Path(path).glob("*/state.json"))]
        saved = [state.parent for state in states]  # by save_to_disk
        available = {split.name: load_from_disk(split) for split in saved} or load_dataset(
            path, config or None, streaming=True
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"hub:{name}: datasets cannot load it ({reason}).") from error
    streams = {}
    for split in splits:
        found = [key for key in available if splits_of(key) == [split]]
        if len(found) > 1 or (not found and split not in optional):
            problem = f"{len(found)} splits" if found else "no split"
            raise DataError(f"hub:{name}: {problem} for {split}; it has {', '.join(available)}.")
        if found:
            streams[split] = available[found[0]]
    return Source(dataset, "hub", name, {"": hub_files(Path(name))}, streams)


def hub_files(folder: Path) -> list[Path]:
    """Data files of a folder in the hub's layout: at the top, in data/ or in a configuration's folder."""
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern)]
    return sorted(path for path in found if ending_of(path) in HUB.endings and path.is_file())


def _read(source: Source, split: str, how: Reading, counts: ReadCounts) -> Iterator[Record | Document]:
    stream, where = source.streams[split], f"hub:{source.location} {split}"
    looked_at: list[str] = []
    parsed_tags: dict[str, ParsedTag] = {}
    for number, row in enumerate(_rows(stream, where)):
        at = f"{where} row {number}"
        if "passages" in row and "entities" in row:
            yield _bigbio_document(row, at)
            continue
        words_in = _column(row, "token_column", how.token_column, TOKEN_COLUMNS, at)
        tags_in = _column(row, "tag_column", how.tag_column, TAG_COLUMNS, at)
        tokens, found = row[words_in] or [], row[tags_in] or []
        if not isinstance(tokens, list) or not isinstance(found, list):
            raise DataError(f"{at}: {words_in} and {tags_in} must be lists, of a tag for each token.")
        if len(tokens) != len(found):
            raise DataError(f"{at}: {len(tokens)} {words_in} but {len(found)} {tags_in}.")
        if None in (*tokens, *found):
            missing = "was it the word NA or null?" if None in tokens else "store O for no tag."
            raise DataError(f"{at}: {words_in if None in tokens else tags_in} has an empty entry; {missing}")
        for tag in found:
            if str(tag) not in parsed_tags:
                parsed_tags[str(tag)] = parse_tag(_name_of(tag, stream.features, tags_in, at), at)
        words = [str(token).strip() for token in tokens]
        tags = [parsed_tags[str(tag)] for tag, word in zip(found, words, strict=True) if word]
        words = list(filter(None, words))
        counts.blank_tokens += len(tokens) - len(words)
        if how.token_column is None and len(looked_at) < LOOKED_AT:
            looked_at += words
        if words:
            doc_id = id_of(row, f"{source.name}_{split}_s{number:05d}")
            yield make_record(words, tags, doc_id, source.name, types=how.types, counts=counts)
        else:
            counts.empty_documents += 1
    refuse_implausible(looked_at, where, "column " + " or ".join(TOKEN_COLUMNS))


def _rows(stream: Any, where: str) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for row in stream:
            yield row
            number += 1
    except Exception as error:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise DataError(f"{where} row {number}: datasets cannot read it ({reason}).") from error


def _column(row: Mapping[str, Any], parameter: str, given: Column, names: Sequence[str], where: str) -> str:
    names = names if given is None else [str(given)]
    found = [name for name in names if name in row]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{where}: {' and '.join(found)} may be meant: set {parameter} to one of them.")
    has = ", ".join(sorted(row)) or "none"
    raise DataError(
        f"{where}: no column {' or '.join(names)}; it has {has}. Set {parameter} to one of these names."
    )


def _name_of(tag: Any, features: Mapping[str, Any] | None, column: str, where: str) -> str:
    """The tag itself, or what the column's ClassLabel calls its number."""
    if isinstance(tag, str):
        return tag
    names = getattr(getattr((features or {}).get(column), "feature", None), "names", None)
    if names is None:
        hint = "declare a ClassLabel (dataset_info in the README.md)"
        raise DataError(f"{where}: {column} has numbers without names; {hint} or store the tags as strings.")
    if not 0 <= tag < len(names):
        raise DataError(f"{where}: tag {tag} has no name; {column} names 0 to {len(names) - 1}.")
    return names[tag]


def _bigbio_document(row: Mapping[str, Any], where: str) -> Document:
    """The row's document, its passages at their offsets (what lies between them becomes one line break and spaces)."""
    text = ""
    mentions = []
    try:
        for passage in row["passages"]:
            for words, (start, _) in zip(passage["text"], passage["offsets"], strict=True):
                if start < len(text):
                    raise DataError(f"{where}: the passage at {start} overlaps the one before.")
                text += ("\n" + " " * (start - len(text) - 1) if start > len(text) else "") + words
        for entity in row["entities"]:
            parts: list[Span] = [(index(start), index(end)) for start, end in entity["offsets"]]
            kind, words = str(entity["type"] or UNTYPED), " ".join(entity["text"])
            mentions.append(Mention(tuple(parts), kind, words, where))
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{where}: passages or entities are not bigbio's ({error!r}).") from None
    return Document(str(row.get("document_id") or row.get("id")), text, tuple(mentions), where)


def has_tags(keys: set[str]) -> bool:
    """Whether a row of these keys is a sentence with tags; annotation tools write where each token starts."""
    return not keys.isdisjoint(TOKEN_COLUMNS) and not keys.isdisjoint(TAG_COLUMNS) and "start" not in keys


def _has(path: Path) -> bool:
    return not json_keys(path).isdisjoint({*TOKEN_COLUMNS, "passages"})


HUB = Format((".parquet", ".arrow", ".jsonl", ".json"), _read, _has)
