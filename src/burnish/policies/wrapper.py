"""A LeRobot policy with its processors: preparing batches, saving, and how a folder of its type is read.

The LeRobot policy sits in `PolicyWrapper.policy`, unchanged, so parameter names start with "policy." and are otherwise
those of `model.safetensors`. Its processors sit beside it and are used inside the verbs, once.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from burnish.core import seeding
from burnish.core.errors import BurnishError
from burnish.core.types import Batch, Window
from burnish.policies import folder as folders
from burnish.policies import pipelines, tensors
from burnish.policies.base import Policy, Stage
from burnish.policies.keys import ACTION, IMAGES, STATE, TASK, camera_keys


class PolicyWrapper(Policy):
    """A LeRobot policy with its processors.

    Args:
        policy: LeRobot's PreTrainedPolicy.
        preprocessor, postprocessor: LeRobot's pipelines for it.

    Attributes:
        generator: draws for `loss` and `act` when the caller gives none.
        n_action_steps: steps of a chunk to execute before asking again.
    """

    tokenizer_folder = "tokenizer"
    """Folder inside a policy folder that has the tokenizer's files, for the preprocessor."""
    starts_from_vlm = True
    """Whether a new one needs the folder of a VLM."""
    processor_steps: tuple[str, ...] = ()
    """See `own_steps`."""
    own_folder = False
    """Whether its folders have a layout of their own, not LeRobot's: `load` then reads all of them."""

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any):
        super().__init__()
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self.config = policy.config
        self.name = policy.config.type
        self.camera_keys = camera_keys(self.config)
        self.cameras = tuple(key.removeprefix(IMAGES) for key in self.camera_keys)
        steps = self.config.action_delta_indices
        self.chunk_size, seen = len(steps), self.config.observation_delta_indices or (0,)
        self.window = Window(tuple(seen), steps[0], getattr(self.config, "drop_n_last_frames", 0))
        self.n_action_steps = getattr(self.config, "n_action_steps", 0)  # a type may have another name for it
        self.image_size = self.config.image_features[self.camera_keys[0]].shape[-1]
        self.action_dim = self.config.action_feature.shape[0]
        self.state_dim = self.config.robot_state_feature.shape[0]
        self.num_layers = 0
        self.generator = seeding.generator("policy draws")
        self.requires_grad_(True)
        for part in self.frozen_parts:
            part.requires_grad_(False)

    @property
    def frozen_parts(self) -> list[nn.Module]:
        """Parts that the policy's config leaves untrained."""
        return []

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        shapes = (self.config.image_features[key].shape for key in self.camera_keys)
        return {camera: (shape[-2], shape[-1]) for camera, shape in zip(self.cameras, shapes, strict=True)}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to`, `cuda` and the like call; the preprocessor goes along, so that no batch makes a detour."""
        super()._apply(fn, recurse)
        pipelines.place(self.preprocessor, self.device)
        return self

    # How a folder of its type is read and made.

    @classmethod
    def read_config(cls, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The fields of config.json (with "type") as the config is to be made of them."""
        return raw

    @classmethod
    def own_steps(cls, config: Any) -> dict[str, dict[str, Any]]:
        """Registered steps of its processors beyond LeRobot's common ones, with options that replace the stored ones;
        a folder may name no others.
        """
        return {name: {} for name in cls.processor_steps}

    @classmethod
    def build(cls, config: Any, seed: int, folder: Path | None = None) -> nn.Module:
        """LeRobot's policy with random weights of `seed`; `folder` is the one that it is loaded from, if any."""
        return folders.build(config, seed)

    @classmethod
    def empty(cls, folder: Path | None, raw: dict[str, Any], changes: dict[str, Any], features: dict[str, Any] | None,
              tokens: Callable[[Any], Any]) -> Self:  # fmt: skip
        """The wrapper of a policy that is shapes alone, see `burnish.train.cost`.

        Args:
            folder: whose config `raw` is; None for one of the published sizes.
            raw: config.json with "type".
            changes: fields that replace its own.
            features: LeRobot features that replace those of `raw`.
            tokens: makes of a config what stands in for preprocessor and tokenizer.
        """
        raw = {**raw, **folders.known_fields(changes, raw["type"])}
        raw = raw if folder is None else cls.read_config(raw, folder)
        config = folders.decode_config(raw, str(folder or raw["type"]), features, "cpu")
        policy = cls.build_published(config) if folder is None else cls.build(config, 0, folder)
        return cls(policy, tokens(config), None)

    @classmethod
    def build_published(cls, config: Any) -> nn.Module:
        """`build` in the sizes of the weights that were published for this type, from no files."""
        return cls.build(config, 0)

    @classmethod
    def rename_tensors(cls, policy: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors under the names of `policy`."""
        return state

    @classmethod
    def open(
        cls, policy: nn.Module, preprocessor: Any, postprocessor: Any, folder: Path, dataset_stats: dict | None
    ) -> Self:
        """The wrapper of a policy loaded from `folder`; `dataset_stats` are given where they replace the stored ones.

        Raises:
            BurnishError: a policy that could not act; this is the place to find out, not after a training.
        """
        return cls(policy, preprocessor, postprocessor)

    @classmethod
    def load(
        cls, folder: Path, raw: dict[str, Any], *, overrides: dict[str, Any], device: str,
        dataset_stats: dict[str, Any] | None, features: dict[str, Any] | None, stats_source: str,
    ) -> Self:  # fmt: skip
        """The policy of a folder with a layout of its own; `raw` is its config.json, the rest as for `load_policy`."""
        raise NotImplementedError(f"{cls.__name__} has own_folder without load")

    @classmethod
    def create(
        cls, name: str, source: Path | str, features: dict, dataset_stats: dict, overrides: dict, **options: Any
    ) -> "PolicyWrapper":
        """A new policy of type `name`, see `burnish.policies.create_policy`."""
        raise BurnishError(f"a new policy of type '{name}'", "smolvla, pi0, pi05 or burnish_discrete",
                           "load a checkpoint of that type instead")  # fmt: skip

    def stored(self) -> nn.Module:
        return self.policy

    def save(self, folder: Path, *, home: Path | None = None, dtype: torch.dtype | None = None,
             state_dict: Mapping[str, Tensor] | None = None) -> None:  # fmt: skip
        """Write an ordinary LeRobot policy folder; making that atomic is the caller's business.

        Args:
            home: where the folder will be in the end, when it is written elsewhere and renamed. Its absolute path is
                what LeRobot's own commands will look for.
            dtype: store floating weights so (e.g. torch.float16), buffers never; None keeps them.
            state_dict: weights to store instead of the policy's own (a moving average), with the names of
                `policy.policy.state_dict()`.

        Raises:
            BurnishError: weights that are not finite.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        state = self.policy.state_dict() if state_dict is None else state_dict
        tensors.write_weights(folder, state, dtype, exact=(name for name, _ in self.policy.named_buffers()))
        self.preprocessor.save_pretrained(folder)
        self.postprocessor.save_pretrained(folder)
        self.write_extras(folder, Path(home or folder).absolute())
        tensors.share_mode(folder)

    def write_extras(self, folder: Path, home: Path) -> None:
        """Write the files beside config, weights and processors that make the folder self-contained."""

    def read_extras(self, folder: Path) -> None:
        """Take from those files what the policy remembers of its training."""

    # What burnish asks of every policy.

    def normalization(self, kind: str) -> str:
        mode = self.config.normalization_mapping.get(kind)
        return "" if mode is None else mode.value

    def settings(self) -> dict[str, Any]:
        return dict(vars(self.config))

    def model_stages(self) -> list[Stage]:
        """The model's calls of names vision, prompt, pass and head."""
        return []

    def stages(self) -> list[Stage]:
        return [Stage("preprocess", self, "_prepare"), *self.model_stages(),
                Stage("postprocess", self, "postprocessor")]  # fmt: skip

    # Inside.

    def _check_chunk(self, actions: Tensor, ndim: int = 3) -> None:
        if actions.ndim != ndim or actions.shape[-2] != self.chunk_size:
            raise BurnishError(f"actions of shape {tuple(actions.shape)}", f"[B, {self.chunk_size}, {self.action_dim}]")

    def _prepare(self, batch: Batch, actions: Tensor | None) -> dict[str, Any]:
        """Check the batch and run LeRobot's preprocessor over the keys that the policy reads."""
        missing = [key for key in (*self.camera_keys, STATE, TASK) if key not in batch]
        if missing:
            raise BurnishError(f"a batch without {', '.join(missing)} (it has {', '.join(batch)})",
                               f"cameras {', '.join(self.cameras)}, {STATE} and {TASK}")  # fmt: skip
        chosen = {key: batch[key] for key in (*self.camera_keys, STATE, TASK)}
        masks = (f"{key}_padding_mask" for key in self.camera_keys)  # views that some samples lack
        chosen |= {key: batch[key] for key in masks if key in batch}
        if actions is not None:
            chosen[ACTION] = actions
            _check_width(ACTION, actions, self.action_dim)
            if actions.shape[-2] > self.chunk_size:
                raise BurnishError(f"{actions.shape[-2]} actions", f"at most the chunk of {self.chunk_size}")
        _check_width(STATE, chosen[STATE], self.state_dim)
        prepared = self.preprocessor(chosen)
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in prepared.items()}


def _check_width(key: str, value: Tensor, width: int) -> None:
    if value.shape[-1] != width:
        raise BurnishError(f"{key} of {value.shape[-1]} dimensions", f"{width}, as the policy's config declares")
