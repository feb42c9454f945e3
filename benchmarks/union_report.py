"""Knows how a union of corpora reads as a page: counts, steps, leaks, conflicts. Computes none of them.

    python -m benchmarks.union_report corpora=[../shared/corpora/bc5cdr_iob,...] data_dir=data/union/ner

converts the corpora as 02_data would and writes ``README.md`` and ``union.json`` into ``reports/union`` (or ``--out``).
The page holds counts and a handful of short examples, never a corpus.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import BioMergeError
from biomerge_lib.core.files import write_json, write_text
from biomerge_lib.core.markup import code_in_markdown, in_markdown
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.core.records import SPLITS
from biomerge_lib.core.spans import parse_spans
from biomerge_lib.corpora.conversion import write_corpus
from biomerge_lib.corpora.data_card import conflict_table, leak_table, read_conflicts, seen_table, union_table
from biomerge_lib.experiment.provenance import PROJECT_DIR, provenance
from biomerge_lib.prompts.ner_span import read_split
from biomerge_lib.report.display import bracket, markdown_table

OUT = PROJECT_DIR / "reports" / "union"
UNION_OPTIONS = (
    "drop_leaks",
    "conflicts",
    "deduplicate",
    "corpus_weights",
    "max_per_corpus",
    "split_shares",
    "dev_share",
    "seed",
)
EXAMPLES = 6
MOST_ROWS = 40
EXAMPLE_LENGTH = 110  # characters


def write_union_report(parameters: Parameters, command: str, out: Path = OUT) -> Path:
    """Build the union that the parameters describe and write its page; return the page's path.

    Raises:
        DataError: as :func:`~biomerge_lib.corpora.conversion.write_corpus`.
    """
    how_read = ("sentence_split", "discontinuous", "bad_mentions", "token_column", "tag_column")
    reading = {"types": parameters.entity_types or None} | {n: getattr(parameters, n) for n in how_read}
    options = {name: getattr(parameters, name) for name in UNION_OPTIONS}
    card = write_corpus(parameters.corpora, parameters.data_dir, reading=reading, **options)
    where = provenance()
    write_json(out / "union.json", {"command": command, "commit": where["commit"], **card})
    page = out / "README.md"
    write_text(page, "\n\n".join(_sections(card, parameters.data_dir, command, where["commit"])) + "\n")
    return page


def _sections(card: Mapping[str, Any], data_dir: str, command: str, commit: str | None) -> Iterable[str]:
    names = list(card["sources"])
    options = card["union"]["options"]
    splits = {split: read_split(data_dir, split) for split in SPLITS}
    yield f"# The union of {in_markdown(', '.join(names))}"
    yield (
        f"Written by\n\n{code_in_markdown(command, block=True)}\n\nat commit `{commit}`. The same numbers, and the "
        "SHA-256 of every file read and written, are in `union.json`. Two sentences are the same here when they are "
        "equal after NFKC, case folding and removal of white space."
    )
    yield "## The corpora as they came\n\nSentences / mentions."
    rows = [
        [name, *(f"{split['sentences']:,} / {split['spans']:,}" for split in source["splits"].values())]
        for name, source in card["sources"].items()
    ]
    yield _table(["corpus", *SPLITS], rows)
    readings = [counts for source in card["sources"].values() for counts in source["reading"].values()]
    if bad := sum(len(counts.get("bad_mentions", [])) for counts in readings):
        yield f"{bad:,} mentions do not fit their texts and were left out; `union.json` lists them."
    chosen = ", ".join(f"`{name}={options[name]}`" for name in UNION_OPTIONS)
    scored = "lost what other corpora train on" if options["drop_leaks"] == "test" else "stay as they are"
    yield (
        "## From corpora to one training set\n\nTraining sentences left after each step; dev and test "
        f"{scored}. Options: {chosen}; of two corpora that contradict each other the first in the table above wins."
    )
    steps = union_table(card)
    yield _table(["step", *steps.columns], steps.reset_index().values.tolist())
    yield "What was written:"
    written = [
        [split, counts["sentences"], counts["spans"], counts["sha256"][:12]]
        for split, counts in card["splits"].items()
    ]
    yield _table(["split", "sentences", "mentions", "SHA-256"], written)
    yield from _leaks(card)
    yield from _documents(card)
    yield from _conflicts(card, read_conflicts(data_dir))
    yield (
        "## Is it one task?\n\nShare of dev mentions (rows) whose string is a mention in each corpus's part of train "
        "(columns), in lower case. Low shares beside other corpora's names mean that the corpora do not annotate the "
        "same things: a model of the union needs `corpus_cue=true` to know whose policy is asked for."
    )
    seen = seen_table(splits["train"], splits["dev"])
    shares = [
        [name, int(mentions), *(f"{share:.1%}" for share in row)]
        for name, mentions, *row in seen.itertuples()
    ]
    yield _table(["dev of", *seen.columns], shares)
    yield (
        "## What this does not see\n\nSentences that differ in more than spelling, spacing and case (another "
        "tokenisation of numbers, a corrected word); documents, where a corpus comes without document ids: its "
        "sentences are drawn and split one by one, as its authors published them."
    )


def _leaks(card: Mapping[str, Any]) -> Iterable[str]:
    before, after = leak_table(card, "before"), leak_table(card, "after")
    trained = before[before["from"].str.endswith("train")]
    left = after[after["from"].str.endswith("train")]
    removed = next((step for step in card["union"]["steps"] if step["step"] == "drop_leaks"), None)
    taken = (
        f"`drop_leaks` took {sum(removed['removed'].values()):,} sentences out of train. " if removed else ""
    )
    yield (
        f"## Leaks\n\nBefore, {trained['sentences'].sum():,} times a dev or test sentence also stands in a corpus's "
        f"train, {trained['short'].sum():,} times a short one (under five words, such as a heading). {taken}"
        f"After, {left['sentences'].sum():,} do. `verbatim`: equal to the character; `documents`: the same abstract, "
        "found by its text; `in train`: the training sentences that are the same. What dev shares with test stays, "
        "and is listed too."
    )
    header = ["from", "into", "sentences", "verbatim", "short", "documents", "in train"]
    largest = before.sort_values("sentences", ascending=False)
    yield _table(header, largest.head(MOST_ROWS).values.tolist())
    if len(largest) > MOST_ROWS:
        rest = largest["sentences"][MOST_ROWS:]
        yield f"{len(rest)} more pairs with at most {rest.max()} sentences each are in `union.json`."


def _documents(card: Mapping[str, Any]) -> Iterable[str]:
    found = card["union"]["documents"]
    if not found["before"]:
        return
    dropped = ", ".join(f"{in_markdown(place)} {count:,}" for place, count in found["dropped"].items())
    yield (
        "## Documents that corpora share\n\nThe same abstract in two splits or corpora, found by its text: at least "
        "half of what lies between its punctuation marks stands in the other. Documents of several sentences are "
        "counted; where a corpus names no documents it has none, but others may stand in it. Whole documents that "
        f"`drop_leaks` took out (single sentences where a corpus names none): {dropped or 'none'}."
    )
    after = {(row["of"], row["in"]): row["documents"] for row in found["after"]}
    rows = sorted(found["before"], key=lambda row: -row["documents"])
    cells = [[row["of"], row["in"], row["documents"], after.get((row["of"], row["in"]), 0)] for row in rows]
    yield _table(["documents of", "also in", "before", "after"], cells[:MOST_ROWS])


def _conflicts(card: Mapping[str, Any], groups: Sequence[Sequence[Mapping[str, Any]]]) -> Iterable[str]:
    table = conflict_table(card)
    pairs = card["union"]["conflicts"]["before"]["train"]["pairs"]
    listed = "; ".join(f"{in_markdown(name)}: {count:,}" for name, count in sorted(pairs.items())) or "none"
    yield (
        "## Conflicts\n\nGroups of the same sentence with different gold: within one corpus, and across corpora. "
        f"Between the training sets of two corpora: {listed}. `conflicts.jsonl` beside the data lists all of them."
    )
    yield _table(["when", "where", *table.columns], table.reset_index().values.tolist())
    short = [group for group in groups if len(group[0]["text"]) <= EXAMPLE_LENGTH]
    chosen = short[:: max(1, len(short) // EXAMPLES)][:EXAMPLES]
    if chosen:
        yield "A few short ones, with the mentions in brackets:"
        rows = []
        for v in chain.from_iterable(chosen):
            shown = bracket(v["text"], parse_spans(v["target"]))
            rows.append([v["dataset"], v["split"], "yes" if v["kept"] else "no", shown])
        yield _table(["corpus", "split", "kept", "sentence"], rows)


def _table(header: Iterable[Any], rows: Iterable[Sequence[Any]]) -> str:
    shown = [[value if isinstance(value, int) else in_markdown(value) for value in row] for row in rows]
    return markdown_table(map(in_markdown, header), shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parameters", nargs="+", metavar="NAME=VALUE", help="those of 02_data")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page")
    given = parser.parse_args()
    try:
        command = shlex.join(["python", "-m", "benchmarks.union_report", *sys.argv[1:]])
        print(write_union_report(compose_parameters(given.parameters), command, given.out))
    except BioMergeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
