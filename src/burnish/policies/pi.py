"""pi0 and pi05: PaliGemma reads images and text; the state enters the expert (pi0) or the text (pi05).

What they share with pi0-FAST (`pi0_fast.py`) is `PaliGemmaParts`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.reading import read_object
from burnish.policies import folder as folders
from burnish.policies import language, tensors
from burnish.policies.flow import FlowPolicy
from burnish.policies.keys import CONFIG, TOKEN_MASK, TOKENS
from burnish.policies.load import POLICIES
from burnish.policies.pipelines import new_processors
from burnish.policies.pretrained import load_vlm, vlm_config
from burnish.policies.sizes import check_fits, check_model_numbers
from burnish.policies.vlm import VLMPolicy

SIZES_FILE = "tiny.json"
"""In the folder of a tiny policy: the sizes that LeRobot cannot store."""


class PaliGemmaParts(VLMPolicy):
    """A LeRobot policy on PaliGemma, of LeRobot's own size or a tiny one.

    The language verbs attend in both directions inside image and question, as PaliGemma was trained, and causally
    after that.
    """

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any, sizes: dict | None = None):
        self.sizes = sizes
        super().__init__(policy, preprocessor, postprocessor)

    @classmethod
    def build(cls, config: Any, seed: int, folder: Path | None = None) -> nn.Module:
        sizes = None if folder is None else _read_sizes(folder)
        if folder is not None and sizes is None:
            _check_whole(config, folder)
        with small_pi(sizes, image_size=config.image_resolution[0]) if sizes else nullcontext():
            return folders.build(config, seed)

    @classmethod
    def rename_tensors(cls, policy: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of openpi's own conversions are mapped as LeRobot's from_pretrained does."""
        if set(policy.state_dict()) >= set(state):
            return state
        state = policy._fix_pytorch_state_dict_keys(state, policy.config)
        return {key if key.startswith("model.") else f"model.{key}": value for key, value in state.items()}

    @classmethod
    def open(
        cls, policy: nn.Module, preprocessor: Any, postprocessor: Any, folder: Path, dataset_stats: dict | None
    ) -> Self:
        return cls(policy, preprocessor, postprocessor, _read_sizes(folder))

    @property
    def input_size(self) -> int:
        return max(self.config.image_resolution)

    @property
    def vlm(self) -> nn.Module:
        return self.policy.model.paligemma_with_expert.paligemma

    @property
    def inner(self) -> nn.Module:
        return self.policy.model.paligemma_with_expert

    def embed_image(self, image: Tensor) -> Tensor:
        return self.inner.embed_image(image)

    def recompute(self) -> list[Callable[[], None]]:
        """LeRobot's own way: each image's tower, each pair of layers of language model and expert."""
        model = self.policy.model
        undo = [] if model.gradient_checkpointing_enabled else [model.gradient_checkpointing_disable]
        model.gradient_checkpointing_enable()
        return undo

    def token_counters(self) -> list[nn.Module]:
        return [self.vlm.model.language_model.layers[0].mlp]

    @property
    def backbone(self) -> language.Backbone:
        inner = self.policy.model.paligemma_with_expert
        return language.Backbone(text_model=inner.paligemma.model.language_model, head=inner.paligemma.lm_head,
                                 embed_text=inner.embed_language_tokens, tokenizer=self.tokenizer, bos=True,
                                 see_prompt=True)  # fmt: skip

    def prepare_images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return self.policy._preprocess_images(batch)

    def image_tokens(self, image: Tensor) -> int:
        patch = self.vlm.config.vision_config.patch_size
        return (image.shape[-2] // patch) * (image.shape[-1] // patch)

    def write_extras(self, folder: Path, home: Path) -> None:
        """The tokenizer's files; LeRobot itself only knows a hub name for it."""
        super().write_extras(folder, home)
        self.tokenizer.save_pretrained(folder / self.tokenizer_folder)
        folders.point_at(folder, str(home / self.tokenizer_folder))
        if self.sizes is not None:
            (folder / SIZES_FILE).write_text(json.dumps(self.sizes, indent=2))


@POLICIES.register("pi0", "pi05")
class Pi(PaliGemmaParts, FlowPolicy):
    """burnish's verbs over lerobot's PI0Policy and PI05Policy."""

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any, sizes: dict | None = None):
        super().__init__(policy, preprocessor, postprocessor, sizes)
        # LeRobot's sampler switches to eager attention on its first call; doing so from the start keeps the
        # language verb bit for bit the same before and after.
        self.backbone.text_model.config._attn_implementation = "eager"

    @property
    def expert(self) -> nn.Module:
        return self.inner.gemma_expert.model

    def token_counters(self) -> list[nn.Module]:
        return [*super().token_counters(), self.expert.layers[0].mlp]

    def model_inputs(self, prepared: dict[str, Any]) -> list[Any]:
        images, masks = self.prepare_images(prepared)
        inputs = [images, masks, prepared[TOKENS], prepared[TOKEN_MASK]]
        return inputs if self.config.type == "pi05" else [*inputs, self.policy.prepare_state(prepared)]

    def time_shape(self) -> tuple[float, float, float, float]:
        c = self.config
        return c.time_sampling_beta_alpha, c.time_sampling_beta_beta, c.time_sampling_scale, c.time_sampling_offset

    def velocities(self, inputs: list[Any], points: Tensor, time: Tensor) -> Tensor:
        """The observation's keys and values, computed once, are repeated for R rows of the batch, as in sampling."""
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
        from transformers import DynamicCache

        model, R = self.policy.model, points.shape[1]
        prefix, pad, order = model.embed_prefix(*inputs[:4])
        _, cache = model.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad, order)),
            position_ids=torch.cumsum(pad, dim=1) - 1, past_key_values=None, inputs_embeds=[prefix, None],
            use_cache=True,
        )  # fmt: skip
        repeated = tuple((k.repeat_interleave(R, 0), v.repeat_interleave(R, 0), window) for k, v, window in cache)
        state = [s.repeat_interleave(R, 0) for s in inputs[4:]]
        mask = pad.repeat_interleave(R, 0)
        found = model.denoise_step(*state, mask, DynamicCache(repeated), points.flatten(0, 1), time.flatten())
        return found.view(points.shape)

    @classmethod
    def create(cls, name: str, source: Path | str, features: dict[str, Any], dataset_stats: dict[str, Any],
               overrides: dict[str, Any], *, generator_seed: int = 0, device: str = "cpu") -> Self:  # fmt: skip
        """A new pi0 or pi05 on a PaliGemma folder (weights, tokenizer), its expert random; see SmolVLA.create."""
        folder = Path(source).absolute()
        kind = vlm_config(folder).model_type
        if kind != "paligemma":
            raise BurnishError(f"a VLM of type '{kind}' in {folder}", f"paligemma, which {name} is made of")
        raw = {"type": name, "push_to_hub": False, **overrides}
        config = folders.decode_config(raw, str(folder), features, device)
        policy = cls.build(config, generator_seed)
        weights = load_vlm(folder).state_dict()
        tensors.load_tensors(policy.model.paligemma_with_expert.paligemma, weights, str(folder), extra_allowed=True)
        return cls(policy.to(device), *new_processors(config, dataset_stats, tokenizer=folder))


