"""Knows how a training pass reaches the GPU as one CUDA graph for forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from biomerge_lib.model.reach_ins import zero_at_once

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Capture:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    loss: torch.Tensor


@dataclass
class GraphedPass:
    """Calls ``run(batch)`` (forward and backward, returning the loss) as a CUDA graph, one a shape of batch.

    A shape's first two batches run as they are, then it is captured; from then on a pass is a single launch. Gradients
    are added to tensors that stay in place: a parameter without gradient (after ``zero_grad``) starts at zero.
    """

    run: Callable[[Batch], torch.Tensor]
    parameters: Sequence[torch.nn.Parameter]
    _captures: dict[tuple, _Capture | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = list(self.parameters)
        self._gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> torch.Tensor:
        self._attach_gradients()
        shape = tuple((name, *values.shape) for name, values in sorted(batch.items()))
        capture = self._captures.get(shape)
        if capture is None:
            loss = self._run_as_it_is(batch)
            # Right behind a pass, so that nothing is compiled or set up within a capture; computes nothing itself.
            self._captures[shape] = self._capture(batch) if shape in self._captures else None
            return loss
        for name, values in capture.batch.items():
            values.copy_(batch[name])
        capture.graph.replay()
        return capture.loss.clone()

    def count_captures(self) -> int:
        return sum(capture is not None for capture in self._captures.values())

    def _attach_gradients(self) -> None:
        if self.parameters[0].grad is None:
            zero_at_once(self._gradients)
            for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
                parameter.grad = gradient

    def _run_as_it_is(self, batch: Batch) -> torch.Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self.run(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _capture(self, batch: Batch) -> _Capture:
        static = {name: values.clone() for name, values in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # thread_local: the data loader's thread, which pins memory meanwhile, must not spoil the capture.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            loss = self.run(static)
        return _Capture(graph, static, loss)
