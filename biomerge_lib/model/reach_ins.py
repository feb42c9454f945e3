"""What is used of other libraries' private parts, here and in no other module.

Each function says why nothing public would do. ``WRITTEN_FOR`` names the versions; tests/model/test_reach_ins.py
fails where a pin moves away from them or a library has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer

WRITTEN_FOR = {
    "deepspeed": "0.19.8",
    "gguf": "0.19.0",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.17.0",
    "unsloth": "2026.10.9",
}


# PEFT


def read_trained_rows_in_place(model: PreTrainedModel) -> None:
    """Let a PEFT model look its ``trainable_token_indices`` up where they are read.

    PEFT puts the trained rows into a copy of the whole table at every forward, whose gradient is as large (1 GB each
    for Llama 3), and sends their indices to the GPU anew, for which a CUDA graph cannot be captured.
    """
    for module, read in ((model.get_input_embeddings(), _embed), (model.lm_head, _project)):
        adapter = getattr(module, "token_adapter", None)
        # Gemma's embedding scales what it reads, so it is left as it is.
        if adapter is None or type(adapter.base_layer) not in (torch.nn.Embedding, torch.nn.Linear):
            continue
        ids = torch.tensor(adapter.token_indices["default"], device=adapter.base_layer.weight.device)
        module.forward = functools.partial(_read_rows, read, module.forward, adapter, ids)


def _read_rows(
    read: Callable[..., torch.Tensor],
    peft_forward: Callable[..., torch.Tensor],
    adapter: Any,
    ids: torch.Tensor,
    inputs: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    if adapter.disable_adapters or adapter.merged:
        return peft_forward(inputs, *args, **kwargs)
    # Module and rows are asked for at every call, so that DeepSpeed can fetch what it keeps elsewhere.
    return read(inputs, adapter.base_layer, ids, adapter.trainable_tokens_delta["default"])


def _embed(
    input_ids: torch.Tensor, table: torch.nn.Module, ids: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Rows (B, T, H) of a frozen embedding, those of ``ids`` (R,) from ``values`` (R, H)."""
    is_trained = input_ids[..., None] == ids  # (B, T, R)
    frozen = table(input_ids).masked_fill(is_trained.any(-1, keepdim=True), 0)
    return frozen + is_trained.to(frozen.dtype) @ values.to(frozen.dtype)


def _project(
    hidden: torch.Tensor, table: torch.nn.Module, ids: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Logits (..., V) of hidden states (..., H), those of ``ids`` from ``values``."""
    logits = table(hidden)
    return logits.index_copy(-1, ids, F.linear(hidden, values.to(hidden.dtype)).to(logits.dtype))


def is_plain_lora(module: torch.nn.Module) -> bool:
    """Whether a module is PEFT's LoRA with one adapter, ``default``, on a plain ``nn.Linear``, and nothing more."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear:
        return False
    more = module.lora_variant or any(module.lora_bias.values()) or module.fan_in_fan_out
    plain = {type(dropout) for dropout in module.lora_dropout.values()} <= {
        torch.nn.Dropout,
        torch.nn.Identity,
    }
    return list(module.lora_A) == ["default"] and plain and not more


def adds_low_rank(layer: Any) -> bool:
    """Whether a plain LoRA layer adds its adapter at this moment: neither disabled nor merged."""
    return not layer.disable_adapters and not layer.merged and layer.active_adapters == ["default"]


# Unsloth


def train_added_rows(model: PeftModel) -> None:
    """Let the rows of ``trainable_token_indices`` train, which Unsloth freezes with the embeddings."""
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.requires_grad_(True)


def remove_unsloth_generate(model: PreTrainedModel) -> None:
    """Take off the ``generate`` that Unsloth hangs on a model: greedy decoding is the same with both backends."""
    model.__dict__.pop("generate", None)


# transformers: models


def attention_of(model: PreTrainedModel) -> str:
    """The name under which the model's attention is registered."""
    return model.config._attn_implementation


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let the model attend by the function registered as ``name``.

    ``set_attn_implementation`` walks over all modules, and decoding changes the name twice a token.
    """
    model.config._attn_implementation = name


def recompute_none(layers: Iterable[Any]) -> None:
    """Switch gradient checkpointing off in these decoder layers; ``gradient_checkpointing_enable`` is for all."""
    for layer in layers:
        layer.gradient_checkpointing = False


def count_recomputing(layers: Iterable[torch.nn.Module]) -> int:
    """How many of these decoder layers recompute their activations in the backward pass."""
    return sum(getattr(layer, "gradient_checkpointing", False) for layer in layers)


def forget_gguf(config: PreTrainedConfig) -> None:
    """Let the config of weights read from a GGUF be saved: they are dequantised, and it still says GGUF."""
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, leftover):
            delattr(config, leftover)


@contextmanager
def gguf_opened_once() -> Iterator[None]:
    """transformers opens a GGUF file at each look, and lists its tensors' names for each module: 10 s of a CPU."""
    import gguf

    names: Any = gguf
    own = names.GGUFReader, names.get_tensor_name_map
    names.GGUFReader, names.get_tensor_name_map = map(functools.cache, own)
    try:
        yield
    finally:
        names.GGUFReader, names.get_tensor_name_map = own


# transformers: the Trainer


def take_over_trainer(
    trainer: Trainer,
    *,
    trained: Sequence[torch.nn.Parameter],
    make_sampler: Callable[[], torch.utils.data.Sampler],
) -> None:
    """Give a Trainer the order of its examples, and let it touch only what trains.

    It would walk over all of the model's modules at every step, to clip gradients and to drop them. Its own samplers go
    by how much random state was used before, and no argument takes another one.
    """

    def clip(model: torch.nn.Module) -> torch.Tensor | None:
        return trainer.accelerator.clip_grad_norm_(trained, trainer.args.max_grad_norm)

    def drop_gradients(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    own: Any = trainer
    own._get_train_sampler = lambda train_dataset=None: make_sampler()
    own._clip_grad_norm = clip
    own.model.zero_grad = drop_gradients


def to_device(trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as the Trainer hands it to its model: on its device, in DeepSpeed's type."""
    return trainer._prepare_inputs(batch)


# PyTorch and DeepSpeed


def compile_once(layer: torch.nn.Module) -> None:
    """``layer.compile(dynamic=True)``, unless it was called before: it would compile anew."""
    if layer._compiled_call_impl is None:
        layer.compile(dynamic=True)


def count_compiled_graphs() -> int:
    """How many graphs PyTorch has compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def zero_at_once(tensors: list[torch.Tensor]) -> None:
    """Set tensors to zero in a few launches, and not one a tensor."""
    torch._foreach_zero_(tensors)


def is_under_deepspeed(model: torch.nn.Module) -> bool:
    """Whether DeepSpeed hung a hook before the model, or keeps its weights elsewhere (ZeRO-3)."""
    hooks = model._forward_pre_hooks.values()
    hooked = any("deepspeed" in getattr(hook, "__module__", "") for hook in hooks)
    return hooked or any(hasattr(weights, "ds_id") for weights in model.parameters())
