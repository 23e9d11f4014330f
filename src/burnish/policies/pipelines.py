"""The processors of a policy folder, read by ourselves: registered steps of a short list, and nothing else runs.

LeRobot's own reader imports and calls whatever `class` a step names, follows state files out of the folder, and passes
values on unnormalised where statistics are missing. This one does none of it.
"""

import logging
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.options import option, read_options
from burnish.core.reading import inside, read_object
from burnish.policies.keys import ACTION, MODES, POSTPROCESSOR, PREPROCESSOR, STATE, camera_keys
from burnish.policies.pretrained import check_files, foreign, load_tokenizer, no_remote_code, require_inside
from burnish.policies.tensors import first, read_file

log = logging.getLogger("burnish")
MOST_STEPS = 32
_KEYS = {"registry_name", "config", "state_file", "artifacts"}


@dataclass
class _Options:
    """Options of all steps on the lists; a step's class refuses those of another."""

    rename_map: dict = option({})
    tokenizer_name: str | None = option(None)
    max_length: int = option(512, least=1, most=8192)
    task_key: str = option("task", choices=("task",))
    padding_side: str = option("right", choices=("right", "left"))
    padding: str | bool = option("max_length", choices=("max_length", "longest", "do_not_pad", True, False))
    truncation: bool = option(True)
    device: str = option("cpu")
    float_dtype: str | None = option(None, choices=(None, "float16", "bfloat16", "float32", "float64"))
    features: dict = option({})
    norm_map: dict = option({})
    eps: float = option(1e-8, above=0, most=0.1)
    normalize_observation_keys: list[str] | None = option(None)
    enabled: bool = option(False)
    exclude_joints: list[str] = option([])
    action_names: list[str] | None = option(None)
    max_state_dim: int = option(32, least=1, most=4096)
    include_state_in_prompt: bool = option(True)


STEPS = {
    PREPROCESSOR: ("rename_observations_processor", "to_batch_processor", "device_processor", "normalizer_processor",
                   "smolvla_new_line_processor", "pi0_new_line_processor", "tokenizer_processor",
                   "pi05_prepare_state_tokenizer_processor_step", "relative_actions_processor"),
    POSTPROCESSOR: ("unnormalizer_processor", "absolute_actions_processor", "device_processor"),
}  # fmt: skip
"""Steps that may stand before the model and after it."""


def load_processors(config: Any, folder: Path, stats: dict[str, Any] | None, tokenizer: str, *, renamed: bool = False,
                    own: dict[str, dict[str, Any]] | None = None, source: str = "") -> tuple[Any, Any]:  # fmt: skip
    """The stored pipelines with device, features, statistics and tokenizer set as lerobot-train does.

    Args:
        stats: LeRobot statistics that replace the stored ones; None keeps them.
        tokenizer: name of the folder inside it that has the tokenizer's files.
        renamed: the features are not those that the policy was stored with, so its rename map goes too.
        own: registered steps that the policy's type has beyond LeRobot's, with options that replace the stored ones.
    """
    from lerobot.policies.factory import _reconnect_relative_absolute_steps

    lacking = [name for name in (PREPROCESSOR, POSTPROCESSOR) if not (folder / name).exists()]
    if lacking and stats is None:
        raise BurnishError(f"no {lacking[0]} in {folder}, so no normalisation statistics",
                           "LeRobot's processor files, or a training (it takes its data set's statistics)")  # fmt: skip
    register_steps(config)
    if lacking:
        return new_processors(config, stats, source or str(folder), folder / tokenizer)
    before, after = (_entries(folder, name, (*STEPS[name], *(own or ()))) for name in (PREPROCESSOR, POSTPROCESSOR))
    changes: dict[str, dict[str, Any]] = {
        **(own or {}),
        "device_processor": {"device": str(config.device)},
        "normalizer_processor": {"features": {**config.input_features, **config.output_features},
                                 "norm_map": config.normalization_mapping},
    }  # fmt: skip
    back = {"unnormalizer_processor": {"features": config.output_features, "norm_map": config.normalization_mapping}}
    if stats is not None:
        stats = picture_statistics(config, stats, _stored_statistics(before, folder))
        changes["normalizer_processor"]["stats"] = back["unnormalizer_processor"]["stats"] = stats
    if renamed:
        changes["rename_observations_processor"] = {"rename_map": {}}
    for entry in before:
        if entry["registry_name"] == "tokenizer_processor":
            changes["tokenizer_processor"] = _tokenizer(folder, tokenizer, entry)
        elif entry["registry_name"] == "rename_observations_processor" and not renamed:
            _check_rename(config, entry["config"], folder)
    with no_remote_code():
        pre, post = _pipeline(before, changes, folder, PREPROCESSOR), _pipeline(after, back, folder, POSTPROCESSOR)
    _reconnect_relative_absolute_steps(pre, post)
    _check_statistics(config, pre, post, source if source and stats is not None else str(folder))
    return pre, post


