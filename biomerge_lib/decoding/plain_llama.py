"""Knows a Llama's forward pass with torch alone: answers on a CPU need not wait for transformers to be imported.

prompt ids (B, P) --[prefill]--> keys and values --[one pass a token]--> token ids and log-probabilities (B, N)
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import Linear, Module, ModuleDict, ModuleList, RMSNorm
from torch.nn.functional import embedding, scaled_dot_product_attention, silu

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, read_values


class _Rotation(BaseModel, extra="forbid"):
    rope_theta: float
    rope_type: Literal["default"]


class _Config(BaseModel):
    """The ``config.json`` of a Llama without scaled rotation, biases or quantised weights."""

    architectures: tuple[Literal["LlamaForCausalLM"]]
    hidden_act: Literal["silu"]
    attention_bias: Literal[False]
    mlp_bias: Literal[False]
    quantization_config: None = None
    rope_parameters: _Rotation
    head_dim: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    vocab_size: int


class PlainLlama(Module):
    """Modules and weights are named as in transformers, whose answers these are (a test compares them)."""

    device = torch.device("cpu")

    def __init__(self, config: _Config, *, eos_token_id: int):
        super().__init__()
        self.config, self.eos_token_id = config, eos_token_id
        hidden, inner, rows = config.hidden_size, config.intermediate_size, config.vocab_size
        asked, kept = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
        shapes = {"q_proj": (hidden, asked), "k_proj": (hidden, kept), "v_proj": (hidden, kept)}
        shapes |= {"o_proj": (asked, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
        shapes |= {"down_proj": (inner, hidden)}
        linear, norm = partial(Linear, bias=False), partial(RMSNorm, hidden, eps=config.rms_norm_eps)
        norms = ("input_layernorm", "post_attention_layernorm")
        self.layers = ModuleList(
            ModuleDict(
                {name: linear(*shape) for name, shape in shapes.items()} | {name: norm() for name in norms}
            )
            for _ in range(config.num_hidden_layers)
        )
        # Both tables are (V, H). Embedding would import PyTorch's compiler to draw numbers that are not wanted.
        self.norm, self.embed_tokens, self.lm_head = norm(), linear(hidden, rows), linear(hidden, rows)

    @torch.inference_mode()
    def decode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, max_new_tokens: int, leave: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy continuations as ``GraphedDecoder.decode`` gives them: token ids (B, N) and log-probabilities."""
        batch, length = input_ids.shape
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        cache = torch.empty(len(self.layers), 2, batch, heads, length + max_new_tokens, size)
        seen = torch.cat([attention_mask.bool(), torch.ones(batch, max_new_tokens, dtype=torch.bool)], dim=-1)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        # A place of the padding sees itself, as something must be seen.
        allowed = (causal & seen[:, None, :length]) | torch.eye(length, dtype=torch.bool)
        ids, start, steps, ended = input_ids, 0, [], torch.zeros(batch, dtype=torch.bool)
        for end in range(length, length + max_new_tokens):
            logits = self(ids, positions[:, start:end], allowed[:, None], cache[..., :end, :])
            steps.append(logits.log_softmax(-1).topk(2))
            ids = steps[-1].indices[:, :1]
            ended |= ids[:, 0] == self.eos_token_id
            if ended.sum() >= batch - leave:
                break
            start, allowed = end, seen[:, None, : end + 1]
        written = torch.stack([step.indices[:, 0] for step in steps], dim=1)
        return written, torch.stack([step.values for step in steps], dim=1)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, V) after the last of the ids (B, T), which end the cache (layers, 2, B, heads, S, D)."""
        batch, length = ids.shape
        size = self.config.head_dim
        frequencies = self.config.rope_parameters.rope_theta ** -(torch.arange(0, size, 2) / size)
        angles = (positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)  # (B, 1, T, D)
        cos, sin = angles.cos(), angles.sin()

        def rotated(heads: torch.Tensor) -> torch.Tensor:
            first, second = heads.chunk(2, dim=-1)
            return heads * cos + torch.cat((-second, first), dim=-1) * sin

        hidden = embedding(ids, self.embed_tokens.weight)
        layer: Any
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            read = layer["input_layernorm"](hidden)
            query, key, value = (
                layer[name](read).view(batch, length, -1, size).transpose(1, 2)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            keys[:, :, -length:], values[:, :, -length:] = rotated(key), value
            seen = scaled_dot_product_attention(
                rotated(query), keys, values, attn_mask=allowed, enable_gqa=True
            )
            hidden = hidden + layer["o_proj"](seen.transpose(1, 2).reshape(batch, length, -1))
            read = layer["post_attention_layernorm"](hidden)
            hidden = hidden + layer["down_proj"](silu(layer["gate_proj"](read)) * layer["up_proj"](read))
        return self.lm_head(self.norm(hidden[:, -1]))


def load_plain_llama(folder: Path, *, eos_token_id: int) -> PlainLlama | None:
    """The Llama in a folder, in float32; None where transformers must read it, or say what is wrong."""
    try:
        config = _Config(**read_values(folder / "config.json", OBJECT, raises=ModelError))
        weights = load_file(folder / "model.safetensors")
    except (ValidationError, OSError, SafetensorError):
        return None
    ours = {re.sub("(model|self_attn|mlp)[.]", "", name): rows.float() for name, rows in weights.items()}
    if config.tie_word_embeddings and "embed_tokens.weight" in ours:
        ours["lm_head.weight"] = ours["embed_tokens.weight"]
    with torch.device("meta"):
        llama = PlainLlama(config, eos_token_id=eos_token_id)
    try:
        llama.load_state_dict(ours, assign=True)
    except RuntimeError:  # other names or shapes
        return None
    return llama.eval()
