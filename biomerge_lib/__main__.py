"""The command line: ``python -m biomerge_lib COMMAND``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from biomerge_lib.errors import BioMergeError, DataError
from biomerge_lib.jobs import INTERRUPTED, RunInterrupted, kept_path
from biomerge_lib.parameters import Parameters, compose_parameters

EXAMPLES = """examples:
  python -m biomerge_lib run 03_train task=ner_span model=lora_ner_unsloth runtime=a100 learning_rate=3e-4
  python -m biomerge_lib run 02_data corpora=[corpora/bc5cdr_iob] data_dir=data/bc5cdr/ner
  python -m biomerge_lib preflight data_dir=data/bc5cdr/ner corpus_cue=true
  python -m biomerge_lib sweep parameters/sweep/lora_ner_span.yaml
  python -m biomerge_lib report runs
  python -m biomerge_lib predict "Aspirin can trigger asthma attacks ."
  python -m biomerge_lib export-adapter runs/my-run my-adapter
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m biomerge_lib", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute a notebook with papermill into its run folder")
    run.add_argument("notebook", help="01_tokenizer ... 06_report")
    run.add_argument(
        "overrides", nargs=argparse.REMAINDER, help="group=choice and name=value, as Hydra takes them"
    )
    show = commands.add_parser("parameters", help="list every parameter with its value and meaning")
    show.add_argument(
        "--markdown", action="store_true", help="the page docs/parameters.md (for every model and runtime)"
    )
    show.add_argument("overrides", nargs=argparse.REMAINDER, help="group=choice and name=value")
    preflight = commands.add_parser(
        "preflight", help="say in seconds whether these data, tokenizer and parameters can train"
    )
    preflight.add_argument("overrides", nargs=argparse.REMAINDER, help="group=choice and name=value")
    report = commands.add_parser("report", help="write one report page from run folders")
    report.add_argument("runs", nargs="+", help="run folders, or folders of run folders")
    report.add_argument(
        "--out", default="reports/report.html", help="the page to write (default: %(default)s)"
    )
    publish = commands.add_parser(
        "publish", help="copy finished runs to reports/ and rewrite the README's table"
    )
    publish.add_argument("runs", nargs="*", help="run folders (none: only rewrite the table)")
    publish.add_argument(
        "--into", metavar="NAME", help="publish in reports/NAME/, whose README.md has a table of its own"
    )
    sweep = commands.add_parser("sweep", help="rank a sweep file's points, or run them without a server")
    todo = sweep.add_mutually_exclusive_group()
    todo.add_argument(
        "--point", type=int, metavar="N", help="train point N, unless it is finished (SLURM arrays)"
    )
    todo.add_argument("--run", action="store_true", help="train all points here, one after the other")
    todo.add_argument(
        "--pending", action="store_true", help="print the unfinished points as sbatch --array takes them"
    )
    sweep.add_argument("file", help="parameters/sweep/NAME.yaml, as wandb sweep takes it")
    sweep.add_argument(
        "overrides", nargs=argparse.REMAINDER, help="group=choice and name=value for all points"
    )
    predict = commands.add_parser("predict", help="print the mentions of texts or of text files")
    predict.add_argument("texts", nargs="*", help="texts to read")
    predict.add_argument("--file", action="append", default=[], help="a UTF-8 text file; may be repeated")
    predict.add_argument("--json", action="store_true", help="one JSON object a text instead of brackets")
    choice = predict.add_mutually_exclusive_group()
    choice.add_argument("--adapter", help="folder made by export-adapter (default: the shipped one)")
    choice.add_argument("--model", help="run folder or merged model folder")
    predict.add_argument("--base-url", help="vLLM server that answers (key: VLLM_API_KEY)")
    predict.add_argument(
        "--as-is", action="store_true", help="leave punctuation at its words, as in the text"
    )
    export = commands.add_parser(
        "export-adapter", help="write a run's best adapter to a folder to share, with a model card"
    )
    export.add_argument("run", help="run folder")
    export.add_argument("out", help="folder to write; its name is the adapter's")
    sync = commands.add_parser("wandb-sync", help="send to W&B what runs could not send while they ran")
    sync.add_argument("runs", nargs="+", help="run folders")
    options = parser.parse_args(arguments)
    verbs = {
        "run": _run,
        "parameters": _parameters,
        "preflight": _preflight,
        "report": _report,
        "publish": _publish,
        "sweep": _sweep,
        "predict": _predict,
        "export-adapter": _export_adapter,
        "wandb-sync": _wandb_sync,
    }
    try:
        return verbs[options.command](options)
    except RunInterrupted as error:
        print(error)
        return INTERRUPTED
    except BioMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from biomerge_lib.runs import quiet_libraries
    from biomerge_lib.tracking import run_tracked_notebook

    quiet_libraries()
    print(kept_path(run_tracked_notebook(options.notebook, options.overrides)))
    return 0


