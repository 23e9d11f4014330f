"""Actions as OpenVLA writes them: `norm_stats`, 256 bins over [-1, 1], and the token ids at the vocabulary's end."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.policies.tensors import first

OWN_KEY = "burnish"
"""Entry of `norm_stats` that holds the statistics of the data that burnish trained on."""
BOUNDS = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}
"""What is sent to -1 and 1, by name of the normalisation."""
_STATISTICS = ("mean", "std", "min", "max", "q01", "q99")


class ActionSpace:
    """Between environment units, normalised values, and token ids.

    Args:
        stats: an entry of `norm_stats`: "action" and, for states, "proprio", each with bounds and perhaps a "mask"
            (dimensions without it pass unchanged, as grippers do).
        bounds: a name in `BOUNDS`.
        bins: edges over [-1, 1], so one interval less.
        vocabulary: token ids of the tokenizer; the id of bin b (from 1) is `vocabulary - b`.
        rows: logits of the language model.
        libero_gripper: actions of the environment have -1 for an open gripper and 1 for a closed one, those of the
            policy 1 and 0, as in the authors' LIBERO data.
        where: names the statistics in errors.

    Attributes:
        state_dim: dimensions of the state; 0 without its statistics.
    """

    time_ordered = True
    steps = ()
    """It stands in the place of LeRobot's preprocessor, which has steps."""

    def __init__(self, stats: dict[str, Any], bounds: str, bins: int, vocabulary: int, rows: int,
                 libero_gripper: bool, where: str):  # fmt: skip
        self.size, self.vocabulary, self.libero_gripper = vocabulary, rows, libero_gripper
        self.edges = torch.from_numpy(np.linspace(-1, 1, bins))
        self.low, self.high, self.mask = _limits(stats, "action", bounds, where)
        self.action_dim = len(self.low)
        self.state = _limits(stats, "proprio", bounds, where) if "proprio" in stats else None
        self.state_dim = len(self.state[0]) if self.state else 0

    @property
    def centres(self) -> Tensor:
        """float64 [bins - 1], middle of each interval."""
        return (self.edges[:-1] + self.edges[1:]) / 2

    def normalise(self, actions: Tensor) -> Tensor:
        """[..., A] environment units to float32 in [-1, 1]; what lies outside is clipped, as in the released data."""
        actions = actions.double()
        if self.libero_gripper:
            actions = torch.cat([actions[..., :-1], (1 - actions[..., -1:]) / 2], dim=-1)
        return _scaled(actions, self.low, self.high, self.mask).float()

    __call__ = normalise

    def denormalise(self, actions: Tensor) -> Tensor:
        """The inverse, on the CPU; a gripper of LIBERO is fully open or closed."""
        actions = actions.double().cpu()
        actions = torch.where(self.mask, 0.5 * (actions + 1) * (self.high - self.low) + self.low, actions)
        if self.libero_gripper:
            actions = torch.cat([actions[..., :-1], -(2 * actions[..., -1:] - 1).sign()], dim=-1)
        return actions.float()

    def normalise_state(self, state: Tensor) -> Tensor:
        """[..., state_dim] environment units to float32 in [-1, 1]."""
        return _scaled(state.double(), *self.state).float()

    def encode(self, actions: Tensor) -> Tensor:
        """[..., T, A] normalised to token ids [..., T * A], time-major."""
        bins = torch.bucketize(actions.double().clamp(-1, 1), self.edges.to(actions.device), right=True)
        return (self.size - bins).flatten(-2)

    def decode(self, ids: Tensor) -> Tensor:
        """[B, L] token ids to float32 normalised actions [B, T, A]; other tokens become the nearest bin."""
        centres = self.centres.to(ids.device)
        found = centres[(self.size - ids - 1).clamp(0, len(centres) - 1)]
        return found.float().view(len(ids), -1, self.action_dim)


def choose_stats(norm_stats: Any, key: str, where: str) -> tuple[str, dict[str, Any]]:
    """The key and entry of `norm_stats` to use; "" takes the only one there is."""
    if not isinstance(norm_stats, dict) or not norm_stats:
        raise BurnishError(f"{where} has no norm_stats", "statistics by data set, as OpenVLA publishes them")
    if not key and len(norm_stats) > 1:
        raise BurnishError(f"{where} has norm_stats of {len(norm_stats)} data sets", "the one that actions are in",
                           f"unnorm_key={next(iter(norm_stats))}, or another of {first(norm_stats, 8)}")  # fmt: skip
    key = key or next(iter(norm_stats))
    if key not in norm_stats:
        raise BurnishError(f"{where}: no norm_stats for unnorm_key '{key}'", f"one of {first(norm_stats, 8)}")
    return key, norm_stats[key]


def stats_entry(stats: dict[str, Any], action: str, state: str) -> dict[str, Any]:
    """An entry of `norm_stats` from LeRobot statistics (arrays by feature and name); all dimensions are normalised."""

    def listed(name: str) -> dict[str, list[float]]:
        known = {one: stats[name][one] for one in _STATISTICS if one in stats[name]}
        return {one: np.asarray(torch.as_tensor(value), dtype=np.float64).ravel().tolist()
                for one, value in known.items()}  # fmt: skip

    found = {"action": listed(action), "num_transitions": 0, "num_trajectories": 0}
    found["action"]["mask"] = [True] * len(found["action"]["min" if "min" in stats[action] else "mean"])
    if state in stats:
        found["proprio"] = listed(state)
    return found


def _scaled(values: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
    low, high, mask = (one.to(values.device) for one in (low, high, mask))
    scaled = (2 * (values - low) / (high - low + 1e-8) - 1).clamp(-1, 1)
    scaled = torch.where(high == low, 0.0, scaled)  # what never moves is 0, as in the released data
    return torch.where(mask, scaled, values)


def _limits(stats: Any, name: str, bounds: str, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper bounds float64 [D] and the mask bool [D] of "action" or "proprio", checked."""
    table = stats.get(name) if isinstance(stats, dict) else None
    if not isinstance(table, dict):
        raise BurnishError(f"{where}: norm_stats have no '{name}'", "tables of action and proprio")
    found = []
    for statistic in BOUNDS[bounds]:
        values = table.get(statistic)
        if not isinstance(values, list) or not 1 <= len(values) <= 256 or not all(map(number, values)):
            raise BurnishError(f"{where}: statistic '{statistic}' of {name} is {str(values)[:60]}", "a list of numbers",
                               f"normalization={next(b for b in BOUNDS if b != bounds)}")  # fmt: skip
        found.append(torch.tensor(values, dtype=torch.float64))
    mask = table.get("mask", [True] * len(found[0]))
    if not isinstance(mask, list) or len(mask) != len(found[0]) or not all(type(one) is bool for one in mask):
        raise BurnishError(f"{where}: the mask of {name} is {str(mask)[:60]}", f"{len(found[0])} times true or false")
    if len(found[1]) != len(found[0]) or bool((found[1] < found[0]).any()):
        raise BurnishError(f"{where}: {' and '.join(BOUNDS[bounds])} of {name} do not bound anything",
                           "lower and upper")  # fmt: skip
    return found[0], found[1], torch.tensor(mask)
