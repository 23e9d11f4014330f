"""Offline evaluation, for a robot without a simulator: predicted chunks against recorded actions of held-out episodes.

A chunk is decided by (policy, episode, frame, seed), whoever shares its batch. Nothing here says how often the robot
succeeds: errors of one step do not add up as a robot's do.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.config import DataConfig, EvalConfig
from burnish.core.errors import BurnishError, plain
from burnish.core.figures import new_figure, save_figure
from burnish.core.files import write_json
from burnish.core.options import check
from burnish.core.outputs import require_own
from burnish.core.progress import progress_bar
from burnish.core.provenance import commit
from burnish.core.recipe import load_recipe
from burnish.core.seeding import derive_seed
from burnish.core.types import Batch
from burnish.data.checks import require
from burnish.data.dataset import Dataset, open_dataset
from burnish.data.features import ACTION, IMAGES
from burnish.data.inspect import gripper_dimensions
from burnish.data.loader import RobotData, to_float
from burnish.evaluate.batching import BatchedPolicy, Request
from burnish.evaluate.compare import OFFLINE
from burnish.evaluate.offline_scores import FIGURES, OfflineRecord, Scale, language, over_episodes, score, shown
from burnish.evaluate.offline_scores import parse_offline as parse
from burnish.evaluate.records import EVALUATION, SUMMARY, Journal, is_evaluation
from burnish.evaluate.stats import percentiles
from burnish.policies.base import Policy
from burnish.policies.load import policy_and_hash
from burnish.runtime.choose import find_sampler, using_sampler
from burnish.runtime.executor import Runtime

TOGETHER = 8
"""Observations in a call, unless said."""
PLOTS, MOST_DRAWN, PLOT = 4, 16, "plots/episode_{}.png"
"""Episodes that are drawn, dimensions of each, and where."""
log = logging.getLogger("burnish")


@dataclass
class OfflineEvaluation:
    """What an offline evaluation found. Printing it gives the figures with intervals over episodes."""

    output: Path
    settings: dict[str, Any]
    records: list[OfflineRecord]
    seconds: float = 0.0
    new_episodes: int = 0
    plots: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Figures, dimensions, steps of a chunk as [mean, low, high] over episodes; None where no episode has one."""
        records, dimensions = self.records, self.settings["dimensions"]
        columns = zip(*(r.by_dimension for r in records), strict=True)
        figures = {name: over_episodes(r.figures.get(name) for r in records) for name in FIGURES}
        return {
            OFFLINE: {
                "episodes": len(records), "frames": sum(r.frames for r in records),
                "calls": sum(r.calls for r in records),
                "figures": {name: one for name, one in figures.items() if one is not None},
                "by_dimension": {n: over_episodes(one) for n, one in zip(dimensions, columns, strict=True)},
                "by_horizon": [over_episodes(one) for one in zip(*(r.by_horizon for r in records), strict=True)],
            },
            "latency_ms": percentiles([ms for r in records for ms in r.latency_ms]), "settings": self.settings,
            "plots": self.plots, "commits": sorted({r.commit for r in records}), "seconds": self.seconds,
            "new_episodes": self.new_episodes,
        }  # fmt: skip

    def __str__(self) -> str:
        found = self.to_dict()[OFFLINE]
        rows = [(FIGURES[name], shown(one)) for name, one in found["figures"].items()]
        known = [one for one in found["by_horizon"] if one]  # a chunk may reach beyond the end of every episode
        ends = [shown(known[place]) for place in (0, -1)]
        rows.insert(1, ("  at the first and the last step of a chunk", ", ".join(ends)))
        rows += [(f"error of {name}, in its units", shown(one)) for name, one in found["by_dimension"].items()]
        head = f"{found['episodes']} episodes, {found['calls']} chunks, one every {self.settings['every']} frames"
        return "\n".join(map(plain, [head, *(f"{text:<46} {value}" for text, value in rows)]))


