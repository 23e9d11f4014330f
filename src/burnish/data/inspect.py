"""What a practitioner must know about a data set before wasting a GPU day on it."""

import hashlib
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.reading import read_lines
from burnish.data.checks import find_problems
from burnish.data.dataset import QUANTILES, Dataset, Problem, open_dataset, quantile_name
from burnish.data.features import ACTION, STATE
from burnish.data.inspect_views import View, look_at_views

GRIPPER_WORDS = ("gripper", "finger", "claw", "jaw")


@dataclass(frozen=True)
class Dimension:
    """One dimension of actions or states, in the data set's units.

    Args:
        outside: share of values that a normalisation maps outside its range, by its name: "min_max" (beyond
            the stored minimum and maximum), "quantiles" (beyond the stored 1 % and 99 %), "mean_std" (beyond
            three standard deviations). A policy that clips, or cuts values into bins, loses these.
    """

    name: str
    low: float
    high: float
    mean: float
    std: float
    outside: dict[str, float]


@dataclass(frozen=True)
class Gripper:
    """The dimension that looks like a gripper command.

    Args:
        binary_share: share of values within 5 % of one of the two ends.
        opens: "+" when large values seem to open it, "-" when small ones do, "" when nothing tells.
        evidence: where `opens` comes from.
    """

    name: str
    binary_share: float
    opens: str
    evidence: str


