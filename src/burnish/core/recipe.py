"""Recipes: one YAML file plus --section.field=value, found from any folder, every mistake named with its remedy."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from burnish.core.config import MixConfig, RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import write_text
from burnish.core.options import check, home, number, read_options
from burnish.core.reading import parse_yaml, read_json, read_text
from burnish.core.renames import rename_recipe

SHIPPED = Path(__file__).parents[1] / "recipes"
"""Recipes and studies that come with the package."""
ALIASES = {
    "batch": "train.batch_size", "dataset": "data.root", "dataset.root": "data.root", "epochs": "train.steps",
    "gradient_accumulation_steps": "train.grad_accumulation", "job_name": "name", "log_freq": "train.log_every",
    "lora_alpha": "train.peft.alpha", "lora_rank": "train.peft.rank", "lr_warmup_steps": "train.warmup_steps",
    "num_steps": "train.steps", "num_workers": "data.workers", "output_dir": "output", "policy.device": "eval.device",
    "policy.pretrained_path": "policy.path", "save_freq": "train.save_every",
}  # fmt: skip
"""What other tools call a field, by its last word or its whole name; for error messages alone."""


def find_recipe(name: str | Path, beside: Path | None = None) -> Path:
    """The file that `name` means: one that exists, else one that comes with the package.

    The latter may be called "tabletop/quickstart", "tabletop/quickstart.yaml" or "recipes/tabletop/quickstart.yaml",
    from any folder.

    Args:
        name: a path or the name of a shipped file.
        beside: a file whose folder is looked at first.

    Raises:
        BurnishError: there is none; names the nearest shipped ones.
    """
    path = Path(home(str(name), "the recipe's path"))
    if "\0" in str(path) or not path.name or max(map(len, path.parts)) > 255 or len(str(path)) > 4000:
        raise BurnishError(f"no recipe at {str(path)[:100]!r}", "a file")
    if beside is not None and (beside.parent / path).is_file():
        return beside.parent / path
    if path.is_file():
        return path
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else path
    if not path.is_absolute() and ".." not in path.parts:
        for shipped in (SHIPPED / inside, SHIPPED / f"{inside}.yaml"):
            if shipped.is_file():
                return shipped
    known = sorted(str(file.relative_to(SHIPPED).with_suffix("")) for file in SHIPPED.rglob("*.yaml"))
    wanted = str(inside.with_suffix(""))
    near = [one for one in known if one.rpartition("/")[2] == inside.stem] or get_close_matches(wanted, known, 3, 0.5)
    shown = ", ".join(near or [one for one in known if one.startswith(("tabletop/", "real/"))]) + ", ..." * (not near)
    expected = f"a file, or a recipe that comes with burnish: {shown}"
    raise BurnishError(f"no recipe at {name}", expected)


def is_study(values: Mapping[str, Any]) -> bool:
    """Whether the content of a YAML file is a study (many runs of a recipe) and not a recipe."""
    return "recipe" in values and bool({"variants", "arms"} & values.keys())


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Read a recipe.

    Args:
        path: YAML file or the name of a shipped one, see `find_recipe`; None starts from the defaults.
        overrides: "--section.field=value" each (also "--section.field", "value" as two items); values are YAML.

    Raises:
        BurnishError: the file is missing or no YAML mapping; a key is unknown (names the nearest known one);
            a value has the wrong type or lies out of range.
    """
    source = str(path) if path is not None else "the recipe"
    values = rename_recipe(read_yaml(find_recipe(path))) if path is not None else {}
    if is_study(values):
        raise BurnishError(f"{path} is a study, not a recipe", "a recipe", f"burnish run {path}")
    _check_keys(RecipeConfig, values, "", source)
    for dotted, value in split_overrides(overrides):
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
    """Write the complete recipe (defaults included) as YAML to `path`, atomically."""
    import yaml

    write_text(Path(path), yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))


def demos_root(recipe: RecipeConfig) -> Path:
    """The data set folder: `data.root`, or the place where the recipe's own demonstrations go."""
    return Path(recipe.data.root) if recipe.data.root else Path("data") / recipe.name


def mixed_data(recipe: RecipeConfig, source: str = "the recipe", read: bool = True) -> list[MixConfig]:
    """The entries of `data.mix`, which are drawn from beside `data.root`.

    Args:
        read: lists of episodes that stand in files, which a study writes only after its recipes were checked.

    Raises:
        BurnishError: an entry without root or with an impossible value, or the same episodes a second time.
    """
    entries: list[MixConfig] = []
    taken = [(demos_root(recipe), recipe.data.episodes)]
    taken += [(demos_root(recipe), recipe.data.held_out)] if recipe.data.held_out else []
    for place, given in enumerate(recipe.data.mix):
        where = f"{source}: data.mix[{place}]"
        entry = read_options(MixConfig, given, where)
        if not entry.root or "\0" in entry.root:
            raise BurnishError(f"{where} has no root", "{root: FOLDER, weight: 0.25}")
        if unread := isinstance(entry.episodes, str) and not read:
            entry.episodes = []
        elif isinstance(entry.episodes, str):
            entry.episodes = read_json(Path(entry.episodes))
        if not isinstance(entry.episodes, list) or not all(type(episode) is int for episode in entry.episodes):
            raise BurnishError(f"{where}: episodes is {str(entry.episodes)[:100]}", "a list of whole numbers")
        for root, episodes in taken:
            apart = unread or (episodes and entry.episodes and not set(episodes) & set(entry.episodes))
            if os.path.realpath(root) == os.path.realpath(entry.root) and not apart:
                raise BurnishError(f"{where} names {entry.root} again", "each data set once, or other episodes of it")
        taken.append((Path(entry.root), entry.episodes))
        entries.append(entry)
    return entries


