"""What an exported adapter finds, as `predict` runs it: in its own corpora, by cue and type, and in others.

    python -m benchmarks.shipped_adapter --data data/union7/ner --own bc5cdr --foreign anatem bc2gm
    python -m benchmarks.shipped_adapter --data data/union7/ner --adapter path/to/union --batch-size 256

Sentences of dev.jsonl, as their corpora have them and spread evenly, go through the tagger as raw texts, in float32
with the rounded weights as they are shipped. An adapter with cues says which corpora are its own. Writes scores.json
into the adapter's folder and the table of its model card, after every row; the same command goes on after the last one
that is there. Foreign corpora must be ones of whose dev documents the adapter has seen none, as benchmarks.union makes
them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.common import command
from biomerge_lib.apply.tagger import Tagger, load_tagger
from biomerge_lib.core.files import file_sha256, write_json, write_text
from biomerge_lib.core.markup import code_in_markdown, in_markdown
from biomerge_lib.core.records import Record, read_records
from biomerge_lib.experiment.runs import provenance, quiet_libraries
from biomerge_lib.model.adapters import SHIPPED, read_adapter
from biomerge_lib.prompts.manifest import Manifest
from biomerge_lib.report.display import markdown_table
from biomerge_lib.scoring.ner_metrics import bootstrap, count_units, score_spans

BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"  # of the model card's place for the table


class Row(NamedTuple):
    """A corpus, how it is asked (``cue``, ``spaced``: None is the default), and whether the adapter knows it."""

    corpus: str
    cue: str | None
    spaced: bool | None
    own: bool

    @property
    def options(self) -> str:
        """As ``predict`` takes them."""
        punctuation = {None: [], True: ["--apart"], False: ["--as-is"]}[self.spaced]
        return " ".join([*(["--cue", self.cue] if self.cue else []), *punctuation])


def plan_rows(own: Sequence[str], foreign: Sequence[str], manifest: Manifest) -> Iterator[Row]:
    """Own corpora with their cue, punctuation by default or the other way, and by default; others by default."""
    other = not manifest.prompt_format.sets_apart
    for name in own:
        cue = name if manifest.cues else None
        yield from (Row(name, cue, None, True), Row(name, cue, other, True))
        if manifest.cues:
            yield Row(name, None, None, True)
    for name in foreign:
        yield Row(name, None, None, False)


def measure(tagger: Tagger, records: list[Record], *, spaced: bool | None, name: str) -> dict[str, Any]:
    """Scores of the records' texts, each tagged as a document of its own, with the seconds that it took.

    ``types`` has found and gold mentions of each gold type, of which one with two counts for both.
    """
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
    types: dict[str, Counter[str]] = {"found": Counter(), "gold": Counter()}
    for record, spans in zip(records, found, strict=True):
        for span, kind in zip(record.spans, record.types, strict=False):
            types["gold"].update(kind.split("|"))
            types["found"].update(kind.split("|") if span in spans else ())
    counts = {"sentences": len(records), "gold": sum(len(record.spans) for record in records)}
    scores = {"precision": score.precision, "recall": score.recall, "f1": score.f1, "low": low, "high": high}
    by_type = {kind: [types["found"][kind], count] for kind, count in types["gold"].most_common()}
    rounded = {k: round(v, 4) for k, v in scores.items()}
    return counts | rounded | {"types": by_type, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with a dev.jsonl of several corpora")
    parser.add_argument("--adapter", type=Path, default=SHIPPED)
    parser.add_argument(
        "--own", nargs="+", metavar="CORPUS", help="what an adapter without cues was trained on"
    )
    parser.add_argument(
        "--foreign", nargs="*", metavar="CORPUS", help="other corpora (default: all the rest)"
    )
    parser.add_argument("--limit", type=int, default=400, help="sentences of its own corpora (%(default)s)")
    parser.add_argument("--foreign-limit", type=int, default=100, help="of the others (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="256 on a GPU (%(default)s)")
    options = parser.parse_args()
    quiet_libraries()
    card = options.adapter / "README.md"
    before, begin, rest = card.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{card}: no place for the scores ({BEGIN} ... {END}); export the adapter anew.")
    manifest = read_adapter(options.adapter)
    dev: dict[str, list[Record]] = {}
    for record in read_records(options.data / "dev.jsonl"):
        dev.setdefault(record.dataset, []).append(record)
    own = options.own or manifest.cues or parser.error("--own: name the corpora that it was trained on")
    foreign = [name for name in dev if name not in own] if options.foreign is None else options.foreign
    if unknown := [name for name in (*own, *foreign) if name not in dev]:
        parser.error(f"{unknown[0]} is none of {', '.join(dev)}")
    tagger = load_tagger(adapter=options.adapter, batch_size=options.batch_size)
    where = provenance()
    report = {
        "command": command("shipped_adapter"),
        "data_sha256": file_sha256(options.data / "dev.jsonl"),
        "weights_sha256": file_sha256(options.adapter / "adapter_model.safetensors"),
        **{name: where[name] for name in ("device", "python", "versions")},
    }
    rows = read_rows(options.adapter / "scores.json", report)
    for row in list(plan_rows(own, foreign, manifest))[len(rows) :]:
        limit = options.limit if row.own else options.foreign_limit
        chosen = dev[row.corpus][:: max(1, len(dev[row.corpus]) // limit)][:limit]
        asked = replace(tagger, cues=manifest.cue_options(row.cue))
        found = measure(asked, chosen, spaced=row.spaced, name=f"{row.corpus} {row.options}")
        about = {"options": row.options, "of": len(dev[row.corpus]), "commit": where["commit"]}
        rows.append(row._asdict() | about | found)
        print(rows[-1], flush=True)
        write_json(options.adapter / "scores.json", {**report, "rows": rows})
        write_text(card, f"{before}{BEGIN}\n{describe({**report, 'rows': rows})}{END}{after}")


def read_rows(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that the same command has measured of the same weights."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    told = ("command", "data_sha256", "weights_sha256", "device")
    same = all(stored.get(name) == report[name] for name in told)
    return stored["rows"] if same else []


def describe(report: dict[str, Any]) -> str:
    """The table of the model card."""
    rows = []
    for row in report["rows"]:
        asked = code_in_markdown(row["options"]) if row["options"] else "no option"
        what = "its own" if row["own"] else "not trained on"
        interval = f"**{row['f1']:.3f}** [{row['low']:.3f}, {row['high']:.3f}]"
        share = f"{row['sentences']:,} of {row['of']:,}"
        types = [f"{in_markdown(k)} {found / gold:.2f} ({gold})" for k, (found, gold) in row["types"].items()]
        scores = [f"{row['precision']:.3f}", f"{row['recall']:.3f}", interval, ", ".join(types)]
        rows.append([in_markdown(row["corpus"]), what, asked, share, *scores])
    seconds = sum(row["seconds"] for row in report["rows"])
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in report["rows"]))
    told, device = code_in_markdown(report["command"]), in_markdown(report["device"])
    header = ["dev of", "what it is", "asked with", "sentences", "precision", "recall", "F1"]
    table = markdown_table([*header, "recall by type (mentions)"], rows)
    return f"{table}\n\n{told}, commit {commits}, {device}, {seconds:,.0f} s.\n"


if __name__ == "__main__":
    main()