@dataclass
class Inspection:
    """Result of `inspect_dataset`; shares are in [0, 1], lengths in frames.

    `instructions` maps each one that a frame carries to the number of episodes that do, `frame_shares` to the share of
    frames. Without actions, control is unknown and the shares about them are 0.
    """

    root: Path
    version: str
    fps: float
    lengths: np.ndarray
    views: list[View]
    instructions: dict[str, int]
    frame_shares: dict[str, float]
    actions: list[Dimension]
    states: list[Dimension]
    control: str
    gripper: Gripper | None
    idle_share: float
    idle_start: float
    repeated_share: float
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No error was found."""
        return all(problem.kind != "error" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """All but the thumbnails as values of JSON; numbers that are not finite are None."""
        content = asdict(self) | {"ok": self.ok}
        for view in content["views"]:
            del view["thumbnails"]
        return _plain(content)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    value = value.item() if isinstance(value, np.generic) else str(value) if isinstance(value, Path) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def inspect_dataset(root: Path | str, quick: bool = False) -> Inspection:
    """Read any LeRobotDataset (v3.0, and v2.x in place) and say what is in it and what is wrong with it.

    Args:
        root: folder of the data set.
        quick: do not decode every video and open every picture, only those of one episode.

    Raises:
        BurnishError: the folder is no data set, or its metadata or data files are missing or malformed.
    """
    dataset = open_dataset(root, everything=True)
    for episode in dataset.episodes.values():
        start, stop = dataset.rows.span(episode.index)
        if start == stop and episode.data_file in dataset.rows.lost:
            raise dataset.rows.lost[episode.data_file]
    views, faults = look_at_views(dataset, quick)
    problems = check_dataset(dataset) + faults + check_views(views)
    rows, starts = dataset.rows, dataset.rows.starts
    action, state = (rows.values[name].astype(np.float64) if name in rows.values else None for name in (ACTION, STATE))
    carried = _instructions(dataset)
    found = Inspection(
        root=dataset.root, version=dataset.version, fps=dataset.fps,
        lengths=np.array([episode.length for episode in dataset.episodes.values()]), views=views,
        instructions={text: episodes for text, (episodes, _) in carried.items()},
        frame_shares={text: frames / len(rows) for text, (_, frames) in carried.items()},
        actions=_dimensions(dataset, ACTION, action),
        states=_dimensions(dataset, STATE, state), control="", gripper=None, idle_share=0.0, idle_start=0.0,
        repeated_share=0.0,
        problems=sorted(problems, key=lambda problem: ("error", "warning", "hint").index(problem.kind)),
    )  # fmt: skip
    if action is not None and len(action):
        _describe_motion(found, dataset, action, state, starts)
    return found


def _describe_motion(
    found: Inspection, dataset: Dataset, action: np.ndarray, state: np.ndarray | None, starts: np.ndarray
) -> None:
    """Fill in what actions [N, A] and states [N, S] tell of the control, the gripper and idle frames."""
    action = np.where(np.isfinite(action), action, 0.0)
    state = None if state is None else np.where(np.isfinite(state), state, 0.0)
    names = dataset.features[ACTION]["names"]
    found.control = _control(action, state)
    state_names = dataset.features[STATE]["names"] if state is not None else []
    found.gripper = find_gripper(names, action, state_names, state, starts)
    idle = _idle(action, starts, found.control, names, found.gripper)
    found.idle_share = float(idle.mean())
    found.idle_start = float(np.median([np.argmin(np.append(part, False)) for part in np.split(idle, starts[1:])]))
    found.repeated_share = float(_repeats([one for one in (action, state) if one is not None], starts).mean())


def find_gripper(
    names: list[str], action: np.ndarray, state_names: list[str], state: np.ndarray | None, starts: np.ndarray
) -> Gripper | None:
    """The action dimension that is a gripper, by name or by taking two values only; None when there is none.

    Args:
        names, action: dimensions and values [N, A]; likewise `state_names` and `state` [N, S].
        starts: index of the first frame of each episode.
    """
    found, at_ends = gripper_dimensions(names, action), _ends(action).any(0)
    if not found:
        return None
    index = found[-1]
    opens, evidence = _opens(action[:, index], state_names, state, starts)
    label = names[index] if names[index] != str(index) else f"dimension {index}"
    return Gripper(label, float(at_ends[:, index].mean()), opens, evidence)


def gripper_dimensions(names: list[str], action: np.ndarray) -> list[int]:
    """Dimensions of actions [N, A] that are grippers: by name, else those that take two values only."""
    named = [i for i, name in enumerate(names) if any(word in name.lower() for word in GRIPPER_WORDS)]
    low, high = ends = _ends(action)
    moves = np.nanmax(action, 0) > np.nanmin(action, 0)
    both = (ends.mean(1) > 0.01).all(0) & ((low | high).mean(0) > 0.9) & moves
    return named or np.flatnonzero(both).tolist()


def _ends(action: np.ndarray) -> np.ndarray:
    """bool [2, N, A]: values within 5 % of the low, and of the high end of their dimension's range."""
    low, high = np.nanmin(action, 0), np.nanmax(action, 0)
    place = (action - low) / np.where(high > low, high - low, 1.0)
    return np.stack([place < 0.05, place > 0.95])


def _opens(
    command: np.ndarray, state_names: list[str], state: np.ndarray | None, starts: np.ndarray
) -> tuple[str, str]:
    """Which sign opens: from the width of the gripper in the state, else from how episodes start."""
    fingers = [i for i, name in enumerate(state_names) if any(word in name.lower() for word in GRIPPER_WORDS)]
    if state is not None and fingers and np.ptp(command) > 0:
        # The fingers move a few frames after the command, so compare with their width five frames on.
        width, delay = np.abs(state[:, fingers]).sum(1), 5
        inside = np.ones(len(command), bool)
        for start in starts:
            inside[max(0, start - delay) : start] = False
        inside[-delay:] = False
        before, after = command[inside], np.roll(width, -delay)[inside]
        if len(before) > 2 and np.ptp(before) > 0 and np.ptp(after) > 0:
            r = np.corrcoef(before, after)[0, 1]
            if abs(r) > 0.3:
                return ("+" if r > 0 else "-"), f"correlation {r:.2f} with the finger width in the state"
    middle = (np.nanmin(command) + np.nanmax(command)) / 2
    high = float((command[starts] > middle).mean())
    if abs(high - 0.5) > 0.3 and np.ptp(command) > 0:
        return ("+" if high > 0.5 else "-"), "a guess: most episodes start so, and most start with an open gripper"
    return "", "nothing tells"


