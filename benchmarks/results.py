"""Scores on test sets by the literature's protocol, controls and a sweep: the trainings, and reports/results.md.

    python -m benchmarks.results --train dev --at-once 6 --stop 560                        # how long? chosen on dev
    python -m benchmarks.results --train test --at-once 5 --stop 560 num_train_epochs=4    # train and dev, test once
    python -m benchmarks.results --train qwen --at-once 3 --stop 560 num_train_epochs=2
    python -m benchmarks.results --agreement ../shared/corpora   # of BC5CDR and BioRED, where they have one abstract
    python -m biomerge_lib publish runs/results-*/ --into results # and controls-*/, the sweep's runs
    python -m benchmarks.results                                 # the page, from reports/results/*/metrics.json
    python -m benchmarks.results --runs runs --partial --out runs/results.md    # what there is so far

A training of Qwen2.5-Coder takes up to 40 GB of the card, one of SmolLM2 10. 02_data makes the data, of corpora that
are not tokenised with punctuation=apart (see CORPORA). With --train, words behind the options go to every run of the
set; a run that is finished is left alone, one that was cut off goes on. The page has no figure of ours but from a run
folder, and is refused while one is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import REPORTS, choose_names, page_parser, train_runs
from benchmarks.controls import CONTROLS
from benchmarks.sweep import FILE, SEEDS
from biomerge_lib.core.errors import BioMergeError, DataError
from biomerge_lib.core.files import read_values, write_json, write_text
from biomerge_lib.core.markup import code_in_markdown, in_markdown
from biomerge_lib.experiment.provenance import TEST_LOG, provenance
from biomerge_lib.experiment.recorded import read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR, quiet_libraries
from biomerge_lib.experiment.sweeps import read_sweep
from biomerge_lib.report.display import markdown_table
from biomerge_lib.report.report_runs import changed_words

COMMON = (
    "model=smollm2_135m runtime=h200 per_device_train_batch_size=16 per_device_eval_batch_size=256 num_workers=0 "
    "logging_steps=10 wandb_mode=disabled keep_checkpoint=last max_target_tokens=256 max_new_tokens=256 "
    "step_launch=compiled_graphed"
)
TEST = f"{COMMON} train_on=train_dev run_test_eval=true"
QWEN = "model=qwen2_5_coder_1_5b per_device_eval_batch_size=128"
# 02_data of bc5cdr_original, anatem_brat, nlmgene_pubtator (dev_share=0.1 bad_mentions=skip), these three with
# punctuation=apart, jnlpba_iob and bc2gm_iob, all with drop_leaks=documents.
CORPORA = {
    "bc5cdr": "data/bc5cdr_spaced/ner",
    "anatem": "data/anatem_spaced/ner",
    "nlmgene": "data/nlmgene_spaced/ner",
    "jnlpba": "data/jnlpba/ner",
    "bc2gm": "data/bc2gm/ner",
}
DEV = f"{COMMON} data_dir={CORPORA['bc5cdr']} eval_limit=1500"
UNTOKENISED = "data_dir=data/bc5cdr_original/ner"
SETS: dict[str, dict[str, str]] = {
    "dev": {
        **{f"smollm2-{epochs}-epochs": f"{DEV} num_train_epochs={epochs}" for epochs in (2, 4, 6)},
        "smollm2-untokenised": f"{DEV} {UNTOKENISED} num_train_epochs=2",
        "smollm2-pieces": f"{DEV} {UNTOKENISED} offset_anchors=echo_pieces num_train_epochs=4",
        "smollm2-rate-3e-3": f"{DEV} learning_rate=3e-3 num_train_epochs=4",
        "smollm2-rank-16": f"{DEV} learning_rate=3e-3 lora_rank=16 num_train_epochs=4",
        **{f"qwen-{epochs}-epochs": f"{DEV} {QWEN} num_train_epochs={epochs}" for epochs in (2, 3)},
        "qwen-rate-6e-4": f"{DEV} {QWEN} learning_rate=6e-4 num_train_epochs=2",
    },
    "test": {
        **{f"smollm2-bc5cdr-{seed}": f"{TEST} data_dir={CORPORA['bc5cdr']} seed={seed}" for seed in SEEDS},
        **{
            f"smollm2-{name}": f"{TEST} data_dir={folder}"
            for name, folder in CORPORA.items()
            if name != "bc5cdr"
        },
    },
    "qwen": {
        f"qwen-{name}": f"{TEST} {QWEN} data_dir={CORPORA[name]}" for name in ("bc5cdr", "anatem", "bc2gm")
    },
}
AGREEMENT = "agreement"
BEGIN, END = "<!-- test results: begin -->", "<!-- test results: end -->"  # in the README
# The first three that are there.
IN_README = (
    "results-qwen-bc5cdr",
    "results-smollm2-bc5cdr-42",
    "results-qwen-anatem",
    "results-smollm2-anatem",
)
Stage = dict[str, Any]
ABOUT = (
    "Exact spans, type-free, micro F1 with its 95 % bootstrap interval, over documents where a corpus has some. "
    "Trained on train and dev for a number of epochs chosen on dev ([runs](results/README.md)), without early "
    "stopping; the last checkpoint scored test. *Scored* counts all scorings of test that the run's folder has on "
    "record. Untokenised corpora have their punctuation set apart (`punctuation=apart`)."
)
ABOUT_CONTROLS = (
    "SmolLM2 (but for the encoder), the same sentences of BC5CDR, and as many epochs and sentences a step. Each "
    "control's learning rate was chosen on dev. Tokens are a sentence's. An answer is invalid where any of it cannot "
    "be read as mentions of its text; the part that can be read still counts."
)


def measure_agreement(corpora: Path, out: Path) -> None:
    """F1 of BioRED's chemicals and diseases against BC5CDR's, in the abstracts that both annotated."""
    from biomerge_lib.corpora.readers import read_corpus
    from biomerge_lib.scoring.ner_metrics import bootstrap, count_units, score_spans

    kinds: dict[str, Any] = {"sentence_split": "document", "types": ("Chemical", "Disease")}
    bc5cdr = read_corpus(f"pubtator:{corpora}/bc5cdr_original", **kinds)
    biored = read_corpus(f"pubtator:{corpora}/biored_pubtator", **kinds, splits=("train", "test"))
    gold = {record.doc_id: record for records in bc5cdr.values() for record in records}
    other = {record.doc_id: record for records in biored.values() for record in records}
    shared = [doc_id for doc_id in gold if doc_id in other and gold[doc_id].text == other[doc_id].text]
    pairs = [(gold[doc_id].spans, other[doc_id].spans) for doc_id in shared]
    low, high = bootstrap(count_units(pairs, [("bc5cdr", doc_id) for doc_id in shared])[1])
    metrics = {"f1": score_spans(pairs).f1, "low": low, "high": high, "documents": len(shared)}
    stage = {"status": "finished", "metrics": metrics, "provenance": provenance()}
    write_json(out / AGREEMENT / "metrics.json", {"run_id": AGREEMENT, "stages": {AGREEMENT: stage}})


class Page:
    """The page from the run folders in ``runs``; ``missing`` are the ones that are not there, or not finished."""

    def __init__(self, runs: Path):
        self.runs = runs
        self.missing: list[str] = []
        self.used: dict[str, Stage] = {}

    def read(self, name: str, stage: str = "03_train") -> Stage | None:
        """A finished run's stage, with its parameters; None where there is none (it is noted)."""
        recorded = read_metrics(self.runs / name)
        found = recorded.get("stages", {}).get(stage, {})
        if found.get("status") != "finished":
            self.missing.append(name)
            return None
        self.used[name] = {"parameters": recorded.get("parameters", {}), **found}
        return self.used[name]

    def read_all(self, names: Iterable[str]) -> dict[str, Stage]:
        return {name: run for name in names if (run := self.read(name))}

    def lines(self) -> list[str]:
        parts = {
            "Test sets": self.describe_tests(),
            "Beside published figures": self.describe_published(),
            "Controls": self.describe_controls(),
            "What was chosen on dev": self.describe_dev(),
            "The sweep": self.describe_sweep(),
            "Where the figures come from": self.describe_origins(),
        }
        lines = ["# Results on test sets, against controls", "", ABOUT]
        for title, part in parts.items():
            lines += ["", f"## {title}", "", *part]
        return lines

    def test_row(self, name: str) -> list[Any]:
        metrics, given = self.used[name]["metrics"], self.used[name]["parameters"]
        corpus = next((c for c, folder in CORPORA.items() if folder == given["data_dir"]), given["data_dir"])
        how = f"{given['num_train_epochs']:g} epochs, rate {given['learning_rate']:g}, seed {given['seed']}"
        model = f"{Path(given['backbone']).name}, {'all weights' if given['trainable'] == 'all' else 'LoRA'}"
        size = f"{metrics['test_records']:,} sentences"
        if metrics["test_documents"]:
            size += f", {metrics['test_documents']:,} documents"
        log = self.runs / name / TEST_LOG
        times = len(log.read_text(encoding="utf-8").splitlines()) if log.is_file() else "not logged"
        scores = [f"{metrics[f'test_ner_{part}']:.3f}" for part in ("precision", "recall")]
        return [corpus, model, how, size, *scores, show(metrics, "test_ner_f1"), times]

    def describe_tests(self) -> list[str]:
        found = self.read_all(f"results-{name}" for group in ("test", "qwen") for name in SETS[group])
        head = ["corpus", "model", "training", "test set", "precision", "recall", "F1", "scored"]
        lines = [markdown_table(head, map(self.test_row, found))]
        seeds = [f"results-smollm2-bc5cdr-{seed}" for seed in SEEDS]
        scores = [found[name]["metrics"]["test_ner_f1"] for name in seeds if name in found]
        lines += spread("SmolLM2 on BC5CDR", scores)
        if agreement := self.read(AGREEMENT, AGREEMENT):
            metrics = agreement["metrics"]
            between = f"{metrics['f1']:.3f} [{metrics['low']:.3f}, {metrics['high']:.3f}]"
            says = f"Two guidelines, BC5CDR's and BioRED's, agree at {between} on the chemicals and diseases of the "
            lines += ["", f"{says}{metrics['documents']} abstracts that both annotated."]
        return lines

    def describe_published(self) -> list[str]:
        others = read_values(Path(__file__).with_name("published_f1.yaml"), list)
        rows: list[list[Any]] = []
        for corpus in CORPORA:
            for name in (f"qwen-{corpus}", f"smollm2-{corpus}", f"smollm2-{corpus}-{SEEDS[0]}"):
                if run := self.used.get(f"results-{name}"):
                    what = f"ours, {Path(run['parameters']['backbone']).name}"
                    f1 = f"**{100 * run['metrics']['test_ner_f1']:.1f}**"
                    rows.append([corpus, "all", what, f1, "", f"`results-{name}`"])
            for entry in [entry for entry in others if entry["corpus"] == corpus]:
                entry = entry | {"f1": f"{entry['f1']:.1f}"}
                said = [in_markdown(entry[key]) for key in ("of", "system", "f1", "differs", "source")]
                rows.append([corpus, *said])
        head = ["corpus", "of", "system", "test F1", "what differs from ours", "source"]
        bare = ", ".join(corpus for corpus in CORPORA if corpus not in {entry["corpus"] for entry in others})
        return [
            markdown_table(head, rows),
            "",
            "Ours are type-free, a decoder with LoRA for each corpus. The others' figures are as their papers print "
            f"them; of {bare}, type-free and on the same split, we have read none.",
        ]

    def describe_dev(self) -> list[str]:
        found = self.read_all(f"results-{name}" for name in SETS["dev"])
        rows = []
        for name, run in found.items():
            words = [
                word for word in SETS["dev"][name.removeprefix("results-")].split() if word not in DEV.split()
            ]
            words = [word for word in words if word not in QWEN.split()[1:]]
            rows.append(
                [f"`{name}`", code_in_markdown(" ".join(words)), show(run["metrics"], "greedy_dev_ner_f1")]
            )
        return ["On 1,500 dev sentences of BC5CDR.", "", markdown_table(["run", "with", "dev F1"], rows)]

    def describe_controls(self) -> list[str]:
        head = ["way", "rate, epochs", "F1", "invalid answers", "tokens read", "written", "training s"]
        lines = [ABOUT_CONTROLS]
        for split in ("test", "dev"):
            found = self.read_all(path.name for path in sorted(self.runs.glob(f"controls-{split}-*")))
            rows = []
            for name, control in CONTROLS.items():
                mine = [run for run in found.values() if run["metrics"]["control"] == name]
                self.missing += [f"controls-test-{name}"] if split == "test" and not mine else []
                rows += [control_row(control.says, run, split) for run in mine]
            if rows:
                lines += ["", f"On {split}:", "", markdown_table([*head, "answering s"], rows)]
        return lines

    def describe_sweep(self) -> list[str]:
        sweep = read_sweep(FILE)
        varied = [name for name, values in sweep.grid.items() if len(values) > 1]
        names = [sweep.parameters(number).run_name for number in range(len(sweep.points))]
        found = self.read_all(names)
        ranked = sorted(found.items(), key=lambda item: -item[1]["metrics"][sweep.metric])
        rows = [
            [*(run["parameters"][key] for key in varied), show(run["metrics"], sweep.metric), f"`{name}`"]
            for name, run in ranked
        ]
        best = self.read_all(f"{sweep.name}-best-{seed}" for seed in SEEDS)
        return [
            f"`{FILE}`: {len(names)} points through `wandb agent`, a fifth of the training documents, 800 sentences "
            "of dev ([its report](results/sweep.html)).",
            "",
            markdown_table([*varied, "dev F1", "run"], rows),
            *spread(
                "Its best point on all data, on all of dev",
                [r["metrics"][sweep.metric] for r in best.values()],
            ),
        ]

    def describe_origins(self) -> list[str]:
        rows = []
        for name, run in self.used.items():
            where, given = run["provenance"], run["parameters"]
            words = (
                changed_words(given, leave_out={"run_id", "runs_dir", "cache_dir"})
                if given
                else ["--agreement"]
            )
            libraries = [key for key in ("torch", "transformers", "peft") if key in where["versions"]]
            versions = ", ".join(f"{key} {where['versions'][key]}" for key in libraries)
            command = code_in_markdown(" ".join(words))
            rows.append(
                [f"`{name}`", command, f"`{where['commit']}`", in_markdown(where["device"]), versions]
            )
        head = [
            "run folder",
            "03_train with (controls: benchmarks.controls with)",
            "commit",
            "device",
            "versions",
        ]
        return [
            f"`python -m benchmarks.results`, from {len(rows)} run folders.",
            "",
            markdown_table(head, rows),
        ]

    def readme(self) -> str:
        found = [name for name in IN_README if name in self.used][:3]
        rows = [[*row[:3], row[6]] for row in map(self.test_row, found)]
        return f"{BEGIN}\n{markdown_table(['corpus', 'model', 'training', 'test F1'], rows)}\n{END}"


