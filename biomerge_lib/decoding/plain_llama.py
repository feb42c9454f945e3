"""Knows a Llama's forward pass with torch alone, for answers on a CPU that need not wait for transformers.

    prompt ids (B, P) --[prefill]--> keys and values --[one pass a token]--> token ids and log-probabilities (B, N)

Importing transformers' Llama takes longer than an answer. The weights are read as they lie in ``model.safetensors``,
and the answers are those of transformers' float32 (a test compares them); other models are left to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, read_values


class _Rotation(BaseModel, extra="forbid"):
    rope_theta: float
    rope_type: Literal["default"]


class _Config(BaseModel):
    """The ``config.json`` of a Llama that nothing was added to: scaled rotations, biases, quantised weights."""

    architectures: tuple[Literal["LlamaForCausalLM"]]
    hidden_act: Literal["silu"]
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights that belong to it."""
        hidden, inner = self.hidden_size, self.intermediate_size
        asked, kept = (self.head_dim * n for n in (self.num_attention_heads, self.num_key_value_heads))
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (asked, hidden),
            "self_attn.k_proj": (kept, hidden),
            "self_attn.v_proj": (kept, hidden),
            "self_attn.o_proj": (hidden, asked),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes = {
            f"model.layers.{number}.{name}.weight": shape
            for number in range(self.num_hidden_layers)
            for name, shape in layer.items()
        }
        table = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        head = {} if self.tie_word_embeddings else {"lm_head.weight": (self.vocab_size, hidden)}
        return shapes | table | head | {"model.norm.weight": (hidden,)}


class PlainLlama:
    """A Llama in float32 on the CPU, and greedy continuations by it."""

    def __init__(self, config: _Config, weights: Mapping[str, torch.Tensor]):
        self.config = config
        self._weights = {name.removesuffix(".weight"): values.float() for name, values in weights.items()}
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        self._frequencies = 1.0 / config.rope_parameters.rope_theta**steps

    @torch.inference_mode()
    def decode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        eos_token_id: int,
        max_new_tokens: int,
        leave: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Continue prompts that are padded on the left until every row but ``leave`` has written EOS.

        Args:
            input_ids: (B, P), as is ``attention_mask`` (0 on the padding).

        Returns:
            Token ids (B, N) and the log-probabilities of them and of the runners-up (B, N, 2).
        """
        batch, length = input_ids.shape
        config = self.config
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads)
        cache = torch.empty(*shape, length + max_new_tokens, config.head_dim)
        seen = attention_mask.bool()
        positions = (seen.long().cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        # A place of the padding sees itself, as something must be seen.
        allowed = (causal & seen[:, None, :]) | torch.eye(length, dtype=torch.bool)
        ids, ended = input_ids, torch.zeros(batch, dtype=torch.bool)
        written, logprobs = [], []
        for end in range(length, length + max_new_tokens):
            best = self._logits(ids, positions, allowed[:, None], cache[..., :end, :]).log_softmax(-1).topk(2)
            ids = best.indices[:, :1]
            written.append(ids)
            logprobs.append(best.values)
            ended |= ids[:, 0] == eos_token_id
            if ended.sum() >= batch - leave:
                break
            seen = torch.cat([seen, torch.ones(batch, 1, dtype=torch.bool)], dim=-1)
            positions, allowed = positions[:, -1:] + 1, seen[:, None, :]
        return torch.cat(written, dim=-1), torch.stack(logprobs, dim=1)

    def _logits(
        self, ids: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        """What follows the last of the ids (B, T), which stand at the end of the cache (layers, 2, B, heads, S, D)."""
        weights, config = self._weights, self.config
        batch, length = ids.shape
        angles = (positions[:, None, :, None] * self._frequencies).repeat(1, 1, 1, 2)  # (B, 1, T, D)
        cos, sin = angles.cos(), angles.sin()

        def norm(states: torch.Tensor, name: str) -> torch.Tensor:
            return F.rms_norm(states, (config.hidden_size,), weights[name], config.rms_norm_eps)

        def rotated(heads: torch.Tensor) -> torch.Tensor:
            first, second = heads.chunk(2, dim=-1)
            return heads * cos + torch.cat((-second, first), dim=-1) * sin

        hidden = F.embedding(ids, weights["model.embed_tokens"])
        for number, (keys, values) in enumerate(cache):
            layer = f"model.layers.{number}."
            read = norm(hidden, layer + "input_layernorm")
            query, key, value = (
                F.linear(read, weights[f"{layer}self_attn.{name}_proj"])
                .view(batch, length, -1, config.head_dim)
                .transpose(1, 2)
                for name in "qkv"
            )
            keys[:, :, -length:], values[:, :, -length:] = rotated(key), value
            seen = F.scaled_dot_product_attention(
                rotated(query), keys, values, attn_mask=allowed, enable_gqa=True
            )
            seen = seen.transpose(1, 2).reshape(batch, length, -1)
            hidden = hidden + F.linear(seen, weights[layer + "self_attn.o_proj"])
            read = norm(hidden, layer + "post_attention_layernorm")
            gate = F.silu(F.linear(read, weights[layer + "mlp.gate_proj"]))
            hidden = hidden + F.linear(
                gate * F.linear(read, weights[layer + "mlp.up_proj"]), weights[layer + "mlp.down_proj"]
            )
        head = weights["model.embed_tokens" if config.tie_word_embeddings else "lm_head"]
        return F.linear(norm(hidden[:, -1], "model.norm"), head)


def load_plain_llama(folder: Path) -> PlainLlama | None:
    """The Llama in a folder; None for one that transformers must read, or of which it can say what is wrong."""
    try:
        config = _Config(**read_values(folder / "config.json", OBJECT, raises=ModelError))
        weights = load_file(folder / "model.safetensors")
    except (ValidationError, OSError, SafetensorError):
        return None
    if {name: tuple(values.shape) for name, values in weights.items()} != config.shapes():
        return None
    return PlainLlama(config, weights)
