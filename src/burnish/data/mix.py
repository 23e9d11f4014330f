"""Several data sets of one run: whether and how their features go together, and their statistics.

`data.root` is the first; every entry of `data.mix` is another one. What features are called, and in which order joints
stand, is as in the first; an entry's `columns` say what differs.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from burnish.core.config import DataConfig, RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.reading import read_object
from burnish.core.recipe import demos_root, mixed_data
from burnish.data.checks import require
from burnish.data.dataset import QUANTILES, Dataset, Problem, look, open_dataset, quantile_name
from burnish.data.features import ACTION, IMAGES, STATE, train_option
from burnish.data.frames import dataset_hash
from burnish.policies.keys import MODES

BLOCK = 1 << 16
"""Samples after which every data set has had its exact share."""
FILE = "data_sets.json"
"""Beside a policy that was trained on several: what they were, with the statistics of each."""
log = logging.getLogger("burnish")


@dataclass
class Source:
    """A data set of a run.

    Args:
        root, meta: its folder and metadata, with the features under the names of the first data set.
        weight: samples that are drawn from it for each one of the first.
        episodes: those that are used; none named means all.
        absent: cameras of the first that it does not have.
        stats: its own statistics, see `use_statistics`.
    """

    root: Path
    meta: Dataset
    weight: float = 1.0
    episodes: list[int] = field(default_factory=list)
    absent: tuple[str, ...] = ()
    stats: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def require(self, cameras: Sequence[str]) -> list[int]:
        return require(self.meta, self.episodes, [c for c in cameras if c not in self.absent])


def open_sources(recipe: RecipeConfig) -> list[Source]:
    """The data sets of a recipe, the first one first, whose actions and states have been matched."""
    root = demos_root(recipe)
    meta = open_dataset(root, recipe.data.columns)
    meta.named = "data.episodes"
    sources = [Source(root, meta, episodes=trained_episodes(recipe.data, meta))]
    for place, entry in enumerate(mixed_data(recipe)):
        absent = tuple(key for key, given in entry.columns.items() if given is None)
        wrong = [key for key in absent if not key.startswith(IMAGES)]
        if wrong:
            raise BurnishError(f"data.mix[{place}]: columns says that there is no {wrong[0]}", "null for cameras alone")
        columns = {key: given for key, given in entry.columns.items() if key not in absent}
        meta = open_dataset(entry.root, columns)
        meta.named = f"the entry of {entry.root} in data.mix"
        source = Source(Path(entry.root), meta, float(entry.weight), entry.episodes, absent)
        fault = match(sources[0].meta, source.meta, columns)
        if fault is not None:
            raise BurnishError(*fault)
        sources.append(source)
    return sources


def trained_episodes(data: DataConfig, meta: Dataset) -> list[int]:
    """The episodes of `data.root` that are trained on, none named means all: without those that are held out."""
    if not data.held_out:
        return data.episodes
    held_out = set(require(meta, data.held_out, (), "data.held_out"))
    rest = [episode for episode in data.episodes or meta.episodes if episode not in held_out]
    if both := held_out & set(data.episodes):
        raise BurnishError(f"data.held_out names episode {min(both)}, which data.episodes trains on", "either")
    if not rest:
        raise BurnishError("data.held_out names all episodes", "some to train on")
    return rest


def match(first: Dataset, other: Dataset, columns: Sequence[str] = ()) -> tuple[str, str, str] | None:
    """Bring the dimensions of `other` into the order of `first` by their names.

    Args:
        columns: features that a map has named: their dimensions are taken in the order of that map.

    Returns:
        What was found, expected and may help where the two do not go together.
    """
    what, where = f"{other.root}", f"as in {first.root}"
    if abs(first.fps - other.fps) > 1e-3 * first.fps:
        return f"{what} has {other.fps:g} frames a second", f"{first.fps:g} {where}", "data sets of one frame rate"
    for name in (ACTION, STATE):
        one, two = first.features.get(name), other.features.get(name)
        if (one is None) != (two is None):
            lacking, having = (other, first) if two is None else (first, other)
            return f"{lacking.root} has no '{name}'", f"one, as {having.root} has", look(lacking.root)
        if one is None or two is None:
            continue
        ours, theirs = one["names"], two["names"]
        if len(ours) != len(theirs):
            fix = f"columns: {{{name}: [...]}} in its entry of data.mix joins several features"
            return f"{what} has '{name}' of {len(theirs)} dimensions", f"{len(ours)} {where}", fix
        if ours == theirs or name in columns or _nameless(ours) or _nameless(theirs):
            continue
        if sorted(ours) != sorted(theirs) or len(set(ours)) < len(ours):
            odd = next((own for own in theirs if own not in ours), theirs[0])
            fix = f"columns: {{{name}: {two['columns'][0]}}} in its entry of data.mix, if they mean the same in order"
            return f"{what} calls a dimension of '{name}' {odd}", f"{', '.join(ours)} {where}", fix
        log.info("%s: the dimensions of '%s' are read in the order of %s", other.root, name, first.root)
        other.reorder(name, ours)
    return None


def _nameless(names: Sequence[str]) -> bool:
    return list(names) == [str(place) for place in range(len(names))]


def check_cameras(recipe: RecipeConfig, sources: Sequence[Source], cameras: Sequence[str]) -> None:
    """Raise BurnishError where a further data set lacks one of these cameras and does not say so."""
    for place, source in enumerate(sources[1:]):
        if cameras and not set(cameras) - set(source.absent):
            raise BurnishError(f"{source.meta.named} says that it has none of the cameras", ", ".join(cameras))
        for camera in cameras:
            if camera in source.meta.camera_keys or camera in source.absent:
                continue
            spare = [name for name in source.meta.camera_keys if name not in cameras]
            entry = {**recipe.data.mix[place]}
            entry["columns"] = {**entry.get("columns", {}), camera: spare[0] if spare else None}
            entries = [entry if i == place else one for i, one in enumerate(recipe.data.mix)]
            has = ", ".join(source.meta.camera_keys) or "none"
            raise BurnishError(f"{source.root} has no camera '{camera}' (it has {has})",
                               f"the cameras of {sources[0].root}, or a map",
                               train_option("data.mix", entries))  # fmt: skip


def quotas(weights: Sequence[float]) -> np.ndarray:
    """[D] samples of each data set in BLOCK, by the method of largest remainders."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: BLOCK - whole.sum()]] += 1
    if whole.min() < 1:
        raise BurnishError(f"data.mix: a weight of {min(weights):g} beside {max(weights):g}",
                           f"at least one sample in {BLOCK:,}")  # fmt: skip
    return whole


