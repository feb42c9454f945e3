"""Knows the training loop: transformers' Trainer with the watch metric, greedy dev passes and resume.

examples + model --[NerTrainer]--> checkpoints/, log_history.json, training.json --> best checkpoint
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from biomerge_lib.core.errors import DataError, ModelError
from biomerge_lib.core.files import write_json, write_text
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import build_prompts, collect_predictions
from biomerge_lib.experiment.checkpoints import find_resumable_checkpoint
from biomerge_lib.experiment.jobs import RunInterrupted
from biomerge_lib.model.backbones import BACKBONE_NOTE, backbone_sha256, refuse_other_backbone
from biomerge_lib.model.packing import PackedCollator, RowCollator, free_gpu_bytes, plan_rows, unpack_rows
from biomerge_lib.model.reach_ins import (
    count_compiled_graphs,
    count_recomputing,
    recompute_none,
    take_over_trainer,
    to_device,
)
from biomerge_lib.model.unsloth_lora_ner import load_full_model, load_lora_model, refuse_narrow_card
from biomerge_lib.prompts.ner_span import SpanCollator, build_dataset
from biomerge_lib.prompts.prompt import IGNORE
from biomerge_lib.scoring.ner_metrics import score_forced_answers, score_predictions, score_word_labels
from biomerge_lib.training.graphed_pass import GraphedPass, compile_layers
from biomerge_lib.training.trainer_callbacks import (
    FiniteLoss,
    ProgressBar,
    SteadySpeed,
    StopOnRequest,
    TrackingCallback,
)
from biomerge_lib.training.training_order import StepSampler

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import EvalPrediction, PreTrainedTokenizerFast

    from biomerge_lib.model.backbones import CausalLM

    Batch = dict[str, Any]  # of tensors, and what the Trainer adds

WATCH_METRIC = "eval_ner_f1"  # of the reading that watch_metric names
READINGS = ("eval_answer_ner_f1", "eval_head_ner_f1")  # both of one forward pass
log = logging.getLogger("biomerge")


@dataclass
class NerTrainingArguments(TrainingArguments):
    """TrainingArguments with the brief's switch from evaluations of one forward pass to greedy ones."""

    predict_with_generate: bool = False
    generation_max_new_tokens: int = 64

    @property
    def n_gpu(self) -> int:
        # A process trains on one GPU, however many it sees; the Trainer would spread it over them with DataParallel.
        return min(1, super().n_gpu)


