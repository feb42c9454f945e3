"""A run that dies goes on as if it had not; several processes train what one would."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from biomerge_lib.core.errors import BioMergeError
from biomerge_lib.core.records import write_records
from biomerge_lib.experiment.checkpoints import find_damage, find_resumable_checkpoint, seal_checkpoint
from biomerge_lib.training import launch
from biomerge_lib.training.training_order import StepSampler
from tests.conftest import ROOT, make_tiny_parameters
from tests.support.forked_training import train

CALLBACKS = "biomerge_lib.training.trainer_callbacks"
DEEPSPEED = ROOT / "parameters" / "deepspeed"
CURVE = ("loss", "eval_loss", "eval_ner_f1", "greedy_dev_ner_f1", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def make_run(tiny_backbone, sample_records, tmp_path_factory):
    """A run folder on 24 short sentences, ready to train in a process of its own."""
    from biomerge_lib.model.backbones import build_tokenizer

    place = tmp_path_factory.mktemp("resume")
    build_tokenizer(str(tiny_backbone), place / "tok")
    short = [record for record in sample_records["train"] if len(record.text) < 90 and record.spans]
    for split, chosen in (("train", short[:24]), ("dev", short[24:28]), ("test", short[28:32])):
        write_records(place / f"data/{split}.jsonl", chosen)

    def make(name: str, **overrides) -> Path:
        values = {
            "run_id": name,
            "backbone": str(tiny_backbone),
            "tokenizer_dir": str(place / "tok"),
            "backbones_dir": str(place / "backbones"),
            "data_dir": str(place / "data"),
            "backend": "peft",
            "num_train_epochs": 2.0,
            "per_device_train_batch_size": 4,
            "eval_steps": 2,
            "save_steps": 2,
            "early_stopping_patience": 100,
        }
        parameters = make_tiny_parameters(place, **values | overrides)
        folder = Path(parameters.runs_dir) / name
        folder.mkdir(parents=True)
        (folder / "parameters.yaml").write_text(yaml.safe_dump(parameters.model_dump()))
        return folder

    return make


@pytest.fixture(scope="module")
def one(make_run) -> Path:
    """What one process makes of a run without dropout, which several must make, too."""
    folder = make_run("one", lora_dropout=0.0)
    train(folder)
    return folder


def curve(folder: Path) -> list[tuple]:
    history = json.loads((folder / "log_history.json").read_text())
    return [(entry["step"], name, entry[name]) for entry in history for name in CURVE if name in entry]


def last_weights(folder: Path) -> dict:
    return load_file(find_resumable_checkpoint(folder / "checkpoints") / "adapter_model.safetensors")


@pytest.mark.integration
def test_a_killed_run_resumes_to_the_same_curve_metrics_and_weights(make_run):
    whole, killed = make_run("whole"), make_run("killed")
    train(whole)
    # With the run going on from checkpoint to checkpoint, each moment comes about at the step that is named.
    for moment in (
        f"{CALLBACKS}:seal_checkpoint:1",  # 2: a checkpoint that is whole and not sealed
        "transformers.trainer:Trainer._save_optimizer_and_scheduler:1",  # 4: a torn one
        f"{CALLBACKS}:EpochEndEvaluation._greedy_pass:1",  # 6: between an epoch's checkpoint and its greedy pass
        f"{CALLBACKS}:SteadySpeed.on_step_end:{(step := random.SystemRandom().randrange(1, 6))}:after",
    ):
        train(killed, kill_at=moment)
        assert not (killed / "training.json").exists()
    assert "going on from" in train(killed)
    assert curve(killed) == curve(whole), f"killed {step} steps after the sixth"
    assert [entry for entry in curve(whole) if entry[1] == "loss"][-1][0] == 12
    ours, theirs = last_weights(killed), last_weights(whole)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    kept = ("eval_ner_f1", "greedy_dev_ner_f1", "train_loss", "steps", "best_checkpoint")
    results = [json.loads((folder / "training.json").read_text()) for folder in (killed, whole)]
    assert {name: results[0][name] for name in kept} == {name: results[1][name] for name in kept}


@pytest.mark.integration
def test_a_torn_newest_checkpoint_is_passed_over_with_a_warning(make_run):
    folder = make_run("torn")
    train(folder, kill_at=f"{CALLBACKS}:SteadySpeed.on_step_end:7:after")
    newest = find_resumable_checkpoint(folder / "checkpoints")
    assert newest.name == "checkpoint-6"
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    output = train(folder)
    assert "checkpoint-6 is damaged (optimizer.pt is missing or not as it was written)" in output
    assert re.search(r"going on from \S+checkpoint-[24]\n", output)  # the last two and the best are kept
    assert json.loads((folder / "training.json").read_text())["steps"] == 12


@pytest.mark.slow
@pytest.mark.integration
def test_two_processes_train_what_one_does_at_the_same_global_batch(make_run, one):
    two = make_run("two", per_device_train_batch_size=2, lora_dropout=0.0, num_processes=2)
    train(two)
    # The mean of eval_loss goes by batch in the Trainer, so it depends on how the batches are dealt.
    ours, theirs = ([entry for entry in curve(run) if entry[1] != "eval_loss"] for run in (two, one))
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    for (step, name, value), (_, _, expected) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-3), (step, name)


@pytest.mark.slow
@pytest.mark.integration
def test_deepspeed_trains_what_one_process_does_and_goes_on_from_its_checkpoint(make_run, one):
    """Both files, in bfloat16, offloading to the CPU as on a GPU; ZeRO-3 deals the weights out over two processes.

    Each goes on training behind the first epoch's greedy pass, for which ZeRO-3 gathers the weights.
    """
    expected = losses(one)
    assert len(expected) == 12
    common = {"dtype": "bfloat16", "lora_dropout": 0.0, "eval_steps": 8, "save_steps": 8}
    zero2 = make_run("zero2", deepspeed=str(DEEPSPEED / "zero2_offload.json"), **common)
    train(zero2, ranks=1)
    assert losses(zero2) == pytest.approx(expected, rel=3e-3)
    zero3 = make_run(
        "zero3",
        deepspeed=str(DEEPSPEED / "zero3_offload.json"),
        num_processes=2,
        per_device_train_batch_size=2,
        eval_limit=3,  # of which one process has two, the other one
        per_device_eval_batch_size=1,
        **common,
    )
    train(zero3, ranks=2)
    whole = losses(zero3)
    assert whole == pytest.approx(expected, rel=3e-3)
    assert all(values.numel() for values in last_weights(zero3).values())  # gathered again
    (zero3 / "training.json").unlink()
    shutil.rmtree(find_resumable_checkpoint(zero3 / "checkpoints"))
    assert re.search(r"going on from \S+checkpoint-[68]\n", train(zero3, ranks=2))
    assert losses(zero3) == pytest.approx(whole, rel=1e-3)


def losses(folder: Path) -> list[float]:
    return [value for _, name, value in curve(folder) if name == "loss"]


def test_every_way_a_checkpoint_can_be_damaged_is_seen(tmp_path):
    import torch
    from safetensors.torch import save_file

    def make(step: int) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.zeros(50)}, folder / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"x": torch.zeros(50)}, folder / name)
        (folder / "trainer_state.json").write_text('{"global_step": 1}')
        return folder

    good = make(2)
    assert find_damage(good) is None
    for step, name in enumerate(
        ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt"), start=10
    ):
        folder = make(step)
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert find_damage(folder) is not None, name
    names = (
        "trainer_state.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    )
    for step, name in enumerate(names, start=20):
        (make(step) / name).unlink()
        assert name.split(".")[0] in find_damage(tmp_path / f"checkpoint-{step}")
    for step, name in enumerate(names, start=30):
        seal_checkpoint(make(step))
        assert find_damage(tmp_path / f"checkpoint-{step}") is None
        path = tmp_path / f"checkpoint-{step}" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert find_damage(path.parent) == f"{name} is missing or not as it was written"
    assert find_resumable_checkpoint(tmp_path) == good
    assert find_resumable_checkpoint(tmp_path / "none") is None


def test_the_order_of_examples_depends_on_seed_and_epoch_only():
    lengths = [(index * 37) % 101 + 5 for index in range(403)]

    def order(epoch, seed=1, step_size=8):
        sampler = StepSampler(lengths, step_size=step_size, seed=seed, group_lengths=True)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(0)
    assert sorted(first) == list(range(403))
    assert first == order(0) and first != order(1) and first != order(0, seed=2)
    assert order(0, step_size=1000) and sorted(order(0, step_size=1000)) == list(range(403))
    steps = [first[start : start + 8] for start in range(0, 400, 8)]
    assert max(lengths[index] for index in steps[0]) == max(lengths)
    padding = sum(8 * max(lengths[i] for i in step) - sum(lengths[i] for i in step) for step in steps)
    assert padding / sum(lengths) < 0.08


def test_packed_steps_are_shuffled_with_the_largest_first():
    lengths = [(index * 37) % 101 + 5 for index in range(403)]
    sampler = StepSampler(lengths, step_size=8, seed=1, group_lengths=False)
    first = list(sampler)
    assert sorted(first) == list(range(403)) and first == list(sampler)
    sums = [sum(lengths[index] for index in first[start : start + 8]) for start in range(0, 400, 8)]
    assert sums[0] == max(sums)
    spread = [
        max(lengths[i] for i in first[s : s + 8]) - min(lengths[i] for i in first[s : s + 8]) for s in (8, 16)
    ]
    assert min(spread) > 30  # lengths are mixed


def test_each_process_gets_about_as_many_tokens_of_the_same_steps():
    lengths = [40 + 7 * (index * 37 % 41) for index in range(330)]
    alone, together = (
        list(StepSampler(lengths, step_size=128, seed=3, group_lengths=False, parts=parts))
        for parts in (1, 4)
    )
    for start in (0, 128):
        step = together[start : start + 128]
        assert sorted(step) == sorted(alone[start : start + 128])
        tokens = [sum(lengths[index] for index in step[part : part + 32]) for part in range(0, 128, 32)]
        assert max(tokens) < 1.02 * min(tokens)
        unbalanced = [
            sum(lengths[index] for index in alone[start + part : start + part + 32])
            for part in range(0, 128, 32)
        ]
        assert max(unbalanced) > 1.05 * min(unbalanced)
    assert together[256:] == alone[256:]  # an incomplete step is dealt by the data loader


@pytest.mark.integration
def test_a_process_that_is_killed_under_torchrun_is_named(tiny_parameters, tmp_path, monkeypatch):
    kill = "import os\nif os.environ.get('LOCAL_RANK') == '1': os.kill(os.getpid(), 9)\n"
    (tmp_path / "sitecustomize.py").write_text(kill)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "prepare_backbone", lambda *places: None)
    (tmp_path / "run").mkdir()
    with pytest.raises(BioMergeError, match=r"process 1 of 2 .* signal 9 \(Killed\).*newest checkpoint"):
        launch.train_run(tmp_path / "run", tiny_parameters(num_processes=2))
