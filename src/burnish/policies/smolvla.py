"""SmolVLA: the language model reads images, text and state; the expert reads its keys and values."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.policies import folder as folders
from burnish.policies import language, tensors
from burnish.policies.base import Captured, recompute
from burnish.policies.flow import FlowPolicy
from burnish.policies.keys import STATE, TOKEN_MASK, TOKENS, VLM_FOLDER
from burnish.policies.load import POLICIES
from burnish.policies.pipelines import new_processors
from burnish.policies.pretrained import check_size, load_vlm, require_inside, vlm_config
from burnish.policies.vlm import note_layout

_SMOLVLM2_TEXT = {
    "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
    "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280,
}  # fmt: skip
_SMOLVLM2_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 512, "patch_size": 16,
}  # fmt: skip


@POLICIES.register("smolvla")
class SmolVLA(FlowPolicy):
    """burnish's verbs over lerobot's SmolVLAPolicy. The language verbs use the very VLM of the policy, which LeRobot
    cuts down to `num_vlm_layers`.
    """

    tokenizer_folder = VLM_FOLDER
    tower = "vision_model"
    state_positions = 1
    jacobian = "identity"  # rows of a chunk attend causally

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any):
        super().__init__(policy, preprocessor, postprocessor)
        see_whole(self.vlm.model.vision_model)

    @classmethod
    def read_config(cls, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
        """All weights are in model.safetensors, and the VLM's other files inside the folder."""
        place = require_inside(folder, VLM_FOLDER, raw.get("vlm_model_name"))
        return {**raw, "vlm_model_name": str(place), "load_vlm_weights": False}

    @classmethod
    def build(cls, config: Any, seed: int, folder: Path | None = None) -> nn.Module:
        place = Path(config.vlm_model_name)
        vlm = _smolvlm(place)
        check_size(vlm, tensors.size(folder or place), place, config.num_vlm_layers)
        _check_use(config, vlm.vision_config.patch_size, str(folder or place))
        return folders.build(config, seed)

    @classmethod
    def build_published(cls, config: Any) -> nn.Module:
        """On SmolVLM2-500M-Video-Instruct, whose config and processor lie on the hub."""
        from lerobot.policies.smolvla import smolvlm_with_expert
        from transformers import SmolVLMConfig

        vlm = SmolVLMConfig(text_config=_SMOLVLM2_TEXT, vision_config=_SMOLVLM2_VISION, scale_factor=4)
        processor = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=0, global_image_token_id=0))
        config.load_vlm_weights = False
        local = {name: SimpleNamespace(from_pretrained=lambda *_, found=found, **__: found)
                 for name, found in (("AutoConfig", vlm), ("AutoProcessor", processor))}  # fmt: skip
        with patch.multiple(smolvlm_with_expert, **local):
            return folders.build(config, 0)

    @property
    def input_size(self) -> int:
        return max(self.config.resize_imgs_with_padding or (0,))

    @property
    def vlm(self) -> nn.Module:
        return self.policy.model.vlm_with_expert.vlm

    @property
    def inner(self) -> nn.Module:
        return self.policy.model.vlm_with_expert

    @property
    def expert(self) -> nn.Module:
        return self.inner.lm_expert

    def token_counters(self) -> list[nn.Module]:
        return [self.vlm.model.text_model.layers[0].mlp, self.expert.layers[0].mlp]

    def recompute(self) -> list[Callable[[], None]]:
        """LeRobot runs a layer's parts by hand: attention with its norm, the second norm, and the MLP each count."""
        inner = self.inner
        by_hand = [*inner.vlm.model.text_model.layers, *inner.lm_expert.layers]
        parts = [part for layer in by_hand for part in (layer.post_attention_layernorm, layer.mlp)]
        undo = [recompute(part) for part in (*inner.vlm.model.vision_model.encoder.layers, *parts)]
        return undo + [recompute(inner, name) for name in ("forward_attn_layer", "forward_cross_attn_layer")]

    @property
    def backbone(self) -> language.Backbone:
        inner = self.policy.model.vlm_with_expert
        return language.Backbone(text_model=inner.vlm.model.text_model, head=inner.vlm.lm_head,
                                 embed_text=inner.embed_language_tokens,
                                 tokenizer=inner.processor.tokenizer)  # fmt: skip

    @property
    def prefix(self) -> language.Backbone:
        model, ids = self.policy.model, ([], [])
        if model.add_image_special_tokens:
            ids = model.global_image_start_token.tolist(), model.image_end_token.tolist()
        scale = self.vlm.config.text_config.hidden_size**0.5
        return replace(self.backbone, see_prompt=True, scale=scale, around_image=ids, run=self._run_prefix)

    def _run_prefix(self, embeds: Tensor, allowed: Tensor, positions: Tensor) -> Tensor:
        """LeRobot's own pass over a prefix; it turns positions by a base of its own and not by the VLM's."""
        # Without a cache LeRobot would ask the expert, which has no tokens here, in its cross-attention layers.
        (states, _), _ = self.inner.forward(attention_mask=allowed, position_ids=positions, past_key_values=None,
                                            inputs_embeds=[embeds, None], use_cache=True)  # fmt: skip
        return states

    def prepare_images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return self.policy.prepare_images(batch)

    def model_inputs(self, prepared: dict[str, Any]) -> list[Any]:
        if self.config.adapt_to_pi_aloha:  # LeRobot converts in place
            prepared = self.policy._prepare_batch({**prepared, STATE: prepared[STATE].clone()})
        images, masks = self.prepare_images(prepared)
        return [images, masks, prepared[TOKENS], prepared[TOKEN_MASK], self.policy.prepare_state(prepared)]

    def model_actions(self, actions: Tensor) -> Tensor:
        return self.policy._pi_aloha_encode_actions_inv(actions.clone()) if self.config.adapt_to_pi_aloha else actions

    def policy_actions(self, actions: Tensor) -> Tensor:
        return self.policy._pi_aloha_encode_actions(actions) if self.config.adapt_to_pi_aloha else actions

    def image_tokens(self, image: Tensor) -> int:
        config = self.vlm.config
        patch = config.vision_config.patch_size
        return (image.shape[-2] // patch) * (image.shape[-1] // patch) // config.scale_factor**2

    def _note_layout(self, captured: Captured, parts: list[tuple[str, int, Tensor]], text_mask: Tensor) -> None:
        note_layout(captured, parts, text_mask, state_positions=self.state_positions, width=self.config.prefix_length,
                    around_image=(2, 1) if self.config.add_image_special_tokens else (0, 0))  # fmt: skip

    def velocities(self, inputs: list[Any], points: Tensor, time: Tensor) -> Tensor:
        """The R points become R blocks of action tokens in one sequence; no block sees another.

        Copies of the observation's keys and values in the batch would do too, but LeRobot's expert projects those
        again for every copy.
        """
        from lerobot.policies.common.vla_utils import make_att_2d_masks

        model, (B, R, T, _) = self.policy.model, points.shape
        *seen, state = inputs
        prefix, prefix_pad, prefix_order = model.embed_prefix(*seen, state=state)
        suffix, suffix_pad, suffix_order = model.embed_suffix(points.flatten(0, 1), time.flatten())
        P, S = prefix.shape[1], suffix.shape[1]
        pad = torch.cat([prefix_pad, suffix_pad.view(B, R, S)[:, 0]], dim=1)
        order = torch.cat([prefix_order, suffix_order.view(B, R, S)[:, 0]], dim=1)
        single, positions = make_att_2d_masks(pad, order), torch.cumsum(pad, dim=1) - 1
        mask = single.new_zeros(B, P + R * S, P + R * S)
        mask[:, :P, :P] = single[:, :P, :P]
        mask[:, P:, :P] = single[:, P:, :P].repeat(1, R, 1)
        for r in range(R):
            block = slice(P + r * S, P + (r + 1) * S)
            mask[:, block, block] = single[:, P:, P:]
        (_, out), _ = model.vlm_with_expert.forward(
            attention_mask=mask, position_ids=torch.cat([positions[:, :P], positions[:, P:].repeat(1, R)], dim=1),
            past_key_values=None, inputs_embeds=[prefix, suffix.view(B, R * S, -1)], use_cache=False,
        )  # fmt: skip
        return model.action_out_proj(out.view(B, R, S, -1)[:, :, -T:].float())

    def write_extras(self, folder: Path, home: Path) -> None:
        """VLM config, tokenizer and processor under `vlm/` (its weights are in model.safetensors)."""
        super().write_extras(folder, home)
        inner = self.policy.model.vlm_with_expert
        inner.config.save_pretrained(folder / VLM_FOLDER)
        inner.processor.save_pretrained(folder / VLM_FOLDER)
        folders.point_at(folder, str(home / VLM_FOLDER))

    @classmethod
    def create(cls, name: str, source: Path | str, features: dict[str, Any], dataset_stats: dict[str, Any],
               overrides: dict[str, Any], *, generator_seed: int = 0, device: str = "cpu") -> "SmolVLA":  # fmt: skip
        """A new SmolVLA on a VLM: its weights in float32, the action expert random.

        Args:
            source: SmolVLM folder with weights, tokenizer and processor.
            features: LeRobot PolicyFeatures of inputs and outputs by key, e.g. "observation.images.top".
            dataset_stats: LeRobot statistics by key.
            overrides: fields of SmolVLAConfig. Images are resized to the VLM's own size and everything is trainable
                unless given otherwise.
            generator_seed: of the expert's weights; the global generator is left as it was.
        """
        vlm_folder = Path(source).absolute()
        size = _smolvlm(vlm_folder).vision_config.image_size
        raw = {"type": name, "resize_imgs_with_padding": [size, size], "freeze_vision_encoder": False,
               "train_expert_only": False, "push_to_hub": False, **overrides, "vlm_model_name": str(vlm_folder),
               "load_vlm_weights": False}  # fmt: skip
        config = folders.decode_config(raw, str(vlm_folder), features, device)
        policy = cls.build(config, generator_seed)
        weights = load_vlm(vlm_folder).state_dict()
        tensors.load_tensors(policy.model.vlm_with_expert.vlm, weights, str(vlm_folder), extra_allowed=True)
        return cls(policy.to(device), *new_processors(config, dataset_stats, tokenizer=vlm_folder))


def _check_use(config: Any, patch: int, where: str) -> None:
    """What LeRobot's config allows and its model cannot do."""
    state, edges = config.robot_state_feature.shape[0], config.resize_imgs_with_padding
    if not config.use_cache:
        raise BurnishError(f"{where}: use_cache is false", "true: SmolVLA acts on cached keys and values")
    if config.adapt_to_pi_aloha and state != 14:
        raise BurnishError(f"{where}: adapt_to_pi_aloha with {state} state dimensions", "the 14 of an Aloha robot")
    if edges and any(edge < patch or edge % patch for edge in edges):
        raise BurnishError(f"{where}: resize_imgs_with_padding is {tuple(edges)}", f"multiples of {patch}, its patches")


def _smolvlm(folder: Path) -> Any:
    config = vlm_config(folder)
    if config.model_type != "smolvlm":
        raise BurnishError(f"a VLM of type '{config.model_type}' in {folder}", "smolvlm, which SmolVLA is made of")
    return config


def see_whole(tower: nn.Module) -> None:
    """Let transformers' SmolVLMVisionTransformer know the place of every patch from the size of the image alone.

    It finds places by a mask, sends a mask of ones to the device where it is given none, as by LeRobot, and waits to
    learn that nothing is hidden, at every image of every step; a CUDA graph may hold none of that. The places of the
    first image of a size are kept: the numbers are the same.
    """
    from transformers.modeling_outputs import BaseModelOutput

    kind: Any = type(tower)

    class WholeImages(kind):
        def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **options: Any) -> Any:
            if patch_attention_mask is not None:
                return super().forward(pixel_values, patch_attention_mask, **options)
            key, embeddings = tuple(pixel_values.shape[-2:]), self.embeddings
            if key not in self.places:
                seen: list[Tensor] = []
                mask = torch.ones(1, *(edge // self.patch_size for edge in key), dtype=torch.bool)
                note = embeddings.position_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
                with note, torch.no_grad():
                    embeddings(pixel_values[:1].detach(), mask.to(pixel_values.device))
                self.places[key] = seen[0].cpu()
            if self.places[key].device != pixel_values.device:  # once: a CUDA graph may hold no copy from the host
                self.places[key] = self.places[key].to(pixel_values.device)
            patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
            placed = patches + embeddings.position_embedding(self.places[key].expand(len(patches), -1))
            states = self.encoder(inputs_embeds=placed, attention_mask=None).last_hidden_state
            return BaseModelOutput(last_hidden_state=self.post_layernorm(states))

    tower.__class__ = WholeImages
    tower.places = {}