def new_processors(config: Any, dataset_stats: dict[str, Any], source: str = "the data set's statistics",
                   tokenizer: Path | None = None) -> tuple[Any, Any]:  # fmt: skip
    """LeRobot's default pipelines for `config`, checked for their statistics.

    Args:
        tokenizer: folder of the tokenizer, whatever name LeRobot has for it; None takes LeRobot's.
    """
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.processor import TokenizerProcessorStep

    local = tokenizer if tokenizer is not None and tokenizer.is_dir() else None
    stats = picture_statistics(config, dataset_stats, {})
    with no_remote_code(local), foreign("the processors cannot be made", "a tokenizer and statistics that fit"):
        pre, post = make_pre_post_processors(config, dataset_stats=stats)
    for step in pre.steps if local is not None else ():
        if isinstance(step, TokenizerProcessorStep):
            step.tokenizer_name = str(local)
    _check_statistics(config, pre, post, source)
    return pre, post


def place(preprocessor: Any, device: torch.device) -> None:
    """Let the pipeline move batches to `device`; statistics follow the batches by themselves."""
    from lerobot.processor import DeviceProcessorStep

    for step in preprocessor.steps:
        if isinstance(step, DeviceProcessorStep):
            step.device, step.tensor_device, step.non_blocking = device.type, device, device.type == "cuda"


def _entries(folder: Path, name: str, known: Iterable[str]) -> list[dict[str, Any]]:
    """The steps of a stored pipeline, each with "registry_name" and "config", checked."""
    path, entries = folder / name, []
    steps = read_object(path, folder).get("steps")
    if not isinstance(steps, list) or not 0 < len(steps) <= MOST_STEPS:
        raise BurnishError(f"{path} has no steps", f"a list of 1 to {MOST_STEPS}, as LeRobot writes it")
    for number, step in enumerate(steps):
        where = f"{path}: step {number}"
        if not isinstance(step, dict) or not isinstance(step.get("config", {}), dict):
            raise BurnishError(f"{where} is no JSON object with options", "registry_name and config: {...}")
        kind, unknown = step.get("registry_name"), sorted(set(step) - _KEYS - {"class"})
        if "class" in step or not isinstance(kind, str):
            raise BurnishError(f"{where} names the class {str(step.get('class'))[:60]!r} to be imported and called",
                               "the registry_name of a step of LeRobot's")  # fmt: skip
        if kind not in known or unknown:
            raise BurnishError(f"{where} is '{kind}'" + (f" with '{unknown[0]}'" if unknown else ""),
                               f"one of {', '.join(known)}, with {', '.join(sorted(_KEYS))}")  # fmt: skip
        if kind in [entry["registry_name"] for entry in entries]:
            raise BurnishError(f"{where} is a second '{kind}'", "each step once")
        config = step.get("config", {})
        if kind in STEPS[name]:
            read_options(_Options, config, f"{where} ({kind})")
        entries.append({**step, "config": config})
    return entries


