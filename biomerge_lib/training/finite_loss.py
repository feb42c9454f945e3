"""Knows when a training's loss is no number: a loss --[FiniteLoss]--> the batch in a file, and the end."""

from __future__ import annotations

from pathlib import Path

import torch

from biomerge_lib.core.errors import ModelError


class FiniteLoss:
    """Stops a training whose loss is no number, with the batch in a file.

    Looking at a loss waits for it, so on a GPU each is looked at when the next pass has been launched.
    """

    def __init__(self, folder: Path, learning_rate: float):
        self.folder = folder
        self.learning_rate = learning_rate
        self._launched: tuple | None = None

    def watch(self, loss: torch.Tensor, batch: dict, step: int) -> None:
        """Take note of a pass's loss.

        Raises:
            ModelError: the pass before (without a GPU: this one) gave no finite loss.
        """
        if not loss.is_cuda:
            self._check(loss, batch, step)
            return
        on_host = torch.empty((), dtype=loss.dtype, pin_memory=True)
        on_host.copy_(loss, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.finish()
        self._launched = (arrived, on_host, batch, step)

    def finish(self) -> None:
        """Look at the last pass's loss.

        Raises:
            ModelError: it is not finite.
        """
        if self._launched:
            arrived, *seen = self._launched
            arrived.synchronize()
            self._check(*seen)

    def _check(self, loss: torch.Tensor, batch: dict, step: int) -> None:
        if torch.isfinite(loss):
            return
        path = self.folder / f"bad_batch_step{step}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: value for name, value in batch.items() if torch.is_tensor(value)}, path)
        raise ModelError(
            f"the loss is {float(loss)} at step {step}; the batch is in {path}. Lower learning_rate "
            f"({self.learning_rate}) or set dtype=float32 to find the cause."
        )