def use_statistics(sources: Sequence[Source], kind: str) -> None:
    """Give the first data set the statistics that the policy normalises with: those of all that is drawn, or its own.

    Every data set counts with its share of the samples. Mean and standard deviation are those of the mixture (law of
    total variance), min and max over all; quantiles of actions and states come from the rows.
    """
    for source in sources:
        source.stats = source.meta.stats
    if len(sources) > 1 and kind == "joint":
        sources[0].meta.stats = joint_statistics(sources)


def joint_statistics(sources: Sequence[Source]) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of what is drawn from several data sets, see `use_statistics`."""
    shares = quotas([source.weight for source in sources]) / BLOCK
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in sources[0].stats:
        holders = [(share, s.stats[name]) for share, s in zip(shares, sources, strict=True) if name in s.stats]
        both = {key for key in holders[0][1] if all(key in one for _, one in holders)}
        if not {"mean", "std", "min", "max"} <= both or len({one["mean"].shape for _, one in holders}) > 1:
            continue
        total = sum(share for share, _ in holders)
        mean = sum(share / total * one["mean"] for share, one in holders)
        spread = sum(share / total * (one["std"] ** 2 + (one["mean"] - mean) ** 2) for share, one in holders)
        found[name] = {
            "mean": mean, "std": np.sqrt(spread), "min": np.min([one["min"] for _, one in holders], 0),
            "max": np.max([one["max"] for _, one in holders], 0),
        }  # fmt: skip
        if "count" in both:
            found[name]["count"] = sum(one["count"] for _, one in holders)
        if name in (ACTION, STATE):
            found[name] |= _quantiles([s.meta.rows.values[name] for s in sources], shares)
    return found


def _quantiles(values: Sequence[np.ndarray], shares: np.ndarray) -> dict[str, np.ndarray]:
    """Quantiles [D] of rows [N, D] of several data sets, each of which has its share of the weight."""
    values = [one[np.isfinite(one).all(1)].astype(np.float64) for one in values]
    rows = np.concatenate(values)
    weight = np.concatenate([np.full(len(one), share / max(1, len(one)))
                             for one, share in zip(values, shares, strict=True)])  # fmt: skip
    found = np.empty((len(QUANTILES), rows.shape[1]))
    for dim in range(rows.shape[1]):
        order = np.argsort(rows[:, dim], kind="stable")
        summed = np.cumsum(weight[order])
        place = np.searchsorted(summed, np.array(QUANTILES) * summed[-1])
        found[:, dim] = rows[order[np.minimum(place, len(order) - 1)], dim]
    return {quantile_name(q): one for q, one in zip(QUANTILES, found, strict=True)}


def as_first(values: np.ndarray, own: dict[str, np.ndarray], first: dict[str, np.ndarray], mode: str) -> np.ndarray:
    """Values [N, D] of a data set in the units in which the statistics of the first normalise them as its own would.

    Args:
        own, first: statistics of the data set and of the first one.
        mode: LeRobot's NormalizationMode; one that normalises nothing changes nothing.
    """
    if mode not in MODES:
        return values
    low, high = MODES[mode]
    scales = [one[high] if mode == "MEAN_STD" else one[high] - one[low] for one in (own, first)]
    factor = scales[1] / np.maximum(scales[0], 1e-8)
    return ((values.astype(np.float64) - own[low]) * factor + first[low]).astype(values.dtype)


def joint_hash(hashes: Sequence[str]) -> str:
    """One hash of several data sets in their order; of one its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\0".join(hashes).encode()).hexdigest()[:16]