def evaluate_offline(
    policy: Policy | Path | str, data: DataConfig, *, output: Path | str, episodes: int = 100, every: int = 0,
    seed: int = 0, batch_size: int = 0, cameras: Sequence[str] | None = None, device: str = "", instruction: str = "",
    video: bool = True, sampler: str = "", tier: str = "", progress: bool = True,
) -> OfflineEvaluation:  # fmt: skip
    """Predict chunks along recorded episodes and write `episodes.jsonl`, `summary.json` and plots into `output`.

    Called again with the same arguments it continues after the episodes that are there.

    Args:
        policy: a policy, its LeRobot folder, or the name of a shipped base.
        data: the data set, as a recipe's `data`: root, held_out (empty: all episodes, which is told), columns, caches.
        output: folder of this evaluation.
        episodes: at most so many.
        every: control steps between two predictions; 0 means a quarter of a second, at most a chunk.
        seed: of the policy's noise.
        batch_size: observations in a call; 0 means 8.
        cameras: the data set's cameras in the policy's order; None means those of the same names.
        device: torch device that a policy folder is loaded to; "" means a GPU where there is one.
        instruction: another sentence to predict under; "" means another one of the data set, where it has several.
        video: draw predicted and recorded actions of the first episodes.
        sampler, tier: see `burnish.evaluate.rollout.evaluate`.
        progress: show a bar on stderr.

    Raises:
        BurnishError: bad arguments, a data set or policy that does not fit, a folder that holds another evaluation.
    """
    trials = EvalConfig(env=OFFLINE, episodes=episodes, every=every, seed=seed, batch_size=batch_size, tier=tier,
                        sampler=find_sampler(sampler, policy))  # fmt: skip
    check(trials, "offline evaluation")
    require_own(Path(output), EVALUATION, is_evaluation)
    meta = open_dataset(data.root, data.columns)
    meta.named = "data.held_out"
    if not data.held_out:
        log.warning("no episode of %s is held out: measured on all, and those that training saw look better", data.root)
    chosen = require(meta, data.held_out)[:episodes]
    policy, weights = policy_and_hash(policy, device)
    frames = _open_frames(data, meta, policy, chosen, cameras, progress)
    replay = _Replay(policy, frames, trials, weights, instruction)
    settings = {
        "env": OFFLINE, "weights": weights, "seed": seed, "data": frames.hash, "every": replay.every,
        "cameras": frames.cameras, "batch_size": replay.width, "instruction": instruction,
        "dimensions": meta.features[ACTION]["names"],
        **{key: value for key, value in (("sampler", trials.sampler), ("tier", tier)) if value},
    }  # fmt: skip
    start = time.perf_counter()
    with using_sampler(policy, trials.sampler), Journal(Path(output), settings, parse) as journal:
        new = _fill(journal, replay, chosen, Path(output) if video else None, progress)
        found = {record.episode: record for record in journal.records}
        plots = [{"episode": e, "instruction": found[e].task, "plot": PLOT.format(e)} for e in chosen
                 if (Path(output) / PLOT.format(e)).is_file()]  # fmt: skip
        evaluation = OfflineEvaluation(Path(output), settings, [found[e] for e in chosen],
                                       time.perf_counter() - start, new, plots)  # fmt: skip
        write_json(Path(output) / SUMMARY, evaluation.to_dict())
    return evaluation


def _fill(journal: Journal, replay: "_Replay", chosen: list[int], drawn: Path | None, progress: bool) -> int:
    """Measure the episodes that the journal does not hold yet; returns their number."""
    done = {record.episode for record in journal.records}
    todo = [episode for episode in chosen if episode not in done]
    if todo:
        (journal.path.parent / SUMMARY).unlink(missing_ok=True)  # of fewer episodes: this one has not ended
    bar = {"total": len(chosen), "initial": len(chosen) - len(todo), "desc": OFFLINE, "unit": "ep", "shown": progress}
    with progress_bar(**bar) as shown_bar:
        for episode in todo:
            record, chunks, starts = replay.episode(episode)
            if drawn and episode in chosen[:PLOTS]:
                draw_episode(drawn / PLOT.format(episode), replay.data, episode, chunks, starts)
            journal.append(record)
            shown_bar.update()
    return len(todo)


def trained_on(policy: Path | str, root: Path) -> DataConfig | None:
    """The `data` of the recipe beside a policy folder, where the policy was trained on this data set."""
    recipe = Path(policy).parent / "recipe.yaml"
    found = load_recipe(recipe).data if recipe.is_file() else DataConfig()
    return found if found.root and Path(found.root).resolve() == Path(root).resolve() else None


def _open_frames(
    data: DataConfig, meta: Dataset, policy: Policy, chosen: list[int], cameras: Sequence[str] | None, progress: bool
) -> RobotData:
    """The chosen episodes as the policy is trained on them; BurnishError where the two do not go together."""
    own, wanted = [key.removeprefix(IMAGES) for key in meta.camera_keys], list(cameras or policy.cameras)
    count, known = len(policy.cameras), {*own, *meta.camera_keys}
    if len(wanted) != count or not count or (not cameras and not known.issuperset(wanted)):
        found = f"cameras {', '.join(cameras or own)} for a policy that sees {', '.join(policy.cameras) or 'none'}"
        fix = f"--cameras {' '.join([*own, *['NAME'] * count][:count])}" if count else ""
        raise BurnishError(found, f"{count} of the data set's, in the policy's order", fix)
    frames = RobotData(
        Path(data.root), wanted, policy.chunk_size, 1, 0, episodes=chosen, meta=meta,
        image_size=data.image_size, cache_dir=data.cache_dir, cache_gb=data.cache_gb, seen=policy.input_size,
        augmented=False, progress=progress, window=policy.window,
    )  # fmt: skip
    if frames.actions.shape[1] != policy.action_dim:
        raise BurnishError(f"{data.root} has actions of dimension {frames.actions.shape[1]}",
                           f"{policy.action_dim} as the policy has")  # fmt: skip
    return frames


