"""Preflight counts exactly what training will meet, and refuses what cannot work before a model loads."""

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from biomerge_lib.__main__ import main
from biomerge_lib.core.errors import BioMergeError, DataError, ModelError
from biomerge_lib.core.records import Record, write_records
from biomerge_lib.corpora.conversion import write_corpus
from biomerge_lib.decoding.predictions import build_prompts
from biomerge_lib.prompts.ner_span import build_dataset, read_split
from biomerge_lib.prompts.prompt import encode_completion
from biomerge_lib.training.preflight import PreflightError, check_training, count_steps
from tests.conftest import ROOT, START


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_corpus(["sample"], folder)
    return folder


@pytest.fixture
def check(tiny_parameters, tiny_prepared, tmp_path):
    """check_training on a sentence a split and the tiny tokenizer, with overrides."""

    def run(**overrides):
        values = {
            "data_dir": write_splits(tmp_path / "few"),
            "tokenizer_dir": str(tiny_prepared),
            "eval_limit": None,
        }
        return check_training(tiny_parameters(**{**values, **overrides}))

    return run


def says(preflight, check: str) -> str:
    return "\n".join(
        f"{finding.verdict}: {finding.says}" for finding in preflight.findings if finding.check == check
    )


def write_splits(folder: Path, **splits: list[Record]) -> str:
    everything = {"train": [ASPIRIN], "dev": [CAFFEINE], "test": [Record("No mention", (), "t1", "a")]}
    for split, records in {**everything, **splits}.items():
        write_records(folder / f"{split}.jsonl", records)
    return str(folder)


ASPIRIN = Record("Aspirin helps .", ((0, 7),), "a1", "a")
LONG_WORD = Record("Methylenetetrahydrofolate helps .", ((0, 25),), "a3", "a")
CAFFEINE = Record("Caffeine wakes .", ((0, 8),), "a2", "a")


def test_a_training_of_all_weights_says_what_it_takes(check, tiny_backbone, tiny_prepared, monkeypatch):
    chosen = {"trainable": "all", "backbone": str(tiny_backbone), "backbones_dir": str(tiny_prepared.parent)}
    assert says(check(**chosen | {"trainable": "lora"}), "weights") == ""
    found = says(check(**chosen, learning_rate=3e-4, save_total_limit=2), "weights")
    assert found.startswith("ok: all 0.1 million weights train: 0.0 GB of memory before activations")
    warned = says(check(**chosen, learning_rate=2e-3), "weights")
    assert warned.startswith("warning: learning_rate=0.002 suits LoRA; trainable=all wants about a tenth")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert says(check(**chosen, learning_rate=3e-4), "weights").startswith("warning: all 0.1 million weights")


@pytest.mark.parametrize(
    ("text", "problem"), [("B-Drug O O I-Salt", "tags"), ("1 2 3 4", "running numbers"), ("Eases pain", None)]
)
def test_texts_of_tags_or_numbers_are_warned_about(check, tmp_path, text, problem):
    data_dir = write_splits(tmp_path, train=[Record(text, ((0, 1),), "x", "a")])
    found = says(check(data_dir=data_dir), "train")
    if problem:
        assert f"warning: most words are {problem}, as in '{text}': was the right column read?" in found
    else:
        assert "column" not in found


def test_every_count_is_what_training_meets(check, tokenizer, data_dir):
    limits = {"max_input_tokens": 150, "max_target_tokens": 40, "max_new_tokens": 48}
    scans = check(data_dir=str(data_dir), **limits, offset_anchors="start").scans
    train, dev = scans["train"], scans["dev"]
    records = {split: read_split(data_dir, split) for split in ("train", "dev")}
    prompt_format = replace(START, max_input_tokens=150)
    dataset = build_dataset(records["train"], tokenizer, prompt_format, max_target_tokens=40)
    prompts = build_prompts(records["dev"], tokenizer, prompt_format)
    assert train.records == 448 and train.spans == 1091 and train.empty == 78
    assert train.examples == len(dataset) > 448
    whole = build_dataset(
        records["train"], tokenizer, replace(START, max_input_tokens=9999), max_target_tokens=9999
    )
    assert train.prompt_tokens + train.target_tokens == sum(whole["length"])
    assert train.long_prompts == sum(length > 150 for length in whole["prompt_length"]) > 0
    pieces = Counter(prompt.record_index for prompt in prompts)
    assert dev.records == len(pieces) == 86
    assert dev.chunked == sum(count > 1 for count in pieces.values()) > 0
    answers = [encode_completion(record.spans, tokenizer) for record in records["dev"]]
    assert dev.long_targets == sum(len(answer) > 48 for answer in answers)


def test_steps_are_those_of_the_trainer(check, data_dir):
    found = check(
        data_dir=str(data_dir),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1.5,
        eval_steps=20,
    )
    per_epoch = math.ceil(math.ceil(found.scans["train"].examples / 4) / 2)
    assert f"{math.ceil(1.5 * per_epoch)} optimiser steps" in says(found, "steps")
    assert count_steps(10, batch_size=4, accumulation=1, epochs=2, eval_steps=2) == (6, 4, 2)  # 2 3 4 6
    assert count_steps(10, batch_size=4, accumulation=8, epochs=0.1, eval_steps=500) == (1, 1, 1)
    assert count_steps(100, batch_size=10, accumulation=1, epochs=3, eval_steps=10) == (30, 3, 3)


