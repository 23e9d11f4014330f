"""A transformers vision or depth model of the user's as teacher: DINOv2, SigLIP, Depth Anything and the like."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from burnish.core.errors import BurnishError, first_line, out_of_memory
from burnish.core.options import home, number
from burnish.core.reading import inside, read_object, regular_file
from burnish.teachers.base import TEACHERS, Teacher, Views, file_hash, fingerprint, precision_dtype

PARTS = {
    "dinov2": "", "dinov2_with_registers": "", "dinov3_vit": "", "ijepa": "", "vit": "", "deit": "",
    "siglip": "vision_model", "siglip_vision_model": "", "clip": "vision_model", "clip_vision_model": "",
    "depth_anything": "backbone",
}  # fmt: skip
"""Types whose hidden states end in one row of patch tokens, and the part of the model that has them."""
SIZES = {"hidden_size": 16384, "num_hidden_layers": 256, "image_size": 4096, "patch_size": 256}
"""Largest values of a config's sizes; the rest is bounded by what the weights can hold, see `_load`."""
OUTSIDE = ("backbone", "use_pretrained_backbone", "use_timm_backbone", "quantization_config", "attn_implementation",
           "_attn_implementation", "_attn_implementation_internal")  # fmt: skip
"""Fields of a config that make transformers fetch, or build from another package."""
DOWNLOAD = "hf download facebook/dinov2-small --local-dir"
COMMAND = f'{DOWNLOAD} data/teachers/vision --include "*.json" "model.safetensors"'
"""Makes the folder that `align` looks for where a data set keeps no depth."""


@TEACHERS.register("folder")
class FolderTeacher(Teacher):
    """Hidden states of a transformers folder, each view by itself; layer k is the output of block k + 1.

    Only classes of transformers itself are built, of the types in PARTS; nothing in the folder runs and nothing is
    fetched.

    Args:
        path: folder with config.json, model.safetensors and preprocessor_config.json.
        precision: "no" (float32), "bf16" or "fp16", of the teacher alone.
    """

    moments = 8

    def __init__(self, path: str, precision: str = "no"):
        super().__init__()
        self.dtype = precision_dtype(precision)
        folder = Path(home(path)) if isinstance(path, str) else Path()
        if not isinstance(path, str) or not (folder / "config.json").exists():
            raise BurnishError(f"no vision model in {path}", "a transformers folder with config.json", COMMAND)
        kind = _check_config(folder)
        files = _weight_files(folder)
        mean, std, side = _preprocessing(folder)
        whole = _load(folder, kind, sum(file.stat().st_size for file in files))
        self.model = whole.get_submodule(PARTS[kind])  # an empty name is the model itself
        config = self.model.config
        self.side = (side or config.image_size) // config.patch_size * config.patch_size
        self.grid = self.side // config.patch_size
        if not self.grid:
            raise BurnishError(f"{folder} takes images of {side} pixels in patches of {config.patch_size}",
                               "at least one patch")  # fmt: skip
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.widths = (config.hidden_size,) * config.num_hidden_layers
        about = [file_hash(file) for file in sorted([*files, *folder.glob("*.json")]) if file.is_file()]
        self.identity = {"name": kind, "weights": fingerprint(about), "side": self.side, "precision": precision}

    def features(self, views: Views, layers: Sequence[int]) -> dict[int, Tensor]:
        batch, cameras = views.images.shape[:2]
        pixels = views.images.flatten(0, 1)
        pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype is not None):
            out = self._run((pixels - self.mean) / self.std)
        found = {}
        for layer in layers:
            tokens = out.hidden_states[layer + 1]
            patches = tokens[:, tokens.shape[1] - self.grid**2 :]  # class and register tokens come first
            found[layer] = patches.unflatten(1, (self.grid, self.grid)).unflatten(0, (batch, cameras))
        return found

    def _run(self, pixels: Tensor) -> Any:
        try:
            return self.model(pixels, output_hidden_states=True)
        except (ValueError, RuntimeError) as error:  # of a size that it does not take
            if out_of_memory(error):
                raise
            line = first_line(error)
            raise BurnishError(f"the teacher `folder` fails on images of {self.side} pixels ({line})",
                               "a size in preprocessor_config.json that the model takes") from error  # fmt: skip


