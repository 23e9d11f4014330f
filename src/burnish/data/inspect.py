"""What a practitioner must know about a data set before wasting a GPU day on it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from burnish.data.inspect_checks import STATE, Problem, check_columns, check_views, episode_starts
from burnish.data.inspect_files import DatasetFiles, open_dataset, read_columns
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
    """Result of `inspect_dataset`; shares are in [0, 1], lengths in frames."""

    root: Path
    version: str
    fps: int
    lengths: np.ndarray
    views: list[View]
    instructions: dict[str, int]
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


def inspect_dataset(root: Path | str, quick: bool = False) -> Inspection:
    """Read any LeRobotDataset (v3.0, and v2.x in place) and say what is in it and what is wrong with it.

    Args:
        quick: trust the frame counts in the video headers instead of reading every video to its end.

    Raises:
        BurnishError: the folder is no data set, or its metadata or data files are missing or malformed.
    """
    files = open_dataset(root)
    columns = read_columns(files)
    views, faults = look_at_views(files, quick)
    problems = [Problem("error", where, what) for where, what in faults]
    problems += check_columns(files, columns) + check_views(views)
    starts = episode_starts(columns)
    action, state = columns["action"], columns.get(STATE)
    names, control = files.names("action"), _control(action, state)
    gripper = find_gripper(names, action, files.names(STATE) if state is not None else [], state, starts)
    idle = _idle(action, starts, control, names, gripper)
    return Inspection(
        root=files.root,
        version=files.version,
        fps=files.fps,
        lengths=np.array([episode.length for episode in files.episodes]),
        views=views,
        instructions=_instructions(files, columns),
        actions=_dimensions(files, "action", action),
        states=_dimensions(files, STATE, state) if state is not None else [],
        control=control,
        gripper=gripper,
        idle_share=float(idle.mean()),
        idle_start=float(np.median([np.argmin(np.append(part, False)) for part in np.split(idle, starts[1:])])),
        repeated_share=float(_repeats(columns, starts).mean()),
        problems=sorted(problems, key=lambda problem: ("error", "warning", "hint").index(problem.kind)),
    )


def find_gripper(
    names: list[str], action: np.ndarray, state_names: list[str], state: np.ndarray | None, starts: np.ndarray
) -> Gripper | None:
    """The action dimension that is a gripper, by name or by taking two values only; None when there is none.

    Args:
        names, action: dimensions and values [N, A]; likewise `state_names` and `state` [N, S].
        starts: index of the first frame of each episode.
    """
    low, high = np.nanmin(action, 0), np.nanmax(action, 0)
    span = np.where(high > low, high - low, 1.0)
    place = (action - low) / span
    at_ends = (place < 0.05) | (place > 0.95)
    both = ((place < 0.05).mean(0) > 0.01) & ((place > 0.95).mean(0) > 0.01) & (high > low)
    named = [i for i, name in enumerate(names) if any(word in name.lower() for word in GRIPPER_WORDS)]
    binary = [i for i in range(len(names)) if both[i] and at_ends[:, i].mean() > 0.9]
    if not named and not binary:
        return None
    index = named[-1] if named else binary[-1]
    opens, evidence = _opens(action[:, index], state_names, state, starts)
    label = names[index] if names[index] != str(index) else f"dimension {index}"
    return Gripper(label, float(at_ends[:, index].mean()), opens, evidence)


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


def _dimensions(files: DatasetFiles, feature: str, values: np.ndarray) -> list[Dimension]:
    known = {key: array for key, array in files.stats.get(feature, {}).items() if array.size == values.shape[1]}
    result = []
    for i, name in enumerate(files.names(feature)):
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


def _repeats(columns: dict[str, np.ndarray], starts: np.ndarray) -> np.ndarray:
    """[N] True where state and action equal those of the frame before."""
    rows = np.concatenate([columns[name] for name in ("action", STATE) if name in columns], axis=1)
    same = np.concatenate([[False], (rows[1:] == rows[:-1]).all(1)])
    same[starts] = False
    return same


def _instructions(files: DatasetFiles, columns: dict[str, np.ndarray]) -> dict[str, int]:
    """Instruction to the number of episodes that carry it, most frequent first."""
    first = map(int, columns["task_index"][episode_starts(columns)].tolist())
    return dict(Counter(files.tasks.get(i, f"(task {i} without a text)") for i in first).most_common())
