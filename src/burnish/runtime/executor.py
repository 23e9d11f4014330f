"""Sampling from a flow-matching policy without LeRobot's loop: encode once, then only what the noisy actions change.

    runtime = Runtime(policy)              # tier exact: bit for bit LeRobot's `sample_actions`
    chunk = runtime.act(batch)             # in the place of policy.act

A tier promises something about its difference to LeRobot's sampler on equal noise, device, type and batch width, see
TIERS; `verify` measures it and `require` refuses a tier that does not keep it.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError, first_line
from burnish.core.types import Batch, Chunk, Draws
from burnish.policies.base import Policy, Stage, require
from burnish.policies.keys import TASK
from burnish.policies.parts import FlowParts
from burnish.runtime.caches import encode
from burnish.runtime.family import Encoded, Family
from burnish.runtime.pi import Pi
from burnish.runtime.smolvla import SmolVLA
from burnish.sampling.kept import Kept, signature
from burnish.sampling.passes import LOOKED_INTO, record
from burnish.sampling.solvers import make_solver
from burnish.sampling.steering import Guide, Steering

Solver = Callable[..., Tensor]
"""From a velocity (of points [B, T, A_model] and a flow time) and noise to actions; steered, it also takes what
corrects its directions, see sampling.solvers.
"""


@dataclass(frozen=True)
class Tier:
    """How a model is run, and how far from LeRobot's own sampler it may come out.

    Args:
        relative: norm of the difference over that of LeRobot's chunk, float32 weights; 0 means equal bits.
        half: the same where the policy's weights are bf16.
        spread: of a tier that computes in bf16: root mean square of the difference in units of the policy's own
            sampling spread (instead of `relative`); 0 for the others.
        fused, compiled, bf16: what is done.
    """

    relative: float = 0.0
    half: float = 0.0
    spread: float = 0.0
    fused: bool = False
    compiled: bool = False
    bf16: bool = False


TIERS = {
    "exact": Tier(),
    "fused": Tier(1e-5, 5e-3, fused=True),
    "compiled": Tier(1e-5, 5e-3, fused=True, compiled=True),
    "bf16": Tier(spread=0.05, fused=True, bf16=True),
}
"""exact: LeRobot's arithmetic, operation for operation; hoisted, on buffers, dead work dropped. fused: merged
projections, PyTorch's attention, padding dropped. compiled: `fused`, a step through torch.compile. bf16: `fused` on a
copy of the policy in bf16.
"""
FAMILIES: dict[str, type[Family]] = {"smolvla": SmolVLA, "pi": Pi}
log = logging.getLogger("burnish")
BUCKET = 16
"""Prompts are filled up to a multiple of so many tokens where shapes must come from a short list."""


class Sampler:
    """The executor on a model's own inputs, for callers that have no burnish policy (LeRobot's commands).

    Args:
        solver: see Solver; None means the Euler steps of the policy's config, as LeRobot takes them.
        graph: on a GPU, replay every shape after its first call as one CUDA graph; `solver` then computes alone.
        kept: what was computed from the same pictures and text is found again there, without a graph.
    """

    def __init__(self, parts: FlowParts, tier: str = "exact", solver: Solver | None = None, graph: bool = True,
                 kept: Kept | None = None):  # fmt: skip
        if tier not in TIERS:
            raise BurnishError(f"tier '{tier}'", f"one of {', '.join(TIERS)}")
        graph = graph and kept is None and next(parts.model.parameters()).device.type == "cuda"
        self.tier, self.lerobot, self.solver, self.kept = tier, parts, solver, kept
        self.graphs = Graphs(self._work) if graph else None
        self._signature = signature(parts.model)
        self._build()

    def _build(self) -> None:
        tier = TIERS[self.tier]
        self.parts = self.lerobot.in_bf16() if tier.bf16 else self.lerobot
        static = tier.compiled or self.graphs is not None  # a prompt of another length would be traced anew
        self.family = FAMILIES[self.parts.family](self.parts, fused=tier.fused, static=static)
        self.velocity = self.family.velocity
        if self.kept is not None:
            self.family.keeps, self.family.embed_image = True, self.kept.views(self.parts.embed_image)
        if tier.compiled:
            more = {"cpp_wrapper": True} if self.graphs is None else {}  # a small step is mostly launches
            self.velocity = torch.compile(self.family.velocity, dynamic=False, fullgraph=True, options=more)

    def refresh(self) -> None:
        """Follow weights that have changed; graphs read the addresses of the old ones and go."""
        if TIERS[self.tier].bf16 and (found := signature(self.lerobot.model)) != self._signature:
            self._signature = found
            self._build()
        if self.family.refresh() and self.graphs is not None:
            self.graphs.clear()

    def encode(self, inputs: Sequence[Any]) -> Encoded:
        """The observation of `inputs`, as LeRobot's `sample_actions` takes them."""
        self.refresh()
        inputs = self._trimmed(inputs) if self.family.static else inputs
        if self.kept is None:
            return self.family.encode(inputs)
        self.kept.begin(self.lerobot.model)
        return encode(self.kept, self.family, inputs, exact=not TIERS[self.tier].fused)

    def sample(
        self, encoded: Encoded, noise: Tensor, committed: Tensor | None = None, guide: Guide | None = None
    ) -> Tensor:
        """Actions [B, T, A_model] from `noise` of that shape.

        Args:
            encoded: an observation; it may be sampled from again.
            committed: [B, P, A_model] that the first rows are to arrive at, on straight lines from their noise.
            guide: real-time chunking, of a mode that changes velocities alone (not "trained").
        """
        solver = self.solver or make_solver(f"euler:{self.parts.steps}")
        if TIERS[self.tier].compiled:  # what the trace would otherwise put together inside, and guard
            with torch.no_grad():
                self.family.velocity(encoded, noise, self.family.condition(1.0, len(noise)))

        def velocity(points: Tensor, time: float) -> Tensor:
            return self.velocity(encoded, points, self.family.condition(time, len(points)))

        def straight(points: Tensor, time: float) -> Tensor:
            held = 0 if committed is None else committed.shape[1]
            return torch.cat([noise[:, :held] - committed, velocity(points, time)[:, held:]], dim=1)

        with torch.no_grad():
            if guide is not None:
                return guide.finish(guide.integrate(solver, velocity, noise))
            return solver(velocity if committed is None else straight, noise)

    def __call__(
        self, inputs: Sequence[Any], noise: Tensor, committed: Tensor | None = None, guide: Guide | None = None
    ) -> Tensor:
        """Encode and sample; by a CUDA graph where there is one of these shapes and no row is committed."""
        if self.graphs is None or committed is not None or (guide is not None and isinstance(guide.sigma, Tensor)):
            return self.sample(self.encode(inputs), noise, committed, guide)
        self.refresh()
        images, masks, *rest = self._trimmed(inputs)
        given, how = ([noise], None) if guide is None else guide.split_up()
        return self.graphs([*images, *masks, *rest, *given], len(images), len(rest), how)

    def _work(self, tensors: list[Tensor], views: int, others: int, how: tuple[Any, ...] | None) -> Tensor:
        images, masks, rest = tensors[:views], tensors[views : 2 * views], tensors[2 * views :]
        given = rest[others:]
        guide = None if how is None else Guide.restored(given, how)
        return self.sample(self.family.encode([images, masks, *rest[:others]]), given[0], guide=guide)

    def _trimmed(self, inputs: Sequence[Any]) -> list[Any]:
        """Fused tiers: without cameras that no row has and without tokens that are padding in all rows, in buckets.
        Asking for them is the one time that the host waits before a replay.
        """
        images, masks, tokens, token_mask, *state = inputs
        if self.family.fused:
            used = token_mask.any(0).nonzero()
            longest = int(used.max()) + 1 if len(used) else 1
            width = min(tokens.shape[1], -(-longest // BUCKET) * BUCKET)
            tokens, token_mask = tokens[:, :width], token_mask[:, :width]
            if not any(self.parts.image_marks):
                seen = [bool(mask.any()) for mask in masks]
                images = [image for image, keep in zip(images, seen, strict=True) if keep]
                masks = [mask for mask, keep in zip(masks, seen, strict=True) if keep]
        return [images, masks, tokens, token_mask, *state]

    def compare(self, inputs: Sequence[Any], noise: Tensor) -> dict[str, Any]:
        """The difference to LeRobot's sampler: bitwise, largest, relative, and whether the tier's promise holds.

        For bf16 also `spread`: the difference in units of the policy's own spread, and `kept`, the share of that spread
        that is left; the spread is that of eight chunks of each observation.
        """
        if self.solver is not None:  # LeRobot's has no other than Euler
            return Sampler(self.lerobot, self.tier, graph=False, kept=self.kept).compare(inputs, noise)
        tier, want, got = TIERS[self.tier], self.lerobot.sample(inputs, noise), self(inputs, noise)
        apart = (got - want).double()
        found: dict[str, Any] = {
            "tier": self.tier, "bitwise": torch.equal(got, want), "largest": float(apart.abs().max()),
            "relative": float(apart.norm() / want.double().norm()),
        }  # fmt: skip
        if not tier.spread:
            kinds = {p.dtype for p in self.lerobot.text_layers[0].parameters()}
            most = tier.half if torch.bfloat16 in kinds else tier.relative
            return {**found, "limit": most, "holds": found["bitwise"] if not most else found["relative"] <= most}
        draws = torch.Generator(noise.device).manual_seed(0)
        noises = [torch.randn(noise.shape, generator=draws, device=noise.device) for _ in range(8)]
        theirs = torch.stack([self.lerobot.sample(inputs, n) for n in noises]).double()
        ours = torch.stack([self(inputs, n) for n in noises]).double()
        spread = theirs.std(0).square().mean().sqrt()
        found["spread"] = float((ours - theirs).square().mean().sqrt() / spread)
        found["kept"] = float(ours.std(0).square().mean().sqrt() / spread)
        return {**found, "limit": tier.spread, "holds": found["spread"] <= tier.spread and found["kept"] >= 0.98}

    def require(self, inputs: Sequence[Any], noise: Tensor) -> dict[str, Any]:
        found = self.compare(inputs, noise)
        if not found["holds"]:
            figure = found.get("spread", found["relative"])
            raise BurnishError(f"tier '{self.tier}' differs from LeRobot's sampler by {figure:.2g} on this machine",
                               f"at most {found['limit']:g}" if found["limit"] else "equal bits",
                               "LeRobot's own sampler (leave BURNISH_RUNTIME unset), or another tier")  # fmt: skip
        return found


class Runtime:
    """A policy whose `act` runs through the executor. One thread may use it at a time.

    Args:
        policy: one that supports "runtime"; its weights are used where they are, and may change.
        tier: one of TIERS.
        solver: as for Sampler; None means what `policy.sampler` names, where that is set.
        graph, kept: see Sampler; there is no graph with a `solver`.

    Raises:
        BurnishError: a policy without that, or an unknown tier.
    """

    def __init__(self, policy: Policy, *, tier: str = "exact", solver: Solver | None = None, graph: bool = True,
                 kept: Kept | None = None):  # fmt: skip
        require(policy, "runtime", "Runtime")
        graph = graph and solver is None
        self.policy, self.tier = policy, tier
        if solver is None and policy.sampler:
            solver = make_solver(policy.sampler)
        self.steps = len(getattr(solver, "steps", ()))
        self.sampler = Sampler(policy.flow_parts(), tier, solver, graph, kept)
        self.name, self.chunk_size, self.n_action_steps = policy.name, policy.chunk_size, policy.n_action_steps

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.policy.device

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoded:
        """The observations of `batch`; `Encoded.repeat` makes rows for several chunks of each."""
        return self.sampler.encode(self.policy.begin(batch)[0])

    def sample(self, encoded: Encoded, noise: Tensor, committed: Tensor | None = None) -> Tensor:
        """See Sampler.sample: neither preprocessing nor normalisation."""
        return self.sampler.sample(encoded, noise, committed)

    @torch.no_grad()
    def act(self, batch: Batch, draws: Draws | None = None, prefix: Tensor | None = None,
            steering: Steering | None = None) -> Chunk:  # fmt: skip
        """As `policy.act`, with the policy's own generator where no draws are given.

        A "trained" steering shows the model rows at two flow times at once, and is left to the policy itself.
        """
        if prefix is not None and steering is not None:
            raise BurnishError("act with prefix and steering", "one of the two")
        if steering is not None and steering.mode == "trained":
            return self.policy.act(batch, draws, steering=steering)
        inputs, committed = self.policy.begin(batch, prefix)
        noise = self._noise(batch, draws, self.policy.generator)
        guide = None if steering is None else self.policy.guide(steering, noise, self.steps)
        return self.policy.finish(self.sampler(inputs, noise, committed, guide), prefix)

    @torch.no_grad()
    def candidates(self, batch: Batch, noise: Tensor) -> Chunk:
        """Chunks [B, K, T, A] of one observation each from noise [B, K, T, A_model]; it is encoded once."""
        encoded = self.encode(batch).repeat(noise.shape[1])
        sampled = self.sample(encoded, noise.to(self.device).flatten(0, 1))
        chunk = self.policy.finish(sampled)
        return Chunk(chunk.actions.unflatten(0, noise.shape[:2]), sampled.unflatten(0, noise.shape[:2]))

    @torch.no_grad()
    def warm(self, batch: Batch) -> None:
        """Compile, make tables and capture graphs for batches of this shape before anybody waits for them."""
        self.sampler(self.policy.begin(batch)[0], self._noise(batch))

    @torch.no_grad()
    def verify(self, batch: Batch) -> dict[str, Any]:
        """See Sampler.compare."""
        return self.sampler.compare(self.policy.begin(batch)[0], self._noise(batch))

    def _noise(self, batch: Batch, draws: Draws | None = None, generator: torch.Generator | None = None) -> Tensor:
        drawn = draws or self.policy.draw(len(batch[TASK]), generator or torch.Generator().manual_seed(0))
        return drawn.to(self.device).noise

    # What the profiler asks of a policy.

    def stages(self) -> list[Stage]:
        """See `Policy.stages`."""
        family, own = self.sampler.family, [s for s in self.policy.stages() if s.name in ("preprocess", "postprocess")]
        return [*own, Stage("vision", family, "embed_image"), Stage("prompt", family, "prefill"),
                Stage("pass", self.sampler, "velocity"),
                Stage("head", self.sampler.parts.action_out, "forward")]  # fmt: skip

    def token_counters(self) -> list[nn.Module]:
        """See `Policy.token_counters`."""
        parts = self.sampler.parts
        experts = [layer for layer in parts.expert_layers if layer is not None]
        return [parts.text_layers[0].self_attn.o_proj, experts[0].self_attn.o_proj]

    def supports(self, capability: str) -> bool:
        """Whether `act` can do this, see `Policy.supports`."""
        return capability == "prefix"

    def eval(self) -> "Runtime":
        """Put the policy into evaluation mode."""
        self.policy.eval()
        return self


Key = tuple[Any, ...]


@dataclass
class Held:
    """A graph with the buffers that it reads and writes. Nothing else may write those."""

    graph: Any
    inputs: list[Tensor]
    output: Tensor
    bytes: int


class Graphs:
    """Runs `work` as it is for inputs of new shapes, then by replay of a CUDA graph that gives the same bits.

    Args:
        work: of tensors, and what else a call names, to one tensor; it neither waits for the device nor copies to it.
        limit: bytes that all graphs together may hold; the one unused for longest goes first, for good.
    """

    def __init__(self, work: Callable[..., Tensor], limit: int = 2 << 30):
        self.work, self.limit = work, limit
        self.held: OrderedDict[Key, Held] = OrderedDict()
        self.tried: set[Key] = set()

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor], *how: Hashable) -> Tensor:
        """The output, in a tensor that later calls leave alone."""
        key = (*shapes(inputs), *how)
        if key in self.held and not LOOKED_INTO.get():
            self.held.move_to_end(key)
            return self._replay(self.held[key], inputs)
        output = self.work(list(inputs), *how)
        if key not in self.tried and not LOOKED_INTO.get():
            self.tried.add(key)
            try:
                self._capture(key, inputs, how, output)
            except RuntimeError as error:
                log.warning("no CUDA graph, so kernels are launched one by one: %s", first_line(error, 200))
        return output

    def _replay(self, held: Held, inputs: Sequence[Tensor]) -> Tensor:
        for buffer, tensor in zip(held.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        held.graph.replay()
        return held.output.clone()

    def _capture(self, key: Key, inputs: Sequence[Tensor], how: tuple[Hashable, ...], want: Tensor) -> None:
        """Keep a graph on copies of the inputs. Warming up runs everything that copies constants."""
        device, buffers = inputs[0].device, [tensor.clone() for tensor in inputs]
        before = 0

        def warm() -> None:
            nonlocal before
            self.work(buffers, *how)
            before = torch.cuda.memory_reserved(device)

        graph, output = record(device, lambda: self.work(buffers, *how), warm)
        held = Held(graph, buffers, output, torch.cuda.memory_reserved(device) - before)
        output.zero_()  # a graph that writes nothing must not find the right numbers there
        if not torch.equal(self._replay(held, inputs), want):
            raise RuntimeError("its replay gives other numbers")
        self.held[key] = held
        while len(self.held) > 1 and sum(held.bytes for held in self.held.values()) > self.limit:
            self.held.popitem(last=False)

    def clear(self) -> None:
        """Drop all graphs, whose kernels read the addresses of weights that have gone."""
        self.held.clear()
        self.tried.clear()


def shapes(inputs: Sequence[Tensor]) -> Key:
    """What tells two sets of inputs apart for a graph."""
    about = ((tuple(one.shape), one.dtype, one.device) for one in inputs)
    return *about, torch.is_autocast_enabled("cuda"), torch.is_inference_mode_enabled()
