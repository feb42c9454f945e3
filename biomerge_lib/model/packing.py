"""Knows packed rows: a batch's sentences side by side in one row, and the attention that keeps them apart.

examples --[RowCollator]--> rows (1, T) and their boundaries --[packed_row]--> attention within each sentence

Short sentences cost a GPU its launches, not its arithmetic; one long row has the launches of one sentence and no
padding.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from biomerge_lib.core.errors import ModelError
from biomerge_lib.prompts.prompt import IGNORE

ATTENTION = "biomerge_packed"  # within each sentence where ``packed_row`` describes one, else PyTorch's SDPA
# PyTorch before 2.12 groups the heads of key and value unasked.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


@dataclass(frozen=True)
class PackedCollator:
    """Puts a list of examples into one row of T tokens, with position ids that restart at each sentence.

    ``row_multiple``, ``target_multiple`` and ``sentences`` round the sizes up, so that few different shapes occur (CUDA
    graphs want few, matrix kernels like multiples): the row is filled with ``pad_token_id`` behind the last sentence,
    as sentences of at most ``filler_length`` tokens without labels; 1 and None add nothing.

    The batch: ``input_ids``, ``position_ids``, ``labels``, ``token_labels`` (1, T) int64; ``cu_seq_lens`` int32, each
    sentence's first token, and the ends of the last one and of the fillers; ``target_positions`` and ``targets`` (N,),
    where the next token is a label and which it is (IGNORE where added); ``lengths`` (sentences,), fillers left out.
    """

    pad_token_id: int
    row_multiple: int = 1
    target_multiple: int = 1
    sentences: int | None = None
    filler_length: int = 64  # at most the model's longest sentence, or attention leaves tokens undefined

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(example["input_ids"]) for example in examples]
        total = sum(lengths)
        filler = -total % self.row_multiple
        ends = [0, *itertools.accumulate(lengths)]
        ends += [total] * (max(self.sentences or 0, len(lengths)) - len(lengths))
        fillers = -(-(self.row_multiple - 1) // self.filler_length)
        ends += [total + min(filler, piece * self.filler_length) for piece in range(1, fillers + 1)]
        fills = {"input_ids": self.pad_token_id, "labels": IGNORE, "token_labels": IGNORE}
        row = {}
        for name, fill in fills.items():
            tokens = itertools.chain.from_iterable(example[name] for example in examples)
            row[name] = torch.tensor([*tokens, *[fill] * filler])
        targets = row["labels"][1:]  # a sentence's first token is no label, so none crosses a boundary
        positions = (targets != IGNORE).nonzero().squeeze(1)
        added = -len(positions) % self.target_multiple
        return {name: values[None] for name, values in row.items()} | {
            "position_ids": torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)])[None],
            "cu_seq_lens": torch.tensor(ends, dtype=torch.int32),
            "lengths": torch.tensor(lengths),
            "target_positions": torch.nn.functional.pad(positions, (0, added)),
            "targets": torch.nn.functional.pad(targets[positions], (0, added), value=IGNORE),
        }


@dataclass(frozen=True)
class RowCollator:
    """Puts an optimiser step's examples into as few rows as ``row_tokens`` allows, in their order: ``{"rows": [...]}``.

    An example that is longer than that has a row of its own.
    """

    pack: PackedCollator
    row_tokens: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, torch.Tensor]]]:
        rows: list[list[Mapping[str, Any]]] = [[]]
        tokens = 0
        for example in examples:
            tokens += len(example["input_ids"])
            if rows[-1] and tokens > self.row_tokens:
                rows.append([])
                tokens = len(example["input_ids"])
            rows[-1].append(example)
        return {"rows": [self.pack(row) for row in rows]}


# Hidden and inner values a token that a layer keeps for its backward pass at most, by whether it is compiled, and
# whether LoRA is fused. Measured: PEFT's with an 8B, 13.0 and 8.4 MB a token; fused in a layer of its proportions.
KEPT = {
    (False, False): (24, 8),
    (True, False): (16, 6),
    (False, True): (16, 6),
    (True, True): (11, 4),
}


def plan_rows(
    config: Any,
    *,
    free_bytes: float,
    width: int,
    compiled: bool,
    fused: bool,
    gradient_checkpointing: bool,
    step_tokens: int,
) -> tuple[int, int]:
    """How long rows may be in a GPU's free memory, and how many layers need not recompute their activations there.

    A careful estimate from the backbone's ``config``, made before the first step: a layer keeps :data:`KEPT` values a
    token, each ``width`` bytes wide; a checkpointed one its input alone. A quarter of the tokens are targets, whose
    logits are kept. A row is no longer than a step, ``step_tokens``; what is left goes to layers that keep all.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    hidden_values, inner_values = KEPT[compiled, fused]
    layer = (hidden_values * hidden + inner_values * config.intermediate_size) * width
    logits = 14 * config.vocab_size / 4  # bytes: bfloat16, and float32 three times
    free_bytes *= 0.9
    if not gradient_checkpointing:
        return min(step_tokens, int(free_bytes / (layers * layer + logits))), layers
    least = layers * hidden * width + 1.5 * layer + logits
    row_tokens = min(step_tokens, int(free_bytes / least))
    spare = free_bytes - row_tokens * least
    return row_tokens, min(layers, int(spare / (max(1, row_tokens) * (layer - hidden * width))))


def free_gpu_bytes() -> float:
    """What this process may still take of its GPU, memory that PyTorch has reserved included."""
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    held = torch.cuda.memory_allocated()
    unused = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - held
    return min(unused, torch.cuda.get_per_process_memory_fraction() * whole - held)


def unpack_rows(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A packed row of values (1, T) as one row a sentence, filled with IGNORE to the longest: (sentences, longest)."""
    rows = values[0, : int(lengths.sum())].split(lengths.tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)


def packed_row(cu_seq_lens: torch.Tensor, max_seq_len: int) -> dict[str, Any]:
    """What the forward of a model that attends by :data:`ATTENTION` wants beside tokens and position ids."""
    # A mask of four dimensions is taken as ready: transformers builds none (T x T) and looks for no boundaries in
    # position_ids, which would wait for the GPU.
    ready = cu_seq_lens.view(1, 1, 1, -1)
    return {"attention_mask": ready, "cu_seq_lens": cu_seq_lens, "max_seq_len": max_seq_len}


def attend_within_sentences(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens: torch.Tensor | None = None,
    max_seq_len: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sentence of a packed row; without ``cu_seq_lens`` as PyTorch's SDPA.

    Query is (1, heads, T, D), key and value (1, groups, T, D). On a GPU one kernel for all sentences
    (``torch.nn.attention.varlen``), on a CPU and in float32 one call a sentence: neither computes a pair of tokens of
    two sentences.

    Raises:
        ModelError: the model's attention does what neither can (soft-capped scores, dropout).
    """
    if cu_seq_lens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if softcap or dropout:
        raise ModelError(
            f"{type(module).__name__} soft-caps or drops attention scores, which packed rows cannot. Set packing=false."
        )
    if query.is_cuda and query.dtype != torch.float32:
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        rows = [states[0].transpose(0, 1) for states in (query, key, value)]  # (T, heads, D)
        arguments: Any = (*rows, cu_seq_lens, cu_seq_lens, max_seq_len, max_seq_len)
        attended = varlen_attn(*arguments, scale=scaling, window_size=window, **_GROUPED)
        return cast(torch.Tensor, attended)[None], None
    lengths = cu_seq_lens.diff().tolist()
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ModelError(f"a sentence is longer than the window of {sliding_window}: set packing=false.")
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        if q.shape[2]
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend_within_sentences)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
