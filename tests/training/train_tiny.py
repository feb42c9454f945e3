"""Run apart by test_resume.py: trains the run in RUN_FOLDER; with KILL_AT_STEP it is killed there by SIGKILL."""

import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

from biomerge_lib.experiment.runs import load_run_parameters, quiet_libraries
from biomerge_lib.training import launch
from biomerge_lib.training import run as training


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["KILL_AT_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)


if "KILL_AT_STEP" in os.environ:
    build_trainer = training.build_trainer

    def with_kill(*args, **kwargs):
        trainer = build_trainer(*args, **kwargs)
        trainer.add_callback(Kill())
        return trainer

    training.build_trainer = with_kill

quiet_libraries()
folder = Path(sys.argv[1])
launch.train_run(folder, load_run_parameters(folder))
