"""A Llama-3 to measure with: the real tokenizer, and a backbone of that shape with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from biomerge_lib.experiment.runs import PROJECT_DIR
from biomerge_lib.model.backbones import backbone_name

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1.5b": {  # Qwen2.5-1.5B's sizes
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "135m": {  # SmolLM2-135M's
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "hidden_size": 128,  # vLLM on a CPU wants heads of 32
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
TOKENIZER_DIR = PROJECT_DIR / "tokenizers" / "llama3_random_tok"


def find_backbone(shape: str, *, weightless: bool = False) -> Path:
    """The folder of a shape's random weights, made on first use with its tokenizer; any other word is a folder's path.

    The weights are written by a process of its own, with which their memory goes. A ``weightless`` folder has the
    configuration and the tokenizer, for ``draw_weights``.
    """
    if shape not in SHAPES:
        return Path(shape)
    if not (TOKENIZER_DIR / "biomerge.json").is_file():
        build_tokenizer(f"random/llama3-{shape}")
    folder = PROJECT_DIR / "backbones" / backbone_name(f"random/llama3-{shape}")
    if weightless:
        folder = folder.with_name(f"{folder.name}-weightless")
        tokenizer = load_shared_tokenizer()
        llama_config(tokenizer, shape).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder
    if not (folder / "config.json").is_file():
        command = [sys.executable, "-m", "benchmarks.random_llama", str(folder), shape]
        subprocess.run(command, cwd=PROJECT_DIR, check=True)
    return folder


def llama3_tokenizer():
    """The real Llama-3 tokenizer, from the file that the PyPI package llama-models carries."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = find_spec("llama_models")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise SystemExit("the PyPI package llama-models is not installed: run `make env`")
    path = Path(folders[0]) / "llama3" / "tokenizer.model"
    reserved = [f"<|reserved_special_token_{index}|>" for index in range(250)]
    special = ["<|begin_of_text|>", "<|end_of_text|>", *reserved, "<|eot_id|>"]
    special += [f"<|unused_{index}|>" for index in range(256 - len(special))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TikTokenConverter(vocab_file=str(path), extra_special_tokens=special).converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    return tokenizer


def build_tokenizer(backbone: str) -> None:
    """Save the tokenizer with BioMerge's five tokens as 01_tokenizer would for a backbone of the hub."""
    from biomerge_lib.prompts.tokenizer import add_biomerge_tokens, save_tokenizer

    tokenizer = llama3_tokenizer()
    add_biomerge_tokens(tokenizer)
    save_tokenizer(tokenizer, TOKENIZER_DIR)
    (TOKENIZER_DIR / "biomerge.json").write_text(json.dumps({"backbone": backbone}) + "\n")


def load_shared_tokenizer():
    from biomerge_lib.prompts.tokenizer import load_tokenizer

    return load_tokenizer(TOKENIZER_DIR)


def llama_config(tokenizer, shape: str):
    """A shape's configuration, with embeddings already of the size that training wants."""
    from transformers import LlamaConfig

    from biomerge_lib.model.backbones import VOCABULARY_MULTIPLE

    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
        **SHAPES[shape],
    )


def build_backbone(folder: Path, shape: str) -> None:
    """Write a prepared backbone of random bfloat16 weights."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = load_shared_tokenizer()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(tokenizer, shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def draw_weights(layers: int | None = None) -> Iterator[None]:
    """Let ``from_pretrained`` draw a weightless folder's weights on the GPU, in seconds, inside the block.

    ``layers`` takes so many of them, of the same shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    own = loader.from_pretrained

    def draw(folder: Any, *, dtype: Any, output_loading_info: bool = False, **options: Any) -> Any:
        config = AutoConfig.from_pretrained(folder)
        config.num_hidden_layers = layers or config.num_hidden_layers
        attention = {name: options[name] for name in options if name == "attn_implementation"}
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            torch.manual_seed(0)
            model = loader.from_config(config, dtype=dtype, **attention)
        found: dict[str, Any] = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}
        return (model, found) if output_loading_info else model

    loader.from_pretrained = draw
    try:
        yield
    finally:
        loader.from_pretrained = own


if __name__ == "__main__":
    build_backbone(Path(sys.argv[1]), sys.argv[2])
