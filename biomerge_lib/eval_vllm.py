"""Knows how to score a split with a running vLLM server; needs the server and a tokenizer, no training stack.

python -m biomerge_lib.eval_vllm --split dev --port 8001 --data_dir data/union_span/ner
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from biomerge_lib.core.errors import BioMergeError, DataError, ParameterError, ServerError
from biomerge_lib.core.files import file_sha256, fingerprint_weights, write_json
from biomerge_lib.core.prompt_format import ANCHOR_STYLES, PromptFormat
from biomerge_lib.core.records import SPLITS, Record
from biomerge_lib.decoding.answer_grammar import CONSTRAINTS
from biomerge_lib.decoding.partial_answers import PartialAnswers
from biomerge_lib.decoding.predictions import (
    Prediction,
    RawAnswer,
    build_prompts,
    collect_predictions,
    write_predictions,
)
from biomerge_lib.decoding.vllm_client import API_KEY, GreedyClient, RunningServer, Server, find_served_model
from biomerge_lib.decoding.vllm_server import VllmServer
from biomerge_lib.experiment.jobs import progress_bar
from biomerge_lib.experiment.provenance import log_test_scoring
from biomerge_lib.prompts.manifest import ASKED_WITH, Manifest, read_model_folder
from biomerge_lib.prompts.ner_span import cue_record, read_split
from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer
from biomerge_lib.scoring.ner_metrics import score_predictions

EXAMPLES = """examples:
  VLLM_API_KEY=... python -m vllm.entrypoints.openai.api_server --model runs/my-run/merged \\
      --served-model-name my-run --host 127.0.0.1 --port 8001
  VLLM_API_KEY=... python -m biomerge_lib.eval_vllm --split dev --port 8001 --data_dir data/bc5cdr_iob/ner
  python -m biomerge_lib.eval_vllm --runs runs/one runs/two --data_dir data/bc5cdr_iob/ner
  python -m biomerge_lib.eval_vllm --base-url http://node7:8001 --model runs/my-run --constrained-decoding offsets"""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A split's predictions and what they took: ``asked`` prompts in ``seconds``, after ``resumed`` earlier ones.

    ``new_tokens`` counts the answers' tokens, EOS included; ``retries`` the requests sent again.
    """

    predictions: list[Prediction]
    asked: int
    resumed: int
    seconds: float
    new_tokens: int
    retries: int

    @property
    def sentences_per_second(self) -> float:
        return self.asked / self.seconds if self.asked else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.asked else 0.0

    def speed(self) -> dict[str, float]:
        """What to record of the way: seconds, sentences and tokens a second, retries."""
        return {
            "seconds": round(self.seconds, 3),
            "sentences_per_second": round(self.sentences_per_second, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "retries": self.retries,
        }


def evaluate_split(
    records: Sequence[Record],
    client: GreedyClient,
    prompt_format: PromptFormat,
    *,
    split: str,
    out: Path | str,
    weights: str | None = None,
    span_threshold: float | None = None,
    progress: str | None = "vLLM",
) -> Evaluation:
    """Let the client's model answer every record and write the predictions to ``out``.

    Each answer is kept in ``<out>.partial.jsonl`` as it comes; the same call after a crash asks only for the rest.
    ``span_threshold`` drops less probable spans. ``weights`` (``files.fingerprint_weights``) tells retrained models of
    one name apart.

    Raises:
        DataError: no records, or the partial file is broken or in use.
        ServerError: the server cannot be reached, serves another model, refuses a prompt, or kept failing.
    """
    if not records:
        raise DataError(f"{split}: no records to score.")
    prompts = build_prompts(records, client.tokenizer, prompt_format)
    server = client.server
    served = find_served_model(server.base_url, server.api_key, names=[server.model_id])
    needed = max(len(prompt.prompt_ids) for prompt in prompts) + client.max_new_tokens
    if served.max_model_len and needed > served.max_model_len:
        raise ServerError(
            f"the longest prompt and {client.max_new_tokens} new tokens make {needed}, but {served.id!r} takes "
            f"{served.max_model_len}. Start it with --max-model-len {needed}, or lower max_input_tokens."
        )
    all_ids = json.dumps([prompt.prompt_ids for prompt in prompts]).encode()
    job = dict(split=split, model=server.model_id, weights=weights, max_new_tokens=client.max_new_tokens)
    job |= asdict(prompt_format) | dict(constrained_decoding=client.constrained_decoding)
    job |= dict(prompts=len(prompts), prompts_sha256=hashlib.sha256(all_ids).hexdigest())
    with PartialAnswers(f"{out}.partial.jsonl", job) as partial:
        resumed = len(partial.answers)
        todo = {number: prompt for number, prompt in enumerate(prompts) if number not in partial.answers}
        bar = progress_bar(len(prompts), progress, done=resumed)

        def keep(number: int, answer: RawAnswer) -> None:
            partial.add(number, answer)
            bar.update()

        started = time.monotonic()
        try:
            with bar:
                retries = client.answer_all(todo, keep)
        except ServerError as error:
            raise ServerError(
                f"{error} {len(partial.answers)} of {len(prompts)} answers are kept in {partial.path}: "
                "the same call again goes on from there."
            ) from None
        seconds = time.monotonic() - started
        answers = [partial.answers[number] for number in range(len(prompts))]
        how: Any = {"constrained": client.constrained_decoding != "off", "span_threshold": span_threshold}
        predictions = collect_predictions(records, prompts, answers, **how)
        write_predictions(out, predictions)
        partial.remove()
    new_tokens = sum(len(answers[number].token_ids) + (answers[number].finish == "eos") for number in todo)
    return Evaluation(predictions, len(todo), resumed, seconds, new_tokens, retries)


def choose_asking(stored: Mapping[str, Any], given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """What was given (not None) wins over what the model was trained with; a contradiction is warned about.

    Raises:
        ParameterError: neither says it.
    """
    chosen = {**stored, **{name: value for name, value in given.items() if value is not None}}
    for name in ASKED_WITH:
        flag = "--" + name.replace("_", "-")
        if name not in chosen:
            raise ParameterError(f"{where} does not say {name} (no run's model?): give {flag}.")
        if name in stored and chosen[name] != stored[name]:
            print(f"warning: {flag} {chosen[name]}, but {where} says {stored[name]}.", file=sys.stderr)
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    options = _build_parser().parse_args(arguments)
    try:
        _evaluate(options)
    except BioMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on from the answers so far.", file=sys.stderr)
        return 130
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomerge_lib.eval_vllm",
        description="Span F1 of a split through a running vLLM server. After a crash or an interrupt the same command "
        "goes on from the answers so far.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--split", default="dev", choices=SPLITS, help="what to score (%(default)s)")
    folder = "folder of <split>.jsonl (%(default)s)"
    add("--data_dir", "--data-dir", default="data/union_span/ner", help=folder)
    add("--port", type=int, default=8001, help="port of a server on this machine (%(default)s)")
    add("--base-url", help="address of a server elsewhere, e.g. http://node7:8001/v1; instead of --port")
    add("--api-key-env", default=API_KEY, help="environment variable with the server's key (%(default)s)")
    runs = "run folders of one architecture: starts a server of its own and scores them one after the other"
    add("--runs", type=Path, nargs="+", help=runs)
    dtypes = ["bfloat16", "float32", "float16"]
    add("--dtype", default=dtypes[0], choices=dtypes, help="of the server of --runs (%(default)s)")
    add("--model", type=Path, help="run folder or merged model folder (default: the folder the server names)")
    place = "predictions file (default: predictions-<split>-vllm.jsonl in the run folder)"
    add("--out", type=Path, help=place)
    add("--metrics", type=Path, help="also write the scores to this JSON file")
    add("--limit", type=_positive, help="score only so many records, spread over the split")
    add("--concurrency", type=_positive, default=64, help="requests in flight (%(default)s)")
    anchors = "how prompts show offsets (this and the next three: as the run was trained)"
    add("--offset-anchors", choices=ANCHOR_STYLES, help=anchors)
    cue = "whether prompts name the record's corpus"
    add("--corpus-cue", action=argparse.BooleanOptionalAction, default=None, help=cue)
    add("--max-input-tokens", type=_positive, help="longer prompts are chunked")
    add("--max-new-tokens", type=_positive, help="longer answers are cut")
    constraint = "format: answers are spans; offsets: at words' edges, ascending, no overlap (%(default)s)"
    add("--constrained-decoding", choices=CONSTRAINTS, default="off", help=constraint)
    add("--span-threshold", type=_share, help="drop predicted spans of a lower probability")
    return parser


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is below 1")
    return number


def _share(word: str) -> float:
    number = float(word)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{word} is not between 0 and 1")
    return number


def _evaluate(options: argparse.Namespace) -> None:
    # What is wrong with the data is said before a server starts.
    read_split(options.data_dir, options.split, limit=options.limit)
    if options.runs:
        _evaluate_runs(options)
        return
    address = options.base_url or f"http://127.0.0.1:{options.port}"
    model = options.model
    if model is None:
        server = RunningServer(address, key_variable=options.api_key_env)
        model = Path(server.model.root or server.model_id)
        if not model.is_dir():
            raise ParameterError(
                f"{server.base_url} serves {server.model_id!r}, no folder of this machine: name it with --model."
            )
    model_dir, manifest = _describe(model, options)
    _score(options, RunningServer(address, model_dir, key_variable=options.api_key_env), model_dir, manifest)


def _evaluate_runs(options: argparse.Namespace) -> None:
    """Score runs of one architecture one after the other, through one server of our own."""
    for name in ("model", "base_url", "out", "metrics"):
        if getattr(options, name):
            raise ParameterError(f"--{name.replace('_', '-')} is of one model; leave it out beside --runs.")
    described = [_describe(run, options) for run in options.runs]
    first, *others = (folder for folder, _ in described)
    longest = max(said.prompt_format.max_input_tokens + said.max_new_tokens for _, said in described)
    log_path = first.parent / "vllm_server.log"
    how: Any = {"dtype": options.dtype, "max_model_len": longest, "others": others}
    with VllmServer(first, log_path=log_path, **how) as server:
        print(f"{server.version} started in {server.startup_seconds:.1f} s; its log is {log_path}")
        for model_dir, manifest in described:
            server.load(model_dir)
            _score(options, server, model_dir, manifest)


def _describe(model: Path, options: argparse.Namespace) -> tuple[Path, Manifest]:
    """A model's folder, and how it is asked with these options."""
    model_dir, stored = read_model_folder(model)
    chosen = choose_asking(stored, {name: getattr(options, name) for name in ASKED_WITH}, where=str(model))
    return model_dir, Manifest.of(chosen, where=model_dir)