class _Replay(BatchedPolicy):
    """The policy on recorded observations: those of its requests are (row of the data set, instruction)."""

    def __init__(self, policy: Policy, data: RobotData, trials: EvalConfig, weights: str, instruction: str):
        steps, names = policy.act_steps, data.meta.features[ACTION]["names"]
        cameras = dict(zip(policy.cameras, data.cameras, strict=True))
        super().__init__(policy, cameras, trials.seed, trials.batch_size or TOGETHER, steps)
        self.data, self.weights, self.instruction = data, weights, instruction
        self.every = trials.every or max(1, min(steps, round(data.meta.fps / 4)))  # no policy's: all are compared
        if self.every > steps:  # nothing could be executed between two chunks
            raise BurnishError(f"every is {self.every}", f"at most {steps}, the policy's chunk")
        self.sentences = sorted({text for text in map(data.meta.instruction, data.meta.tasks) if text})
        self.scale = Scale.of(data.actions, gripper_dimensions(names, data.actions), data.meta.fps)
        if trials.tier:
            self.runner = Runtime(policy, tier=trials.tier)

    def _batch(self, observations: Sequence[Any]) -> Batch:
        seen = self.data.observations(np.array([row for row, _ in observations]))
        batch: Batch = {f"observation.images.{name}": to_float(seen[key]) for name, key in self.cameras.items()}
        batch |= {key: value for key, value in seen.items() if key not in self.data.cameras and key != "task"}
        return {key: value.to(self.device) for key, value in batch.items()} | {
            "task": [text for _, text in observations]
        }

    def instead_of(self, text: str) -> str:
        """The sentence that stands in for `text`, always the same one; "" where there is none."""
        others = [one for one in self.sentences if one != text]
        return self.instruction or (others[derive_seed("swap", text) % len(others)] if others else "")

    def episode(self, episode: int) -> tuple[OfflineRecord, np.ndarray, np.ndarray]:
        """The record of an episode, its chunks [C, T, A] and the frames [C] that they start from."""
        first, stop = self.data.meta.rows.span(episode)
        recorded, starts = self.data.actions[first:stop], np.arange(0, stop - first, self.every)
        texts = [self.data.tasks[int(self.data.task_index[first + frame])] for frame in starts]

        def predict(texts: Sequence[str], name: str = "episode") -> tuple[np.ndarray, list[float]]:
            rows = [Request((first + int(frame), text), name, episode, int(frame))
                    for frame, text in zip(starts, texts, strict=True)]  # fmt: skip
            calls = [self.act(rows[begin : begin + self.width]) for begin in range(0, len(rows), self.width)]
            return np.concatenate([actions for actions, _ in calls]).astype(np.float64), [ms for _, ms in calls]

        chunks, latency = predict(texts)
        found, others = score(chunks, starts, recorded, self.scale), list(map(self.instead_of, texts))
        if all(others):
            swapped, again = predict(others)[0], predict(texts, "again")[0]
            found["figures"] |= language(chunks, swapped, again, starts, recorded, self.scale)
        record = OfflineRecord(texts[0], others[0], episode, **found, latency_ms=latency, weights=self.weights,
                               seed=self.seed, commit=commit())  # fmt: skip
        return record, chunks, starts


def draw_episode(path: Path, data: RobotData, episode: int, chunks: np.ndarray, starts: np.ndarray) -> None:
    """Six moments of the first camera above every dimension: recorded in black, each predicted chunk in colour."""
    first, stop = data.meta.rows.span(episode)
    names = data.meta.features[ACTION]["names"][:MOST_DRAWN]
    figure = new_figure(9, 1.6 + 0.9 * len(names))
    top, *axes = figure.subplots(len(names) + 1, 1, height_ratios=[1.6, *[0.9] * len(names)])
    moments = np.linspace(first, stop - 1, 6).round().astype(int)
    top.imshow(np.concatenate(data.frames.arrays[data.cameras[0]][moments], axis=1))
    top.axis("off")
    for dim, (axis, name) in enumerate(zip(axes, names, strict=True)):
        for start, chunk in zip(starts, chunks, strict=True):
            steps = np.arange(start, min(start + len(chunk), stop - first))
            axis.plot(steps, chunk[: len(steps), dim], color="#0f766e", linewidth=0.8, alpha=0.5)
        axis.plot(np.arange(stop - first), data.actions[first:stop, dim], color="black", linewidth=1.2)
        axis.set_ylabel(name[:14], fontsize=7, rotation=0, ha="right", parse_math=False)
        axis.tick_params(labelsize=6)
    save_figure(figure, path, dpi=100)
