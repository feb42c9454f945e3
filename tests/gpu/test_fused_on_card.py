"""Fused LoRA on a card: the code that Inductor makes of it, and whole trainings, beside PEFT's."""

import copy
from functools import cache

import pytest
import torch

from biomerge_lib.model import fused_lora
from biomerge_lib.model.fused_lora import drop, fuse_lora, hashed_mask
from biomerge_lib.model.reach_ins import count_compiled_graphs
from tests.gpu.train_on_card import train_one
from tests.model.test_fused_lora import build as build_random
from tests.model.test_fused_lora import distance, pass_of

pytestmark = pytest.mark.gpu
PLAIN: dict[bool, dict] = {}  # a training by PEFT alone, packed and padded
IDS = torch.randint(0, 50, (4, 96), generator=torch.Generator().manual_seed(1))


def build(**lora):
    return build_random("llama", torch.bfloat16, device="cuda", hidden=256, r=8, **lora)


@cache
def references():
    """Gradients in float32, and PEFT's in bfloat16."""
    model = build()
    _, peft = pass_of(model, IDS)
    return pass_of(copy.deepcopy(model).float(), IDS)[1], peft


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_as_near_to_the_exact_ones_as_pefts(compiled):
    exact, peft = references()
    model = build()
    model.enable_input_require_grads()
    fuse_lora(model)
    before = count_compiled_graphs()
    if compiled:
        torch._dynamo.reset()
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=True, fullgraph=True)
    _, fused = pass_of(model, IDS)
    assert 0 < distance(fused, exact) < max(0.005, 1.2 * distance(peft, exact)) < 0.05
    assert count_compiled_graphs() == before + compiled


def test_a_compiled_mask_is_the_hash_and_keeps_as_many_as_it_should():
    x = torch.full((3000, 4096), 2.0, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for number in (0, 1, -(2**31), 123456789):
        seed = torch.tensor(number, dtype=torch.int32, device="cuda")
        kept = torch.compile(hashed_mask, dynamic=True)(x, seed, 0.05)
        assert torch.equal(kept, hashed_mask(x, seed, 0.05))
        # 12 million draws: five standard deviations are 0.0003
        assert float(kept.double().mean()) == pytest.approx(0.95, abs=0.0004)
    compiled = torch.compile(drop, dynamic=True)
    first, second = compiled(x, 0.05), compiled(x, 0.05)
    assert float(((first == 0) & (second == 0)).double().mean()) == pytest.approx(0.0025, abs=0.0002)
    first.sum().backward()
    assert torch.equal(x.grad == 0, first == 0)
    assert float(x.grad.max()) == pytest.approx(1 / 0.95, rel=0.004)


def test_a_replayed_graph_draws_another_mask():
    x = torch.ones(512, 1024, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(drop, dynamic=True)
    for _ in range(2):
        compiled(x, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dropped = compiled(x, 0.5)
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(dropped.clone() == 0)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        # half a million draws: five standard deviations are 0.003
        assert float((masks[one] & masks[other]).double().mean()) == pytest.approx(0.25, abs=0.004)


@pytest.mark.parametrize(
    "packing, checkpointing, launch",
    [
        (True, False, "compiled_graphed"),
        (True, True, "compiled"),
        (False, False, "eager"),
        (True, False, "graphed"),
    ],
)
def test_a_training_has_the_losses_of_pefts(
    tiny_prepared, tmp_path, monkeypatch, packing, checkpointing, launch
):
    """It also resumes, decodes and merges, in which nothing is left of the groups."""
    ways = {"packing": packing, "gradient_checkpointing": checkpointing, "step_launch": launch}
    combination = {"backend": "peft", "fast_metrics": True} | ways
    if packing not in PLAIN:
        as_is = combination | {"gradient_checkpointing": False, "step_launch": "eager"}
        PLAIN[packing] = train_one(as_is, tiny_prepared, tmp_path / "plain")
    plain = PLAIN[packing]
    monkeypatch.setattr(fused_lora, "DEVICES", ("cuda",))
    fused = train_one(combination, tiny_prepared, tmp_path / "fused")
    assert fused["losses"][:20] == pytest.approx(plain["losses"][:20], rel=0.02)
    assert fused["resumed_losses"][-12:] == pytest.approx(fused["losses"][-12:], rel=0.02)
    assert fused["shapes"] == plain["shapes"] and fused["unmoved"] == []
    assert fused["relative_change"] < 0.5