def _score(options: argparse.Namespace, server: Server, model_dir: Path, manifest: Manifest) -> None:
    data_path = Path(options.data_dir) / f"{options.split}.jsonl"
    records = read_split(options.data_dir, options.split, limit=options.limit)
    if cues := manifest.cue_options():
        records = [cue_record(record, **cues) for record in records]
    run_folder = model_dir.parent if model_dir.name == "merged" else Path()
    out = options.out or run_folder / f"predictions-{options.split}-vllm.jsonl"
    print(f"{data_path}: {len(records)} records, sha256 {file_sha256(data_path)[:12]}")
    asked = {**asdict(manifest.prompt_format), "max_new_tokens": manifest.max_new_tokens}
    said = ", ".join(f"{name}={value}" for name, value in asked.items())
    print(f"{server.model_id} at {server.base_url}: {said}")
    client = GreedyClient(
        server=server,
        tokenizer=load_plain_tokenizer(model_dir),
        max_new_tokens=manifest.max_new_tokens,
        concurrency=options.concurrency,
        constrained_decoding=options.constrained_decoding,
    )
    if options.split == "test":
        log_test_scoring(run_folder, "eval_vllm", options.data_dir)
    evaluation = evaluate_split(
        records,
        client,
        manifest.prompt_format,
        split=options.split,
        out=out,
        weights=fingerprint_weights(model_dir),
        span_threshold=options.span_threshold,
    )
    scores = score_predictions(evaluation.predictions)
    low, high = scores["ner_f1_low"], scores["ner_f1_high"]
    unit = f"{scores['documents']} documents" if scores["documents"] else "sentences"
    margin = f"± {(high - low) / 2:.4f} (95 % interval {low:.4f} to {high:.4f}, over {unit})"
    print(f"Span F1 = {scores['ner_f1']:.4f} {margin}")
    print(f"precision = {scores['ner_precision']:.4f}, recall = {scores['ner_recall']:.4f}")
    print(
        f"{evaluation.asked} sentences in {evaluation.seconds:.1f} s: {evaluation.sentences_per_second:.1f} a second, "
        f"{evaluation.tokens_per_second:.0f} tokens/s ({evaluation.resumed} resumed, {evaluation.retries} retries)"
    )
    print(f"wrote {out}")
    if options.metrics:
        origin = {"split": options.split, "model": server.model_id}
        origin |= {name: getattr(options, name) for name in ("constrained_decoding", "span_threshold")}
        write_json(options.metrics, {**scores, **evaluation.speed(), **asked, **origin})


if __name__ == "__main__":
    sys.exit(main())
