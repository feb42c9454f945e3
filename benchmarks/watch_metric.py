"""Whether each watch metric ranks checkpoints as greedy decoding does, and what it costs.

    python -m benchmarks.watch_metric runs/RUN [runs/RUN ...]
    python -m benchmarks.watch_metric runs/RUN runs/RUN --abreast 2    # the runs side by side
    python -m benchmarks.watch_metric --report runs/RUN [runs/RUN ...] # only the tables of what is decoded

The runs are finished and keep the checkpoint of every evaluation, for example

    python -m biomerge_lib run 03_train model=smollm2_135m runtime=h200 eval_steps=50 save_steps=50 \
        save_total_limit=100 early_stopping_patience=100 run_id=watch-start

Their log_history.json has the F1 of the teacher-forced answers and of the token head, both of one forward pass. Here
each checkpoint answers all of dev greedily: first an evenly spread sample, then the rest, timed apart. Rows are kept in
RUN/watch_metric.json as they come, and a command that was cut off goes on with the next one. Writes
reports/watch_metric.json and .md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import file_sha256, write_json
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import Prompt, RawAnswer, build_prompts, collect_predictions
from biomerge_lib.experiment.recorded import load_run_parameters, read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance, quiet_libraries
from biomerge_lib.model.backbones import prepare_backbone
from biomerge_lib.model.unsloth_lora_ner import load_adapter
from biomerge_lib.prompts.ner_span import read_split, scoring_options
from biomerge_lib.prompts.tokenizer import load_tokenizer
from biomerge_lib.scoring.ner_metrics import score_predictions

REPORT = PROJECT_DIR / "reports" / "watch_metric.json"
WATCHED = {
    "answer_f1": "answer, teacher-forced",
    "head_f1": "token head",
    "sample_f1": "greedy, sample of dev",
    "greedy_f1": "greedy, all of dev",
}
SECONDS = ("forward_seconds", "forward_seconds", "sample_seconds", "greedy_seconds")


def decode_run(folder: Path, *, eval_limit: int | None, sample: int) -> None:
    """Decode what is left of a run's checkpoints; a row each."""
    parameters = load_run_parameters(folder)
    backbone = prepare_backbone(parameters.backbone, parameters.tokenizer_dir, parameters.backbones_dir)
    tokenizer = load_tokenizer(backbone)
    records = read_split(parameters.data_dir, "dev", **(scoring_options(parameters) | {"limit": eval_limit}))
    prompts = build_prompts(records, tokenizer, parameters.prompt_format)
    size = min(sample, len(records))
    chosen = {number * len(records) // size for number in range(size)}
    conditions = {"records": len(records), "sample": size}
    rows = [row for row in read_rows(folder) if {name: row[name] for name in conditions} == conditions]
    for entry in read_evaluations(folder):
        checkpoint = folder / "checkpoints" / f"checkpoint-{entry['step']}"
        if any(row["step"] == entry["step"] for row in rows):
            continue
        if not checkpoint.is_dir():
            print(f"{checkpoint} was not kept (save_total_limit={parameters.save_total_limit})", flush=True)
            continue
        scores = score_checkpoint(backbone, checkpoint, tokenizer, records, prompts, chosen, parameters)
        row = {
            "run": folder.name,
            "offset_anchors": parameters.offset_anchors,
            "step": entry["step"],
            **conditions,
            "answer_f1": entry["eval_answer_ner_f1"],
            "head_f1": entry.get("eval_head_ner_f1"),
            **scores,
            # A greedy run's evaluations decode, too.
            "forward_seconds": entry["eval_runtime"] if parameters.watch_metric != "greedy" else None,
        }
        rows = sorted([*rows, row], key=lambda row: row["step"])
        write_json(folder / "watch_metric.json", rows)
        print(json.dumps(row), flush=True)


def score_checkpoint(
    backbone: Path,
    checkpoint: Path,
    tokenizer,
    records,
    prompts: Sequence[Prompt],
    chosen: set[int],
    parameters: Parameters,
) -> dict[str, float]:
    """Greedy F1 on the ``chosen`` records and on all of them, with the seconds of each."""
    from biomerge_lib.model.reach_ins import read_trained_rows_in_place

    model = cast(Any, load_adapter(backbone, checkpoint, dtype=parameters.dtype))
    read_trained_rows_in_place(model.get_base_model())  # as in training; PEFT's own way cannot be graphed
    options: dict[str, Any] = {
        "max_new_tokens": parameters.max_new_tokens,
        "batch_size": parameters.per_device_eval_batch_size,
        "progress": None,
    }
    greedy_decode(model, tokenizer, prompts[:2], **options)  # what is done once does not count
    answers: dict[int, RawAnswer] = {}
    seconds = []
    for sampled in (True, False):
        indices = [i for i, prompt in enumerate(prompts) if (prompt.record_index in chosen) == sampled]
        started = time.monotonic()
        found = greedy_decode(model, tokenizer, [prompts[i] for i in indices], **options)
        seconds.append(time.monotonic() - started)
        answers |= dict(zip(indices, found, strict=True))
    predictions = collect_predictions(records, prompts, [answers[i] for i in range(len(prompts))])
    few = [prediction for prediction in predictions if prediction.index in chosen]
    return {
        "sample_f1": score_predictions(few)["ner_f1"],
        "greedy_f1": score_predictions(predictions)["ner_f1"],
        "sample_seconds": round(seconds[0], 2),
        "greedy_seconds": round(sum(seconds), 2),
    }


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations in a run's log, one a step.

    Raises:
        DataError: the run is not finished, or older than the metric.
    """
    path = folder / "log_history.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file. A run has it when its training is finished.")
    history = json.loads(path.read_text(encoding="utf-8"))
    found = {entry["step"]: entry for entry in history if "eval_answer_ner_f1" in entry}
    if not found:
        raise DataError(f"{path}: no eval_answer_ner_f1; the run is older than that metric.")
    return list(found.values())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "watch_metric.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def correlate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of each metric with greedy F1 on all of dev: a run, an anchor style, all rows."""
    from scipy.stats import spearmanr

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name in (row["run"], f"all of {row['offset_anchors']}", "all"):
            groups.setdefault(name, []).append(row)
    table = []
    for name, members in sorted(groups.items(), key=lambda group: (group[0][:3] == "all", group[0] == "all")):
        found: dict[str, Any] = {"rows": name, "checkpoints": len(members)}
        for metric in WATCHED:
            pairs = [(row[metric], row["greedy_f1"]) for row in members if row[metric] is not None]
            varied = len(pairs) > 2 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True))
            found[metric] = float(spearmanr(pairs).statistic) if varied else None
        table.append(found)
    return table


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each run and metric the checkpoint that it would have kept, and that checkpoint's greedy F1 on all of dev."""
    choices = []
    for run in dict.fromkeys(row["run"] for row in rows):
        for metric in WATCHED:
            members = [row for row in rows if row["run"] == run and row[metric] is not None]
            if members:
                best = max(members, key=lambda row: row[metric])
                names = ("run", "offset_anchors", "step", "greedy_f1")
                choices.append({"metric": metric, **{name: best[name] for name in names}, "f1": best[metric]})
    return choices