def control_row(says: str, run: Stage, split: str) -> list[Any]:
    metrics, given = run["metrics"], run["parameters"]
    tokens = [f"{metrics[f'control_tokens_{way}']:.0f}" for way in ("read", "written")]
    seconds = [f"{metrics[name]:.0f}" for name in ("train_seconds", "control_answer_seconds")]
    how = f"{given['learning_rate']:g}, {given['num_train_epochs']:g}"
    invalid = f"{metrics['control_invalid_rate']:.1%}"
    return [says, how, show(metrics, f"control_{split}_ner_f1"), invalid, *tokens, *seconds]


def show(metrics: dict[str, Any], name: str) -> str:
    return f"**{metrics[name]:.3f}** [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"


def spread(what: str, scores: Sequence[float]) -> list[str]:
    """A paragraph with the scores' mean and standard deviation; nothing below two."""
    if len(scores) < 2:
        return []
    each = ", ".join(f"{score:.3f}" for score in scores)
    return ["", f"{what}: {mean(scores):.3f} ± {stdev(scores):.3f} over {len(scores)} seeds ({each})."]


def write_page(runs: Path, out: Path, *, partial: bool) -> None:
    """Write the page, and into the README its rows where it has a place for them.

    Raises:
        DataError: a run folder is missing or not finished, and the page is not to be ``partial``.
    """
    page = Page(runs)
    lines = page.lines()
    if page.missing and not partial:
        names = ", ".join(dict.fromkeys(page.missing))
        raise DataError(
            f"{runs}: no finished run folder for {names}. Train and publish them (python -m benchmarks.results "
            "--help), or write what there is with --partial."
        )
    if page.missing:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(page.missing))
        lines[3:3] = ["", f"**Not measured yet**: {names}."]
    write_text(out, "\n".join(lines).rstrip() + "\n")
    readme = PROJECT_DIR / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    if begin and runs == REPORTS / "results":  # published
        write_text(readme, before + page.readme() + rest.partition(END)[2])
    print(out)


def main() -> None:
    parser = page_parser(__doc__, SETS, REPORTS / "results")
    parser.add_argument("--agreement", type=Path, metavar="CORPORA", help="measure two guidelines' agreement")
    options = parser.parse_args()
    quiet_libraries()
    try:
        if options.train:
            chosen = choose_names(parser, options, SETS[options.train])
            train_runs({f"results-{name}": SETS[options.train][name] for name in chosen}, options)
        elif options.agreement:
            measure_agreement(options.agreement, options.runs)
        else:
            write_page(options.runs, options.out, partial=options.partial)
    except BioMergeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
