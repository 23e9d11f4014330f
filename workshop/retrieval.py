"""How well retrieval works: every encoder and head on the splits of docs/methods/retrieve.md, into one result file.

Each seed holds out another part of the episodes, so that every episode is asked once, by heads that have not seen it.
"""

import argparse
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.core.outputs import require_file
from burnish.core.provenance import commit, machine
from burnish.core.reading import read_lines
from burnish.core.seeding import derive_seed
from burnish.data.vectors import Encoder, Vectors, encode_dataset, make_encoder
from burnish.evaluate.retrieval import over_episodes
from burnish.experiments.results import check_place, write_result
from burnish.methods.retrieve.head import Head
from burnish.methods.retrieve.options import make_config
from burnish.methods.retrieve.train import train_head
from workshop.ranks import Found, find, ranks_row, shuffled, time_errors

SAME, MOMENT, ACROSS = "same task, other episodes", "other view, same moment", "other view, same task, other episodes"
SENTENCE, SHUFFLED, PUBLISHED = "instruction to frames", "shuffled labels", "published protocol"
PIXELS, HEADS = "pixels", ("raw", "paper", "default")


class Part(NamedTuple):
    """Frames of one data set, evenly spaced moments of each episode, and the task of each."""

    features: Vectors
    tasks: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = ("example:\n  python -m workshop retrieval data/lift --encoder pixels tower:small "
                     "--result results/retrieve/lift.json")  # fmt: skip
    parser.add_argument("root", type=Path, help="LeRobotDataset folder")
    parser.add_argument("--encoder", nargs="+", default=["pixels", "tower:small"], help="see burnish data index")
    parser.add_argument("--shifted", nargs="*", default=[], metavar="NAME=FOLDER",
                        help="data sets of the same tasks that look different")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="parts of the episodes, each held out once")
    parser.add_argument("--moments", type=int, default=6, help="frames of each episode that ask and are found")
    parser.add_argument("--result", type=Path, required=True, help="result file")
    parser.add_argument("--figure", type=Path, help="PNG of a query and its neighbours under each encoder")


def main(args: argparse.Namespace) -> int:
    wrong = [one for one in args.shifted if not all(one.partition("=")[::2])]
    if wrong or not 2 <= args.seeds <= 20 or args.moments < 2:
        raise BurnishError(f"--shifted {wrong}, --seeds {args.seeds}, --moments {args.moments}",
                           "NAME=FOLDER, 2 to 20 seeds, 2 moments or more")  # fmt: skip
    if args.figure:
        require_file(args.figure, "figure")
    words = ["python", "-m", "workshop", "retrieval", str(args.root), "--encoder", *args.encoder]
    words += [*(["--shifted", *args.shifted] if args.shifted else []), "--seeds", str(args.seeds)]
    words += ["--moments", str(args.moments), "--result", str(args.result)]
    shifted = {name: Path(folder) for name, _, folder in (one.partition("=") for one in args.shifted)}
    print(measure(args.root, args.encoder, args.result, shifted=shifted, seeds=args.seeds, moments=args.moments,
                  command=shlex.join(words), figure=args.figure))  # fmt: skip
    return 0


