"""What the executor's families share: an encoded observation, what time makes of a step, and attention on buffers.

Everything that does not depend on the noisy actions is computed once: per observation in `encode`, per flow time and
batch width in `condition`. Keys and values stand in buffers with room for the actions behind the prefix.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.policies.parts import FlowParts
from burnish.sampling.kept import signature


@dataclass
class Encoded:
    """An observation, encoded: what `velocity` reads of it. Several chunks may be sampled from one.

    Args:
        width: B, observations.
        length: P, positions of the prefix.
        keys, values: for each layer a buffer with the prefix in front; None where the expert has no layer.
        masks: for attention over prefix and actions, and over the prefix alone.
        rope: sine and cosine tables of the actions' positions, for either kind of layer.
        state: the state's row of the suffix [B, 1, W] (pi0).
    """

    width: int
    length: int
    keys: list[Tensor | None] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    rope: tuple[tuple[Tensor, Tensor], ...] = ()
    state: Tensor | None = None
    prompt: Any = None
    """What `Family.restate` goes on from."""

    def repeat(self, copies: int) -> "Encoded":
        """`copies` rows for each observation, one after the other: several chunks of one encoding in one call."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            own = tensor is not None and len(tensor) == self.width
            return tensor.repeat_interleave(copies, 0) if own else tensor

        return replace(
            self, width=self.width * copies, keys=[rows(k) for k in self.keys], values=[rows(v) for v in self.values],
            masks=tuple(rows(mask) for mask in self.masks), state=rows(self.state),
            rope=tuple((rows(sin), rows(cos)) for sin, cos in self.rope),
        )  # fmt: skip


