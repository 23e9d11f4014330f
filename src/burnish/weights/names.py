"""Which tensor is what in a VLA checkpoint, which take part in a delta, and how names of two checkpoints meet."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from burnish.core.errors import BurnishError
from burnish.core.reading import read_object, search, substitute
from burnish.weights.tensorfile import FLOATS, TensorInfo

Heads = Literal["refuse", "skip", "keep"]
"""What to do with action and state heads that differ between checkpoints or robots."""
GROUPS = ("vision", "language", "expert", "head", "statistics", "buffer")
_PATTERNS = (
    ("statistics", r"(^|\.)(un)?normalize_(inputs|outputs|targets)|buffer_(observation|action)|(^|\.)norm_stats"),
    ("buffer", r"position_ids$|inv_freq$|rotary_emb|num_batches_tracked$|\.(scales|zero_points|qzeros|g_idx)$"
               r"|quant_state"),
    ("head", r"(^|\.)(action_in_proj|action_out_proj|state_proj|action_head|proprio_projector|noisy_action_projector"
             r"|state_encoder|action_encoder|action_decoder)(\.|$)"),
    ("expert", r"(^|\.)(lm_expert|gemma_expert|action_expert|expert)(\.|$)|action_time_mlp|(^|\.)time_mlp"),
    ("vision", r"vision|(^|\.)visual\.|siglip|dino|image_encoder|patch_embed"),
)  # fmt: skip
_PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "policy.", "model.")


def group_of(name: str, dtype: str) -> str:
    """One of GROUPS. Heads are the modules whose shape depends on the robot; quantisation scales count as buffers."""
    if dtype not in FLOATS:
        return "buffer"
    return next((group for group, pattern in _PATTERNS if re.search(pattern, name)), "language")


def module_of(name: str) -> str:
    """The layer or module a tensor belongs to, for tables: "...layers.3" or the name without its last part."""
    found = re.search(r"^(.*?\b(?:layers|blocks|h)\.\d+)\b", name)
    return found[1] if found else name.rpartition(".")[0] or name


def match_names(
    names: Iterable[str], reference: Iterable[str], rules: Sequence[tuple[str, str]] = ()
) -> dict[str, str]:
    """Names of one checkpoint to those of the reference.

    Args:
        rules: (regular expression, replacement) applied first, in order.

    Returns:
        name to name; one that has no counterpart stays as it is (after the rules). Known wrappers (`model.`,
        `policy.`, `module.`, `base_model.model.`, `_orig_mod.`) are dropped or added where that makes it meet.
    """
    reference, found = set(reference), {}
    tails = {_bare(name): name for name in reference}
    for name in names:
        renamed = name
        for pattern, replacement in rules:
            renamed = substitute(pattern, replacement, renamed, f"--rename '{pattern[:100]}={replacement[:100]}'")
        if renamed not in reference:
            renamed = tails.get(_bare(renamed), renamed)
        found[name] = renamed
    if len(set(found.values())) != len(found):
        taken = sorted(found.values())
        twice = next(a for a, b in zip(taken, taken[1:], strict=False) if a == b)
        raise BurnishError(f"two tensors are both called '{twice}' after renaming", "one", "another --rename")
    return found


def _bare(name: str) -> str:
    while stripped := next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), ""):
        name = stripped
    return name


@dataclass
class Choice:
    """What takes part in a delta: tensor name to group; what does not, with the reason."""

    chosen: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether the patterns (see `core.reading.search`) let `name` take part; an empty `include` lets all."""
    wanted = not include or any(search(p, name, "--include") for p in include)
    return wanted and not any(search(p, name, "--exclude") for p in exclude)


def check_patterns(patterns: Sequence[str], names: Iterable[str], option: str) -> None:
    """Raise BurnishError for a pattern that is no regular expression or matches nothing."""
    names = list(names) or ["weight"]
    for pattern in patterns:
        if not any(search(pattern, name, option) for name in names):
            raise BurnishError(f"{option} '{pattern}' matches no tensor", f"part of a name such as '{names[0]}'")


