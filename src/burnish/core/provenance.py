"""Where a number comes from: hash of the weights, git commit, machine and versions."""

import hashlib
import json
import os
import platform
import subprocess
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from burnish import __version__
from burnish.core.reading import read_object, regular_file

_HASHED = ("dataset_statistics.json", "fast/tokenizer.json", "fast/processor_config.json")
"""Files beside weights and config that decide what a policy's numbers mean, where it has them."""
# Places and machines, which do not change what a policy does.
_NOT_HASHED = ("vlm_model_name", "text_tokenizer_name", "action_tokenizer_name", "pretrained_path", "device")


def weights_hash(policy: Any) -> str:
    """16 hex digits over a policy folder (its tensors, statistics and config); of a module "xxh3-" and 16 more, over
    its parameters and buffers.

    A moved folder keeps its hash. Folder and module do not agree with each other: continue an evaluation with what
    it was started with.
    """
    if isinstance(policy, str | Path):
        digest = hashlib.sha256()
        others = [one for name in _HASHED if (one := Path(policy) / name).is_file()]
        for path in [*sorted(Path(policy).glob("*.safetensors")), *others]:
            found = regular_file(path, Path(policy)).stat()
            digest.update(path.name.encode() + _file_digest(path, found.st_ino, found.st_size, found.st_mtime_ns))
        config = read_object(Path(policy) / "config.json", Path(policy))
        kept = {k: v for k, v in config.items() if k not in _NOT_HASHED}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        return digest.hexdigest()[:16]
    import torch
    import xxhash

    quick = xxhash.xxh3_128()  # every training starts with it, and SHA-256 takes over ten times as long
    for name, tensor in sorted(policy.state_dict().items()):
        quick.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        quick.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return "xxh3-" + quick.hexdigest()[:16]


@lru_cache(maxsize=64)
def _file_digest(path: Path, inode: int, size: int, changed: int) -> bytes:
    """SHA-256 of a file, read once for as long as the rest stays the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@cache
def commit() -> str:
    """Git commit of the checkout that burnish runs from, with "+" when files differ; "" outside a checkout.

    Files under results/ do not count: the run before may have written them.

    An installed package is outside, also where its environment lies in a repository of something else.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", str(here / "provenance.py")):
            return ""
        head = git("rev-parse", "HEAD")
        differ = head and git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results")
        return head + ("+" if differ else "")
    except FileNotFoundError:  # no git on this machine
        return ""


def machine(device: Any = "") -> dict[str, str]:
    """Device and versions, by name, of the machine that measures; every bench and result names them.

    A GPU is named only where `device` is one; "" is a GPU where there is one, as everywhere.
    """
    import torch

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else "no GPU"
    packages = ("lerobot", "torch", "transformers", "mujoco")
    return {
        "device": f"{os.cpu_count()} CPU cores ({platform.machine()}), {gpu}",
        "python": platform.python_version(),
        "burnish": __version__,
        **{name: version(name) for name in packages},
    }
