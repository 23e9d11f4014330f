"""The checks behind `burnish data inspect`: each looks for one kind of fault and returns what it found."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from burnish.data.inspect_files import INDEX_COLUMNS, DatasetFiles
from burnish.data.inspect_views import View

STATE = "observation.state"
TIMESTAMP_TOLERANCE = 1e-4  # seconds; LeRobot refuses frames that are further off


@dataclass(frozen=True)
class Problem:
    """`kind` is "error" (training will fail or be wrong), "warning" (look at it) or "hint"."""

    kind: str
    where: str
    what: str


def check_columns(files: DatasetFiles, columns: dict[str, np.ndarray]) -> list[Problem]:
    """Everything that the numbers and the metadata show; `columns` as `read_columns` returns them."""
    checks = (_check_lengths, _check_timestamps, _check_numbers, _check_stats, _check_instructions, _check_duplicates)
    return [problem for check in checks for problem in check(files, columns)]


def episode_starts(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Index of the first frame of every episode."""
    episode = columns["episode_index"]
    return np.flatnonzero(np.concatenate([[True], episode[1:] != episode[:-1]]))


def _check_lengths(files: DatasetFiles, columns: dict[str, np.ndarray]) -> list[Problem]:
    counts = Counter(columns["episode_index"].astype(int).tolist())
    problems = []
    for episode in files.episodes:
        found = counts.pop(episode.index, 0)
        if found != episode.length:
            what = f"{found} frames in the data, {episode.length} in the metadata"
            problems.append(Problem("error", f"episode {episode.index}", what))
    problems += [Problem("error", f"episode {index}", "in the data, not in the metadata") for index in sorted(counts)]
    for key, found in (("total_episodes", len(files.episodes)), ("total_frames", len(columns["index"]))):
        said = files.info.get(key)
        if said is not None and said != found:
            problems.append(Problem("error", "meta/info.json", f"{key} is {said}, found {found}"))
    return problems


def _check_timestamps(files: DatasetFiles, columns: dict[str, np.ndarray]) -> list[Problem]:
    off = np.abs(columns["timestamp"] - columns["frame_index"] / files.fps)
    wrong = off > TIMESTAMP_TOLERANCE
    problems = []
    if wrong.any():
        episodes = np.unique(columns["episode_index"][wrong])
        count, farthest = int(wrong.sum()), off.max()
        what = f"{count} frames in {len(episodes)} episodes are not at frame / fps (up to {farthest:.3g} s off)"
        problems.append(Problem("error", f"timestamps, first in episode {int(episodes[0])}", what))
    starts = episode_starts(columns)
    expected = np.arange(len(off)) - np.repeat(starts, np.diff(np.append(starts, len(off))))
    broken = np.unique(columns["episode_index"][columns["frame_index"] != expected])
    if len(broken):
        problems.append(Problem("error", f"episode {int(broken[0])}", f"frame_index skips ({len(broken)} episodes)"))
    return problems


def _check_numbers(files: DatasetFiles, columns: dict[str, np.ndarray]) -> list[Problem]:
    problems = []
    for name in files.numeric:
        if name in INDEX_COLUMNS:
            continue
        bad = ~np.isfinite(columns[name])
        if bad.any():
            index, dim = np.argwhere(bad)[0]
            episode, frame = columns["episode_index"][index], columns["frame_index"][index]
            first = f"{files.names(name)[dim]} of episode {episode} frame {frame}"
            problems.append(Problem("error", name, f"{int(bad.sum())} NaN or infinite, first in {first}"))
        elif name in ("action", STATE):
            still = [files.names(name)[i] for i in np.flatnonzero(np.ptp(columns[name], 0) == 0)]
            if still:
                problems.append(Problem("warning", name, f"never changes: {', '.join(still)}"))
    return problems


