"""Policy folders: read LeRobot's unchanged, with every mistake named, and write ones that LeRobot reads.

Paths. LeRobot stores the path of the VLM's files (SmolVLA) or the tokenizer's name (pi0, pi05) in config.json and
policy_preprocessor.json, and takes them literally. We keep those files inside the policy folder and store their
absolute path, so that LeRobot's own commands work from anywhere. burnish looks inside the folder first and so does
not mind when it is moved or renamed; for LeRobot's commands, `point_at` mends a moved folder.
"""

import dataclasses
import io
import json
import re
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.policies.keys import ACTION, CONFIG, POSTPROCESSOR, PREPROCESSOR, STATE, VLM_FOLDER

_STATS = {
    "MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"),
}  # fmt: skip


def decode_config(raw: dict[str, Any], source: str, features: dict[str, Any] | None, device: str) -> Any:
    """LeRobot's config object from its JSON form (with "type"), checked; `source` names it in errors."""
    import draccus
    from lerobot.configs.types import FeatureType
    from lerobot.policies.factory import get_policy_class

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BurnishError(f"device {device}", "one that this machine has", "device cpu")
    raw = {**raw, "device": device}
    config_class = get_policy_class(raw.pop("type")).config_class
    try:
        config = draccus.decode(config_class, raw)
    except (draccus.ParsingError, ValueError, TypeError, NotImplementedError) as error:
        raise BurnishError(
            f"{source} cannot be read: {_one_line(error.__cause__ or error)}", f"fields of {config_class.__name__}"
        ) from error
    if features is not None:
        config.output_features = {k: f for k, f in features.items() if f.type is FeatureType.ACTION}
        config.input_features = {k: f for k, f in features.items() if f.type is not FeatureType.ACTION}
    _check_features(config, source)
    try:
        config.validate_features()
    except ValueError as error:
        raise BurnishError(f"{source}: {_one_line(error)}", "values that go together") from error
    return config


def build(config: Any, seed: int) -> nn.Module:
    """LeRobot's policy with random weights of `seed`; the global generator is left as it was."""
    from lerobot.policies.factory import get_policy_class

    with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()):
        torch.manual_seed(seed)
        try:
            return get_policy_class(config.type)(config)
        except OSError as error:  # transformers: no such folder and no hub
            raise BurnishError(
                f"the VLM files at '{getattr(config, 'vlm_model_name', '')}' cannot be read: {_one_line(error)}",
                f"config, tokenizer and processor of the VLM there or in {VLM_FOLDER}/ of the policy folder",
            ) from error


def load_tensors(module: nn.Module, state: dict[str, Tensor], source: str, extra_allowed: bool = False) -> None:
    """Copy `state` into `module`: each of its tensors must be there, in its shape, and (unless allowed) no other.

    A tensor that shares its memory with one that is there (tied weights) may be absent.
    """
    own = module.state_dict()
    present = {own[key].data_ptr() for key in own if key in state}
    missing = [k for k in own if k not in state and own[k].data_ptr() not in present]
    extra = [] if extra_allowed else [k for k in state if k not in own]
    if missing or extra:
        kinds = ((missing, "missing"), (extra, "unknown"))
        said = [f"{len(keys)} {what} ({_first(keys)})" for keys, what in kinds if keys]
        raise BurnishError(f"tensors of {source} do not match the config: {', '.join(said)}",
                           f"exactly the {len(own)} tensors of the model",
                           "the config.json that belongs to the weights")  # fmt: skip
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
        raise BurnishError(f"{len(wrong)} tensors of {source} have other shapes ({wrong[0]}: {shapes})",
                           "the shapes of config.json", "the config.json that belongs to the weights")  # fmt: skip
    module.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def load_vlm(folder: Path | str, *, weights: bool = True) -> nn.Module:
    """The transformers model of a VLM folder in float32, with its own weights or random ones."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    if weights:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


def new_processors(config: Any, dataset_stats: dict[str, Any]) -> tuple[Any, Any]:
    """LeRobot's default pipelines for `config`, checked for their statistics."""
    from lerobot.policies.factory import make_pre_post_processors

    pre, post = make_pre_post_processors(config, dataset_stats=dataset_stats)
    _check_statistics(config, pre, post, "the data set's statistics")
    return pre, post


def point_at(folder: Path, target: str, **fields: str) -> None:
    """Store `target` as the place of the VLM's or the tokenizer's files, unless a hub name is stored.

    Args:
        folder: a policy folder.
        target: e.g. the absolute path of its `vlm/`, after the folder was moved.
        **fields: other fields of its config, e.g. the place of a second tokenizer.
    """
    config, pre = read_json(folder / CONFIG), read_json(folder / PREPROCESSOR)
    if "vlm_model_name" in config and not _is_hub_name(config["vlm_model_name"]):
        config["vlm_model_name"] = target
    config.update(fields)
    for step in pre["steps"]:
        name = step.get("config", {}).get("tokenizer_name")
        if name is not None and not _is_hub_name(name):
            step["config"]["tokenizer_name"] = target
    (folder / CONFIG).write_text(json.dumps(config, indent=4))
    (folder / PREPROCESSOR).write_text(json.dumps(pre, indent=2))


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def read_json(file: Path) -> dict[str, Any]:
    """Raises BurnishError where the file is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BurnishError(f"{file} cannot be read: {_one_line(error)}", "a JSON file as LeRobot writes it") from error


def known_fields(overrides: dict[str, Any], policy_type: str) -> dict[str, Any]:
    """`overrides` as they are; raises BurnishError for one that is no field of that type's config."""
    from lerobot.policies.factory import get_policy_class

    known = {field.name for field in dataclasses.fields(get_policy_class(policy_type).config_class)}
    wrong = sorted(set(overrides) - known)
    if wrong:
        raise BurnishError(f"config field '{wrong[0]}' for {policy_type}", f"one of {', '.join(sorted(known))}")
    return overrides


