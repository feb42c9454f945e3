"""Knows the moments of a training at which others speak or are told: the job that wants it to stop, W&B, who watches.

an epoch's end --[EpochEndEvaluation]--> F1 and a checkpoint; stop request --[StopOnRequest]--> checkpoint;
logged numbers --[TrackingCallback]--> W&B, --[LiveView]--> curves, a table, a job's log;
steps --[SteadySpeed]--> tokens a second

Of transformers' own: ``enable_jit_checkpoint`` listens for SIGTERM in the training process, which is a notebook's
kernel or one of several processes here, so the request is a file. ``WandbCallback`` renames ``eval_ner_f1``, by
which a sweep ranks, and sends every argument.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pandas import DataFrame
from transformers import TrainerCallback, TrainerState, TrainingArguments

from biomerge_lib.core.parameters import Parameters
from biomerge_lib.experiment import jobs, tracking
from biomerge_lib.experiment.checkpoints import seal_checkpoint
from biomerge_lib.experiment.execution import kernel_shell

if TYPE_CHECKING:
    import wandb

GREEDY_METRIC = "greedy_dev_ner_f1"
WATCH_METRIC = "eval_ner_f1"  # of the reading that watch_metric names
SHOWN = {
    "loss": "training loss",
    "eval_loss": "dev loss",
    "eval_answer_ner_f1": "answer F1",
    "eval_head_ner_f1": "token head F1",
    "greedy_dev_ner_f1": "greedy F1",
}
# Readable on white and black.
CURVES = {"training loss": "#8a8a8a", "answer F1": "#2a8fd0", "greedy F1": "#c9772b"}
WIDTH, HEIGHT = 560, 150


@dataclass(eq=False)
class StopOnRequest(TrainerCallback):
    """Ends training at the first step after a request, with a checkpoint.

    Never at an epoch's last step: the epoch's own evaluation and checkpoint follow there, which a run resumed from
    this step would leave out, so the next step stops. ``stopped_at`` is the step, or None.
    """

    stopped_at: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        last_of_epoch = state.global_step >= state.max_steps or float(state.epoch).is_integer()
        if _any_process(jobs.stop_requested(), args) and not last_of_epoch:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self.stopped_at == state.global_step and state.is_world_process_zero:
            jobs.note_interrupted(f"checkpoint-{state.global_step} of {state.max_steps} steps")


@dataclass(eq=False)
class EpochEndEvaluation(TrainerCallback):
    """At each epoch's end: the watch metric, a checkpoint, and a greedy pass over dev.

    ``evaluate_greedily`` is None where each evaluation decodes greedily anyway, or nothing is ``watched``: then it is
    the checkpoint alone.
    """

    stop: StopOnRequest
    evaluate_greedily: Callable[[], object] | None
    watched: bool

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


@dataclass(eq=False)
class TrackingCallback(TrainerCallback):
    """Sends the numbers of ``log_history.json`` under the same names, with tokens a second and memory."""

    parameters: Parameters
    run_folder: Path
    stop: StopOnRequest
    count_tokens: Callable[[], int]
    _run: wandb.Run | None = None
    _counted: tuple[float, int] = (0.0, 0)  # when, how many tokens

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


@dataclass(eq=False)
class SteadySpeed(TrainerCallback):
    """Tokens a second from one step's end to the next, where nothing was compiled, evaluated or saved in between.

    ``count`` gives what the Trainer has done so far: its tokens (a number, or a tensor that need not be ready) and its
    compilations and captures. The first steps, in which the allocator grows, are left out too.
    """

    WARM_STEPS: ClassVar = 5

    count: Callable[[], tuple[torch.Tensor | int, int]]
    _last: tuple[float, torch.Tensor | int, int] | None = None
    _steps: list[tuple[float, torch.Tensor | int]] = field(default_factory=list)  # seconds and tokens

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


class LiveView(TrainerCallback):
    """In a notebook, a view that is written anew every two seconds, in place; else a line an evaluation.

    On a terminal and in a job's log a line twice a minute and an evaluation: step, rate, time left, loss or F1.
    """

    _view: Any = None
    _noted_at = 0.0
    _begun: tuple[float, int] | None = None  # when, and at which step, while it trains

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        self._begun, self._shown_at = (time.monotonic(), state.global_step), 0.0
        if kernel_shell() and state.is_world_process_zero:
            from IPython.display import HTML, display

            self._view = display(HTML("training begins"), display_id=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self._view and time.monotonic() > self._shown_at + 2:
            self._show(state)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if not self._begun or not state.is_world_process_zero:
            return
        shown = [name for name in (WATCH_METRIC, *SHOWN) if name in logs and "f1" in name]
        scores = [f"{name} {logs[name]:.3f}" for name in shown]
        if scores and self._view:
            self._show(state)
        elif scores:
            print(f"step {state.global_step} of {state.max_steps}: {', '.join(scores)}")
        is_due = time.monotonic() > self._noted_at + 30 or state.global_step >= state.max_steps
        numbers = [f"loss {logs['loss']:.3f}"] if "loss" in logs and is_due else scores
        if numbers:
            self._noted_at = time.monotonic()
            jobs.note_progress(f"{self._pace(state)}, {', '.join(numbers)}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self._view:
            self._show(state)
        self._view = self._begun = None

    def _show(self, state: TrainerState) -> None:
        from IPython.display import HTML

        self._shown_at = time.monotonic()
        self._view.update(HTML(training_as_html(state.log_history, state.max_steps, self._pace(state))))

    def _pace(self, state: TrainerState) -> str:
        then, first = cast(tuple[float, int], self._begun)
        pace = (time.monotonic() - then) / max(1, state.global_step - first)
        left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
        return f"step {state.global_step:,} of {state.max_steps:,}, {1 / pace:.2f} steps/s, {left} left"


def training_as_html(history: Sequence[Mapping[str, Any]], max_steps: int, said: str) -> str:
    """The numbers logged so far (``state.log_history``): what is ``said``, curves, and the last 20 evaluations."""
    table = DataFrame(history, columns=["step", *SHOWN]).groupby("step", as_index=False).last()
    table = table.rename(columns=SHOWN).dropna(axis=1, how="all")
    lines = []
    for name, colour in CURVES.items():
        points = table.reindex(columns=["step", name]).dropna().to_numpy(float)
        if len(points):
            top = points[:, 1].max() if name == "training loss" else 1
            places = points * [WIDTH / max_steps, -HEIGHT / (top or 1)] + [0, HEIGHT]
            drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            lines.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
            said += f', <b style="color:{colour}">{name} {points[-1, 1]:.3f}</b> (0 to {top:.3g})'
    if "training loss" in table:
        table["training loss"] = table["training loss"].ffill()
    read = [name for name in SHOWN.values() if name in table and name != "training loss"]
    evaluations = table.dropna(subset=read, how="all").tail(20) if read else DataFrame()
    space = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 -3 {WIDTH} {HEIGHT + 6}"'
    curves = base64.b64encode(f"<svg {space}>{''.join(lines)}</svg>".encode()).decode()
    source = f"data:image/svg+xml;base64,{curves}"
    picture = f'<img alt="Curves of what is said below" src="{source}" width="{WIDTH}">'
    rows = evaluations.to_html(index=False, border=0, na_rep="", float_format="{:.4f}".format) if read else ""
    return f"{picture}<p>{said}</p>{rows}"


def _any_process(asked: bool, args: TrainingArguments) -> bool:
    """Whether any process was asked: all of them must leave at the same step."""
    if args.world_size == 1:
        return asked
    flag = torch.tensor(int(asked), device=args.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)
