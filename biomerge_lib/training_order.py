"""Knows the order of training examples: by seed and epoch alone, with similar lengths in one optimiser step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

STEPS_A_POOL = 50


class LengthGroupedSampler(Sampler[int]):
    """Shuffles examples so that each optimiser step holds similar lengths, and the steps come in random order.

    Unlike transformers' sampler of that name the order depends on ``seed`` and epoch only, never on how much
    random state was used before: a resumed run sees what the uninterrupted one saw, and two processes see what
    one process with the same global batch sees. The step with the longest example comes first, so that a batch
    that does not fit in memory fails at once.

    Args:
        lengths: tokens of each example.
        step_size: examples an optimiser step, over all processes and accumulation.
    """

    def __init__(self, lengths: Sequence[int], *, step_size: int, seed: int):
        self.lengths = lengths
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool_size = self.step_size * STEPS_A_POOL
        steps: list[list[int]] = []
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lambda index: -self.lengths[index])
            steps += [pool[i : i + self.step_size] for i in range(0, len(pool), self.step_size)]
        # Only the last step may be incomplete; it stays last.
        incomplete = [steps.pop()] if len(steps[-1]) < self.step_size else []
        shuffled = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        if shuffled:
            tokens = [max(self.lengths[index] for index in step) for step in shuffled]
            longest = tokens.index(max(tokens))
            shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
        return iter([index for step in shuffled + incomplete for index in step])
