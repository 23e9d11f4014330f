"""Checks that `burnish data inspect` makes beyond those that training needs: statistics, duplicates, files, views."""

import hashlib
from collections import defaultdict

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.reading import read_lines
from burnish.data.checks import find_problems
from burnish.data.dataset import QUANTILES, Dataset, Problem, quantile_name
from burnish.data.features import ACTION, STATE
from burnish.data.inspect_views import View


def check_dataset(dataset: Dataset) -> list[Problem]:
    """Everything that the tables and the folder show."""
    problems = dataset.problems + find_problems(dataset)
    if not len(dataset.rows):
        return problems
    for check in (_check_still, _check_statistics, _check_duplicates, _check_strays, _check_misses):
        problems += check(dataset)
    return problems


def _robot(dataset: Dataset) -> list[str]:
    return [name for name in (ACTION, STATE) if name in dataset.wanted]


def _check_still(dataset: Dataset) -> list[Problem]:
    problems = []
    for name in _robot(dataset):
        values = dataset.rows.values[name]
        values = values[np.isfinite(values).all(1)]
        still = np.flatnonzero(np.ptp(values, 0) == 0) if len(values) else []
        if len(still):
            what = ", ".join(dataset.features[name]["names"][i] for i in still)
            problems.append(Problem("warning", name, f"never changes: {what}"))
    return problems


def _check_statistics(dataset: Dataset) -> list[Problem]:
    """Stored statistics against the data itself; both would agree to rounding."""
    problems = []
    for name in _robot(dataset):
        have, values = dataset.figures.get(name, {}), dataset.rows.values[name].astype(np.float64)
        if have and any(quantile_name(q) not in have for q in QUANTILES):
            problems.append(Problem("hint", name, "no quantile statistics; training computes them from the rows"))
        if not np.isfinite(values).all():
            continue
        unit = np.maximum(values.std(0), 1e-6)
        for key, function in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
            found = function(values, 0)
            distance = np.abs(have.get(key, found) - found) / unit
            if distance.max() > 0.02:
                i = int(distance.argmax())
                what = f"stored {key} of dimension {i} is {have[key][i]:.4g}, the data say {found[i]:.4g}"
                problems.append(Problem("error", f"{name} statistics", what, stops=False))
    return problems


def _check_duplicates(dataset: Dataset) -> list[Problem]:
    rows, groups = dataset.rows, defaultdict(list)
    names = _robot(dataset)
    if not names:
        return []
    values = np.concatenate([rows.values[name] for name in names], axis=1)
    for episode, part in zip(rows.episodes.tolist(), np.split(values, rows.starts[1:]), strict=True):
        groups[hashlib.sha256(part.tobytes()).digest()].append(episode)
    return [
        Problem("warning", "episodes " + ", ".join(map(str, same[:6])), "identical states and actions: recorded twice?")
        for same in groups.values()
        if len(same) > 1
    ]


def _check_strays(dataset: Dataset) -> list[Problem]:
    """Files among the data and the videos that no episode names; nothing reads them."""
    named = {episode.data_file for episode in dataset.episodes.values()}
    named |= {clip.file for episode in dataset.episodes.values() for clip in episode.clips.values()}
    strays = [
        path.relative_to(dataset.root).as_posix()
        for folder, suffix in (("data", "parquet"), ("videos", "mp4"))
        for path in sorted((dataset.root / folder).rglob(f"*.{suffix}"))
    ]
    strays = [name for name in strays if name not in named and not any(p.startswith(".") for p in name.split("/"))]
    if not strays or not named:
        return []
    return [Problem("warning", strays[0], f"no episode names it ({len(strays)} such files); it is not read")]


def _check_misses(dataset: Dataset) -> list[Problem]:
    """Episodes that were recorded to fail (`burnish data demos --misses`)."""
    table = dataset.root / "ground_truth" / "episodes.jsonl"
    try:
        rows = [row for _, row in read_lines(table)] if table.is_file() else []
    except BurnishError as error:
        return [Problem("warning", "ground_truth/episodes.jsonl", str(error))]
    found = [str(row.get("episode_index"))[:8] for row in rows if row.get("misses") is True]
    what = f"{len(found)} of {len(rows)} demonstrations grasp beside their object, as --misses asked for"
    return [Problem("hint", f"episodes {', '.join(found[:6])} ...", what)] if found else []


def check_views(views: list[View]) -> list[Problem]:
    """What the pictures themselves show."""
    problems = []
    for view in views:
        if view.depth:
            problems.append(Problem("hint", view.name, "no colours: training leaves it out"))
            continue
        if view.size and not 8 < view.brightness < 247:
            problems.append(Problem("warning", view.name, f"mean brightness {view.brightness:.0f} of 255"))
        if view.frozen_share is not None and view.frozen_share > 0.5:
            what = f"{100 * view.frozen_share:.0f} % of neighbouring frames do not differ"
            problems.append(Problem("warning", view.name, what))
        if "upside down" in view.orientation:
            problems.append(Problem("hint", view.name, view.orientation))
    return problems
