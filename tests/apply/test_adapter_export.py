"""An exported adapter gives the run's answers, names no place of the machine, and its card the run's figures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from biomerge_lib.__main__ import main
from biomerge_lib.apply.adapter_export import export_adapter
from biomerge_lib.apply.tagger import load_tagger
from biomerge_lib.core.errors import DataError, ModelError
from biomerge_lib.core.files import file_sha256
from biomerge_lib.core.parameters import check_parameters
from biomerge_lib.core.records import Record, write_records
from biomerge_lib.core.spans import format_spans
from biomerge_lib.corpora.conversion import write_corpus
from biomerge_lib.decoding.predictions import (
    Prompt,
    RawAnswer,
    collect_predictions,
    read_predictions,
    write_predictions,
)
from biomerge_lib.experiment.provenance import data_hashes
from biomerge_lib.model.backbones import backbone_sha256
from biomerge_lib.model.unsloth_lora_ner import load_adapter, load_lora_model
from biomerge_lib.prompts.manifest import write_manifest
from biomerge_lib.prompts.ner_span import describe_model
from biomerge_lib.prompts.prompt import Chunk
from biomerge_lib.prompts.tokenizer import load_tokenizer
from biomerge_lib.training.preflight import PreflightError, check_training
from biomerge_lib.training.run import build_model, build_trainer, train
from tests.conftest import ROOT, spans_of

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
    places = {"data_dir": "bc5cdr/ner", "tokenizer_dir": f"{tmp_path}/tokenizer"}
    parameters = tiny_parameters(**places, corpora=["sample"])  # 03's default, whatever it trains on
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
    assert "Public Domain Mark" in card and "abc" in card
    assert "corpora=[path/to/bc5cdr]" in card and "corpora=[sample]" not in card
    write_corpus(["sample"], tmp_path / "data")
    given = yaml.safe_load((run / "parameters.yaml").read_text()) | {"data_dir": str(tmp_path / "data")}
    (run / "parameters.yaml").write_text(yaml.safe_dump(given))
    told = json.loads((run / "metrics.json").read_text()) | {"data": data_hashes(tmp_path / "data")}
    (run / "metrics.json").write_text(json.dumps(told))
    card = (export_adapter(run, tmp_path / "again") / "README.md").read_text()
    assert "corpora=[sample]" in card and "path/to/bc5cdr" not in card


@pytest.fixture
def cued(run, tmp_path):
    """The run with data of several corpora, each asked for by its cue."""

    def train_on(*names):
        data = tmp_path / "-".join(names)
        records = [Record(f"{name} reads TP53 .", ((0, len(name)),), name, name) for name in names]
        for split in ("train", "dev", "test"):
            write_records(data / f"{split}.jsonl", records)
        (data / "data_card.json").write_text('{"command": "python -m union --data path/to/corpora"}')
        given = yaml.safe_load((run / "parameters.yaml").read_text())
        given |= {"data_dir": str(data), "corpus_cue": True}
        (run / "parameters.yaml").write_text(yaml.safe_dump(given))
        told = json.loads((run / "metrics.json").read_text()) | {"data": data_hashes(data)}
        by_corpus = {f"greedy_dev_dataset/{name}/ner_f1": 0.615 for name in names}
        told["stages"]["03_train"]["metrics"] |= by_corpus
        (run / "metrics.json").write_text(json.dumps(told))
        write_manifest(run / "merged", describe_model(check_parameters(given)))
        return run

    return train_on


def test_an_adapter_with_cues_answers_with_each_and_lists_them(
    cued, tiny_backbone, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("BIOMERGE_CACHE", str(tmp_path / "cache"))
    adapter = export_adapter(cued("jnlpba", "bc2gm"), tmp_path / "mine")
    said = json.loads((adapter / "biomerge.json").read_text())
    assert (said["cues"], said["default_cue"]) == (["bc2gm", "jnlpba"], "any")
    (adapter / "biomerge.json").write_text(json.dumps(said | {"backbone": str(tiny_backbone)}))
    assert main(["predict", "--adapter", str(adapter), "--cue"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["any     (the default)", "bc2gm   genes and proteins"] and len(lines) == 3
    assert main(["predict", "--adapter", str(adapter), "--cue", "bc2gn", "TP53 rose."]) == 2
    assert "cue=bc2gn is none of any, bc2gm, jnlpba. Did you mean 'bc2gm'" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()  # nothing was merged for that
    asked = []

    def answer(prompts):
        asked.extend(tagger.tokenizer.decode(prompt.prompt_ids) for prompt in prompts)
        return [RawAnswer([], " 0-4", "eos") for _ in prompts]

    for cue, head in ((None, "any | TP53"), ("jnlpba", "jnlpba | TP53")):
        tagger = load_tagger(adapter=adapter, cue=cue)
        assert spans_of([replace(tagger, answer=answer).predict("TP53 rose.")]) == [[(0, 4)]]
        assert head in asked[-1]


def test_the_card_of_several_corpora_has_their_cues_scores_and_licences(cued, tmp_path):
    card = (export_adapter(cued("jnlpba", "bc2gm"), tmp_path / "mine") / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "\n| `bc2gm` | genes and proteins |\n| `jnlpba` | proteins, DNA, RNA" in card
    assert "\n| `any`, the default |" in card and "10 % of the training sentences" in card
    assert "bc2gm 0.615, jnlpba 0.615." in card
    assert "Corpus annotations (c) GENIA Project" in card
    assert "```bash\npython -m union --data path/to/corpora\npython -m biomerge_lib run 03_train" in card
    assert "Entities other than genes and proteins; proteins, DNA, RNA" in card
    for other in ("anatem", "my_own"):
        card = (export_adapter(cued("bc2gm", other), tmp_path / other) / "README.md").read_text()
        assert card.startswith("---\nlicense: other\n") and "Do not give this adapter on" in card


def test_a_run_is_compared_with_an_adapter_on_the_records_that_it_was_scored_on(
    run, tiny_backbone, tmp_path, monkeypatch, capsys, caplog, sample_records
):
    monkeypatch.setenv("BIOMERGE_CACHE", str(tmp_path / "cache"))
    adapter = export_adapter(run, tmp_path / "mine")
    said = json.loads((adapter / "biomerge.json").read_text()) | {"backbone": str(tiny_backbone)}
    (adapter / "biomerge.json").write_text(json.dumps(said))
    records = [record for record in sample_records["dev"] if record.spans][:6]
    prompts = [Prompt(number, Chunk(record, 0), []) for number, record in enumerate(records)]
    answers = [RawAnswer([], format_spans(record.spans), "eos") for record in records]
    own = run / "predictions-dev-greedy.jsonl"
    write_predictions(own, collect_predictions(records, prompts, answers))
    recorded = json.loads((run / "metrics.json").read_text())
    recorded["stages"]["04_greedy_dev"] = {"metrics": {"decode_seconds": 3.1}}
    (run / "metrics.json").write_text(json.dumps(recorded))
    command = ["compare", str(adapter), str(run)]
    assert main(command) == 0
    out = capsys.readouterr().out
    told = f"{adapter} answers, once, the 6 dev sentences of {run}"
    assert f"{told}, which took 3 s in 04_greedy_dev\n" in caplog.text
    assert "| 1.0000 | +1.0000 | +1.0000 to +1.0000 | 0.0312 |" in out
    assert f"{run} is better than {adapter} by more than chance." in out.replace("\\", "")
    [kept] = run.glob("predictions-dev-greedy-mine-*.jsonl")
    found = read_predictions(kept)
    assert [(one.text, one.gold) for one in found] == [(one.text, list(one.spans)) for one in records]
    assert all(one.answer_ids[0] for one in found)  # decoded, not copied
    assert main(command) == 0 and caplog.text.count(told) == 1
    write_predictions(own, collect_predictions(records[:5], prompts[:5], answers[:5]))
    assert main(command) == 0 and "the 5 dev sentences" in caplog.text
    assert main(["compare", "shipped", str(own)]) == 2
    assert "shipped answers, greedily, what a run was scored on" in capsys.readouterr().err


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


def test_training_begins_as_the_run_or_its_exported_adapter_ended(
    run, tiny_prepared, tiny_parameters, tmp_path
):
    out = export_adapter(run, tmp_path / "mine")
    same = dict(lora_rank=4, lora_alpha=8, fast_metrics=True)
    ids = torch.arange(1, 40)[None]
    heads, logits = [], []
    for begun_from in (None, run, out):
        parameters = tiny_parameters(init_adapter=begun_from and str(begun_from), **same)
        model = build_model(parameters, tiny_prepared).eval()
        heads.append(model.get_base_model().token_head.modules_to_save["default"].weight)
        with torch.inference_mode():
            logits.append(model(input_ids=ids).logits)
    with torch.inference_mode():
        ended = load_adapter(tiny_prepared, run / "checkpoints/checkpoint-9", dtype="float32")(input_ids=ids)
    assert torch.equal(logits[1], ended.logits) and not torch.allclose(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[1], atol=1e-2, rtol=0)  # exported in bfloat16
    # Training goes on with every weight of the adapter; the exported one has no token head, so that is a fresh one.
    assert sum(p.requires_grad for p in model.parameters()) == sum(
        p.requires_grad for p in build_model(tiny_parameters(**same), tiny_prepared).parameters()
    )
    assert torch.equal(heads[2], heads[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(lora_rank=8), r"lora_rank=4 \(not 8\)"),
        (dict(lora_alpha=16), r"lora_alpha=8 \(not 16\)"),
        (dict(offset_anchors="start"), r"offset_anchors=echo_start \(not start\)"),
        (dict(corpus_cue=True), r"corpus_cue=False \(not True\)"),
        (dict(backbone="/models/other"), r"backbone=smollm2-135m \(not other\)"),
        (dict(init_adapter="nowhere"), "nowhere: no exported adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_preflight(
    run, tiny_prepared, tiny_parameters, tmp_path, changes, says
):
    data = write_corpus(["sample"], tmp_path / "data") and str(tmp_path / "data")
    values = dict(lora_rank=4, lora_alpha=8, data_dir=data, tokenizer_dir=str(tiny_prepared))
    values |= dict(init_adapter=str(run), eval_limit=None)
    assert "training begins with" in str(check_training(tiny_parameters(**values)))
    with pytest.raises(PreflightError, match=says):
        check_training(tiny_parameters(**values | changes))


def test_an_adapter_of_another_shape_or_backbone_is_named(run, tiny_prepared, tiny_parameters, tmp_path):
    out = export_adapter(run, tmp_path / "mine")
    weights = load_file(out / "adapter_model.safetensors")
    name = min(name for name in weights if "lora_A" in name)
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, out / "adapter_model.safetensors")
    parameters = tiny_parameters(init_adapter=str(out), lora_rank=4, lora_alpha=8)
    with pytest.raises(ModelError, match=rf"its weights do not fit, e.g. {name} \(1 of "):
        build_model(parameters, tiny_prepared)
    (out / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: .* Copy or export the adapter anew"):
        build_model(parameters, tiny_prepared)
    (out / "backbone.json").write_text('{"sha256": "another"}')
    with pytest.raises(ModelError, match="was trained on another backbone"):
        build_model(parameters, tiny_prepared)
    (out / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json:1: not JSON"):
        build_model(parameters, tiny_prepared)


def test_the_metrics_know_an_adapter_that_is_gone_when_training_ends(
    run, tiny_prepared, tiny_parameters, tmp_path, sample_records
):
    """They are collected hours after it was read, and what was trained must not be lost over it."""
    out = export_adapter(run, tmp_path / "mine")
    sha256 = file_sha256(out / "adapter_model.safetensors")
    parameters = tiny_parameters(init_adapter=str(out), lora_rank=4, lora_alpha=8, subsample=0.1, run_id="on")
    records = {split: sample_records[split][:8] for split in ("train", "dev")}
    folder = tmp_path / "runs/on"
    folder.mkdir()
    model, tokenizer = build_model(parameters, tiny_prepared), load_tokenizer(tiny_prepared)
    trainer = build_trainer(model, tokenizer, records, parameters, checkpoints=folder / "checkpoints")
    shutil.rmtree(out)
    assert train(trainer, folder)["init_adapter_sha256"] == sha256