def measure(
    root: Path, encoders: Sequence[str], result: Path, *, shifted: Mapping[str, Path] | None = None, seeds: int = 3,
    moments: int = 6, command: str = "", figure: Path | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Measure encoders and heads on a data set and write `result`.

    Args:
        root: LeRobotDataset; tasks are those of its `ground_truth` where it has one, else its instructions.
        encoders: names, see `data.vectors`; `pixels` gets no head.
        result: results/<name>.json.
        shifted: name to data set of the same tasks that looks different.
        seeds: parts of the episodes; also the seeds of the heads.
        moments: frames of each episode that ask and are found.
        command: what is noted as the command.
        figure: PNG of a query and its neighbours under each encoder.

    Raises:
        BurnishError: no two episodes of a task in a part, other cameras in a shifted data set, a place that is taken.
    """
    check_place(result, str(root))
    begin, found, times = time.perf_counter(), {}, {}
    shown: dict[str, tuple[int, np.ndarray]] = {}
    for name in encoders:
        encoder = make_encoder(name)
        whole = encode_dataset(root, encoder, progress=progress)
        labels = task_labels(root, whole)
        there = {k: _shifted(path, encoder, whole, moments, progress) for k, path in (shifted or {}).items()}
        for seed, train, test in folds(whole, labels, seeds):
            for label, head in _variants(name, whole.of(train), seed, progress):
                asked, known = (spaced(whole.of(keep), labels[keep], moments) for keep in (test, train))
                for split, one in _splits(asked, known, there, head, seed):
                    found.setdefault((split, label), {})[seed] = one
                vectors = _through(head, asked.features)[:, 0]
                times.setdefault(label, []).append(_times(vectors, asked))
                if seed == 0 and figure is not None:
                    shown[label] = _neighbours(vectors, asked)
    rows = [ranks_row(label, split, ones, **_more(split, times[label]))
            for (split, label), ones in sorted(found.items(), key=lambda item: _order(item[0][0]))]  # fmt: skip
    if figure is not None:
        draw(root, shown, figure)
    return write_result(
        result, recipe=str(root), command=command, rows=rows, commit=commit(), seeds={"split and head": seeds},
        date=datetime.now(UTC).isoformat(timespec="seconds"), hardware=machine("cpu")["device"],
        minutes=(time.perf_counter() - begin) / 60,
        metrics={"tasks": len(np.unique(labels)), "moments": moments},
    )  # fmt: skip


def task_labels(root: Path, vectors: Vectors) -> np.ndarray:
    """[N] the task of each frame as a text: that of the demonstrations, without what only changes their looks, else
    the instruction."""
    file = Path(root) / "ground_truth" / "episodes.jsonl"
    if not file.is_file():
        return np.array([vectors.instruction(task) for task in vectors.frames["task"]])
    known = {row.get("episode_index"): str(row.get("task_id", "")).partition("+")[0] for _, row in read_lines(file)}
    return np.array([known.get(int(episode), "") for episode in vectors.frames["episode"]])


def folds(vectors: Vectors, labels: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(seed, train, test) with bool [N] each; every episode is in one test, the tasks evenly."""
    episodes, first = np.unique(vectors.frames["episode"], return_index=True)
    order = np.random.default_rng(derive_seed("retrieval folds")).permutation(len(episodes))
    order = order[np.argsort(labels[first][order], kind="stable")]
    part = np.empty(len(episodes), int)
    part[order] = np.arange(len(episodes)) % count
    for seed in range(count):
        test = np.isin(vectors.frames["episode"], episodes[part == seed])
        if count < 2 or not test.any():
            raise BurnishError(f"{len(episodes)} episodes in {count} parts", "2 parts or more, an episode in each")
        yield seed, ~test, test


def spaced(vectors: Vectors, labels: np.ndarray, moments: int) -> Part:
    """Evenly spaced frames of each episode, as many of every one."""
    _, starts, counts = np.unique(vectors.frames["episode"], return_index=True, return_counts=True)
    rows = starts[:, None] + np.round(np.linspace(0, 1, moments) * (counts[:, None] - 1)).astype(int)
    return Part(vectors.of(rows.flatten()), labels[rows.flatten()])


def _shifted(path: Path, encoder: Encoder, whole: Vectors, moments: int, progress: bool) -> Part:
    vectors = encode_dataset(path, encoder, cameras=whole.about["cameras"], progress=progress)
    return spaced(vectors, task_labels(path, vectors), moments)


def _variants(name: str, train: Vectors, seed: int, progress: bool) -> Iterator[tuple[str, Head]]:
    """Label and head of everything that one encoder is measured with."""
    for preset in HEADS if name != PIXELS else HEADS[:1]:
        head, _ = train_head(train, make_config(preset, {}), seed=seed, progress=progress)
        yield name if name == PIXELS else f"{name} raw" if preset == "raw" else f"{name} head {preset}", head


@torch.no_grad()
def _through(head: Head, vectors: Vectors) -> np.ndarray:
    """Unit vectors [N, V, W]."""
    return head(torch.from_numpy(np.asarray(vectors.values, np.float32))).numpy()


def _splits(
    asked: Part, known: Part, shifted: Mapping[str, Part], head: Head, seed: int
) -> Iterator[tuple[str, Found]]:
    of, tasks, vectors = asked.features, asked.tasks, _through(head, asked.features)
    one, own = vectors[:, 0], of.frames["episode"]
    same, here = tasks[:, None] == tasks[None], own[:, None] == own[None]
    yield SAME, find(one, one, same, here, own)
    mixed = shuffled(tasks, own, np.random.default_rng(derive_seed("shuffled", seed)))
    yield SHUFFLED, find(one, one, mixed[:, None] == mixed[None], here, own)
    if vectors.shape[1] > 1:
        moment = of.frames["row"]
        moment = moment[:, None] == moment[None]
        yield MOMENT, find(one, vectors[:, 1], moment, np.zeros_like(here), own)
        yield ACROSS, find(one, vectors[:, 1], same, here, own)
    if head.words is not None:
        first = np.unique(own, return_index=True)[1]
        with torch.no_grad():
            texts = head.sentences([of.instruction(t) for t in of.frames["task"][first]]).numpy()
        yield SENTENCE, find(texts, one, same[first], here[first], own[first])
    for name, part in shifted.items():
        there = _through(head, part.features)[:, 0]
        right = part.tasks[:, None] == tasks[None]
        yield f"looks: {name}", find(there, one, right, np.zeros_like(right), part.features.frames["episode"])
    seen, episodes = _through(head, known.features)[:, 0], known.features.frames["episode"]
    right = known.tasks[:, None] == known.tasks[None]
    yield PUBLISHED, find(seen, seen, right, np.eye(len(seen), dtype=bool), episodes)


def _times(vectors: np.ndarray, asked: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of the nearest frame's place in its episode, those by chance, and the episodes."""
    of = asked.features
    share = of.frames["time"] / np.maximum(of.frames["length"] - 1, 1)
    return time_errors(vectors, share, asked.tasks, of.frames["episode"])


def _more(split: str, times: Sequence[tuple[np.ndarray, ...]]) -> dict[str, Any]:
    """Further columns: the error in time, beside the first split."""
    if split != SAME:
        return {}
    errors, chance, episodes = zip(*times, strict=True)
    low, high = over_episodes(errors, episodes)
    mean = np.concatenate(errors).mean()
    return {"time_error": f"{mean:.3f} [{low:.3f}, {high:.3f}]", "time_chance": float(np.concatenate(chance).mean())}


def _order(split: str) -> tuple[int, str]:
    names = (SAME, MOMENT, ACROSS, SENTENCE, "looks", SHUFFLED, PUBLISHED)
    return names.index(split.partition(":")[0]), split


def _neighbours(vectors: np.ndarray, asked: Part, count: int = 5) -> tuple[int, np.ndarray]:
    """Row of a query in the middle of an episode, and those of its nearest frames, one of each other episode."""
    of = asked.features
    query = len(of.frames) // 2
    scores = np.where(of.frames["episode"] == of.frames["episode"][query], -np.inf, vectors @ vectors[query])
    order = np.argsort(-scores, kind="stable")
    first = np.unique(of.frames["episode"][order], return_index=True)[1]
    rows = of.frames["row"][order[np.sort(first)][:count]]
    return int(of.frames["row"][query]), rows


def draw(root: Path, shown: Mapping[str, tuple[int, np.ndarray]], path: Path) -> None:
    """PNG: the query at the left, its neighbours under each encoder in a row, with the tasks that they are of."""
    from burnish.core.figures import new_figure, save_figure
    from burnish.data.dataset import open_dataset
    from burnish.data.frames import open_frames

    data = open_dataset(root)
    key = data.camera_keys[0]
    pictures = open_frames(root, [key], meta=data).arrays[key]
    columns = 1 + max(len(rows) for _, rows in shown.values())
    figure = new_figure(1.5 * columns, 1.75 * len(shown))
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for line, (label, (query, rows)) in zip(axes, shown.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, row in zip(line, (query, *rows), strict=False):
            axis.imshow(np.asarray(pictures[[row]])[0])
            text = data.instruction(int(data.rows.keys["task_index"][row]))
            axis.set_title(fill(text, 26), fontsize=6, parse_math=False)
        line[0].text(0, -0.04, label, fontsize=7, transform=line[0].transAxes, va="top", parse_math=False)
    save_figure(figure, path, dpi=80)