def describe(report: dict[str, Any]) -> str:
    """The page."""
    rows = report["rows"]
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for choice in report["choices"]:
        best.setdefault(choice["run"], {})[choice["metric"]] = choice
    lines = [
        "# Which watch metric chooses as greedy decoding does",
        "",
        f"`{report['command']}`, {report['device']}, commit `{report['commit']}`, "
        f"torch {report['versions'].get('torch')}, transformers {report['versions'].get('transformers')}. "
        "F1 of exact spans on dev. *Answer* and *token head* are of the evaluations during training, both from one "
        "forward pass; each checkpoint was then decoded greedily, on a sample and on all of dev.",
        "",
        "## Rank correlation with greedy decoding on all of dev (Spearman)",
        "",
        "| checkpoints of | number | answer | token head | greedy, sample |",
        "|---|---|---|---|---|",
    ]
    for found in report["correlations"]:
        cells = [_show(found[metric]) for metric in list(WATCHED)[:3]]
        lines.append(f"| {found['rows']} | {found['checkpoints']} | {' | '.join(cells)} |")
    lines += [
        "",
        "## The checkpoint that each would have kept, and its greedy F1 on all of dev",
        "",
        "| run | anchors | answer | token head | greedy, sample | greedy, all |",
        "|---|---|---|---|---|---|",
    ]
    for run, by_metric in best.items():
        cells = [
            f"{by_metric[metric]['step']}: {by_metric[metric]['greedy_f1']:.4f}"
            if metric in by_metric
            else "—"
            for metric in WATCHED
        ]
        lines.append(f"| {run} | {by_metric['greedy_f1']['offset_anchors']} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Seconds an evaluation (median)",
        "",
        "| metric | s | sentences |",
        "|---|---|---|",
    ]
    for cost in report["costs"]:
        lines.append(f"| {WATCHED[cost['metric']]} | {_show(cost['seconds'])} | {cost['sentences']:,} |")
    lines += [
        "",
        "Answer and token head share one forward pass, whose seconds stand at both. It was timed during training, "
        "beside whatever else ran on the device.",
        "",
        "## Checkpoints",
        "",
        "| run | step | answer | token head | greedy, sample | greedy, all | forward s | sample s | greedy s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_show(row[metric]) for metric in WATCHED]
        cells += [_show(row[name]) for name in ("forward_seconds", "sample_seconds", "greedy_seconds")]
        lines.append(f"| {row['run']} | {row['step']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _show(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}" if abs(value) <= 1 else f"{value:.1f}"


def write_report(folders: Sequence[Path], out: Path) -> None:
    rows = [row for folder in folders for row in read_rows(folder)]
    if not rows:
        raise DataError("none of the runs has a decoded checkpoint yet.")
    costs = []
    for metric, name in zip(WATCHED, SECONDS, strict=True):
        seconds = [row[name] for row in rows if row[name] is not None and row[metric] is not None]
        sentences = rows[0]["sample" if metric == "sample_f1" else "records"]
        middle = statistics.median(seconds) if seconds else None
        costs.append({"metric": metric, "seconds": middle, "sentences": sentences})
    trained = read_metrics(folders[0]).get("stages", {}).get("03_train", {})
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.watch_metric", *sys.argv[1:]]),
        **trained.get("provenance", provenance()),
        "runs": [
            {
                "run": folder.name,
                "parameters": read_metrics(folder).get("parameters")
                or load_run_parameters(folder).model_dump(),
                "dev_sha256": file_sha256(Path(load_run_parameters(folder).data_dir) / "dev.jsonl"),
                "provenance": read_metrics(folder).get("stages", {}).get("03_train", {}).get("provenance"),
            }
            for folder in folders
        ],
        "correlations": correlate(rows),
        "choices": choose(rows),
        "costs": costs,
        "rows": rows,
    }
    write_json(out, report)
    out.with_suffix(".md").write_text(describe(report), encoding="utf-8")
    print(out.with_suffix(".md"), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--sample", type=int, default=400, help="records of the sample (%(default)s)")
    parser.add_argument("--eval-limit", type=int, help="decode so many records instead of all of dev")
    parser.add_argument("--abreast", type=int, default=1, help="runs decoded side by side (%(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is decoded")
    parser.add_argument("--decode", action="store_true", help="only decode, and write no tables")
    parser.add_argument("--out", type=Path, default=REPORT, help="JSON file; its page is beside it")
    options = parser.parse_args()
    quiet_libraries()
    for folder in options.runs:
        read_evaluations(folder)
    if options.abreast > 1 and not options.report:
        limit = [f"--eval-limit={options.eval_limit}"] if options.eval_limit else []
        own = [
            sys.executable,
            "-m",
            "benchmarks.watch_metric",
            "--decode",
            f"--sample={options.sample}",
            *limit,
        ]
        for first in range(0, len(options.runs), options.abreast):
            few = options.runs[first : first + options.abreast]
            started = [subprocess.Popen([*own, str(folder)]) for folder in few]
            if any([process.wait() for process in started]):
                sys.exit("a run could not be decoded (see above)")
    elif not options.report:
        for folder in options.runs:
            decode_run(folder, eval_limit=options.eval_limit, sample=options.sample)
    if not options.decode:
        write_report(options.runs, options.out)


if __name__ == "__main__":
    main()
