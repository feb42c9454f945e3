"""Knows whether a backbone's files can be one here, by ``config.json`` and the files' first bytes; loads no weights.

backbone --[find_source]--> folder or GGUF file --[read_source]--> its configuration, or a refusal
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, read_values

GGUF, SHARDS, POINTER = ".gguf", "model.safetensors.index.json", b"version https://git-lfs"
CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
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


class Configuration(BaseModel):
    """What matters here of a ``config.json``."""

    model_config = ConfigDict(protected_namespaces=())
    architectures: list[str] | None = None
    model_type: str = ""
    vocab_size: int | None = None
    context: int | None = Field(default=None, validation_alias=AliasChoices(*CONTEXT))
    experts: int | None = Field(default=None, validation_alias=AliasChoices(*EXPERTS))
    quantization_config: dict[str, Any] | None = None
    auto_map: dict[str, Any] | None = None
    is_encoder_decoder: bool = False
    vision_config: Any = None
    audio_config: Any = None

    def find_problem(self) -> str | None:
        """Why it cannot be trained here, and what to take; None where nothing speaks against it."""
        kind = next(iter(self.architectures or []), "")
        family, part = kind.removesuffix("ForCausalLM"), self.model_type.removesuffix("_text")
        if self.quantization_config:
            method = self.quantization_config.get("quant_method", "an unnamed method")
            return f"its weights are quantised ({method}). Take the unquantised model, which can be trained."
        if "AutoModelForCausalLM" in (self.auto_map or {}) and not (
            self.model_type in TRIED or find_spec(f"transformers.models.{part}")
        ):
            return (
                f"{kind} brings its own code (trust_remote_code), which is not run. Take one of transformers."
            )
        if self.is_encoder_decoder:
            return f"{kind} is an encoder-decoder. Take a causal LM."
        if self.vision_config is not None or self.audio_config is not None:
            return f"{kind} reads images or sound. Take a causal LM that reads text alone."
        if "LMHead" in kind or family in BUILT_OTHERWISE:
            return f"{kind} has no `.model` and `.lm_head`, which is what is trained here. Take one as Llama."
        if kind and family == kind:
            return f"{kind} is no causal LM. Take the model of this family whose name ends in ForCausalLM."
        return None


def find_source(backbone: str) -> Path | None:
    """A backbone's folder or GGUF file on this machine; None where it has none (yet)."""
    path = Path(backbone).expanduser()
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(backbone, "config.json")
    except HFValidationError:  # a path
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def read_source(source: Path) -> Configuration:
    """What ``config.json`` says of a causal LM that can be trained here; nothing where there is none.

    Raises:
        ModelError: a file was not downloaded as a whole, or the model is quantised, no causal LM, built otherwise than
            what is trained here, reads images, or brings its own code.
    """
    cure = " Incomplete download? Fetch this file again."
    for path in [source] if source.is_file() else source.glob("model*.safetensors"):
        with path.open("rb") as stream:
            problem = "a pointer of git-lfs" if stream.read(len(POINTER)) == POINTER else None
        try:
            if path.suffix != GGUF and not problem:
                safe_open(path, "np")  # compares the file's length with its header
        except SafetensorError as error:
            problem = str(error)
        if problem:
            raise ModelError(f"{path}: {problem}.{cure}")
    for name in ("tokenizer.json", "tokenizer_config.json", SHARDS, "config.json"):
        if (source / name).is_file():
            said = read_values(source / name, OBJECT, cure=cure, raises=ModelError)
            missing = [
                shard for shard in said.get("weight_map", {}).values() if not (source / shard).is_file()
            ]
            if missing:
                raise ModelError(f"{source / name} names {missing[0]}, which is missing.{cure}")
    if not (source / "config.json").is_file():
        return Configuration()
    config = read_values(source / "config.json", Configuration, cure=cure, raises=ModelError)
    if problem := config.find_problem():
        raise ModelError(f"{source / 'config.json'}: {problem} (docs/backbones.md)")
    return config
