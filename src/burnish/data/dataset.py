"""One reader of LeRobotDatasets (v2.0, v2.1, v3.0), for training and inspection alike.

`open_dataset` turns a folder into checked tables; what is wrong but can be read past is noted as a `Problem`.
`burnish.data.checks` finds the rest: inspection shows all of it, training refuses what concerns what it reads.
"""

import logging
import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.core.reading import read_object
from burnish.data.features import (
    ACTION,
    IMAGES,
    INDEX_COLUMNS,
    STATE,
    is_numeric,
    is_picture,
    join_columns,
    propose_columns,
    read_features,
    train_option,
)
from burnish.data.rows import Rows, read_rows
from burnish.data.tables import Episode, read_episodes, read_statistics, read_tasks

VERSIONS = ("v2.0", "v2.1", "v3.0")
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_FIGURES = re.compile(r"mean|std|min|max|count|q\d\d")
_RLDS = ("*.tfrecord*", "dataset_info.json", "*/*.tfrecord*", "*/dataset_info.json", "*/*/dataset_info.json")
log = logging.getLogger("burnish")


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set.

    Args:
        kind: "error" (training fails or goes wrong, here or with LeRobot), "warning" (look at it) or "hint".
        where, what: a file, feature or episode, and what is wrong there.
        episodes: those that it concerns; none named means all.
        camera: the camera that it concerns; "" means every use of the data.
        fix: a command or an option of `burnish train`.
        stops: an error that training refuses; the others it reads past rightly.
    """

    kind: str
    where: str
    what: str
    episodes: tuple[int, ...] = ()
    camera: str = ""
    fix: str = ""
    stops: bool = True

    @property
    def sentence(self) -> str:
        """What is wrong, and the remedy where there is one."""
        return f"{self.what}; try: {self.fix}" if self.fix else self.what


@dataclass
class Dataset:
    """An opened data set.

    Args:
        version: "v2.0", "v2.1" or "v3.0".
        features: see `burnish.data.features.read_features`, under the names that training expects.
        episodes: by number, ascending.
        tasks: task index to what is stored as its instruction.
        figures: statistics as stored: feature to {"mean", "std", "min", "max", "q01", ...}, arrays [D] of numbers and
            [3, 1, 1] of pictures; without what is no number or does not fit.
        wanted: numeric features that `rows` holds.
        orders: feature to the order in which its stored dimensions are read, see `reorder`.
        told: warnings that were logged, and requests that were checked, see `burnish.data.checks.require`.
        named: the field of a recipe that its episodes are chosen by, for messages; "" where there is none.
    """

    root: Path
    version: str
    fps: float
    info: dict[str, Any]
    features: dict[str, dict[str, Any]]
    episodes: dict[int, Episode]
    tasks: dict[int, Any]
    figures: dict[str, dict[str, np.ndarray]]
    problems: list[Problem] = field(default_factory=list)
    wanted: tuple[str, ...] = ()
    orders: dict[str, list[int]] = field(default_factory=dict)
    told: set[Any] = field(default_factory=set)
    named: str = ""

    @cached_property
    def rows(self) -> Rows:
        """Every frame; read on first use."""
        files = dict.fromkeys(episode.data_file for episode in self.episodes.values())
        rows = read_rows(self.root, tuple(files), self.features, self.wanted)
        rows.values.update({name: rows.values[name][:, order] for name, order in self.orders.items()})
        return rows

    def reorder(self, name: str, names: list[str]) -> None:
        """Read the dimensions of a feature in the order of `names`, which are its own; before `rows` is read."""
        feature = self.features[name]
        order = [feature["names"].index(one) for one in names]
        self.orders[name], self.features[name] = order, {**feature, "names": list(names)}
        figures = self.figures.get(name, {})
        self.figures[name] = {key: one if key == "count" else one[order] for key, one in figures.items()}

    @property
    def views(self) -> list[str]:
        """All cameras, those of depth included."""
        return [name for name, one in self.features.items() if is_picture(one)]

    @property
    def camera_keys(self) -> list[str]:
        """Cameras that a policy can be trained on: colours, under a name that LeRobot takes for an observation."""
        named = {name: self.features[name] for name in self.views if name.startswith("observation.")}
        return [name for name, one in named.items() if not one["depth"] and one["shape"][2] == 3]

    @property
    def total_episodes(self) -> int:
        """One more than the highest episode number."""
        return max(self.episodes) + 1

    @property
    def numeric(self) -> list[str]:
        """Features of numbers, without the index columns."""
        return [name for name, one in self.features.items() if is_numeric(one) and name not in INDEX_COLUMNS]

    @cached_property
    def stats(self) -> dict[str, dict[str, np.ndarray]]:
        """`figures`, with the rows' own quantiles: LeRobot (before its #3804) stores means of the episodes'."""
        stats = {name: dict(one) for name, one in self.figures.items()}
        for name in {ACTION, STATE} & stats.keys() & {*self.wanted}:
            values = self.rows.values[name].astype(np.float64)
            if len(values := values[np.isfinite(values).all(1)]):
                found = np.quantile(values, QUANTILES, axis=0)
                stats[name] |= zip(map(quantile_name, QUANTILES), found, strict=True)
        return stats

    def instruction(self, task_index: int) -> str:
        text = self.tasks.get(int(task_index))
        return text if isinstance(text, str) else ""


def quantile_name(q: float) -> str:
    """LeRobot's name of a quantile: q01 for 0.01."""
    return f"q{round(q * 100):02d}"


