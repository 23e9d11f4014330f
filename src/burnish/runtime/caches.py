"""What a policy need not compute again: exact caches, which change nothing, and old pictures, which do.

Found again, by a hash of all bytes that it was made of (`sampling.kept`): the features of a camera's picture; keys and
values of pictures and text, where these do not see the state (SmolVLA, pi0, burnish_discrete; OpenVLA has no state in
its prompt, pi05 has it in the text); the whole encoding. Embeddings of text are no more than looked up, and the keys of
a text under a new picture are others, because it sees the picture.

`Reuse` acts on pictures of earlier calls. Then the caches hit; but the policy sees the past, and a guard compares.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor

from burnish.core.config import CacheConfig
from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.core.provenance import weights_hash
from burnish.core.reading import read_object
from burnish.core.types import Batch, Chunk
from burnish.policies.base import Policy, require
from burnish.policies.keys import IMAGES, STATE, TASK
from burnish.runtime.family import Encoded, Family
from burnish.sampling.kept import Kept

ONE, MEAN, CHECKS, EVERY = 1.0, 0.25, 8, 4
"""The guard's limits in units of the policy's spread, of one comparison and of the mean of the last CHECKS; and how
many calls on old pictures there are to one comparison, once as many in a row have been compared."""


def encode(kept: Kept, family: Family, inputs: Sequence[Any], exact: bool) -> Encoded:
    """`family.encode`, or what of it was kept: all of it, or all but what the state makes.

    Args:
        exact: equal bits are wanted. Fewer rows may be multiplied by another routine than many: the first encoding of
            each shape that differs in its state alone is made both ways, and where bits differ such are made anew.
    """
    seen, state = [*inputs[0], *inputs[1], inputs[2], inputs[3]], list(inputs[4:])
    whole, prompt = kept.key(*seen, *state), kept.key(*seen)
    found = kept.find("encoding", whole)
    if found is not None:
        return found
    old = kept.find("prompt", prompt) if state else None
    shape = None if old is None else (old.width, old.length)
    if old is None or (exact and not family.restates.get(shape, True)):
        found = family.encode(inputs)
    else:
        found = family.restate(old, *state)
        if exact and shape not in family.restates:
            made = family.encode(inputs)
            family.restates[shape], found = family.same(found, made), made
    kept.store("prompt", prompt, found)
    return kept.store("encoding", whole, found)


@contextmanager
def keeping(policy: Policy, kept: Kept) -> Iterator[None]:
    """Inside, `policy.act` finds features of pictures again, and a token policy keys of pictures and text. The executor
    does so by itself (`Runtime(kept=)`).
    """
    with ExitStack() as stack:
        for stage in policy.stages():
            if stage.name == "vision":
                remembered = kept.views(getattr(stage.owner, stage.call), policy)
                stack.enter_context(patch.object(stage.owner, stage.call, remembered))
        if policy.supports("tokens"):
            model = policy.token_model()
            model.keep(kept)
            stack.callback(model.keep, None)
        yield


@dataclass
class _Anchor:
    """What one robot's policy acts on: pictures (and a state) of an earlier call, and how it has gone."""

    row: dict[str, Any]
    age: int = 0
    uses: int = 0
    off: bool = False
    errors: deque[float] = field(default_factory=lambda: deque(maxlen=CHECKS))


