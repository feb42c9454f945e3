"""Backbones of other families than Llama go the whole way: tokenizer, resize, training, merge."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.records import write_records
from biomerge_lib.experiment.checkpoints import best_checkpoint
from biomerge_lib.model.backbones import build_tokenizer, prepare_backbone
from biomerge_lib.model.merging import merge_checkpoint
from biomerge_lib.model.unsloth_lora_ner import choose_lora_layers, load_causal_lm
from biomerge_lib.prompts.prompt import encode
from biomerge_lib.prompts.tokenizer import load_tokenizer
from biomerge_lib.training.launch import train_run
from tests.conftest import ASPIRIN, MANIFEST, START
from tests.model.families import FAMILIES, SHAPE

pytestmark = pytest.mark.integration
LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def make_parameters(plain_tokenizer, tiny_parameters, sample_records, tmp_path):
    """A folder with a random model of a family, 01_tokenizer run on it, and the parameters of its training."""

    def make(family: str):
        folder = tmp_path / family
        torch.manual_seed(0)
        values = SHAPE | next(known.config for known in FAMILIES if known.model_type == family)
        config = AutoConfig.for_model(family, vocab_size=len(plain_tokenizer), **values)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        plain_tokenizer.save_pretrained(folder)
        build_tokenizer(str(folder), tmp_path / "tok")
        short = [record for record in sample_records["train"] if len(record.text) < 90 and record.spans]
        for split, chosen in (("train", short[:8]), ("dev", short[8:10])):
            write_records(tmp_path / f"data/{split}.jsonl", chosen)
        return tiny_parameters(
            backbone=str(folder),
            tokenizer_dir=str(tmp_path / "tok"),
            backbones_dir=str(tmp_path / "backbones"),
            data_dir=str(tmp_path / "data"),
            backend="peft",
            eval_limit=2,
            lora_dropout=0.0,
            learning_rate=0.02,
            per_device_train_batch_size=8,  # all of them in a step
            num_train_epochs=3.0,
        )

    return make


def train_family(parameters) -> tuple[list[float], Path, dict]:
    """The losses of a training, its run folder and its metrics."""
    run = Path(parameters.runs_dir) / parameters.run_id
    run.mkdir(parents=True)
    metrics = train_run(run, parameters)
    history = json.loads((run / "log_history.json").read_text())
    return [line["loss"] for line in history if "loss" in line], run, metrics


@pytest.mark.parametrize(
    ("family", "architecture", "layers"),
    [
        ("qwen2", "Qwen2ForCausalLM", LLAMA_LAYERS),
        ("gemma", "GemmaForCausalLM", LLAMA_LAYERS),
        ("gemma3_text", "Gemma3ForCausalLM", LLAMA_LAYERS),
        ("phi3", "Phi3ForCausalLM", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ],
)
def test_a_family_trains_packed_as_padded_and_merges(make_parameters, family, architecture, layers):
    parameters = make_parameters(family)
    losses, run, metrics = train_family(parameters)
    padded, _, _ = train_family(parameters.model_copy(update={"run_id": "padded", "packing": False}))
    assert len(losses) == 3 and losses[2] < losses[0] - 0.1
    assert losses == pytest.approx(padded, abs=2e-3)
    checkpoint = best_checkpoint(run, metrics)
    adapted = [name for name in load_file(checkpoint / "adapter_model.safetensors") if "lora_A" in name]
    assert len(adapted) == 2 * len(layers)
    assert set(json.loads((checkpoint / "adapter_config.json").read_text())["target_modules"]) == layers
    backbone = prepare_backbone(parameters.backbone, parameters.tokenizer_dir, parameters.backbones_dir)
    prompt_ids = encode(ASPIRIN, load_tokenizer(backbone), START).prompt_ids
    check = merge_checkpoint(
        backbone, checkpoint, run / "merged", dtype="float32", manifest=MANIFEST, probe_ids=prompt_ids
    )
    assert check.same_answer and check.max_logit_difference < 1e-4
    assert type(load_causal_lm(run / "merged", dtype="float32")).__name__ == architecture


@pytest.mark.parametrize(
    ("family", "backend", "words"),
    [
        ("phi3", "unsloth", r"Phi3ForCausalLM: .* also have qkv_proj, gate_up_proj, .*Set backend=peft"),
        ("phi", "unsloth", r"PhiForCausalLM: .* also have dense, fc1, fc2, "),
        ("gpt2", "peft", r"GPT2LMHeadModel: .* no torch.nn.Linear"),
    ],
)
def test_layers_that_would_get_no_lora_are_refused(family, backend, words):
    config = AutoConfig.for_model(family, vocab_size=64, **SHAPE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=words):
        choose_lora_layers(model, backend=backend)


@pytest.mark.parametrize(
    ("family", "words"),
    [("gemma2", "Gemma2Attention soft-caps"), ("qwen3_5_text", "Qwen3_5ForCausalLM: its packed forward")],
)
def test_a_family_that_packed_rows_would_change_trains_padded(make_parameters, family, words):
    parameters = make_parameters(family)
    with pytest.raises(ModelError, match=rf"{words}.*Set packing=false"):
        train_family(parameters)
    losses, _, metrics = train_family(parameters.model_copy(update={"run_id": "padded", "packing": False}))
    assert losses[2] < losses[0] - 0.1
    assert metrics["probe_padded"] < metrics["probe_tolerance"] < metrics["probe_leak"]
    assert "probe_packed" not in metrics