def recipe_hash(recipe: RecipeConfig) -> str:
    """The hash of a recipe's data as it lies there now; "" where some of it does not."""
    roots = [demos_root(recipe), *(Path(entry.root) for entry in mixed_data(recipe))]
    return joint_hash([dataset_hash(root) for root in roots]) if all(root.is_dir() for root in roots) else ""


def write_sources(sources: Sequence[Source], kind: str, hashes: Sequence[str], folder: Path) -> None:
    """Note in a policy folder which data sets it was trained on, with the statistics of each."""
    shares = quotas([source.weight for source in sources]) / BLOCK
    content = {
        "statistics": kind,
        "data_sets": [
            {"root": str(source.root), "hash": key, "share": float(share), "episodes": source.episodes,
             "stats": {name: {figure: value.tolist() for figure, value in source.stats.get(name, {}).items()}
                       for name in (ACTION, STATE)}}
            for source, key, share in zip(sources, hashes, shares, strict=True)
        ],
    }  # fmt: skip
    write_json(folder / FILE, content)


def stored_statistics(folder: Path | str, root: str) -> dict[str, dict[str, np.ndarray]]:
    """The statistics of one of the data sets that a policy was trained on, for `load_policy(dataset_stats=...)`.

    Args:
        folder: the policy's.
        root: the data set's folder, or its last part.

    Raises:
        BurnishError: the policy was trained on one data set, or on none of that name.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise BurnishError(f"{folder} has no {FILE}: it was not trained on several data sets", "one that was")
    entries = read_object(path, Path(folder)).get("data_sets")
    entries = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    names = [str(one.get("root")) for one in entries]
    for one, name in zip(entries, names, strict=True):
        stats = one.get("stats")
        if root in (name, Path(name).name) and isinstance(stats, dict):
            return {key: {figure: np.asarray(value, np.float64) for figure, value in figures.items()}
                    for key, figures in stats.items() if isinstance(figures, dict) and figures}  # fmt: skip
    raise BurnishError(f"{path} knows no data set '{root}'", f"one of {', '.join(names)}")


def together(metas: Sequence[Dataset]) -> list[Problem]:
    """What stands between several data sets and a training on all of them."""
    problems = []
    for other in metas[1:]:
        root, fault = str(other.root), match(metas[0], other)
        if fault is not None:
            found, expected, fix = fault
            problems.append(Problem("error", root, f"{found}; expected {expected}", fix=fix))
        for camera in metas[0].camera_keys:
            if camera not in other.camera_keys:
                what = f"no camera '{camera}' (it has {', '.join(other.camera_keys) or 'none'})"
                fix = f"columns: {{{camera}: ...}} in its entry of data.mix, null where there is none"
                problems.append(Problem("error", root, what, fix=fix))
                continue
            (h, w, _), (height, width, _) = (meta.features[camera]["shape"] for meta in (other, metas[0]))
            if h * width != w * height:
                what = f"'{camera}' has {h}x{w} pixels: it is fitted into the form of {height}x{width} with black bars"
                problems.append(Problem("hint", root, what))
    return problems
