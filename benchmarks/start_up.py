"""Where the seconds of a start go on a CPU, and what was cut; writes reports/start_up.json and reports/start_up.md.

    python -m benchmarks.start_up                          # `make debug`'s notebooks, the commands, the training
    python -m benchmarks.start_up --against 876414d        # loading and decoding also as an older commit did it
    python -m benchmarks.start_up --only 01_tokenizer predict   # a notebook needs those before it

Each notebook runs twice, as `make debug` runs it: first in a scratch folder without tokenizer, data or backbone, then
again with every import timed by CPython. A hook of IPython's notes each cell's seconds. CPU seconds (user and system,
with all children) are what a start costs on a busy machine, too; its load is kept beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from biomerge_lib.runs import PROJECT_DIR, provenance, quiet_libraries, write_json

REPORT = PROJECT_DIR / "reports" / "start_up.json"
NOTEBOOKS = ("01_tokenizer", "02_data", "03_train", "04_greedy_dev", "05_vllm_eval", "06_report")
DEBUG = ["existing_run=replace", "subsample=0.01", "num_train_epochs=0.1", "run_id=debug"]  # of `make debug`
COMMANDS = ("help", "parameters", "preflight", "report", "predict-first", "predict")
TRAININGS = ("packed", "padded")
# What the changes are about, each in a new process, of the older commit and of this one turn about.
LOADING = ("tokenizer", "model", "decoding")
LIBRARIES = 8  # named in a table, dearest first
# A cell's job by the first call in it that is named here.
JOBS = {
    "open_notebook(": "opening the run",
    "check_training(": "preflight",
    "build_tokenizer(": "tokenizer",
    "write_corpus(": "reading corpora, writing JSONL",
    "load_tokenizer(": "tokenizer, first prompts",
    "train_run(": "training",
    "merge_adapter(": "merging, checking and writing the model",
    "greedy_decode(": "loading the model, decoding",
    "open_server(": "finding the server",
    "with server": "vLLM: starting, answering",
    "run.finish(": "writing metrics",
    "plt.": "plots",
}
# What IPython runs before the first cell. No name is left behind: a notebook's globals are its parameters.
HOOK = """
def _note_cells():
    import json, os, resource, time
    from IPython import get_ipython
    def spent():
        kinds = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return time.perf_counter(), sum(found.ru_utime + found.ru_stime for found in kinds)
    began, first = [], spent()[1]
    def begin(info):
        began[:] = spent()
    def end(result):
        seconds, cpu = (after - before for after, before in zip(spent(), began or spent()))
        line = json.dumps({"seconds": seconds, "cpu_seconds": cpu, "kernel_cpu_seconds": first})
        with open(os.environ["START_UP_CELLS"], "a") as out:
            print(line, file=out)
    get_ipython().events.register("pre_run_cell", begin)
    get_ipython().events.register("post_run_cell", end)