def run_folder(recipe: RecipeConfig) -> Path:
    """The run folder: `output`, or runs/<name>."""
    return Path(recipe.output) if recipe.output else Path("runs") / recipe.name


def check_name(name: str, what: str, parts: int = 8) -> None:
    """Raise BurnishError unless `name` can be a folder below another one: no `..`, no absolute path, no odd characters.

    Args:
        name: of a recipe, study, variant or evaluation.
        what: what is named, which begins the message.
        parts: how many folders it may name in each other ("align/core" names two).
    """
    found = name.split("/")
    odd = any(part in ("", ".", "..") or part.startswith(("~", ".")) or len(part) > 100 for part in found)
    if odd or len(found) > parts or not name.isprintable():
        expected = "letters, digits, _ and - " + ("with / between the names of folders" if parts > 1 else "and no /")
        raise BurnishError(f"{what} is {name[:100]!r}", expected.strip())


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} to {"train.lr": 1}; lists and empty mappings stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty one; raises BurnishError where it is none."""
    values = parse_yaml(read_text(path), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BurnishError(f"{path} holds a {type(values).__name__}", "sections such as train: and data:")
    return values


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """(name, value) of "--name=value" (or of "--name", "value" as two items); values are YAML."""
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
        pairs.append((key, _value(key, text)))
    return pairs


def _value(key: str, text: str) -> Any:
    if text.startswith("~"):
        return text  # a path in the home folder, where YAML reads "nothing"
    try:
        return parse_yaml(text, f"--{key}") if text else ""
    except BurnishError as error:
        raise BurnishError(f"--{key} has the unreadable value '{text[:100]}'", "a number, word or [list]") from error


def merge(values: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def _known_keys(cls: type, prefix: str = "") -> dict[str, str]:
    """Every field and what its help says."""
    hints = get_type_hints(cls)
    known = {}
    for f in fields(cls):
        known[prefix + f.name] = f.metadata.get("help", "")
        if is_dataclass(hints[f.name]):
            known |= _known_keys(hints[f.name], f"{prefix}{f.name}.")
    return known


def _check_keys(cls: type, values: dict[str, Any], prefix: str, source: str) -> None:
    hints = get_type_hints(cls)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            near = _near(name, prefix)
            found = f"{source}: unknown key '{name[:100]}'"
            raise BurnishError(found, f"'{near[0]}'" if len(near) == 1 else ", ".join(near))
        if get_origin(hints[key]) is list and isinstance(value, str | int | float):
            fix = "" if get_origin(get_args(hints[key])[0]) is dict else f"--{name}=[{str(value)[:50]}]"
            expected = "a list" if fix else "a list of mappings, [{...}, ...]"
            raise BurnishError(f"{source}: '{name}' is {str(value)[:100]!r}", expected, fix)
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                example = f"fields below it, such as {name}.{fields(hints[key])[0].name}"
                raise BurnishError(f"{source}: '{name}' is {value!r}", example)
            _check_keys(hints[key], value, f"{name}.", source)
        elif _would_be_bent(hints[key], value) and (name, value) != ("train.precision", False):
            raise BurnishError(f"{source}: {name} is {str(value)[:100]!r}", "a value of the field's type")


def _would_be_bent(hint: Any, value: Any) -> bool:
    """Whether draccus would make something else of a value: 1 of true, a word of a list, 1 of 1.5."""
    kinds = {get_origin(part) or part for part in (get_args(hint) if isinstance(hint, UnionType) else (hint,))}
    odd: dict[type, set[Any]] = {bool: {bool}, list: {list, tuple}, dict: {dict}, float: {float, str}}
    odd[NoneType] = {NoneType}
    return type(value) in odd and not kinds & odd[type(value)] and Any not in kinds


def _near(name: str, prefix: str) -> list[str]:
    """The fields that an unknown key may mean, the likeliest kind of slip first; else all of its section."""
    everywhere, last = _known_keys(RecipeConfig), name.rpartition(".")[2]
    if right_field_in_wrong_section := [key for key in everywhere if key.rpartition(".")[2] == last]:
        return right_field_in_wrong_section
    if alias := ALIASES.get(name) or ALIASES.get(last):
        return [alias]
    words = last.replace("_", " ")  # "learning rate" stands in the help of train.lr
    if " " in words and (described := [key for key, meaning in everywhere.items() if words in meaning]):
        return described
    return get_close_matches(name, everywhere, 1, 0.5) or [
        key for key in everywhere if key.startswith(prefix) and "." not in key[len(prefix) :]
    ]


def _at_home(value: Any) -> Any:
    """`value` with every "~/..." inside it below the home folder."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return home(value) if isinstance(value, str) and value.startswith("~/") else value


def _check_values(recipe: RecipeConfig, source: str) -> None:
    check(recipe, source)
    betas = recipe.train.betas
    if len(betas) != 2 or not all(number(beta) and 0 <= beta < 1 for beta in betas):
        raise BurnishError(f"{source}: train.betas is {betas}", "two numbers, at least 0 and below 1")
    check_name(recipe.name, f"{source}: name")
    mixed_data(recipe, source, read=False)
    # Of what methods and policies take only they know what is a path; nothing else begins so.
    recipe.objectives, recipe.policy.overrides = map(_at_home, (recipe.objectives, recipe.policy.overrides))
    for entry in recipe.objectives:
        if not isinstance(entry.get("name"), str):
            found = f"{source}: an entry of 'objectives' has no name: {str(entry)[:200]}"
            raise BurnishError(found, "{name: <method>, ...}")
    if recipe.language.weight > 0 and not recipe.language.root:
        raise BurnishError(f"{source}: language.weight is {recipe.language.weight} but language.root is empty",
                           "a question folder", "burnish data questions --help")  # fmt: skip