def _check_features(config: Any, source: str) -> None:
    state, action = config.robot_state_feature, config.action_feature
    if state is None or action is None or not config.image_features:
        found = ", ".join([*(config.input_features or {}), *(config.output_features or {})]) or "none"
        raise BurnishError(
            f"features {found} in {source}", "a camera, observation.state and action", "give features= of the data set"
        )
    for name, feature, limit in (("state", state, "max_state_dim"), ("action", action, "max_action_dim")):
        most = getattr(config, limit, feature.shape[0])  # policies that do not pad have no limit
        if feature.shape[0] > most:
            raise BurnishError(f"{name} of {feature.shape[0]} dimensions", f"at most {limit} = {most}",
                               f"a policy trained with a larger {limit}")  # fmt: skip


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises BurnishError where the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise BurnishError(f"{file} cannot be read: {_one_line(error)}", "the weights of the policy") from error


def load_processors(config: Any, folder: Path, stats: dict[str, Any] | None, tokenizer: Path) -> tuple[Any, Any]:
    """The stored pipelines with device, features, statistics and tokenizer set as lerobot-train does.

    Args:
        config: LeRobot's.
        folder: the policy's.
        stats: LeRobot statistics that replace the stored ones; None keeps them.
        tokenizer: folder of the tokenizer, used where it is there.

    Raises:
        BurnishError: missing files or statistics.
    """
    from lerobot.policies.factory import make_pre_post_processors

    lacking = [name for name in (PREPROCESSOR, POSTPROCESSOR) if not (folder / name).is_file()]
    if lacking and stats is not None:
        return new_processors(config, stats)
    if lacking:
        raise BurnishError(f"no {lacking[0]} in {folder}, so no normalisation statistics", "LeRobot's processor files",
                           "give dataset_stats= of the data set that it was trained on")  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        "device_processor": {"device": config.device},
        "normalizer_processor": {"features": {**config.input_features, **config.output_features},
                                 "norm_map": config.normalization_mapping},
    }  # fmt: skip
    back = {"unnormalizer_processor": {"features": config.output_features, "norm_map": config.normalization_mapping}}
    if stats is not None:
        changes["normalizer_processor"]["stats"] = back["unnormalizer_processor"]["stats"] = stats
    if tokenizer.is_dir():
        changes["tokenizer_processor"] = {"tokenizer_name": str(tokenizer)}
    try:
        pre, post = make_pre_post_processors(config, str(folder),
                                             preprocessor_overrides=_only(changes, folder / PREPROCESSOR),
                                             postprocessor_overrides=_only(back, folder / POSTPROCESSOR))  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BurnishError(f"the processors in {folder} cannot be loaded: {_one_line(error)}",
                           "LeRobot's processor files and a tokenizer that can be found",
                           f"put the tokenizer's files into {tokenizer}") from error  # fmt: skip
    _check_statistics(config, pre, post, str(folder))
    return pre, post


def _only(changes: dict[str, dict[str, Any]], file: Path) -> dict[str, dict[str, Any]]:
    """Those changes whose step the pipeline has; LeRobot refuses others."""
    steps = {step.get("registry_name") for step in read_json(file).get("steps", [])}
    return {name: change for name, change in changes.items() if name in steps}


def _check_statistics(config: Any, pre: Any, post: Any, source: str) -> None:
    """LeRobot passes values on unnormalised where statistics are missing; we do not."""
    from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

    def stored(steps: Iterable[Any], kind: type) -> dict[str, Tensor]:
        return {key: value for step in steps if isinstance(step, kind) for key, value in step.state_dict().items()}

    before, after = stored(pre.steps, NormalizerProcessorStep), stored(post.steps, UnnormalizerProcessorStep)
    needed = [(STATE, config.robot_state_feature, before),
              (ACTION, config.action_feature, before), (ACTION, config.action_feature, after)]  # fmt: skip
    for key, feature, found in needed:
        mode = config.normalization_mapping.get(feature.type.value)
        for statistic in _STATS.get(mode.name if mode else "IDENTITY", ()):
            value = found.get(f"{key}.{statistic}")
            if value is None:
                raise BurnishError(
                    f"no statistic '{statistic}' of {key} in {source} (it has {_first(found) or 'none'})",
                    f"what normalisation {mode.name} needs",
                    "give dataset_stats= of the data set",
                )
            if value.numel() != feature.shape[0]:
                raise BurnishError(f"statistic '{statistic}' of {key} in {source} has {value.numel()} dimensions",
                                   f"{feature.shape[0]}, as the features declare",
                                   "give dataset_stats= of the same data set as features=")  # fmt: skip


def _first(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
