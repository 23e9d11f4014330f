"""Any policy of LeRobot's that has no file of its own: the verbs over LeRobot's common interface, and no more.

Which class a type has is said by LeRobot's registry of config types, never by a name in a folder. What the interface
does not tell about a type stands in TRAITS.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.reading import inside
from burnish.core.types import Batch, Chunk, Draws, PolicyLoss
from burnish.policies import folder as folders
from burnish.policies import tensors
from burnish.policies.base import Captured, Stage, lacks
from burnish.policies.draws import drawn, seeds
from burnish.policies.keys import ACTION, CONFIG, PAD, STATE, TASK
from burnish.policies.pipelines import new_processors, register_steps
from burnish.policies.pretrained import check_files
from burnish.policies.sizes import check_other_numbers
from burnish.policies.wrapper import PolicyWrapper

FETCHED = ("pretrained_backbone_weights",)
"""Config fields that would make LeRobot download weights, which lie in model.safetensors."""


@dataclass(frozen=True)
class Traits:
    """What LeRobot's interface does not tell about a type.

    Args:
        returned: config field with the number of actions that `predict_action_chunk` returns; "" means the chunk.
        stages: (stage, module below the policy, method), see base.Stage.
        tokens: module whose items each return token-shaped hidden states [S, B, D]; "" without such.
        first: embedding with a row for each position before those of the images; the state is the second one.
        pictures: convolution whose output [B, D, h, w] becomes the positions of a camera, called once for each.
        backbone: modules that hold what the hidden states come from.
    """

    returned: str = ""
    stages: tuple[tuple[str, str, str], ...] = (("prompt", "", "predict_action_chunk"),)
    tokens: str = ""
    first: str = ""
    pictures: str = ""
    backbone: tuple[str, ...] = ()


TRAITS = {
    "act": Traits(
        stages=(("vision", "model.backbone", "forward"), ("prompt", "model", "forward"),
                ("head", "model.action_head", "forward")),
        tokens="model.encoder.layers", first="model.encoder_1d_feature_pos_embed",
        pictures="model.encoder_img_feat_input_proj", backbone=("model.backbone", "model.encoder"),
    ),
    "diffusion": Traits("n_action_steps", (("vision", "diffusion", "_prepare_global_conditioning"),
                                           ("prompt", "diffusion.unet", "forward"))),
    "multi_task_dit": Traits("n_action_steps"),
    "vqbet": Traits("action_chunk_size", (("vision", "vqbet.rgb_encoder", "forward"),
                                          ("prompt", "vqbet.policy", "forward"),
                                          ("head", "vqbet.action_head", "forward"))),
}  # fmt: skip


def known_types() -> list[str]:
    """Names of all config types that LeRobot knows, those of installed plug-ins too."""
    import lerobot.policies  # noqa: F401 - registers LeRobot's own
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    return sorted(PreTrainedConfig.get_known_choices())


class LeRobotPolicy(PolicyWrapper):
    """burnish's verbs over any PreTrainedPolicy: loss by its `forward`, act by its `predict_action_chunk`.

    A policy that sees earlier observations gets them as a further axis of state and images, see `window`. Whatever the
    network draws comes from the caller's `Draws`, see `draws.drawn`.
    """

    starts_from_vlm = False
    adapter_targets = ".*"

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any):
        super().__init__(policy, preprocessor, postprocessor)
        self.traits = TRAITS.get(self.name, Traits())
        if self.traits.returned:
            self.n_action_steps = getattr(self.config, self.traits.returned)
        if self.traits.tokens:
            self.capabilities = frozenset({"capture"})
            self.num_layers = len(policy.get_submodule(self.traits.tokens))

    # How a folder is read and a policy made.

    @classmethod
    def read_config(cls, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Weights are in model.safetensors; other files that the config names are taken from inside the folder."""
        known, changed = folders.own_fields(raw["type"]), {}
        check_other_numbers({name: raw[name] for name in known if name in raw}, str(folder / CONFIG))
        for name in known:
            value = raw.get(name)
            if isinstance(value, str) and (folder / name).is_dir():
                check_files(inside(folder, name))
                changed[name] = str(folder / name)
            elif isinstance(value, str) and "/" in value and os.path.exists(value):
                raise BurnishError(f"{folder / CONFIG}: {name} is '{value[:80]}', outside the folder",
                                   f"the files inside it, in {folder / name}")  # fmt: skip
        return {**raw, **changed, **{name: None for name in FETCHED if name in known}}

    @classmethod
    def own_steps(cls, config: Any) -> dict[str, dict[str, Any]]:
        return {name: {} for name in register_steps(config)}

    @classmethod
    def build(cls, config: Any, seed: int, folder: Path | None = None) -> nn.Module:
        where = str(folder / CONFIG) if folder else f"a new {config.type}"
        _check_kind(config, where)
        if folder is not None:
            with torch.device("meta"):
                size = sum(part.numel() for part in folders.build(config, seed).state_dict().values())
            if size > tensors.size(folder):
                raise BurnishError(f"{where} describes a model of {size:.2g} numbers, and its weights have "
                                   f"{tensors.size(folder):.2g} bytes",
                                   "the config.json that belongs to the weights")  # fmt: skip
        return folders.build(config, seed)

    @classmethod
    def build_published(cls, config: Any) -> nn.Module:
        for name in FETCHED:
            if name in vars(config):
                setattr(config, name, None)
        return super().build_published(config)

    @classmethod
    def create(
        cls, name: str, source: Path | str, features: dict, dataset_stats: dict, overrides: dict, *,
        generator_seed: int = 0, device: str = "cpu",
    ) -> "LeRobotPolicy":  # fmt: skip
        """A new policy of LeRobot's, all weights random: nothing is downloaded, its vision backbone included.

        Args:
            source: none; such a policy starts from no VLM.
        """
        if str(source) not in ("", "."):
            raise BurnishError(f"a VLM for a new policy of type {name}", "none: it is made of its config alone")
        known = folders.own_fields(name)
        raw = {"type": name, "push_to_hub": False, **{field: None for field in FETCHED if field in known},
               **folders.known_fields(overrides, name)}  # fmt: skip
        config = folders.decode_config(raw, f"a new {name}", features, device)
        policy = cls.build(config, generator_seed)
        return cls(policy.to(device), *new_processors(config, dataset_stats))

    def write_extras(self, folder: Path, home: Path) -> None:
        """The tokenizer's files, of a type whose preprocessor has one."""
        from lerobot.processor import TokenizerProcessorStep

        for step in self.preprocessor.steps:
            if isinstance(step, TokenizerProcessorStep):
                step.input_tokenizer.save_pretrained(folder / self.tokenizer_folder)
                folders.point_at(folder, str(home / self.tokenizer_folder))

    # The verbs.

    @property
    def act_steps(self) -> int:
        return self.n_action_steps if self.traits.returned else self.chunk_size + self.window.first_action

    def loss(self, batch: Batch, draws: Draws | None = None) -> PolicyLoss:
        """LeRobot's own loss. It is a mean over the batch, which stands for every entry of `per_sample`."""
        actions = batch[ACTION]
        self._check_chunk(actions)
        prepared = self._prepare(batch, actions)
        padded = batch.get(PAD)
        prepared[PAD] = torch.zeros(actions.shape[:2], dtype=torch.bool) if padded is None else padded.bool()
        prepared[PAD] = prepared[PAD].to(self.device)
        with drawn((draws or self.draw(len(actions), self.generator)).noise):
            total, figures = self.policy(prepared)
        parts = {name: torch.as_tensor(value).detach() for name, value in (figures or {}).items() if _is_figure(value)}
        return PolicyLoss(total, total.expand(len(actions)), parts)

    @torch.no_grad()
    def act(self, batch: Batch, draws: Draws | None = None, prefix: Tensor | None = None) -> Chunk:
        """LeRobot's chunk [B, `act_steps`, A] on the CPU, in environment units, the present step first."""
        if prefix is not None and prefix.shape[1]:
            raise lacks(self, "prefix", "act")
        prepared, training = self._prepare(batch, None), self.policy.training
        prepared.pop(ACTION, None)  # None, which LeRobot would look for among the moments
        try:
            with drawn((draws or self.draw(len(batch[TASK]), self.generator)).noise), self._remembering(prepared):
                actions = self.policy.predict_action_chunk(prepared)
        finally:
            self.policy.train(training)  # LeRobot's own switch to evaluation
        return Chunk(self.postprocessor(actions[..., : self.action_dim]))

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        return seeds(batch_size, generator)

    @contextmanager
    def capture(self, layers: Sequence[int]) -> Iterator[Captured]:
        """Outputs [B, S, D] of the layers over tokens, and where image and state are among the S positions."""
        if not self.traits.tokens:
            raise lacks(self, "capture", "capture")
        blocks = self.policy.get_submodule(self.traits.tokens)
        if wrong := [layer for layer in layers if not 0 <= layer < len(blocks)]:
            raise BurnishError(f"layers {wrong} to capture", f"numbers from 0 to {len(blocks) - 1}")
        captured, maps = Captured(), []

        def keep(layer: int) -> Any:
            def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
                if layer in captured.hidden:
                    return output
                captured.hidden[layer] = output.transpose(0, 1)
                return captured.hidden[layer].transpose(0, 1)  # what was caught must be what flows on

            return hook

        def begin(_module: nn.Module, _args: tuple) -> None:
            self._note_positions(captured, maps)
            maps.clear()

        pictures = self.policy.get_submodule(self.traits.pictures)
        handles = [pictures.register_forward_hook(lambda _module, _args, output: maps.append(output))]
        handles.append(blocks[0].register_forward_pre_hook(begin))
        handles += [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the hidden states of `capture` come from."""
        inside = tuple(f"policy.{name}." for name in self.traits.backbone)
        return ((name, p) for name, p in self.named_parameters() if inside and name.startswith(inside))

    def model_stages(self) -> list[Stage]:
        return [Stage(name, self.policy.get_submodule(path), call) for name, path, call in self.traits.stages]

    # Inside.

    def _prepare(self, batch: Batch, actions: Tensor | None) -> dict[str, Any]:
        """As PolicyWrapper; where LeRobot's data has an axis for the moments of an observation, there is one."""
        steps, keys = len(self.window.observations), (*self.camera_keys, STATE)
        for key in (key for key in keys if steps > 1 and key in batch):
            shape = tuple(batch[key].shape)
            if len(shape) != (3 if key == STATE else 5) or shape[1] != steps:
                expected = f"[B, {steps}, ...], as many moments as a policy of type {self.name} sees"
                raise BurnishError(f"{key} of shape {shape}", expected)
        if steps == 1 and self.config.observation_delta_indices is not None:
            batch = {**batch, **{key: batch[key][:, None] for key in keys if key in batch}}
        return super()._prepare(batch, actions)

    @contextmanager
    def _remembering(self, prepared: dict[str, Any]) -> Iterator[None]:
        """Inside, the queues from which LeRobot takes earlier observations hold those of `prepared`."""
        self.policy.reset()
        if self.config.observation_delta_indices is not None:
            views = [prepared[key] for key in self.config.image_features if key in prepared]
            if len({view.shape for view in views}) == 1:
                prepared["observation.images"] = torch.stack(views, dim=-4)
            for key, queue in (vars(self.policy).get("_queues") or {}).items():
                if key != ACTION and key in prepared:
                    queue.extend(prepared[key].unbind(1))
        try:
            yield
        finally:
            self.policy.reset()

    def _note_positions(self, captured: Captured, maps: list[Tensor]) -> None:
        """Start a forward: which positions are whose."""
        before = self.policy.get_submodule(self.traits.first).num_embeddings
        sizes = [one.shape[-2] * one.shape[-1] for one in maps]
        empty = torch.zeros(len(maps[0]), before + sum(sizes), dtype=torch.bool, device=maps[0].device)
        captured.hidden.clear()
        captured.cameras.clear()
        captured.layout = {name: empty.clone() for name in ("image", "text", "state")}
        captured.layout["image"][:, before:] = True
        captured.layout["state"][:, 1:2] = True
        for camera, size in zip(self.cameras, sizes, strict=True):
            captured.cameras[camera] = slice(before, before + size)
            before += size


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _check_kind(config: Any, where: str) -> None:
    """Raise BurnishError for a type that is not trained on past observations and a chunk of actions."""
    seen = config.observation_delta_indices or [0]
    read = [key for key in config.input_features if key != STATE and key not in config.image_features]
    reasons = {
        "predicts no chunk of actions": not config.action_delta_indices,
        "learns from rewards": config.reward_delta_indices is not None,
        "learns from observations of the future": max(seen) > 0,
        f"reads {', '.join(read)}": bool(read),
    }
    for reason, holds in reasons.items():
        if holds:
            raise BurnishError(f"{where}: a policy of type {config.type} that {reason}",
                               "one that is trained on images, state and a chunk of actions")  # fmt: skip
