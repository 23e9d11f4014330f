"""Policies of real size with random weights, made in memory on the device where they will run.

What a step or a call costs depends on shapes and types, not on what the weights say, so a machine without a network
can measure it. Only a tokenizer goes through a temporary folder. Every size has a tiny twin of the same type for
rehearsals.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import seeded
from burnish.policies import folder as folders
from burnish.policies.keys import ACTION, IMAGES, STATE
from burnish.policies.load import POLICIES
from burnish.policies.pi import PI_SIZES, small_pi
from burnish.policies.pipelines import new_processors
from burnish.policies.wrapper import PolicyWrapper
from workshop.tiny import NANO_TEXTS, build_tokenizer, default_statistics, vlm_files

_SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SMOLLM = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 16, "num_attention_heads": 15,
           "num_key_value_heads": 5, "head_dim": 64, "max_position_embeddings": 8192}  # fmt: skip
_LLAMA_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
             "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096}  # fmt: skip
_LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 4096}  # fmt: skip
_224 = {"image_size": 224, "patch_size": 14, "scale_factor": 2}
"""64 tokens an image, as many as SmolVLM's 512 pixels make."""


@dataclass(frozen=True)
class Size:
    """A policy type, what its VLM is made of (nothing for pi0 and pi05, which LeRobot builds in one size), its config.

    `tiny` are fields of the tiny twin's config that differ from the real one's.
    """

    type: str
    vlm: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)


_FLOW = {"chunk_size": 50, "n_action_steps": 50}
_FLOW_TINY = {"chunk_size": 8, "n_action_steps": 8, "max_state_dim": 8, "max_action_dim": 8}
_TINY_PI = {**_FLOW_TINY, "image_resolution": [28, 28], "num_inference_steps": 3, "tokenizer_max_length": 96}
_BLOCKS = {"chunk_size": 8, "n_action_steps": 8, "block_size": 7, "dtype": "bfloat16"}
_BLOCKS_TINY = {"bins": 16, "max_state_dim": 8, "dtype": "float32"}
SIZES: dict[str, Size] = {
    "smolvla": Size(
        "smolvla",
        {"text": _SMOLLM, "vision": _SIGLIP, "image_size": 512, "patch_size": 16, "scale_factor": 4, "rows": 49_280},
        _FLOW, {**_FLOW_TINY, "num_steps": 3},
    ),
    "pi0": Size("pi0", {}, _FLOW, _TINY_PI),
    "pi05": Size("pi05", {}, _FLOW, _TINY_PI),
    "openvla-7b": Size(
        "burnish_discrete", {"text": _LLAMA_7B, "vision": _WIDE, **_224, "scale_factor": 1, "rows": 32_064},
        {"chunk_size": 1, "n_action_steps": 1, "training": "autoregressive", "dtype": "bfloat16"}, _BLOCKS_TINY,
    ),
    "discrete-smol": Size(
        "burnish_discrete", {"text": _SMOLLM, "vision": _SIGLIP, **_224, "rows": 49_280},
        {**_BLOCKS, "dtype": "float32"}, _BLOCKS_TINY,
    ),
    "discrete-3b": Size(
        "burnish_discrete", {"text": _LLAMA_3B, "vision": _SIGLIP, **_224, "rows": 128_256}, _BLOCKS, _BLOCKS_TINY
    ),
    "discrete-7b": Size(
        "burnish_discrete", {"text": _LLAMA_7B, "vision": _SIGLIP, **_224, "rows": 32_064}, _BLOCKS, _BLOCKS_TINY
    ),
}  # fmt: skip
"""Widths and depths: SmolVLM2-500M's lower half (SmolVLA, 450 million), Llama-3.2-3B, Llama-2-7B as in OpenVLA."""


