"""Preference labels on recorded episodes: of a file, of a column of outcomes, or of a human who took over.

Nothing is written before everything has been checked, and of the pictures only those are decoded that a pair starts
from.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.files import alone
from burnish.core.options import number
from burnish.core.progress import progress_bar
from burnish.data.dataset import open_dataset
from burnish.data.features import is_numeric
from burnish.data.loader import RobotData
from burnish.data.pairs import Outcome, Pair, check_pairs, read_labels, require_no_pairs, write_index
from burnish.data.rows import read_rows
from burnish.data.streamed import Shape, StreamedFrames

STEPS = 100
"""Steps within which the two sides of a pair must differ, and that a takeover keeps of a proposal."""


def import_pairs(
    root: Path | str, labels: Path | str | None = None, *, success: str = "", takeover: str = "", proposal: str = "",
    state_tolerance: float | Sequence[float] = 0.0, image_tolerance: float = 2.0, columns: dict[str, Any] | None = None,
    progress: bool = True,
) -> tuple[int, int]:  # fmt: skip
    """Make the LeRobot data set `root` a pair folder; returns how many pairs and how many outcomes it has.

    Args:
        root: the data set that the labels are about.
        labels: JSON lines, see `burnish.data.pairs.read_labels`.
        success: column that is true where an episode has succeeded (LeRobot's own is next.success).
        takeover: column that is true while a human acts in place of the policy (LeRobot's own is intervention).
        proposal: column of the actions that the policy proposed, [A], or whole chunks [T, A]; with `takeover`. Where a
            human takes over, the proposal is rejected and what the human did is chosen.
        state_tolerance: how far the states at the start of two chunks may differ, one number or one a dimension.
        image_tolerance: how far their pictures may: mean absolute difference of a view, of 255.
        columns: features under other names than LeRobot's, see `burnish.data.features.join_columns`.
        progress: show a bar on stderr.

    Raises:
        BurnishError: unreadable labels, no such column, a pair of unequal starts or tasks; `root` is left as it was.
    """
    root = Path(root)
    tolerances = list(state_tolerance) if isinstance(state_tolerance, Sequence) else [state_tolerance]
    if not tolerances or not all(number(one) and one >= 0 for one in (*tolerances, image_tolerance)):
        raise BurnishError(f"tolerances {tolerances} and {image_tolerance}", "numbers of at least 0")
    if bool(takeover) != bool(proposal):
        raise BurnishError("a takeover without the column of proposals, or the other way round",
                           "both: what was proposed is rejected, what the human did is chosen")  # fmt: skip
    if not labels and not success and not takeover:
        raise BurnishError("nothing to import", "--labels, --success or --takeover with --proposal")
    found = read_labels(Path(labels)) if labels else []
    require_no_pairs(root)
    data = RobotData(root, (), STEPS, 1, 0, augmented=False, progress=progress, pictures=False,
                     meta=open_dataset(root, columns))  # fmt: skip
    pairs = [label for label in found if isinstance(label, Pair)]
    outcomes = _outcomes(data, [label for label in found if isinstance(label, Outcome)], success)
    if takeover:
        pairs += takeovers(data, takeover, proposal)
    where = str(labels or root)
    tolerance = tolerances if len(tolerances) > 1 else tolerances[0]
    frames = check_pairs(data, pairs, tolerance, where)
    recorded = [i for i, pair in enumerate(pairs) if not pair.proposal]
    _check_pictures(data, frames[recorded], recorded, image_tolerance, where, progress)
    given = {"labels": labels, "success": success, "takeover": takeover}
    source = "+".join(name for name, value in given.items() if value)
    facts = {"source": source, "image_tolerance": image_tolerance, "outcomes": outcomes}
    facts |= {"columns": columns} if columns else {}
    with alone(root):
        require_no_pairs(root)  # another process may have written some meanwhile
        write_index(root, pairs, facts, tolerance)
    return len(pairs), sum(outcome is not None for outcome in outcomes)


def _outcomes(data: Any, labels: Sequence[Outcome], column: str) -> list[bool | None]:
    """For each episode whether it succeeded, None where nobody says."""
    total = data.meta.total_episodes
    outcomes: list[bool | None] = [None] * total
    if column:
        values = read_column(data, column).reshape(len(data.episode_index), -1)
        if values.shape[1] != 1 or not np.isin(values, (0, 1)).all():
            raise BurnishError(f"column '{column}' of {data.root} holds other values than true and false",
                               "true in a frame of every episode that succeeded")  # fmt: skip
        outcomes = [bool(values[data.episode_index == episode].any()) for episode in range(total)]
    said: dict[int, bool] = {}
    for label in labels:
        if not 0 <= label.episode < total:
            raise BurnishError(f"a label names episode {label.episode}", f"0 to {total - 1}")
        if said.setdefault(label.episode, label.success) != label.success:
            raise BurnishError(f"episode {label.episode} is labelled as a success and as a failure", "one of them")
        outcomes[label.episode] = label.success
    return outcomes


def takeovers(data: Any, takeover: str, proposal: str) -> list[Pair]:
    """A pair for each moment in which a human takes over and does something else than the policy proposed."""
    human = read_column(data, takeover).reshape(len(data.episode_index), -1)
    proposed = read_column(data, proposal).reshape(len(data.episode_index), -1)
    wide = data.actions.shape[1]
    if human.shape[1] != 1 or not np.isin(human, (0, 1)).all():
        raise BurnishError(f"column '{takeover}' of {data.root} holds other values than true and false",
                           "true while a human acts")  # fmt: skip
    if proposed.shape[1] % wide:
        raise BurnishError(f"column '{proposal}' of {data.root} has {proposed.shape[1]} numbers a frame",
                           f"{wide}, as an action, or whole chunks of them")  # fmt: skip
    human, pairs = human[:, 0].astype(bool), []
    for i in np.flatnonzero(human):
        episode = data.episode_index[i]
        if i and human[i - 1] and data.episode_index[i - 1] == episode:
            continue  # it has gone on for a while
        if proposed.shape[1] > wide:
            steps = proposed[i].reshape(-1, wide)[:STEPS]
        else:
            window = slice(i, i + STEPS)
            going_on = np.logical_and.accumulate(human[window] & (data.episode_index[window] == episode))
            steps = proposed[window][going_on]
        if not np.isfinite(steps).all():
            raise BurnishError(f"column '{proposal}' of {data.root} is not finite at frame {i}",
                               "a proposal wherever a human takes over")  # fmt: skip
        done = data.actions[i : min(i + len(steps), data.meta.rows.span(episode)[1])]
        if not (steps[: len(done)] == done).all():
            place = int(episode), int(i - np.searchsorted(data.episode_index, episode))
            pairs.append(Pair(place, place, tuple(tuple(map(float, step)) for step in steps)))
    if not pairs:
        raise BurnishError(f"{data.root} has no moment in which '{takeover}' becomes true and the action differs "
                           f"from '{proposal}'", "takeovers of a human")  # fmt: skip
    return pairs


def read_column(data: Any, name: str) -> np.ndarray:
    """float64 [N, ...]: a column of the data set's tables, in the order of `Rows`."""
    others = [key for key, feature in data.meta.features.items() if is_numeric(feature)]
    if name not in others:
        raise BurnishError(f"{data.root} has no column '{name}' of numbers", f"one of {', '.join(others)}")
    rows = read_rows(data.root, data.meta.rows.names, data.meta.features, (name,))
    if rows.wrong[name]:
        row, count = rows.wrong[name][0]
        raise BurnishError(f"column '{name}' of {data.root} cannot be read as numbers (row {row} has "
                           f"{'none' if count < 0 else count})", "as many in every row")  # fmt: skip
    return rows.values[name].astype(np.float64)


def _check_pictures(
    data: Any, frames: np.ndarray, numbers: Sequence[int], tolerance: float, where: str, progress: bool
) -> None:
    """Both chunks of a pair must start from nearly the same picture of every camera."""
    if not len(frames):
        return
    for camera in progress_bar(data.cameras, desc="pictures of the starts", unit="camera", shown=progress):
        episodes = np.unique(data.episode_index[frames]).tolist()
        pictures = StreamedFrames.open(data.meta, camera, Shape.of(data.meta, camera, 0, 0), episodes)
        for i, (one, two) in zip(numbers, frames.tolist(), strict=True):
            apart = float(np.abs(pictures[one].astype(np.float32) - pictures[two]).mean())
            if not apart <= tolerance:
                raise BurnishError(f"pair {i} of {where} starts from pictures of '{camera}' that differ by {apart:.1f} "
                                   "of 255 on average", f"the same start (at most {tolerance:g})",
                                   "pair rollouts of the same start, or import with --image-tolerance")  # fmt: skip
