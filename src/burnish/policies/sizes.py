"""How large the numbers of a policy folder may be, in two tables: no file may ask for more than a machine has."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import check, check_value, number, option

MOST_FEATURES = 64
MOST_EDGE = 8192
MOST_LAYERS = 128
MAY_BE_ABSENT = {"diffusion": ("num_inference_steps",), "multi_task_dit": ("num_inference_steps",)}
"""Numbers that LeRobot writes as null for a type, which then takes as many steps as it was trained with."""

_DEEP = re.compile(r"layers?$|layers?_|depth|blocks$")
_WIDE = re.compile(r"dim|size|hidden|embed|width|channels|heads|groups|keypoints|horizon|tokens")


@dataclass
class PolicyNumbers:
    """Numbers of a policy's config.json by name; what only burnish_discrete has, its config checks."""

    n_obs_steps: int = option(1, least=1, most=64)
    chunk_size: int = option(1, least=1, most=4096)
    n_action_steps: int = option(1, least=1, most=4096)
    max_state_dim: int = option(1, least=1, most=4096)
    max_action_dim: int = option(1, least=1, most=4096)
    empty_cameras: int = option(0, least=0, most=32)
    tokenizer_max_length: int = option(1, least=1, most=8192)
    num_steps: int = option(1, least=1, most=1000)
    num_inference_steps: int = option(1, least=1, most=1000)
    resize_imgs_with_padding: list[int] | None = option([], least=1, most=1024)
    image_resolution: list[int] = option([], least=1, most=1024)
    num_vlm_layers: int = option(-1, least=-1, most=MOST_LAYERS)
    num_expert_layers: int = option(-1, least=-1, most=MOST_LAYERS)
    self_attn_every_n_layers: int = option(-1, least=-1, most=MOST_LAYERS)
    prefix_length: int = option(-1, least=-1, most=65_536)
    expert_width_multiplier: float = option(1.0, above=0, most=8)
    min_period: float = option(1.0, above=0, most=1e6)
    max_period: float = option(1.0, above=0, most=1e6)
    time_sampling_beta_alpha: float = option(1.0, above=0, most=1000)
    time_sampling_beta_beta: float = option(1.0, above=0, most=1000)
    time_sampling_scale: float = option(1.0, above=0, most=1)
    time_sampling_offset: float = option(0.0, least=0, below=1)
    memory_frames: int = option(1, least=1, most=64)
    memory_stride: int = option(1, least=1, most=10_000)


@dataclass
class ModelNumbers:
    """Numbers of a VLM's config.json at any depth, and of the sizes of a tiny pi0 (`tiny.json`)."""

    hidden_size: int | None = option(None, least=1, most=65_536)
    intermediate_size: int | None = option(None, least=1, most=262_144)
    projection_dim: int | None = option(None, least=1, most=65_536)
    num_hidden_layers: int | None = option(None, least=1, most=MOST_LAYERS)
    num_attention_heads: int | None = option(None, least=1, most=1024)
    num_key_value_heads: int | None = option(None, least=1, most=1024)
    num_channels: int | None = option(None, least=1, most=64)
    head_dim: int | None = option(None, least=1, most=4096)
    vocab_size: int | None = option(None, least=1, most=10_000_000)
    max_position_embeddings: int | None = option(None, least=1, most=100_000_000)
    image_size: int | list | dict | None = option(None, least=1, most=MOST_EDGE)
    patch_size: int | list | dict | None = option(None, least=1, most=MOST_EDGE)
    scale_factor: int | None = option(None, least=1, most=64)
    num_image_tokens: int | None = option(None, least=1, most=65_536)
    initializer_range: float | None = option(None, least=0, most=100)
    rms_norm_eps: float | None = option(None, least=0, most=1)
    layer_norm_eps: float | None = option(None, least=0, most=1)
    width: int | None = option(None, least=1, most=65_536)
    mlp_dim: int | None = option(None, least=1, most=262_144)
    depth: int | None = option(None, least=1, most=MOST_LAYERS)
    num_heads: int | None = option(None, least=1, most=1024)
    num_kv_heads: int | None = option(None, least=1, most=1024)


