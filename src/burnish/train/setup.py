"""What a run needs before its first step: accelerator, data, policy, objectives."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

from burnish import policies
from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.options import home
from burnish.core.provenance import weights_hash
from burnish.core.recipe import demos_root
from burnish.data.checks import colour_cameras
from burnish.data.dataset import Dataset
from burnish.data.features import ACTION, IMAGES, STATE
from burnish.data.loader import RobotData
from burnish.data.mix import check_cameras, open_sources, use_statistics
from burnish.data.mixed import training_data
from burnish.methods.objective import OBJECTIVES, Objective
from burnish.policies.base import Policy
from burnish.policies.load import kind_of
from burnish.train.selfcheck import check_statistics
from burnish.train.sharded import check_launch


@contextmanager
def own_accelerate_state() -> Iterator[None]:
    """accelerate keeps its settings in process-wide variables; without this a second run could not choose others."""
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):  # a step seeds torch's global generators
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=False)
            GradientState._reset_state()


def precision_note(precision: str, device: torch.device) -> list[str]:
    """What to say to whoever trains in float32 on a GPU; the default is the same everywhere, so that bits are."""
    if device.type != "cuda" or precision != "no":
        return []
    return ["train.precision is no: float32 on a GPU, without its matrix units; --train.precision=bf16 uses them and "
            "keeps weights and optimiser in float32"]  # fmt: skip


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of those that a launcher started; known before accelerate."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def process_count() -> int:
    """How many processes a launcher has started; known before accelerate."""
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    found = next((os.environ[name] for name in names if name in os.environ), "1")
    return max(1, int(found)) if found.isdecimal() else 1


def make_accelerator(recipe: RecipeConfig, output: Path):
    """accelerate's Accelerator for this recipe; several processes where a launcher started them."""
    config = recipe.train
    no_device = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    if config.precision == "fp16" and no_device:
        raise BurnishError("train.precision is fp16 but there is no GPU", "no or bf16", "--train.precision=no")
    if config.precision == "fp16" and config.shard:
        raise BurnishError("train.shard with train.precision fp16", "no or bf16", "--train.precision=bf16")
    # Which parameters a step reaches depends on the policy, the language stream and the objectives (an unused
    # language head, a method that sits out some steps), so the reducer must look each time.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Sharded gradients are reduced after each micro-batch: kept for later they would be whole.
    steps = GradientAccumulationPlugin(num_steps=config.grad_accumulation, sync_each_batch=config.shard)
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision, gradient_accumulation_plugin=steps, cpu=no_device,
            log_with=config.trackers or None, project_dir=str(output) if config.trackers else None,
            kwargs_handlers=[unused],
        )  # fmt: skip
    except ValueError as error:
        raise BurnishError(f"accelerate refuses the settings ({error})", "other train.precision or trackers") from error
    check_launch(accelerator, config.shard)
    missing = [t for t in config.trackers if t not in {str(tracker) for tracker in accelerator.log_with}]
    if missing:
        raise BurnishError(f"tracker '{missing[0]}' is not installed", f"pip install {missing[0]}")
    if config.trackers:
        _start_trackers(accelerator, recipe)
    return accelerator


def _start_trackers(accelerator, recipe: RecipeConfig) -> None:
    errors: tuple[type[Exception], ...] = (ValueError, RuntimeError, OSError)
    if "wandb" in recipe.train.trackers:
        import wandb

        errors += (wandb.Error,)
    try:
        accelerator.init_trackers(recipe.name)
    except errors as error:
        line = str(error).splitlines()[0]
        raise BurnishError(f"the trackers {', '.join(recipe.train.trackers)} do not start ({line})") from error


def policy_and_data(recipe: RecipeConfig, progress: bool, device: str = "cpu") -> tuple[Policy, RobotData, str]:
    """Load the data sets and, onto its device, the policy that fits them; also returns the hash of its weights."""
    sources = open_sources(recipe)
    root, meta = sources[0].root, sources[0].meta
    cameras = _cameras(recipe, meta)
    check_cameras(recipe, sources, cameras)
    keys = tuple(k for k in (ACTION, STATE) if k in meta.features)
    for source in sources:
        source.require(cameras)
        check_statistics(source.meta.stats, keys, source.root)
    use_statistics(sources, recipe.data.statistics)
    policy = _load_policy(recipe, meta, f"{root}/meta/stats.json", device)
    width = meta.features["action"]["shape"][0]
    if policy.action_dim != width:
        raise BurnishError(f"{root} has actions of dimension {width}", f"{policy.action_dim} as the policy has",
                           "a policy or data set that fits")  # fmt: skip
    return policy, training_data(recipe, sources, policy, progress), weights_hash(policy)


