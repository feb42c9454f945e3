"""One model for seven corpora, each asked for by its cue: beside a model for each, on the others, and what lifts it.

    python -m benchmarks.union --data ../shared/corpora           # data/union7 and its parts (CPU, two minutes)
    python -m benchmarks.union --train models --at-once 10 --stop 560  # SmolLM2: unions, without cues, each corpus
    python -m benchmarks.union --train lifts --at-once 6 --stop 560    # the union with one thing changed
    python -m benchmarks.union --train qwen --at-once 3 --stop 560     # Qwen2.5-Coder-1.5B
    python -m benchmarks.union --ask union union-shipped union-bc5cdr  # each on all corpora, with every cue
    python -m biomerge_lib publish runs/union*/ --into union-models
    python -m benchmarks.union                                    # the page, reports/union_models.md

union-shipped is the run whose adapter is shipped: of the corpora that corpus_notes.yaml lets be shared (docs/corpora.md
has the commands). Words behind the options go to every run of a set; a run that is finished is left alone, one that was
cut off goes on.
The page has no figure but from a run folder, and names those that are missing with --partial.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import REPORTS, choose_names, page_parser, train_runs
from biomerge_lib.apply.ready_models import NOTES
from biomerge_lib.core.errors import BioMergeError, DataError
from biomerge_lib.core.files import OBJECT, read_values, write_json, write_text
from biomerge_lib.core.records import SPLITS, Record, read_records, write_records
from biomerge_lib.experiment.provenance import provenance
from biomerge_lib.experiment.recorded import read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR, quiet_libraries
from biomerge_lib.report.display import markdown_table

# As published, in their own spelling where there is one; two are tokenised and have no other.
CORPORA = {
    "bc5cdr": "pubtator:{}/bc5cdr_original",
    "bc2gm": "{}/bc2gm_iob",
    "jnlpba": "{}/jnlpba_iob",
    "anatem": "brat:{}/anatem_brat",
    "biored": "{}/biored_pubtator",
    "nlmgene": "{}/nlmgene_pubtator",
    "gnormplus": "{}/gnormplus_pubtator",
}
SHIPPED = [name for name in CORPORA if read_values(NOTES, OBJECT)[name]["shared"]]
DATA = "data/union7"
MOST_SENTENCES = 6000  # of a corpus: a run takes ten minutes at most
DEV_SENTENCES = 400  # of a corpus, asked with every cue
ANY = "any"  # the default cue
COMMON = (
    "model=smollm2_135m runtime=h200 per_device_train_batch_size=16 per_device_eval_batch_size=256 num_workers=0 "
    "logging_steps=20 wandb_mode=disabled keep_checkpoint=last offset_anchors=echo_pieces max_target_tokens=256 "
    "max_new_tokens=256 num_train_epochs=2 step_launch=compiled_graphed eval_steps=100000 save_steps=1000 "
    "eval_limit=4000"
)
UNION = f"{COMMON} data_dir={DATA}/ner corpus_cue=true"
ONE = f"{COMMON} corpus_cue=false eval_limit=null"  # the whole of what the union is scored on a part of
QWEN = "model=qwen2_5_coder_1_5b per_device_eval_batch_size=128 num_train_epochs=1"
SETS: dict[str, dict[str, str]] = {
    "models": {
        "union": UNION,
        "union-no-cue": f"{UNION} corpus_cue=false",
        "union-shipped": f"{UNION} data_dir={DATA}_shipped/ner",
        **{f"union-{name}": f"{ONE} data_dir={DATA}_{name}/ner" for name in CORPORA},
    },
    "lifts": {
        "union-4-epochs": f"{UNION} num_train_epochs=4",
        "union-rate-3e-3": f"{UNION} learning_rate=3e-3",
        "union-rank-16": f"{UNION} lora_rank=16",
        "union-rank-32": f"{UNION} lora_rank=32",
        "union-cue-dropout-0": f"{UNION} cue_dropout=0",
        "union-cue-dropout-0.3": f"{UNION} cue_dropout=0.3",
        "union-even": f"{UNION} data_dir={DATA}_even/ner",
        "union-words": f"{UNION} offset_anchors=echo_start",
    },
    "qwen": {
        "union-qwen": f"{UNION} {QWEN}",
        **{f"union-qwen-{name}": f"{ONE} {QWEN} data_dir={DATA}_{name}/ner" for name in CORPORA},
    },
}
PARTS = {name: [name] for name in CORPORA} | {"shipped": SHIPPED}
MADE = "python -m benchmarks.union --data path/to/corpora"
ANSWERS = "asked"  # the stage that --ask adds to a run's metrics
ABOUT = (
    "Exact spans, type-free, micro F1: unions on 4,000 dev sentences, spread evenly, models of one corpus on the whole "
    "of its part in them. Of each corpus at most "
    f"{MOST_SENTENCES:,} training sentences; documents that any corpus's dev or test has are in no training set. "
    "Models are SmolLM2-135M with LoRA and two epochs, or Qwen2.5-Coder-1.5B and one."
)


def make_data(corpora: str) -> None:
    """The union's folder, one with as many sentences of each corpus, and parts: each corpus alone, those to share."""
    from biomerge_lib.corpora.conversion import write_corpus

    sources = [place.format(corpora) for place in CORPORA.values()]
    options: dict[str, Any] = {
        "reading": {"bad_mentions": "skip"},
        "dev_share": 0.1,
        "drop_leaks": "documents",
        "conflicts": "first",
        "deduplicate": True,
        "max_per_corpus": MOST_SENTENCES,
    }
    for folder, weights in ((DATA, []), (f"{DATA}_even", [1.0] * len(sources))):
        write_corpus(sources, PROJECT_DIR / folder / "ner", **options, corpus_weights=weights)
        for split in SPLITS:
            path = PROJECT_DIR / folder / "ner" / f"{split}.jsonl"
            records = [
                replace(record, dataset=record.dataset.removesuffix("_original"))
                for record in read_records(path)
            ]
            write_records(path, records)
            for name, kept in PARTS.items() if folder == DATA else ():
                own = [record for record in records if record.dataset in kept]
                count = write_records(PROJECT_DIR / f"{DATA}_{name}/ner/{split}.jsonl", own)
                print(f"{DATA}_{name}/ner/{split}.jsonl: {count:,} records")
    for name in PARTS:
        write_json(PROJECT_DIR / f"{DATA}_{name}/ner/data_card.json", {"command": MADE})


