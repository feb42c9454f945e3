"""Knows every parameter's name, type and meaning, and what contradicts what: values are checked once, and frozen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from biomerge_lib.core.errors import ParameterError, nearest
from biomerge_lib.core.prompt_format import ANCHOR_STYLES, PromptFormat, check_style

PARAMETERS_DIR = Path(__file__).resolve().parents[2] / "parameters"
# What people call a parameter elsewhere (the brief's sweep, other trainers).
OTHER_NAMES = {
    "lr": "learning_rate",
    "r": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "Dropout": "lora_dropout",
    "epochs": "num_train_epochs",
    "train_fraction": "subsample",
    "base_model": "backbone",
    "output_dir": "runs_dir",
    "datamodule.params.root": "data_dir",
    "training.output_dir": "runs_dir",
}
PLACES = ("data_dir", "runs_dir", "backbones_dir", "tokenizer_dir", "cache_dir", "backbone", "init_adapter")
# Younger than the names of many runs: such a value is no part of a name.
YOUNGER = {"init_adapter": None, "train_on": "train", "keep_checkpoint": "best"}
# A parameter without one of these marks changes what is trained, and so the run's name. Scoring: how a trained model's
# answers are made and scored, which 04 and 05 may set anew. Beside: which data are made, how fast, where a run is kept.
T = TypeVar("T")
Scoring = Annotated[T, "scoring"]
Beside = Annotated[T, "beside"]


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_numbers(value: Any) -> Any:
    return [float(part) for part in _split_commas(value)] if isinstance(value, str) else value


def _read_off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare off as false


class Parameters(BaseModel):
    """All parameters of a run; the values' defaults are those of ``parameters/`` with ``runtime=cpu_debug``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    corpora: Beside[Annotated[list[str], BeforeValidator(_split_commas)]] = Field(
        description="Corpus folders that 02_data converts; 'sample' is the bundled corpus"
    )
    entity_types: Beside[Annotated[list[str], BeforeValidator(_split_commas)]] = Field(
        description="Entity types that 02_data keeps, e.g. [Chemical]; [] = all"
    )
    sentence_split: Beside[Literal["segtok", "lines", "document"]] = Field(
        description="How 02_data cuts documents that come uncut"
    )
    discontinuous: Beside[Literal["skip", "cover"]] = Field(
        description="Mentions of several parts: leave out, or take from the first part's start to the last one's end"
    )
    bad_mentions: Beside[Literal["stop", "skip"]] = Field(
        description="Mentions that do not fit their text: stop at the first one, or leave them out and list them"
    )
    token_column: Beside[int | str | None] = Field(
        description="Column of the tokens in token and tag files (number from 0, or name); null = the first"
    )
    tag_column: Beside[int | str | None] = Field(
        description="Column of the tags (number, -1 is the last, or name); null = the last"
    )
    punctuation: Beside[Literal["as_is", "apart"]] = Field(
        "as_is",
        description="apart: spaces around punctuation, for texts that are not tokenised; offsets count them",
    )
    split_shares: Beside[Annotated[list[PositiveFloat], BeforeValidator(_split_numbers)]] = Field(
        description="Shares of train, dev and test in the documents of a corpus without dev and test; [] = refuse such"
    )
    dev_share: Beside[float | None] = Field(
        gt=0, lt=1, description="Share of train's documents that is drawn as dev of a corpus that lacks dev"
    )
    corpus_weights: Beside[Annotated[list[PositiveFloat], BeforeValidator(_split_numbers)]] = Field(
        description="Proportions of the corpora's training sentences, in the order of corpora; [] = all there is"
    )
    max_per_corpus: Beside[int | None] = Field(
        gt=0, description="Draw documents up to so many training sentences of each corpus; null = all"
    )
    drop_leaks: Beside[Literal["none", "train", "documents", "test"]] = Field(
        description="train: sentences that also stand in dev or test leave train; documents: with the rest of their "
        "documents; test: documents that stand in another corpus's train leave dev and test"
    )
    deduplicate: Beside[bool] = Field(description="Keep a training sentence with the same gold only once")
    conflicts: Beside[Literal["keep", "first"]] = Field(
        description="One training sentence with different gold: keep all, or only the first corpus's (see corpora)"
    )
    data_dir: str = Field(min_length=1, description="Folder of train.jsonl, dev.jsonl and test.jsonl")
    train_on: Literal["train", "train_dev"] = Field(
        description="train, or dev as well (but for its sentences that test has too): then nothing is chosen on dev"
    )
    subsample: float = Field(gt=0, le=1, description="Share of the training documents, drawn with the seed")
    eval_limit: Scoring[int | None] = Field(
        gt=0, description="Score at most this many records of a split; null = all"
    )
    offset_anchors: Annotated[Literal[ANCHOR_STYLES], BeforeValidator(check_style)] = Field(  # type: ignore[valid-type]
        description="Which offsets the prompt shows beside each word; echo_pieces: for texts that are not tokenised"
    )
    corpus_cue: bool = Field(description="Name the record's corpus in the prompt")
    default_cue: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,40}$",
        description="The cue of a corpus that the training data lack: a trained corpus's name, or a name for 'any'",
    )
    cue_dropout: float = Field(
        ge=0, lt=1, description="Share of the training records with default_cue, so that it is learnt"
    )
    max_input_tokens: int = Field(ge=16, description="Longest prompt in tokens; longer texts are chunked")
    max_target_tokens: int = Field(ge=8, description="Longest target in tokens, EOS included")
    max_new_tokens: Scoring[int] = Field(ge=8, description="Longest answer in tokens when decoding")
    constrained_decoding: Scoring[
        Annotated[Literal["off", "format", "offsets"], BeforeValidator(_read_off)]
    ] = Field(
        "off",
        description="What 04 and 05 let the model write: anything, spans, or spans at the text's words without overlap",
    )
    span_threshold: Scoring[float | None] = Field(
        None, ge=0, le=1, description="04 and 05 drop predicted spans of a lower probability; null = keep all"
    )
    fast_metrics: bool = Field(description="Train a B/I/O token head; every evaluation gives its F1")
    watch_metric: Literal["answer", "token_head", "greedy"] = Field(
        description="Whose F1 is eval_ner_f1, which chooses the checkpoint: the teacher-forced answer's, the token "
        "head's, or greedy decoding's"
    )
    head_loss_weight: float = Field(ge=0, description="Weight of the token head's loss")
    keep_checkpoint: Literal["best", "last"] = Field(
        description="best: the one that watch_metric chooses, with early stopping; last: that of the last step"
    )
    run_test_eval: bool = Field(description="Score the test split with the kept checkpoint after training")
    split: Scoring[Literal["train", "dev", "test"]] = Field(description="The split that 04 and 05 score")
    early_stopping_patience: int = Field(ge=1, description="Evaluations without improvement before stopping")
    early_stopping_threshold: float = Field(ge=0, description="Smallest F1 gain that counts as improvement")
    seed: int = Field(ge=0, description="Seed of sampling, initialisation, order and dropout")
    cache_dir: Beside[str | None] = Field(
        description="Folder of tokenised data; null = tokenise anew every time"
    )
    num_workers: Beside[int] = Field(ge=0, description="Data loader processes")
    pin_memory: Beside[bool] = Field(description="Pin host memory in the data loader (CUDA)")

    backbone: str = Field(
        min_length=1, description="smollm2-135m, a model folder, a GGUF file, or a hub name"
    )
    tokenizer_dir: str = Field(min_length=1, description="Where 01_tokenizer saves the tokenizer")
    backend: Literal["unsloth", "peft"] = Field(description="Who runs the LoRA layers")
    trainable: Literal["lora", "all"] = Field(
        description="What trains: LoRA, or every weight (backend=peft, and a tenth of LoRA's learning_rate)"
    )
    init_adapter: str | None = Field(
        None,
        description="Go on from an adapter: shipped, a run folder or an exported one; null = a fresh one",
    )
    lora_rank: int = Field(ge=1, description="LoRA rank r")
    lora_alpha: int = Field(ge=1, description="LoRA alpha; the update is scaled by alpha / r")
    lora_dropout: float = Field(ge=0, lt=1, description="Dropout on the LoRA input")
    learning_rate: float = Field(gt=0, lt=1, description="Peak learning rate of AdamW")

    dtype: Literal["bfloat16", "float32"] = Field(
        description="Type of the frozen weights and of the arithmetic (trained weights are float32)"
    )
    per_device_train_batch_size: int = Field(ge=1, description="Records a device and forward pass")
    gradient_accumulation_steps: int = Field(ge=1, description="Forward passes an optimiser step")
    per_device_eval_batch_size: Scoring[int] = Field(
        ge=1, description="Records a device when scoring and decoding"
    )
    num_train_epochs: float = Field(gt=0, description="Passes over the training data; may be a fraction")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        description="Shape of the learning rate over time"
    )
    warmup_ratio: float = Field(ge=0, lt=1, description="Share of the steps with a rising learning rate")
    gradient_checkpointing: bool = Field(
        description="Recompute activations: less memory, more time; with row_tokens=auto in as few layers as will do"
    )
    packing: bool = Field(description="Put a batch's sentences into one row; false pads them to the longest")
    row_tokens: Beside[Annotated[int, Field(ge=64)] | Literal["auto"]] = Field(
        description="Most tokens of a packed row, into which an optimiser step's sentences go; auto = what fits the GPU"
    )
    group_by_length: bool | None = Field(
        description="Steps of sentences of similar length (less padding); null = where batches are padded"
    )
    step_launch: Beside[Literal["auto", "eager", "compiled", "graphed", "compiled_graphed"]] = Field(
        description="How a step reaches the GPU: kernel by kernel, with compiled layers, as a CUDA graph, or both"
    )
    logging_steps: Beside[int] = Field(ge=1, description="Optimiser steps between logged losses")
    eval_steps: int = Field(ge=1, description="Optimiser steps between evaluations of the watch metric")
    save_steps: int = Field(ge=1, description="Optimiser steps between checkpoints")
    save_total_limit: int = Field(ge=1, description="Checkpoints kept, the best one always among them")
    num_processes: int = Field(ge=1, description="Training processes (GPUs) on this node")
    deepspeed: str | None = Field(description="DeepSpeed file, or null")

    wandb_mode: Beside[Literal["online", "offline", "disabled"]] = Field(
        description="How runs reach Weights & Biases"
    )
    wandb_project: Beside[str] = Field(min_length=1, description="Weights & Biases project")
    runs_dir: Beside[str] = Field(min_length=1, description="Folder of all run folders")
    merge: Beside[bool] = Field(
        True, description="03 writes the merged model, which 04, 05 and predict need (0.5 GB, 16 GB of an 8B)"
    )
    run_id: Beside[str | None] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run folder; null = from the parameters",
    )
    existing_run: Beside[Literal["resume", "replace"]] = Field(
        description="What 03 does with a run folder that exists: go on (or reuse it when finished), or start anew"
    )
    backbones_dir: Beside[str] = Field(min_length=1, description="Folder of prepared backbones")
    base_url: Scoring[str | None] = Field(
        description="Address of a running vLLM server, e.g. http://127.0.0.1:8001/v1"
    )
    greedy_dtype: Scoring[Literal["bfloat16", "float32"] | None] = Field(
        None, description="Arithmetic of greedy decoding in 04; null = dtype"
    )
    vllm_dtype: Scoring[Literal["bfloat16", "float32", "float16"]] = Field(
        description="Arithmetic of the server that 05 starts"
    )
    vllm_concurrency: Scoring[int] = Field(ge=1, description="Requests in flight at a time")

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Parameters:
        if problems := list(self._contradictions()):
            raise ValueError("; ".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        values = self.model_dump()
        numbers = [name for name, value in values.items() if isinstance(value, int) and abs(value) >= 2**32]
        yield from (f"{name} is too large" for name in numbers)
        places = [(name, values[name]) for name in PLACES] + [("corpora", corpus) for corpus in self.corpora]
        for name, place in places:
            if place and (problem := find_path_problem(place)):
                yield f"{name}={place[:60]!r} can be no path ({problem})"
        if self.base_url and (secret := find_secret(self.base_url)):
            yield secret
        if self.corpus_weights and len(self.corpus_weights) != len(self.corpora):
            yield f"corpus_weights has {len(self.corpus_weights)} values and corpora has {len(self.corpora)}: one each"
        if len(self.split_shares) not in (0, 3):
            yield "split_shares has three values, for train, dev and test, or none"
        if self.max_new_tokens < self.max_target_tokens:
            sizes = f"{self.max_new_tokens} is below max_target_tokens={self.max_target_tokens}"
            yield f"max_new_tokens={sizes}: trained answers could not be decoded"
        if self.fast_metrics and self.head_loss_weight == 0:
            yield "fast_metrics=true with head_loss_weight=0 would score an untrained token head"
        if self.watch_metric == "token_head" and not self.fast_metrics:
            yield "watch_metric=token_head needs fast_metrics=true (there is no token head without)"
        if self.train_on == "train_dev" and self.keep_checkpoint == "best":
            yield "train_on=train_dev leaves no dev to choose a checkpoint by: set keep_checkpoint=last"
        if self.keep_checkpoint == "best" and self.save_steps % self.eval_steps:
            odd = f"save_steps={self.save_steps} is no multiple of eval_steps={self.eval_steps}"
            yield f"{odd}: the best checkpoint could not be kept"
        if self.deepspeed and not (PARAMETERS_DIR.parent / self.deepspeed).is_file():
            yield f"deepspeed={self.deepspeed}: no such file"
        if self.trainable == "all" and self.init_adapter:
            yield "trainable=all trains no adapter: set init_adapter=null"
        if self.trainable == "all" and self.deepspeed:
            yield "trainable=all does not go with deepspeed: set deepspeed=null"
        if self.backend == "unsloth":
            if self.deepspeed:
                yield "deepspeed needs backend=peft (Unsloth trains on one device)"
            if self.num_processes > 1:
                yield "num_processes > 1 needs backend=peft (Unsloth trains on one device)"
            if self.trainable == "all":
                yield "trainable=all needs backend=peft (Unsloth is here for its LoRA layers)"
            if "compiled" in self.step_launch:
                yield f"step_launch={self.step_launch} needs backend=peft (Unsloth compiles by itself)"
        if "graphed" in self.step_launch:
            if not (self.packing and self.num_processes == 1):
                yield f"step_launch={self.step_launch} needs packing=true and num_processes=1"
            if self.gradient_checkpointing:
                yield f"step_launch={self.step_launch} needs gradient_checkpointing=false"

    @property
    def run_name(self) -> str:
        """``run_id``, or a name derived from everything that changes what is trained."""
        if self.run_id:
            return self.run_id
        identity = {name: value for name, value in self.model_dump().items() if name not in NOT_IDENTITY}
        identity = {name: value for name, value in identity.items() if (name, value) not in YOUNGER.items()}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        data = Path(self.data_dir)
        data_name = data.parent.name if data.name == "ner" else data.name
        return f"{Path(self.backbone).name}-{data_name}-{self.offset_anchors}-{digest}"

    @property
    def prompt_format(self) -> PromptFormat:
        return PromptFormat(
            offset_anchors=self.offset_anchors,
            corpus_cue=self.corpus_cue,
            max_input_tokens=self.max_input_tokens,
        )

    @property
    def run_folder(self) -> Path:
        return Path(self.runs_dir) / self.run_name


def find_path_problem(path: str) -> str | None:
    """Why no file can have such a path: too long, a user's home that does not exist, a sign that none may have."""
    try:
        os.lstat(Path(path).expanduser())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError, RuntimeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def find_secret(base_url: str) -> str | None:
    """What is wrong with a server's address that holds a password, which files and errors would repeat."""
    if "@" not in base_url:
        return None
    return "base_url holds a user's name or password, which a run would store: put the key into VLLM_API_KEY"


def watch_metric_of(values: Mapping[str, Any]) -> str:
    """The watch metric of a stored run; one older than the parameter watched its token head, or decoded greedily."""
    return values.get("watch_metric") or ("token_head" if values.get("fast_metrics") else "greedy")


PARAMETER_NAMES = frozenset(Parameters.model_fields)
SCORING, _BESIDE = (
    frozenset(name for name, field in Parameters.model_fields.items() if mark in field.metadata)
    for mark in ("scoring", "beside")
)
NOT_IDENTITY = SCORING | _BESIDE
# How 02_data makes its files, down to where they lie: what a training was given of these says nothing of its data.
OF_THE_DATA = frozenset(list(Parameters.model_fields)[: list(Parameters.model_fields).index("data_dir")])


def check_parameters(values: Mapping[str, Any]) -> Parameters:
    """Check a complete set of values.

    Raises:
        ParameterError: names every unknown name (with the nearest valid one), wrong type and contradiction.
    """
    check_names(values)
    try:
        return Parameters.model_validate(dict(values))
    except ValidationError as error:
        raise ParameterError(_explain(error)) from None


def check_names(names: Iterable[str]) -> None:
    """Raise ParameterError if a name is no parameter, naming the nearest valid one."""
    unknown = [
        f"unknown parameter {name!r}." + nearest(OTHER_NAMES.get(name, name), PARAMETER_NAMES)
        for name in names
        if name not in PARAMETER_NAMES
    ]
    if unknown:
        raise ParameterError(" ".join(unknown) + " `python -m biomerge_lib parameters` lists all.")


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"][:1])
        message = item["msg"].removeprefix("Value error, ")
        hint = ""
        if isinstance(item["input"], str) and item["type"] in ("float_type", "int_type"):
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if "e" in item["input"].lower() else ""
        given = f"={item['input']!r}" if name and item["type"] != "missing" else ""
        lines.append(f"{name}{given}: {message}{hint}" if name else message)
    return "; ".join(lines)
