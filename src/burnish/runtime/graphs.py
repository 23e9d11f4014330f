"""CUDA graphs of a function of tensors, one for each set of shapes, captured when told to and never by a request."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Key = tuple[Any, ...]


@dataclass
class Held:
    """A graph with the buffers that it reads and writes. Nothing else may write them: a replay must not see context
    of another observation.
    """

    graph: Any
    inputs: list[Tensor]
    output: Tensor
    bytes: int


class Graphs:
    """Runs `work` by replay where its shapes were captured, else as it is.

    Args:
        work: a function of tensors to one tensor that neither waits for the device nor copies to it.
        limit: bytes that all graphs together may hold; the one unused for longest goes first.
    """

    def __init__(self, work: Callable[[list[Tensor]], Tensor], limit: int = 2 << 30):
        self.work, self.limit = work, limit
        self.held: OrderedDict[Key, Held] = OrderedDict()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, in a tensor that later calls leave alone."""
        held = self.held.get(shapes(inputs))
        if held is None:
            return self.work(list(inputs))
        self.held.move_to_end(shapes(inputs))
        for buffer, tensor in zip(held.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        held.graph.replay()
        return held.output.clone()

    @torch.no_grad()
    def capture(self, inputs: Sequence[Tensor]) -> None:
        """Capture the shapes of `inputs`, on copies of them. Warming up runs everything that copies constants."""
        key = shapes(inputs)
        if key in self.held:
            return
        device, buffers = inputs[0].device, [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.work(buffers)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        before, graph = torch.cuda.memory_reserved(device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on using the device
            output = self.work(buffers)
        self.held[key] = Held(graph, buffers, output, torch.cuda.memory_reserved(device) - before)
        while len(self.held) > 1 and sum(held.bytes for held in self.held.values()) > self.limit:
            self.held.popitem(last=False)

    def clear(self) -> None:
        """Drop all graphs, whose kernels read the addresses of weights that have gone."""
        self.held.clear()


def shapes(inputs: Sequence[Tensor]) -> Key:
    """What tells two sets of inputs apart for a graph."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
