"""A training that is killed at any moment goes on to what it would have been (`pytest --hostile N`; three always run in
tests/training/test_resume.py)."""

from __future__ import annotations

import json

import pytest

from tests.hostile.damage import TRIED
from tests.support.forked_training import train
from tests.training.test_resume import CALLBACKS, curve, make_run  # noqa: F401

TRAINER, STATE = "transformers.trainer:Trainer", "transformers.trainer_callback:TrainerState"
OURS, RUN = "biomerge_lib.training.trainer:NerTrainer", "biomerge_lib.training.run"
# Six steps an epoch, two epochs; a checkpoint after every second step. `:after` is when the call has returned.
MOMENTS = {
    "before the first step": f"{OURS}.training_step:1",
    "in the third step": f"{OURS}.training_step:3",
    "after the fifth step": f"{CALLBACKS}:SteadySpeed.on_step_end:5:after",
    "before an evaluation": f"{TRAINER}.evaluate:2",
    "after an evaluation, before its checkpoint": f"{TRAINER}.evaluate:2:after",
    "before a checkpoint's weights": f"{OURS}.save_model:2",
    "after a checkpoint's weights": f"{OURS}.save_model:2:after",
    "before the optimiser's state": f"{TRAINER}._save_optimizer_and_scheduler:2",
    "after the optimiser's state": f"{TRAINER}._save_optimizer_and_scheduler:2:after",
    "after the random numbers' state": f"{TRAINER}._save_rng_state:2:after",
    "before the Trainer's state": f"{STATE}.save_to_json:2",
    "after the Trainer's state": f"{STATE}.save_to_json:2:after",
    "before older checkpoints go": "transformers.trainer:rotate_checkpoints:4",
    "after older checkpoints went": "transformers.trainer:rotate_checkpoints:4:after",
    "after a checkpoint's seal": f"{CALLBACKS}:seal_checkpoint:2:after",
    "before the first epoch's greedy pass": f"{CALLBACKS}:EpochEndEvaluation._greedy_pass:1",
    "after the first epoch's greedy pass": f"{OURS}.evaluate_greedily:1:after",
    "before the last epoch's greedy pass": f"{CALLBACKS}:EpochEndEvaluation._greedy_pass:2",
    "before the best checkpoint is loaded again": f"{TRAINER}._load_best_model:1",
    "before the metrics are written": f"{RUN}:write_json:2",
}

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def whole(make_run):  # noqa: F811
    folder = make_run("undisturbed")
    train(folder)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(make_run, whole, moment):  # noqa: F811
    TRIED["kills"] += 1
    folder = make_run("-".join(moment.replace("'", "").replace(",", "").split()))
    train(folder, kill_at=MOMENTS[moment])
    assert not (folder / "training.json").exists()
    train(folder)
    assert curve(folder) == curve(whole)
    kept = ("eval_ner_f1", "greedy_dev_ner_f1", "train_loss", "steps", "best_checkpoint")
    results = [json.loads((run / "training.json").read_text()) for run in (folder, whole)]
    assert {name: results[0][name] for name in kept} == {name: results[1][name] for name in kept}