class Family(ABC):
    """A flow-matching model in the arithmetic of LeRobot, operation for operation, in another order.

    Args:
        fused: merged projections, PyTorch's fused attention, padding dropped: equal but for rounding.
        static: shapes follow from those of the inputs and the host never waits for the device, as a CUDA graph wants
            it; padding is then the caller's to drop.
    """

    exact_axis = 2
    """Of positions in keys and values, in the exact tier; in fused ones it is 2."""

    def __init__(self, parts: FlowParts, fused: bool = False, static: bool = False):
        self.parts, self.fused, self.static, self.drops = parts, fused, static, fused and not static
        self.axis = 2 if fused else self.exact_axis
        self.groups = parts.heads // parts.kv_heads
        self.embed_image = parts.embed_image
        self.keeps = False
        """Whether an encoding is to be kept, with what `restate` needs."""
        self.restates: dict[Any, bool] = {}
        """Shapes of prefixes for which `restate` was seen to give the bits of `encode`, or not."""
        self._weights: dict[Any, Any] = {}
        self._times: dict[Any, Any] = {}
        self._constants: dict[Any, Tensor] = {}
        self._signature: Any = None

    @abstractmethod
    def encode(self, inputs: Sequence[Any]) -> Encoded:
        """The observation of `inputs`, as LeRobot's model takes them."""

    @abstractmethod
    def prefill(self, encoded: Encoded, x: Tensor, mask: Any, rope: Any) -> None:
        """Run the language model over x [B, P, D] and keep what the expert reads; the last keys end it."""

    @abstractmethod
    def condition(self, time: float, width: int) -> Tensor:
        """What flow time `time` makes of a step for `width` rows; computed once for each."""

    @abstractmethod
    def velocity(self, encoded: Encoded, points: Tensor, condition: Tensor) -> Tensor:
        """Velocities [B, T, A_model] at `points`, of one shape."""

    @abstractmethod
    def restate(self, old: Encoded, state: Tensor) -> Encoded:
        """`old` for another state, which pictures and text do not see; `old` stays as it is."""

    def same(self, one: Encoded, other: Encoded) -> bool:
        """Whether keys and values of the prefix are equal bit for bit."""
        end, axis = one.length, self.axis
        pairs = zip([*one.keys, *one.values], [*other.keys, *other.values], strict=True)
        return all(a is None or a.narrow(axis, 0, end).equal(b.narrow(axis, 0, end)) for a, b in pairs)

    # Tables of the weights.

    @abstractmethod
    def sources(self) -> list[nn.Module]:
        """Modules whose weights the kept tables are made of."""

    def refresh(self, force: bool = False) -> bool:
        """Forget tables of weights that have changed since: trained, loaded, or an adapter put in or merged.

        Weights written through `.data` leave no trace; after that, `force`. Returns whether anything was forgotten.
        """
        found = signature(*([self.parts.model] if self.static else self.sources()))
        changed = force or found != self._signature
        if changed:
            self._weights.clear()
            self._times.clear()
            self._signature = found
        return changed

    def folded(self, key: Any, make: Callable[[], Any]) -> Any:
        """Weights put together, made where they are missing; of their own type, whatever autocast is on just then."""
        if key not in self._weights:
            device = self.parts.action_in.weight.device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                self._weights[key] = make()
        return self._weights[key]

    def timed(self, time: float, width: int, make: Callable[[], Tensor]) -> Tensor:
        """What `condition` returns, made where it is missing."""
        weight, casts = self.parts.action_in.weight, map(torch.is_autocast_enabled, ("cuda", "cpu"))
        key = (time, width, weight.device, weight.dtype, *casts)
        if key not in self._times:
            with torch.inference_mode(False), torch.no_grad():  # of use to a pass backwards too
                self._times[key] = make()
        return self._times[key]

    def constant(self, values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A small tensor that is copied to the device once: such a copy blocks, and a CUDA graph may hold none."""
        key = (tuple(values), dtype, device)
        if key not in self._constants:
            with torch.inference_mode(False):
                self._constants[key] = torch.tensor(values, dtype=dtype, device=device)
        return self._constants[key]

    def time_embedding(self, time: float, width: int, size: int, device: torch.device) -> Tensor:
        """[B, size] sines and cosines of a flow time, by LeRobot's own code and in the shape that it has there."""
        from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding

        at = self.constant((time,), torch.float32, device).expand(width)
        return create_sinusoidal_pos_embedding(at, size, *self.parts.periods, device=device)

    # Pieces of layers.

    def linears(self, key: Any, inputs: Tensor, *modules: nn.Module) -> Sequence[Tensor]:
        """Outputs of several linear layers of one input; in the fused tiers by one product of matrices."""
        if not self.fused or any(type(module) is not nn.Linear for module in modules):  # an adapter stands in one
            return [module(inputs) for module in modules]
        weight, bias = self.folded(key, lambda: merged(modules))
        return F.linear(inputs, weight, bias).split([module.out_features for module in modules], -1)

    def mlp(self, layer: Any, inputs: Tensor) -> Tensor:
        """The gated MLP of a layer."""
        if not self.fused:
            return layer.mlp(inputs)
        gate, up = self.linears((id(layer), "mlp"), inputs, layer.mlp.gate_proj, layer.mlp.up_proj)
        return layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)

    def attend_fused(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """PyTorch's attention; queries of one key head become rows beside one another, so nothing is repeated.

        Args:
            queries: [B, H, S, D].
            keys, values: [B, KV, L, D].
            mask: bool [B, 1, groups * S, L]; None where all is seen.
        """
        B, H, S, D = queries.shape
        rows = queries.reshape(B, H // self.groups, self.groups * S, D)
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask).reshape(B, H, S, D)

    def fused_mask(self, mask: Tensor) -> Tensor | None:
        """bool [B, S, L] as `attend_fused` takes it."""
        return None if self.drops and bool(mask.all()) else mask.repeat(1, self.groups, 1)[:, None]


def merged(modules: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Weights of linear layers of one input on top of one another."""
    biases = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    return torch.cat([module.weight for module in modules]), biases


def extend(buffer: Tensor, start: int, new: Tensor, dim: int) -> Tensor:
    """`buffer` with `new` from position `start` on: in place, or where a gradient is wanted as a tensor of its own."""
    if torch.is_grad_enabled() and new.requires_grad:
        return torch.cat([buffer.narrow(dim, 0, start), new], dim)
    buffer.narrow(dim, start, new.shape[dim]).copy_(new)
    return buffer


def with_room(prefix: Tensor, room: int, dim: int) -> Tensor:
    """A buffer with `prefix` in front and `room` positions behind it."""
    shape = list(prefix.shape)
    shape[dim] += room
    buffer = prefix.new_empty(shape)
    buffer.narrow(dim, 0, prefix.shape[dim]).copy_(prefix)
    return buffer


def columns(pad: Tensor) -> Tensor | None:
    """Positions that some row of `pad` [B, P] has; None where all are had."""
    some = pad.any(0)
    return None if bool(some.all()) else some.nonzero()[:, 0]
