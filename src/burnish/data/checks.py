"""What is wrong with a data set, by its tables alone: each check looks for one kind of fault.

Inspection shows everything that `find_problems` returns; training calls `require`, which refuses the first fault of its
episodes and cameras that would make it fail or learn something wrong.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from burnish.core.errors import BurnishError
from burnish.data.dataset import Dataset, Problem, look
from burnish.data.features import ACTION, STATE
from burnish.data.rows import Rows
from burnish.data.tables import Clip

TIMESTAMP_TOLERANCE = 1e-4
"""Seconds; LeRobot refuses frames that are further off. The step of float32 at that time comes on top."""
_SHOWN = 5
log = logging.getLogger("burnish")


def require(dataset: Dataset, episodes: Sequence[int] = (), cameras: Sequence[str] = (), named: str = "") -> list[int]:
    """Refuse what training on these episodes and cameras would fail at or misread.

    Args:
        episodes: numbers; none means all.
        cameras: full keys.
        named: as the data set's, where another field chooses these.

    Returns:
        The episodes, ascending.
    """
    chosen, root = sorted(set(episodes)) or list(dataset.episodes), dataset.root
    unknown = [episode for episode in chosen if episode not in dataset.episodes]
    if unknown:
        there = f"one of the {len(dataset.episodes)} in {root} ({min(dataset.episodes)} to {max(dataset.episodes)})"
        raise BurnishError(f"{named or dataset.named or 'a list'} names episode {unknown[0]}", there)
    request = (tuple(chosen), tuple(cameras))
    if request in dataset.told:
        return chosen
    found = [one for one in dataset.problems if one.kind == "error"] + find_problems(dataset, chosen)
    wanted = set(chosen)
    stopping = [
        one for one in found
        if one.kind == "error" and one.stops and (not one.camera or one.camera in cameras)
        and (not one.episodes or wanted.intersection(one.episodes))
    ]  # fmt: skip
    if stopping:
        first = min(stopping, key=lambda one: bool(one.episodes))  # what no choice of episodes helps against first
        without = wanted.difference(*(one.episodes for one in stopping))
        fix = first.fix or leaving(dataset, without if first.episodes else ())
        raise BurnishError(f"{first.where}: {first.what} ({root})", fix=fix)
    dataset.told.add(request)
    return chosen


def tell(dataset: Dataset, episodes: list[int]) -> None:
    """Log once what does not stop training on these episodes: an earlier version, odd instructions."""
    odd = _check_instructions(dataset, dataset.rows.of(episodes), episodes)
    said = [(logging.INFO, f"of version {dataset.version}, and read as it is")] * (dataset.version != "v3.0")
    for level, what in said + [(logging.WARNING, one.what) for one in odd if one.kind == "warning"]:
        if what not in dataset.told:
            dataset.told.add(what)
            log.log(level, "%s: %s", dataset.root, what)


def leaving(dataset: Dataset, episodes: Iterable[int]) -> str:
    """What to try: these episodes alone, where a recipe chooses them and they are few, or a look at the data set."""
    chosen = f"--data.episodes={sorted(episodes)}".replace(" ", "")
    option = chosen if episodes and dataset.named == "data.episodes" else ""
    return option if 0 < len(option) < 300 else look(dataset.root)


def colour_cameras(dataset: Dataset) -> list[str]:
    """Full keys of all cameras that can be trained on; what is left out is told, once."""
    dark = [name for name in dataset.views if name not in dataset.camera_keys]
    if dark and "dark" not in dataset.told:
        dataset.told.add("dark")
        named = [name for name in dark if name.startswith("observation.")]
        other = [name for name in dark if name not in named]
        for names, why in ((named, "they show no colours"), (other, "their names do not start with 'observation.'")):
            if names:
                log.warning("%s: left out, as %s: %s", dataset.root, why, ", ".join(names))
    return dataset.camera_keys


def find_problems(dataset: Dataset, episodes: Sequence[int] = ()) -> list[Problem]:
    """Everything that the tables show, of all episodes or of those named; without what opening has found."""
    rows = dataset.rows.of(episodes) if episodes else dataset.rows
    checks = (_check_lengths, _check_frames, _check_index, _check_timestamps, _check_numbers, _check_statistics,
              _check_instructions)  # fmt: skip
    chosen = list(episodes or dataset.episodes)
    problems = [problem for check in checks for problem in check(dataset, rows, chosen)]
    return problems + [problem for camera in dataset.camera_keys for problem in check_clips(dataset, camera)]


def each(found: Iterable[tuple[int, str]], **more: object) -> list[Problem]:
    """A problem for each of (episode, what is wrong); of many only the first, and how many more there are."""
    found = list(found)
    shown = [Problem("error", f"episode {episode}", what, (episode,), **more) for episode, what in found[:_SHOWN]]
    if len(found) > _SHOWN:
        rest = tuple(episode for episode, _ in found[_SHOWN:])
        what = f"{len(rest)} more, as episode {rest[0]}: {found[_SHOWN][1]}"
        shown.append(Problem("error", "episodes", what, rest, **more))
    return shown


def _check_lengths(dataset: Dataset, rows: Rows, chosen: list[int]) -> list[Problem]:
    found = dict(zip(rows.episodes.tolist(), rows.counts.tolist(), strict=True))
    lost, wrong, elsewhere = [], [], []
    for episode in map(dataset.episodes.__getitem__, chosen):
        count = found.pop(episode.index, 0)
        if count == 0 and episode.data_file in rows.lost:
            lost.append((episode.index, str(rows.lost[episode.data_file])))
        elif count != episode.length:
            wrong.append((episode.index, f"{count} frames in the data, {episode.length} in the metadata"))
        elif count == 0:
            wrong.append((episode.index, "no frames"))
    files = rows.files[rows.starts]
    for episode, file in zip(rows.episodes.tolist(), files.tolist(), strict=True):
        if episode in dataset.episodes and rows.names[file] != dataset.episodes[episode].data_file:
            named = dataset.episodes[episode].data_file
            elsewhere.append((episode, f"its rows are in {rows.names[file]}, the metadata name {named}"))
    problems = each(lost) + each(wrong) + each(elsewhere, stops=False)
    gaps = np.setdiff1d(np.arange(max(chosen)), chosen) if len(chosen) == len(dataset.episodes) else []
    if len(gaps):
        what = f"{len(gaps)} numbers are missing, first {gaps[0]}; burnish looks episodes up, LeRobot counts places"
        problems.append(Problem("hint", "episodes", what))
    strays = [(episode, "in the data, not in the metadata") for episode in sorted(found)]
    for key, count in (("total_episodes", len(dataset.episodes)), ("total_frames", len(rows))):
        said = dataset.info.get(key)
        if len(chosen) == len(dataset.episodes) and said is not None and said != count and not rows.lost:
            problems.append(Problem("error", "meta/info.json", f"{key} is {said}, found {count}", stops=False))
    return problems + each(strays, stops=False)


def _check_frames(dataset: Dataset, rows: Rows, chosen: list[int]) -> list[Problem]:
    frame, expected = rows.keys["frame_index"], np.arange(len(rows)) - np.repeat(rows.starts, rows.counts)
    faults = {}
    for row in np.flatnonzero(frame != expected):
        episode = int(rows.keys["episode_index"][row])
        if episode not in faults:
            twice = expected[row] > 0 and frame[row] == frame[row - 1]
            what = f"frame {frame[row]} stands twice" if twice else f"frame_index skips to {frame[row]}"
            faults[episode] = f"{what} where {expected[row]} is due"
    return each(faults.items())


def _check_index(dataset: Dataset, rows: Rows, chosen: list[int]) -> list[Problem]:
    index, first = rows.keys["index"], rows.keys["index"][rows.starts]
    expected = np.repeat(first, rows.counts) + np.arange(len(rows)) - np.repeat(rows.starts, rows.counts)
    off = np.flatnonzero(index != expected)
    episodes, place = np.unique(rows.keys["episode_index"][off], return_index=True)
    broken = [
        (int(e), f"index {index[row]} at frame {rows.keys['frame_index'][row]} where {expected[row]} is due: the rows "
                 "may stand beside other moments")
        for e, row in zip(episodes, off[place], strict=True)
    ]  # fmt: skip
    order = np.argsort(first, kind="stable")
    shared = np.flatnonzero(first[order][1:] < (first + rows.counts)[order][:-1]) + 1
    repeats = [(int(rows.episodes[order[i]]), f"index {first[order[i]]} is also in another episode") for i in shared]
    spans = []
    for episode, start, count in zip(rows.episodes.tolist(), first.tolist(), rows.counts.tolist(), strict=True):
        span = dataset.episodes[episode].span if episode in dataset.episodes else None
        if span is not None and span != (start, start + count):
            what = f"dataset_from_index and dataset_to_index are {span[0]} and {span[1]}, its rows {start} to "
            spans.append((episode, f"{what}{start + count} (burnish goes by the rows; LeRobot would mix episodes)"))
    return each(broken) + each(repeats, stops=False) + each(spans, stops=False)


def _check_timestamps(dataset: Dataset, rows: Rows, chosen: list[int]) -> list[Problem]:
    expected = rows.keys["frame_index"] / dataset.fps
    off = np.abs(rows.keys["timestamp"] - expected)
    wrong = off > TIMESTAMP_TOLERANCE + np.spacing(expected.astype(np.float32))
    if not wrong.any():
        return []
    episodes = np.unique(rows.keys["episode_index"][wrong])
    what = f"{int(wrong.sum())} frames in {len(episodes)} episodes are not at frame / fps (up to {off.max():.3g} s off)"
    return [Problem("error", f"timestamps, first in episode {int(episodes[0])}", what, tuple(episodes.tolist()),
                    stops=bool(off.max() >= 0.5 / dataset.fps))]  # fmt: skip


def _check_numbers(dataset: Dataset, rows: Rows, chosen: list[int]) -> list[Problem]:
    problems = []
    for name in dataset.wanted:
        values, stops, episode_of = rows.values[name], name in (ACTION, STATE), rows.keys["episode_index"]
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(values.astype(np.float32))
        lacking = rows.wrong[name]
        if lacking:
            row, count = lacking[0]
            bad[[row for row, _ in lacking]] = False
            has = f"has no {name}" if count < 0 else f"has {count} numbers of {name}, not {values.shape[1]}"
            what = f"frame {rows.keys['frame_index'][row]} of episode {episode_of[row]} {has}"
            what += f" ({len(lacking)} frames)" if len(lacking) > 1 else ""
            episodes = np.unique(episode_of[[row for row, _ in lacking]])
            problems.append(Problem("error", name, what, tuple(episodes.tolist()), stops=stops))
        if bad.any():
            row, dim = np.argwhere(bad)[0]
            first = f"{dataset.features[name]['names'][dim]} of episode {episode_of[row]} frame "
            what = f"{int(bad.sum())} NaN or infinite, first in {first}{rows.keys['frame_index'][row]}"
            episodes = np.unique(episode_of[bad.any(1)])
            problems.append(Problem("error", name, what, tuple(episodes.tolist()), stops=stops))
    return problems


def _check_statistics(dataset: Dataset, rows: Rows, chosen: list[int]) -> list[Problem]:
    problems = []
    for name in (ACTION, STATE) if dataset.figures else ():
        have = dataset.figures.get(name, {})
        missing = [key for key in ("mean", "std", "min", "max") if key not in have]
        told = any(one.where == name for one in dataset.problems)
        if name in dataset.features and missing and not told:
            problems.append(Problem("error", name, f"statistics lack {', '.join(missing)}"))
    return problems


def _check_instructions(dataset: Dataset, rows: Rows, chosen: list[int]) -> list[Problem]:
    keys = np.stack([rows.keys["task_index"], rows.keys["episode_index"]], 1)
    keys = keys[np.append(True, (keys[1:] != keys[:-1]).any(1))] if len(keys) else keys
    users: dict[int, list[int]] = defaultdict(list)
    for task, episode in np.unique(keys, axis=0).tolist():
        users[task].append(episode)
    problems, texts = [], {}
    for task, episodes in users.items():
        text = dataset.tasks.get(task)
        if task not in dataset.tasks:
            problems.append(Problem("error", "task_index", f"no instruction for {task}", tuple(episodes)))
        elif not isinstance(text, str):
            problems.append(Problem("error", "instructions", f"task {task} is {text!r}, no sentence", tuple(episodes)))
        elif not any(letter.isalpha() for letter in text):
            what = f"the number {text.strip()}" if text.strip() else "empty"
            problems.append(Problem("warning", "instructions", f"an instruction is {what}: task {task}"))
        texts[task] = text if isinstance(text, str) else ""
    alike = defaultdict(set)
    for text in filter(None, texts.values()):
        alike[" ".join(text.lower().split()).rstrip(".!")].add(text)
    for same in alike.values():
        if len(same) > 1:
            shown = ", ".join(f"'{text}'" for text in sorted(same))
            problems.append(Problem("warning", "instructions", f"differ in case, spaces or full stop only: {shown}"))
    return problems + _check_sentences(dataset, users, texts)


def _check_sentences(dataset: Dataset, users: dict[int, list[int]], texts: dict[int, str]) -> list[Problem]:
    """The episodes' own list of instructions against those of their rows."""
    carried: dict[int, set[str]] = defaultdict(set)
    for task, episodes in users.items():
        for episode in episodes:
            carried[episode].add(texts[task])
    known, swapped, other = {text for text in dataset.tasks.values() if isinstance(text, str)}, [], []
    for episode, found in sorted(carried.items()):
        named = set(dataset.episodes[episode].tasks) if episode in dataset.episodes else set()
        if not named or found <= named:
            continue
        what = f"its rows say '{sorted(found - named)[0]}', its metadata '{sorted(named)[0]}'"
        (swapped if named <= known and not found & named else other).append((episode, what))
    problems = each(swapped)
    if other:
        what = f"{len(other)} episodes carry other ones than their metadata list; episode {other[0][0]}: {other[0][1]}"
        problems.append(Problem("warning", "instructions", what))
    return problems


