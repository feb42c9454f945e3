"""What holds on a CUDA card: `make gpu-test`. Each way of training trains, resumes, decodes and merges there, alike.

Four processes, three of them for PEFT, train every combination once (train_on_card.py); each test looks at what they
wrote.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from biomerge_lib.core.errors import ModelError
from biomerge_lib.model.probe import probe_training
from tests.conftest import ROOT
from tests.gpu.train_on_card import COMBINATIONS, STEPS, name_of
from tests.model.families import FAMILIES
from tests.model.test_probe import IDS, build

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).with_name("train_on_card.py")
NAMES = [name_of(combination) for combination in COMBINATIONS]
RELATIVE = 0.02  # of a loss in bfloat16, between two ways of computing it, over the first 20 steps


@pytest.fixture(scope="session")
def results(tiny_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What train_on_card.py wrote, by combination; four processes train side by side."""
    import torch

    assert torch.cuda.is_available(), "these tests want a CUDA card: PyTorch sees none"
    out = tmp_path_factory.mktemp("card")
    processes = []
    for backend, *part in (("unsloth", "0", "1"), ("peft", "0", "3"), ("peft", "1", "3"), ("peft", "2", "3")):
        command = [
            sys.executable,
            "-m",
            "tests.gpu.train_on_card",
            backend,
            str(tiny_prepared),
            str(out),
            *part,
        ]
        with (out / f"{backend}.log").open("a") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    for process in processes:
        process.wait(timeout=600)
    found = {name: out / f"{name}.json" for name in NAMES}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        if path.is_file()
        else {"error": (out / f"{name.partition('-')[0]}.log").read_text(encoding="utf-8")[-3000:]}
        for name, path in found.items()
    }


@pytest.fixture(params=NAMES)
def result(request: pytest.FixtureRequest, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = results[request.param]
    assert "error" not in found, found["error"]
    return found


def test_every_allowed_pair_is_trained():
    names = list(COMBINATIONS[0])
    seen = {
        pair
        for combination in COMBINATIONS
        for pair in itertools.combinations(sorted((name, combination[name]) for name in names), 2)
    }
    values = {name: {combination[name] for combination in COMBINATIONS} for name in names}
    wanted = {
        ((one, x), (other, y))
        for one, other in itertools.combinations(sorted(names), 2)
        for x in values[one]
        for y in values[other]
    }
    refused = {
        pair
        for pair in wanted - seen
        if (
            "graphed" in str(dict(pair).get("step_launch"))
            and (True in dict(pair).values() or False in dict(pair).values())
        )
        or (dict(pair).get("backend") == "unsloth" and "compiled" in str(dict(pair).get("step_launch")))
    }
    assert wanted - seen - refused == set()


def test_the_loss_falls_and_every_layer_trains(result):
    losses = result["losses"]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    assert result["unmoved"] == []


def test_layers_train_and_are_checkpointed_where_they_should(results):
    for combination in COMBINATIONS:
        found = results[name_of(combination)]
        assert "error" not in found, found["error"]
        recomputing = [[True, True]] if combination["gradient_checkpointing"] else []
        assert found["trained_as"] == [[True, False], *recomputing], name_of(combination)


def test_a_resumed_run_goes_on_with_the_same_losses(result):
    assert result["resumed_losses"][-STEPS // 2 :] == pytest.approx(
        result["losses"][-STEPS // 2 :], rel=RELATIVE
    )


def test_the_merged_model_says_what_the_checkpoint_says(result):
    assert result["relative_change"] < 0.5
    assert len(result["answers"]) == 8


def test_the_probe_finds_nothing_but_rounding(result):
    found = {name: value for name, value in result["metrics"].items() if name.startswith("probe_")}
    assert (
        0
        < max(found["probe_padded"], found.get("probe_packed", 0))
        < found["probe_tolerance"]
        < found["probe_leak"]
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_familys_packed_rows_are_what_the_table_says_of_them(family):
    """In bfloat16 by the card's own kernel."""
    for packing in (False, True):
        model = build(family.model_type, dtype="bfloat16").to("cuda")
        if packing and not (family.packs and family.packs_on_card):
            with pytest.raises(ModelError, match=r"(?i)set packing=false"):
                probe_training(model, IDS, packing=True, dtype="bfloat16")
        else:
            probe_training(model, IDS, packing=packing, dtype="bfloat16")


def test_speed_and_memory_are_measured(result):
    assert result["metrics"]["steady_tokens_per_second"] > 0
    assert result["metrics"]["peak_memory_gb"] > 0


@pytest.mark.parametrize("head", [True, False])
def test_all_ways_train_the_same_weights_with_the_same_losses(results, head):
    """Backend, packing, checkpointing and launch change how a step is computed, and not what."""
    names = [name_of(c) for c in COMBINATIONS if c["fast_metrics"] is head]
    first = results[
        f"peft-{'head' if head else 'headless'}-packed-{'checkpointed' if head else 'kept'}-eager"
    ]
    for name in names:
        found = results[name]
        assert "error" not in found, found["error"]
        assert found["shapes"] == first["shapes"], name
        # Padded batches group sentences by length: another order.
        if "packed" in name:
            assert found["losses"][:20] == pytest.approx(first["losses"][:20], rel=RELATIVE), name
