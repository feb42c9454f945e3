"""The probe before a training: what the project's forward leaves out of a model, or lets leak, is refused."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from biomerge_lib.core.errors import ModelError
from biomerge_lib.model import span_loss
from biomerge_lib.model.probe import SENTENCES, probe_training
from biomerge_lib.model.reach_ins import attention_of, set_attention
from biomerge_lib.model.span_loss import install_span_loss
from biomerge_lib.model.unsloth_lora_ner import choose_lora_layers, load_causal_lm, load_lora_model
from biomerge_lib.prompts.ner_span import SpanCollator
from biomerge_lib.prompts.prompt import IGNORE
from tests.conftest import ROOT
from tests.model.families import FAMILIES, SHAPE, Family, families_as_markdown
from tests.model.test_forward import OPTIONS

IDS = ([5, 81, 7, 300, 12, 9, 44, 210, 3, 17, 96], [8, 33, 150, 61, 402, 19, 27, 88])
BY_TYPE = {family.model_type: family for family in FAMILIES}


def build(model_type: str, *, dtype: str = "float32", weights: float = 5.0, **config):
    """A random model of a family, its weights large enough for what a token reads to show."""
    torch.manual_seed(0)
    values = SHAPE | BY_TYPE[model_type].config | config
    values = {name: value for name, value in values.items() if value is not ...}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=608, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= weights
    model = model.eval().to(getattr(torch, dtype))
    if getattr(model.config, "attn_logit_softcapping", None):
        set_attention(model, "eager")  # as load_causal_lm does
    install_span_loss(model, head_loss_weight=1.0, max_seq_len=64)
    return model


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_family_is_what_the_table_says(family: Family):
    model = build(family.model_type)
    found = probe_training(model, IDS, packing=False, dtype="float32")
    assert found["padded"] < 1e-5 and found["leak"] > 0.1
    if family.packs:
        assert probe_training(model, IDS, packing=True, dtype="float32")["packed"] < 1e-5
    else:
        with pytest.raises(ModelError, match=r"(?i)set packing=false"):
            probe_training(model, IDS, packing=True, dtype="float32")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_family_answers_in_a_batch_as_alone(family: Family):
    model, padding = build(family.model_type), len(IDS[0]) - len(IDS[1])
    batch = torch.tensor([IDS[0], [0] * padding + IDS[1]])
    mask = torch.tensor([[1] * len(IDS[0]), [0] * padding + [1] * len(IDS[1])])
    alone = model.generate(torch.tensor([IDS[1]]), max_new_tokens=4, do_sample=False)
    together = model.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert together[1, len(IDS[0]) :].tolist() == alone[0, len(IDS[1]) :].tolist()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_what_lora_trains_of_a_family_is_what_is_merged(family: Family):
    model = build(family.model_type)
    layers = choose_lora_layers(model, backend="peft")
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=layers))
    examples = [{"input_ids": [*ids], "labels": [*ids], "token_labels": [IGNORE] * len(ids)} for ids in IDS]
    batch = SpanCollator(0)(examples)
    adapted(**batch)["loss"].backward()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                assert parameter.grad.any(), name
                parameter.normal_(0, 0.1)
        trained = adapted.eval()(input_ids=batch["input_ids"][:1]).logits
        merged = adapted.merge_and_unload()(input_ids=batch["input_ids"][:1]).logits
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=1e-3)
    if family.unsloth:
        assert choose_lora_layers(model, backend="unsloth") == layers
    else:
        with pytest.raises(ModelError, match=r"its layers also have .* Set backend=peft"):
            choose_lora_layers(model, backend="unsloth")


def test_the_page_of_backbones_has_the_families_as_they_are():
    page = (ROOT / "docs/backbones.md").read_text(encoding="utf-8")
    assert families_as_markdown() in page, "`python -m tests.model.families` writes the table"


@pytest.mark.parametrize("model_type", ["llama", "gemma", "granite", "mixtral", "gemma3_text"])
def test_rounding_alone_is_no_difference(model_type):
    found = probe_training(build(model_type, dtype="bfloat16"), IDS, packing=True, dtype="bfloat16")
    assert 0 < found["packed"] < found["tolerance"] == 0.022 < found["leak"]


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_5_text", "gpt_oss", "falcon_h1"])
def test_a_leak_shows_through_bfloat16s_rounding(model_type):
    with pytest.raises(
        ModelError, match=r"its packed forward differs from the model's own by .*Set packing=false"
    ):
        probe_training(build(model_type, dtype="bfloat16"), IDS, packing=True, dtype="bfloat16")


@pytest.mark.parametrize("model_type", ["granite", "cohere", "falcon_h1"])
def test_a_scale_of_the_logits_that_the_loss_would_leave_out_is_refused(model_type, monkeypatch):
    monkeypatch.setattr(span_loss, "_logit_scale", lambda config: 1.0)
    with pytest.raises(ModelError, match="its padded forward differs from the model's own by"):
        probe_training(build(model_type), IDS, packing=False, dtype="float32")


def test_an_attention_that_drops_a_cap_or_sinks_is_refused():
    capped = build("gemma2", attn_logit_softcapping=1.0, query_pre_attn_scalar=1)
    assert probe_training(capped, IDS, packing=False, dtype="float32")["padded"] < 1e-5
    capped.own_attention = "sdpa"
    with pytest.raises(ModelError, match="its padded forward differs from the model's own by"):
        probe_training(capped, IDS, packing=False, dtype="float32")


def test_a_capped_model_is_loaded_with_an_attention_that_caps(tmp_path):
    build("gemma2").save_pretrained(tmp_path)
    assert attention_of(load_causal_lm(tmp_path, dtype="float32")) == "eager"


def test_an_adapter_and_the_five_rows_change_nothing_before_training(tiny_prepared, tokenizer):
    model = load_lora_model(tiny_prepared, token_head=True, **OPTIONS)
    ids = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    found = probe_training(model, ids, packing=True, dtype="float32")
    assert max(found["padded"], found["packed"]) < 1e-5 and attention_of(model.get_base_model()) != "eager"
    assert model.training


def test_weights_too_small_to_show_anything_are_said_to_be():
    found = probe_training(
        build("llama", dtype="bfloat16", weights=0.01), IDS, packing=True, dtype="bfloat16"
    )
    assert found["leak"] < found["tolerance"]


def test_a_pass_that_crashes_is_refused_with_its_cause():
    words = (
        r"StableLmForCausalLM: its packed forward fails on two sentences \(RuntimeError: .*Set packing=false"
    )
    with pytest.raises(ModelError, match=words):
        probe_training(build("stablelm"), IDS, packing=True, dtype="float32")