_note_cells()
del _note_cells
"""


def run_child(arguments: Sequence[str], *, tree: Path, **environment: str) -> dict[str, Any]:
    """Run ``python ARGUMENTS`` in a checkout: its wall seconds, CPU seconds (children's too), and what it said.

    Raises:
        RuntimeError: it failed; its last lines are in the message.
    """
    settings = os.environ | {
        "PYTHONPATH": str(tree),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    load, began, clock = os.getloadavg()[0], time.time(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen([sys.executable, *arguments], cwd=tree, stdout=out, stderr=err, env=settings)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds, ended = time.perf_counter() - clock, time.time()
        out.seek(0)
        err.seek(0)
        said, complained = out.read(), err.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {child.returncode}\n{complained[-3000:]}")
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "load_at_start": round(load, 1),
        "began": began,
        "ended": ended,
        "stdout": said,
        "stderr": complained,
    }


def count_imports(lines: Iterable[str]) -> Counter[str]:
    """Microseconds a top-level package that ``-X importtime`` measured, a module's own without what it imports.

    >>> count_imports(["import time:   1000000 |    3000000 |   torch.nn", "import time: 500000 | 500000 | torch"])
    Counter({'torch': 1500000})
    """
    found: Counter[str] = Counter()
    for line in lines:
        if match := re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", line):
            found[match[2]] += int(match[1])
    return found


def dearest(imports: Counter[str]) -> dict[str, float]:
    """Seconds of the dearest packages, then the sum of all."""
    named = {name: round(spent / 1e6, 2) for name, spent in imports.most_common(LIBRARIES)}
    return named | {"all": round(imports.total() / 1e6, 2)}


def job_of(source: str) -> str:
    """What a cell does, by what it calls.

    >>> job_of("from biomerge_lib.preflight import check_training\\n\\nprint(check_training(parameters))")
    'preflight'
    """
    return next((job for call, job in JOBS.items() if call in source), "other cells")


class Place:
    """A checkout and its scratch folder: everything that a notebook reads and writes lies there."""

    def __init__(self, tree: Path, scratch: Path):
        self.tree = tree
        self.scratch = scratch
        startup = scratch / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True, exist_ok=True)
        (startup / "00.py").write_text(HOOK)
        folders = {
            "tokenizer_dir": "tokenizer",
            "data_dir": "data",
            "backbones_dir": "backbones",
            "runs_dir": "runs",
            "cache_dir": "token_cache",
        }
        self.overrides = [f"{name}={scratch / folder}" for name, folder in folders.items()]

    def measure_notebook(self, name: str, *, traced: bool) -> dict[str, Any]:
        """Execute a notebook as the command line does; its seconds by part, and with ``traced`` its imports."""
        cells = self.scratch / "cells.jsonl"
        cells.unlink(missing_ok=True)
        scoring = name in ("04_greedy_dev", "05_vllm_eval")
        words = [word for word in self.overrides if not scoring or word.startswith("runs_dir")]
        words += [word for word in DEBUG if not scoring or word.startswith("run_id")]
        trace = {"PYTHONPROFILEIMPORTTIME": "1"} if traced else {}
        child = run_child(
            ["-m", "biomerge_lib", "run", name, *words],
            tree=self.tree,
            IPYTHONDIR=str(self.scratch / "ipython"),
            START_UP_CELLS=str(cells),
            **trace,
        )
        executed = json.loads((self.scratch / "runs" / "debug" / f"{name}.ipynb").read_text(encoding="utf-8"))
        code = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
        noted = [json.loads(line) for line in cells.read_bytes().split(b"\n") if line][-len(code) :]
        first = code[0]["metadata"]["papermill"]["start_time"]
        opened = executed["metadata"]["papermill"]["start_time"]
        parts = {
            "command": _part(_stamp(opened) - child["began"]),
            "kernel start": _part(_stamp(first) - _stamp(opened), noted[0]["kernel_cpu_seconds"]),
        }
        for cell, spent in zip(code, noted, strict=True):
            part = parts.setdefault(job_of("".join(cell["source"])), _part(0, 0))
            part["seconds"] = round(part["seconds"] + spent["seconds"], 2)
            part["cpu_seconds"] = round(part["cpu_seconds"] + spent["cpu_seconds"], 2)
        known = sum(part["seconds"] for part in parts.values())
        parts["between cells, and the end"] = _part(child["seconds"] - known)
        row = {"notebook": name, "traced": traced, **_numbers(child), "parts": parts}
        if traced:
            # Each interpreter's lines begin with a heading: the command, then its kernel up to the first cell.
            command, *kernel = re.split(r"^import time: self.*\n", child["stderr"], flags=re.M)[1:]
            # ipykernel shows what a cell writes to stderr below the cell, and hands it on.
            cells_too, in_cells = count_imports("".join(kernel).splitlines()), Counter[str]()
            for cell in code:
                in_cells.update(_cell_imports(cell))
            row["imports"] = {
                "command": dearest(count_imports(command.splitlines())),
                "kernel start": dearest(cells_too - in_cells),
                "cells": dearest(in_cells),
            }
            by_job: dict[str, Counter[str]] = {}
            for cell in code:
                by_job.setdefault(job_of("".join(cell["source"])), Counter()).update(_cell_imports(cell))
            row["imports_by_part"] = {
                job: round(found.total() / 1e6, 2) for job, found in by_job.items() if found
            }
        if name == "03_train":
            row["evaluation"] = self.evaluation_share()
        if name == "05_vllm_eval":
            stages = json.loads((self.scratch / "runs" / "debug" / "metrics.json").read_text())["stages"]
            row["vllm_startup_seconds"] = stages[name]["metrics"]["vllm_startup_seconds"]
        return row

    def evaluation_share(self) -> dict[str, float]:
        """How much of a training's seconds its evaluations took, as the run recorded them."""
        folder = self.scratch / "runs" / "debug"
        metrics = json.loads((folder / "training.json").read_text())
        log = json.loads((folder / "log_history.json").read_text())
        fast = sum(entry.get("eval_runtime", 0) for entry in log)
        greedy = metrics["greedy_dev_seconds"]
        return {
            "train_seconds": metrics["train_seconds"],
            "steps": metrics["steps"],
            "token_head_seconds": round(fast, 2),
            "greedy_seconds": greedy,
            "share": round((fast + greedy) / metrics["train_seconds"], 3),
        }

    def measure_command(self, name: str) -> dict[str, Any]:
        """A console command once as it is and once with its imports timed; predict's first call merges its model."""
        words = {
            "help": ["--help"],
            "parameters": ["parameters"],
            "preflight": ["preflight", *self.overrides],
            "report": ["report", str(self.scratch / "runs"), "--out", str(self.scratch / "report.html")],
        }.get(name, ["predict", "Aspirin can trigger asthma attacks ."])
        cache = self.scratch / "cache"
        if name == "predict-first":
            shutil.rmtree(cache, ignore_errors=True)
        child = run_child(["-m", "biomerge_lib", *words], tree=self.tree, BIOMERGE_CACHE=str(cache))
        row = {"command": name, **_numbers(child)}
        if name != "predict-first":
            again = run_child(
                ["-X", "importtime", "-m", "biomerge_lib", *words], tree=self.tree, BIOMERGE_CACHE=str(cache)
            )
            row["imports"] = dearest(count_imports(again["stderr"].splitlines()))
        return row

    def measure_loading(self, what: str, tree: Path) -> dict[str, Any]:
        """Load the debug run's tokenizer, or model too, or decode 8 sentences for 16 tokens, in a checkout."""
        code = f"import sys; sys.path.append({str(PROJECT_DIR)!r}); "
        code += (
            f"from benchmarks.start_up import load_in_parts; load_in_parts({str(self.scratch)!r}, {what!r})"
        )
        child = run_child(["-c", code], tree=tree)
        return {"loading": what, **_numbers(child), **json.loads(child["stdout"].splitlines()[-1])}

    def measure_training(self, batches: str) -> dict[str, Any]:
        """03_train's training cell taken apart, in a process of its own; the laptop's parameters but for packing."""
        shutil.rmtree(self.scratch / "training", ignore_errors=True)
        words = [word for word in self.overrides if not word.startswith(("runs_dir", "cache_dir"))]
        words += [
            f"runs_dir={self.scratch / 'training'}",
            f"cache_dir={self.scratch / 'training' / 'tokens'}",
        ]
        words += [f"packing={str(batches == 'packed').lower()}", "run_id=debug"]
        # An older checkout may lack this module, and its own library must come first.
        code = f"import sys; sys.path.append({str(PROJECT_DIR)!r}); "
        code += f"from benchmarks.start_up import train_in_parts; train_in_parts({words!r})"
        child = run_child(["-c", code], tree=self.tree)
        return {"batches": batches, **_numbers(child), **json.loads(child["stdout"].splitlines()[-1])}


def load_in_parts(scratch: str, what: str) -> None:
    """What ``measure_loading`` asks for; prints the decoding's own seconds as JSON."""
    quiet_libraries()
    from biomerge_lib.tokenizer import load_tokenizer

    merged = Path(scratch) / "runs" / "debug" / "merged"
    tokenizer, spent = load_tokenizer(merged), {}
    if what != "tokenizer":
        from biomerge_lib.unsloth_lora_ner import load_causal_lm

        model = load_causal_lm(merged, dtype="float32")
    if what == "decoding":
        from biomerge_lib.decoding import greedy_decode
        from biomerge_lib.ner_span import read_split
        from biomerge_lib.predictions import build_prompts

        records = read_split(f"{scratch}/data", "dev", limit=8)
        prompts = build_prompts(
            records, tokenizer, offset_anchors="echo_start", corpus_cue=False, max_input_tokens=768
        )
        began = time.perf_counter(), time.process_time()
        greedy_decode(model, tokenizer, prompts, max_new_tokens=16, batch_size=16)
        now = time.perf_counter(), time.process_time()
        spent = {"decoding": _part(now[0] - began[0], now[1] - began[1])}
    print(json.dumps(spent))


def train_in_parts(words: Sequence[str]) -> None:
    """What ``launch.train_run`` does, with each part's seconds; prints them as JSON."""
    quiet_libraries()
    parts: dict[str, dict[str, float]] = {}
    then = time.perf_counter(), time.process_time()

    def note(part: str) -> None:
        nonlocal then
        now = time.perf_counter(), time.process_time()
        parts[part] = _part(now[0] - then[0], now[1] - then[1])
        then = now

    from biomerge_lib.parameters import compose_parameters
    from biomerge_lib.preflight import check_training

    parameters = compose_parameters(words)
    note("Hydra")
    check_training(parameters)
    note("preflight")
    from biomerge_lib.launch import read_records
    from biomerge_lib.unsloth_lora_ner import import_backend

    import_backend(parameters.backend)
    from biomerge_lib.tokenizer import load_tokenizer
    from biomerge_lib.training import build_model, build_trainer, train

    note("imports")
    from biomerge_lib.backbones import prepare_backbone

    backbone = prepare_backbone(parameters.backbone, parameters.tokenizer_dir, parameters.backbones_dir)
    tokenizer = load_tokenizer(backbone)
    note("tokenizer")
    model = build_model(parameters, backbone)
    note("model")
    records = read_records(parameters)
    note("reading")
    from biomerge_lib.ner_span import build_dataset

    names = ("offset_anchors", "corpus_cue", "max_input_tokens", "max_target_tokens")
    rendering = {name: getattr(parameters, name) for name in names}
    for part in ("tokenising, cold", "tokenising, from the cache"):
        for split in ("train", "dev"):
            build_dataset(records[split], tokenizer, cache_dir=parameters.cache_dir, **rendering)
        note(part)
    folder = parameters.run_folder
    trainer = build_trainer(model, tokenizer, records, parameters, checkpoints=folder / "checkpoints")
    note("Trainer")
    steps: list[tuple[float, float]] = []
    evaluations: list[tuple[float, float]] = []
    _watch(trainer, "training_step", steps)
    _watch(trainer, "evaluate", evaluations)
    metrics = train(trainer, folder)
    note("training")
    numbers = {
        "steps": metrics["steps"],
        "seconds_per_step": round(statistics.median(found[0] for found in steps), 3),
        "cpu_seconds_per_step": round(statistics.median(found[1] for found in steps), 3),
        "tokens_per_step": round(int(trainer.tokens_seen) / metrics["steps"], 1),
        "evaluation_seconds": round(sum(found[0] for found in evaluations), 2),
        "train_loss": metrics["train_loss"],
    }
    print(json.dumps({"parts": parts, **numbers}))


def _watch(owner: Any, method: str, spent: list[tuple[float, float]]) -> None:
    """Let ``owner.method`` note its wall and CPU seconds in ``spent``."""
    original = getattr(owner, method)

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter(), time.process_time()
        try:
            return original(*arguments, **options)
        finally:
            spent.append((time.perf_counter() - began[0], time.process_time() - began[1]))

    setattr(owner, method, timed)


def _part(seconds: float, cpu_seconds: float | None = None) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": None if cpu_seconds is None else round(cpu_seconds, 2),
    }


