"""An exported adapter gives the run's answers, names no place of the machine, and its card the run's figures."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from biomerge_lib.__main__ import main
from biomerge_lib.apply.adapter_export import export_adapter
from biomerge_lib.core.errors import DataError
from biomerge_lib.model.backbones import backbone_sha256
from biomerge_lib.model.unsloth_lora_ner import load_adapter, load_lora_model
from tests.conftest import ROOT

SHIPPED = ROOT / "biomerge_lib/apply/adapters/bc5cdr-smollm2-135m"


@pytest.fixture
def run(tiny_prepared, tiny_parameters, tmp_path) -> Path:
    """A finished run with a tiny adapter that changes the model."""
    folder = tmp_path / "runs/tiny"
    lora = dict(lora_rank=4, lora_alpha=8, lora_dropout=0.0, token_head=True, head_loss_weight=1.0)
    loading = dict(backend="peft", dtype="float32", gradient_checkpointing=False, max_length=256, seed=0)
    model = load_lora_model(tiny_prepared, **lora, **loading)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    model.save_pretrained(folder / "checkpoints/checkpoint-9")
    note = {"sha256": backbone_sha256(tiny_prepared)}
    (folder / "checkpoints/checkpoint-9/backbone.json").write_text(json.dumps(note))
    corpora = [f"{tmp_path}/bc5cdr_iob", f"{tmp_path}/other"]
    parameters = tiny_parameters(corpora=corpora, tokenizer_dir=f"{tmp_path}/tokenizer")
    (folder / "parameters.yaml").write_text(yaml.safe_dump(parameters.model_dump()))
    scores = dict(precision=0.8, recall=0.7, f1=0.74667, f1_low=0.7, f1_high=0.8)
    metrics = {f"greedy_dev_ner_{name}": value for name, value in scores.items()} | {"greedy_dev_records": 64}
    metrics |= {"best_checkpoint": "checkpoint-9", "steps": 9, "train_seconds": 12.0}
    provenance = {"commit": "abc", "device": "a CPU", "python": "3.11", "versions": {"torch": "2"}}
    stage = {"status": "finished", "metrics": metrics, "provenance": provenance}
    (folder / "metrics.json").write_text(json.dumps({"run_id": "tiny", "stages": {"03_train": stage}}))
    return folder


def test_the_exported_adapter_says_what_the_checkpoint_says(run, tiny_prepared, tmp_path):
    out = export_adapter(run, tmp_path / "mine")
    assert json.loads((out / "backbone.json").read_text()) == {"sha256": backbone_sha256(tiny_prepared)}
    weights = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not any("token_head" in name for name in weights)
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        logits = [
            load_adapter(tiny_prepared, folder, dtype="float32")(input_ids=ids).logits
            for folder in (run / "checkpoints/checkpoint-9", out)
        ]
        plain = load_adapter(tiny_prepared, out, dtype="float32")
        with plain.disable_adapter():
            without = plain(input_ids=ids).logits
    effect = (logits[0] - without).abs().max()
    assert effect > 0.01 and (logits[0] - logits[1]).abs().max() < 0.02 * effect


def test_the_folder_names_no_place_of_the_machine_and_the_card_has_the_figures(run, tmp_path, capsys):
    assert main(["export-adapter", str(run), str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine")
    for name in ("README.md", "biomerge.json", "adapter_config.json"):
        assert str(tmp_path) not in (tmp_path / "mine" / name).read_text()
    card = (tmp_path / "mine/README.md").read_text()
    assert "| dev, transformers | 64 | 0.800 | 0.700 | **0.747** [0.700, 0.800] |" in card
    assert "Public Domain Mark" in card and "not known to BioMerge" in card and "abc" in card
    assert "corpora=[path/to/bc5cdr_iob,path/to/other]" in card


def test_an_unfinished_run_is_not_exported(run, tmp_path):
    (run / "metrics.json").write_text(json.dumps({"stages": {"03_train": {"status": "failed"}}}))
    with pytest.raises(DataError, match="03_train has not finished"):
        export_adapter(run, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_an_export_writes_over_nothing_but_an_earlier_export(run, tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "project/README.md").write_text("by hand")
    monkeypatch.chdir(tmp_path / "project")
    with pytest.raises(DataError, match="project: is there and holds no exported adapter"):
        export_adapter(run, ".")
    assert (tmp_path / "project/README.md").read_text() == "by hand"
    assert export_adapter(run, tmp_path / "mine") == export_adapter(run, tmp_path / "mine")


def test_the_shipped_adapter_is_small_and_says_how_to_ask_it():
    stored = json.loads((SHIPPED / "biomerge.json").read_text())
    assert stored["backbone"] == "smollm2-135m" and stored["offset_anchors"] == "echo_start"
    assert stored["max_input_tokens"] == 512 and stored["max_new_tokens"] == 128
    assert (SHIPPED / "adapter_model.safetensors").stat().st_size < 6e6
    assert "**0.838** [0.830, 0.845]" in (SHIPPED / "README.md").read_text()