def _tokenizer(folder: Path, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Options of the tokenizer step: the loaded tokenizer and where it lies inside the folder."""
    artifacts = entry.get("artifacts") or {}
    stored = artifacts.get("tokenizer_name") if isinstance(artifacts, dict) else None
    if not (folder / name).is_dir() and isinstance(stored, str) and stored:  # as later versions of LeRobot save it
        name = str(inside(folder, stored).relative_to(folder))
    place = require_inside(folder, name, entry["config"].get("tokenizer_name"))
    return {"tokenizer": load_tokenizer(place), "tokenizer_name": str(place)}


def _check_rename(config: Any, options: dict[str, Any], folder: Path) -> None:
    """A key that the config declares must reach the model under its own name."""
    names = options.get("rename_map", {})
    if not all(isinstance(name, str) for name in names.values()):
        raise BurnishError(f"{folder / PREPROCESSOR}: rename_map has a value that is no name", "key to key")
    declared = [*(config.input_features or {}), ACTION]
    lost = [key for key in declared if names.get(key, key) != key]
    if lost:
        raise BurnishError(f"{folder / PREPROCESSOR} renames '{lost[0]}' to '{names[lost[0]]}', so that it never "
                           "reaches the model that declares it",
                           "the names of config.json, or an empty rename_map")  # fmt: skip


def register_steps(config: Any) -> list[str]:
    """Import the file in which LeRobot (or a package) registers the steps of this type of policy; their names."""
    from lerobot.processor import ProcessorStepRegistry  # registers the common steps

    module = type(config).__module__.replace("configuration_", "processor_")
    with foreign(f"the processors of {config.type} cannot be imported", "LeRobot with that policy"):
        import_module(module)
    return [name for name in ProcessorStepRegistry.list() if ProcessorStepRegistry.get(name).__module__ == module]


def picture_statistics(config: Any, stats: dict[str, Any], stored: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`stats` with those by which the policy normalises pictures, where it does.

    A camera keeps the statistics that it was trained with (`stored`); a new one has ImageNet's, as with lerobot-train.
    """
    from lerobot.utils.constants import IMAGENET_STATS

    mode = config.normalization_mapping.get("VISUAL")
    if mode is None or mode.name not in MODES:
        return stats
    usual = {name: torch.tensor(value) for name, value in IMAGENET_STATS.items()} if mode.name == "MEAN_STD" else {}
    return stats | {key: stored.get(key) or {**stats.get(key, {}), **usual} for key in config.image_features}


def _stored_statistics(entries: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Statistics of a stored pipeline by feature and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        if entry["registry_name"] == "normalizer_processor" and entry.get("state_file") is not None:
            for name, value in _state(entry["state_file"], folder, PREPROCESSOR).items():
                key, _, statistic = name.rpartition(".")
                found.setdefault(key, {})[statistic] = value
    return found


def _pipeline(entries: list[dict[str, Any]], changes: dict[str, dict[str, Any]], folder: Path, name: str) -> Any:
    from lerobot.processor import PolicyProcessorPipeline, ProcessorStepRegistry
    from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

    steps = []
    for entry in entries:
        kind = entry["registry_name"]
        stored, given = entry["config"], changes.get(kind, {})
        if kind not in STEPS[name]:
            stored = _local({k: v for k, v in stored.items() if k not in given}, folder, f"{folder / name}: '{kind}'")
        options = {**stored, **given}
        place = options.pop("tokenizer_name", None)
        with foreign(f"{folder / name}: step '{kind}' cannot be made", "options as LeRobot writes them"):
            step = ProcessorStepRegistry.get(kind)(**options)
            if "tokenizer" in options:  # a step that was given a tokenizer does not store its place
                step.tokenizer, step.tokenizer_name = None, place
            if entry.get("state_file") is not None:
                step.load_state_dict(_state(entry["state_file"], folder, name))
        steps.append(step)
    back = {"to_transition": policy_action_to_transition, "to_output": transition_to_policy_action}
    ways = back if name == POSTPROCESSOR else {}
    return PolicyProcessorPipeline(steps=steps, name=name.removesuffix(".json"), **ways)


def _local(options: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Options of a step that only its type has: what names other files is a folder inside, called as the option."""
    changed = {}
    for name, value in options.items():
        if isinstance(value, str) and ("/" in value or value.startswith("~") or os.path.exists(value)):
            if not inside(folder, name).is_dir():
                found = f"{where} has {name} {value[:80]!r}, outside the folder"
                raise BurnishError(found, f"the files inside it, in {folder / name}")
            check_files(folder / name)
            changed[name] = str(folder / name)
    return {**options, **changed}


def _state(file: Any, folder: Path, name: str) -> dict[str, Tensor]:
    if not isinstance(file, str) or re.fullmatch(r"[\w-][\w.-]*\.safetensors", file) is None:
        raise BurnishError(f"{folder / name}: state_file is {str(file)[:80]!r}", "a file of the folder, by name")
    return read_file(folder / file, folder)


def _check_statistics(config: Any, pre: Any, post: Any, source: str) -> None:
    """Statistics that normalisation needs are there, finite, of the right width, and spread."""
    from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

    def stored(steps: Iterable[Any], kind: type) -> dict[str, Tensor]:
        return {key: value for step in steps if isinstance(step, kind) for key, value in step.state_dict().items()}

    for step in pre.steps:
        chosen = step.normalize_observation_keys if isinstance(step, NormalizerProcessorStep) else None
        if chosen is not None and STATE not in chosen:
            raise BurnishError(f"{source} leaves {STATE} out of the normalisation", "normalize_observation_keys: null")
    before, after = stored(pre.steps, NormalizerProcessorStep), stored(post.steps, UnnormalizerProcessorStep)
    pictures = {key: config.image_features[key] for key in camera_keys(config)}
    for key, feature, found in (
        (STATE, config.robot_state_feature, before),
        (ACTION, config.action_feature, before),
        (ACTION, config.action_feature, after),
        *((key, feature, before) for key, feature in pictures.items()),
    ):
        mode = config.normalization_mapping.get(feature.type.value)
        if mode is None or mode.name not in MODES:
            continue
        for statistic in MODES[mode.name]:
            value = found.get(f"{key}.{statistic}")
            if value is None:
                raise BurnishError(f"no statistic '{statistic}' of {key} in {source} (it has {first(found) or 'none'})",
                                   f"what normalisation {mode.name} needs", _remedy(statistic, source))  # fmt: skip
            if tuple(value.shape) != tuple(feature.shape) and key not in pictures:
                raise BurnishError(f"statistic '{statistic}' of {key} in {source} has {value.numel()} dimensions",
                                   f"{feature.shape[0]}, as the features declare",
                                   "statistics and features of the same data set")  # fmt: skip
        _check_spread(key, mode.name, found, source)


def _check_spread(key: str, mode: str, found: dict[str, Tensor], source: str) -> None:
    low, high = (found[f"{key}.{statistic}"] for statistic in MODES[mode])
    spread, names = high if mode == "MEAN_STD" else high - low, " and ".join(MODES[mode])
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise BurnishError(f"{names} of {key} in {source} are not all finite", "finite statistics")
    if bool((spread < 0).any()):
        what = "a negative std" if mode == "MEAN_STD" else f"{names} the wrong way round"
        raise BurnishError(f"{what} of {key} in {source} (dimension {int((spread < 0).nonzero()[0])})")
    still = (spread == 0).nonzero().flatten().tolist()
    if still:
        log.warning("%s of %s do not spread in dimension %s (%s): a value that differs at all is blown up there",
                    names, key, ", ".join(map(str, still)), source)  # fmt: skip


def _remedy(statistic: str, source: str) -> str:
    """The command that adds a quantile, where the statistics are a data set's (`source` then ends in stats.json)."""
    if not (source.endswith("stats.json") and statistic.startswith("q")):
        return ""
    root = Path(source).parent.parent
    where = shlex.quote(str(root))
    return f"python -m lerobot.scripts.augment_dataset_quantile_stats --repo-id local/{root.name} --root {where}"
