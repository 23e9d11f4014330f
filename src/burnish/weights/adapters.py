"""LoRA and DoRA folders of peft as sources: a base checkpoint with an adapter folded in.

An adapter is always taken through its product. (A, B) and (G A, B G^-1) are the same update for any invertible G, so
differences of factors mean nothing; the product does not depend on G.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.core.reading import read_object
from burnish.weights.names import match_names
from burnish.weights.rounding import widened
from burnish.weights.sources import Checkpoint, locate, stamp
from burnish.weights.tensorfile import FLOATS, Digests, TensorFile, TensorInfo, whole_digest

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Starts of an adapter (peft's init_lora_weights) that leave the base's own weights alone. Others (pissa, olora, corda,
loftq, lora_ga, ...) move part of them into the factors, so that base + product is not what was trained."""
_VARIANTS = ("layer_replication", "lora_bias", "megatron_config", "trainable_token_indices", "alora_invocation_tokens",
             "use_qalora", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
             "monteclora_config")  # fmt: skip
"""Settings of peft that change what the factors mean, or what else an adapter holds."""


def open_source(path: Path | str, base: Checkpoint, rules: Sequence[tuple[str, str]] = ()) -> "Checkpoint | Adapted":
    """A checkpoint or an adapter of `base`, under the base's names."""
    path = locate(path)
    adapter = os.path.lexists(path / ADAPTER_CONFIG)  # a pipe of that name is named as one
    return Adapted(base, path, rules) if adapter else Checkpoint(path, base.tensors, rules)


@dataclass(frozen=True)
class Update:
    """A LoRA update scale * up @ down of a weight [rows, columns]; DoRA when `magnitude` [rows] is there.

    Factors are float64 copies of what is stored, which is exact. `transposed` weights are [columns, rows].
    """

    up: np.ndarray
    down: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.up.shape[0], self.down.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows first:last of the product, [last - first, columns] float64."""
        if self.transposed:
            return self.scale * (self.down[:, first:last].T @ self.up.T)
        return self.scale * (self.up[first:last] @ self.down)


def product_block(updates: list[Update], start: int, stop: int) -> np.ndarray:
    """Elements start:stop of the flattened sum of products, float64."""
    columns = updates[0].shape[1]
    first, last = start // columns, -(-stop // columns)
    total = np.sum([update.rows(first, last) for update in updates], axis=0)
    return total.reshape(-1)[start - first * columns : stop - first * columns]


class Adapted:
    """A base checkpoint with an adapter folded in, block by block, in float64.

    Attributes:
        tensors: the base's names, with the dtype of what an adapter gives.
        updates: weight name to Update.
        replaced: tensor name to float64 values that replace the base's (peft's modules_to_save, biases).
        digest: of all tensors of the adapter and the settings that enter the arithmetic.
    """

    def __init__(self, base: Checkpoint, path: Path, rules: Sequence[tuple[str, str]] = ()):
        self.base, self.path = base, path
        config, stored = _read_config(path / ADAPTER_CONFIG), TensorFile(path / ADAPTER, path)
        modules: dict[str, dict[str, np.ndarray]] = {}
        plain: dict[str, np.ndarray] = {}
        for name in stored.tensors:
            value = _value(stored, name)
            found = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?", name)
            if found:
                modules.setdefault(found[1], {})[found[2]] = value
            elif "lora_" in name:
                raise BurnishError(f"{path}: '{name}' is an adapter of a kind that is not supported",
                                   "LoRA or DoRA on linear layers", "merge it with peft first")  # fmt: skip
            else:
                plain[name.replace(".modules_to_save.default", "").replace(".base_layer", "")] = value
        weights = match_names((f"{module}.weight" for module in modules), base.tensors, rules)
        self.updates = {
            weights[f"{module}.weight"]: _update(path, module, parts, config) for module, parts in modules.items()
        }
        names = match_names(plain, base.tensors, rules)
        self.replaced = {names[name]: value for name, value in plain.items()}
        self._check_base()
        changed = {name: base.tensors[name].shape for name in self.updates}
        changed |= {name: value.shape for name, value in self.replaced.items()}
        self.tensors = base.tensors | {name: TensorInfo("F32", shape) for name, shape in changed.items()}
        settings = json.dumps({n: [u.scale, u.transposed] for n, u in sorted(self.updates.items())})
        self.digest = whole_digest({n: stored.digest(n) for n in stored.tensors} | {"settings": settings})

    def _check_base(self) -> None:
        unknown = [name for name in (*self.updates, *self.replaced) if name not in self.base.tensors]
        if unknown:
            raise BurnishError(f"the adapter {self.path} changes '{unknown[0]}', which the base lacks",
                               "an adapter of this base", "--rename PATTERN=NAME")  # fmt: skip
        for name, update in self.updates.items():
            dtype, shape = self.base.tensors[name]
            if update.shape != shape:
                raise BurnishError(f"the adapter's update of '{name}' has shape {list(update.shape)}",
                                   f"{list(shape)} as in the base")  # fmt: skip
            if dtype not in FLOATS:
                raise BurnishError(f"'{name}' of the base {self.base.path} is {dtype}", "floating-point weights",
                                   "give the base as it was before it was quantised")  # fmt: skip

    @property
    def stamp(self) -> list[Any]:
        return stamp(self.path, [self.path / ADAPTER, self.path / ADAPTER_CONFIG])

    @property
    def low_rank(self) -> bool:
        """Whether every change is a plain product, so that the delta can stay in factors."""
        return not self.replaced and all(update.magnitude is None for update in self.updates.values())

    def values(self, name: str, start: int, stop: int, out: np.ndarray, digests: Digests | None = None) -> np.ndarray:
        """As `Checkpoint.values`; what an adapter gives has no bits of its own, its digest is the adapter's."""
        update = self.updates.get(name)
        if name in self.replaced:
            out[:] = self.replaced[name].reshape(-1)[start:stop]
        elif update is not None and update.magnitude is not None:
            out[:] = self._dora(name, update, update.magnitude, start, stop)
        else:
            self.base.values(name, start, stop, out)
            if update is not None:
                out += product_block([update], start, stop)
        return out

    def _dora(self, name: str, update: Update, magnitude: np.ndarray, start: int, stop: int) -> np.ndarray:
        """magnitude * (W + update) / |row of (W + update)| (Liu et al. 2024, arXiv:2402.09353, eq. 5)."""
        dtype, (_, columns) = self.base.tensors[name]
        first, last = start // columns, -(-stop // columns)
        rows = widened(self.base.read(name, first * columns, last * columns), dtype).reshape(-1, columns)
        rows = rows + update.rows(first, last)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros has no direction, and is refused later
            rows *= (magnitude[first:last] / np.sqrt((rows * rows).sum(1)))[:, None]
        return rows.reshape(-1)[start - first * columns : stop - first * columns]


