"""The families of causal LMs that were tried, each with a tiny random model: docs/backbones.md has them as a table."""

from dataclasses import dataclass, field
from typing import Any

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


@dataclass(frozen=True)
class Family:
    """``packs``: packed rows keep sentences apart; ``config`` is what a tiny model wants beside :data:`SHAPE`."""

    model_type: str
    name: str
    packs: bool = True
    to_know: str = ""
    config: dict[str, Any] = field(default_factory=dict)


CONVOLVES = "its convolutions and linear attention read on across sentences"
MASKS = "its attention takes no description of packed rows"
REACH = "LoRA does not reach its experts, attention only; preflight says so"
FAMILIES = [
    Family("llama", "Llama, SmolLM2"),
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen 2, Qwen 2.5"),
    Family("qwen3", "Qwen 3"),
    Family("gemma", "Gemma"),
    Family("gemma2", "Gemma 2", False, "it soft-caps attention scores"),
    Family(
        "gemma3_text",
        "Gemma 3 (text)",
        True,
        "on a CPU a sentence longer than its sliding window needs `packing=false`",
    ),
    Family("gemma4_text", "Gemma 4 (text)"),
    Family(
        "phi3",
        "Phi 3",
        True,
        "`backend=peft`: Unsloth puts no LoRA on its fused layers, and training refuses rather than leave them out",
    ),
    Family("phi", "Phi 1, Phi 2", True, "`backend=peft`, as Phi 3"),
    Family("granite", "Granite", config={"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    Family("cohere", "Command R"),
    Family("cohere2", "Command R7B, Command A"),
    Family("olmo2", "OLMo 2"),
    Family("olmo3", "OLMo 3"),
    Family("smollm3", "SmolLM3"),
    Family("starcoder2", "StarCoder 2", True, "`backend=peft`"),
    Family("glm4", "GLM 4", True, "`backend=peft`"),
    Family("exaone4", "EXAONE 4"),
    Family("stablelm", "StableLM", False, MASKS),
    Family("nemotron", "Nemotron 4", False, MASKS),
    Family("mixtral", "Mixtral", True, REACH, EXPERTS),
    Family("qwen3_moe", "Qwen 3 MoE", True, REACH, EXPERTS),
    Family("olmoe", "OLMoE", True, REACH, EXPERTS),
    Family(
        "gpt_oss",
        "gpt-oss",
        False,
        "attention sinks; its published weights are quantised (MXFP4) and refused",
        EXPERTS,
    ),
    Family("qwen3_5_text", "Qwen 3.5 (text)", False, CONVOLVES, LINEAR),
    Family("qwen3_next", "Qwen3-Next", False, CONVOLVES, LINEAR | EXPERTS),
    Family(
        "jamba",
        "Jamba",
        False,
        CONVOLVES,
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    Family("bamba", "Bamba", False, CONVOLVES, {"attn_layer_indices": [1], **MAMBA}),
    Family(
        "lfm2", "LFM2", False, CONVOLVES, {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
    ),
    Family(
        "falcon_h1", "Falcon-H1", False, CONVOLVES, {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5, **MAMBA}
    ),
    Family(
        "nemotron_h",
        "Nemotron-H",
        False,
        CONVOLVES,
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
    ),
    Family("olmo_hybrid", "OLMo hybrid", False, CONVOLVES, LINEAR),
]