@pytest.mark.parametrize(("accumulation", "epochs"), [(1, 2), (2, 1.5), (3, 0.4)])
def test_the_trainer_takes_as_many_steps(tmp_path, accumulation, epochs):
    import torch
    from transformers import Trainer, TrainingArguments

    class Line(torch.nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).mean()}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(Line(1, 1), arguments, train_dataset=[{"x": torch.ones(1)}] * 10)
    trainer.train()
    expected = count_steps(10, batch_size=4, accumulation=accumulation, epochs=epochs, eval_steps=500)
    assert trainer.state.global_step == expected[0]


def test_the_sample_corpus_can_train(check, data_dir):
    found = check(data_dir=str(data_dir))
    assert not [finding for finding in found.findings if finding.verdict in ("refused", "warning")]
    assert "EOS is labelled, and 448 answers decode to their spans" in says(found, "answers")
    assert "one corpus (sample 448): no cue needed" in says(found, "cues")
    assert "room for 1,024" not in says(found, "context")  # the tiny backbone is not prepared there
    assert len(str(found).splitlines()) == len(found.findings)


def test_a_missing_or_broken_tokenizer_is_refused(check, tmp_path, plain_tokenizer):
    with pytest.raises(ModelError, match="no tokenizer here"):
        check(tokenizer_dir=str(tmp_path / "nowhere"))
    plain_tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="tokens <NER>, <TAG>, <O>, <B>, <I> are missing"):
        check(tokenizer_dir=str(tmp_path / "plain"))


