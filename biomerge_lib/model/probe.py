"""Knows whether a training computes what the model itself computes: one probe before it starts.

two sentences --[the model's own forward, each alone]--> hidden states, logits
              --[this project's path, padded and packed]--> the same, or a refusal
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from biomerge_lib.core.errors import ModelError
from biomerge_lib.model.packing import PackedCollator
from biomerge_lib.model.reach_ins import attention_of, set_attention
from biomerge_lib.model.span_loss import read_targets
from biomerge_lib.prompts.ner_span import SpanCollator
from biomerge_lib.prompts.prompt import IGNORE

if TYPE_CHECKING:
    from peft import PeftModel

    from biomerge_lib.model.backbones import CausalLM

SENTENCES = ("Aspirin can trigger asthma attacks in sensitive patients .", "No nausea with 20 mg of TNF-α .")
LEAST_TOLERANCE = 1e-3
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError)

States = list[tuple[torch.Tensor, torch.Tensor]]  # of each sentence: hidden states (T, H), logits (T - 1, V)


def probe_training(
    model: PeftModel | CausalLM, sentences: Sequence[Sequence[int]], *, packing: bool, dtype: str
) -> dict[str, float]:
    """Compare the training's forward, padded and packed, with the model's own on two sentences of token ids.

    The reference is the model's own forward of each sentence alone, with transformers' plain attention. A
    difference is that of a token's hidden states, or logits, over their length: the median of a sentence's
    tokens or of its first three, which a leak from the sentence before reaches first, whichever is more
    (single tokens go to another expert by rounding alone). Of ``padded`` and ``packed`` none may be above
    ``tolerance``: rounding adds up to about ``eps / 2 * sqrt(layers)`` (measured: 0.02 for SmolLM2's 30
    layers in bfloat16), four times that is allowed, and 1e-3 at the least. ``leak`` is what the second
    sentence's difference would be if it read the first: one below the tolerance says that the probe shows
    nothing here, as in a tiny model of small random weights.

    Raises:
        ModelError: the training would compute something else, or cannot compute.
    """
    base: Any = cast("PeftModel", model).get_base_model() if hasattr(model, "peft_config") else model
    was_training, kind = model.training, type(base).__name__
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            torch.autocast(base.device.type, torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            rounding = torch.finfo(getattr(torch, dtype)).eps / 2 * base.config.num_hidden_layers**0.5
            return _compare(base, sentences, packing, max(LEAST_TOLERANCE, 4 * rounding))
    except FAILURES as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        problem = f"{type(error).__name__}: {error}"
        raise ModelError(
            f"{kind}: a pass over two sentences fails ({problem}). {_ADVICE[packing]}"
        ) from error
    finally:
        model.train(was_training)


_ADVICE = {
    True: "Set packing=false, which keeps sentences apart in rows of their own.",
    False: "This project cannot train it so; docs/backbones.md names the families that were tried.",
}


def _compare(
    base: CausalLM,
    sentences: Sequence[Sequence[int]],
    packing: bool,
    tolerance: float,
) -> dict[str, float]:
    examples = [
        {"input_ids": list(ids), "labels": [IGNORE, *ids[1:]], "token_labels": [IGNORE] * len(ids)}
        for ids in sentences
    ]
    before, first = attention_of(base), len(sentences[0])
    set_attention(base, "eager")
    alone = [_own_states(base, ids) for ids in sentences]
    hidden, logits = _own_states(base, [*sentences[0], *sentences[1]])
    set_attention(base, before)
    found = {"tolerance": tolerance, "leak": _difference([(hidden[first:], logits[first:])], alone[1:])}
    collators: dict[str, Any] = {"padded": SpanCollator(0)}
    if packing:
        collators["packed"] = PackedCollator(0)
    for way, collator in collators.items():
        found[way] = _difference(_trained_states(base, collator(examples)), alone)
        if not found[way] <= tolerance:
            raise ModelError(
                f"{type(base).__name__}: a {way} training pass computes something else than the model's own (hidden "
                f"states or logits differ by {found[way]:.1%}, of which rounding explains {tolerance:.1%}). "
                + _ADVICE[way == "packed"]
            )
    return {name: float(f"{value:.2g}") for name, value in found.items()}


def _own_states(model: CausalLM, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.tensor([ids], device=model.device)
    hidden, logits = model.model(row, use_cache=False)[0], model(row, use_cache=False).logits
    return hidden[0].float(), logits[0, :-1].float()


def _trained_states(model: CausalLM, batch: dict[str, torch.Tensor]) -> States:
    lengths = batch.pop("lengths").tolist()
    del batch["token_labels"]
    inputs = {name: values.to(model.device) for name, values in batch.items()}
    hidden, logits, _ = read_targets(model, **inputs, max_seq_len=max(lengths))
    rows = hidden[0].split(lengths) if "cu_seq_lens" in batch else hidden
    pairs = zip(rows, logits.split([length - 1 for length in lengths]), lengths, strict=True)
    return [(row[:length].float(), of_row) for row, of_row, length in pairs]


def _difference(found: States, expected: States) -> float:
    pairs = [pair for of_one in zip(found, expected, strict=True) for pair in zip(*of_one, strict=True)]
    of_tokens = [(x - y).norm(dim=-1) / y.norm(dim=-1) for x, y in pairs]
    return max(float(part.median()) for tokens in of_tokens for part in (tokens, tokens[:3]))
