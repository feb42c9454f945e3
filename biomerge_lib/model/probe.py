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
from biomerge_lib.prompts.ner_span import SpanCollator
from biomerge_lib.prompts.prompt import IGNORE

if TYPE_CHECKING:
    from peft import PeftModel

    from biomerge_lib.model.backbones import CausalLM

SENTENCES = ("Aspirin can trigger asthma attacks in sensitive patients .", "No nausea with 20 mg of TNF-α .")
LEAST_TOLERANCE = 1e-4
WAYS: dict[str, tuple[type, str]] = {
    "padded": (SpanCollator, "Take another backbone (docs/backbones.md), or set backend=peft."),
    "packed": (PackedCollator, "Set packing=false, which keeps sentences in rows of their own."),
}
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)

States = list[torch.Tensor]  # of each sentence two: hidden states (T, H), logits (T - 1, V)


def probe_training(
    model: PeftModel | CausalLM, sentences: Sequence[Sequence[int]], *, packing: bool, dtype: str
) -> dict[str, float]:
    """Compare the training's forward, ``padded`` and ``packed``, with the model's own on two sentences of token ids.

    The reference is the model's own forward of each sentence alone, with transformers' plain attention. A difference is
    that of a token's hidden states, or logits, over their length: the median of a sentence's tokens, or of its first
    three, which a leak reaches first, whichever is more (single tokens may go to another expert by rounding). Rounding
    adds up to about ``eps / 2 * sqrt(layers)`` (measured: 0.02 for SmolLM2's 30 layers in bfloat16); four times that is
    the ``tolerance``, 1e-4 the least. ``leak`` is the second sentence's difference if it read the first one: below the
    tolerance the probe shows nothing, as with small random weights.

    Raises:
        ModelError: the training would compute something else, or cannot compute.
    """
    base: Any = cast("PeftModel", model).get_base_model() if hasattr(model, "peft_config") else model
    own, was_training, first = attention_of(base), model.training, len(sentences[0])
    rounding = torch.finfo(getattr(torch, dtype)).eps / 2 * base.config.num_hidden_layers**0.5
    found = {"tolerance": max(LEAST_TOLERANCE, 4 * rounding)}
    examples = [
        {"input_ids": list(ids), "labels": [IGNORE, *ids[1:]], "token_labels": [IGNORE] * len(ids)}
        for ids in sentences
    ]
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            torch.autocast(base.device.type, torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            set_attention(base, "eager")
            alone = [state for ids in sentences for state in _own_states(base, ids)]
            joined = _own_states(base, [*sentences[0], *sentences[1]])
            found["leak"] = _difference([state[first:] for state in joined], alone[2:])
            for way in WAYS if packing else ["padded"]:
                found[way] = _compare(base, way, examples, alone, found["tolerance"])
    finally:
        set_attention(base, own)
        model.train(was_training)
    return {name: float(f"{value:.2g}") for name, value in found.items()}


def _compare(model: CausalLM, way: str, examples: list[Any], alone: States, tolerance: float) -> float:
    collator, advice = WAYS[way]
    try:
        difference = _difference(_trained_states(model, collator(0)(examples)), alone)
        problem = f"differs from the model's own by {difference:.1%}, and rounding by {tolerance:.1%}"
        if difference <= tolerance:
            return difference
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        problem = f"fails on two sentences ({type(error).__name__}: {error})"
    raise ModelError(f"{type(model).__name__}: its {way} forward {problem}. {advice}")


def _own_states(model: CausalLM, ids: Sequence[int]) -> States:
    row = torch.tensor([ids], device=model.device)
    hidden, logits = model.model(row, use_cache=False)[0], model(row, use_cache=False).logits
    return [hidden[0].float(), logits[0, :-1].float()]


def _trained_states(model: CausalLM, batch: dict[str, torch.Tensor]) -> States:
    found: list[torch.Tensor] = []
    lengths = batch.pop("lengths").tolist()
    model(**{name: values.to(model.device) for name, values in batch.items()}, states=found)
    rows = found[0][0].split(lengths) if "cu_seq_lens" in batch else found[0]
    of_rows = zip(rows, found[1].split([length - 1 for length in lengths]), lengths, strict=True)
    return [state for row, logits, length in of_rows for state in (row[:length].float(), logits)]


def _difference(found: States, expected: States) -> float:
    of_tokens = [(x - y).norm(dim=-1) / y.norm(dim=-1) for x, y in zip(found, expected, strict=True)]
    return max(float(part.median()) for tokens in of_tokens for part in (tokens, tokens[:3]))
