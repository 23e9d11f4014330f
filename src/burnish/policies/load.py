"""Open a policy folder: the registry knows the wrapper of its type, and the wrapper what is peculiar to it."""

from pathlib import Path
from typing import Any

import torch

from burnish.core import renames
from burnish.core.errors import BurnishError
from burnish.core.provenance import weights_hash
from burnish.core.registry import Registry
from burnish.policies import folder as folders
from burnish.policies.base import Policy
from burnish.policies.keys import CONFIG, WEIGHTS
from burnish.policies.wrapper import PolicyWrapper

ASSETS = Path(__file__).resolve().parent.parent / "assets"

POLICIES: Registry[type[PolicyWrapper]] = Registry("policy", room="burnish.policies", module="policy")
"""Wrappers by LeRobot's name of the policy's type; those of outside packages by entry points `burnish.policies`."""


def load(path: Path | str, *, overrides: dict[str, Any] | None = None, device: str = "cpu",
         dataset_stats: dict[str, Any] | None = None,
         features: dict[str, Any] | None = None) -> PolicyWrapper:  # fmt: skip
    """Load a LeRobot policy folder; see `burnish.policies.load_policy`."""
    folder, device = resolve(path), choose_device(device)
    raw = folders.read_json(folder / CONFIG)
    name = raw.get("type")
    if name not in POLICIES:
        raise BurnishError(f"policy type {name!r} in {folder / CONFIG}", f"one of {', '.join(POLICIES)}")
    kind, old = POLICIES.get(name), renames.POLICY_FIELDS.get(name, {})
    changes = folders.known_fields(renames.rename(overrides or {}, old), name)
    raw = kind.read_config({**renames.rename(raw, old), **changes}, folder)
    config = folders.decode_config(raw, str(folder / CONFIG), features, device)
    processors = folders.load_processors(config, folder, dataset_stats, folder / kind.tokenizer_folder)
    policy = kind.build(config, 0, folder)
    state = kind.rename_tensors(policy, folders.read_tensors(folder / WEIGHTS))
    folders.load_tensors(policy, state, str(folder / WEIGHTS))
    return kind.open(policy.to(device).eval(), *processors, folder, dataset_stats)


def resolve(path: Path | str) -> Path:
    """The folder behind a path or the name of a shipped base."""
    folder = Path(path)
    if not folder.is_dir() and len(folder.parts) == 1 and (ASSETS / folder).is_dir():
        folder = ASSETS / folder
    if not (folder / CONFIG).is_file():
        shipped = sorted(p.parent.name for p in ASSETS.glob(f"*/{CONFIG}"))
        also = f" or a shipped base ({', '.join(shipped)})" if shipped else ""
        raise BurnishError(f"no policy at {path}: it has no {CONFIG}", f"a LeRobot policy folder{also}")
    return folder.absolute()


def choose_device(name: str = "") -> str:
    """`name`, or for "" a GPU where there is one."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def policy_and_hash(policy: Policy | Path | str, device: str = "") -> tuple[Policy, str]:
    """A policy, loaded where its folder is given, and the hash of what was given (see `weights_hash`)."""
    if not isinstance(policy, str | Path):
        return policy, weights_hash(policy)
    folder = resolve(policy)
    return load(folder, device=device), weights_hash(folder)