def _check_config(folder: Path) -> str:
    """The model type of config.json, whose sizes have bounds and which names nothing outside the folder."""
    path = folder / "config.json"
    config = read_object(path, folder)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in PARTS:
        raise BurnishError(f"{folder} holds a model of type {str(kind)[:80]!r}", f"one of {', '.join(PARTS)}", COMMAND)
    nested = config.get("backbone_config") or {}
    if kind == "depth_anything" and (not isinstance(nested, dict) or nested.get("model_type") not in ("dinov2", None)):
        raise BurnishError(f"{path}: backbone_config is {str(nested)[:80]}", "a backbone of type dinov2")
    if (folder / "adapter_config.json").exists():
        raise BurnishError(f"{folder} holds adapters", "a model with its adapters merged")
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        outside = [key for key in OUTSIDE if part.get(key)]
        if outside:
            raise BurnishError(
                f"{path}: {outside[0]} is {str(part[outside[0]])[:80]!r}", "weights in the folder itself"
            )
        for key, most in SIZES.items():
            value = part.get(key)
            if value is not None and not (number(value) and 0 <= value <= most):
                raise BurnishError(f"{path}: {key} is {str(value)[:80]}", f"a number from 0 to {most}")
    return kind


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names, each a regular file inside the folder."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    names = [single.name]
    if index.exists() and not single.exists():
        shards = read_object(index, folder).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise BurnishError(f"{index} has no weight_map", "a shard's name for each tensor")
        names = sorted(set(shards.values()))
    elif not single.exists():
        raise BurnishError(f"no vision model in {folder}: no model.safetensors", "safetensors weights", COMMAND)
    return [regular_file(inside(folder, name), folder) for name in names]


def _preprocessing(folder: Path) -> tuple[list[float], list[float], int]:
    """Mean and deviation of the colours, and the side of the image (0 where it is the config's)."""
    path, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    about: Any = read_object(path, folder) if path.exists() or not nested.exists() else read_object(nested, folder)
    about = about.get("image_processor", about)
    if not isinstance(about, dict):
        raise BurnishError(f"{path} describes no images", "image_mean, image_std and size")
    colours = []
    for key in ("image_mean", "image_std"):
        value = about.get(key)
        if not isinstance(value, list) or len(value) != 3 or not all(number(part) for part in value):
            raise BurnishError(f"{path}: {key} is {str(value)[:80]}", "three numbers")
        colours.append([float(part) for part in value])
    if min(colours[1]) <= 0:
        raise BurnishError(f"{path}: image_std is {colours[1]}", "three numbers above 0")
    size = about.get("crop_size") or about.get("size") or 0
    side = size.get("height") or size.get("shortest_edge") or 0 if isinstance(size, dict) else size
    if type(side) is not int or not 0 <= side <= SIZES["image_size"]:
        raise BurnishError(f"{path}: size is {str(size)[:80]}", f"pixels, at most {SIZES['image_size']}")
    return colours[0], colours[1], side


def _load(folder: Path, kind: str, num_bytes: int) -> nn.Module:
    """The model of a checked folder, whose weight files have `num_bytes`; every weight that is used comes from them."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModel, AutoModelForDepthEstimation

    local = {"local_files_only": True, "trust_remote_code": False}
    loader = AutoModelForDepthEstimation if kind == "depth_anything" else AutoModel
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        with torch.device("meta"):  # weights of nothing, to be counted: large ones would fill the memory
            count = sum(p.numel() for p in loader.from_config(config, trust_remote_code=False).parameters())
        if count > num_bytes:
            raise ValueError(f"{count} weights of config.json in {num_bytes} bytes")
        model, info = loader.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError, ArithmeticError,
            ImportError, StrictDataclassError, SafetensorError) as error:  # fmt: skip
        line = first_line(error)
        raise BurnishError(f"{folder} is no vision model that transformers loads ({line})", "a whole folder") from error
    names = {str(name) for key in ("missing_keys", "mismatched_keys") for name in info.get(key) or ()}
    wrong = sorted(name for name in names if PARTS[kind] in name and "pooler" not in name)
    if wrong:
        raise BurnishError(f"the weights in {folder} lack {wrong[0]} ({len(wrong)} in all)", "those of its config.json")
    return model
