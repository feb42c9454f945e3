"""Knows the training loop: transformers' Trainer with the watch metric, greedy dev passes and steps cut into rows.

examples + model --[NerTrainer]--> checkpoints/, F1 and losses
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import write_json
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import build_prompts, collect_predictions
from biomerge_lib.model.backbones import BACKBONE_NOTE, backbone_sha256
from biomerge_lib.model.packing import PackedCollator, RowCollator, unpack_rows
from biomerge_lib.model.reach_ins import count_compiled_graphs, take_over_trainer, to_device
from biomerge_lib.prompts.ner_span import SpanCollator
from biomerge_lib.prompts.prompt import IGNORE
from biomerge_lib.scoring.ner_metrics import score_forced_answers, score_predictions, score_word_labels
from biomerge_lib.training.batches import rows_of
from biomerge_lib.training.finite_loss import FiniteLoss
from biomerge_lib.training.graphed_pass import GraphedPass
from biomerge_lib.training.trainer_callbacks import (
    EpochEndEvaluation,
    LiveView,
    Seal,
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


class OneGpuArguments(TrainingArguments):
    """Arguments of a process that trains on one GPU, however many it sees: no DataParallel."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class NerTrainer(Trainer):
    """A Trainer whose evaluations score spans in one forward pass: teacher-forced answers and the token head.

    With ``watch_metric=greedy`` each evaluation also decodes greedily. Without records of dev nothing is evaluated.
    """

    args: OneGpuArguments
    model: CausalLM | PeftModel
    processing_class: PreTrainedTokenizerFast

    def __init__(
        self,
        *,
        records: dict[str, list[Record]],
        parameters: Parameters,
        probe: dict[str, float],
        launch: str,
        train_collator: SpanCollator | PackedCollator | RowCollator,
        row_tokens: int | None,
        args: OneGpuArguments,
        **kwargs: Any,
    ):
        checkpoints = Path(cast(str, args.output_dir))
        self.stop, self.speed = StopOnRequest(), SteadySpeed(self.count_work)
        watched = "dev" in records
        greedy_pass = self.evaluate_greedily if watched and parameters.watch_metric != "greedy" else None
        patience = parameters.early_stopping_patience, parameters.early_stopping_threshold
        callbacks = [
            *([EarlyStoppingCallback(*patience)] if args.load_best_model_at_end else []),
            self.stop,
            TrackingCallback(parameters, checkpoints.parent, self.stop, lambda: int(self.tokens_seen)),
            self.speed,
            LiveView(),
            # After those that tell of its numbers.
            EpochEndEvaluation(self.stop, greedy_pass, watched=watched),
            Seal(),
        ]
        super().__init__(args=args, callbacks=callbacks, **kwargs)
        self.remove_callback(PrinterCallback)
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        self.train_collator = train_collator
        self.compute_metrics = self.score_evaluation
        self.separator_ids = {id for token, id in self.processing_class.get_vocab().items() if ";" in token}
        self.records = records
        self.parameters = parameters
        self.probe, self.launch, self.row_tokens = probe, launch, row_tokens
        self.backbone_sha256 = backbone_sha256(cast(str, self.model.config.name_or_path))
        # The model divides its loss by num_items_in_batch, the target tokens of the whole optimiser step.
        self.model_accepts_loss_kwargs = True
        self._words_in_step: torch.Tensor | None = None
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        take_over_trainer(self, trained=self._trained, make_sampler=self._order_examples)
        self._graphed: GraphedPass | None = None
        self.model.train()  # a PEFT model says that it is in training, whatever its backbone's modules are in
        self.finite = FiniteLoss(checkpoints, args.learning_rate)
        self.tokens_seen: torch.Tensor | int = 0
        self.examples_seen = 0
        self.greedy_at: dict[str, dict[str, Any]] = {}  # scores by checkpoint
        self._prompts_of = functools.cache(  # the same at each epoch's end
            lambda split: build_prompts(records[split], self.processing_class, parameters.prompt_format)
        )

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
        parts = args.world_size if self.parameters.packing and args.gradient_accumulation_steps == 1 else 1
        return StepSampler(lengths, step_size=step_size, seed=args.seed, group_lengths=grouped, parts=parts)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or cast(str, self.args.output_dir))
            write_json(folder / BACKBONE_NOTE, {"sha256": self.backbone_sha256})

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if not self.model.training:  # after an evaluation
            model.train()
        if self._graphed is None and "graphed" in self.launch:
            self._graphed = GraphedPass(functools.partial(self._run_pass, model), self._trained)
        run = self._graphed or functools.partial(self._run_pass, model)
        rows, loss = rows_of(inputs), torch.zeros((), device=self.args.device)
        for number, row in enumerate(rows, start=1):
            batch = to_device(self, {**row, "num_words_in_batch": self._words_in_step})
            batch["num_items_in_batch"] = num_items_in_batch
            # Several processes add their gradients up once, with the last row's.
            with self.accelerator.no_sync(model) if number < len(rows) else nullcontext():
                of_row = run(batch)
            self.finite.watch(of_row, batch, self.state.global_step)
            loss += of_row
        return loss

    def _run_pass(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        inputs = dict(batch)
        items = inputs.pop("num_items_in_batch")
        with self.compute_loss_context_manager():
            loss = cast(torch.Tensor, self.compute_loss(model, inputs, num_items_in_batch=items))
        # The loss is divided by the whole step's counts already.
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    def count_work(self) -> tuple[torch.Tensor | int, int]:
        """Tokens so far in all processes, and how many graphs PyTorch has compiled and this Trainer captured."""
        captures = self._graphed.count_captures() if self._graphed else 0
        return self.tokens_seen * self.args.world_size, count_compiled_graphs() + captures

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # walks over all modules at every step, for a number that nobody reads

    def prediction_step(
        self, model: torch.nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """The loss; what is predicted; what is right: answers' token ids and, with a head, words' labels.

        A row is a sentence, filled with IGNORE: answers (sentences, longest answer), labels (sentences, T).
        """
        inputs = to_device(self, inputs)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = model(**inputs)
        labels, words = inputs["labels"], []
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
        forced = score_forced_answers(pairs[0], eos_id=eos, separator_ids=self.separator_ids)
        answer = {"ner_f1": forced.f1, "ner_precision": forced.precision, "ner_recall": forced.recall}
        found = {"answer": answer}
        if self.parameters.fast_metrics:
            found["head"] = score_word_labels(*zip(*pairs[1], strict=True))
        scores = {f"{name}_{metric}": value for name in found for metric, value in found[name].items()}
        if self.parameters.watch_metric == "greedy":
            return scores | self.score_greedily("dev")
        return scores | found["head" if self.parameters.watch_metric == "token_head" else "answer"]

    def _whole_model(self) -> AbstractContextManager[CausalLM]:
        """The model without its wrappers, under ZeRO-3 with all weights: gathered once, not anew for every token."""
        if not is_deepspeed_zero3_enabled():
            return nullcontext(self.accelerator.unwrap_model(self.model))
        from trl.models.utils import unwrap_model_for_generation

        return unwrap_model_for_generation(self.model_wrapped, self.accelerator)

    def score_greedily(self, split: str) -> dict[str, Any]:
        """Decode a split's records with the model as it stands, and score exact spans."""
        started = time.monotonic()
        prompts = self._prompts_of(split)
        rank, processes = self.args.process_index, self.args.world_size
        # As many for each process, so that none waits long for the others.
        dealt = list(itertools.islice(itertools.cycle(prompts), -(-len(prompts) // processes) * processes))
        with self._whole_model() as model:
            answers = greedy_decode(
                model,
                self.processing_class,
                dealt[rank::processes],
                max_new_tokens=self.parameters.max_new_tokens,
                batch_size=self.args.per_device_eval_batch_size,
                progress=None,
            )
        if processes > 1:
            shares = gather_object([answers])
            answers = [shares[index % processes][index // processes] for index in range(len(prompts))]
        scores = score_predictions(collect_predictions(self.records[split], prompts, answers))
        return scores | {"seconds": round(time.monotonic() - started, 2)}

    def evaluate_greedily(self, checkpoint: str | None = None) -> dict[str, Any]:
        """Score dev's greedy answers and log the scores as ``greedy_dev_...``, unless they were the last ones logged.

        ``checkpoint`` says whose weights are loaded, if not this step's: dev is not decoded twice with the same ones.
        """
        name, last = (
            checkpoint or f"checkpoint-{self.state.global_step}",
            next(reversed(self.greedy_at), None),
        )
        if name not in self.greedy_at:
            scores = self.score_greedily("dev")
            self.greedy_at[name] = {f"greedy_dev_{metric}": value for metric, value in scores.items()}
        if name != last:
            self.log(
                {name: value for name, value in self.greedy_at[name].items() if isinstance(value, float)}
            )
        return self.greedy_at[name]


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
        asked = f"step_launch={parameters.step_launch}"
        raise ModelError(f"{asked} needs a GPU, and PyTorch sees none here. Set step_launch=auto.")
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