def _read_sizes(folder: Path) -> dict[str, Any] | None:
    """The sizes of a tiny policy, checked; None for one of LeRobot's own size."""
    path = folder / SIZES_FILE
    if not path.exists():
        return None
    sizes = read_object(path, folder)
    check_model_numbers(sizes, str(path))
    known = {**PI_SIZES, "vocab_size": 1}
    wrong = [name for name in known if type(sizes.get(name)) is not type(known[name])]
    wrong += [name for name in sizes if name not in known]
    parts = [part for part in PI_SIZES if part not in wrong and set(sizes[part]) != set(PI_SIZES[part])]
    if wrong or parts:
        raise BurnishError(f"{path}: '{[*wrong, *parts][0]}' is not what a tiny policy has",
                           "sizes as burnish writes them")  # fmt: skip
    check_fits({"hidden_size": sizes["gemma_2b"]["width"], "vocab_size": sizes["vocab_size"],
                "intermediate_size": sizes["gemma_2b"]["mlp_dim"], "num_hidden_layers": sizes["gemma_2b"]["depth"]},
               tensors.size(folder), 0, str(path))  # fmt: skip
    return sizes


def _check_whole(config: Any, folder: Path) -> None:
    """LeRobot's own sizes are billions of numbers: weights of fewer bytes cannot be theirs, and nothing is built."""
    from lerobot.policies.pi0.modeling_pi0 import get_gemma_config

    for variant in (config.paligemma_variant, config.action_expert_variant):
        size = get_gemma_config(variant)
        check_fits({"hidden_size": size.width, "intermediate_size": size.mlp_dim, "num_hidden_layers": size.depth},
                   tensors.size(folder), 0, str(folder / CONFIG))  # fmt: skip


