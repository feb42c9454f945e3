"""Which way steps are launched, and what a graphed pass does with gradients (without a GPU: the choice alone)."""

import pytest
import torch

from biomerge_lib.core.errors import BioMergeError, ModelError, ParameterError
from biomerge_lib.training.batches import build_collator
from biomerge_lib.training.launch import take_gpu
from biomerge_lib.training.run import training_arguments
from biomerge_lib.training.trainer import choose_launch

SMALL, LARGE = 135_000_000, 8_000_000_000


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    "changes, weights, steps, launch",
    [
        ({}, SMALL, 20, "graphed"),
        ({}, SMALL, 1000, "compiled_graphed"),
        ({"trainable": "all"}, SMALL, 1000, "graphed"),
        ({"gradient_checkpointing": True}, SMALL, 1000, "compiled"),
        ({"packing": False}, SMALL, 1000, "compiled"),
        ({}, LARGE, 1000, "compiled"),
        ({}, LARGE, 100, "eager"),
        ({"backend": "unsloth"}, LARGE, 1000, "eager"),
        ({"backend": "unsloth"}, SMALL, 1000, "graphed"),
        ({"num_processes": 2}, SMALL, 1000, "compiled"),
        ({"num_processes": 2}, LARGE, 1000, "compiled"),
        ({"num_processes": 2}, LARGE, 100, "eager"),
        ({"deepspeed": "parameters/deepspeed/zero3_offload.json"}, LARGE, 1000, "eager"),
        ({"step_launch": "eager"}, SMALL, 1000, "eager"),
    ],
)
def test_auto_chooses_by_model_and_length(on_gpu, tiny_parameters, changes, weights, steps, launch):
    assert choose_launch(tiny_parameters(**changes), weights=weights, steps=steps) == launch


def test_without_a_gpu_steps_are_eager_and_graphs_are_refused(monkeypatch, tiny_parameters):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_launch(tiny_parameters(), weights=SMALL, steps=1000) == "eager"
    with pytest.raises(ModelError, match="step_launch=graphed needs a GPU"):
        choose_launch(tiny_parameters(step_launch="graphed"), weights=SMALL, steps=1000)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"packing": False}, "packing=true"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=false"),
        ({"backend": "unsloth", "step_launch": "compiled"}, "backend=peft"),
    ],
)
def test_contradictions_are_refused(tiny_parameters, changes, named):
    with pytest.raises(ParameterError, match=named):
        tiny_parameters(**{"step_launch": "graphed"} | changes)


EXAMPLE = {"input_ids": [1] * 70, "labels": [-100] * 50 + [2] * 20, "token_labels": [0] * 70}


def test_a_graphed_row_has_one_of_few_sizes(tiny_parameters):
    collator = build_collator(tiny_parameters(per_device_train_batch_size=4), 0, "graphed", [30, 70])
    batch = collator([EXAMPLE] * 3)
    assert batch["input_ids"].shape == (1, 256)
    assert batch["targets"].shape == (512,)
    assert batch["cu_seq_lens"].tolist() == [0, 70, 140, 210, 210, 256, 256, 256, 256]


@pytest.mark.parametrize("sentences, multiple", [(8, 256), (32, 512), (128, 1792), (256, 3328)])
def test_large_graphed_rows_have_few_sizes_too(tiny_parameters, sentences, multiple):
    lengths = torch.randint(
        30, 180, (4096,), generator=torch.Generator().manual_seed(0)
    ).tolist()  # mean 104.6
    collator = build_collator(
        tiny_parameters(per_device_train_batch_size=sentences), 0, "compiled_graphed", lengths
    )
    assert collator.row_multiple == multiple
    sizes = {
        -(-sum(lengths[start : start + sentences]) // multiple) for start in range(0, len(lengths), sentences)
    }
    assert len(sizes) <= 4
    assert collator.filler_length == 179


def test_one_process_trains_on_one_gpu_however_many_it_sees(tiny_parameters, tmp_path):
    arguments = training_arguments(tiny_parameters(per_device_train_batch_size=4), tmp_path)
    arguments._n_gpu = 2  # as transformers counts them
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)


def test_each_process_takes_its_own_gpu_before_anything_is_loaded(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    take_gpu()
    assert taken == [1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(BioMergeError, match=r"num_processes=4, but PyTorch sees 2 GPUs here"):
        take_gpu()
