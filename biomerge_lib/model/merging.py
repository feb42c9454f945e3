"""Knows how a checkpoint becomes one plain causal LM folder, and that both say the same.

checkpoint + backbone --[merge_checkpoint]--> the folder that vLLM serves, and how far it is from the checkpoint
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from biomerge_lib.core.errors import DiskFull, ModelError
from biomerge_lib.core.files import whole_folder
from biomerge_lib.model.unsloth_lora_ner import load_adapter, load_causal_lm
from biomerge_lib.prompts.manifest import Manifest, write_manifest
from biomerge_lib.prompts.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from biomerge_lib.model.backbones import CausalLM


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """How the merged model differs from backbone + adapter on one prompt.

    ``max_logit_difference`` over all positions and tokens; ``argmax_agreement``: share of positions with the same best
    token; ``relative_change``: root mean square of that difference over what the adapter itself changes, 0 for a
    perfect merge and 1 for a lost adapter; ``same_answer``: whether the two greedy answers are equal.
    """

    max_logit_difference: float
    argmax_agreement: float
    relative_change: float
    same_answer: bool


def merge_checkpoint(
    folder: Path | str,
    checkpoint: Path | str,
    out: Path | str,
    *,
    dtype: str,
    manifest: Manifest,
    probe_ids: Sequence[int],
) -> MergeCheck:
    """Write a checkpoint as one plain causal LM folder that vLLM serves, after a comparison of both.

    An adapter is added to the backbone in ``folder``; of a model that was trained whole the token head is left out, and
    its float32 weights are rounded to ``dtype``.

    ``manifest`` goes beside the weights, so that whoever serves the folder can build the right prompts. ``probe_ids``
    are the token ids of a prompt on which checkpoint and merged model must agree.

    Raises:
        ModelError: the merged model's logits differ from the checkpoint's by more than rounding; or the disk is full.
            An earlier merged folder stays as it is.
    """
    import torch

    out = Path(out)
    is_adapter = (Path(checkpoint) / "adapter_config.json").is_file()
    model: PeftModel | CausalLM
    if is_adapter:
        model = load_adapter(folder, checkpoint, dtype=dtype)
    else:
        model = load_causal_lm(checkpoint, dtype="float32")
    probe = torch.tensor([probe_ids], device=model.device)
    with torch.inference_mode():
        before, answer = model(input_ids=probe).logits.float(), _greedy_answer(model, probe)
        if is_adapter:
            with cast("PeftModel", model).disable_adapter():
                untrained = model(input_ids=probe).logits.float()
        else:
            untrained = load_causal_lm(folder, dtype=dtype)(input_ids=probe).logits.float()
    effect = _root_mean_square(before - untrained)
    merged = cast("PeftModel", model).merge_and_unload() if is_adapter else model.to(getattr(torch, dtype))
    if hasattr(merged, "token_head"):
        del merged.token_head
    with torch.inference_mode():
        change = merged(input_ids=probe).logits.float() - before
        check = MergeCheck(
            max_logit_difference=float(change.abs().max()),
            argmax_agreement=float(((before + change).argmax(-1) == before.argmax(-1)).float().mean()),
            relative_change=_root_mean_square(change) / max(effect, 1e-6),
            same_answer=_greedy_answer(merged, probe) == answer,
        )
    # In bfloat16 (8 bits of mantissa) the merged weights are rounded anew: single logits move by several, all of them
    # together by far less than what losing the training would change.
    is_lost = check.relative_change > 0.5 and _root_mean_square(change) > 0.25
    if is_lost or (dtype == "float32" and check.max_logit_difference > 1e-2):
        raise ModelError(
            f"merging {checkpoint} changed what the model says: logits by {check.max_logit_difference:.3f} at most, "
            f"{check.relative_change:.0%} of what its training does; not written. The checkpoint is safe; "
            "dtype=float32 merges without rounding."
        )
    try:
        with whole_folder(out) as partial:
            merged.save_pretrained(str(partial))
            load_tokenizer(folder).save_pretrained(partial)
            write_manifest(partial, manifest)
            shutil.rmtree(out, ignore_errors=True)
    except (OSError, DiskFull) as error:
        raise ModelError(f"{out}: cannot be written ({error}); checkpoint {checkpoint} is safe.") from error
    return check


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _greedy_answer(model: CausalLM | PeftModel, probe: torch.Tensor) -> list[int]:
    """Up to 32 token ids that greedy decoding writes after a (1, T) prompt."""
    mask = probe.new_ones(probe.shape)
    generated = model.generate(input_ids=probe, attention_mask=mask, max_new_tokens=32, do_sample=False)
    return generated[0, probe.shape[1] :].tolist()
