"""A Llama without transformers: the same answers, and only where nothing was added to the architecture."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from biomerge_lib.apply.ready_models import decode_here
from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.plain_llama import load_plain_llama
from biomerge_lib.decoding.predictions import build_prompts
from biomerge_lib.model.unsloth_lora_ner import load_causal_lm
from tests.conftest import START

TEXTS = ["Aspirin can trigger asthma attacks in sensitive patients .", "Nausea followed .", "None ."]


@pytest.fixture
def folder(tiny_prepared, tmp_path):
    return shutil.copytree(tiny_prepared, tmp_path / "model")


def draw_weights(folder, **changed):
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(folder, num_hidden_layers=3, num_key_value_heads=1, **changed)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_answers_as_transformers_does(folder, tokenizer, tied, batch_size):
    """Of padded and unpadded prompts: token ids, and the log-probabilities of them and the runners-up."""
    draw_weights(folder, tie_word_embeddings=tied)
    prompts = build_prompts([Record(text, (), "d", "x") for text in TEXTS], tokenizer, START)
    limits = {"max_new_tokens": 12, "batch_size": batch_size}
    model = load_causal_lm(folder, dtype="float32")
    expected = greedy_decode(model, tokenizer, prompts, **limits, progress=None)
    assert load_plain_llama(folder, eos_token_id=1)
    _, answer = decode_here(folder, **limits)
    for ours, theirs in zip(answer(prompts), expected, strict=True):
        assert (ours.token_ids, ours.text, ours.finish) == (theirs.token_ids, theirs.text, theirs.finish)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.margins == pytest.approx(theirs.margins, abs=1e-4)


def test_it_ends_when_all_rows_but_those_it_may_leave_have_written_eos(folder):
    draw_weights(folder, tie_word_embeddings=False)
    rows, mask = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    llama = load_plain_llama(folder, eos_token_id=-1)
    ids, logprobs = llama.decode(rows, mask, max_new_tokens=6)
    assert (ids.shape, logprobs.shape) == ((2, 6), (2, 6, 2))
    one, other = ids.tolist()
    llama.eos_token_id = one[2]
    assert llama.eos_token_id not in one[:2] + other
    assert llama.decode(rows, mask, max_new_tokens=6)[0].tolist() == ids.tolist()
    assert llama.decode(rows, mask, max_new_tokens=6, leave=1)[0].tolist() == ids[:, :3].tolist()


@pytest.mark.parametrize(
    "changed",
    [
        {"architectures": ["Qwen2ForCausalLM"]},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"num_hidden_layers": 3},
    ],
)
def test_other_models_are_left_to_transformers(folder, changed):
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(said | changed), encoding="utf-8")
    assert load_plain_llama(folder, eos_token_id=1) is None


def test_broken_weights_are_named_as_ever(folder):
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    assert lost.shape == (128, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 lacking, as model\.layers\.1\.mlp\.up_proj\.weight"):
        decode_here(folder, max_new_tokens=4, batch_size=1)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cannot read it"):
        decode_here(folder, max_new_tokens=4, batch_size=1)