def choose(
    parents: Mapping[str, Mapping[str, TensorInfo]],
    include: Sequence[str] = (), exclude: Sequence[str] = (), heads: Heads = "refuse",
) -> Choice:  # fmt: skip
    """Apply the rules for heads, statistics, buffers, names and shapes.

    Args:
        parents: "base", "tuned", "control" to their tensors.
        include, exclude: patterns over names.
        heads: refuse, skip or keep heads that are missing somewhere or differ in shape (keep cannot fix a shape).
    """
    names = {name for tensors in parents.values() for name in tensors}
    check_patterns(include, names, "--include")
    check_patterns(exclude, names, "--exclude")
    choice = Choice()
    for name in sorted(names):
        holders = {who: tensors[name] for who, tensors in parents.items() if name in tensors}
        if not selected(name, include, exclude):
            choice.skipped[name] = "not selected"
            continue
        _check_dtypes(name, holders)
        group = group_of(name, next(iter(holders.values())).dtype)
        if group in ("statistics", "buffer"):
            choice.skipped[name] = f"{group}: taken from the base"
        elif group == "head" and heads == "skip":
            choice.skipped[name] = "head, --heads skip"
        else:
            _check_holders(name, group, parents, holders)
            choice.chosen[name] = group
    if not choice.chosen:
        raise BurnishError("no tensor takes part in the delta", "at least one", "wider --include patterns")
    return choice


def _check_dtypes(name: str, holders: Mapping[str, TensorInfo]) -> None:
    """Stored integers (or 8-bit floats) of quantised weights are no numbers to subtract."""
    odd = {who: info.dtype for who, info in holders.items() if info.dtype not in FLOATS}
    if odd and (len(odd) < len(holders) or "weight" in name.rpartition(".")[2]):
        who, dtype = next(iter(odd.items()))
        raise BurnishError(f"'{name}' is {dtype} in {who}", f"floating-point weights ({', '.join(FLOATS)})",
                           "give the checkpoint as it was before it was quantised")  # fmt: skip


def _check_holders(
    name: str, group: str, parents: Mapping[str, Mapping[str, TensorInfo]], holders: Mapping[str, TensorInfo]
) -> None:
    lacking = [who for who in parents if who not in holders]
    shapes = {who: info.shape for who, info in holders.items()}
    if not lacking and len(set(shapes.values())) == 1:
        return
    if group == "head":
        what = f"is missing in {lacking[0]}" if lacking else f"has shapes {_listed(shapes)}"
        raise BurnishError(f"head '{name}' {what}", "a rule for heads that differ", "--heads skip")
    if lacking:
        everywhere = len(holders) > 1
        what = f"'{name}' is missing in {lacking[0]}" if everywhere else f"'{name}' is only in {next(iter(holders))}"
        count = sum(name in parents[next(iter(holders))] for name in set().union(*parents.values()))
        raise BurnishError(f"{what} (of {count} tensors)", "the same tensors in all parents",
                           f"--exclude '{re.escape(name)}', or --rename PATTERN=NAME")  # fmt: skip
    raise BurnishError(f"'{name}' has shapes {_listed(shapes)}", "one shape", "checkpoints of one architecture")


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{list(shape)} in {who}" for who, shape in shapes.items())


def same_robot(one: dict[str, list[int]] | None, other: dict[str, list[int]] | None) -> bool | None:
    """Whether state and action of two `embodiment`s agree (cameras have no part in heads); None if one is unknown."""
    if one is None or other is None:
        return None
    spaces = [{n: s for n, s in robot.items() if "image" not in n} for robot in (one, other)]
    return spaces[0] == spaces[1]


def embodiment(folder: Path) -> dict[str, list[int]] | None:
    """Shapes of state, action and cameras that a LeRobot config.json declares; None when it declares none."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_object(path, folder)
    found: dict[str, list[int]] = {}
    for section in ("input_features", "output_features"):
        features = config.get(section) or {}
        for name, feature in features.items() if isinstance(features, dict) else [(section, None)]:
            shape = feature.get("shape") if isinstance(feature, dict) else None
            if not isinstance(shape, list) or not all(type(size) is int for size in shape):
                raise BurnishError(f"{path}: the shape of '{name}' is unreadable", "a list of whole numbers, as "
                                   "LeRobot writes it")  # fmt: skip
            found[name] = shape
    return dict(sorted(found.items())) or None
