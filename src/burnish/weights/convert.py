"""OpenVLA-OFT keeps its heads pickled beside the safetensors of the backbone; `convert` makes a folder without pickles.

This is the only place that reads a pickle, by torch's restricted reader (`weights_only`), after a look at the archive:
plain tensors in an archive whose parts are as large as they say, under the names of the heads, and nothing else.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors.torch import save_file

from burnish.core.errors import BurnishError, one_line
from burnish.core.files import write_json
from burnish.core.progress import progress_bar
from burnish.core.reading import MOST_BYTES, read_object, regular_file
from burnish.weights.writer import Plan, output_folder

CONFIG, OWN = "config.json", "burnish"
KIND = "policy with converted heads"
MOST_HEAD = 4 * 2**30
"""Bytes of a pickled head; OFT's largest has about 0.6 GB."""
_MOST_PARTS, _MOST_CODE = 256, 16 * 2**20
_COPIED = (".json", ".safetensors", ".model", ".txt", ".md", ".jinja", ".py")
_LAYERS = {
    "action_head": (
        "model.layer_norm1", "model.fc1", "model.mlp_resnet_blocks.0.ffn.0", "model.mlp_resnet_blocks.0.ffn.1",
        "model.mlp_resnet_blocks.1.ffn.0", "model.mlp_resnet_blocks.1.ffn.1", "model.layer_norm2", "model.fc2",
    ),
    "proprio_projector": ("fc1", "fc2"),
}  # fmt: skip
"""Layers of the heads that the policy knows, each with weight and bias."""


def convert(folder: Path | str, output: Path | str, *, cameras: Sequence[str], chunk_size: int = 8,
            center_crop: bool = True, force: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write a published OpenVLA-OFT folder again, with its heads as safetensors and what its files do not say.

    Args:
        folder: config.json, the backbone's safetensors, action_head--*.pt, and proprio_projector--*.pt if the state
            enters.
        output: the folder to write; it appears when it is whole.
        cameras: names of its cameras, in the order of training (the main one first).
        chunk_size: actions in a chunk; 8 for LIBERO, 25 for ALOHA.
        center_crop: it was trained on random crops of images, as the published ones.
        force: replace an earlier output.

    Returns:
        heads: name to the number of its tensors; copied: how many files.

    Raises:
        BurnishError: no heads, several of a kind, heads of another kind (diffusion, FiLM), or a file that holds
            anything else than their tensors.
    """
    folder, output = Path(folder), Path(output)
    config = read_object(folder / CONFIG, folder)
    if config.get("model_type") != "openvla":
        raise BurnishError(f"{folder / CONFIG} has the model_type {str(config.get('model_type'))[:60]!r}", "openvla")
    pickled = _find(folder)
    heads = {name: _read(path, folder, name) for name, path in pickled.items()}
    own = {**config.get(OWN, {}), "head": "l1", "proprio": "proprio_projector" in heads, "cameras": list(cameras),
           "chunk_size": chunk_size, "n_action_steps": chunk_size, "center_crop": center_crop}  # fmt: skip
    copies = {path.name: regular_file(path, folder) for path in sorted(folder.iterdir())
              if path.suffix in _COPIED and path.name != CONFIG and not path.name.startswith(".")}  # fmt: skip
    sizes = {f"{name}.safetensors": path for name, path in pickled.items()}
    plan = Plan(target=output, files={}, identity=[str(folder)], summary=CONFIG, kind=KIND,
                copies={**copies, **sizes}, inputs=[folder])  # fmt: skip
    with output_folder(plan, force) as made:
        for name, path in progress_bar(copies.items(), desc="copying", unit="file"):
            copyfile(path, made / name)
        _write(heads, made)
        write_json(made / CONFIG, {**config, OWN: own})
    return {"heads": {name: len(state) for name, state in heads.items()}, "copied": len(copies)}


def _find(folder: Path) -> dict[str, Path]:
    for other, what in (("noisy_action_projector", "a diffusion head"), ("vision_backbone", "FiLM")):
        if found := sorted(folder.glob(f"{other}--*.pt")):
            raise BurnishError(f"{found[0]} belongs to {what}", "OpenVLA-OFT with the L1 head and no FiLM")
    pickled = {name: sorted(folder.glob(f"{name}--*.pt")) for name in _LAYERS}
    several = next((paths for paths in pickled.values() if len(paths) > 1), None)
    if several:
        raise BurnishError(f"{len(several)} heads of a kind in {folder}: {', '.join(path.name for path in several)}",
                           "one, that of the backbone's step")  # fmt: skip
    if not pickled["action_head"]:
        raise BurnishError(f"no action_head--*.pt in {folder}", "an OpenVLA-OFT folder as it is published")
    return {name: paths[0] for name, paths in pickled.items() if paths}


def _read(path: Path, folder: Path, head: str) -> dict[str, Any]:
    """The tensors of a pickled head by name."""
    regular_file(path, folder, MOST_HEAD)
    expected = f"torch.save of OFT's {head}"
    if not zipfile.is_zipfile(path):
        raise BurnishError(f"{path} is no archive of torch.save (or one of before 2020)", expected)
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
        size = sum(part.file_size for part in parts)
        code = max((part.file_size for part in parts if part.filename.endswith(".pkl")), default=0)
        if packed or len(parts) > _MOST_PARTS or size > path.stat().st_size or code > min(_MOST_CODE, MOST_BYTES):
            raise BurnishError(f"{path} has {len(parts)} parts of {size / 1e6:.0f} MB, {len(packed)} of them packed",
                               expected)  # fmt: skip
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the pickle provokes
        raise BurnishError(f"{path} cannot be read: {one_line(error)}", expected) from error
    if not isinstance(found, dict):
        raise BurnishError(f"{path} holds no table of tensors", expected)
    state = {str(name).removeprefix("module."): value for name, value in found.items()}
    wanted = {f"{layer}.{part}" for layer in _LAYERS[head] for part in ("weight", "bias")}
    odd = sorted(wanted ^ set(state))
    if odd or not all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in state.values()):
        what = f"'{odd[0]}' is {'missing' if odd[0] in wanted else 'unknown'}" if odd else "something else than numbers"
        raise BurnishError(f"{path}: {what}", expected)
    if sum(value.numel() * value.element_size() for value in state.values()) > size:
        raise BurnishError(f"{path} holds tensors larger than itself", expected)
    broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise BurnishError(f"{path}: '{broken[0]}' holds NaN or infinity", "finite weights")
    return state


def _write(heads: dict[str, dict[str, Any]], folder: Path) -> None:
    for name, state in heads.items():
        whole = {key: value.clone().contiguous() for key, value in state.items()}
        save_file(whole, folder / f"{name}.safetensors", metadata={"format": "pt"})
