"""Knows how corpora become one data set: the three JSONL files and their data card. Knows nothing of formats.

corpora --[readers]--> records --[union]--> {train,dev,test}.jsonl + data_card.json + conflicts.jsonl
"""

from __future__ import annotations

import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import OBJECT, file_sha256, read_values, whole_file, write_json
from biomerge_lib.core.punctuation import set_apart
from biomerge_lib.core.records import SPLITS, Record, write_records
from biomerge_lib.corpora.draws import draw_splits
from biomerge_lib.corpora.readers import Corpus, read_corpus, refuse_unknown
from biomerge_lib.corpora.union import SEED, Union, build_union

log = logging.getLogger("biomerge")


def write_corpus(
    sources: Sequence[str],
    data_dir: Path | str,
    *,
    reading: Mapping[str, Any] | None = None,
    punctuation: str = "as_is",
    split_shares: Sequence[float] = (),
    dev_share: float | None = None,
    seed: int = SEED,
    **options: Any,
) -> dict[str, Any]:
    """Convert corpora to ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``; return (and write) the data card.

    Also writes ``conflicts.jsonl``: the sentences that the corpora annotate differently.

    Args:
        sources: corpora as :func:`~biomerge_lib.corpora.readers.read_corpus` takes them; the first has priority.
        reading: options of that function (``types``, ``sentence_split``, ``discontinuous``).
        punctuation: ``apart`` sets it apart by spaces, as tokenised corpora have it; offsets are those of that text.
        split_shares: of train, dev and test; a corpus without dev and test has them drawn from train by document.
        dev_share: of train, for the dev set of a corpus that lacks that alone.
        options: of :func:`~biomerge_lib.corpora.union.build_union`; without any the corpora are merged as they are.

    Raises:
        DataError: no source is named, one cannot be read or would be written over, or the union is refused; then
            nothing is written.
    """
    data_dir = Path(data_dir)
    written = {(data_dir / f"{split}.jsonl").resolve() for split in SPLITS}
    if not sources:
        raise DataError(
            "no corpus named: set corpora=[folder, ...], or corpora=[sample] for the bundled one."
        )
    drawing: dict[str, Any] = {"split_shares": list(split_shares), "dev_share": dev_share, "seed": seed}
    corpora: dict[str, Corpus] = {}
    card: dict[str, Any] = {"sources": {}, "splits": {}}
    for source in sources:
        how = {**(reading or {}), "may_lack_types": len(sources) > 1}
        corpus = _read(source, how, **drawing)
        name = corpus.source.name
        if name in corpora:
            raise DataError(f"two corpora are called {name!r}; rename one of the folders.")
        for path in chain.from_iterable(corpus.source.files.values()):
            if path.resolve() in written:
                raise DataError(
                    f"{path}: is read from corpus {name}, and would be written over. Set another data_dir."
                )
        if punctuation == "apart":
            apart = {split: list(map(set_apart, records)) for split, records in corpus.items()}
            corpus = Corpus(corpus.source, apart, corpus.counts)
        corpora[name] = corpus
        card["sources"][name] = {
            "format": corpus.source.format,
            "files": corpus.source.file_hashes(),
            "reading": {split: counts.to_dict() for split, counts in corpus.counts.items()},
            "splits": {split: describe_records(records) for split, records in corpus.items()},
        }
    known = set(chain.from_iterable(corpus.types for corpus in corpora.values()))
    refuse_unknown((reading or {}).get("types") or (), known, ", ".join(corpora))
    there = data_dir / "data_card.json"
    if there.is_file() and (before := set(read_values(there, OBJECT).get("sources", []))) != set(corpora):
        raise DataError(
            f"{data_dir}: holds the data of {', '.join(sorted(before))}, and would be written over with those of "
            f"{', '.join(corpora)}. Set another data_dir, or remove this folder."
        )
    union = build_union(corpora, seed=seed, **options)
    for split in SPLITS:
        records = [item.record for item in union.splits[split]]
        path = data_dir / f"{split}.jsonl"
        write_records(path, records)
        datasets = sorted({record.dataset for corpus in corpora.values() for record in corpus[split]})
        sizes = {dataset: {"sentences": 0, "spans": 0} for dataset in datasets}
        for record in records:
            sizes[record.dataset]["sentences"] += 1
            sizes[record.dataset]["spans"] += len(record.spans)
        card["splits"][split] = {
            **describe_records(records),
            "datasets": sizes,
            "file": path.name,
            "sha256": file_sha256(path),
        }
    card["union"] = {
        "options": {**(reading or {}), "punctuation": punctuation, **drawing, **options},
        **union.report,
    }
    write_conflicts(data_dir / "conflicts.jsonl", union)
    write_json(data_dir / "data_card.json", card)
    return card


def write_conflicts(path: Path, union: Union) -> None:
    """One sentence a line with what each corpus says about it: split, data set, document, target, kept or not."""
    kept = {id(item) for items in union.splits.values() for item in items}
    said = ("dataset", "doc_id", "text", "target")
    with whole_file(path) as out:
        for group in union.conflicts:
            versions = []
            for split, item in group:
                own = {name: getattr(item.record, name) for name in said}
                versions.append({"split": split, **own, "kept": id(item) in kept})
            out.write(json.dumps(versions, ensure_ascii=False) + "\n")


def describe_records(records: Iterable[Record]) -> dict[str, Any]:
    """Counts of a split: documents, sentences, spans and their types, empty sentences, words and characters."""
    records = list(records)
    spans = [len(record.spans) for record in records]
    mentions = {record.text[start:end].lower() for record in records for start, end in record.spans}
    words = [len(record.text.split()) for record in records]
    return {
        "documents": len({(record.dataset, record.doc_id) for record in records}),
        "sentences": len(records),
        "spans": sum(spans),
        "unique_spans": len(mentions),
        "empty_share": round(spans.count(0) / max(len(records), 1), 4),
        "spans_per_sentence_max": max(spans, default=0),
        "words_mean": round(statistics.fmean(words), 2) if words else 0,
        "words_max": max(words, default=0),
        "characters": sum(len(record.text) for record in records),
        "types": dict(Counter(chain.from_iterable(record.types for record in records)).most_common()),
    }


def _read(
    source: str, reading: Mapping[str, Any], *, split_shares: list[float], dev_share: float | None, seed: int
) -> Corpus:
    """The corpus with its own splits; those that it lacks are drawn from train by document, where they have a share."""
    optional = ("dev", "test") if split_shares else ("dev",) if dev_share else ()
    corpus = read_corpus(source, optional=optional, **reading)
    drawn = ["train", *(split for split in SPLITS if split not in corpus)]
    if len(drawn) == 1:
        return corpus
    train, where = corpus["train"], corpus.source.location
    said = f"split_shares={split_shares}"
    if dev_share and drawn == ["train", "dev"]:
        split_shares, said = [1 - dev_share, dev_share], f"dev_share={dev_share}"
    shares = dict(zip(SPLITS, split_shares, strict=False))
    parts = draw_splits(train, [shares[split] for split in drawn], seed)
    if not all(parts):
        raise DataError(f"{where}: too few documents for {said}.")
    if len({record.doc_id for record in train}) == len(train):
        both = "as no document has several: those of one document may stand in train and there"
        log.warning("%s: %s is drawn sentence by sentence, %s.", where, " and ".join(drawn[1:]), both)
    records = {**corpus, **dict(zip(drawn, parts, strict=True))}
    return Corpus(corpus.source, {split: records[split] for split in SPLITS}, corpus.counts)
