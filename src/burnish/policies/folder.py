"""Policy folders: the config of LeRobot's, with every mistake named, and the policy it describes.

Paths. LeRobot stores the path of the VLM's files (SmolVLA) or the tokenizer's name (pi0, pi05) in config.json and
policy_preprocessor.json, and takes them literally. We keep those files inside the policy folder and store their
absolute path, so that LeRobot's own commands work from anywhere. burnish looks inside the folder and nowhere else, and
so does not mind when it is moved or renamed; for LeRobot's commands, `point_at` mends a moved folder.

The rest of a folder is read in `pretrained` (VLM and tokenizer), `pipelines` (processors) and `tensors` (weights).
"""

import dataclasses
import io
import json
import logging
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.core.errors import BurnishError, one_line
from burnish.core.reading import read_object
from burnish.core.seeding import seeded
from burnish.policies.keys import CONFIG, PREPROCESSOR, camera_keys
from burnish.policies.pretrained import foreign, is_hub_name, no_remote_code
from burnish.policies.sizes import check_policy_numbers

DEVICES = ("cpu", "cuda", "mps", "xpu")
log = logging.getLogger("burnish")


def decode_config(raw: dict[str, Any], source: str, features: dict[str, Any] | None, device: str) -> Any:
    """LeRobot's config object from its JSON form (with "type"), checked; `source` names it in errors."""
    import draccus
    from lerobot.configs.types import FeatureType

    check_device(device)
    check_policy_numbers(raw, source)
    raw = {**raw, "device": device}
    config_class = config_class_of(raw.pop("type"))
    expected = f"fields of {config_class.__name__}"
    with no_remote_code(), foreign(f"{source} cannot be read", expected):  # a config may ask the hub for another's
        try:
            config = draccus.decode(config_class, raw)
        except draccus.ParsingError as error:
            # draccus puts a dot after every letter of what it says of a tuple that is null
            said = re.sub(r"`(?:[^`]\.){9,}[^`]`", lambda text: text[0][1:-1:2], one_line(error.__cause__ or error))
            raise BurnishError(f"{source} cannot be read: {said}", expected) from error
    if features is not None:
        config.output_features = {k: f for k, f in features.items() if f.type is FeatureType.ACTION}
        config.input_features = {k: f for k, f in features.items() if f.type is not FeatureType.ACTION}
    _check_features(config, source, features is not None)
    with foreign(source, "values that go together"):
        config.validate_features()
    return config


def config_class_of(policy_type: str) -> Any:
    """The config class that LeRobot's registry has for a type."""
    import lerobot.policies  # noqa: F401 - registers LeRobot's own
    from lerobot.configs.policies import PreTrainedConfig

    return PreTrainedConfig.get_choice_class(policy_type)


def own_fields(policy_type: str) -> set[str]:
    """Names of the config fields that a type has beyond those of every policy."""
    from lerobot.configs.policies import PreTrainedConfig

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(config_class_of(policy_type))} - common


def check_device(name: str) -> None:
    """Raise BurnishError for a device that torch does not know or this machine does not have."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        raise BurnishError(f"device {name!r}", f"one of {', '.join(DEVICES)}, or cuda:0 and so on", "device cpu")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise BurnishError(f"device {name}", "one that this machine has", "device cpu")


def build(config: Any, seed: int) -> nn.Module:
    """LeRobot's policy with random weights of `seed`; the global generator is left as it was.

    `compile_model` is kept for LeRobot and not followed: the first call would compile for minutes, on a CPU too.
    """
    from lerobot.policies.factory import get_policy_class

    compiled = getattr(config, "compile_model", False)
    if compiled:
        log.warning("the config says compile_model: burnish runs the model as it is")
        config.compile_model = False
    files = getattr(config, "vlm_model_name", "")
    what = f"a policy of type {config.type} cannot be built" + (f" with the VLM files at '{files}'" if files else "")
    fit = foreign(what, "a config whose values go together")
    with seeded(seed), redirect_stdout(io.StringIO()), no_remote_code(), fit:
        policy = get_policy_class(config.type)(config)
    if compiled:
        policy.config.compile_model = compiled
    return policy


def point_at(folder: Path, target: str, **fields: str) -> None:
    """Store `target` as the place of the VLM's or the tokenizer's files, unless a hub name is stored.

    Args:
        target: e.g. the absolute path of its `vlm/`, after the folder was moved.
        **fields: other fields of its config, e.g. the place of a second tokenizer.
    """
    config, pre = read_object(folder / CONFIG), read_object(folder / PREPROCESSOR)
    if "vlm_model_name" in config and not is_hub_name(config["vlm_model_name"]):
        config["vlm_model_name"] = target
    config.update(fields)
    for step in pre["steps"]:
        for key, place in (("tokenizer_name", target), ("action_tokenizer_name", fields.get("action_tokenizer_name"))):
            name = step.get("config", {}).get(key)
            if name is not None and place is not None and not is_hub_name(name):
                step["config"][key] = place
    (folder / CONFIG).write_text(json.dumps(config, indent=4))
    (folder / PREPROCESSOR).write_text(json.dumps(pre, indent=2))


def known_fields(overrides: dict[str, Any], policy_type: str) -> dict[str, Any]:
    """`overrides` as they are; raises BurnishError for one that is no field of that type's config."""
    known = {field.name for field in dataclasses.fields(config_class_of(policy_type))}
    wrong = sorted(set(overrides) - known)
    if wrong:
        raise BurnishError(f"config field '{wrong[0]}' for {policy_type}", f"one of {', '.join(sorted(known))}")
    return overrides


def _check_features(config: Any, source: str, given: bool) -> None:
    state, action = config.robot_state_feature, config.action_feature
    cameras = camera_keys(config)
    if state is None or action is None or not cameras:
        found = ", ".join([*(config.input_features or {}), *(config.output_features or {})]) or "none"
        lacking = ["a camera"] * (not cameras) + ["observation.state"] * (state is None)
        lacks = " and ".join([*lacking, *["action"] * (action is None)])
        raise BurnishError(f"{source} lacks {lacks} among the features {found}",
                           "a camera, observation.state and action",
                           "burnish train with --data.columns='{observation.state: NAME}', as the data set calls it"
                           if given else "")  # fmt: skip
    for name, feature, limit in (("state", state, "max_state_dim"), ("action", action, "max_action_dim")):
        if len(feature.shape) != 1:
            raise BurnishError(f"{source}: the {name} has the shape {tuple(feature.shape)}", "one dimension: [count]")
        most = getattr(config, limit, feature.shape[0])  # policies that do not pad have no limit
        if feature.shape[0] > most:
            raise BurnishError(f"{name} of {feature.shape[0]} dimensions", f"at most {limit} = {most}",
                               f"a policy trained with a larger {limit}")  # fmt: skip
    for key in config.image_features:
        shape = tuple(config.input_features[key].shape)
        if len(shape) != 3:
            raise BurnishError(f"{source}: '{key}' has the shape {shape}", "(channels, height, width)")