def open_dataset(root: Path | str, columns: dict[str, Any] | None = None, *, everything: bool = False) -> Dataset:
    """Read the metadata of a data set.

    Args:
        columns: features under other names than LeRobot's, see `burnish.data.features.join_columns`.
        everything: `rows` holds all numeric features, not actions and states alone.

    Raises:
        BurnishError: not a LeRobotDataset, an unknown version, metadata that are missing or malformed.
    """
    root = Path(root)
    info, where = _read_info(root), str(root / "meta/info.json")
    declared = read_features(info["features"], where)
    proposed = {} if columns else propose_columns(declared)
    features = join_columns(declared, columns or {}, root)
    problems = _missing_features(features, proposed, root)
    if everything and proposed:  # an inspection reads on
        features = join_columns(declared, proposed, root)
    version = info["codebase_version"]
    videos = {name: one["columns"][0] for name, one in features.items() if one["dtype"] == "video"}
    episodes = read_episodes(root, info, videos, where)
    stored = read_statistics(root, version, {episode.index: episode.length for episode in episodes.values()})
    figures, faults = _clean_figures(stored, features)
    if not stored:
        name = "meta/episodes_stats.jsonl" if version == "v2.1" else "meta/stats.json"
        faults = [Problem("error", name, "missing: nothing to normalise with")]
    found = Dataset(root, version, float(info["fps"]), info, features, episodes, read_tasks(root, version), figures,
                    problems + faults)  # fmt: skip
    found.wanted = tuple(name for name in found.numeric if everything or name in (ACTION, STATE))
    if version != "v3.0":
        what = f"{version}: burnish reads it as it is, LeRobot's own tools want v3.0"
        found.problems.append(Problem("hint", "version", what, fix=convert_command(root) if version == "v2.1" else ""))
    return found


def open_named(root: Path | str) -> Dataset:
    """`open_dataset` for those who give no map: features under other names are read by the one that it proposes."""
    features = _read_info(Path(root))["features"]
    return open_dataset(root, propose_columns(read_features(features, f"{root}/meta/info.json")))


def convert_command(root: Path) -> str:
    """LeRobot's converter to v3.0 as a command that runs as it stands, in place, and uploads nothing."""
    name = re.sub(r"[^\w.-]", "-", root.resolve().name) or "data"
    return ("python -m lerobot.scripts.convert_dataset_v21_to_v30 "
            f"--repo-id=local/{name} --root={shlex.quote(str(root))} --push-to-hub=false")  # fmt: skip


def look(root: Path) -> str:
    """The command that shows a data set."""
    return f"burnish data inspect {shlex.quote(str(root))}"


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    if not path.exists():
        _refuse_other_folders(root)
    info = read_object(path, root)
    missing = [key for key in ("codebase_version", "fps", "features", "data_path") if key not in info]
    if missing:
        raise BurnishError(f"{path} lacks {', '.join(missing)}", "what LeRobot writes there")
    version, fps = info["codebase_version"], info["fps"]
    if version not in VERSIONS:
        raise BurnishError(f"{path}: version {version}", f"one of {', '.join(VERSIONS)}")
    if not number(fps) or not 0 < fps <= 1e5:
        raise BurnishError(f"{path}: fps is {fps!r}", "a positive number")
    return info


