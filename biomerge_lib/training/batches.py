"""Knows how examples become the batches of an optimiser step: padded, or packed into rows that fit the card.

parameters + examples' lengths --[build_collator, choose_rows]--> a collator and how long its rows may be
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.model.fused_lora import fused_layers
from biomerge_lib.model.packing import PackedCollator, free_gpu_bytes, plan_rows
from biomerge_lib.prompts.ner_span import SpanCollator

if TYPE_CHECKING:
    from peft import PeftModel

    from biomerge_lib.model.backbones import CausalLM

    Batch = dict[str, Any]  # of tensors, and what the Trainer adds


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
        fused=bool(fused_layers(model)),
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


def rows_of(batch: Batch) -> list[Batch]:
    """The rows of a training batch, each a pass of its own: those of a ``RowCollator``, or the batch itself."""
    return batch.get("rows", [batch])
