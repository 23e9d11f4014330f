"""A new `burnish_discrete` on a VLM folder, or on the VLM of a SmolVLA (the shipped base, say)."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from burnish.core.errors import BurnishError, one_line
from burnish.core.reading import read_object
from burnish.core.seeding import seeded
from burnish.policies import folder as folders
from burnish.policies.keys import CONFIG
from burnish.policies.load import load
from burnish.policies.pipelines import new_processors
from burnish.policies.pretrained import load_vlm
from burnish.policies.tensors import load_tensors

_SHARED = ("max_state_dim", "tokenizer_max_length", "pad_language_to")
"""Config fields that a new policy takes over from a SmolVLA."""


def new_policy(source: Path | str, features: dict[str, Any], dataset_stats: dict[str, Any], fields: dict[str, Any], *,
               generator_seed: int = 0, device: str = "cpu") -> tuple[nn.Module, Any, Any]:  # fmt: skip
    """A new DiscretePolicy and its processors: the VLM as it is, action embeddings and head fresh.

    Args:
        source: a VLM folder (config, weights, tokenizer), a SmolVLA policy folder, or a shipped base's name. From a
            SmolVLA come the VLM, the state projection and the way it scales embeddings; its action expert is left.
        fields: of DiscreteConfig, and its "type"; the others are those of `SmolVLA.create`.

    Raises:
        BurnishError: no such folder, a VLM that does not fit, or config values that do not go together.
    """
    source = Path(source)
    if (source / CONFIG).is_file() and "type" not in read_object(source / CONFIG):
        return _build(source.absolute(), None, features, dataset_stats, fields, generator_seed, device)
    base = load(source)
    if base.name != "smolvla":
        raise BurnishError(f"a policy of type {base.name} in {source}", "a SmolVLA or a VLM folder")
    with TemporaryDirectory() as vlm:
        base.vlm.config.text_config.num_hidden_layers = base.num_layers  # LeRobot cuts layers off, not the config
        base.vlm.config.save_pretrained(vlm)
        base.policy.model.vlm_with_expert.processor.save_pretrained(vlm)
        return _build(Path(vlm), base, features, dataset_stats, fields, generator_seed, device)


def _build(
    vlm_folder: Path, base: Any, features: dict, stats: dict, fields: dict, seed: int, device: str
) -> tuple[nn.Module, Any, Any]:
    taken = {} if base is None else {name: getattr(base.config, name) for name in _SHARED}
    raw = {"push_to_hub": False, "scale_embeddings": base is not None, **_pixels(vlm_folder), **taken, **fields,
           "vlm_model_name": str(vlm_folder), "load_vlm_weights": False}  # fmt: skip
    config = folders.decode_config(raw, str(vlm_folder), features, device)
    policy = folders.build(config, seed)
    vlm = load_vlm(vlm_folder) if base is None else base.vlm
    load_tensors(policy.model.vlm, vlm.state_dict(), str(vlm_folder), extra_allowed=True)
    if base is not None and config.state_as == "row" and config.max_state_dim == base.config.max_state_dim:
        policy.model.state_proj.load_state_dict(base.policy.model.state_proj.state_dict())
    with seeded(seed):
        policy.model.start()
    policy.fit_tokens(stats)
    _check_images(policy)
    return policy.to(device).eval(), *new_processors(config, stats, tokenizer=vlm_folder)


def _pixels(vlm_folder: Path) -> dict[str, list[float]]:
    """Mean and deviation of pixels that the vision tower was trained with."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (vlm_folder / name).is_file():
            found = read_object(vlm_folder / name)
            inner = found.get("image_processor")
            found = inner if isinstance(inner, dict) else found
            return {key: found[key] for key in ("image_mean", "image_std") if key in found}
    return {}


@torch.no_grad()
def _check_images(policy: nn.Module) -> None:
    """Vision towers that want more than pixels (sizes of tiles, say) are found here and not in the first step."""
    size = policy.config.image_size
    try:
        embedded = policy.model.embed_image(torch.zeros(1, 3, size, size))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        kind, reason = policy.model.vlm.config.model_type, one_line(error, 200)
        raise BurnishError(
            f"a VLM of type '{kind}' that cannot embed an image ({reason})",
            "one whose get_image_features takes pixel values alone, as SmolVLM or PaliGemma",
        ) from error
    if embedded.ndim != 3:
        raise BurnishError(f"image features of shape {tuple(embedded.shape)}", "[B, tokens, width]")