def check_clips(dataset: Dataset, camera: str) -> list[Problem]:
    """Whether from_timestamp and to_timestamp of a camera fit the lengths, and no two episodes share pictures."""
    files: dict[str, list[int]] = defaultdict(list)
    for episode in dataset.episodes.values():
        if camera in episode.clips:
            files[episode.clips[camera].file].append(episode.index)
    wrong: dict[int, str] = {}
    longer = []
    for file, episodes in files.items():
        clips = {e: (dataset.episodes[e].clips[camera], dataset.episodes[e].length) for e in episodes}
        order = sorted(episodes, key=lambda e: (clips[e][0].start, e))
        for before, one in zip([None, *order], order, strict=False):
            previous = None if before is None else clips[before][0]
            fault = _clip_fault(*clips[one], previous, dataset.fps)
            if fault.startswith("longer"):
                longer.append(one)
            elif fault:
                wrong[one] = f"{fault} in {file}"
        order = [one for one in order if one not in wrong]
        for before, one in zip(order, order[1:], strict=False):
            if clips[one][0].start < clips[before][0].start + (clips[before][1] - 0.5) / dataset.fps:
                for here, other in ((before, one), (one, before)):
                    start = clips[here][0].start
                    wrong[here] = f"from_timestamp {start:g}: its pictures overlap those of episode {other} in {file}"
    problems = each(sorted(wrong.items()), camera=camera)
    if longer:
        what = f"to_timestamp lies beyond the last row of {len(longer)} of the episodes, first of episode {longer[0]}"
        problems.append(Problem("warning", camera, what, tuple(longer), camera))
    return problems


def _clip_fault(clip: Clip, length: int, previous: Clip | None, fps: float) -> str:
    """What is wrong with the times of a clip; `previous` is the one before it in its file."""
    if not np.isfinite(clip.start) or clip.start < -0.5 / fps:
        return f"from_timestamp is {clip.start:g}"
    if clip.stop is None or not np.isfinite(clip.stop):
        return ""
    frames = (clip.stop - clip.start) * fps
    if abs(frames - length) < 0.5:
        return ""
    begins = 0.0 if previous is None else previous.stop
    if frames > length and begins is not None and abs(begins - clip.start) < 0.5 / fps:
        return "longer"
    apart = f"from_timestamp {clip.start:g} and to_timestamp {clip.stop:g} are {frames:.3g} frames apart"
    return f"{apart}, the episode has {length}"