def test_missing_and_bad_data_are_refused_with_file_and_line(check, tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl: no such file"):
        check(data_dir=str(tmp_path))
    folder = write_splits(tmp_path)
    with (tmp_path / "dev.jsonl").open("a") as lines:
        lines.write(ASPIRIN.to_json().replace("0-7", "0-99") + "\n")
    with pytest.raises(DataError, match=r"dev\.jsonl:2: span 0-99 is not inside the text of 15 characters"):
        check(data_dir=folder)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_split_without_mentions_is_refused(check, tmp_path, split):
    folder = write_splits(tmp_path, **{split: [Record("Nothing here", (), "n", "a")]})
    with pytest.raises(PreflightError, match=rf"no mention in {split}\.jsonl") as error:
        check(data_dir=folder)
    assert isinstance(error.value, BioMergeError) and error.value.preflight.scans["train"].records == 1


def test_a_test_split_without_mentions_matters_only_when_it_is_scored(check, tmp_path):
    folder = write_splits(tmp_path)
    assert "0 mentions" in says(check(data_dir=folder), "test")
    with pytest.raises(PreflightError, match=r"no mention in test\.jsonl"):
        check(data_dir=folder, run_test_eval=True)


def test_limits_that_fit_no_example_are_refused_with_the_first_of_them(check, tmp_path):
    folder = write_splits(tmp_path, train=[LONG_WORD])
    with pytest.raises(PreflightError, match=r"records fit no chunk.*cannot be cut between words") as error:
        check(data_dir=folder, max_input_tokens=16)
    assert "fit no chunk" in says(error.value.preflight, "limits")


def test_everything_wrong_is_told_at_once(check, tmp_path):
    folder = write_splits(tmp_path, train=[ASPIRIN], dev=[Record("Nothing", (), "a1", "a")])
    with pytest.raises(PreflightError) as error:
        check(data_dir=folder)
    assert "no mention in dev.jsonl" in str(error.value) and "1 documents stand in train and in dev" in str(
        error.value
    )


def test_mentions_at_which_no_offset_stands_are_told(check, tmp_path):
    glued = [Record("(Aspirin) helps.", ((1, 8),), "1", "a"), Record("Take codeine.", ((5, 12),), "2", "a")]
    folder = write_splits(tmp_path / "glued", train=glued)
    told = says(check(data_dir=folder, offset_anchors="echo_start"), "anchors")
    assert (
        told.startswith("warning: 100% of some mentions begin or end inside a word")
        and "punctuation=apart" in told
    )
    assert says(check(data_dir=folder, offset_anchors="echo_pieces"), "anchors") == ""
    assert says(check(offset_anchors="start"), "anchors") == ""


def test_leaks_repeats_and_contradictions_are_counted(check, tmp_path):
    other = Record("aspirin  helps .", ((0, 15),), "a3", "a")
    again = Record("Aspirin helps .", ((0, 7),), "a4", "a")
    leak = Record("ASPIRIN helps.", ((0, 7),), "a5", "a")
    found = check(data_dir=write_splits(tmp_path, train=[ASPIRIN, other, again], dev=[leak, CAFFEINE]))
    assert found.scans["train"].repeated == 1 and found.scans["train"].contradicting == 1
    assert "ok: 0 sentences of test also stand in train" in says(found, "leaks")
    assert says(found, "repeats").startswith("warning") and "warning: 1 sentences of dev" in says(
        found, "leaks"
    )


def test_several_corpora_want_a_cue(check, tmp_path):
    b = Record("Aspirin helps .", ((0, 13),), "b1", "b")
    folder = write_splits(tmp_path, train=[ASPIRIN, b], dev=[CAFFEINE, Record("c d", ((0, 1),), "c1", "c")])
    without = check(data_dir=folder)
    assert "train mixes 2 corpora (a 1, b 1)" in says(without, "cues")
    assert without.scans["train"].contradicting == 1
    assert "scored but not trained on: c" in says(without, "cues")
    cued = check(data_dir=folder, corpus_cue=True, cue_dropout=0.0)
    assert cued.scans["train"].contradicting == 0
    assert "warning: c: not in train, so asked with the default cue 'any', which no" in says(cued, "cues")
    assert "note: c: not in train" in says(check(data_dir=folder, corpus_cue=True, default_cue="a"), "cues")


def test_a_context_that_is_too_short_is_refused(check, tiny_backbone):
    backbone = str(tiny_backbone)
    assert "ok: prompt and answer need 832 tokens" in says(check(backbone=backbone), "context")
    with pytest.raises(PreflightError, match=r"need 1,064 tokens, .* has room for 1,024"):
        check(backbone=backbone, max_input_tokens=1000)


def test_literal_tokens_in_the_texts_are_noted(check, tmp_path):
    html = Record("Aspirin in <I>vivo</I> works", ((0, 7),), "h1", "a")
    found = check(data_dir=write_splits(tmp_path, train=[html]))
    assert "1 texts hold a token such as <B> literally" in says(found, "train")


def test_a_gpu_setting_on_a_cpu_is_noted(check, monkeypatch):
    monkeypatch.setattr("biomerge_lib.training.preflight.device_name", lambda: "x86_64 CPU, 2 cores")
    assert says(check(dtype="bfloat16"), "device") == (
        "note: no GPU here (x86_64 CPU, 2 cores), and dtype=bfloat16 is for one: train elsewhere, or runtime=cpu_debug"
    )
    assert says(check(dtype="float32"), "device") == ""
    monkeypatch.setattr("biomerge_lib.training.preflight.device_name", lambda: "1 x NVIDIA H200")
    assert says(check(dtype="bfloat16"), "device") == ""


def test_the_command_prints_the_table_and_its_exit_code_tells(tiny_prepared, tmp_path, capsys):
    words = [
        f"data_dir={write_splits(tmp_path / 'few', train=[LONG_WORD])}",
        f"tokenizer_dir={tiny_prepared}",
    ]
    assert main(["preflight", *words]) == 0
    assert "optimiser steps" in capsys.readouterr().out
    assert main(["preflight", *words, "max_input_tokens=16"]) == 2
    shown = capsys.readouterr()
    assert "refused  limits" in shown.out and "error: training cannot work" in shown.err
    assert main(["preflight", f"data_dir={tmp_path}", words[1]]) == 2


@pytest.mark.integration
def test_no_deep_learning_library_is_imported(data_dir, tiny_prepared):
    program = (
        "import sys; from biomerge_lib.__main__ import main; "
        f"code = main(['preflight', 'data_dir={data_dir}', 'tokenizer_dir={tiny_prepared}']); "
        "print(code, sorted({'torch', 'transformers', 'datasets', 'pandas'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.fixture
def configured(tiny_backbone, tmp_path):
    """A copy of the tiny backbone whose config.json says otherwise, without weights."""

    def make(**values) -> str:
        folder = tmp_path / "configured"
        shutil.copytree(tiny_backbone, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return str(folder)

    return make


def test_dev_that_is_trained_on_is_counted_in_train_and_not_scored(check):
    found = check(train_on="train_dev", keep_checkpoint="last")
    assert says(found, "train").startswith("ok: 2 records of 2 documents") and not says(found, "dev")
    assert "steps on train and dev, the last of which is kept" in says(found, "steps")


def test_a_backbone_that_cannot_be_trained_is_refused_by_its_configuration(check, configured):
    with pytest.raises(PreflightError, match=r"backbone: .*config\.json: its weights are quantised \(gptq\)"):
        check(backbone=configured(quantization_config={"quant_method": "gptq", "bits": 4}))


@pytest.mark.parametrize("name", ["n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx"])
def test_the_longest_context_is_read_by_any_of_its_names(check, configured, name):
    with pytest.raises(PreflightError, match="has room for 700"):
        check(backbone=configured(**{"max_position_embeddings": ..., name: 700}))


def test_a_configuration_without_a_longest_context_is_said(check, configured):
    assert "not checked" in says(check(backbone=configured(max_position_embeddings=...)), "context")


def test_an_untried_family_and_experts_out_of_loras_reach_are_said(check, configured):
    found = says(check(backbone=configured(model_type="flex_olmo", num_experts=8)), "backbone")
    assert "note: flex_olmo models were not tried here" in found and "note: a layer's 8 experts" in found
