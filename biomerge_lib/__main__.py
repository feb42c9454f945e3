"""The command line: ``python -m biomerge_lib COMMAND``."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

import yaml

from biomerge_lib import __version__
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import BioMergeError, nearest
from biomerge_lib.core.files import names_full_disk
from biomerge_lib.core.parameters import Parameters
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
COMMANDS = Path(__file__).with_name("commands.yaml")
TYPES = {"int": int, "float": float}
# Flags that may also stand behind a command's overrides, for which argparse would take them.
ANYWHERE = ("-h", "--help", "--dry-run", "--run", "--pending", "--site")


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
    """The commands of ``commands.yaml``, each of which runs the function of its name here."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="python -m biomerge_lib",
        description="BioMerge: biomedical named entities with LoRA-tuned language models.",
        formatter_class=layout,
    )
    parser.add_argument("--version", action="version", version=f"BioMerge {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    lines = ["examples:"]
    for name, said in yaml.safe_load(COMMANDS.read_text(encoding="utf-8")).items():
        examples = [f"  python -m biomerge_lib {name} {example}".rstrip() for example in said["examples"]]
        lines.append(examples[0])
        text = {"help": said["help"], "description": f"{said['help'][0].upper()}{said['help'][1:]}."}
        epilog = "\n".join(["examples:", *examples])
        command = commands.add_parser(name, **text, epilog=epilog, formatter_class=layout)
        command.set_defaults(verb=globals()[f"_{name.replace('-', '_')}"], refuse=command.refuse)
        groups: dict[str, Any] = {}
        for exclusive in said.get("exclusive", ()):
            groups |= dict.fromkeys(exclusive, command.add_mutually_exclusive_group())
        for option, settings in said["options"].items():
            types = {"type": TYPES[settings["type"]]} if "type" in settings else {}
            groups.get(option, command).add_argument(option, **settings | types)
    parser.epilog = "\n".join([*lines, "", fill(EXIT_CODES, 100)])
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
        return options.verb(options) or 0
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
        problem = f"{error.filename}: {error.strerror}. Is the path right, may you write there?"
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(stopped.args[0] if stopped.args else "interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> None:
    from biomerge_lib.experiment.notebooks import describe_start
    from biomerge_lib.experiment.recorded import read_metrics
    from biomerge_lib.experiment.tracking import run_tracked_notebook
    from biomerge_lib.training.preflight import check_training

    if options.dry_run:
        parameters, made = describe_start(options.notebook, options.overrides, check_training)
        _print_parameters(parameters)
        print(made)
    else:
        executed = run_tracked_notebook(options.notebook, options.overrides, check_training)
        stage = read_metrics(executed.parent).get("stages", {}).get(executed.stem, {})
        for name, value in stage.get("metrics", {}).items():
            if name.endswith("ner_f1") and "/" not in name and not name.startswith("eval_"):
                print(f"{name} {value:.3f}", file=sys.stderr)
        print(kept_path(executed))


def _parameters(options: argparse.Namespace) -> None:
    if options.markdown:
        from biomerge_lib.report.parameter_page import parameters_as_markdown

        print(parameters_as_markdown(), end="")
    else:
        _print_parameters(compose_parameters(options.overrides))


def _print_parameters(parameters: Parameters) -> None:
    values = parameters.model_dump()
    for name, field in Parameters.model_fields.items():
        print(f"{name + ' = ' + repr(values[name]):<55} {field.description}")


def _preflight(options: argparse.Namespace) -> int:
    from biomerge_lib.training.preflight import PreflightError, check_training
    from biomerge_lib.training.site import JOB, check_site

    if options.site:
        found = check_site(compose_parameters([*JOB, *options.overrides]))
        print(found)
        return 2 if found.refused else 0
    parameters = compose_parameters(options.overrides)
    try:
        with chdir(PROJECT_DIR):
            print(check_training(parameters))
    except PreflightError as error:
        print(error.preflight)
        raise
    return 0


def _report(options: argparse.Namespace) -> None:
    from biomerge_lib.report.page import write_report

    print(write_report(options.runs, options.out))


def _compare(options: argparse.Namespace) -> None:
    from biomerge_lib.apply.adapter_answers import answer_adapters
    from biomerge_lib.report.comparison import compare_runs

    places = answer_adapters(options.runs, options.split, options.decoder)
    print(compare_runs(options.runs, options.split, options.decoder, places=places))


def _publish(options: argparse.Namespace) -> None:
    from biomerge_lib.report.published import REPORTS_DIR, folder_of_reports, publish_run, write_results

    reports = folder_of_reports(options.into) if options.into else REPORTS_DIR
    for folder in options.runs:
        print(publish_run(Path(folder), reports))
    write_results(reports)


def _runs(options: argparse.Namespace, *, only: str = "") -> None:
    from biomerge_lib.report.run_list import choose_runs, describe_runs, list_runs, remove_runs

    folder = Path(options.runs_dir)
    found = [run for run in list_runs(folder) if only in ("", run.status)]
    if options.remove:
        chosen = choose_runs(found, folder, options.remove)
        if not options.yes:
            print(describe_runs(chosen))
            print("Remove these, with their models? [y/N] ", end="", flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                print("nothing was removed")
                return
        remove_runs(folder, chosen)
        found = [run for run in found if run not in chosen]
    if options.json:
        print(json.dumps([run._asdict() for run in found], indent=1, ensure_ascii=False))
    else:
        print(describe_runs(found))
        print(f"{len(found)} runs in {folder}, {sum(run.bytes for run in found) / 1e6:,.1f} MB")


def _replaced(options: argparse.Namespace) -> None:
    options.yes = True  # they were given up when they were replaced
    _runs(options, only="replaced")


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


def _predict(options: argparse.Namespace) -> None:
    from biomerge_lib.apply.predict_command import predict_texts

    predict_texts(options)


def _export_adapter(options: argparse.Namespace) -> None:
    from biomerge_lib.apply.adapter_export import export_adapter

    print(export_adapter(options.run, options.out))


def _wandb_sync(options: argparse.Namespace) -> None:
    from biomerge_lib.experiment.tracking import sync_run

    for folder in options.runs:
        sync_run(Path(folder).resolve())


if __name__ == "__main__":
    sys.exit(main())
