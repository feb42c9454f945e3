"""How fast vLLM serves an 8B shape and a trained small model, and whether it answers as transformers does.

    python -m benchmarks.served_speed --data_dir data/bc5cdr_iob/ner          # one GPU; about 4 minutes, 17 GB of disk
    python -m benchmarks.served_speed --data_dir data/sample/ner --shape tiny --limit 8         # on a CPU, to try it

The 8B has Llama-3's shape and tokenizer and random bfloat16 weights: its answers mean nothing and never end, so each
is cut at 64 tokens, more than a trained model writes. The trained model is the shipped adapter, merged. Writes
reports/served_speed.json and .md after each part, so that a part that fails costs no other.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any, cast

from benchmarks.decoding import table
from benchmarks.readiness import SHAPES, TOKENIZER_DIR, build_tokenizer
from biomerge_lib.apply.ready_models import SHIPPED, merge_for_use
from biomerge_lib.core.files import file_sha256, write_json
from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import Prediction, build_prompts, collect_predictions
from biomerge_lib.decoding.vllm_client import GreedyClient, served_names
from biomerge_lib.decoding.vllm_server import EXECUTION, VllmServer
from biomerge_lib.eval_vllm import evaluate_split
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance, quiet_libraries
from biomerge_lib.prompts.manifest import Manifest, read_manifest
from biomerge_lib.prompts.ner_span import read_split
from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer
from biomerge_lib.scoring.ner_metrics import score_predictions
from biomerge_lib.scoring.parity import check_parity

REPORT = PROJECT_DIR / "reports" / "served_speed.json"
RANDOM = Manifest(
    prompt_format=PromptFormat(offset_anchors="start", corpus_cue=False, max_input_tokens=512),
    max_new_tokens=64,
)
WARM_UP = 8  # sentences answered before the clock of "answering" starts; their time counts as start-up


def build_random_model(shape: str) -> Path:
    """The folder of a Llama of that shape with random weights; made on first use."""
    if not (TOKENIZER_DIR / "biomerge.json").is_file():
        build_tokenizer(f"random/llama3-{shape}")
    folder = PROJECT_DIR / "backbones" / f"llama3-{shape}"
    if not (folder / "config.json").is_file():
        code = f"from benchmarks.readiness import *; build_backbone(Path({str(folder)!r}), {shape!r})"
        subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, check=True)  # its memory goes with it
    return folder


def serve(
    model_dir: Path,
    records: list[Record],
    manifest: Manifest,
    *,
    dtype: str,
    execution: str,
    concurrency: int,
    scratch: Path,
    logs: Path,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Start a server, answer the records, stop it: one row of the table, and the predictions."""
    tokenizer = load_plain_tokenizer(model_dir)
    limit = manifest.prompt_format.max_input_tokens + manifest.max_new_tokens
    name = f"{model_dir.parent.name if model_dir.name == 'merged' else model_dir.name}-{dtype}-{execution}"
    start = 1 + len(list(scratch.glob(f"{name}-*.jsonl")))
    name = f"{name}-{start}"
    server = VllmServer(
        model_dir, dtype=dtype, execution=execution, log_path=logs / f"{name}.log", max_model_len=limit
    )
    with server:
        client = GreedyClient(
            server=server,
            tokenizer=tokenizer,
            max_new_tokens=manifest.max_new_tokens,
            concurrency=concurrency,
        )
        style, few = manifest.prompt_format, scratch / f"warm-{name}.jsonl"
        warm_up = evaluate_split(records[:WARM_UP], client, style, split="dev", out=few, progress=None)
        out = scratch / f"{name}.jsonl"
        evaluation = evaluate_split(records, client, style, split="dev", out=out, progress=None)
    prompts = build_prompts(records, tokenizer, manifest.prompt_format)
    start_up = cast(float, server.startup_seconds) + warm_up.seconds
    return {
        "model": server.model_id,
        "dtype": dtype,
        "execution": server.executes,
        "start": start,
        "weights GB": round(sum(path.stat().st_size for path in model_dir.glob("*.safetensors")) / 1e9, 2),
        "sentences": len(records),
        "in flight": concurrency,
        "tokens a prompt": round(mean(len(prompt.prompt_ids) for prompt in prompts), 1),
        "tokens an answer": round(evaluation.new_tokens / len(prompts), 1),
        "start-up s": round(start_up, 1),
        "answering s": round(evaluation.seconds, 1),
        "together s": round(start_up + evaluation.seconds, 1),
        "sentences/s": round(evaluation.sentences_per_second, 1),
        "new tokens/s": round(evaluation.tokens_per_second),
        "vLLM": server.version,
    }, evaluation.predictions