def _parameters(options: argparse.Namespace) -> int:
    if options.markdown:
        from biomerge_lib.parameter_page import parameters_as_markdown

        print(parameters_as_markdown(), end="")
        return 0
    values = compose_parameters(options.overrides).model_dump()
    for name, field in Parameters.model_fields.items():
        print(f"{name + ' = ' + repr(values[name]):<55} {field.description}")
    return 0


def _preflight(options: argparse.Namespace) -> int:
    from biomerge_lib.preflight import PreflightError, check_training

    try:
        print(check_training(compose_parameters(options.overrides)))
    except PreflightError as error:
        print(error.preflight)
        raise
    return 0


def _report(options: argparse.Namespace) -> int:
    from biomerge_lib.report import write_report

    print(write_report(options.runs, options.out))
    return 0


def _publish(options: argparse.Namespace) -> int:
    from biomerge_lib.published import REPORTS_DIR, publish_run, write_results
    from biomerge_lib.runs import PROJECT_DIR

    reports = REPORTS_DIR / options.into if options.into else REPORTS_DIR
    for folder in options.runs:
        print(publish_run(Path(folder), reports))
    write_results((reports if options.into else PROJECT_DIR) / "README.md", reports)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from biomerge_lib import sweeps
    from biomerge_lib.runs import quiet_libraries

    quiet_libraries()
    sweep = sweeps.read_sweep(options.file, options.overrides)
    if options.pending:
        print(sweeps.pending_points(sweep))
        return 0
    if options.point is not None:
        sweeps.run_point(sweep, options.point)
        return 0
    failed = []
    for number in range(len(sweep.points)) if options.run else ():
        try:
            sweeps.run_point(sweep, number)
        except RunInterrupted:
            raise
        except BioMergeError as error:
            failed.append(number)
            print(f"error: point {number}: {error}", file=sys.stderr)
    print(sweeps.describe_ranking(sweep, sweeps.rank_points(sweep)))
    return 2 if failed else 0


def _predict(options: argparse.Namespace) -> int:
    from biomerge_lib.runs import quiet_libraries

    quiet_libraries()
    from biomerge_lib.display import bracket
    from biomerge_lib.tagger import load_tagger, read_text_file

    texts = [*options.texts, *map(read_text_file, options.file)]
    if not any(text.strip() for text in texts):
        raise DataError('no text: python -m biomerge_lib predict "Aspirin can trigger asthma attacks ."')
    tagger = load_tagger(adapter=options.adapter, model=options.model, base_url=options.base_url)
    found = tagger.find_mentions(texts, spaced=not options.as_is)
    for text, spans in zip(texts, found, strict=True):
        line = json.dumps({"text": text, "spans": spans}, ensure_ascii=False)
        print(line if options.json else bracket(text, spans, colour=sys.stdout.isatty()), flush=True)
    return 0


def _export_adapter(options: argparse.Namespace) -> int:
    from biomerge_lib.adapter_export import export_adapter

    print(export_adapter(options.run, options.out))
    return 0


def _wandb_sync(options: argparse.Namespace) -> int:
    from biomerge_lib.tracking import sync_run

    for folder in options.runs:
        sync_run(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
