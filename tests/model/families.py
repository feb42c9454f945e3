"""The families of causal LMs that were tried, each with a tiny random model: docs/backbones.md has them as a table.

python -m tests.model.families  prints it
"""

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
    """``config`` is what a tiny model wants beside :data:`SHAPE`.

    ``packs``: packed rows keep sentences apart, ``packs_on_card`` by a card's kernel, too;
    ``unsloth``: LoRA reaches all of its linear layers there, too.
    """

    model_type: str
    name: str
    to_know: str = ""
    packs: bool = True
    packs_on_card: bool = True
    unsloth: bool = True
    config: dict[str, Any] = field(default_factory=dict)


READS_ON = "convolutions and linear attention read on from sentence to sentence in a packed row"
MAMBA_LORA = (
    f"{READS_ON}; LoRA leaves Mamba's `out_proj` (and `dt_proj`) as they are, which it reads past the adapter"
)
MASKS = "its attention does not take the description of a packed row"
EXPERTS_STAY = "LoRA leaves the experts as they are and trains attention"
PADDED = {"packs": False, "unsloth": False}
FAMILIES = [
    Family("llama", "Llama, SmolLM2"),
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen 2, Qwen 2.5"),
    Family("qwen3", "Qwen 3"),
    Family("gemma", "Gemma"),
    Family(
        "gemma2",
        "Gemma 2",
        "soft-caps attention scores, which only transformers' plain attention does",
        packs=False,
    ),
    Family(
        "gemma3_text",
        "Gemma 3 (text)",
        "a sentence longer than its sliding window needs `packing=false` on a CPU",
    ),
    Family(
        "gemma4_text",
        "Gemma 4 (text)",
        "heads of 512 numbers need `packing=false` on a card",
        packs_on_card=False,
        unsloth=False,
        config={"vocab_size_per_layer_input": 608},
    ),
    Family("phi3", "Phi 3, Phi 4", "LoRA goes on its fused `qkv_proj` and `gate_up_proj`", unsloth=False),
    Family("phi", "Phi 1, Phi 2", unsloth=False),
    Family(
        "granite",
        "Granite",
        "scales its logits",
        config={"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    ),
    Family("cohere", "Command R", "scales its logits"),
    Family("cohere2", "Command R7B, Command A", "scales its logits"),
    Family("olmo2", "OLMo 2"),
    Family("olmo3", "OLMo 3"),
    Family("smollm3", "SmolLM3"),
    Family("starcoder2", "StarCoder 2", unsloth=False),
    Family("glm4", "GLM 4", unsloth=False),
    Family("exaone4", "EXAONE 4"),
    Family("stablelm", "StableLM", MASKS, packs=False),
    Family("nemotron", "Nemotron 4", MASKS, packs=False),
    Family("mixtral", "Mixtral", EXPERTS_STAY, config=EXPERTS),
    Family("qwen3_moe", "Qwen 3 MoE", EXPERTS_STAY, config=EXPERTS),
    Family("olmoe", "OLMoE", EXPERTS_STAY, config=EXPERTS),
    Family(
        "gpt_oss",
        "gpt-oss",
        f"attention sinks, which packed rows would drop; {EXPERTS_STAY}; published quantised (MXFP4), which is refused",
        packs=False,
        config=EXPERTS,
    ),
    Family("qwen3_5_text", "Qwen 3.5 (text)", READS_ON, **PADDED, config=LINEAR),
    Family("qwen3_next", "Qwen3-Next", f"{READS_ON}; {EXPERTS_STAY}", **PADDED, config=LINEAR | EXPERTS),
    Family(
        "jamba",
        "Jamba",
        MAMBA_LORA,
        **PADDED,
        config={
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    Family("bamba", "Bamba", MAMBA_LORA, **PADDED, config={"attn_layer_indices": [1], **MAMBA}),
    Family(
        "lfm2",
        "LFM2",
        READS_ON,
        **PADDED,
        config={"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    Family(
        "falcon_h1",
        "Falcon-H1",
        f"scales its logits; {MAMBA_LORA}",
        **PADDED,
        config={"mamba_d_ssm": 64, "lm_head_multiplier": 0.5, **MAMBA},
    ),
    Family(
        "nemotron_h",
        "Nemotron-H",
        MAMBA_LORA,
        **PADDED,
        config={
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
    ),
    Family("olmo_hybrid", "OLMo hybrid", READS_ON, **PADDED, config=LINEAR),
]


def families_as_markdown() -> str:
    """The table of docs/backbones.md."""
    lines = ["| family | `model_type` | packed rows | Unsloth | to know |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        packs = "yes" if family.packs else "`packing=false`"
        unsloth = "yes" if family.unsloth else "`backend=peft`"
        lines.append(f"| {family.name} | `{family.model_type}` | {packs} | {unsloth} | {family.to_know} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(families_as_markdown(), end="")