def ask(run: Path) -> None:
    """Let a run's merged model answer dev sentences of every corpus, with every cue it knows; adds a stage to it."""
    from biomerge_lib.decoding.greedy import greedy_decode
    from biomerge_lib.decoding.predictions import build_prompts, collect_predictions
    from biomerge_lib.model.unsloth_lora_ner import load_causal_lm
    from biomerge_lib.prompts.manifest import Manifest, read_model_folder
    from biomerge_lib.prompts.tokenizer import load_tokenizer
    from biomerge_lib.scoring.ner_metrics import score_predictions

    recorded = read_metrics(run)
    given = recorded["parameters"]
    folder, said = read_model_folder(run)
    manifest = Manifest.of(said, where=folder)
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder, dtype=given["dtype"])
    asked: list[tuple[str, str, Record]] = []
    for name in CORPORA:
        records = list(read_records(PROJECT_DIR / f"{DATA}_{name}/ner/dev.jsonl"))
        count = min(DEV_SENTENCES, len(records))
        drawn = [records[index * len(records) // count] for index in range(count)]
        for cue in [*manifest.cues, ANY] if manifest.cues else [name]:
            asked += [(name, cue, replace(record, cue=cue)) for record in drawn]
    records = [record for *_, record in asked]
    prompts = build_prompts(records, tokenizer, manifest.prompt_format)
    answers = greedy_decode(
        model,
        tokenizer,
        prompts,
        max_new_tokens=manifest.max_new_tokens,
        batch_size=given["per_device_eval_batch_size"],
    )
    predictions = collect_predictions(records, prompts, answers)
    metrics: dict[str, float] = {}
    for pair in dict.fromkeys((name, cue) for name, cue, _ in asked):
        mine = [p for p, (name, cue, _) in zip(predictions, asked, strict=True) if (name, cue) == pair]
        scores = score_predictions(mine)
        metrics |= {f"{' as '.join(pair)}{end}": scores[f"ner_f1{end}"] for end in ("", "_low", "_high")}
    recorded["stages"][ANSWERS] = {"status": "finished", "metrics": metrics, "provenance": provenance()}
    write_json(run / "metrics.json", recorded)


class Page:
    """The page from the run folders in ``runs``; ``missing`` are those that are not there, or not finished."""

    def __init__(self, runs: Path):
        self.runs = runs
        self.missing: list[str] = []

    def read(self, name: str, stage: str = "03_train") -> dict[str, Any]:
        found = read_metrics(self.runs / name).get("stages", {}).get(stage, {})
        if found.get("status") != "finished":
            self.missing.append(name if stage == "03_train" else f"{name} ({stage})")
        return found.get("metrics", {})

    def lines(self) -> Iterator[str]:
        yield from ("# One model for seven corpora", "", ABOUT)
        some = f"of {', '.join(SHIPPED)}, pooled over them"
        smollm2 = {"union": "the union, with cues", "union-shipped": some}
        for title, unions, one in (
            ("SmolLM2-135M", smollm2, "union-{}"),
            ("Qwen2.5-Coder-1.5B", {"union-qwen": "the union, with cues"}, "union-qwen-{}"),
        ):
            yield from ("", f"## {title}: the union beside a model for each corpus", "")
            yield markdown_table(["model", "pooled dev F1", *CORPORA], self.beside(unions, one))
        yield from ("", "## What lifts it, one change at a time", "")
        rows = [
            [name, show(self.read(name), "greedy_dev_ner_f1")]
            for name in ("union", "union-no-cue", *SETS["lifts"])
        ]
        yield markdown_table(["run", "pooled dev F1"], rows)
        yield from (
            "",
            f"## Trained on one corpus or several, asked on {DEV_SENTENCES} dev sentences of each",
            "",
        )
        yield "By its own cue where the model knows one, else by the default cue.\n"
        rows = [self.crossed(f"union-{name}", name) for name in CORPORA]
        rows += [self.crossed("union", "all"), self.crossed("union-shipped", ", ".join(SHIPPED))]
        yield markdown_table(["trained on", *CORPORA], rows)
        yield from self.by_cue("union", "all corpora")
        yield from self.by_cue("union-shipped", ", ".join(SHIPPED))

    def beside(self, unions: Mapping[str, str], one: str) -> Iterator[list[str]]:
        for run, what in unions.items():
            metrics = self.read(run)
            scores = [show(metrics, f"greedy_dev_dataset/{name}/ner_f1") for name in CORPORA]
            yield [what, show(metrics, "greedy_dev_ner_f1"), *scores]
        own = [self.read(one.format(name)) for name in CORPORA]
        yield ["one model a corpus", pool(own), *(show(metrics, "greedy_dev_ner_f1") for metrics in own)]

    def crossed(self, run: str, trained: str) -> list[str]:
        metrics = self.read(run, ANSWERS)
        cued = {name: f"{name} as {name}" for name in CORPORA}
        return [
            trained,
            *(show(metrics, own if own in metrics else f"{name} as {ANY}") for name, own in cued.items()),
        ]

    def by_cue(self, run: str, trained: str) -> Iterator[str]:
        """The answers of a union by cue, and which one to take for a text of unknown origin.

        A cue is judged by corpora that the model does not know, or where it knows all by those that are not the cue's
        own, beside the default cue on the same ones.
        """
        metrics = self.read(run, ANSWERS)
        cues = [cue for cue in (ANY, *CORPORA) if f"{next(iter(CORPORA))} as {cue}" in metrics]
        if not cues:
            return
        unknown = [name for name in CORPORA if name not in cues]
        others = {cue: [name for name in unknown or CORPORA if name != cue] for cue in cues}
        means = {
            cue: [mean(metrics[f"{name} as {asked}"] for name in names) for asked in (cue, ANY)]
            for cue, names in others.items()
        }
        yield from ("", f"## By cue: the model of {trained}", "")
        rows = [
            [cue, *(show(metrics, f"{name} as {cue}") for name in CORPORA), f"{own:.3f}, {default:.3f}"]
            for cue, (own, default) in means.items()
        ]
        where = f"mean of {', '.join(unknown) or 'all but its own'}, and of {ANY} there"
        yield markdown_table(["asked as", *CORPORA, where], rows)
        best = max(means, key=lambda cue: means[cue][0] - means[cue][1])
        beside = "" if best == ANY else f" where {ANY} has {means[best][1]:.3f}"
        yield f"\nThe cue for a text of unknown origin: **{best}**, {means[best][0]:.3f}{beside}."


def pool(runs: Sequence[Mapping[str, float]]) -> str:
    """Micro F1 of several runs' dev answers taken together; empty while one is missing."""
    names = [f"greedy_dev_{name}" for name in ("ner_precision", "pred_spans", "gold_spans")]
    if not all(name in metrics for metrics in runs for name in names):
        return ""
    counts = [[metrics[name] for name in names] for metrics in runs]
    found = sum(precision * predicted for precision, predicted, _ in counts)
    return f"**{2 * found / sum(predicted + gold for _, predicted, gold in counts):.3f}**"


def show(metrics: Mapping[str, float], name: str) -> str:
    """A score with its interval; empty where it was not measured."""
    if name not in metrics:
        return ""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return f"**{metrics[name]:.3f}**" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def write_page(runs: Path, out: Path, *, partial: bool) -> None:
    """Write the page.

    Raises:
        DataError: a run folder is missing or not finished, and the page is not to be ``partial``.
    """
    page = Page(runs)
    lines = list(page.lines())
    missing = ", ".join(dict.fromkeys(page.missing))
    if missing and not partial:
        raise DataError(
            f"{runs}: not finished: {missing}. See python -m benchmarks.union --help, or --partial."
        )
    lines += ["", f"Not measured yet: {missing}."] if missing else []
    write_text(out, "\n".join(lines).rstrip() + "\n")
    print(out)


def main() -> None:
    parser = page_parser(__doc__, SETS, REPORTS / "union-models")
    parser.add_argument("--data", metavar="CORPORA", help="make the data from the corpora in this folder")
    parser.add_argument(
        "--ask", nargs="+", default=[], metavar="RUN", help="let these runs answer all corpora"
    )
    options = parser.parse_args()
    quiet_libraries()
    try:
        if options.data:
            make_data(options.data)
        elif options.train:
            names = choose_names(parser, options, SETS[options.train])
            train_runs({name: SETS[options.train][name] for name in names}, options)
        elif options.ask:
            for name in options.ask:
                ask(PROJECT_DIR / "runs" / name)
        else:
            write_page(options.runs, options.out, partial=options.partial)
    except BioMergeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
