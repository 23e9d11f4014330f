"""How a forward pass is run: as it is, through torch.compile, or as a CUDA graph. What it computes is the same."""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from burnish.sampling.plan import DecodePlan
from burnish.sampling.state import BlockState, Layout, advance, lay_out, settle, summary, wanted_tokens
from burnish.sampling.token_model import Prompt, TokenCache, TokenModel, visible
from burnish.sampling.unmask import likeliest

LOOKED_INTO: ContextVar[bool] = ContextVar("passes are looked into", default=False)


@contextmanager
def without_graphs() -> Iterator[None]:
    """Inside, passes run as they are, in the shapes of graphs: nobody can look into a graph, and to wait for the
    device while one is recorded is an error.
    """
    token = LOOKED_INTO.set(True)
    try:
        yield
    finally:
        LOOKED_INTO.reset(token)


@dataclass
class Buffers:
    """Everything that stays in place from call to call, so that graphs may refer to it."""

    prompt: Prompt
    cache: TokenCache
    state: BlockState
    graphs: dict[Hashable, tuple["torch.cuda.CUDAGraph", Tensor]] = field(default_factory=dict)
    pool: Any = None


_CAPTURES: dict[int, "torch.cuda.Stream"] = {}
"""By device: graphs of one pool want one stream. PyTorch's own is of the device that came first, and elsewhere records
nothing."""


class Passes:
    """Runs the forward passes of a plan over one model."""

    def __init__(self, model: TokenModel, plan: DecodePlan):
        self.model, self.plan = model, plan
        self._whole = torch.compile(model.whole, dynamic=False) if plan.compile else model.whole
        self._extend = torch.compile(model.extend, dynamic=False) if plan.compile else model.extend

    def static(self, device: torch.device) -> bool:
        """True where shapes come from a short list."""
        return self.plan.compile or self._can_graph(device)

    def graphed(self, device: torch.device) -> bool:
        return self._can_graph(device) and not LOOKED_INTO.get()

    def _can_graph(self, device: torch.device) -> bool:
        return device.type == "cuda" and self.plan.graph is not False

    def blocks(self, fed: int, device: torch.device) -> int:
        """Blocks to feed when `fed` are needed: that many, or the next of a short list where shapes are static.

        The list is 1, 2, 3, 4, 6, 8, 12 for graphs and 1, 2, 4, 8 for torch.compile, which gives up after eight shapes.
        """
        if not self.static(device):
            return fed
        size = 1
        while size < fed:
            size += size if self.plan.compile else 1 << max(0, size.bit_length() - 2)
        return min(size, self.model.length // self.plan.block)

    def first(self, buffers: Buffers, layout: Layout, blocks: int) -> Tensor:
        """The pass over the prompt and the first `blocks` blocks together; returns the summary for the next one."""
        return self._run(("first", blocks), buffers, partial(self._first, buffers, layout, blocks))

    def next(self, buffers: Buffers, layout: Layout, blocks: int, slots: int, wanted: int) -> Tensor:
        """A pass over `blocks` blocks behind the cached ones; returns the summary for the next one.

        `slots` action slots are in use and the logits of `wanted` tokens are needed; static shapes ignore both.
        """
        count = blocks * self.plan.block
        if self.static(buffers.state.ids.device):
            slots, wanted = self.model.length, count
        wanted = min(count, wanted + int(bool(self.plan.shift)))
        return self._run(("next", blocks), buffers, partial(self._next, buffers, layout, count, slots, wanted))

    def _first(self, buffers: Buffers, layout: Layout, blocks: int) -> Tensor:
        plan, state, prompt, cache = self.plan, buffers.state, buffers.prompt, buffers.cache
        ids, positions, seen = lay_out(state, layout, plan, blocks * plan.block)
        mask = visible(prompt.valid, seen[:, :, : ids.shape[1]])
        logits = self._whole(prompt, ids, mask, cache, see_actions=self.model.prompt_sees_actions)
        if plan.shift:
            carry_ids, carry_confidence = likeliest(cache.prompt_logits, plan)
            state.carry_ids.copy_(carry_ids)
            state.carry_confidence.copy_(carry_confidence)
        settle(state, layout, plan, positions, *likeliest(logits, plan))
        advance(state, layout, plan)
        return summary(state, layout, plan)

    def _next(self, buffers: Buffers, layout: Layout, count: int, slots: int, wanted: int) -> Tensor:
        plan, state, cache = self.plan, buffers.state, buffers.cache
        ids, positions, seen = lay_out(state, layout, plan, count)
        mask = visible(buffers.prompt.valid, seen[:, :, :slots])
        if wanted == count:
            best, confidence = likeliest(self._extend(ids, positions, mask, cache), plan)
        else:
            read = wanted_tokens(state, layout, plan, positions, wanted)
            some, some_confidence = likeliest(self._extend(ids, positions, mask, cache, read=read), plan)
            best = torch.zeros_like(ids).scatter_(1, read, some)
            confidence = some_confidence.new_zeros(ids.shape).scatter_(1, read, some_confidence)
        settle(state, layout, plan, positions, best, confidence)
        advance(state, layout, plan)
        return summary(state, layout, plan)

    def _run(self, key: Hashable, buffers: Buffers, work: Callable[[], Tensor]) -> Tensor:
        if not self.graphed(buffers.state.ids.device):
            return work()
        if key not in buffers.graphs:
            buffers.pool = buffers.pool or torch.cuda.graph_pool_handle()
            buffers.graphs[key] = _capture(buffers.state, work, buffers.pool)
        graph, outcome = buffers.graphs[key]
        graph.replay()
        return outcome


def _capture(state: BlockState, work: Callable[[], Tensor], pool: Any) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    """A CUDA graph of `work`. Warming up runs it for real, so the state is put back; keys are written twice alike.

    Graphs of one shape share a memory pool: they hand nothing to one another but what lies in `Buffers`.
    """
    before = state.clone()

    def warm() -> None:
        work()
        state.copy_(before)

    return record(state.ids.device, work, warm, pool)


def record(
    device: torch.device, work: Callable[[], Tensor], warm: Callable[[], Any], pool: Any = None
) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    """A CUDA graph of `work`, and the tensor that it writes; `warm` runs twice before, and copies what is constant."""
    cached, collecting = torch.is_autocast_cache_enabled(), gc.isenabled()
    torch.set_autocast_cache_enabled(False)  # weights cast there are freed where autocast ends; a graph would read on
    gc.collect()
    gc.disable()  # an old graph that was collected during a capture would end it
    try:
        with torch.cuda.device(device):
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    warm()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            capture = _CAPTURES.setdefault(torch.cuda.current_device(), torch.cuda.Stream())
            mode = "thread_local"  # other threads use the device
            with torch.cuda.graph(graph, pool=pool, stream=capture, capture_error_mode=mode):
                return graph, work()
    finally:
        torch.set_autocast_cache_enabled(cached)
        if collecting:
            gc.enable()
