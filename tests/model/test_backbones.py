"""Backbones are prepared once, merged models equal their adapters, and a wrong folder is named."""

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from biomerge_lib.core.errors import ModelError
from biomerge_lib.model import backbones
from biomerge_lib.model.backbones import backbone_sha256, build_tokenizer, prepare_backbone
from biomerge_lib.model.merging import merge_checkpoint
from biomerge_lib.model.unsloth_lora_ner import (
    load_adapter,
    load_causal_lm,
    load_lora_model,
)
from biomerge_lib.prompts.manifest import Manifest, read_manifest
from biomerge_lib.prompts.prompt import encode
from biomerge_lib.prompts.tokenizer import ADDED_TOKENS, load_tokenizer
from tests.conftest import ASPIRIN, MANIFEST, START


def test_the_five_tokens_are_added_once(tiny_backbone, tmp_path):
    tokenizer, added = build_tokenizer(str(tiny_backbone), tmp_path / "tok")
    again, added_again = build_tokenizer(str(tiny_backbone), tmp_path / "tok")
    assert (added, added_again) == (5, 0)
    assert len(tokenizer) == len(again) == 605
    assert all(len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1 for token in ADDED_TOKENS)
    ids = tokenizer("<NER> x<TAG>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<NER> x<TAG>"
    assert tokenizer.pad_token == tokenizer.eos_token


def test_a_tokenizer_folder_of_another_backbone_is_refused(tiny_backbone, tmp_path):
    build_tokenizer(str(tiny_backbone), tmp_path / "tok")
    with pytest.raises(ModelError, match="set another tokenizer_dir"):
        build_tokenizer("smollm2-135m", tmp_path / "tok")


def test_the_prepared_backbone_keeps_the_old_rows_and_has_room_for_the_new(tiny_backbone, tiny_prepared):
    old = load_causal_lm(tiny_backbone, dtype="bfloat16").get_input_embeddings().weight
    new = load_causal_lm(tiny_prepared, dtype="bfloat16").get_input_embeddings().weight
    assert new.shape[0] == 640 and new.shape[0] % 64 == 0
    torch.testing.assert_close(new[: old.shape[0]], old)


def test_preparing_again_changes_nothing(tiny_backbone, tmp_path):
    build_tokenizer(str(tiny_backbone), tmp_path / "tok")
    folder = prepare_backbone(str(tiny_backbone), tmp_path / "tok", tmp_path / "backbones")
    before = (folder / "model.safetensors").read_bytes(), (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_backbone(str(tiny_backbone), tmp_path / "tok", tmp_path / "backbones") == folder
    assert (
        (folder / "model.safetensors").read_bytes(),
        (folder / "model.safetensors").stat().st_mtime_ns,
    ) == before
    # Made anew elsewhere it is the same file: the new rows are drawn with a fixed seed.
    other = prepare_backbone(str(tiny_backbone), tmp_path / "tok", tmp_path / "elsewhere")
    assert (other / "model.safetensors").read_bytes() == before[0]


def test_jobs_that_want_the_same_new_backbone_wait_for_the_first(tiny_backbone, tmp_path, monkeypatch):
    build_tokenizer(str(tiny_backbone), tmp_path / "tok")
    loaded, load, locked = [], backbones._load_source_model, backbones.locked
    wanting = threading.Semaphore(0)

    def count_and_lock(path):
        wanting.release()
        return locked(path)

    def load_when_all_want_it(backbone):
        loaded.append(backbone)
        if len(loaded) == 1:
            assert all(wanting.acquire(timeout=300) for _ in range(4))
        return load(backbone)

    monkeypatch.setattr(backbones, "locked", count_and_lock)
    monkeypatch.setattr(backbones, "_load_source_model", load_when_all_want_it)
    wanted = (str(tiny_backbone), tmp_path / "tok", tmp_path / "backbones")
    with ThreadPoolExecutor(4) as pool:
        folders = [job.result() for job in [pool.submit(prepare_backbone, *wanted) for _ in range(4)]]
    assert loaded == [str(tiny_backbone)]
    assert folders == [tmp_path / "backbones" / folders[0].name] * 4
    assert not list((tmp_path / "backbones").glob("*.partial"))


def test_wrong_folders_are_named(tiny_backbone, tmp_path):
    with pytest.raises(ModelError, match="01_tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"the model folder has no config\.json, nor a tokenizer"):
        build_tokenizer(str(tmp_path), tmp_path / "tok")
    without_tokens = tmp_path / "without"
    shutil.copytree(tiny_backbone, without_tokens)
    with pytest.raises(ModelError, match="<NER>, <TAG>, <O>, <B>, <I> are missing"):
        load_tokenizer(without_tokens)
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_causal_lm(tmp_path, dtype="float32")
    with pytest.raises(
        ModelError, match=r"no-such/backbone: transformers cannot read it \(.*Without internet"
    ):
        build_tokenizer("no-such/backbone", tmp_path / "tok2")


def test_a_backbone_prepared_with_another_tokenizer_is_refused(tiny_backbone, tmp_path):
    build_tokenizer(str(tiny_backbone), tmp_path / "tok")
    wanted = (str(tiny_backbone), tmp_path / "tok", tmp_path / "backbones")
    folder = prepare_backbone(*wanted)
    other = load_tokenizer(folder)
    other.add_tokens(["<extra>"])
    other.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"prepared with another tokenizer .* Delete that folder"):
        prepare_backbone(*wanted)


@pytest.fixture
def checkpoint(tiny_prepared, tmp_path):
    """A checkpoint whose adapter, new rows and head all differ from their initial values."""
    model = load_lora_model(
        tiny_prepared,
        backend="peft",
        dtype="float32",
        lora_rank=4,
        lora_alpha=8,
        lora_dropout=0.0,
        token_head=True,
        head_loss_weight=1.0,
        gradient_checkpointing=False,
        max_length=256,
        seed=3,
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_of_another_backbone_is_refused(tiny_prepared, checkpoint, tmp_path):
    config = LlamaConfig.from_pretrained(tiny_prepared)
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 2 * config.intermediate_size
    config.head_dim = config.hidden_size // config.num_attention_heads
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(ModelError, match=r"checkpoint is no adapter of the backbone in .*wider"):
        load_adapter(tmp_path / "wider", checkpoint, dtype="float32")


def test_a_checkpoint_of_a_backbone_with_other_weights_is_refused(tiny_prepared, checkpoint, tmp_path):
    note = checkpoint / "backbone.json"
    note.write_text(json.dumps({"sha256": backbone_sha256(tiny_prepared)}))
    assert load_adapter(tiny_prepared, checkpoint, dtype="float32")
    other = load_causal_lm(tiny_prepared, dtype="float32")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 0.01
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"checkpoint was trained on another backbone: .*other holds other"):
        load_adapter(tmp_path / "other", checkpoint, dtype="float32")
    note.unlink()  # as adapters of earlier versions
    assert load_adapter(tmp_path / "other", checkpoint, dtype="float32")


def test_the_merged_model_is_a_plain_llama_equal_to_the_adapter(
    tiny_prepared, tokenizer, checkpoint, tmp_path
):
    ids = encode(ASPIRIN, tokenizer, START).prompt_ids
    check = merge_checkpoint(
        tiny_prepared, checkpoint, tmp_path / "merged", dtype="float32", manifest=MANIFEST, probe_ids=ids
    )
    assert check.max_logit_difference < 1e-3 and check.argmax_agreement == 1.0
    adapter = load_adapter(tiny_prepared, checkpoint, dtype="float32")
    merged = load_causal_lm(tmp_path / "merged", dtype="float32")
    base = load_causal_lm(tiny_prepared, dtype="float32")
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids])).logits for model in (adapter, merged, base)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=1e-3)
    assert (logits[0] - logits[2]).abs().max() > 0.5
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not any("token_head" in name for name, _ in merged.named_parameters())
    assert Manifest.of(read_manifest(tmp_path / "merged"), where=tmp_path) == MANIFEST
    assert len(load_tokenizer(tmp_path / "merged")) == len(tokenizer)


