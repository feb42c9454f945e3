"""Knows a training of one process from its parameters to its files.

parameters + records --[build_model, build_trainer]--> NerTrainer --[train]--> checkpoints/, training.json,
log_history.json
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from biomerge_lib.core.errors import DataError, DiskFull, ModelError
from biomerge_lib.core.files import names_full_disk, write_json
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.core.records import Record
from biomerge_lib.experiment.checkpoints import find_damage, find_resumable_checkpoint
from biomerge_lib.experiment.jobs import RunInterrupted
from biomerge_lib.experiment.provenance import log_test_scoring
from biomerge_lib.experiment.stages import TRAIN
from biomerge_lib.model import fused_lora
from biomerge_lib.model.adapters import read_init_adapter
from biomerge_lib.model.backbones import refuse_other_backbone
from biomerge_lib.model.packing import PackedCollator, RowCollator
from biomerge_lib.model.probe import SENTENCES, probe_training
from biomerge_lib.model.reach_ins import compile_once, recompute_none
from biomerge_lib.model.unsloth_lora_ner import load_full_model, load_lora_model, refuse_narrow_card
from biomerge_lib.prompts.ner_span import SpanCollator, build_dataset
from biomerge_lib.training.batches import build_collator, choose_rows, folds
from biomerge_lib.training.outcome import collect_metrics, explain_early_stop
from biomerge_lib.training.trainer import NerTrainer, OneGpuArguments, choose_launch
from biomerge_lib.training.trainer_callbacks import WATCH_METRIC

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

    from biomerge_lib.model.backbones import CausalLM

# The Trainer's arguments that are parameters of this project, too.
CALLED_THE_SAME = {
    *("num_train_epochs", "learning_rate", "lr_scheduler_type", "per_device_eval_batch_size", "seed"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "deepspeed"),
}


def build_model(parameters: Parameters, backbone_folder: Path | str) -> PeftModel | CausalLM:
    """The prepared backbone with a fresh token head, to be trained whole or through an adapter, fresh or begun.

    Raises:
        ModelError: the card, the backend or the backbone cannot do it.
    """
    refuse_narrow_card(parameters.dtype)
    common: dict[str, Any] = {
        "token_head": parameters.fast_metrics,
        "head_loss_weight": parameters.head_loss_weight,
        "gradient_checkpointing": parameters.gradient_checkpointing,
        "max_length": parameters.max_input_tokens + parameters.max_target_tokens,
        "seed": parameters.seed,
    }
    if parameters.trainable == "all":
        return load_full_model(backbone_folder, **common)
    init_adapter = read_init_adapter(parameters)
    own = {"backend", "dtype", "lora_rank", "lora_alpha", "lora_dropout"}
    model = load_lora_model(backbone_folder, **parameters.model_dump(include=own), **common)
    if init_adapter:
        init_adapter.load_into(model, backbone_folder)
        print(f"beginning with {init_adapter.folder} (sha256 {init_adapter.sha256[:12]})")
    # Unsloth compiles PEFT's layers as they are; DeepSpeed moves weights.
    alone = parameters.backend == "peft" and not parameters.deepspeed
    if alone and model.device.type in fused_lora.DEVICES:
        fused_lora.fuse_lora(model)
    return model


def build_trainer(
    model: PeftModel | CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: dict[str, list[Record]],
    parameters: Parameters,
    *,
    checkpoints: Path | str,
    examples: dict[str, Dataset] | None = None,
) -> NerTrainer:
    """Wire model, data and parameters into a Trainer.

    Args:
        records: the splits ``train`` and ``dev`` (and ``test`` when ``run_test_eval``); nothing is watched without dev.
        checkpoints: folder of ``checkpoint-<step>`` folders.
        examples: data sets in place of those that ``records`` would give.

    Raises:
        DataError: dev has no records or no entity (no metric could be computed).
        ModelError: the training would not compute what the model itself does.
    """
    watched = "dev" in records
    if watched and not any(record.spans for record in records["dev"]):
        raise DataError("the dev records hold no entity: nothing to measure. Check dev.jsonl or eval_limit.")
    datasets = examples or {
        split: build_dataset(
            records[split],
            tokenizer,
            parameters.prompt_format,
            max_target_tokens=parameters.max_target_tokens,
            cache_dir=parameters.cache_dir,
        )
        for split in ("train", "dev")
        if split in records
    }
    probed = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    probe = probe_training(model, probed, packing=parameters.packing, dtype=parameters.dtype)
    if probe["leak"] <= probe["tolerance"]:
        print("the probe shows nothing: with these weights a sentence hardly depends on what it reads.")
    step_size = parameters.per_device_train_batch_size * parameters.gradient_accumulation_steps
    steps = len(datasets["train"]) / (step_size * parameters.num_processes) * parameters.num_train_epochs
    launch = choose_launch(parameters, weights=model.num_parameters(), steps=steps)
    if "compiled" in launch:
        for layer in model.get_decoder().layers:
            compile_once(layer)
    lengths = datasets["train"]["length"][:]
    collator = build_collator(parameters, tokenizer.pad_token_id, launch, lengths)
    train_collator: SpanCollator | PackedCollator | RowCollator = collator
    row_tokens = None
    if isinstance(collator, PackedCollator) and folds(parameters):
        row_tokens, recomputing = choose_rows(parameters, model, launch, lengths)
        train_collator = RowCollator(collator, row_tokens)
        # The last ones keep theirs: these are freed before the first recomputation.
        recompute_none(model.get_decoder().layers[recomputing:])
    return NerTrainer(
        records=records,
        parameters=parameters,
        probe=probe,
        launch=launch,
        row_tokens=row_tokens,
        model=model,
        args=training_arguments(parameters, checkpoints, watched=watched),
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("dev"),
        data_collator=collator,
        train_collator=train_collator,
        processing_class=tokenizer,
    )


def training_arguments(
    parameters: Parameters, checkpoints: Path | str, *, watched: bool = True
) -> OneGpuArguments:
    """The Trainer's arguments for a set of parameters; ``watched``: there is a dev set to evaluate."""
    choosing = watched and parameters.keep_checkpoint == "best"
    on_cpu = not torch.cuda.is_available()
    batch, parts = parameters.per_device_train_batch_size, parameters.gradient_accumulation_steps
    if folds(parameters):
        batch, parts = batch * parts, 1
    return OneGpuArguments(
        output_dir=str(checkpoints),
        **parameters.model_dump(include=CALLED_THE_SAME),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=parts,
        warmup_steps=parameters.warmup_ratio,
        bf16=parameters.dtype == "bfloat16",
        gradient_checkpointing=False,  # the model has it already, or not
        eval_strategy="steps" if watched else "no",
        save_strategy="steps",
        load_best_model_at_end=choosing,
        metric_for_best_model=WATCH_METRIC if choosing else None,
        greater_is_better=True,
        dataloader_num_workers=parameters.num_workers,
        dataloader_pin_memory=parameters.pin_memory and not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are constants
        logging_nan_inf_filter=False,  # FiniteLoss, which does not wait for the GPU
        report_to=[],  # TrackingCallback
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
        use_cpu=on_cpu,
    )


