"""Knows whether data, tokenizer and parameters can train together, before any model loads (no torch, seconds).

    parameters + {train,dev,test}.jsonl + tokenizer --[check_training]--> a table of findings, or a refusal

Every line of the data is read and checked, and every record that could be over a limit is tokenised: those counts are
exact. Tokens an epoch are estimated from a sample where there are many records.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from biomerge_lib.core.errors import BioMergeError, ModelError
from biomerge_lib.core.files import file_sha256
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.core.spans import parse_answer
from biomerge_lib.corpora.tags import find_implausible
from biomerge_lib.experiment.provenance import device_name
from biomerge_lib.model.adapters import read_init_adapter
from biomerge_lib.model.admission import TRIED, Configuration, find_source, read_source
from biomerge_lib.model.backbones import backbone_name
from biomerge_lib.prompts.data_scan import Scan, count_record, scan_records
from biomerge_lib.prompts.manifest import read_manifest
from biomerge_lib.prompts.ner_span import read_split, read_training_splits
from biomerge_lib.prompts.plain_tokenizer import PlainTokenizer, load_plain_tokenizer
from biomerge_lib.prompts.prompt import encode_completion

OK, NOTE, WARNING, REFUSED = "ok", "note", "warning", "refused"
HIGH_RATE = 1e-3  # for a training of all weights
INSIDE = 0.03  # of the mentions: what an annotator's slips leave
SMALL_DEV = 100  # records: a few mentions more or less move F1 by a point


class PreflightError(BioMergeError):
    """Training cannot work; ``preflight`` holds everything that was found."""

    def __init__(self, preflight: Preflight):
        problems = "; ".join(f"{finding.check}: {finding.says}" for finding in preflight.refused)
        super().__init__(f"training cannot work: {problems}")
        self.preflight = preflight


@dataclass(frozen=True, slots=True)
class Finding:
    """``verdict`` is ok, note, warning or refused."""

    verdict: str
    check: str
    says: str


@dataclass
class Preflight:
    """The findings in order, and what was counted in each split."""

    scans: dict[str, Scan]
    findings: list[Finding] = field(default_factory=list)

    @property
    def refused(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict == REFUSED]

    def add(self, verdict: str, check: str, says: str) -> None:
        self.findings.append(Finding(verdict, check, says))

    def __str__(self) -> str:
        return "\n".join(f"{f.verdict:<8} {f.check:<11} {f.says}" for f in self.findings)


def check_training(parameters: Parameters) -> Preflight:
    """Check that these parameters can train: 03_train before it reads data, and ``python -m biomerge_lib preflight``.

    Raises:
        DataError: a split is missing, or a line of it is bad.
        ModelError: the tokenizer is missing or unusable.
        PreflightError: anything else that cannot work; all of it is named at once.
    """
    tokenizer = load_plain_tokenizer(parameters.tokenizer_dir)
    found = Preflight(_scan_splits(parameters, tokenizer))
    made_of = read_manifest(parameters.tokenizer_dir).get("backbone", parameters.backbone)
    if made_of != parameters.backbone:
        says = f"{parameters.tokenizer_dir} was made of {made_of}, and the model is {parameters.backbone}"
        found.add(
            NOTE,
            "tokenizer",
            f"{says}: unless the one is a copy of the other, run 01_tokenizer with this model",
        )
    for split in found.scans:
        _report_counts(found, split, parameters)
    _report_answers(found, tokenizer, parameters)
    _report_anchors(found, parameters)
    _report_train_lengths(found, parameters)
    for split in [name for name in found.scans if name != "train"]:
        _report_scored_lengths(found, split, parameters)
    _report_sentences(found, parameters)
    _report_cues(found, parameters)
    report_backbone(found, parameters)
    _report_steps(found, parameters)
    _report_init_adapter(found, parameters)
    if parameters.trainable == "all":
        _report_full_training(found, parameters)
    device = device_name()
    if device.endswith("cores") and parameters.dtype == "bfloat16":
        says = f"no GPU here ({device}), and dtype=bfloat16 is for one: train elsewhere, or runtime=cpu_debug"
        found.add(NOTE, "device", says)
    if found.refused:
        raise PreflightError(found)
    return found


def _scan_splits(parameters: Parameters, tokenizer: PlainTokenizer) -> dict[str, Scan]:
    """train as it is trained on, dev and test as they are scored; an unscored test is read for its leaks alone."""
    scans = {
        split: scan_records(
            records,
            tokenizer,
            parameters.prompt_format,
            # What limits an answer in evaluation is how long the model may write.
            max_target_tokens=parameters.max_target_tokens if split == "train" else parameters.max_new_tokens,
            for_training=split == "train",
        )
        for split, records in read_training_splits(parameters).items()
    }
    if "test" not in scans and (Path(parameters.data_dir) / "test.jsonl").is_file():
        scans["test"] = Scan()
        for record in read_split(parameters.data_dir, "test"):
            count_record(scans["test"], record, parameters.prompt_format)
    return scans


def _report_counts(found: Preflight, split: str, parameters: Parameters) -> None:
    scan, path = found.scans[split], Path(parameters.data_dir) / f"{split}.jsonl"
    says = f"{scan.records:,} records of {len(scan.documents):,} documents, {scan.spans:,} mentions, "
    says += f"{scan.empty / scan.records:.1%} of the records without one; every offset lies in its text "
    found.add(OK, split, f"{says}(sha256 {file_sha256(path)[:12]})")
    if not scan.spans and (split != "test" or parameters.run_test_eval):
        purpose = "to learn" if split == "train" else "to score"
        found.add(REFUSED, split, f"no mention in {split}.jsonl: there is nothing {purpose}")
    if split == "dev" and scan.records < SMALL_DEV:
        cure = ": set eval_limit higher for a result" if scan.records == parameters.eval_limit else ""
        found.add(NOTE, split, f"F1 on {scan.records} records is noise{cure}")
    if problem := find_implausible([word for record in scan.sample for word in record.text.split()]):
        says = f"most words are {problem}, as in {scan.sample[0].text[:40]!r}: was the right column read?"
        found.add(WARNING, split, f"{says} 02_data has token_column and tag_column")
    if scan.reserved:
        says = f"{scan.reserved:,} texts hold a token such as <B> literally; prompts break it up"
        found.add(NOTE, split, says)


def _report_answers(found: Preflight, tokenizer: PlainTokenizer, parameters: Parameters) -> None:
    sample = found.scans["train"].sample
    for record in sample:
        ids = encode_completion(record.spans, tokenizer)
        if ids.index(tokenizer.eos_token_id) != len(ids) - 1:
            found.add(REFUSED, "answers", f"an answer's labels do not end with the one EOS: {ids}")
            return
        written = tokenizer.decode(ids[:-1])
        answer = parse_answer(written, len(record.text))
        if tuple(answer.spans) != record.spans or answer.unreadable:
            says = f"the tokenizer in {parameters.tokenizer_dir} cannot write {record.target!r}"
            found.add(REFUSED, "answers", f"{says}: it decodes as {written!r}")
            return
    found.add(OK, "answers", f"EOS is labelled, and {len(sample):,} answers decode to their spans")


def _report_anchors(found: Preflight, parameters: Parameters) -> None:
    if parameters.offset_anchors == "none":
        return
    inside = mentions = 0
    for record in found.scans["train"].sample:
        words = parameters.prompt_format.render(record).words
        starts, ends = ({word[edge] for word in words} for edge in (0, 1))
        mentions += len(record.spans)
        inside += sum(not (start in starts and end in ends) for start, end in record.spans)
    if inside > INSIDE * mentions:
        says = f"{inside / mentions:.0%} of some mentions begin or end inside a word, where prompts show no offset: "
        says += "convert with punctuation=apart (02_data), or train with offset_anchors=echo_pieces, if not from an "
        found.add(WARNING, "anchors", f"{says}adapter that was trained otherwise")


def _report_train_lengths(found: Preflight, parameters: Parameters) -> None:
    scan = found.scans["train"]
    if scan.impossible:
        found.add(REFUSED, "limits", f"{len(scan.impossible):,} records fit no chunk. {scan.impossible[0]}")
    else:
        says = f"{scan.long_prompts:,} prompts and {scan.long_targets:,} targets of train are over the limits"
        says += f" (max_input_tokens={parameters.max_input_tokens}, max_target_tokens={parameters.max_target_tokens}): "
        says += f"{scan.chunked:,} records are cut into chunks, nothing is truncated"
        found.add(OK, "limits", says)
    if scan.chunked > 0.2 * scan.records:
        found.add(WARNING, "limits", f"{scan.chunked / scan.records:.0%} of train is cut: raise the limits")
    about, total = "" if scan.is_exact else "about ", scan.prompt_tokens + scan.target_tokens
    says = f"{about}{total:,.0f} tokens an epoch; {scan.prompt_tokens / scan.records:.0f} in a mean prompt, "
    found.add(OK, "tokens", f"{says}{scan.target_tokens / scan.records:.0f} in a mean target")


def _report_scored_lengths(found: Preflight, split: str, parameters: Parameters) -> None:
    scan = found.scans[split]
    if scan.impossible:
        found.add(REFUSED, split, f"{len(scan.impossible):,} records fit no chunk. {scan.impossible[0]}")
    if scan.chunked:
        says = f"{scan.chunked:,} records are cut into chunks and mapped back; {scan.cut_spans:,} of {scan.spans:,} "
        found.add(NOTE, split, says + "mentions lie across a cut and cannot be found")
    if scan.long_targets:
        says = f"{scan.long_targets:,} answers are longer than max_new_tokens={parameters.max_new_tokens} and would be "
        found.add(NOTE, split, says + "cut off (a chunk's answer is shorter)")


def _report_sentences(found: Preflight, parameters: Parameters) -> None:
    train = found.scans["train"]
    says = f"train has {train.repeated:,} repeated sentences with the same gold, and {train.contradicting:,} with "
    says += f"other gold{' under the same cue' if parameters.corpus_cue else ''}"
    found.add(WARNING if train.contradicting else OK, "repeats", says)
    own = train.sentences()
    for split in [name for name in found.scans if name != "train"]:
        scan = found.scans[split]
        if both := train.documents & scan.documents:
            says = f"{len(both):,} documents stand in train and in {split}, e.g. {'/'.join(min(both))}"
            found.add(REFUSED, "leaks", says + ": splits are by document")
        shared = len(own & scan.sentences())
        says = f"{shared:,} sentences of {split} also stand in train"
        advice = "; 02_data with drop_leaks=train takes them out" if shared else ""
        found.add(WARNING if shared else OK, "leaks", says + advice)


def _report_cues(found: Preflight, parameters: Parameters) -> None:
    train = found.scans["train"]
    names = ", ".join(f"{name} {count:,}" for name, count in train.datasets.most_common())
    unseen = {name for scan in found.scans.values() for name in scan.datasets} - train.datasets.keys()
    others = ", ".join(sorted(unseen))
    if not parameters.corpus_cue:
        if len(train.datasets) > 1:
            says = f"train mixes {len(train.datasets)} corpora ({names}) and no prompt says which policy is asked for"
            found.add(WARNING, "cues", f"{says}: set corpus_cue=true")
        else:
            found.add(OK, "cues", f"one corpus ({names}): no cue needed")
        if unseen:
            found.add(WARNING, "cues", f"scored but not trained on: {others}")
        return
    cue, cued = parameters.default_cue, train.cues[parameters.default_cue]
    found.add(OK, "cues", f"{names}; {cued:,} training records with the default cue {cue!r}")
    if unseen:
        says = f"{others}: not in train, so asked with the default cue {cue!r}"
        if not cued:
            says += ", which no training record has: set cue_dropout, or name a trained corpus"
        found.add(NOTE if cued else WARNING, "cues", says)


def report_backbone(found: Preflight, parameters: Parameters) -> None:
    backbone = parameters.backbone
    prepared = Path(parameters.backbones_dir) / backbone_name(backbone)
    folder = prepared if prepared.is_dir() else find_source(backbone)
    try:
        config = read_source(folder) if folder else Configuration()
    except ModelError as error:
        found.add(REFUSED, "backbone", str(error))
        return
    if config.context is None:
        says = f"{backbone} is not here yet, or does not say its longest context: not checked"
        found.add(NOTE, "context", says)
    else:
        needed = parameters.max_input_tokens + max(parameters.max_target_tokens, parameters.max_new_tokens)
        says = f"prompt and answer need {needed:,} tokens, {backbone} has room for {config.context:,}"
        found.add(OK if needed <= config.context else REFUSED, "context", says)
    if config.model_type and config.model_type not in TRIED:
        says = f"{config.model_type} models were not tried here (docs/backbones.md); a probe compares the training's "
        found.add(NOTE, "backbone", says + "forward with the model's own before the first step")
    if config.experts and parameters.trainable == "lora":
        says = f"a layer's {config.experts} experts stay as they are: LoRA reaches linear layers alone"
        found.add(NOTE, "backbone", says)


def _report_steps(found: Preflight, parameters: Parameters) -> None:
    steps, evaluations, greedy = count_steps(
        found.scans["train"].examples,
        batch_size=parameters.per_device_train_batch_size * parameters.num_processes,
        accumulation=parameters.gradient_accumulation_steps,
        epochs=parameters.num_train_epochs,
        eval_steps=parameters.eval_steps,
    )
    if (dev := found.scans.get("dev")) is None:
        found.add(OK, "steps", f"{steps:,} optimiser steps on train and dev, the last of which is kept")
        return
    says = f"{steps:,} optimiser steps, {evaluations:,} evaluations, {greedy:,} greedy passes over "
    found.add(OK, "steps", f"{says}{dev.records:,} dev records ({dev.examples:,} prompts)")
    if steps < parameters.eval_steps:
        says = f"eval_steps={parameters.eval_steps} is never reached: scored at epochs' ends only"
        found.add(NOTE, "steps", says)


def _report_init_adapter(found: Preflight, parameters: Parameters) -> None:
    try:
        if adapter := read_init_adapter(parameters):
            says = f"training begins with {adapter.folder} (sha256 {adapter.sha256[:12]})"
            found.add(OK, "adapter", says)
    except ModelError as error:
        found.add(REFUSED, "adapter", str(error))


def _report_full_training(found: Preflight, parameters: Parameters) -> None:
    if parameters.learning_rate >= HIGH_RATE:
        says = f"learning_rate={parameters.learning_rate:g} suits LoRA; trainable=all wants about a tenth of "
        found.add(WARNING, "weights", says + "it (2e-4 to 5e-4 for SmolLM2-135M)")
    prepared = Path(parameters.backbones_dir) / backbone_name(parameters.backbone)
    weights = sum(path.stat().st_size for path in prepared.glob("*.safetensors")) // 2  # bfloat16
    if not weights:
        return  # not prepared yet
    # float32: weight and AdamW's two moments in a checkpoint, the gradient as well in memory.
    checkpoint_gb, memory_gb = 12 * weights / 1e9, 16 * weights / 1e9
    disk_gb = checkpoint_gb * (parameters.save_total_limit + 1)  # a new one is written before the oldest goes
    runs = Path(parameters.runs_dir).absolute()
    free_gb = shutil.disk_usage(next(path for path in (runs, *runs.parents) if path.is_dir())).free / 1e9
    says = f"all {weights / 1e6:,.1f} million weights train: {memory_gb:.1f} GB of memory before activations"
    says += f", {checkpoint_gb:.1f} GB a checkpoint, up to {disk_gb:.1f} GB of them ({free_gb:,.0f} GB free)"
    found.add(OK if disk_gb < free_gb else WARNING, "weights", says)


def count_steps(
    examples: int, *, batch_size: int, accumulation: int, epochs: float, eval_steps: int
) -> tuple[int, int, int]:
    """Optimiser steps, evaluations and greedy passes (one an epoch's end) of a run that does not stop early.

    >>> count_steps(450, batch_size=4, accumulation=1, epochs=2, eval_steps=100)
    (226, 4, 2)
    """
    batches = math.ceil(examples / batch_size)
    steps_per_epoch = max(math.ceil(batches / accumulation), 1)
    steps = math.ceil(epochs * steps_per_epoch)
    ends = {min(epoch * steps_per_epoch, steps) for epoch in range(1, math.ceil(epochs) + 1)}
    return steps, len(ends | set(range(eval_steps, steps + 1, eval_steps))), len(ends)
