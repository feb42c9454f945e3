"""Knows what a finished training says of itself: its metrics, why it ended, and how its two readings of dev agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from biomerge_lib.core.parameters import Parameters
from biomerge_lib.model.adapters import BEGUN_WITH
from biomerge_lib.model.reach_ins import count_recomputing
from biomerge_lib.training.trainer_callbacks import WATCH_METRIC

if TYPE_CHECKING:
    from transformers import TrainerState

    from biomerge_lib.training.trainer import NerTrainer

# The watched one, and the two of one forward pass.
READINGS = (WATCH_METRIC, "eval_answer_ner_f1", "eval_head_ner_f1")


def collect_metrics(trainer: NerTrainer, best: str, seconds: float) -> dict[str, Any]:
    """The metrics of a training that took ``seconds``, the weights of the checkpoint it keeps (``best``) being loaded.

    Dev, where it is watched, has the greedy scores of these weights.
    """
    state, processes = trainer.state, trainer.args.world_size
    greedy = trainer.evaluate_greedily(best) if "dev" in trainer.records else {}
    at_best = [entry for entry in state.log_history if f"checkpoint-{entry['step']}" == best]
    metrics: dict[str, Any] = {
        "watch_metric": trainer.parameters.watch_metric,
        **{name: entry[name] for entry in at_best for name in READINGS if name in entry},
        "train_loss": next(entry["loss"] for entry in reversed(state.log_history) if "loss" in entry),
        **greedy,
        "steps": state.global_step,
        "train_seconds": round(seconds, 2),
        "train_tokens_per_second": round(int(trainer.tokens_seen) * processes / seconds, 1),
        **trainer.speed.read(),
        "train_sentences_per_second": round(trainer.examples_seen * processes / seconds, 2),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "best_checkpoint": best,
        "step_launch": trainer.launch,
        **({"row_tokens": trainer.row_tokens} if trainer.row_tokens else {}),
        **({"init_adapter_sha256": begun} if (begun := getattr(trainer.model, BEGUN_WITH, None)) else {}),
        "checkpointed_layers": count_recomputing(trainer.model.get_decoder().layers),
        **{f"probe_{name}": value for name, value in trainer.probe.items()},
        "stopped_early": state.global_step < state.max_steps,
    }
    if torch.cuda.is_available():
        metrics["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return metrics


def explain_early_stop(parameters: Parameters, state: TrainerState) -> str:
    """Say why a training ended before its last step, and what it keeps."""
    return (
        f"stopped early at step {state.global_step} of {state.max_steps}: {parameters.early_stopping_patience} "
        f"evaluations without a gain of {parameters.early_stopping_threshold} over {WATCH_METRIC} "
        f"(watch_metric={parameters.watch_metric}) {state.best_metric:.3f} "
        f"({Path(state.best_model_checkpoint or '').name}). A higher early_stopping_patience waits longer."
    )


def explain_gap(metrics: dict[str, Any]) -> str:
    """Say whether the watched and the greedy F1 agree within 0.01, and if not, what the greedy answers show."""
    if WATCH_METRIC not in metrics:
        return "dev was trained on: there is nothing to compare."
    fast, greedy = metrics[WATCH_METRIC], metrics["greedy_dev_ner_f1"]
    watched = metrics.get("watch_metric", "token_head")  # a run older than the parameter
    if fast == greedy == 0:
        return "neither reading finds a mention yet: train longer (num_train_epochs, subsample) or raise learning_rate."
    if abs(fast - greedy) <= 0.01:
        return f"{watched} {fast:.3f} and greedy {greedy:.3f} agree within 0.01."
    faults = {
        "answers that are not spans (format)": metrics["greedy_dev_unreadable_rate"],
        "answers cut at max_new_tokens (no EOS)": metrics["greedy_dev_truncated_rate"],
        "offsets outside the text": metrics["greedy_dev_out_of_text_rate"],
        "offsets out of order": metrics["greedy_dev_unsorted_rate"],
    }
    seen = [f"{name}: {rate:.1%} of sentences" for name, rate in faults.items() if rate > 0.005]
    snapped = metrics["greedy_dev_ner_f1_snapped"]
    if snapped - greedy > 0.01:
        seen.append(f"offsets inside the right words but not at their edges (snapped F1 {snapped:.3f})")
    kinds = {
        "answer": "the watch metric gives each token the gold before it, greedy decoding what it wrote itself",
        "token_head": "the head tags each word from its left context, the answer is written after the whole sentence",
        "greedy": "both decode greedily and should agree",
    }
    kind = f"the answers are well-formed, so the two readings differ in kind: {kinds[watched]}"
    cause = "; ".join(seen) or kind
    return f"{watched} {fast:.3f} and greedy {greedy:.3f} differ by {abs(fast - greedy):.3f}: {cause}."