def _load_policy(recipe: RecipeConfig, meta: Dataset, stats_source: str, device: str) -> Policy:
    features, overrides = _features(recipe, meta), dict(recipe.policy.overrides)
    if recipe.policy.path:
        stats = None if recipe.data.statistics == "policy" else meta.stats
        return policies.load_policy(recipe.policy.path, overrides=overrides, dataset_stats=stats, features=features,
                                    stats_source=stats_source, device=device)  # fmt: skip
    if kind_of(recipe.policy.type).starts_from_vlm and "vlm_model_name" not in overrides:
        fix = f"--policy.path=small, or --policy.overrides.vlm_model_name=FOLDER for a new {recipe.policy.type}"
        raise BurnishError("policy.path is empty", "a LeRobot policy folder or the name of a shipped base", fix)
    return policies.create_policy(overrides.pop("vlm_model_name", ""), features, meta.stats, overrides,
                                  type=recipe.policy.type, device=device)  # fmt: skip


def dataset_features(recipe: RecipeConfig) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """LeRobot's features that a policy of this recipe gets, None for those of its folder; and what is assumed of them.

    Nothing but the data set's metadata is read; where there is none yet, the folder's features, or two cameras, stand
    in.
    """
    from lerobot.configs.types import FeatureType, PolicyFeature

    root = demos_root(recipe)
    if root.is_dir() or recipe.data.mix:
        return _features(recipe, open_sources(recipe)[0].meta), ()
    if Path(home(recipe.policy.path)).is_dir():
        return None, (f"no data set at {root}: cameras, state and actions as the policy's",)
    views = [name.removeprefix(IMAGES) for name in recipe.data.cameras] or ["first", "second"]
    edge = recipe.data.image_size or 224
    features = {IMAGES + name: PolicyFeature(FeatureType.VISUAL, (3, edge, edge)) for name in views}
    features |= {STATE: PolicyFeature(FeatureType.STATE, (8,)), ACTION: PolicyFeature(FeatureType.ACTION, (7,))}
    return features, (f"no data set at {root}: {len(views)} cameras, 8 state and 7 action dimensions",)


def _cameras(recipe: RecipeConfig, meta: Dataset) -> list[str]:
    """Full keys of the chosen cameras; by default all that show colours."""
    wanted = [c if c.startswith("observation.") else IMAGES + c for c in recipe.data.cameras]
    for camera in wanted:
        if camera not in meta.camera_keys and meta.camera_keys:
            known = [key.removeprefix(IMAGES) for key in meta.camera_keys]
            dark = ", which shows no colours" if camera in meta.views else ""
            raise BurnishError(f"data.cameras names '{camera.removeprefix(IMAGES)}'{dark}",
                               f"one of {', '.join(known)}", f"--data.cameras=[{','.join(known)}]")  # fmt: skip
    return wanted or colour_cameras(meta)


def _features(recipe: RecipeConfig, meta: Dataset) -> dict[str, Any]:
    """LeRobot's features of what is trained on: the chosen cameras at the training size, state, action."""
    from lerobot.configs.types import FeatureType
    from lerobot.utils.feature_utils import dataset_to_policy_features

    names = [*_cameras(recipe, meta), STATE, ACTION]  # policies that know views by their place take them in this order
    wanted = {key: meta.features[key] for key in names if key in meta.features}
    features = {}
    for key, feature in dataset_to_policy_features(wanted).items():
        if feature.type is FeatureType.VISUAL:
            scale = min(1.0, (recipe.data.image_size or 1 << 30) / max(feature.shape[1:]))
            feature = replace(feature, shape=(3, *(max(1, round(edge * scale)) for edge in feature.shape[1:])))
        features[key] = feature
    return features


def make_objectives(recipe: RecipeConfig) -> dict[str, Objective]:
    """The recipe's methods by name, in its order. A name "package.module:Class" is imported."""
    objectives: dict[str, Objective] = {}
    for entry in recipe.objectives:
        options = dict(entry)
        name = options.pop("name")
        kind = OBJECTIVES.get(name)
        if not (isinstance(kind, type) and issubclass(kind, Objective)):
            raise BurnishError(f"'{name}' is no Objective", "a subclass of burnish.methods.objective.Objective")
        short = name.rpartition(":")[2]
        if short in objectives:
            raise BurnishError(f"objective '{name}' is listed twice", "each method once")
        try:
            objectives[short] = kind(**options)
        except TypeError as error:
            raise BurnishError(f"objective '{name}' does not take these options ({error})",
                               "the options of its page") from error  # fmt: skip
    return objectives
