"""Knows how LoRA trains in few passes over the activations: layers that read the same input, as one product.

PEFT computes W x + s B A dropout(x) layer by layer. Its modules stay as they are (names, saving, merging, decoding),
but in a training pass a group of them (q, k, v; gate, up; any other alone) computes

    low = dropout(x) [A_q; A_k; A_v]^T,  one mask a group        y = [x | low] W'^T,  W' = [W_q | s B_q  0     0    ]
                                                                                         [W_k | 0      s B_k  0    ]
                                                                                         [W_v | 0      0      s B_v]

so that the low-rank part is added in the base product's accumulator; where a group puts out no more than it reads (o,
down), y is the smaller tensor, and the low-rank part is added behind the product. W' holds the frozen weights
themselves (the modules' are views of it), and its last columns are filled from the trained B's before each training
pass. Backward, dy W' gives the gradients of x and of low in one product, or where the members of a group put out more
than they read (gate, up) in one each: their dy come from one kernel, and to join them would read its inputs twice.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from biomerge_lib.model.reach_ins import adds_low_rank, is_plain_lora

if TYPE_CHECKING:
    from peft import PeftModel

DEVICES: tuple[str, ...] = ()  # on which training fuses LoRA
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of one parent, called in this order
COLUMNS = 64  # added to W' at least: a tile of a GPU's product, and rows that begin at multiples of 128 bytes


def fuse_lora(model: PeftModel) -> int:
    """Let a PEFT model's training passes compute LoRA in groups of layers; the number of layers that do.

    A layer is left as PEFT's where it is more than ``nn.Linear`` with LoRA (quantised, DoRA, several adapters), and so
    is every pass without gradients, in evaluation mode, or with the adapter disabled or merged. A training pass is one
    of the whole decoder; its layers called by themselves compute as the pass before did. Merged, weights are views that
    ``save_pretrained`` cannot write: merge an adapter into a backbone of its own, as ``merge_checkpoint`` does.
    """
    decoder: Any = model.get_decoder()
    groups = []
    for parent in decoder.modules():
        plain = {name: child for name, child in parent.named_children() if is_plain_lora(child)}
        for names in GROUPS:
            members = [plain[name] for name in names if name in plain]
            if len(members) == len(names) and len({_kind(member) for member in members}) == 1:
                groups.append(_Group(members))
                plain = {name: child for name, child in plain.items() if name not in names}
        groups += [_Group([child]) for child in plain.values()]

    def prepare(decoder: torch.nn.Module, args: Any) -> None:
        for group in groups:
            group.prepare(decoder.training and torch.is_grad_enabled())

    decoder.register_forward_pre_hook(prepare)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the weights' earlier places, which are too small for the joined ones
    return sum(len(group.layers) for group in groups)


def fused_layers(model: torch.nn.Module) -> list[Any]:
    """A model's LoRA layers that training passes may compute in groups."""
    return [module for module in model.modules() if hasattr(module, "fused_into")]


def _kind(layer: Any) -> tuple[Any, ...]:
    """What members of a group have in common."""
    weight, dropout = layer.base_layer.weight, layer.lora_dropout["default"]
    same = weight.shape[1], weight.dtype, weight.device, layer.base_layer.bias is None
    return (*same, layer.r["default"], layer.scaling["default"], getattr(dropout, "p", 0.0))