PI_SIZES = {
    "gemma_2b": {"width": 48, "depth": 3, "mlp_dim": 64, "num_heads": 8, "num_kv_heads": 1, "head_dim": 8},
    "gemma_300m": {"width": 32, "depth": 3, "mlp_dim": 64, "num_heads": 8, "num_kv_heads": 1, "head_dim": 8},
    "vision": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
"""Sizes of a tiny policy."""


@contextmanager
def small_pi(sizes: dict[str, Any], tokenizer: Path | None = None, image_size: int = 0) -> Iterator[None]:
    """Inside, LeRobot builds them in the sizes of a tiny policy (its `tiny.json`) instead of its only ones.

    Args:
        sizes: as PI_SIZES, with "vocab_size".
        tokenizer: folder that stands in for the tokenizer on the hub.
        image_size: side of the vision tower's images; 0 leaves LeRobot's.
    """
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi0_fast import modeling_pi0_fast
    from lerobot.policies.pi05 import modeling_pi05
    from lerobot.processor import tokenizer_processor

    def pali_gemma(plain: Any) -> Any:
        def build(config: Any) -> Any:
            for name, value in sizes["vision"].items():
                setattr(config.vision_config, name, value)
            config.vision_config.image_size = image_size or config.vision_config.image_size
            config.vision_config.projection_dim = config.text_config.hidden_size
            config.text_config.vocab_size = sizes["vocab_size"]
            config.image_token_id = sizes["vocab_size"] - 1
            return plain(config=config)

        return build

    def gemma(plain: Any) -> Any:
        def build(config: Any) -> Any:
            config.vocab_size = sizes["vocab_size"]
            return plain(config=config)

        return build

    with ExitStack() as stack:
        for module in (modeling_pi0, modeling_pi05, modeling_pi0_fast):
            changes = {
                "get_gemma_config": lambda variant, m=module: m.GemmaConfig(**sizes[variant]),
                "PaliGemmaForConditionalGenerationWithPiGemma": pali_gemma(
                    module.PaliGemmaForConditionalGenerationWithPiGemma
                ),
            }
            if module is not modeling_pi0_fast:  # it has no action expert
                changes["PiGemmaForCausalLM"] = gemma(module.PiGemmaForCausalLM)
            stack.enter_context(patch.multiple(module, **changes))
        if tokenizer is not None:
            plain = tokenizer_processor.AutoTokenizer.from_pretrained
            local = type("LocalTokenizer", (), {"from_pretrained": staticmethod(lambda *_: plain(tokenizer))})
            stack.enter_context(patch.object(tokenizer_processor, "AutoTokenizer", local))
        yield
