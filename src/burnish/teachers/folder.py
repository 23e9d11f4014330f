"""A transformers vision or depth model of the user's as teacher: DINOv2, SigLIP, Depth Anything and the like."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.teachers.base import TEACHERS, Teacher, Views, file_hash, fingerprint, precision_dtype


@TEACHERS.register("folder")
class FolderTeacher(Teacher):
    """Hidden states of a transformers folder, each view by itself; layer k is the output of block k + 1.

    Args:
        path: folder with config.json, model.safetensors and preprocessor_config.json.
        precision: "no" (float32), "bf16" or "fp16", of the teacher alone.
    """

    def __init__(self, path: str, precision: str = "no"):
        super().__init__()
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForDepthEstimation

        folder = Path(path)
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise BurnishError(f"no vision model in {path}", "a transformers folder with safetensors weights")
        try:
            processor = AutoImageProcessor.from_pretrained(folder)
            kind = AutoConfig.from_pretrained(folder).model_type
            loader = AutoModelForDepthEstimation if kind == "depth_anything" else AutoModel
            model = loader.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            line = str(error).splitlines()[0]
            raise BurnishError(f"{path} is no vision model that transformers loads ({line})") from error
        inner = {"siglip": "vision_model", "clip": "vision_model", "depth_anything": "backbone"}.get(kind, "")
        self.model = model.get_submodule(inner)  # an empty name is the model itself
        config = self.model.config
        size = dict(processor.size)
        crop = getattr(processor, "crop_size", None) or size
        side = crop.get("height") or crop.get("shortest_edge") or config.image_size
        self.side = side // config.patch_size * config.patch_size
        self.grid = self.side // config.patch_size
        self.dtype = precision_dtype(precision)
        self.register_buffer("mean", torch.tensor(processor.image_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(processor.image_std)[:, None, None])
        self.widths = (config.hidden_size,) * config.num_hidden_layers
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
        weights = fingerprint([file_hash(file) for file in files])
        self.identity = {"name": kind, "weights": weights, "side": self.side, "precision": precision}

    def features(self, views: Views, layers: Sequence[int]) -> dict[int, Tensor]:
        batch, cameras = views.images.shape[:2]
        pixels = views.images.flatten(0, 1)
        pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype is not None):
            out = self.model((pixels - self.mean) / self.std, output_hidden_states=True)
        found = {}
        for layer in layers:
            tokens = out.hidden_states[layer + 1]
            patches = tokens[:, tokens.shape[1] - self.grid**2 :]  # class and register tokens come first
            found[layer] = patches.unflatten(1, (self.grid, self.grid)).unflatten(0, (batch, cameras))
        return found
