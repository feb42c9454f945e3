"""Knows the loss of a batch, padded or packed: what the causal LM and its token head are trained on.

    loss = cross-entropy(target tokens) + head_loss_weight * cross-entropy(B/I/O of each word)

The vocabulary projection runs where a label is (10 to 25 % of the tokens). In a packed batch nothing waits for the GPU:
where the labels are was counted by the collator.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from biomerge_lib.model.packing import ATTENTION, packed_row
from biomerge_lib.model.reach_ins import attention_of, read_trained_rows_in_place, set_attention
from biomerge_lib.prompts.prompt import B_I_O, IGNORE

if TYPE_CHECKING:
    from biomerge_lib.model.backbones import CausalLM


def install_span_loss(model: CausalLM, *, head_loss_weight: float, max_seq_len: int) -> None:
    """Give a causal LM (of a PEFT model) a forward with labels; without ``labels`` (decoding) its own runs, unchanged.

    ``max_seq_len``: tokens of the longest sentence that a packed row may hold. Only packed rows attend by
    :data:`ATTENTION`, all else by the model's own attention.
    """
    own_forward, model.own_attention = model.forward, attention_of(model)
    read_trained_rows_in_place(model)

    @functools.wraps(own_forward)
    def forward(self: CausalLM, *args: Any, labels: torch.Tensor | None = None, **batch: Any) -> Any:
        if labels is None:
            if attention_of(self) == ATTENTION:
                set_attention(self, self.own_attention)
            return own_forward(*args, **batch)
        # PEFT's forward adds arguments that are None.
        batch = {name: value for name, value in batch.items() if value is not None}
        return span_loss(
            self, labels=labels, head_loss_weight=head_loss_weight, max_seq_len=max_seq_len, **batch
        )

    model.forward = types.MethodType(forward, model)


def span_loss(
    model: CausalLM,
    *,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    head_loss_weight: float,
    max_seq_len: int,
    token_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    num_words_in_batch: torch.Tensor | int | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    target_positions: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,  # the Trainer's, which counts
    states: list[torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The losses of a padded batch, ``input_ids``, ``labels``, ``token_labels`` (B, T), or of a packed one (1, T).

    A packed batch has ``cu_seq_lens``, ``target_positions`` and ``targets`` of ``PackedCollator``.
    ``num_items_in_batch`` and ``num_words_in_batch`` count the target tokens and labelled words of the whole
    optimiser step, so that accumulation gives the mean over the step. In evaluation mode ``answer_ids`` (N,) are the
    most likely tokens where the targets stand, each given the targets before it. ``states`` is given the hidden states
    (B, T, H) and the targets' logits (N, V).
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
    # Not set back afterwards: the backward pass may compute layers anew.
    set_attention(model, model.own_attention if cu_seq_lens is None else ATTENTION)
    if cu_seq_lens is None:
        inputs["attention_mask"] = attention_mask
    else:
        inputs |= packed_row(cu_seq_lens, max_seq_len)
    hidden = model.model(**inputs, use_cache=False)[0]  # (B, T, H)
    if cu_seq_lens is not None:
        at_targets = hidden[0].index_select(0, cast(torch.Tensor, target_positions))
    else:
        shifted = labels[:, 1:]
        at_targets, targets = hidden[:, :-1][shifted != IGNORE], shifted[shifted != IGNORE]
    logits = model.lm_head(at_targets).float()  # (targets, V), of which a copy is 0.4 GB with Llama 3
    if (scale := _logit_scale(model.config)) != 1:
        logits = logits * scale
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = cap * (logits / cap).tanh()
    if states is not None:
        states += [hidden, logits]
    targets = cast(torch.Tensor, targets)
    summed = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    loss = _mean_loss(summed, num_items_in_batch, targets)
    output = {"loss": loss, "lm_loss": loss.detach()}
    if not model.training:
        output["answer_ids"] = logits.argmax(-1)
    if token_labels is not None and hasattr(model, "token_head"):
        head_dtype = next(model.token_head.parameters()).dtype  # DeepSpeed makes it narrower
        token_logits = model.token_head(hidden.to(head_dtype)).float()  # (B, T, 3)
        summed = F.cross_entropy(
            token_logits.reshape(-1, len(B_I_O)),
            token_labels.reshape(-1),
            ignore_index=IGNORE,
            reduction="sum",
        )
        head_loss = _mean_loss(summed, num_words_in_batch, token_labels)
        output |= {"loss": loss + head_loss_weight * head_loss, "head_loss": head_loss.detach()}
        output["token_logits"] = token_logits.detach()
    return output


def _logit_scale(config: Any) -> float:
    """What a model's own forward multiplies its logits by: Cohere's, Falcon-H1's and Granite's name for it, or 1."""
    own = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    return own or 1 / (getattr(config, "logits_scaling", None) or 1)


def _mean_loss(summed: torch.Tensor, count: torch.Tensor | int | None, labels: torch.Tensor) -> torch.Tensor:
    if count is None:
        count = (labels != IGNORE).sum().clamp(min=1)
    return summed / count