def _check_stats(files: DatasetFiles, columns: dict[str, np.ndarray]) -> list[Problem]:
    if not files.stats:
        where = "meta/episodes_stats.jsonl" if files.version == "v2.1" else "meta/stats.json"
        return [Problem("error", where, "missing: nothing to normalise with")]
    problems = []
    for name in ("action", STATE):
        if name not in columns:
            continue
        stats, values = files.stats.get(name, {}), columns[name]
        missing = [key for key in ("mean", "std", "min", "max") if key not in stats]
        if missing:
            problems.append(Problem("error", name, f"statistics lack {', '.join(missing)}"))
            continue
        if "q01" not in stats or "q99" not in stats:
            problems.append(Problem("hint", name, "no quantile statistics (q01, q99); pi05 normalises with them"))
        problems += _compare_stats(name, stats, values)
    return problems


def _compare_stats(name: str, stats: dict[str, np.ndarray], values: np.ndarray) -> list[Problem]:
    """Stored statistics against the data itself; both would agree to rounding."""
    sizes = {key: stats[key].size for key in ("mean", "std", "min", "max")}
    wrong = [f"{key} has {size}" for key, size in sizes.items() if size != values.shape[1]]
    if wrong:
        return [Problem("error", name, f"statistics do not fit {values.shape[1]} dimensions: {', '.join(wrong)}")]
    if not np.isfinite(values).all():
        return []
    unit = np.maximum(values.std(0), 1e-6)
    problems = []
    for key, function in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
        found = function(values, 0)
        distance = np.abs(stats[key] - found) / unit
        if distance.max() > 0.02:
            i = int(distance.argmax())
            what = f"stored {key} of dimension {i} is {stats[key][i]:.4g}, the data say {found[i]:.4g}"
            problems.append(Problem("error", f"{name} statistics", what))
    return problems


def _check_instructions(files: DatasetFiles, columns: dict[str, np.ndarray]) -> list[Problem]:
    problems = []
    used = {int(index) for index in np.unique(columns["task_index"])}
    lost = sorted(used - files.tasks.keys())
    if lost:
        problems.append(Problem("error", "task_index", f"no instruction for {', '.join(map(str, lost))}"))
    texts = [str(files.tasks[index]) for index in used & files.tasks.keys()]
    if any(not text.strip() for text in texts):
        problems.append(Problem("warning", "instructions", "an instruction is empty"))
    alike = defaultdict(set)
    for text in texts:
        alike[" ".join(text.lower().split()).rstrip(".!")].add(text)
    for same in alike.values():
        if len(same) > 1:
            shown = ", ".join(f"'{text}'" for text in sorted(same))
            problems.append(Problem("warning", "instructions", f"differ in case, spaces or full stop only: {shown}"))
    return problems


def _check_duplicates(files: DatasetFiles, columns: dict[str, np.ndarray]) -> list[Problem]:
    starts = episode_starts(columns)
    rows = np.concatenate([columns[name] for name in ("action", STATE) if name in columns], axis=1)
    groups = defaultdict(list)
    for part, start in zip(np.split(rows, starts[1:]), starts, strict=True):
        groups[hashlib.sha256(part.tobytes()).digest()].append(int(columns["episode_index"][start]))
    return [
        Problem("warning", "episodes " + ", ".join(map(str, same[:6])), "identical states and actions: recorded twice?")
        for same in groups.values()
        if len(same) > 1
    ]


def check_views(views: list[View]) -> list[Problem]:
    problems = []
    for view in views:
        if view.size and not 8 < view.brightness < 247:
            problems.append(Problem("warning", view.name, f"mean brightness {view.brightness:.0f} of 255"))
        if view.frozen_share is not None and view.frozen_share > 0.5:
            what = f"{100 * view.frozen_share:.0f} % of neighbouring frames do not differ"
            problems.append(Problem("warning", view.name, what))
        if "upside down" in view.orientation:
            problems.append(Problem("hint", view.name, view.orientation))
    return problems