class Reuse:
    """Lets a policy act on pictures of earlier calls, and stops where its chunks become others.

    Args:
        config: mode "images" or "prefix".
        policy: flow-matching; with the guard, the very weights that `config.measured` was made for.
        most: robots whose pictures are kept, on the policy's device.

    Attributes:
        counts: calls by what became of them: "fresh", "reused", "compared", "stopped".
    """

    def __init__(self, config: CacheConfig, policy: Policy, most: int = 64):
        require(policy, "runtime", f"cache {config.mode}")
        self.config, self.width, self.counts = config, policy.action_dim, Counter[str]()
        self.spread, self.binary = measured_spread(config.measured, policy) if config.guard else (1.0, [])
        if not all(0 <= i < self.width for i in self.binary):
            raise BurnishError(f"{config.measured} has dimensions {self.binary} of two values",
                               f"some of the policy's {self.width}", "the file of this very policy")  # fmt: skip
        self._anchors: OrderedDict[Hashable, _Anchor] = OrderedDict()
        self._ended: deque[Hashable] = deque()
        self.most = most

    def look(self, keys: Sequence[Hashable], batch: Batch) -> tuple[Batch, list[tuple[int, _Anchor]]]:
        """The batch as the policy is to see it, and for `compare` the rows that are due, with what they acted on.

        Args:
            keys: of the first rows, a robot's episode each; rows behind them are copies of the last one, but for texts.
            batch: what is there.
        """
        held = [name for name in batch if name.startswith(IMAGES) or (name == STATE and self.config.mode == "prefix")]
        seen = {name: value.clone() if name in held else value for name, value in batch.items()}
        due = []
        while self._ended:
            self._anchors.pop(self._ended.popleft(), None)
        for i, key in enumerate(keys):
            now = {name: batch[name][i] for name in (*held, TASK)}
            old = self._anchors.get(key)
            if old is None or old.off or not self._serves(old, now):
                self.counts["fresh"] += 1
                self._anchors[key] = old = old or _Anchor(now)
                old.row, old.age = {name: x.clone() if isinstance(x, Tensor) else x for name, x in now.items()}, 0
            else:
                old.age, old.uses = old.age + 1, old.uses + 1
                self.counts["reused"] += 1
                if self.config.guard and (old.uses <= EVERY or old.uses % EVERY == 0):
                    due.append((i, old))
            self._anchors.move_to_end(key)
            for name in held:
                seen[name][i if i < len(keys) - 1 else slice(i, None)] = old.row[name]
        while len(self._anchors) > max(self.most, len(keys)):
            self._anchors.popitem(last=False)
        return seen, due

    def compare(self, due: list[tuple[int, _Anchor]], chunk: Chunk, act: Callable[[], Chunk]) -> None:
        """After `look`, which gave `due`, and the policy's `chunk`, while that is executed: where a comparison is due,
        with the chunk that `act` makes of what is there now, from equal noise.
        """
        if not due or chunk.raw is None:
            return
        for _, anchor in due:
            anchor.off = True  # and stays so where the comparison fails
        true = act().raw
        assert true is not None  # noqa: S101 - the same policy
        apart = (chunk.raw - true)[..., : self.width].float()
        errors = apart.square().mean((1, 2)).sqrt().cpu() / self.spread
        turned = ((chunk.raw > 0) != (true > 0))[..., self.binary].flatten(1).any(1).cpu()
        for i, anchor in due:
            self.counts["compared"] += 1
            anchor.errors.append(float(errors[i]))
            mean = sum(anchor.errors) / len(anchor.errors)
            anchor.off = anchor.errors[-1] > ONE or mean > MEAN or bool(turned[i])
            self.counts["stopped"] += anchor.off

    def forget(self, key: Hashable) -> None:
        """A new episode, from the next `look` on; from any thread, also while a comparison of the last one is made."""
        self._ended.append(key)

    def _serves(self, old: _Anchor, now: dict[str, Any]) -> bool:
        if old.age >= self.config.max_age or old.row[TASK] != now[TASK]:
            return False
        views = [name for name in now if name.startswith(IMAGES)]
        return not self.config.similarity or all(
            similarity(old.row[name], now[name]) >= self.config.similarity for name in views
        )


def similarity(one: Tensor, other: Tensor) -> float:
    """Cosine of two pictures [..., 3, H, W] in [0, 1], shrunk to 8x8 and taken to [-1, 1], as in CrossVLA's cache."""
    views = (image.reshape(-1, *image.shape[-3:]) for image in (one, other))
    small = [F.adaptive_avg_pool2d(2 * view - 1, 8).flatten() for view in views]
    return float(F.cosine_similarity(*small, dim=0))


def measured_spread(path: str, policy: Policy) -> tuple[float, list[int]]:
    """A policy's spread and its two-valued dimensions, of a file of `burnish policy verify runtime` that names its
    tensors; its config may execute other steps of the same chunks.
    """
    fix = "burnish policy verify runtime POLICY DATA --output runtime.json, and its name as `measured`"
    if not path:
        raise BurnishError("a guard that does not know the policy's spread", "a measured one, or guard: false", fix)
    found = read_object(Path(path))
    if found.get("module") != weights_hash(policy):
        raise BurnishError(f"{path} was made for other weights", "those of the policy", fix)
    spread, binary = found.get("spread"), found.get("binary")
    whole = isinstance(binary, list) and all(type(i) is int for i in binary)
    if not number(spread) or not spread > 0 or not whole:
        raise BurnishError(f"{path} holds no spread", "a positive number, and indices of dimensions", fix)
    return float(spread), binary
