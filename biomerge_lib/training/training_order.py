"""Knows the order of training examples: by seed and epoch alone; padded ones with similar lengths in one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

STEPS_A_POOL = 50


class StepSampler(Sampler[int]):
    """Shuffles examples; with ``group_lengths`` each optimiser step holds similar lengths, in a random order of steps.

    Unlike transformers' samplers the order depends on ``seed`` and epoch only, never on how much random state was
    used before: a resumed run sees what the uninterrupted one saw, and two processes see what one process with the
    same global batch sees. The largest step comes first, so that a batch that does not fit in memory fails at once.

    Args:
        lengths: tokens of each example.
        step_size: examples an optimiser step, over all processes and accumulation.
        group_lengths: for padded batches; packed rows waste nothing on unequal lengths.
        parts: batches of a step, one a process; each gets about as many tokens, so that none waits for another.
    """

    def __init__(
        self, lengths: Sequence[int], *, step_size: int, seed: int, group_lengths: bool, parts: int = 1
    ):
        self.lengths = lengths
        self.step_size = step_size
        self.seed = seed
        self.group_lengths = group_lengths
        self.parts = parts
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
            pool = order[start : start + pool_size]
            if self.group_lengths:
                pool.sort(key=lambda index: -self.lengths[index])
            steps += [pool[i : i + self.step_size] for i in range(0, len(pool), self.step_size)]
        # Only the last step may be incomplete; it stays last.
        incomplete = [steps.pop()] if len(steps[-1]) < self.step_size else []
        shuffled = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        if shuffled:
            size = max if self.group_lengths else sum  # of a padded batch, of a packed row
            tokens = [size(self.lengths[index] for index in step) for step in shuffled]
            longest = tokens.index(max(tokens))
            shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
        return iter([index for step in [*map(self._deal, shuffled), *incomplete] for index in step])

    def _deal(self, step: list[int]) -> list[int]:
        """A whole step's examples, its parts one behind the other: from the longest down, there and back."""
        if self.parts == 1:
            return step
        shares: list[list[int]] = [[] for _ in range(self.parts)]
        for place, index in enumerate(sorted(step, key=lambda index: -self.lengths[index])):
            turn, part = divmod(place, self.parts)
            shares[-1 - part if turn % 2 else part].append(index)
        return [index for share in shares for index in share]