class _Group:
    """LoRA layers that are called one after the other with the same input."""

    def __init__(self, layers: list[Any]) -> None:
        bases = [layer.base_layer for layer in layers]
        first, outputs = bases[0].weight, [base.weight.shape[0] for base in bases]
        self.inputs: int = first.shape[1]
        self.layers = layers
        self.in_product, self.apart = sum(outputs) > self.inputs, min(outputs) > self.inputs
        # As ratios of integers, which torch.compile takes as constants; a float would be an input of each layer.
        self.scale = float(layers[0].scaling["default"]).as_integer_ratio()
        self.dropout = float(getattr(layers[0].lora_dropout["default"], "p", 0)).as_integer_ratio()
        self.ready = False  # whether the pass at hand computes here
        self.held: tuple[torch.Tensor, tuple[torch.Tensor, ...], int] | None = None
        rank = sum(layer.r["default"] for layer in layers)
        self.columns = -(-rank // COLUMNS) * COLUMNS if self.in_product else rank
        width = self.inputs + (self.columns if self.in_product else 0)
        # A layer alone whose low-rank part is added behind it stays where it is.
        alone = len(layers) == 1 and not self.in_product
        joined = first.data if alone else first.new_zeros(sum(outputs), width, requires_grad=False)
        self._views = [rows[:, : self.inputs] for rows in joined.split(outputs)]
        self._slots = []
        column = self.inputs
        for layer, rows, view in zip(layers, joined.split(outputs), self._views, strict=True):
            if not alone:
                view.copy_(layer.base_layer.weight.data)
                layer.base_layer.weight.data = view
            self._slots.append(rows[:, column : column + layer.r["default"]])
            column += layer.r["default"]
        # Parameters, as torch.compile takes their sizes as constants.
        self.weight = torch.nn.Parameter(joined, requires_grad=False)
        self.bias = None
        if bases[0].bias is not None:
            self.bias = torch.nn.Parameter(torch.cat([base.bias.data for base in bases]), requires_grad=False)
        for place, layer in enumerate(layers):
            layer.fused_into = (self, place)
            layer.forward = types.MethodType(_forward, layer)

    def prepare(self, training: bool) -> None:
        """Decide for the coming pass, and put the trained B's where its products read them."""
        self.held = None
        self.ready = training and all(
            adds_low_rank(layer) and layer.base_layer.weight.data_ptr() == view.data_ptr()
            for layer, view in zip(self.layers, self._views, strict=True)
        )
        scale = self.scale[0] / self.scale[1]
        if self.ready and self.in_product:
            with torch.no_grad():
                for layer, slot in zip(self.layers, self._slots, strict=True):
                    torch.mul(layer.lora_B["default"].weight, scale, out=slot)

    def take(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer at ``place`` for ``x`` (..., in); the first call computes all of them."""
        if self.held is None or self.held[0] is not x:
            self.held = (x, self.compute(x), len(self.layers))
        x, parts, left = self.held
        self.held = (x, parts, left - 1) if left > 1 else None
        return parts[place]

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, self.inputs)  # (T, in)
        lora_a = torch.cat([layer.lora_A["default"].weight for layer in self.layers])
        lora_b = [layer.lora_B["default"].weight for layer in self.layers]
        padding = self.columns - lora_a.shape[0]
        scale, p = (over / under for over, under in (self.scale, self.dropout))
        low = F.linear(drop(rows, p), F.pad(lora_a, (0, 0, 0, padding)).to(x.dtype))  # (T, columns)
        if self.in_product:
            product = cast("Callable[..., tuple[torch.Tensor, ...]]", _JoinedProduct.apply)
            parts = product(rows, low, self.weight, self.bias, scale, self.apart, *lora_b)
        else:
            blocks = (torch.block_diag(*lora_b) * scale).to(x.dtype)  # (out, columns)
            y = F.linear(rows, self.weight, self.bias) + F.linear(low, blocks)
            parts = y.split([b.shape[0] for b in lora_b], dim=1)
        # v is kept for the backward pass as it is, and would keep all of y. Gate and up, halves, are both kept.
        if len(parts) > 2:
            parts = tuple(part.contiguous() for part in parts)
        return tuple(part.reshape(*x.shape[:-1], -1) for part in parts)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    group, place = layer.fused_into
    if not group.ready or args or kwargs or x.dtype != group.weight.dtype:
        return type(layer).forward(layer, x, *args, **kwargs)
    return group.take(place, x)


class _JoinedProduct(torch.autograd.Function):
    """``[x | low] weight^T + bias`` in parts (T, out), and gradients of x, low and the B's in weight's last columns.

    ``apart``: whether the parts' gradients are multiplied one by one, or joined.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, low: Any, weight: Any, bias: Any, scale: float, apart: bool, *lora_b: Any
    ) -> Any:
        ctx.save_for_backward(low, weight)
        ctx.scale, ctx.apart, ctx.shapes = scale, apart, [b.shape for b in lora_b]
        ctx.dtype = lora_b[0].dtype
        both = torch.cat((x, low), dim=1)
        y = both @ weight.t() if bias is None else torch.addmm(bias, both, weight.t())
        return y.split([b.shape[0] for b in lora_b], dim=1)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        low, weight = ctx.saved_tensors
        outputs, ranks = zip(*ctx.shapes, strict=True)
        if ctx.apart:
            both = dys[0] @ weight[: outputs[0]]  # (T, in + columns)
            for dy, rows in zip(dys[1:], weight.split(outputs)[1:], strict=True):
                both = torch.addmm(both, dy, rows)
            blocks = [dy.t() @ low for dy in dys]  # (out, columns), of which each B's columns are wanted
        else:
            joined = torch.cat(dys, dim=1)
            both, blocks = joined @ weight, (joined.t() @ low).split(outputs)
        inputs = weight.shape[1] - low.shape[1]
        of_b, column = [], 0
        for block, rank in zip(blocks, ranks, strict=True):
            of_b.append(block[:, column : column + rank].to(ctx.dtype) * ctx.scale)
            column += rank
        return both[:, :inputs], both[:, inputs:], None, None, None, None, *of_b


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout of a matrix (T, in): 0 with probability ``p``, else ``x / (1 - p)``.

    Where it is compiled the mask is :func:`hashed_mask` of one random number: a tenth of the arithmetic of PyTorch's
    Philox, and the backward pass can compute it anew instead of reading it.
    """
    if p == 0:
        return x
    if not torch.compiler.is_compiling():
        return F.dropout(x, p)
    seed = torch.randint(-(2**31), 2**31 - 1, (), dtype=torch.int32, device=x.device)
    return torch.where(hashed_mask(x, seed, p), x * (1 / (1 - p)), 0)


def hashed_mask(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Which places of a matrix to keep, each with probability ``1 - p``: their numbers and an int32 ``seed``, hashed.

    The hash is Wellons' lowbias32 with the seed added twice; shifts are made logical, as int32 has a sign.
    """
    rows, columns = (torch.arange(size, dtype=torch.int32, device=x.device) for size in x.shape)
    mixed = rows[:, None] * x.shape[1] + columns + seed
    mixed = (mixed ^ (mixed >> 16 & 0xFFFF)) * 0x7FEB352D + seed
    mixed = (mixed ^ (mixed >> 15 & 0x1FFFF)) * -0x7B935975
    mixed = mixed ^ (mixed >> 16 & 0xFFFF)
    return mixed >= int(p * 2**32) - 2**31