def _dimensions(dataset: Dataset, feature: str, values: np.ndarray | None) -> list[Dimension]:
    if values is None:
        return []
    known, result = dataset.figures.get(feature, {}), []
    for i, name in enumerate(dataset.features[feature]["names"]):
        one = values[:, i][np.isfinite(values[:, i])]
        if not one.size:
            one = np.zeros(1)
        slack = 1e-5 * (np.ptp(one) or 1.0)  # float32 statistics against float64 values
        outside = {}
        for scheme, keys in (("min_max", ("min", "max")), ("quantiles", ("q01", "q99"))):
            if keys[0] in known and keys[1] in known:
                low, high = known[keys[0]][i] - slack, known[keys[1]][i] + slack
                outside[scheme] = float(((one < low) | (one > high)).mean())
        if "mean" in known and "std" in known:
            outside["mean_std"] = float((np.abs(one - known["mean"][i]) > 3 * known["std"][i] + slack).mean())
        result.append(Dimension(name, float(one.min()), float(one.max()), float(one.mean()), float(one.std()), outside))
    return result


def _control(action: np.ndarray, state: np.ndarray | None) -> str:
    """ "absolute" when actions follow the state dimension by dimension, "relative" otherwise, "" when unknown."""
    if state is None or len(action) < 10:
        return ""
    shared = min(action.shape[1], state.shape[1])
    moving = [i for i in range(shared) if np.ptp(action[:, i]) > 0 and np.ptp(state[:, i]) > 0]
    follows = [np.corrcoef(action[:, i], state[:, i])[0, 1] > 0.9 for i in moving]
    return "absolute" if follows and np.mean(follows) > 0.6 else "relative"


def _idle(
    action: np.ndarray, starts: np.ndarray, control: str, names: list[str], gripper: Gripper | None
) -> np.ndarray:
    """[N] True where the arm is to stay: near-zero relative actions, or unchanged absolute ones."""
    labels = [name if name != str(i) else f"dimension {i}" for i, name in enumerate(names)]
    arm = [i for i, label in enumerate(labels) if gripper is None or label != gripper.name]
    moves = action[:, arm]
    scale = np.maximum(np.nanmax(np.abs(moves), 0, initial=0.0), 1e-9)
    if control == "absolute":
        scale = np.maximum(np.ptp(moves, 0), 1e-9)
        moves = np.diff(moves, axis=0, prepend=moves[:1])
        moves[starts] = np.inf
        return (np.abs(moves) < 1e-3 * scale).all(1)
    return (np.abs(moves) < 0.02 * scale).all(1)


def _repeats(parts: list[np.ndarray], starts: np.ndarray) -> np.ndarray:
    """[N] True where state and action equal those of the frame before."""
    rows = np.concatenate(parts, axis=1)
    same = np.concatenate([[False], (rows[1:] == rows[:-1]).all(1)])
    same[starts] = False
    return same


def _instructions(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """Each instruction that a frame carries, with its episodes and frames; most frequent first."""
    keys, found = dataset.rows.keys, {}
    for index, count in zip(*np.unique(keys["task_index"], return_counts=True), strict=True):
        episodes = len(np.unique(keys["episode_index"][keys["task_index"] == index]))
        text = dataset.tasks.get(int(index), f"(task {index} without a text)")
        before = found.get(str(text), (0, 0))
        found[str(text)] = (before[0] + episodes, before[1] + int(count))
    return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))


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
        outside = [one.outside.get("quantiles", 0.0) for one in _dimensions(dataset, name, values)]
        if (out := float(np.mean(outside))) > 0.1:
            what = f"{out:.0%} of the values lie outside the stored q01 and q99 (LeRobot averages those of episodes); "
            problems.append(Problem("warning", name, f"{what}training here takes those of the rows"))
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
