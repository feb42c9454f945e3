"""What an exported adapter finds, as `predict` runs it: in its own domain, outside it, and with punctuation as it is.

    python -m benchmarks.shipped_adapter --corpora ../shared/corpora --limit 400 --foreign-limit 100

Sentences of dev, spread evenly, go through the tagger as raw texts, in float32 with the rounded weights as they are
shipped. Writes scores.json into the adapter's folder and the table of its model card, after every row; the same
command goes on after the last one that is there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from biomerge_lib.apply.tagger import Tagger, load_tagger
from biomerge_lib.core.files import file_sha256, write_json, write_text
from biomerge_lib.core.markup import code_in_markdown, in_markdown
from biomerge_lib.core.records import Record
from biomerge_lib.corpora.readers import read_corpus
from biomerge_lib.experiment.runs import provenance, quiet_libraries
from biomerge_lib.model.adapters import SHIPPED
from biomerge_lib.report.display import markdown_table
from biomerge_lib.scoring.ner_metrics import bootstrap, count_units, score_spans

OWN = "its own domain"
BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"  # of the model card's place for the table
# Corpus in --corpora, the entity types asked for (None: all), punctuation set apart, what the row is.
ROWS = (
    ("bc5cdr_original", None, True, f"{OWN}, as written"),
    ("bc5cdr_original", None, False, f"{OWN}, punctuation at its words (`--as-is`)"),
    ("bc5cdr_iob", None, True, f"{OWN}, tokenised by the corpus"),
    ("bionlp13cg_iob", ("Simple_chemical", "Cancer"), True, "chemicals and cancers, other guidelines"),
    ("anatem_iob", None, True, "not for this: anatomy"),
    ("bc2gm_iob", None, True, "not for this: genes and proteins"),
)


def measure(tagger: Tagger, records: list[Record], *, spaced: bool, name: str) -> dict[str, Any]:
    """Scores of the records' texts, each tagged as a document of its own, with the seconds that it took."""
    characters = sum(len(record.text) for record in records)
    with tqdm(total=characters, desc=name, unit=" characters", mininterval=30) as bar:
        start = time.perf_counter()
        texts = [record.text for record in records]
        mentions = tagger.pipe(texts, spaced=spaced, note=lambda count: bar.update(count))
        found = [[(mention.start, mention.end) for mention in of_text] for of_text in mentions]
        seconds = time.perf_counter() - start
    pairs = [(record.spans, spans) for record, spans in zip(records, found, strict=True)]
    _, units = count_units(pairs, [(record.dataset, record.doc_id) for record in records])
    score, (low, high) = score_spans(pairs), bootstrap(units)
    counts = {"sentences": len(records), "gold": sum(len(record.spans) for record in records)}
    scores = {"precision": score.precision, "recall": score.recall, "f1": score.f1, "low": low, "high": high}
    return counts | {k: round(v, 4) for k, v in scores.items()} | {"seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora's folders")
    parser.add_argument("--adapter", type=Path, default=SHIPPED)
    parser.add_argument("--limit", type=int, default=400, help="sentences of its own domain (%(default)s)")
    parser.add_argument("--foreign-limit", type=int, default=100, help="of the others (%(default)s)")
    options = parser.parse_args()
    quiet_libraries()
    card = options.adapter / "README.md"
    before, begin, rest = card.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{card}: no place for the scores ({BEGIN} ... {END}); export the adapter anew.")
    tagger = load_tagger(adapter=options.adapter)
    where = provenance()
    report = {
        "command": "python -m benchmarks.shipped_adapter --corpora ../shared/corpora "
        f"--limit {options.limit} --foreign-limit {options.foreign_limit}",
        "weights_sha256": file_sha256(options.adapter / "adapter_model.safetensors"),
        **{name: where[name] for name in ("device", "python", "versions")},
    }
    rows = read_rows(options.adapter / "scores.json", report)
    for corpus, types, spaced, what in ROWS:
        if any((row["corpus"], row["what"]) == (corpus, what) for row in rows):
            continue
        kind = "pubtator:" if corpus.endswith("original") else ""
        records = read_corpus(f"{kind}{options.corpora / corpus}", types=types, splits=("dev",))["dev"]
        limit = options.limit if what.startswith(OWN) else options.foreign_limit
        chosen = records[:: max(1, len(records) // limit)][:limit]
        row: dict[str, Any] = {"commit": where["commit"]}
        row |= measure(tagger, chosen, spaced=spaced, name=f"{corpus}, {what}")
        rows.append(
            {"corpus": corpus, "types": types, "spaced": spaced, "what": what, "of": len(records), **row}
        )
        print(rows[-1], flush=True)
        write_json(options.adapter / "scores.json", {**report, "rows": rows})
        write_text(card, f"{before}{BEGIN}\n{describe({**report, 'rows': rows})}{END}{after}")


def read_rows(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that the same command has measured of the same weights."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = all(stored.get(name) == report[name] for name in ("command", "weights_sha256", "device"))
    return stored["rows"] if same else []


def describe(report: dict[str, Any]) -> str:
    """The table of the model card."""
    rows = []
    for row in report["rows"]:
        corpus = in_markdown(row["corpus"] + (f" ({', '.join(row['types'])})" if row["types"] else ""))
        interval = f"**{row['f1']:.3f}** [{row['low']:.3f}, {row['high']:.3f}]"
        share = f"{row['sentences']:,} of {row['of']:,}"
        rows.append([corpus, row["what"], share, f"{row['precision']:.3f}", f"{row['recall']:.3f}", interval])
    seconds = sum(row["seconds"] for row in report["rows"])
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in report["rows"]))
    command, device = code_in_markdown(report["command"]), in_markdown(report["device"])
    table = markdown_table(["dev of", "what it is", "sentences", "precision", "recall", "F1"], rows)
    return f"{table}\n\n{command}, commit {commits}, {device}, {seconds:,.0f} s.\n"


if __name__ == "__main__":
    main()
