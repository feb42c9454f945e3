"""The command line: ``python -m biomerge_lib COMMAND``."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import NoReturn

from biomerge_lib import __version__
from biomerge_lib.core.errors import BioMergeError, nearest
from biomerge_lib.core.files import names_full_disk
from biomerge_lib.core.parameters import Parameters, compose_parameters
from biomerge_lib.core.records import SPLITS
from biomerge_lib.experiment.jobs import INTERRUPTED, RunInterrupted, kept_path
from biomerge_lib.experiment.runs import PROJECT_DIR, quiet_libraries

EXIT_CODES = (
    f"exit codes: 0 done; 1 a fault of the program, please report it; 2 the input is at fault, the message says how; "
    f"{INTERRUPTED} stopped on a job's request, to be started again; 130 interrupted"
)
# Errors of the operating system that come from where the user wants something read or written.
OF_THE_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
}
REPLACED = ".replaced-my-run-20261130T181659123456"
# Flags that may also stand behind a command's overrides, for which argparse would take them.
ANYWHERE = ("-h", "--help", "--dry-run", "--run", "--pending")


class _Parser(argparse.ArgumentParser):
    """Names the nearest command, choice or flag when it refuses a word."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += nearest(found[1], re.findall(r"[\w-]+", found[2]))
        super().error(message)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """End with the words that are no options of this command."""
        known = re.findall(r"--[\w-]+", self.format_help())
        hints = (nearest(word.partition("=")[0], known) for word in words if word.startswith("-"))
        self.error(f"unknown: {' '.join(words)}.{next(filter(None, hints), '')}")


