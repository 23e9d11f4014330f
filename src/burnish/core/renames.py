"""Old names of options, kept for one release: they give the same result and one line that names the new one."""

import logging
from copy import deepcopy
from typing import Any

log = logging.getLogger("burnish")

RECIPE = {"train.final_lr_share": "train.min_lr_ratio", "train.grad_clip": "train.max_grad_norm"}
"""Keys of a recipe."""

STUDY = {"arms": "variants", "before": "setup"}
"""Keys of a study file."""

OBJECTIVES: dict[str, dict[str, str]] = {"align": {"match": "gradient_norm_ratio"}}
"""Options of an entry in `objectives:`, by the method's name."""

POLICY_FIELDS = {"burnish_discrete": {"open_prompt": "prompt_sees_actions"}}
"""Fields of stored policy configs and of `policy.overrides`, by the policy's type."""

DECODER_OPTIONS = {"forced": "min_unmasked", "conf": "threshold"}
"""Options of a decode plan."""

_told: set[str] = set()


def note(old: str, new: str) -> None:
    """Say once in a process that `old` is now called `new`."""
    if old not in _told:
        _told.add(old)
        log.warning("%s is now called %s; the old name goes with the next release", old, new)


def rename_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Nested values of a recipe, or of a part of one, with old names replaced; the argument stays as it is.

    Where both names are given the new one counts.
    """
    values = deepcopy(values)
    for old, new in RECIPE.items():
        *path, last = old.split(".")
        section: Any = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            note(old, new)
            section.setdefault(new.rpartition(".")[2], section.pop(last))
            section.pop(last, None)
    entries = values.get("objectives")
    if isinstance(entries, list):
        values["objectives"] = [rename_objective(entry) if isinstance(entry, dict) else entry for entry in entries]
    return values


def rename_objective(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of `objectives:` with the present names of its options."""
    name = entry.get("name")
    return rename(entry, OBJECTIVES.get(name, {}) if isinstance(name, str) else {}, f"{name}: ")


def rename(values: dict[str, Any], table: dict[str, str], where: str = "") -> dict[str, Any]:
    """`values` with the names of `table` replaced, each with a note; where both names are given the new one counts.

    An old name that holds None was never set.
    """
    for old in table.keys() & values.keys():
        if values[old] is not None:
            note(where + old, table[old])
    kept = {k: v for k, v in values.items() if k not in table or (v is not None and table[k] not in values)}
    return {table.get(key, key): value for key, value in kept.items()}