def test_one_merged_row_is_the_weight_plus_the_scaled_product(tiny_prepared, tokenizer, checkpoint, tmp_path):
    merge_checkpoint(
        tiny_prepared, checkpoint, tmp_path / "m", dtype="float32", manifest=MANIFEST, probe_ids=[1, 2, 3]
    )
    adapter = load_adapter(tiny_prepared, checkpoint, dtype="float32")
    layer = adapter.base_model.model.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = load_causal_lm(tmp_path / "m", dtype="float32").model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(merged, layer.base_layer.weight + (8 / 4) * b @ a, atol=1e-5, rtol=1e-4)


def test_no_space_for_the_merged_model_keeps_the_earlier_one(
    tiny_prepared, checkpoint, tmp_path, monkeypatch
):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/keep").write_text("earlier")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(ModelError, match="No space left on device"):
        merge_checkpoint(
            tiny_prepared,
            checkpoint,
            tmp_path / "merged",
            dtype="float32",
            manifest=MANIFEST,
            probe_ids=[1, 2],
        )
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["keep"]
    assert not (tmp_path / "merged.partial").exists()


def test_a_folder_that_is_no_adapter_is_named(tiny_prepared, tmp_path):
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        load_adapter(tiny_prepared, tmp_path, dtype="float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merge_that_loses_the_adapter_is_refused(tiny_prepared, checkpoint, tmp_path, monkeypatch, dtype):
    settings = {"dtype": dtype, "manifest": MANIFEST, "probe_ids": [1, 2, 3, 4]}
    check = merge_checkpoint(tiny_prepared, checkpoint, tmp_path / "merged", **settings)
    assert check.relative_change < (1e-4 if dtype == "float32" else 0.2)
    monkeypatch.setattr("peft.LoraModel.merge_and_unload", lambda model: model.unload())
    with pytest.raises(ModelError, match="changed what the model says"):
        merge_checkpoint(tiny_prepared, checkpoint, tmp_path / "lost", **settings)
    assert not (tmp_path / "lost").exists()


def write_gguf(tokenizer, path: Path) -> Path:
    """A GGUF file of a small Llama with this tokenizer, without weights."""
    from gguf import GGUFWriter

    vocabulary = tokenizer.get_vocab()
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types(
        [3 if token == tokenizer.eos_token else 1 for token in sorted(vocabulary, key=vocabulary.get)]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_any_gguf_file_is_a_backbone_and_what_cannot_be_read_is_named(plain_tokenizer, tmp_path):
    tokenizer = build_tokenizer(str(write_gguf(plain_tokenizer, tmp_path / "tiny.gguf")), tmp_path / "tiny")[
        0
    ]
    text = "Aspirin can trigger asthma attacks"
    assert tokenizer(text)["input_ids"] == plain_tokenizer(text)["input_ids"]
    assert tokenizer.eos_token == "</s>"
    broken = tmp_path / "broken.gguf"
    with pytest.raises(ModelError, match=r"broken\.gguf: no such GGUF file"):
        build_tokenizer(str(broken), tmp_path / "tok")
    broken.write_bytes(b"no GGUF at all, but long enough for a header")
    with pytest.raises(
        ModelError, match=r"broken\.gguf: transformers cannot read it \(.*take another backbone"
    ):
        build_tokenizer(str(broken), tmp_path / "tok")
    assert re.fullmatch(r"broken-[0-9a-f]{6}", backbones.backbone_name(str(broken)))
