"""Knows the moments of a training at which others speak or are told: the job that wants it to stop, W&B, who watches.

an epoch's end --[EpochEndEvaluation]--> F1 and a checkpoint; stop request --[StopOnRequest]--> checkpoint;
logged numbers --[TrackingCallback]--> W&B, --[ProgressBar]--> a bar; steps --[SteadySpeed]--> tokens a second

Of transformers' own: ``enable_jit_checkpoint`` listens for SIGTERM in the training process, which is a notebook's
kernel or one of several processes here, so the request is a file. ``WandbCallback`` renames ``eval_ner_f1``, by
which a sweep ranks, and sends every argument.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from biomerge_lib.core.parameters import Parameters
from biomerge_lib.experiment import jobs, tracking
from biomerge_lib.experiment.checkpoints import seal_checkpoint

if TYPE_CHECKING:
    import wandb

GREEDY_METRIC = "greedy_dev_ner_f1"
WATCH_METRIC = "eval_ner_f1"  # of the reading that watch_metric names


class StopOnRequest(TrainerCallback):
    """Ends training at the first step after a request, with a checkpoint.

    Never at an epoch's last step: the epoch's own evaluation and checkpoint follow there, which a run resumed from
    this step would leave out, so the next step stops. ``stopped_at`` is the step, or None.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        last_of_epoch = state.global_step >= state.max_steps or float(state.epoch).is_integer()
        if _any_process(jobs.stop_requested(), args) and not last_of_epoch:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self.stopped_at == state.global_step and state.is_world_process_zero:
            jobs.note_interrupted(f"checkpoint-{state.global_step} of {state.max_steps} steps")


class EpochEndEvaluation(TrainerCallback):
    """At each epoch's end: the watch metric, a checkpoint, and a greedy pass over dev.

    ``evaluate_greedily`` is None where each evaluation decodes greedily anyway, or nothing is ``watched``: then it is
    the checkpoint alone.
    """

    def __init__(self, stop: StopOnRequest, evaluate_greedily: Callable[[], object] | None, *, watched: bool):
        self.stop = stop
        self.watched = watched
        self.evaluate_greedily = evaluate_greedily

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps  # the curve's last point

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self.stop.stopped_at is not None:
            return  # in the middle of an epoch
        here = (entry for entry in state.log_history if entry["step"] == state.global_step)
        evaluated = any(WATCH_METRIC in entry for entry in here)
        control.should_evaluate = self.watched and not evaluated
        control.should_save = not evaluated if self.watched else state.global_step < state.max_steps
        self._greedy_pass()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Make up for the pass of an epoch whose run ended between its checkpoint and that of the next steps."""
        here = (entry for entry in state.log_history if entry["step"] == state.global_step)
        if float(state.epoch or 0.5).is_integer() and not any(GREEDY_METRIC in entry for entry in here):
            self._greedy_pass()

    def _greedy_pass(self) -> None:
        if self.evaluate_greedily is not None:
            self.evaluate_greedily()


class Seal(TrainerCallback):
    """Seals each checkpoint when it is whole."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # each process has written its own state
        if state.is_world_process_zero:
            seal_checkpoint(Path(cast(str, args.output_dir)) / f"checkpoint-{state.global_step}")


class TrackingCallback(TrainerCallback):
    """Sends the numbers of ``log_history.json`` under the same names, with tokens a second and memory."""

    def __init__(
        self, parameters: Parameters, run_folder: Path, stop: StopOnRequest, count_tokens: Callable[[], int]
    ):
        self.parameters = parameters
        self.run_folder = run_folder
        self.stop = stop
        self.count_tokens = count_tokens
        self._run: wandb.Run | None = None
        self._counted = (0.0, 0)  # when, how many tokens

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._run = tracking.open_wandb_run(self.parameters, self.run_folder)
            self._counted = (time.monotonic(), self.count_tokens())

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if self._run is None:
            return
        numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        if "loss" in numbers:
            (then, before), self._counted = self._counted, (time.monotonic(), self.count_tokens())
            numbers["tokens_per_second"] = (self._counted[1] - before) / (self._counted[0] - then)
            if torch.cuda.is_available():
                numbers["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self._run.log(numbers, step=state.global_step)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self._run is None:
            return
        if self.stop.stopped_at:
            self._run.mark_preempting()
        exit_code = jobs.INTERRUPTED if self.stop.stopped_at else 0
        tracking.close_run(self._run, self.run_folder, exit_code=exit_code)
        self._run = None


class SteadySpeed(TrainerCallback):
    """Tokens a second from one step's end to the next, where nothing was compiled, evaluated or saved in between.

    ``count`` gives what the Trainer has done so far: its tokens (a number, or a tensor that need not be ready) and its
    compilations and captures. The first steps, in which the allocator grows, are left out too.
    """

    WARM_STEPS = 5

    def __init__(self, count: Callable[[], tuple[torch.Tensor | int, int]]):
        self.count = count
        self._last: tuple[float, torch.Tensor | int, int] | None = None
        self._steps: list[tuple[float, torch.Tensor | int]] = []  # seconds and tokens

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        before, self._last = self._last, (time.monotonic(), *self.count())
        if before and before[2] == self._last[2]:
            self._steps.append((self._last[0] - before[0], self._last[1] - before[1]))

    def pause(self, *args: Any, **kwargs: Any) -> None:
        self._last = None

    on_epoch_begin = on_evaluate = on_save = pause

    def read(self) -> dict[str, float | int]:
        """``steady_tokens_per_second`` and ``steady_step_ms``, over how many ``steady_steps``; {} without any."""
        steps = self._steps[self.WARM_STEPS :]
        if not steps:
            return {}
        seconds, tokens = sum(step[0] for step in steps), sum(int(step[1]) for step in steps)
        return {
            "steady_tokens_per_second": round(tokens / seconds, 1),
            "steady_step_ms": round(1000 * seconds / len(steps), 1),
            "steady_steps": len(steps),
        }


class ProgressBar(TrainerCallback):
    """A bar with the time left and the last loss, and a line an evaluation, in place of a line a logged step."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            done = {"initial": state.global_step, "total": state.max_steps}
            self._bar = tqdm(desc="training", unit="step", mininterval=2.0, **done)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if self._bar is None:
            return
        if "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        names = ("eval_ner_f1", "eval_answer_ner_f1", "eval_head_ner_f1", "greedy_dev_ner_f1")
        scores = [f"{name} {logs[name]:.3f}" for name in names if name in logs]
        if scores:
            print(f"step {state.global_step} of {state.max_steps}: {', '.join(scores)}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _any_process(asked: bool, args: TrainingArguments) -> bool:
    """Whether any process was asked: all of them must leave at the same step."""
    if args.world_size == 1:
        return asked
    flag = torch.tensor(int(asked), device=args.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)
