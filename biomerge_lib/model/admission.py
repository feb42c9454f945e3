"""Knows whether a backbone's files can be one here, by ``config.json`` and the files' first bytes; loads no weights.

backbone --[find_source]--> folder or GGUF file --[read_source]--> its configuration, or a refusal
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, read_values

GGUF, POINTER = ".gguf", b"version https://git-lfs"
# Of tests/model/families.py, which docs/backbones.md shows.
TRIED = (  # noqa: SIM905
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text phi3 phi granite cohere cohere2 olmo2 olmo3 "
    "smollm3 starcoder2 glm4 exaone4 stablelm nemotron mixtral qwen3_moe olmoe gpt_oss qwen3_5_text qwen3_next jamba "
    "bamba lfm2 falcon_h1 nemotron_h olmo_hybrid"
).split()
# ...ForCausalLM of transformers whose parts are not called `model` and `lm_head`.
BUILT_OTHERWISE = (  # noqa: SIM905
    "BigBird BioGpt Bloom Camembert CodeGen CpmAnt Data2VecText Dbrx Electra Ernie Falcon FalconMamba GPTBigCode GPTJ "
    "GPTNeo GPTNeoX GPTNeoXJapanese Git Mamba Mamba2 MegatronBert Mpt Musicgen MusicgenMelody ProphetNet "
    "RemBert RoCBert RoFormer Roberta RobertaPreLayerNorm Rwkv TrOCR Whisper XLMRoberta XLMRobertaXL Xmod xLSTM"
).split()


def find_source(backbone: str) -> Path | None:
    """A backbone's folder or GGUF file on this machine; None where it has none (yet)."""
    path = Path(backbone).expanduser()
    if path.is_dir() or path.suffix == GGUF:
        return path if path.exists() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(backbone, "config.json")
    except HFValidationError:  # a path
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def read_source(source: Path) -> dict[str, Any]:
    """What ``config.json`` says of a causal LM that can be trained here; nothing where there is none.

    Raises:
        ModelError: a file was not downloaded as a whole, or the model is quantised, no causal LM, built otherwise than
            what is trained here, reads images, or brings its own code.
    """
    for path in [source] if source.suffix == GGUF else source.glob("model*.safetensors"):
        with path.open("rb") as stream:
            problem = "a pointer of git-lfs" if stream.read(len(POINTER)) == POINTER else None
        try:
            if path.suffix != GGUF and not problem:
                safe_open(path, "np")  # compares the file's length with its header
        except SafetensorError as error:
            problem = str(error)
        if problem:
            raise ModelError(f"{path}: incomplete download ({problem}). Fetch this file again.")
    names = ("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "config.json")
    index, *_, config = (_read_object(source / name) for name in names)
    shards = set(index.get("weight_map", {}).values())
    if missing := sorted(name for name in shards if not (source / name).is_file()):
        raise ModelError(f"{source}: incomplete download ({', '.join(missing)} missing). Fetch it again.")
    if problem := _find_problem(config):
        raise ModelError(f"{source / 'config.json'}: {problem} (docs/backbones.md)")
    return config


def _read_object(path: Path) -> dict[str, Any]:
    cure = " Incomplete download? Fetch this file again."
    return read_values(path, OBJECT, cure=cure, raises=ModelError) if path.is_file() else {}


def _find_problem(config: Mapping[str, Any]) -> str | None:
    kind = next(iter(config.get("architectures") or []), "")
    family, model_type = kind.removesuffix("ForCausalLM"), config.get("model_type", "")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "an unnamed method")
        return f"its weights are quantised ({method}). Take the unquantised model, which can be resized and trained."
    is_known = model_type in TRIED or find_spec(f"transformers.models.{model_type.removesuffix('_text')}")
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}) and not is_known:
        return f"{kind} brings its own code (trust_remote_code), which is not run. Take one of transformers."
    if config.get("is_encoder_decoder"):
        return f"{kind} is an encoder-decoder. Take a causal LM."
    if "vision_config" in config or "audio_config" in config:
        return f"{kind} reads images or sound. Take a causal LM that reads text alone."
    if "LMHead" in kind or family in BUILT_OTHERWISE:
        return f"{kind} has no `.model` and `.lm_head`, which is what is trained here. Take one as Llama."
    if kind and family == kind:
        return f"{kind} is no causal LM. Take the model of this family whose name ends in ForCausalLM."
    return None
