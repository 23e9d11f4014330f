"""The features of a data set as meta/info.json declares them, made uniform: sizes, names, which of them are cameras."""

import shlex
from math import prod
from typing import Any

import yaml

from burnish.core.errors import BurnishError
from burnish.core.options import number

IMAGES, STATE, ACTION = "observation.images.", "observation.state", "action"
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
LARGEST = 1 << 26
"""Values in one picture."""
WIDEST = 1 << 16
"""Numbers in one frame of another feature."""
_OTHER_NAMES = {
    ACTION: ("action", "actions"),
    STATE: ("observation.state", "observation.states", "state", "states", "observation.qpos", "qpos", "proprio"),
}


def read_features(declared: Any, where: str) -> dict[str, dict[str, Any]]:
    """The features of info.json in one form.

    Args:
        declared: name to {"dtype", "shape", "names"} as LeRobot and others write it: names may be null, nested or a
            mapping, pictures may have their channels first.
        where: names the file in errors.

    Returns:
        name to {"dtype", "shape": tuple, "names": a list, "columns": (name,)}. Pictures have shape (height, width,
        channels) and "depth": whether they hold distances, not colours. Numbers have one name for each dimension.
    """
    if not isinstance(declared, dict) or not declared:
        raise BurnishError(f"{where}: features are {type(declared).__name__}", "a mapping of names to dtype and shape")
    features = {}
    for name, one in declared.items():
        if not isinstance(one, dict) or not isinstance(one.get("dtype"), str) or "shape" not in one:
            raise BurnishError(f"{where}: feature '{name}' lacks dtype or shape")
        if "/" in name or not name.isprintable() or name.startswith("."):
            raise BurnishError(f"{where}: the name of feature {name!r}", "printable, without slashes")
        shape = one["shape"] if isinstance(one["shape"], list | tuple) else [one["shape"]]
        most = LARGEST if is_picture(one) else WIDEST
        possible = all(type(edge) is int and edge > 0 for edge in shape) and prod(shape) <= most
        if not possible and (is_picture(one) or is_numeric(one)):
            raise BurnishError(f"{where}: feature '{name}' has shape {one['shape']!r}", "positive whole numbers")
        make = _picture if is_picture(one) else _numbers
        found = make(name, one, tuple(shape), where)
        features[name] = found | {"dtype": one["dtype"], "columns": (name,), "parts": (found["shape"],)}
    return features


def is_numeric(feature: dict[str, Any]) -> bool:
    return feature["dtype"].startswith(("float", "int", "uint", "bool"))


def is_picture(feature: dict[str, Any]) -> bool:
    """Whether a feature is a camera's, stored as a video or as pictures in the tables."""
    return feature["dtype"] in ("video", "image")


def _picture(name: str, one: dict[str, Any], shape: tuple[int, ...], where: str) -> dict[str, Any]:
    shape = (*shape, 1) if len(shape) == 2 else shape
    if len(shape) != 3:
        raise BurnishError(f"{where}: pictures '{name}' have shape {shape}", "height, width and channels")
    names, channels = _flat(one.get("names")), (1, 3, 4)
    first = bool(names) and names[0].lower().startswith(("c", "rgb"))
    if (shape[0] in channels) != (shape[2] in channels):  # the numbers tell; names are sometimes wrong
        first = shape[0] in channels
    if first:
        shape = (*shape[1:], shape[0])
    about = [one[key] for key in ("info", "video_info") if isinstance(one.get(key), dict)]
    flagged = any(part.get(key) is True for part in about for key in ("is_depth_map", "video.is_depth_map"))
    return {"shape": shape, "names": ["height", "width", "channels"], "depth": flagged or shape[2] == 1}


def _numbers(name: str, one: dict[str, Any], shape: tuple[int, ...], where: str) -> dict[str, Any]:
    if not is_numeric(one):
        return {"shape": shape, "names": []}
    size, names = prod(shape), _flat(one.get("names"))
    return {"shape": shape or (1,), "names": names if len(names) == size else [str(i) for i in range(size)]}


def _flat(names: Any) -> list[str]:
    """Names however they are stored: null, a list of lists, {"motors": [...]}, {"x": 0, "y": 1}."""
    if isinstance(names, dict):
        if names and all(number(place) for place in names.values()):
            return sorted(map(str, names), key=lambda name: names[name])
        return [one for group in names.values() for one in _flat(group)]
    if isinstance(names, list | tuple):
        return [one for part in names for one in _flat(part)]
    return [] if names is None else [str(names)]


def join_columns(features: dict[str, dict], columns: dict[str, Any], root: Any) -> dict[str, dict]:
    """`features` under the names that a map gives them.

    Args:
        features: see `read_features`.
        columns: name that training expects ("action", "observation.state", "observation.images.<camera>") to the
            stored feature, or to several whose numbers are joined in that order.
        root: names the data set in errors.
    """
    joined, used = {}, set()
    for key, given in columns.items():
        names = [given] if isinstance(given, str) else given
        if key not in (ACTION, STATE) and not (isinstance(key, str) and key.startswith(IMAGES) and key != IMAGES):
            raise BurnishError(f"data.columns names {key!r}", f"{ACTION}, {STATE} or {IMAGES}<camera>")
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise BurnishError(f"data.columns: {key} is {given!r}", "a feature of the data set, or a list of them")
        unknown = [name for name in names if name not in features]
        if unknown:
            raise BurnishError(f"data.columns: {root} has no feature '{unknown[0]}'", f"one of {', '.join(features)}")
        parts = [features[name] for name in names]
        if key in (ACTION, STATE):
            if not all(map(is_numeric, parts)):
                raise BurnishError(f"data.columns: {key} joins {', '.join(names)} of {root}", "features of numbers")
            labels = [f"{name}.{one}" if len(names) > 1 else one
                      for name, part in zip(names, parts, strict=True) for one in part["names"]]  # fmt: skip
            joined[key] = {"dtype": "float32", "shape": (len(labels),), "names": labels, "columns": tuple(names),
                           "parts": tuple(part["shape"] for part in parts)}  # fmt: skip
        elif len(names) > 1 or not is_picture(parts[0]):
            raise BurnishError(f"data.columns: {key} is {', '.join(names)} of {root}", "one camera of the data set")
        else:
            joined[key] = {**parts[0], "columns": tuple(names)}
        used |= set(names)
    return {name: one for name, one in features.items() if name not in used} | joined


def propose_columns(features: dict[str, dict]) -> dict[str, list[str]]:
    """A map for `join_columns` where actions, states or cameras have other names than LeRobot's; {} where none do.

    Known are openpi's (`actions`, `state`, `image`) and dotted groups (`action.arm`, `states.joint`, `images.head`).
    """
    numbers = [name for name, one in features.items() if is_numeric(one) and name not in INDEX_COLUMNS]
    found: dict[str, list[str]] = {}
    for key, words in _OTHER_NAMES.items():
        if key not in features:
            exact = [[name] for name in numbers if name in words]
            groups = [[name for name in numbers if name.startswith(f"{word}.")] for word in words]
            picked = next((group for group in (*exact, *groups) if group), None)
            found |= {} if picked is None else {key: picked}
    for name, one in features.items():
        if is_picture(one) and not one["depth"] and not name.startswith("observation."):
            found[IMAGES + name.removeprefix("images.").removeprefix("image.").replace(".", "_")] = [name]
    return found


def train_option(name: str, value: Any) -> str:
    """A field and its value as an option of `burnish train`, to be pasted into a shell."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 16)
    return f"--{name}={shlex.quote(text.strip())}"