def _stamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _numbers(child: Mapping[str, Any]) -> dict[str, float]:
    return {name: child[name] for name in ("seconds", "cpu_seconds", "load_at_start")}


def _cell_imports(cell: Mapping[str, Any]) -> Counter[str]:
    text = "".join("".join(output.get("text", "")) for output in cell["outputs"])
    return count_imports(text.splitlines())


def extract(commit: str, folder: Path) -> Path:
    """The files of an older commit."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=PROJECT_DIR, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def measure(
    place: Place, older: Path | None, wanted: Sequence[str]
) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Every row, ``(version, kind, row)``."""
    for traced in (False, True):
        for name in NOTEBOOKS:
            # vLLM's server takes most of a minute: once is enough.
            if name in wanted and (traced or name != "05_vllm_eval"):
                yield "now", "notebooks", place.measure_notebook(name, traced=traced)
    for what in LOADING:
        for version, tree in {"before": older, "now": place.tree}.items():
            if what in wanted and tree is not None:
                yield version, "loading", place.measure_loading(what, tree)
    for name in COMMANDS:
        if name in wanted:
            yield "now", "commands", place.measure_command(name)
    for batches in TRAININGS:
        if batches in wanted:
            yield "now", "trainings", place.measure_training(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = (*NOTEBOOKS, *LOADING, *COMMANDS, *TRAININGS)
    parser.add_argument(
        "--only", nargs="+", default=known, choices=known, metavar="NAME", help=", ".join(known)
    )
    parser.add_argument("--against", metavar="COMMIT", help="measure loading as an older commit did it, too")
    parser.add_argument("--out", type=Path, default=REPORT, help="JSON to write, with a page (%(default)s)")
    options = parser.parse_args()
    where = provenance()
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.start_up", *sys.argv[1:]]),
        **{name: where[name] for name in ("commit", "device", "python", "versions")},
        "nice": os.nice(0),
    }
    with tempfile.TemporaryDirectory() as scratch:
        place, older = Place(PROJECT_DIR, Path(scratch) / "now"), None
        if options.against:
            older = extract(options.against, Path(scratch) / "checkout")
            report["against"] = options.against
        for version, kind, row in measure(place, older, options.only):
            report.setdefault(version, {}).setdefault(kind, []).append(row)
            print(version, json.dumps(row), flush=True)
            write_json(options.out, report)
            if "now" in report:
                write_page(report, options.out.with_suffix(".md"))
    print(options.out.with_suffix(".md"))