def _value(stored: TensorFile, name: str) -> np.ndarray:
    """A tensor of an adapter as float64; refuses what is not a finite number."""
    info = stored.tensors[name]
    if info.dtype not in FLOATS:
        raise BurnishError(f"'{name}' in {stored.path} is {info.dtype}", f"one of {', '.join(FLOATS)}")
    value = widened(stored.read(name, 0, info.size), info.dtype).reshape(info.shape)
    if not np.isfinite(value).all():
        raise BurnishError(f"'{name}' in {stored.path} has numbers that are not finite", "a healthy adapter")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path, path.parent)
    if config.get("peft_type") != "LORA":
        raise BurnishError(f"{path}: peft_type {config.get('peft_type')!r}", "LORA (DoRA included)")
    rank: Any = config.get("r")
    alpha = config.get("lora_alpha")
    if not (number(rank) and number(alpha) and rank >= 1):
        raise BurnishError(f"{path}: r is {rank} and lora_alpha {alpha}", "numbers, r at least 1")
    start = config.get("init_lora_weights")
    if str(True if start is None else start).lower() not in STARTS:
        raise BurnishError(f"{path}: init_lora_weights {start} may change the base's own weights", f"one of "
                           f"{', '.join(STARTS)}", "merge it with peft first, or save it with "
                           "path_initial_model_for_weight_conversion")  # fmt: skip
    for setting in _VARIANTS:
        if config.get(setting):
            raise BurnishError(f"{path} uses {setting}", "plain LoRA or DoRA", "merge it with peft first")
    for switch in ("use_dora", "use_rslora", "fan_in_fan_out"):
        if config.get(switch) not in (None, True, False):
            raise BurnishError(f"{path}: {switch} is {config[switch]!r}", "true or false")
    return config


def _update(path: Path, module: str, parts: dict[str, np.ndarray], config: dict[str, Any]) -> Update:
    if not {"lora_A", "lora_B"} <= parts.keys() or any(parts[k].ndim != 2 for k in ("lora_A", "lora_B")):
        raise BurnishError(f"{path}: the adapter of '{module}' is incomplete or not on a linear layer",
                           "matrices lora_A and lora_B")  # fmt: skip
    down, up = parts["lora_A"], parts["lora_B"]
    inside = module.removeprefix("base_model.model.")  # peft looks for patterns in the model's own names
    rank = _pattern(path, config.get("rank_pattern"), inside, config["r"])
    alpha = _pattern(path, config.get("alpha_pattern"), inside, config["lora_alpha"])
    if down.shape[0] != rank or up.shape[1] != rank:
        raise BurnishError(f"{path}: '{module}' has factors {list(up.shape)} and {list(down.shape)}", f"rank {rank:g}")
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.size != up.shape[0]:
        raise BurnishError(f"{path}: '{module}' has {magnitude.size} magnitudes", f"{up.shape[0]}, one for each row")
    if (magnitude is not None) != bool(config.get("use_dora")):
        raise BurnishError(f"{path}: use_dora is {config.get('use_dora')} but '{module}' disagrees", "a whole adapter")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = bool(config.get("fan_in_fan_out"))
    if transposed and magnitude is not None:
        raise BurnishError(f"{path}: DoRA with fan_in_fan_out", "DoRA on linear layers", "merge it with peft first")
    return Update(up, down, scale, None if magnitude is None else magnitude.reshape(-1), transposed)


def _pattern(path: Path, patterns: Any, module: str, default: float) -> float:
    """peft's rule: the first pattern that is the module's name or ends it after a dot."""
    if not isinstance(patterns or {}, dict):
        raise BurnishError(f"{path}: rank_pattern or alpha_pattern is {patterns!r:.60}", "patterns with a number each")
    for pattern, value in (patterns or {}).items():
        # The file may come from anywhere, and a group that repeats can take for ever.
        if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
            raise BurnishError(f"{path}: the pattern {pattern[:60]!r} is too involved", "at most three repeats, none "
                               "of a group", "merge the adapter with peft first")  # fmt: skip
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise BurnishError(f"{path}: '{pattern}' in rank_pattern or alpha_pattern is no regular expression "
                               f"({error})") from error  # fmt: skip
        if fits:
            if not number(value) or value == 0:
                raise BurnishError(f"{path}: '{pattern}' has {value!r}", "a number")
            return float(value)
    return float(default)