def train(trainer: NerTrainer, run_folder: Path) -> dict[str, Any]:
    """Train (or go on from the newest checkpoint), reload the best checkpoint, score dev greedily, keep it all.

    With ``keep_checkpoint=last`` the model stays as the last step left it.

    Writes ``training.json`` (the returned metrics) and ``log_history.json`` to the run folder.

    Raises:
        ModelError: the checkpoint is of another backbone, GPU memory or disk is full, or the loss is no number.
        RunInterrupted: the job asked for an end; a checkpoint is there.
    """
    checkpoints = Path(cast(str, trainer.args.output_dir))
    last = find_resumable_checkpoint(checkpoints)
    if last:
        refuse_other_backbone(last, cast(str, trainer.model.config.name_or_path))
        print(f"going on from {last}")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    with _full_memory_or_disk_named(trainer):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.finite.finish()
    if trainer.stop.stopped_at is not None:
        raise RunInterrupted(f"stopped on request after {trainer.stop.stopped_at} steps, with a checkpoint")
    seconds = time.monotonic() - started
    if trainer.state.global_step < trainer.state.max_steps:
        print(explain_early_stop(trainer.parameters, trainer.state))
    best = trainer.state.best_model_checkpoint or cast(Path, find_resumable_checkpoint(checkpoints))
    metrics = collect_metrics(trainer, Path(best).name, seconds)
    if trainer.parameters.run_test_eval:
        if trainer.is_world_process_zero():
            log_test_scoring(run_folder, TRAIN, trainer.parameters.data_dir)
        metrics |= {f"test_{name}": value for name, value in trainer.score_greedily("test").items()}
    if trainer.is_world_process_zero():
        write_json(run_folder / "log_history.json", trainer.state.log_history)
        write_json(run_folder / "training.json", metrics)
    return metrics


@contextmanager
def _full_memory_or_disk_named(trainer: NerTrainer) -> Iterator[None]:
    """Raise ModelError, with what to lower, where the GPU's memory or the disk is full inside the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        batch, rows = trainer.parameters.per_device_train_batch_size, trainer.row_tokens
        smaller = (
            f"lower row_tokens (here {rows}; a number also has every layer recompute, with gradient_checkpointing=true)"
            if rows
            else f"lower per_device_train_batch_size ({batch}; raise gradient_accumulation_steps by as much)"
        )
        raise ModelError(
            f"out of GPU memory at step {trainer.state.global_step}: {smaller}, set gradient_checkpointing=true, or, "
            f"if it was an evaluation, lower per_device_eval_batch_size ({trainer.args.per_device_eval_batch_size}). "
            f"The run goes on from its newest checkpoint. ({error})"
        ) from error
    except (OSError, RuntimeError, SafetensorError, DiskFull) as error:
        if not names_full_disk(error):
            raise
        written = Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"
        if written.is_dir() and find_damage(written):
            shutil.rmtree(written, ignore_errors=True)
        raise ModelError(
            f"{trainer.args.output_dir}: no space for a checkpoint at step {trainer.state.global_step} ({error}). Free "
            "some, or lower save_total_limit; the same command then goes on from the newest whole checkpoint."
        ) from error