def _refuse_other_folders(root: Path) -> None:
    """Say what a folder without meta/info.json is, where that can be seen."""
    expected = "a LeRobotDataset folder with meta/info.json"
    if not root.is_dir():
        what = f"{root} is a file" if root.exists() else f"no data set at {root}"
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(root)) and not root.parent.exists():
            fix = f"hf download {root} --repo-type dataset --local-dir {root.name}"
            raise BurnishError(f"{what}: names of the Hugging Face hub are not fetched", expected, fix)
        raise BurnishError(what, expected, "burnish data demos --help")
    below = sorted(p.parent.parent for place in ("*", "*/*") for p in root.glob(f"{place}/meta/info.json"))
    if below:
        shown = ", ".join(map(str, below[:3])) + (", ..." if len(below) > 3 else "")
        raise BurnishError(f"{root} has no meta/info.json itself", f"the folder of one data set: {shown}",
                           look(below[0]))  # fmt: skip
    if any(True for pattern in _RLDS for _ in root.glob(pattern)):
        raise BurnishError(f"{root} has no meta/info.json: it holds RLDS records (TensorFlow datasets)", expected,
                           "LeRobot's converter, https://huggingface.co/docs/lerobot/porting_datasets_v3")  # fmt: skip
    raise BurnishError(f"no data set at {root}: it has no meta/info.json", expected, "burnish data demos --help")


def _missing_features(features: dict[str, dict], proposed: dict[str, list[str]], root: Path) -> list[Problem]:
    """An error for actions that are missing or cameras under names that no policy looks for, with a map as remedy."""
    others = [name for name in features if name not in INDEX_COLUMNS]
    short = {key: names[0] if len(names) == 1 else names for key, names in proposed.items()}
    fix = train_option("data.columns", short) if proposed else ""
    meant = "; ".join(f"{' + '.join(names)} would be {key}" for key, names in proposed.items())
    if ACTION not in features or STATE in proposed:
        lacking = ACTION if ACTION not in features else STATE
        what = f"{root} lists no feature '{lacking}', but {', '.join(others)}" + (f" ({meant})" if meant else "")
        return [Problem("error", "meta/info.json", what, fix=fix)]
    strange = [name for name, one in features.items() if is_picture(one) and not name.startswith("observation.")]
    if strange:
        what = f"camera '{strange[0]}' of {root} is not called {IMAGES}..." + (f" ({meant})" if meant else "")
        return [Problem("error", "meta/info.json", what, fix=fix)]
    return []


def _clean_figures(stored: dict[str, dict], features: dict[str, dict]) -> tuple[dict, list[Problem]]:
    """The statistics that are numbers of the right shape, under the features' names, and what is wrong with others."""
    figures, problems = {}, []
    for name, feature in features.items():
        parts = [stored.get(column) for column in feature["columns"]]
        if not (is_numeric(feature) or is_picture(feature)) or not all(parts):
            continue
        kept, wrong = {}, []
        for figure in filter(_FIGURES.fullmatch, parts[0]):
            arrays = [_numbers(part.get(figure)) for part in parts]
            whole = None if any(array is None for array in arrays) else np.concatenate(arrays)
            fault = "" if figure == "count" and whole is not None else _figure_fault(figure, whole, feature)
            if fault:
                wrong.append(fault)
            elif is_picture(feature) and figure != "count":
                kept[figure] = whole.reshape(-1, 1, 1)
            else:
                kept[figure] = whole[:1] if figure == "count" else whole
        figures[name] = kept
        if wrong:
            what = f"statistics do not fit {_size(feature)} dimensions: {', '.join(wrong)}"
            problems.append(Problem("error" if name in (ACTION, STATE) else "warning", name, what))
    return figures, problems


def _numbers(value: Any) -> np.ndarray | None:
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        return None
    return array.astype(np.float64).reshape(-1) if array.dtype.kind in "fiub" else None


def _size(feature: dict[str, Any]) -> int:
    return feature["shape"][2] if is_picture(feature) else prod(feature["shape"])


def _figure_fault(figure: str, values: np.ndarray | None, feature: dict[str, Any]) -> str:
    if values is None:
        return f"{figure} holds no numbers"
    if values.size != _size(feature):
        return f"{figure} has {values.size}"
    if not np.isfinite(values).all():
        return f"{figure} is not finite"
    return "std is negative" if figure == "std" and (values < 0).any() else ""