# What was changed, what it should have brought, and the row of LOADING that shows it.
CHANGES = (
    (
        "`load_tokenizer` takes the class that the tokenizer's own file names, not `AutoTokenizer`, and transformers "
        "finds itself without scikit-learn and torchao",
        "3 to 4 CPU seconds less where no model follows (01): no generation, no torch compiler",
        "tokenizer",
    ),
    ("the same, where a model follows (04, `predict`)", "1 to 2 CPU seconds less", "model"),
    (
        "`OMP_WAIT_POLICY=passive`: PyTorch's threads sleep while they wait for each other",
        "on a busy machine a third of the CPU seconds of decoding; on a quiet one a few per cent more wall seconds",
        "decoding",
    ),
)
# What has no row of its own.
NOTES = (
    "`cache_dir` reached no data set of 03_train's; now it does. Predicted: nothing on the sample corpus, whose "
    "tokenising is a row of the table of training; what it spares with 30,000 sentences is in data_speed.md.",
    "scikit-learn and torchao are imported in 03 all the same, later: seqeval wants the one, peft the other.",
)


def find_row(version: Mapping[str, Any], kind: str, name: str, traced: bool = False) -> dict[str, Any] | None:
    """The row of a version that was measured, or None."""
    keys = {"notebooks": "notebook", "commands": "command", "trainings": "batches", "loading": "loading"}
    rows = (row for row in version.get(kind, ()) if row[keys[kind]] == name)
    return next((row for row in rows if row.get("traced", False) == traced), None)