def build_parser() -> argparse.ArgumentParser:
    """The options of every command, with examples."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="python -m biomerge_lib",
        description="BioMerge: biomedical named entities with LoRA-tuned language models.",
        formatter_class=layout,
    )
    parser.add_argument("--version", action="version", version=f"BioMerge {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    first_examples = []

    def add(verb: Callable[[argparse.Namespace], int], help: str, *examples: str) -> argparse.ArgumentParser:
        """A command named as its function; ``examples`` are what stands behind its name."""
        name = verb.__name__.strip("_").replace("_", "-")
        lines = [f"  python -m biomerge_lib {name} {example}".rstrip() for example in examples]
        first_examples.append(lines[0])
        epilog = "\n".join(["examples:", *lines])
        command = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=epilog,
            formatter_class=layout,
        )
        command.set_defaults(verb=verb, refuse=command.refuse)
        return command

    def take_overrides(command: argparse.ArgumentParser, of: str = "") -> None:
        command.add_argument("overrides", nargs=argparse.REMAINDER, help=f"group=choice and name=value{of}")

    run = add(
        _run,
        "execute a notebook with papermill into its run folder",
        "03_train task=ner_span model=lora_ner_unsloth runtime=a100 learning_rate=3e-4",
        "02_data corpora=[corpora/bc5cdr_iob] data_dir=data/bc5cdr/ner",
        "05_vllm_eval run_id=my-run",
        "03_train learning_rate=3e-4 --dry-run",
    )
    run.add_argument("notebook", help="01_tokenizer ... 06_report")
    run.add_argument("--dry-run", action="store_true", help="say what would be run and made, and stop")
    take_overrides(run, ", as Hydra takes them")
    show = add(
        _parameters,
        "list every parameter with its value and meaning",
        "",
        "model=lora_ner_unsloth runtime=h100",
    )
    show.add_argument(
        "--markdown", action="store_true", help="the page docs/parameters.md (for every model and runtime)"
    )
    take_overrides(show)
    preflight = add(
        _preflight,
        "say in seconds whether these data, tokenizer and parameters can train",
        "data_dir=data/bc5cdr/ner corpus_cue=true",
    )
    take_overrides(preflight)
    report = add(
        _report,
        "write one report page from run folders",
        "runs",
        "runs/one runs/two --out comparison.html",
    )
    report.add_argument("runs", nargs="+", help="run folders, or folders of run folders")
    report.add_argument(
        "--out", default="reports/report.html", help="the page to write (default: %(default)s)"
    )
    compare = add(
        _compare,
        "say whether runs differ by more than chance, by a test paired over documents",
        "runs/one runs/two",
        "runs/one runs/two --split test --decoder vllm",
    )
    compare.add_argument("runs", nargs="+", help="run folders or predictions files; each against the first")
    compare.add_argument("--split", choices=SPLITS, default="dev", help="of run folders (%(default)s)")
    compare.add_argument("--decoder", choices=["greedy", "vllm"], default="greedy", help="(%(default)s)")
    publish = add(
        _publish,
        "copy finished runs to reports/ and rewrite the README's table",
        "runs/my-run",
        "runs/lr-* --into ablation",
        "",
    )
    publish.add_argument("runs", nargs="*", help="run folders (none: only rewrite the table)")
    publish.add_argument(
        "--into", metavar="NAME", help="publish in reports/NAME/, whose README.md has a table of its own"
    )
    for verb, what, name in (
        (_runs, "list the runs (status, F1, size, age), the newest first, or remove some for good", "my-run"),
        (_replaced, "the same of the runs that existing_run=replace moved aside", REPLACED),
    ):
        runs = add(verb, what, "", "--json", f"runs --remove {name}")
        runs.add_argument("runs_dir", nargs="?", default="runs", help="folder of run folders (%(default)s)")
        runs.add_argument("--json", action="store_true", help="the list as JSON")
        runs.add_argument("--remove", nargs="+", default=[], metavar="NAME", help="names that the list has")
        runs.add_argument("--yes", action="store_true", help="remove without asking")
    sweep = add(
        _sweep,
        "rank a sweep file's points, or run them without a server",
        "parameters/sweep/lora_ner_span.yaml",
        "--run parameters/sweep/lora_ner_span.yaml runtime=a100",
        "--point 3 parameters/sweep/lora_ner_span.yaml runtime=a100",
    )
    todo = sweep.add_mutually_exclusive_group()
    todo.add_argument(
        "--point", type=int, metavar="N", help="train point N, unless it is finished (SLURM arrays)"
    )
    todo.add_argument("--run", action="store_true", help="train all points here, one after the other")
    todo.add_argument(
        "--pending", action="store_true", help="print the unfinished points as sbatch --array takes them"
    )
    sweep.add_argument("file", help="parameters/sweep/NAME.yaml, as wandb sweep takes it")
    take_overrides(sweep, " for all points")
    predict = add(
        _predict,
        "find the mentions of texts, files or folders",
        '"Aspirin can trigger asthma attacks ."',
        "--file abstract.txt --out mentions.html",
        "--format jsonl --threshold 0.5 < abstract.txt",
        "--file abstracts.jsonl --out mentions.jsonl",
        "--file brat_folder --format brat --out predicted",
        "--file corpus.PubTator.txt --out mentions.conll --model runs/my-run",
        "--file abstracts.jsonl --out mentions.jsonl --base-url http://127.0.0.1:8001",
    )
    predict.add_argument("texts", nargs="*", help="texts to read (none: standard input)")
    predict.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="PATH",
        help="a .txt, .jsonl or PubTator file, a folder of them (BRAT's .ann are ignored), or - for standard input; "
        "may be repeated",
    )
    predict.add_argument(
        "--format",
        choices=["text", "jsonl", "html", "conll", "brat"],
        help="how answers are written (default: by --out's ending, else text with the mentions in brackets)",
    )
    predict.add_argument("--out", metavar="PATH", help="file to write, for brat a folder (default: print)")
    predict.add_argument(
        "--threshold", type=float, metavar="P", help="leave out mentions of a lower score, 0 to 1"
    )
    choice = predict.add_mutually_exclusive_group()
    choice.add_argument("--adapter", help="folder made by export-adapter (default: the shipped one)")
    choice.add_argument("--model", help="run folder or merged model folder")
    predict.add_argument("--base-url", metavar="URL", help="vLLM server that answers (key: VLLM_API_KEY)")
    predict.add_argument("--cue", help="corpus whose annotation policy is wanted, if the model knows several")
    predict.add_argument(
        "--as-is", action="store_true", help="leave punctuation at its words, as in the text"
    )
    predict.add_argument("--batch-size", type=int, default=16, help="sentences at a time (default: 16)")
    predict.add_argument(
        "--print-model-folder",
        action="store_true",
        help="print the folder of the model that would answer, for a vLLM server to load, and stop",
    )
    export = add(
        _export_adapter,
        "write a run's best adapter to a folder to share, with a model card",
        "runs/my-run my-adapter",
    )
    export.add_argument("run", help="run folder")
    export.add_argument("out", help="folder to write; its name is the adapter's")
    sync = add(_wandb_sync, "send to W&B what runs could not send while they ran", "runs/my-run")
    sync.add_argument("runs", nargs="+", help="run folders")
    parser.epilog = "\n".join(["examples:", *first_examples, "", fill(EXIT_CODES, 100)])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    flags = [word for word in words[1:] if word in ANYWHERE]
    words = [*words[:1], *flags, *(word for word in words[1:] if word not in flags)]
    options, unknown = build_parser().parse_known_args(words)
    if unknown:
        options.refuse(unknown)
    quiet_libraries()
    try:
        return options.verb(options)
    except RunInterrupted as error:
        print(error)
        return INTERRUPTED
    except BioMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if names_full_disk(error):
            print(f"error: no space left on the disk ({error}). Free some, then try again.", file=sys.stderr)
            return 2
        if error.errno not in OF_THE_PLACE or not error.filename:
            raise
        print(
            f"error: {error.filename}: {error.strerror}. Is the path right, may you write there?",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stopped:
        print(stopped.args[0] if stopped.args else "interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from biomerge_lib.experiment.runs import describe_start
    from biomerge_lib.experiment.tracking import run_tracked_notebook
    from biomerge_lib.training.preflight import check_training

    if options.dry_run:
        parameters, made = describe_start(options.notebook, options.overrides, check_training)
        _print_parameters(parameters)
        print(made)
        return 0
    print(kept_path(run_tracked_notebook(options.notebook, options.overrides, check_training)))
    return 0


def _parameters(options: argparse.Namespace) -> int:
    if options.markdown:
        from biomerge_lib.report.parameter_page import parameters_as_markdown

        print(parameters_as_markdown(), end="")
        return 0
    _print_parameters(compose_parameters(options.overrides))
    return 0


def _print_parameters(parameters: Parameters) -> None:
    values = parameters.model_dump()
    for name, field in Parameters.model_fields.items():
        print(f"{name + ' = ' + repr(values[name]):<55} {field.description}")


def _preflight(options: argparse.Namespace) -> int:
    from biomerge_lib.training.preflight import PreflightError, check_training

    try:
        print(check_training(compose_parameters(options.overrides)))
    except PreflightError as error:
        print(error.preflight)
        raise
    return 0


def _report(options: argparse.Namespace) -> int:
    from biomerge_lib.report.page import write_report

    print(write_report(options.runs, options.out))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from biomerge_lib.report.comparison import compare_runs

    print(compare_runs(options.runs, options.split, options.decoder))
    return 0


def _publish(options: argparse.Namespace) -> int:
    from biomerge_lib.report.published import REPORTS_DIR, folder_of_reports, publish_run, write_results

    reports = folder_of_reports(options.into) if options.into else REPORTS_DIR
    for folder in options.runs:
        print(publish_run(Path(folder), reports))
    write_results((reports if options.into else PROJECT_DIR) / "README.md", reports)
    return 0


def _runs(options: argparse.Namespace, *, only: str = "") -> int:
    from biomerge_lib.report.run_list import choose_runs, describe_runs, list_runs, remove_runs

    folder = Path(options.runs_dir)
    found = [run for run in list_runs(folder) if only in ("", run.status)]
    if options.remove:
        chosen = choose_runs(found, folder, options.remove)
        if not options.yes:
            print(
                describe_runs(chosen), "Remove these, with their models? [y/N] ", sep="\n", end="", flush=True
            )
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                print("nothing was removed")
                return 0
        remove_runs(folder, chosen)
        found = [run for run in found if run not in chosen]
    if options.json:
        print(json.dumps([run._asdict() for run in found], indent=1, ensure_ascii=False))
        return 0
    print(describe_runs(found))
    print(f"{len(found)} runs in {folder}, {sum(run.bytes for run in found) / 1e6:,.1f} MB")
    return 0


def _replaced(options: argparse.Namespace) -> int:
    options.yes = True  # they were given up when they were replaced
    return _runs(options, only="replaced")


def _sweep(options: argparse.Namespace) -> int:
    from biomerge_lib.experiment import sweeps
    from biomerge_lib.training.preflight import check_training

    sweep = sweeps.read_sweep(options.file, options.overrides)
    if options.pending:
        print(sweeps.pending_points(sweep))
        return 0
    if options.point is not None:
        sweeps.run_point(sweep, options.point, check_training)
        return 0
    failed = []
    for number in range(len(sweep.points)) if options.run else ():
        try:
            sweeps.run_point(sweep, number, check_training)
        except RunInterrupted:
            raise
        except BioMergeError as error:
            failed.append(number)
            print(f"error: point {number}: {error}", file=sys.stderr)
    print(sweeps.describe_ranking(sweep, sweeps.rank_points(sweep)))
    return 2 if failed else 0


def _predict(options: argparse.Namespace) -> int:
    from biomerge_lib.apply.predict_command import predict_texts

    return predict_texts(options)


def _export_adapter(options: argparse.Namespace) -> int:
    from biomerge_lib.apply.adapter_export import export_adapter

    print(export_adapter(options.run, options.out))
    return 0


def _wandb_sync(options: argparse.Namespace) -> int:
    from biomerge_lib.experiment.tracking import sync_run

    for folder in options.runs:
        sync_run(Path(folder).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
