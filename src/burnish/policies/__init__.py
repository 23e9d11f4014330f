"""Policies: `load_policy` for a LeRobot folder or a shipped base, `create_policy` for a new one on a VLM."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.policies.base import Captured, Policy

__all__ = ["Captured", "Policy", "create_policy", "load_policy"]


def load_policy(path: Path | str, *, overrides: dict[str, Any] | None = None, device: str = "cpu",
                dataset_stats: dict[str, Any] | None = None, features: dict[str, Any] | None = None,
                stats_source: str = "the given statistics") -> "Policy":  # fmt: skip
    """Load a LeRobot policy folder, or a shipped base by its bare name.

    Args:
        path: the folder, of any type that LeRobot or an installed package knows, or e.g. "small".
        overrides: fields of the LeRobot config to change before the model is built.
        device: torch device; "" means a GPU where there is one.
        dataset_stats: LeRobot statistics by key that replace the stored ones (fine-tuning on new data).
        features: LeRobot PolicyFeatures by key, inputs and outputs, that replace the declared ones. A stored rename map
            goes with those.
        stats_source: what errors call `dataset_stats`, e.g. the path of a data set's stats.json.

    Raises:
        BurnishError: missing, left-over or non-finite tensors, missing statistics, dimensions that do not fit, sizes
            out of range, and whatever would run code or read outside the folder (see SECURITY.md), in one line.
    """
    from burnish.policies.load import load

    return load(path, overrides=overrides, device=device, dataset_stats=dataset_stats, features=features,
                stats_source=stats_source)  # fmt: skip


def create_policy(vlm_folder: Path | str, features: dict, dataset_stats: dict, overrides: dict | None = None, *,
                  type: str = "smolvla", **options: Any) -> "Policy":  # fmt: skip
    """A new policy on a VLM folder.

    Args:
        vlm_folder: SmolVLM folder; for type burnish_discrete a SmolVLA folder or a shipped base too; "" for a type that
            starts from none ("act").
        features: LeRobot PolicyFeatures by key, inputs and outputs.
        dataset_stats: LeRobot statistics by key.
        overrides: fields of the LeRobot config.
        type: e.g. smolvla, burnish_discrete, act.
        **options: of the type, see `SmolVLA.create` and `burnish.policies.discrete.policy.new_policy`.

    Raises:
        BurnishError: no such type or folder, or fields that the type does not have.
    """
    from burnish.core import renames
    from burnish.policies.load import kind_of

    fields = renames.rename(overrides or {}, renames.POLICY_FIELDS.get(type, {}))
    return kind_of(type).create(type, vlm_folder, features, dataset_stats, fields, **options)


def __getattr__(name: str):
    # The base class needs torch; `burnish --help` does without.
    if name in ("Captured", "Policy"):
        from burnish.policies import base

        return getattr(base, name)
    raise AttributeError(f"module 'burnish.policies' has no attribute '{name}'")
