"""What delta.json and capability.json may hold: their seal tells damage, not a forger, so every part is checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.weights.names import GROUPS
from burnish.weights.tensorfile import FLOATS


def check_delta(meta: Mapping[str, Any], path: Path) -> None:
    """Raise BurnishError where delta.json at `path` is not as `extract` and `control` write it."""
    for name, entry in _entries(meta, path):
        what = f"the entry of '{name}'"
        _require(isinstance(entry, dict), path, what)
        form = entry.get("form")
        _require(entry.get("dtype") in FLOATS and entry.get("group") in GROUPS, path, what)
        _require(_shape(entry.get("shape")) and _text(entry.get("digest")) and _size(entry.get("norm")), path, what)
        _require(_size(entry.get("norm_tuned", 0.0)) and form in ("dense", "lowrank"), path, what)
        if form == "lowrank":
            scales = entry.get("scales")
            _require(isinstance(scales, list) and scales and all(map(number, scales)), path, f"{what}: scales")
            _require(isinstance(entry.get("transposed"), bool) and len(entry["shape"]) == 2, path, what)
    for who in ("base", "tuned", "control"):
        _parent(meta.get(who), path, who)
    _require(_texts(meta["base"].get("tensors")), path, "base.tensors")
    tied: Any = meta.get("tied")
    robot = meta.get("embodiment")
    _require(_texts(tied) and all(owner in meta["tensors"] for owner in tied.values()), path, "tied")
    _require(robot is None or (isinstance(robot, dict) and all(map(_shape, robot.values()))), path, "embodiment")
    _require(_texts(meta.get("skipped")), path, "skipped")
    rename, geometry = meta.get("rename", []), meta.get("geometry")
    pairs = isinstance(rename, list) and all(isinstance(rule, list) and len(rule) == 2 for rule in rename)
    _require(pairs and all(_text(name) for rule in rename for name in rule), path, "rename")
    _require(isinstance(geometry, dict) and all(map(number, geometry.values())), path, "geometry")
    unlike = meta.get("runs_differ", [])
    _require(isinstance(unlike, list) and all(map(_text, unlike)), path, "runs_differ")
    _require(_size(meta.get("rounding_noise")) and _size(meta.get("not_exact")), path, "rounding_noise or not_exact")


def check_merge(record: Mapping[str, Any], path: Path) -> None:
    """Raise BurnishError where capability.json at `path` is not as `merge` writes it."""
    _require(record.get("kind") == "merge", path, "kind")
    _parent(record.get("base"), path, "base")
    deltas: Any = record.get("deltas")
    _require(isinstance(deltas, list) and bool(deltas), path, "deltas")
    for delta in deltas:
        _parent(delta, path, "deltas")
        _require(number(delta.get("weight")) and isinstance(delta.get("stored"), bool), path, "deltas")
    _require(_text(record.get("operator")) and isinstance(record.get("options"), dict), path, "operator or options")
    for patterns in ("include", "exclude"):
        found = record.get(patterns)
        _require(isinstance(found, list) and all(map(_text, found)), path, patterns)
    for name, entry in _entries(record, path):
        weights: Any = entry.get("weights") if isinstance(entry, dict) else None
        _require(isinstance(weights, list) and _text(entry.get("digest")), path, f"the entry of '{name}'")
        fits = (isinstance(one, list) and len(one) == 3 and type(one[0]) is int and 0 <= one[0] < len(deltas)
                and _text(one[1]) and number(one[2]) for one in weights)  # fmt: skip
        _require(all(fits), path, f"the entry of '{name}': weights")


def _entries(meta: Mapping[str, Any], path: Path) -> list[tuple[str, Any]]:
    _require(isinstance(meta.get("tensors"), dict), path, "tensors")
    return list(meta["tensors"].items())


def _parent(found: Any, path: Path, what: str) -> None:
    _require(isinstance(found, dict) and _text(found.get("path")) and _text(found.get("digest")), path, what)


def _require(fits: Any, path: Path, what: str) -> None:
    if not fits:
        raise BurnishError(f"{path}: {what} is not as burnish writes it", "an untouched file", "make it again")


def _text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, (*value, *value.values())))


def _shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _size(value: Any) -> bool:
    return number(value) and 0 <= value < 1e150  # its square is a number too