def decode(
    model_dir: Path, records: list[Record], manifest: Manifest, *, dtype: str, batch_size: int
) -> tuple[dict[str, Any], list[Prediction]]:
    """The same with transformers: its F1 means nothing for random weights."""
    import torch

    from biomerge_lib.model.unsloth_lora_ner import load_causal_lm
    from biomerge_lib.prompts.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(model_dir), load_causal_lm(model_dir, dtype=dtype)
    prompts = build_prompts(records, tokenizer, manifest.prompt_format)
    options: dict[str, Any] = {
        "max_new_tokens": manifest.max_new_tokens,
        "batch_size": batch_size,
        "progress": None,
    }
    greedy_decode(model, tokenizer, prompts[:2], **options)
    started = time.monotonic()
    answers = greedy_decode(model, tokenizer, prompts, **options)
    seconds = time.monotonic() - started
    predictions = collect_predictions(records, prompts, answers)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next server takes the memory
    return {
        "model": served_names(model_dir)[0],
        "decoder": f"transformers, batches of {batch_size}",
        "dtype": dtype,
        "sentences": len(records),
        "seconds": round(seconds, 1),
        "sentences/s": round(len(records) / seconds, 1),
        "tokens an answer": round(mean(len(answer.token_ids) for answer in answers), 1),
        "F1": round(score_predictions(predictions)["ner_f1"], 4),
    }, predictions


def compare(
    greedy: list[Prediction], served: list[Prediction], model_dir: Path, *, dtype: str
) -> dict[str, Any]:
    tokenizer = load_plain_tokenizer(model_dir)
    parity = check_parity(greedy, served, tokenizer, reference_dtype=dtype, served_dtype=dtype)
    scores = score_predictions(greedy)
    margins = [difference.margin for difference in parity.differences if difference.margin is not None]
    return {
        "dtype": dtype,
        "sentences": len(greedy),
        "transformers F1": round(parity.reference.f1, 4),
        "95 % interval": f"{scores['ner_f1_low']:.3f} to {scores['ner_f1_high']:.3f}",
        "vLLM F1": round(parity.served.f1, 4),
        "gap": round(parity.f1_gap, 4),
        "differing answers": len(parity.differences),
        "causes": ", ".join(f"{cause}: {count}" for cause, count in parity.causes.items()) or "none",
        "largest margin": max(margins, default=""),
        "gate": "passed" if parity.passed else "FAILED",
    }