def write_page(report: dict[str, Any], page: Path) -> None:
    """The tables that ``report`` has rows for."""
    now, before = report["now"], report.get("before", {})
    lines = [
        "# Where the seconds of a start go on a CPU",
        "",
        f"Written by `{report['command']}` on {report['device']}, commit `{report['commit']}`, "
        f"Python {report['python']}, priority (nice) {report['nice']}. Each "
        "cell holds wall seconds and, in brackets, CPU seconds (user and system, all "
        "threads and children). *load* is the machine's load average as the row began: above 2, wall seconds are other "
        "people's, too, and threads that wait for each other spend CPU seconds on it.",
        "",
        *_totals_table(now),
    ]
    for row in now.get("notebooks", ()):
        if row["traced"]:
            lines += _parts_table(row, find_row(now, "notebooks", row["notebook"], False))
    lines += _training_table(now.get("trainings", ()))
    if trained := find_row(now, "notebooks", "03_train", True):
        share = trained["evaluation"]
        lines += [
            "## Evaluation's share of training at the debug schedule",
            "",
            f"03_train's {share['train_seconds']} s of training were {share['steps']} step(s), "
            f"{share['token_head_seconds']} s of the evaluation's forward pass and {share['greedy_seconds']} s of the "
            f"greedy pass: {share['share']:.0%} went to evaluation.",
            "",
        ]
    lines += _changes_table(now, before, report.get("against"))
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _totals_table(now: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind in ("notebooks", "commands"):
        for row in now.get(kind, ()):
            run = "" if kind == "commands" else "again, imports timed" if row["traced"] else "first"
            name = row["notebook"] if kind == "notebooks" else f"`{row['command']}`"
            rows.append([name, run, _cell(row), row["load_at_start"]])
    return ["## In all", "", *_table(["", "run", "seconds", "load"], rows), ""]


def _parts_table(again: Mapping[str, Any], first: Mapping[str, Any] | None) -> list[str]:
    imports = again["imports"]
    inside = again["imports_by_part"] | {
        part: imports[part]["all"] for part in ("command", "kernel start") if part in imports
    }
    rows = [
        [part, _cell(first["parts"].get(part)) if first else "", _cell(found), inside.get(part, "")]
        for part, found in again["parts"].items()
    ]
    named = [
        f"{where}: " + ", ".join(f"{name} {seconds}" for name, seconds in found.items() if name != "all")
        for where, found in imports.items()
    ]
    return [
        f"## {again['notebook']}",
        "",
        *_table(["part", "first", "again", "of which imports"], rows),
        "",
        f"Dearest imports, own seconds: {'; '.join(named)}.",
        "",
    ]


def _training_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    parts = [[part, *(_cell(row["parts"][part]) for row in rows)] for part in rows[0]["parts"]]
    numbers = ("steps", "seconds_per_step", "cpu_seconds_per_step", "tokens_per_step", "evaluation_seconds")
    parts += [[name.replace("_", " "), *(row[name] for row in rows)] for name in numbers]
    parts.append(["load", *(row["load_at_start"] for row in rows)])
    return [
        "## Training, taken apart: the laptop's parameters on the sample corpus",
        "",
        "Seconds a step are the median; evaluation is the forward pass and the greedy one over 8 records.",
        "",
        *_table(["part", *(row["batches"] for row in rows)], parts),
        "",
    ]


def _changes_table(now: Mapping[str, Any], before: Mapping[str, Any], against: str | None) -> list[str]:
    rows = []
    for change, predicted, what in CHANGES:
        old, new = find_row(before, "loading", what), find_row(now, "loading", what)
        if old and new:
            old, new = (row.get("decoding", row) | {"load": row["load_at_start"]} for row in (old, new))
            rows.append(
                [change, predicted, what, *(f"{_cell(row)}, load {row['load']}" for row in (old, new))]
            )
    if not rows:
        return []
    header = ["what", "predicted", "in a new process", f"at `{against}`", "now"]
    return ["## Changes", "", *_table(header, rows), "", *(f"- {note}" for note in NOTES), ""]


def _cell(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    cpu = found["cpu_seconds"]
    return f"{found['seconds']:.2f}" + ("" if cpu is None else f" ({cpu:.2f})")


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]


if __name__ == "__main__":
    main()
