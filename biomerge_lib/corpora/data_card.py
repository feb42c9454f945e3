"""Knows how a data card and its records read as tables; knows nothing of formats, tokens or models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from biomerge_lib.core.records import Record, iter_lines

PUBLISHED = Path(__file__).with_name("published_counts.csv")


def mention_table(splits: Mapping[str, Iterable[Record]]) -> pd.DataFrame:
    """One row a mention: dataset, split, mention (in lower case), its words, and type (empty where it is not known)."""
    rows = [
        (record.dataset, split, record.text[start:end].lower(), kind)
        for split, records in splits.items()
        for record in records
        for (start, end), kind in zip(record.spans, record.types or [""] * len(record.spans), strict=True)
    ]
    table = pd.DataFrame(rows, columns=["dataset", "split", "mention", "type"])
    return table.assign(words=table["mention"].str.split().str.len())


def unseen_share(train: Iterable[Record], other: Iterable[Record]) -> float:
    """Share of ``other``'s mentions whose text is no mention of ``train`` (compared in lower case)."""
    seen, found = mention_table({"train": train}), mention_table({"other": other})
    return float((~found["mention"].isin(set(seen["mention"]))).mean()) if len(found) else 0.0


def _by_split(card: Mapping[str, Any], part: str) -> dict[tuple[str, str], dict[str, Any]]:
    sources = card["sources"].items()
    return {(dataset, split): counts for dataset, source in sources for split, counts in source[part].items()}


def data_card_table(card: Mapping[str, Any]) -> pd.DataFrame:
    """The data card's counts as a table: one row a source and split."""
    table = pd.DataFrame.from_dict(_by_split(card, "splits"), orient="index")
    return table.rename_axis(["dataset", "split"]).drop(columns="types", errors="ignore")


def type_table(card: Mapping[str, Any]) -> pd.DataFrame:
    """How many mentions each type has, as the corpora came: one row a source and type, one column a split."""
    splits = _by_split(card, "splits").items()
    table = pd.DataFrame({place: counts["types"] or {"(none)": counts["spans"]} for place, counts in splits})
    table = table.rename_axis(index="type", columns=["dataset", "split"]).stack("dataset", future_stack=True)
    table = table.swaplevel().dropna(how="all").fillna(0).astype(int)
    return table.sort_values(["dataset", "train"], ascending=[True, False])


def published_table(card: Mapping[str, Any]) -> pd.DataFrame:
    """What was read beside what a corpus's authors say, where noted. Without document ids a sentence is a document."""
    names = ["documents", "sentences", "annotated"]
    readings = {dataset: pd.DataFrame(source["reading"]) for dataset, source in card["sources"].items()}
    read = pd.DataFrame({name: table.loc[names].sum(axis=1) for name, table in readings.items()}).T
    return read.join(pd.read_csv(PUBLISHED, index_col="dataset")).fillna("")


def union_table(card: Mapping[str, Any]) -> pd.DataFrame:
    """What each step of the union left of each corpus's training sentences: one row a step, one column a corpus."""
    steps = card["union"]["steps"]
    table = pd.DataFrame([step["left"] for step in steps], index=[step["step"] for step in steps])
    table["all"] = table.sum(axis=1)
    table["removed"] = [sum(step["removed"].values()) for step in steps]
    return table


def leak_table(card: Mapping[str, Any], when: str = "before") -> pd.DataFrame:
    """Which sentences train, dev and test share: one row a pair of corpora and splits. ``when``: before, after."""
    counts = ["sentences", "verbatim", "short", "documents", "source_sentences"]
    table = pd.DataFrame(card["union"]["leaks"][when], columns=["from", "into", *counts])
    return table.astype(dict.fromkeys(["from", "into"], str) | dict.fromkeys(counts, int))


def reading_table(card: Mapping[str, Any]) -> pd.DataFrame:
    """What the readers found and did, one row a source and split: mentions left out, joined sentences, other units."""
    table = pd.DataFrame.from_dict(_by_split(card, "reading"), orient="index")
    table = table.drop(columns=["types", "offset_units"], errors="ignore").rename_axis(["dataset", "split"])
    return table.map(lambda n: len(n) if isinstance(n, list) else n).fillna(0).astype(int)


def conflict_table(card: Mapping[str, Any]) -> pd.DataFrame:
    """Sentences with different gold, before and after the union: in train alone, and in all splits."""
    conflicts = card["union"]["conflicts"].items()
    rows = {(when, where): found for when, both in conflicts for where, found in both.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["when", "where"])
    return table.drop(columns="pairs")


def read_conflicts(data_dir: Path | str) -> list[list[dict[str, Any]]]:
    """The groups of ``conflicts.jsonl``: each the versions of one sentence."""
    return [json.loads(line) for _, line in iter_lines(Path(data_dir) / "conflicts.jsonl")]


def seen_table(train: Iterable[Record], other: Iterable[Record]) -> pd.DataFrame:
    """Share of each corpus's mentions whose string is a mention in each corpus's train (lower case), and in any.

    One row a corpus of ``other``. What stands in the column ``any`` a dictionary could find.
    """
    seen = mention_table({"train": train})
    found = mention_table({"other": other})[["dataset", "mention"]]
    for name, group in seen.groupby("dataset", sort=False):
        found[name] = found["mention"].isin(set(group["mention"]))
    found["any"] = found["mention"].isin(set(seen["mention"]))
    by_dataset = found.drop(columns="mention").groupby("dataset", sort=False)
    table = by_dataset.mean()
    table.insert(0, "mentions", by_dataset.size())
    return table