def make_real(
    name: str, *, device: str = "cpu", cameras: Sequence[str] = ("front",), image_size: int = 256, state_dim: int = 8,
    action_dim: int = 7, overrides: dict[str, Any] | None = None, seed: int = 0, tiny: bool = False,
) -> PolicyWrapper:  # fmt: skip
    """A policy with random weights that were drawn on `device`; no weights are read, copied or written.

    Args:
        name: one of SIZES.
        device: torch device, or "meta" for the shapes alone of those that LeRobot builds.
        cameras: names of the cameras.
        image_size: pixels of the images in the declared features; the model resizes them to its own.
        state_dim, action_dim: at most 8 for a tiny one.
        overrides: fields of the LeRobot config.
        seed: of the weights; torch's global generators are left as they were.
        tiny: the tiny twin.

    Raises:
        BurnishError: an unknown name, or a config that cannot be.
    """
    if name not in SIZES:
        raise BurnishError(f"a policy '{name}'", f"one of {', '.join(SIZES)}")
    size, wrapper = SIZES[name], POLICIES.get(SIZES[name].type)
    stats = default_statistics(state_dim, action_dim)
    fields = {**size.config, **(size.tiny if tiny else {}), **(overrides or {})}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        raw = {"type": size.type, "push_to_hub": False, **fields, **_files(folder, size, tiny)}
        place = "cpu" if device == "meta" else device
        config = folders.decode_config(raw, name, _features(cameras, image_size, state_dim, action_dim), place)
        config.device = device
        with seeded(seed, device), _sizes(size, tiny) as sizes, torch.device(device):
            policy = folders.build(config, seed)
        config.device = place
        processors = new_processors(config, stats, tokenizer=folder)
        more = {"sizes": sizes} if sizes else {}
        return wrapper(policy.to(device).eval(), *processors, **more)


def _files(folder: Path, size: Size, tiny: bool) -> dict[str, Any]:
    """Write what LeRobot reads of a VLM before it has weights; returns the fields that name it."""
    if not size.vlm:
        build_tokenizer([*NANO_TEXTS, "Task: State: Action: 0 1 2 3"], 384).save_pretrained(folder)
        return {}
    vlm_files(folder, **({} if tiny else size.vlm))
    side = {} if tiny else {"image_size": size.vlm["image_size"]}
    fields = {"resize_imgs_with_padding": [side.get("image_size", 32)] * 2, "freeze_vision_encoder": False,
              "train_expert_only": False} if size.type == "smolvla" else side  # fmt: skip
    return {**fields, "vlm_model_name": str(folder), "load_vlm_weights": False}


@contextmanager
def _sizes(size: Size, tiny: bool) -> Iterator[dict[str, Any] | None]:
    """Inside, LeRobot builds pi0 and pi05 tiny where that is asked for."""
    sizes = {**PI_SIZES, "vocab_size": 384} if tiny and not size.vlm else None
    with small_pi(sizes) if sizes else nullcontext():
        yield sizes


def _features(cameras: Sequence[str], image_size: int, state_dim: int, action_dim: int) -> dict[str, Any]:
    from lerobot.configs.types import FeatureType, PolicyFeature

    return {
        **{f"{IMAGES}{c}": PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size)) for c in cameras},
        STATE: PolicyFeature(FeatureType.STATE, (state_dim,)), ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,)),
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop real smolvla --output runs/smolvla"
    parser.add_argument("name", choices=sorted(SIZES))
    parser.add_argument("--output", required=True, type=Path, help="policy folder to write")
    parser.add_argument("--cameras", nargs="+", default=["front"], help="names of the cameras")
    parser.add_argument("--image-size", type=int, default=256, help="pixels of the images of the declared cameras")
    parser.add_argument("--state-dim", type=int, default=8, help="dimensions of the state")
    parser.add_argument("--action-dim", type=int, default=7, help="dimensions of an action")
    parser.add_argument("--device", default="", help="where weights are drawn; default: a GPU where there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")


def main(args: argparse.Namespace) -> int:
    """Write the policy folder."""
    from burnish.policies.load import choose_device

    if args.output.exists() and any(args.output.iterdir()):
        raise BurnishError(f"{args.output} is not empty", "a new folder", "another --output")
    policy = make_real(args.name, device=choose_device(args.device), cameras=args.cameras, image_size=args.image_size,
                       state_dim=args.state_dim, action_dim=args.action_dim, seed=args.seed)  # fmt: skip
    policy.save(args.output)
    print(f"{args.output}: {sum(p.numel() for p in policy.parameters()):,} random parameters")
    return 0