class NerTrainer(Trainer):
    """A Trainer whose evaluations score spans in one forward pass: teacher-forced answers and the token head.

    With ``predict_with_generate`` each evaluation also decodes greedily.
    """

    args: NerTrainingArguments
    model: CausalLM | PeftModel
    processing_class: PreTrainedTokenizerFast
    stop: StopOnRequest  # given by build_trainer, as are these
    speed: SteadySpeed
    row_tokens: int | None

    def __init__(
        self,
        *,
        records: dict[str, list[Record]],
        parameters: Parameters,
        launch: str = "eager",
        train_collator: SpanCollator | PackedCollator | RowCollator,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.train_collator = train_collator
        self.compute_metrics = self.score_evaluation
        self.separator_ids = {id for token, id in self.processing_class.get_vocab().items() if ";" in token}
        self.records = records
        self.parameters = parameters
        self.launch = launch
        self.backbone_sha256 = backbone_sha256(cast(str, self.model.config.name_or_path))
        # The model divides its loss by num_items_in_batch, the target tokens of the whole optimiser step.
        self.model_accepts_loss_kwargs = True
        self._words_in_step: torch.Tensor | None = None
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        take_over_trainer(self, trained=self._trained, make_sampler=self._order_examples)
        self._graphed: GraphedPass | None = None
        self.model.train()  # a PEFT model says that it is in training, whatever its backbone's modules are in
        self.finite = FiniteLoss(Path(cast(str, self.args.output_dir)), self.args.learning_rate)
        self.tokens_seen: torch.Tensor | int = 0
        self.examples_seen = 0
        self.last_greedy: tuple[int, dict[str, Any]] = (-1, {})

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        batches = list(itertools.islice(epoch_iterator, num_batches))
        rows = [row for batch in batches for row in rows_of(batch)]
        # Target tokens and labelled words, by which the model divides its losses. They stay on the device, as does
        # tokens_seen: reading them would wait.
        counts = torch.stack(
            [
                torch.stack([(row[name] != IGNORE).sum() for row in rows]).sum()
                for name in ("labels", "token_labels")
            ]
        ).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        items, self._words_in_step = counts.clamp(min=1).unbind()
        for row in rows:
            lengths = row.pop("lengths")
            self.tokens_seen = self.tokens_seen + lengths.sum()
            self.examples_seen += len(lengths)
        return batches, items

    def get_train_dataloader(self) -> DataLoader:
        in_evaluation, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = in_evaluation

    def _order_examples(self) -> StepSampler:
        args, lengths = self.args, cast("Dataset", self.train_dataset)["length"][:]
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        grouped = self.parameters.group_by_length
        if grouped is None:
            grouped = not self.parameters.packing
        return StepSampler(lengths, step_size=step_size, seed=args.seed, group_lengths=grouped)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or cast(str, self.args.output_dir))
            write_json(folder / BACKBONE_NOTE, {"sha256": self.backbone_sha256})

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if not self.model.training:  # after an evaluation
            model.train()
        rows, loss = rows_of(inputs), torch.zeros((), device=self.args.device)
        for number, row in enumerate(rows, start=1):
            batch = to_device(self, {**row, "num_words_in_batch": self._words_in_step})
            batch["num_items_in_batch"] = num_items_in_batch
            # Several processes add their gradients up once, with the last row's.
            alone = self.accelerator.no_sync(model) if number < len(rows) else nullcontext()
            with alone:
                of_row = (
                    self._graphed_pass(model)(batch)
                    if "graphed" in self.launch
                    else self._run_pass(model, batch)
                )
            self.finite.watch(of_row, batch, self.state.global_step)
            loss += of_row
        return loss

    def _graphed_pass(self, model: torch.nn.Module) -> GraphedPass:
        if self._graphed is None:
            self._graphed = GraphedPass(functools.partial(self._run_pass, model), self._trained)
        return self._graphed

    def _run_pass(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        inputs = dict(batch)
        items = inputs.pop("num_items_in_batch")
        with self.compute_loss_context_manager():
            loss = cast(torch.Tensor, self.compute_loss(model, inputs, num_items_in_batch=items))
        # The loss is divided by the whole step's counts already.
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    def count_compilations(self) -> int:
        """How many graphs PyTorch has compiled so far, and this Trainer captured."""
        captures = self._graphed.count_captures() if self._graphed else 0
        return count_compiled_graphs() + captures

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # walks over all modules at every step, for a number that nobody reads

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """The loss; what is predicted; what is right: answers' token ids and, with a head, words' labels.

        A row is a sentence, filled with IGNORE: answers (sentences, longest answer), labels (sentences, T).
        """
        inputs = to_device(self, inputs)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = model(**inputs)
        if prediction_loss_only:
            return output["loss"], None, None
        labels = inputs["labels"]
        words = []
        if "token_logits" in output:
            words = [output["token_logits"].argmax(-1), inputs["token_labels"]]
        if "cu_seq_lens" in inputs:
            labels, *words = (unpack_rows(row, inputs["lengths"]) for row in (labels, *words))
        is_answer = labels != IGNORE
        lengths = is_answer.sum(1)
        answers = [unpack_rows(ids[None], lengths) for ids in (output["answer_ids"], labels[is_answer])]
        predicted, gold = zip(*([answers, words] if words else [answers]), strict=True)
        return output["loss"], predicted, gold

    def score_evaluation(self, prediction: EvalPrediction) -> dict[str, float]:
        """``answer_ner_f1``, with a token head ``head_ner_f1`` (seqeval's), and ``ner_f1`` of the watch metric."""
        pairs = [
            [
                (row[row != IGNORE].tolist(), said[row != IGNORE].tolist())
                for row, said in zip(*both, strict=True)
            ]
            for both in zip(prediction.label_ids, prediction.predictions, strict=True)
        ]
        eos = cast(int, self.processing_class.eos_token_id)
        answers = score_forced_answers(pairs[0], eos_id=eos, separator_ids=self.separator_ids)
        found = {
            "answer": {"ner_f1": answers.f1, "ner_precision": answers.precision, "ner_recall": answers.recall}
        }
        if self.parameters.fast_metrics:
            found["head"] = score_word_labels(*zip(*pairs[1], strict=True))
        scores = {f"{name}_{metric}": value for name in found for metric, value in found[name].items()}
        if self.args.predict_with_generate:
            return scores | self.score_greedily("dev")
        return scores | found["head" if self.parameters.watch_metric == "token_head" else "answer"]

    @contextmanager
    def _whole_model(self) -> Iterator[CausalLM]:
        """The model without its wrappers, under ZeRO-3 with all weights: gathered once, not anew for every token."""
        if not is_deepspeed_zero3_enabled():
            yield self.accelerator.unwrap_model(self.model)
            return
        from trl.models.utils import unwrap_model_for_generation

        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            yield model

    def score_greedily(self, split: str) -> dict[str, Any]:
        """Decode a split's records with the model as it stands, and score exact spans."""
        started = time.time()
        tokenizer = self.processing_class
        prompts = build_prompts(self.records[split], tokenizer, self.parameters.prompt_format)
        rank, processes = self.args.process_index, self.args.world_size
        # As many for each process, so that none waits long for the others.
        dealt = list(itertools.islice(itertools.cycle(prompts), -(-len(prompts) // processes) * processes))
        with self._whole_model() as model:
            answers = greedy_decode(
                model,
                tokenizer,
                dealt[rank::processes],
                max_new_tokens=self.args.generation_max_new_tokens,
                batch_size=self.args.per_device_eval_batch_size,
                progress=f"greedy {split}" if rank == 0 else None,
            )
        if processes > 1:
            shares = gather_object([answers])
            answers = [shares[index % processes][index // processes] for index in range(len(prompts))]
        scores = score_predictions(collect_predictions(self.records[split], prompts, answers))
        return scores | {"seconds": round(time.time() - started, 2)}


def rows_of(batch: Batch) -> list[Batch]:
    """The rows of a training batch, each a pass of its own: those of a ``RowCollator``, or the batch itself."""
    return batch.get("rows", [batch])


class EpochEndEvaluation(TrainerCallback):
    """At each epoch's end: the watch metric, a checkpoint, and a greedy pass over dev."""

    trainer: NerTrainer  # given by build_trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log |= state.global_step >= state.max_steps  # the curve's last point
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.trainer.stop.stopped_at is not None:
            return control  # in the middle of an epoch
        evaluated = any(
            entry["step"] == state.global_step and WATCH_METRIC in entry for entry in state.log_history
        )
        control.should_evaluate = not evaluated
        control.should_save = not evaluated
        if not self.trainer.args.predict_with_generate:
            evaluate_greedily(self.trainer, "greedy_dev")
            keep_log(Path(cast(str, args.output_dir)) / f"checkpoint-{state.global_step}", state)
        return control


def keep_log(checkpoint: Path, state: TrainerState) -> None:
    """Write the log as it stands now into a checkpoint that was saved before its epoch's greedy pass, atomically."""
    saved = checkpoint / "trainer_state.json"
    if state.is_world_process_zero and saved.is_file():
        history = json.loads(saved.read_text(encoding="utf-8")) | {"log_history": state.log_history}
        write_text(saved, json.dumps(history, indent=2) + "\n")


def evaluate_greedily(trainer: NerTrainer, prefix: str) -> dict[str, Any]:
    """Score dev's greedy answers and log the scores under names that begin with ``prefix``."""
    metrics = {f"{prefix}_{name}": value for name, value in trainer.score_greedily("dev").items()}
    trainer.log({name: value for name, value in metrics.items() if isinstance(value, float)})
    trainer.last_greedy = (trainer.state.global_step, metrics)
    return metrics


def build_model(parameters: Parameters, backbone_folder: Path | str) -> PeftModel | CausalLM:
    """The prepared backbone with a fresh token head, to be trained whole or through a fresh adapter.

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
    return load_lora_model(
        backbone_folder,
        backend=parameters.backend,
        dtype=parameters.dtype,
        lora_rank=parameters.lora_rank,
        lora_alpha=parameters.lora_alpha,
        lora_dropout=parameters.lora_dropout,
        **common,
    )


def choose_launch(parameters: Parameters, *, weights: int, steps: float) -> str:
    """How steps reach the GPU: ``step_launch``, or for ``auto`` what suits the model.

    A small model computes a step faster than its thousands of kernels can be launched one by one: graphs, of compiled
    layers where these save more than their compilation takes. A large one is held up by memory traffic between its
    matrix products: compiled layers, which pay after some hundred steps.

    Raises:
        ModelError: ``graphed`` without a GPU.
    """
    on_gpu = torch.cuda.is_available()
    if "graphed" in parameters.step_launch and not on_gpu:
        raise ModelError(
            f"step_launch={parameters.step_launch} needs a GPU, and PyTorch sees none here. Set step_launch=auto."
        )
    if parameters.step_launch != "auto":
        return parameters.step_launch
    if not on_gpu or parameters.deepspeed:
        return "eager"
    compiles = parameters.backend == "peft" and parameters.trainable == "lora"  # Unsloth does so by itself
    alone = parameters.num_processes == 1
    if alone and weights < 2e9 and parameters.packing and not parameters.gradient_checkpointing:
        # 45 s of compilation, 25 to 60 ms less a step (reports/training_speed.md)
        return "compiled_graphed" if steps >= 1000 and compiles else "graphed"
    return "compiled" if steps >= 400 and parameters.backend == "peft" else "eager"


def build_collator(
    parameters: Parameters, pad_token_id: int, launch: str, lengths: Sequence[int]
) -> SpanCollator | PackedCollator:
    """How examples become a batch: packed into a row, or padded; ``lengths`` are the examples' tokens.

    A graphed row is filled up to an eighth of a mean one, in steps of 256 tokens, and a graphed batch of targets to a
    quarter: rows would else hardly ever have the size of an earlier one, and each size costs two passes without a
    graph, a capture and its memory.
    """
    if not parameters.packing:
        return SpanCollator(pad_token_id)
    batch, multiples = parameters.per_device_train_batch_size, (1, 1)
    if folds(parameters):
        batch *= parameters.gradient_accumulation_steps
    if "graphed" in launch:
        multiple = 256 * max(1, round(batch * sum(lengths) / len(lengths) / 8 / 256))
        multiples = (multiple, 2 * multiple)
    elif launch == "compiled" or parameters.backend == "unsloth":
        multiples = (64, 64)
    return PackedCollator(
        pad_token_id,
        *multiples,
        sentences=batch if "graphed" in launch else None,
        filler_length=min(256, max(lengths)),
    )


def folds(parameters: Parameters) -> bool:
    """Whether the parts of an optimiser step stand side by side in rows, as one part.

    DeepSpeed counts the parts itself.
    """
    return parameters.packing and not parameters.deepspeed


def choose_rows(
    parameters: Parameters, model: PeftModel | CausalLM, launch: str, lengths: Sequence[int]
) -> tuple[int, int]:
    """The most tokens of a row, and how many layers recompute their activations.

    ``row_tokens`` with ``gradient_checkpointing`` as they are; for ``auto`` as many tokens as fit the GPU's free
    memory, and no more recomputation than it demands. Without a GPU, where long rows gain nothing, 2048.

    Raises:
        ModelError: ``auto``, and the longest sentence does not fit.
    """
    layers = model.config.num_hidden_layers
    recomputing = layers if parameters.gradient_checkpointing else 0
    if parameters.row_tokens != "auto":
        return parameters.row_tokens, recomputing
    if not torch.cuda.is_available():
        return 2048, recomputing
    sentences = parameters.per_device_train_batch_size * parameters.gradient_accumulation_steps
    longest = max(lengths)
    # Four standard deviations over a mean step: of ten thousand hardly one needs a second row.
    step_tokens = sentences * float(np.mean(lengths)) + 4 * float(np.std(lengths)) * sentences**0.5
    row_tokens, kept = plan_rows(
        model.config,
        # Gradients and AdamW's two moments come yet.
        free_bytes=free_gpu_bytes() - 12 * model.num_parameters(only_trainable=True),
        width=2 if parameters.dtype == "bfloat16" else 4,
        compiled="compiled" in launch or parameters.backend == "unsloth",
        gradient_checkpointing=parameters.gradient_checkpointing,
        step_tokens=max(longest, int(step_tokens)),
    )
    if row_tokens < longest:
        raise ModelError(
            f"the GPU's free memory holds a row of about {row_tokens} tokens, and the longest sentence has {longest}. "
            + ("" if parameters.gradient_checkpointing else "Set gradient_checkpointing=true, or ")
            + "lower max_input_tokens, or use a larger card. (row_tokens=N tries it all the same.)"
        )
    return row_tokens, layers - kept


def build_trainer(
    model: PeftModel | CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: dict[str, list[Record]],
    parameters: Parameters,
    *,
    checkpoints: Path | str,
) -> NerTrainer:
    """Wire model, data and parameters into a Trainer.

    Args:
        records: the splits ``train`` and ``dev`` (and ``test`` when ``run_test_eval``).
        checkpoints: folder of ``checkpoint-<step>`` folders.

    Raises:
        DataError: dev has no records or no entity (no metric could be computed).
    """
    if not any(record.spans for record in records["dev"]):
        raise DataError(
            "the dev records hold no entity: there is nothing to measure. Check dev.jsonl or eval_limit."
        )
    datasets = {
        split: build_dataset(
            records[split],
            tokenizer,
            parameters.prompt_format,
            max_target_tokens=parameters.max_target_tokens,
            cache_dir=parameters.cache_dir,
        )
        for split in ("train", "dev")
    }
    step_size = parameters.per_device_train_batch_size * parameters.gradient_accumulation_steps
    steps = len(datasets["train"]) / (step_size * parameters.num_processes) * parameters.num_train_epochs
    launch = choose_launch(parameters, weights=model.num_parameters(), steps=steps)
    if "compiled" in launch:
        compile_layers(model.get_decoder())
    lengths = datasets["train"]["length"][:]
    collator = build_collator(parameters, tokenizer.pad_token_id, launch, lengths)
    train_collator: SpanCollator | PackedCollator | RowCollator = collator
    row_tokens = None
    if isinstance(collator, PackedCollator) and folds(parameters):
        row_tokens, recomputing = choose_rows(parameters, model, launch, lengths)
        train_collator = RowCollator(collator, row_tokens)
        # The last ones keep theirs: these are freed before the first recomputation.
        recompute_none(model.get_decoder().layers[recomputing:])
    epoch_end, stop, speed = EpochEndEvaluation(), StopOnRequest(), SteadySpeed()
    tracking = TrackingCallback(parameters, Path(checkpoints).parent, stop)
    trainer = NerTrainer(
        records=records,
        parameters=parameters,
        launch=launch,
        model=model,
        args=training_arguments(parameters, checkpoints),
        train_dataset=datasets["train"],
        eval_dataset=datasets["dev"],
        data_collator=collator,
        train_collator=train_collator,
        processing_class=tokenizer,
        callbacks=[
            EarlyStoppingCallback(parameters.early_stopping_patience, parameters.early_stopping_threshold),
            epoch_end,
            stop,
            tracking,
            speed,
            ProgressBar(),
        ],
    )
    trainer.speed, trainer.row_tokens = speed, row_tokens
    speed.count = lambda: (trainer.tokens_seen * trainer.args.world_size, trainer.count_compilations())
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    epoch_end.trainer = trainer
    trainer.stop = stop
    tracking.count_tokens = lambda: int(trainer.tokens_seen)
    return trainer


def training_arguments(parameters: Parameters, checkpoints: Path | str) -> NerTrainingArguments:
    """The Trainer's arguments for a set of parameters."""
    on_cpu = not torch.cuda.is_available()
    batch, parts = parameters.per_device_train_batch_size, parameters.gradient_accumulation_steps
    if folds(parameters):
        batch, parts = batch * parts, 1
    return NerTrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=parameters.per_device_eval_batch_size,
        gradient_accumulation_steps=parts,
        num_train_epochs=parameters.num_train_epochs,
        learning_rate=parameters.learning_rate,
        lr_scheduler_type=parameters.lr_scheduler_type,
        warmup_steps=parameters.warmup_ratio,
        bf16=parameters.dtype == "bfloat16",
        gradient_checkpointing=False,  # the model has it already, or not
        logging_steps=parameters.logging_steps,
        eval_strategy="steps",
        eval_steps=parameters.eval_steps,
        save_strategy="steps",
        save_steps=parameters.save_steps,
        save_total_limit=parameters.save_total_limit,
        load_best_model_at_end=True,
        metric_for_best_model=WATCH_METRIC,
        greater_is_better=True,
        dataloader_num_workers=parameters.num_workers,
        dataloader_pin_memory=parameters.pin_memory and not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        deepspeed=parameters.deepspeed,
        logging_nan_inf_filter=False,  # FiniteLoss, which does not wait for the GPU
        report_to=[],  # TrackingCallback
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
        seed=parameters.seed,
        use_cpu=on_cpu,
        predict_with_generate=parameters.watch_metric == "greedy",
        generation_max_new_tokens=parameters.max_new_tokens,
    )


def train(trainer: NerTrainer, run_folder: Path) -> dict[str, Any]:
    """Train (or go on from the newest checkpoint), reload the best checkpoint, score dev greedily, keep it all.

    Writes ``training.json`` (the returned metrics) and ``log_history.json`` to the run folder; when
    ``training.json`` exists the run is finished and its metrics are returned at once.
    """
    done = run_folder / "training.json"
    if done.is_file():
        print(f"{run_folder.name} is trained already; existing_run=replace trains it anew.")
        return json.loads(done.read_text(encoding="utf-8"))
    checkpoints = Path(cast(str, trainer.args.output_dir))
    last = find_resumable_checkpoint(checkpoints)
    if last:
        refuse_other_backbone(last, cast(str, trainer.model.config.name_or_path))
        print(f"going on from {last}")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.time()
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.finite.finish()
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
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _disk_is_full(error):
            raise
        raise ModelError(
            f"{checkpoints}: no space for a checkpoint at step {trainer.state.global_step} ({error}). Free some, or "
            "lower save_total_limit; the same command then goes on from the newest whole checkpoint."
        ) from error
    if trainer.stop.stopped_at is not None:
        raise RunInterrupted(f"stopped on request after {trainer.stop.stopped_at} steps, with a checkpoint")
    seconds = time.time() - started
    state = trainer.state
    stopped_early = state.global_step < state.max_steps
    if stopped_early:
        print(explain_early_stop(trainer.parameters, state))
    best = Path(
        trainer.state.best_model_checkpoint or cast(Path, find_resumable_checkpoint(checkpoints))
    ).name
    step, greedy = trainer.last_greedy
    if f"checkpoint-{step}" != best or "greedy_dev_ner_f1" not in greedy:
        greedy = evaluate_greedily(trainer, "greedy_dev")
    at_best = [entry for entry in state.log_history if f"checkpoint-{entry['step']}" == best]
    metrics: dict[str, Any] = {
        "watch_metric": trainer.parameters.watch_metric,
        WATCH_METRIC: state.best_metric,
        **{name: entry[name] for entry in at_best for name in READINGS if name in entry},
        "train_loss": next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry),
        **greedy,
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds, 2),
        "train_tokens_per_second": round(int(trainer.tokens_seen) * trainer.args.world_size / seconds, 1),
        **trainer.speed.read(),
        "train_sentences_per_second": round(trainer.examples_seen * trainer.args.world_size / seconds, 2),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "best_checkpoint": best,
        "step_launch": trainer.launch,
        **({"row_tokens": trainer.row_tokens} if trainer.row_tokens else {}),
        "checkpointed_layers": count_recomputing(trainer.model.get_decoder().layers),
        "stopped_early": stopped_early,
    }
    if torch.cuda.is_available():
        metrics["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    if trainer.parameters.run_test_eval:
        metrics |= {f"test_{name}": value for name, value in trainer.score_greedily("test").items()}
    if trainer.is_world_process_zero():
        write_json(run_folder / "log_history.json", trainer.state.log_history)
        write_json(done, metrics)
    return metrics


def explain_early_stop(parameters: Parameters, state: TrainerState) -> str:
    """Say why a training ended before its last step, and what it keeps."""
    return (
        f"stopped early at step {state.global_step} of {state.max_steps}: {parameters.early_stopping_patience} "
        f"evaluations without a gain of {parameters.early_stopping_threshold} over {WATCH_METRIC} "
        f"(watch_metric={parameters.watch_metric}) {state.best_metric:.3f} "
        f"({Path(state.best_model_checkpoint or '').name}). A higher early_stopping_patience waits longer."
    )


def _disk_is_full(error: Exception) -> bool:
    """safetensors and PyTorch's archive writer wrap the system's error number into text."""
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text.lower()
    return full or "PytorchStreamWriter failed" in text


def explain_gap(metrics: dict[str, Any]) -> str:
    """Say whether the watched and the greedy F1 agree within 0.01, and if not, what the greedy answers show."""
    fast, greedy = metrics[WATCH_METRIC], metrics["greedy_dev_ner_f1"]
    watched = metrics.get("watch_metric", "token_head")  # a run older than the parameter
    if fast == greedy == 0:
        return "neither reading finds a mention yet: train longer (num_train_epochs, subsample) or raise learning_rate."
    if abs(fast - greedy) <= 0.01:
        return f"{watched} {fast:.3f} and greedy {greedy:.3f} agree within 0.01."
    faults = {
        "answers that are not spans (format)": metrics["greedy_dev_unreadable_rate"],
        "answers cut at max_new_tokens (no EOS)": metrics["greedy_dev_truncated_rate"],
        "offsets outside the text": metrics["greedy_dev_out_of_text_rate"],
        "offsets out of order": metrics["greedy_dev_unsorted_rate"],
    }
    seen = [f"{name}: {rate:.1%} of sentences" for name, rate in faults.items() if rate > 0.005]
    snapped = metrics["greedy_dev_ner_f1_snapped"]
    if snapped - greedy > 0.01:
        seen.append(f"offsets inside the right words but not at their edges (snapped F1 {snapped:.3f})")
    kinds = {
        "answer": "the watch metric gives each token the gold before it, greedy decoding what it wrote itself",
        "token_head": "the head tags each word from its left context, the answer is written after the whole sentence",
        "greedy": "both decode greedily and should agree",
    }
    cause = (
        "; ".join(seen)
        or f"the answers are well-formed, so the two readings differ in kind: {kinds[watched]}"
    )
    return f"{watched} {fast:.3f} and greedy {greedy:.3f} differ by {abs(fast - greedy):.3f}: {cause}."