def check_policy_numbers(raw: dict[str, Any], where: str) -> None:
    """Raise BurnishError for a number of a policy's config.json that is none, or out of range; `where` names it."""
    absent = MAY_BE_ABSENT.get(str(raw.get("type")), ())
    _check(PolicyNumbers, {key: value for key, value in raw.items() if key not in absent or value is not None}, where)
    for part in ("input_features", "output_features"):
        features = raw.get(part) or {}
        if not isinstance(features, dict) or len(features) > MOST_FEATURES:
            raise BurnishError(f"{where}: {part} is no table of at most {MOST_FEATURES} features", "LeRobot's features")
        for key, feature in features.items():
            shape = feature.get("shape") if isinstance(feature, dict) else None
            edges = isinstance(shape, list) and len(shape) <= 4 and all(type(edge) is int for edge in shape)
            if not edges or not all(1 <= edge <= MOST_EDGE for edge in shape):
                raise BurnishError(f"{where}: the shape of '{key}' is {str(shape)[:60]}",
                                   f"up to 4 numbers from 1 to {MOST_EDGE}")  # fmt: skip
    modes = raw.get("normalization_mapping")
    if modes is not None and (not isinstance(modes, dict) or not {"STATE", "ACTION"} <= set(modes)):
        raise BurnishError(f"{where}: normalization_mapping does not say how STATE and ACTION are normalised",
                           "a mode for each, e.g. MEAN_STD")  # fmt: skip


def check_other_numbers(fields_: dict[str, Any], where: str) -> None:
    """Raise BurnishError for a number in the fields of a type that has no table here, bounded by what its name says."""
    for name, value in fields_.items():
        most = MOST_LAYERS if _DEEP.search(name) else 65_536 if _WIDE.search(name) else 10**9
        parts = value if isinstance(value, list) else [value]
        for part in parts if len(parts) <= MOST_FEATURES else [math.inf]:
            plain = isinstance(part, int | float) and not isinstance(part, bool)
            if plain and not (number(part) and abs(part) <= most):
                raise BurnishError(f"{where}: {name} is {str(value)[:60]}", f"up to {most}")


def check_model_numbers(config: Any, where: str) -> None:
    """As `check_policy_numbers`, for a VLM's config or the sizes of a tiny policy, at any depth."""
    for part in _tables(config):
        _check(ModelNumbers, part, where)


def check_fits(config: dict[str, Any], num_bytes: int, layers: int, where: str) -> None:
    """Raise BurnishError where a VLM would be larger than the weights that are there for it.

    Every stored number takes a byte at least, so a config that asks for more numbers than the file has bytes is not
    theirs; to build it first would fill the memory.

    Args:
        config: of the VLM with all its defaults, as `PretrainedConfig.to_dict` gives it.
        num_bytes: of the weights.
        layers: language-model layers that are kept, 0 and below for all.
        where: names the config in errors.
    """
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    for part, kept in ((text, layers), (vision, 0)):
        hidden, count = part.get("hidden_size") or 0, part.get("num_hidden_layers") or 0
        count = min(count, kept) if kept > 0 else count
        edge, patch = part.get("image_size"), part.get("patch_size")
        places = (edge // patch) ** 2 if number(edge) and number(patch) else 0
        rows = places if part is vision else part.get("vocab_size") or 0
        least = int(hidden * (rows + count * (part.get("intermediate_size") or hidden)))
        if least > num_bytes:
            raise BurnishError(f"{where} describes a model of over {least:.2g} numbers, and its weights have "
                               f"{num_bytes:.2g} bytes", "the config.json that belongs to the weights")  # fmt: skip


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            yield one
            todo += one.values()
        elif isinstance(one, list):
            todo += one


def _check(kind: type, raw: dict[str, Any], where: str) -> None:
    given = {one.name: raw[one.name] for one in fields(kind) if one.name in raw}
    check(kind(**given), where)
    for one in fields(kind):
        value = given.get(one.name)
        for part in value if isinstance(value, list) else ():
            if not number(part):
                raise BurnishError(f"{where}: {one.name} holds {part!r}", "numbers")
            check_value(part, one.metadata, f"{where}: {one.name}")
