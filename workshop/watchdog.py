"""Does the distance to the training set predict that an episode fails? For trained policies, in several spaces.

Each run is evaluated with the index of exactly what it was trained on: by pixels, by its own vision tower, and by a
retrieval head on that tower; as it was trained, and under other looks.
"""

import argparse
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.provenance import commit, machine
from burnish.core.recipe import load_recipe
from burnish.data.mix import open_sources
from burnish.data.search import build
from burnish.data.vectors import FRAME, Vectors, encode_dataset, make_encoder
from burnish.evaluate.records import Record
from burnish.evaluate.rollout import evaluate
from burnish.evaluate.watchdog import figures
from burnish.experiments.results import check_place, write_result
from burnish.methods.retrieve.ask import FOLDER
from burnish.methods.retrieve.head import load_head
from burnish.methods.retrieve.options import make_config
from burnish.methods.retrieve.train import train_and_save

PLAIN, ALL = "plain", "all looks"
SPACES = ("pixels", "tower", "tower, head")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = ("example:\n  python -m workshop watchdog runs/retrieve/few/own-0 runs/retrieve/few/own-1 "
                     "--result results/retrieve/watchdog.json")  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one for each seed")
    parser.add_argument("--looks", nargs="*", default=["camera", "light", "texture"], help="beside that of training")
    parser.add_argument("--episodes", type=int, default=60, help="of each look")
    parser.add_argument("--first-state", type=int, default=1_500_000, help="first initial state")
    parser.add_argument("--result", type=Path, required=True, help="result file")


def main(args: argparse.Namespace) -> int:
    check_place(args.result, str(args.runs[0].parent))
    begin, found, ms = time.perf_counter(), {}, {}
    for run in args.runs:
        recipe = load_recipe(run / "recipe.yaml")
        for space, index in indices(run, recipe):
            for look in (PLAIN, *args.looks):
                env = (recipe.eval.env or recipe.demos.env) + (f"+{look}" if look != PLAIN else "")
                done = evaluate(run / "policy", env, output=run / "watchdog" / f"{index.name}-{look}", workers=1,
                                episodes=args.episodes, first_state=args.first_state, seed=recipe.train.seed,
                                video=False, watchdog=index)  # fmt: skip
                for split in (look, ALL):
                    found.setdefault((split, space), {}).setdefault(str(recipe.train.seed), []).extend(done.records)
                ms.setdefault(space, []).append(done.watchdog_ms)
    words = ["python", "-m", "workshop", "watchdog", *map(str, args.runs), "--looks", *args.looks]
    words += ["--episodes", str(args.episodes), "--first-state", str(args.first_state), "--result", str(args.result)]
    rows = [one for (split, space), seeds in found.items() if (one := row(space, split, seeds, ms[space]))]
    if not rows:
        raise BurnishError("all episodes succeed, or all fail", "both, under some look")
    rows.sort(key=lambda one: [PLAIN, *args.looks, ALL].index(one["eval"]))
    print(write_result(
        args.result, recipe=str(args.runs[0].parent), command=shlex.join(words), rows=rows, commit=commit(),
        seeds={"train": ", ".join(found[PLAIN, SPACES[0]])}, date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=machine("cpu")["device"], minutes=(time.perf_counter() - begin) / 60,
    ))  # fmt: skip
    return 0


def text(records: Sequence[Record]) -> str:
    """What a result keeps of episodes: "camera.12=0 0.31 0.24; ..." says of initial state 12 under the camera whether
    it succeeded, its largest distance, and the largest of as many first calls as the shortest of all episodes has."""
    first = min(len(record.distances) for record in records)
    parts = [f"{r.task.partition('+')[2] or PLAIN}.{r.initial_state}={int(r.success)} {max(r.distances):.4g} "
             f"{max(r.distances[:first]):.4g}" for r in records]  # fmt: skip
    return "; ".join(parts)


def row(space: str, split: str, seeds: dict[str, list[Record]], ms: Sequence[float]) -> dict | None:
    """A line of the result; None where no policy both fails and succeeds."""
    kept = {seed: text(records) for seed, records in seeds.items()}
    if all(len({record.success for record in records}) < 2 for records in seeds.values()):
        return None
    return {"label": space, "eval": split, **figures(kept), "ms": float(np.median(ms)), "outcomes": kept}


def indices(run: Path, recipe: RecipeConfig) -> Iterator[tuple[str, Path]]:
    """Space and index of what a run was trained on."""
    head = run / "watchdog" / "head"
    for space in SPACES:
        spec = space if space == SPACES[0] else f"tower:{run / 'policy'}"
        features = _training_set(recipe, spec)
        folder, project, about = run / "watchdog" / space.replace(", ", "_"), None, {"hash": ""}
        if space == SPACES[2]:
            train_and_save(features, make_config("default", {}), head, seed=recipe.train.seed)
            project, about = load_head(head)
        made = build(features, project, about["hash"])
        made.about[FOLDER] = str(head.resolve())
        made.save(folder)
        yield space, folder


def _training_set(recipe: RecipeConfig, spec: str) -> Vectors:
    """The features of all that was trained on, with episodes of several data sets numbered on."""
    encoder, parts, first = make_encoder(spec), [], 0
    for source in open_sources(recipe):
        one = encode_dataset(source.root, encoder, cameras=recipe.data.cameras)
        one = one.of(np.isin(one.frames["episode"], source.episodes)) if source.episodes else one
        frames = one.frames.astype(FRAME)
        frames["episode"] += first
        first = int(frames["episode"].max()) + 1
        parts.append(replace(one, frames=frames))
    together = {"data": "+".join(dict.fromkeys(str(one.about["data"]) for one in parts))}
    return Vectors(np.concatenate([one.values for one in parts]), np.concatenate([one.frames for one in parts]),
                   {**parts[0].about, **together})  # fmt: skip
