"""Reading and writing recipes: one YAML file plus --section.field=value, every mistake named with its remedy."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.renames import rename_recipe

_CHOICES = {
    "train.precision": ("no", "bf16", "fp16"),
    "train.peft.method": ("none", "lora", "dora"),
}
_AT_LEAST = {
    "train.imitation_weight": 0,
    "train.steps": 1, "train.batch_size": 1, "train.grad_accumulation": 1, "train.log_every": 1,
    "train.save_every": 1, "train.warmup_steps": 0, "train.lr": 0, "train.weight_decay": 0,
    "train.max_grad_norm": 0, "train.ema_decay": 0, "train.max_minutes": 0, "train.retention_every": 0,
    "train.peft.rank": 1, "language.weight": 0, "language.batch_size": 1, "language.turns": 1,
    "data.workers": 1, "data.image_size": 0,
}  # fmt: skip


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Read a recipe.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: "--section.field=value" each (also "--section.field", "value" as two items); values are YAML.

    Raises:
        BurnishError: the file is missing or no YAML mapping; a key is unknown (names the nearest known one);
            a value has the wrong type or lies out of range.
    """
    source = str(path) if path is not None else "the recipe"
    values = rename_recipe(read_yaml(Path(path))) if path is not None else {}
    if {"recipe", "arms"} <= values.keys():
        raise BurnishError(f"{path} is a study, not a recipe", "a recipe", f"burnish study {path}")
    _check_keys(RecipeConfig, values, "", source)
    for dotted, value in _split(overrides):
        nested: Any = value
        for part in reversed(dotted.split(".")):
            nested = {part: nested}
        nested = rename_recipe(nested)
        _check_keys(RecipeConfig, nested, "", "the command line")
        merge(values, nested)
    return recipe_from_dict(values, source)


def recipe_from_dict(values: dict[str, Any], source: str = "the recipe") -> RecipeConfig:
    """Check and convert nested values; `source` is named in errors."""
    import draccus
    from draccus.utils import DraccusException

    values = rename_recipe(values)
    _check_keys(RecipeConfig, values, "", source)
    train = values.get("train", {})
    if train.get("precision") is False:  # YAML reads no as false
        values = {**values, "train": {**train, "precision": "no"}}
    try:
        recipe = draccus.decode(RecipeConfig, values)
    except DraccusException as error:
        raise BurnishError(f"{source}: {str(error).splitlines()[0]}", "a value of the field's type") from error
    _check_values(recipe, source)
    return recipe


def recipe_to_dict(recipe: RecipeConfig) -> dict[str, Any]:
    """Nested plain values, as a YAML or JSON file holds them."""
    import draccus

    return draccus.encode(recipe)


def save_recipe(recipe: RecipeConfig, path: str | Path) -> None:
    """Write the complete recipe (defaults included) as YAML, at once."""
    import yaml

    from burnish.core.files import write_text

    write_text(Path(path), yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))


def demos_root(recipe: RecipeConfig) -> Path:
    """The data set folder: `data.root`, or the place where the recipe's own demonstrations go."""
    return Path(recipe.data.root) if recipe.data.root else Path("data") / recipe.name


def run_folder(recipe: RecipeConfig) -> Path:
    """The run folder: `output`, or runs/<name>."""
    return Path(recipe.output) if recipe.output else Path("runs") / recipe.name


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} to {"train.lr": 1}; lists and empty mappings stay whole."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise BurnishError(f"no recipe at {path}", "a YAML file", "burnish train --config recipes/<method>/<name>.yaml")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(error).replace("\n", " ")
        raise BurnishError(f"{path} is no readable YAML: {where}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BurnishError(f"{path} holds a {type(values).__name__}", "sections such as train: and data:")
    return values


def _split(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    import yaml

    pairs, items = [], list(overrides)
    while items:
        item = items.pop(0)
        if not item.startswith("--"):
            raise BurnishError(f"unexpected argument '{item}'", "--section.field=value")
        key, equals, text = item[2:].partition("=")
        if not equals:
            if not items or items[0].startswith("--"):
                raise BurnishError(f"'{item}' has no value", f"--{key}=value")
            text = items.pop(0)
        try:
            pairs.append((key, yaml.safe_load(text) if text else ""))
        except yaml.YAMLError as error:
            raise BurnishError(f"--{key} has the unreadable value '{text}'", "a number, word or [list]") from error
    return pairs


def merge(values: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(cls)
    known = []
    for f in fields(cls):
        known.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            known += _known_keys(hints[f.name], f"{prefix}{f.name}.")
    return known


def _check_keys(cls: type, values: dict[str, Any], prefix: str, source: str) -> None:
    hints = get_type_hints(cls)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            everywhere = _known_keys(RecipeConfig)
            # A right field in a wrong section ("lr" for "train.lr") is the likeliest slip after a typing error.
            near = [k for k in everywhere if k.rpartition(".")[2] == str(key)] or get_close_matches(
                name, everywhere, 1, 0.5
            ) or [k for k in everywhere if k.startswith(prefix) and "." not in k[len(prefix):]]  # fmt: skip
            raise BurnishError(f"{source}: unknown key '{name}'", f"'{near[0]}'" if len(near) == 1 else ", ".join(near))
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                example = f"fields below it, such as {name}.{fields(hints[key])[0].name}"
                raise BurnishError(f"{source}: '{name}' is {value!r}", example)
            _check_keys(hints[key], value, f"{name}.", source)


def _check_values(recipe: RecipeConfig, source: str) -> None:
    flat = flatten(recipe_to_dict(recipe))
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            raise BurnishError(f"{source}: {key} is '{flat[key]}'", f"one of {', '.join(choices)}")
    for key, least in _AT_LEAST.items():
        if not flat[key] >= least:
            raise BurnishError(f"{source}: {key} is {flat[key]}", f"at least {least}")
    if not 0 <= recipe.train.ema_decay < 1:
        raise BurnishError(f"{source}: train.ema_decay is {recipe.train.ema_decay}", "0 (off) or a value below 1")
    if len(recipe.train.betas) != 2:
        raise BurnishError(f"{source}: train.betas is {recipe.train.betas}", "two numbers")
    for entry in recipe.objectives:
        if "name" not in entry:
            raise BurnishError(f"{source}: an entry of 'objectives' has no name: {entry}", "{name: <method>, ...}")
    if recipe.language.weight > 0 and not recipe.language.root:
        raise BurnishError(f"{source}: language.weight is {recipe.language.weight} but language.root is empty",
                           "a question folder", "burnish questions --help")  # fmt: skip