def write_page(report: dict[str, Any], path: Path) -> None:
    write_json(path, report)
    lines = [
        "# vLLM: start-up, speed and parity on one machine",
        "",
        f"`{report['command']}`, commit {report['commit']}, {report['device']}, Python {report['python']}, "
        f"torch {report['versions'].get('torch')}, transformers {report['versions'].get('transformers')}.",
        f"{report['records']} records of {report['data']} (sha256 {report['data_sha256'][:12]}), spread evenly.",
        "",
        "*start-up*: from starting the server to its answer to eight sentences; *answering*: the records, through the "
        "project's own client. *start*: the first of a model in this run, the second (kernels that Triton compiles at "
        "first use are kept on disk). The random model never writes EOS, so that each of its answers is cut at "
        f"{RANDOM.max_new_tokens} tokens. *execution*: eager, with CUDA graphs, or compiled with "
        "torch.compile and graphs.",
        "",
    ]
    parts = {
        "served": "",
        "decoded": "## The same in transformers",
        "parity": "## Parity of the trained model",
    }
    for part, title in parts.items():
        if report[part]:
            rows = [list(row.values()) for row in report[part]]
            lines += [*([title, ""] if title else []), *table(list(report[part][0]), rows), ""]
    if report["failed"]:
        lines += ["## Failed", "", *(f"- {what}: {why}" for what, why in report["failed"].items()), ""]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of dev.jsonl")
    parser.add_argument(
        "--shape", choices=[*sorted(SHAPES), "none"], default="8b", help="of the random model"
    )
    parser.add_argument("--limit", type=int, default=800, help="records (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=256, help="requests in flight (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="of transformers (%(default)s)")
    parser.add_argument(
        "--execution", nargs="+", choices=EXECUTION, default=["graphs"], help="of the random model's servers"
    )
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument(
        "--dtypes",
        nargs="*",
        default=["bfloat16", "float32"],
        help="of the trained model (both; none leaves it out)",
    )
    parser.add_argument("--out", type=Path, default=REPORT, help="JSON file; its page stands beside it")
    options = parser.parse_args()
    quiet_libraries()
    where = provenance()
    records = read_split(options.data_dir, "dev", limit=options.limit)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.served_speed", *sys.argv[1:]]),
        **{name: where[name] for name in ("commit", "device", "python", "versions")},
        "records": len(records),
        "data": f"{options.data_dir.parent.name} dev",
        "data_sha256": file_sha256(options.data_dir / "dev.jsonl"),
        **{"served": [], "decoded": [], "parity": [], "failed": {}},
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.shape != "none":
            random_model = build_random_model(options.shape)
        for execution in options.execution if options.shape != "none" else ():
            attempt(
                options.out,
                report,
                f"{options.shape} {execution}",
                lambda how=execution: report["served"].append(
                    serve(
                        random_model,
                        records,
                        RANDOM,
                        dtype="bfloat16",
                        execution=how,
                        concurrency=options.concurrency,
                        scratch=scratch,
                        logs=options.logs or scratch,
                    )[0]
                ),
            )
        if options.shape != "none":
            attempt(
                options.out,
                report,
                f"{options.shape} in transformers",
                lambda: report["decoded"].append(
                    decode(
                        random_model,
                        records,
                        RANDOM,
                        dtype="bfloat16",
                        batch_size=options.batch_size,
                    )[0]
                ),
            )
        if options.dtypes:
            trained = merge_for_use(SHIPPED)  # in float32: each decoder rounds it as its own dtype wants
        for dtype in options.dtypes:
            attempt(
                options.out,
                report,
                f"{SHIPPED.name} {dtype}",
                lambda dtype=dtype: measure_trained(report, trained, records, dtype, options, scratch),
            )
    sys.exit(1 if report["failed"] else 0)


def measure_trained(
    report, model_dir: Path, records: list[Record], dtype: str, options, scratch: Path
) -> None:
    manifest = Manifest.of(read_manifest(model_dir), where=model_dir)
    row, served = serve(
        model_dir,
        records,
        manifest,
        dtype=dtype,
        execution="graphs",
        concurrency=options.concurrency,
        scratch=scratch,
        logs=options.logs or scratch,
    )
    report["served"].append(row)
    row, greedy = decode(model_dir, records, manifest, dtype=dtype, batch_size=options.batch_size)
    report["decoded"].append(row)
    report["parity"].append(compare(greedy, served, model_dir, dtype=dtype))


def attempt(out: Path, report: dict[str, Any], what: str, measure) -> None:
    """Run one part and write the page; what goes wrong is printed and kept."""
    started = time.monotonic()
    try:
        measure()
    except Exception as error:
        report["failed"][what] = f"{type(error).__name__}: {error}".replace("\n", " ")
    write_page(report, out)
    print(f"{what}: {time.monotonic() - started:.0f} s", report["failed"].get(what, ""), flush=True)
    for part in ("served", "decoded", "parity"):
        print(part, report[part][-1:], flush=True)


if __name__ == "__main__":
    main()
