"""The one training loop. It knows no method by name: objectives are called at fixed places, see train/objective.py."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import read_object, remove_folder, write_json
from burnish.core.recipe import demos_root, recipe_to_dict, run_folder, save_recipe
from burnish.core.seeding import derive_seed, generator
from burnish.core.types import Batch
from burnish.data.loader import LanguageData, Prefetch, RobotData, pin, to_device
from burnish.methods.objective import Objective
from burnish.train import checkpoint, selfcheck
from burnish.train.divergence import DivergenceGuard
from burnish.train.logging import Metrics, Window, draw_curves
from burnish.train.optim import Average, adamw, add_adapters, choose_trained, learning_rate
from burnish.train.setup import make_accelerator, make_objectives, own_accelerate_state, policy_and_data
from burnish.train.step import Step, clip, gradients, write_back

RETENTION_LIMIT = 256
"""Questions asked when retention is measured during training."""
CURVES_EVERY = 60.0
"""Seconds that pass at least before curves.png is drawn again (with the next checkpoint)."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left behind: folders, files, and the last value of every logged figure."""

    output: Path
    policy: Path
    metrics: Path
    curves: Path
    steps: int
    final: dict[str, float]


class Run:
    """The state of a run, as objectives see it.

    Attributes:
        recipe: the whole recipe.
        policy: the policy in training; call its verbs inside `Objective.loss` as you like.
        data: RobotData; `data.meta` is LeRobot's metadata (fps, features, stats, tasks).
        objectives: by name.
        step: optimiser steps done.
        device: where batches live.
        generator: for draws about this rank's batch, on `device`; reseeded at every step from seed, rank and step.
        shared_generator: the same on every rank: for draws in `edit_gradients`, or ranks would drift apart.
        accelerator: accelerate's Accelerator (`num_processes`, `process_index`, `gather`).
        output: the run folder.
        trained: trained parameters by name, those of objectives as "objectives.<objective>.<parameter>".
        average: moving average of the weights, or None.
    """

    def __init__(self, recipe: RecipeConfig, progress: bool = True):
        self.recipe, self.progress = recipe, progress
        self.output = run_folder(recipe)
        self.accelerator = make_accelerator(recipe, self.output)
        self.device: torch.device = self.accelerator.device
        self.step = 0
        self.window, self.drawn = Window(), time.perf_counter()
        self._minutes_before, self._started = 0.0, math.nan
        self.generator = generator(recipe.train.seed, "setup", device=str(self.device))
        self.shared_generator = generator(recipe.train.seed, "setup", device=str(self.device))
        with self.accelerator.main_process_first():  # one rank decodes the frames, the others find them
            self.policy, self.data, self.parent_hash = policy_and_data(
                recipe, self.accelerator.process_index, self.accelerator.num_processes, progress
            )
        self.policy.float()  # master weights; precision below that is autocast's business
        add_adapters(self.policy, recipe.train.peft, recipe.train.seed)
        choose_trained(self.policy, recipe.train.freeze, recipe.train.train_only)
        self.policy.to(self.device).train()
        self.objectives = make_objectives(recipe)
        for objective in self.objectives.values():
            objective.setup(self)
        self.module = Step(self).to(self.device)
        self.trained: dict[str, nn.Parameter] = self.module.trained()
        self.average = Average(self.trained, recipe.train.ema_decay) if recipe.train.ema_decay > 0 else None
        self.optimizer = adamw(self.trained, recipe.train)
        self.wrapped, self.stepper = self.accelerator.prepare(self.module, self.optimizer)
        self.editors = [o for o in self.objectives.values() if type(o).edit_gradients is not Objective.edit_gradients]

    def minutes(self) -> float:
        """Minutes of training so far, earlier sittings included; what is made ready before the first step is not."""
        return self._minutes_before + (time.perf_counter() - self._started) / 60

    def start_clock(self) -> None:
        """Training begins now."""
        self._started = time.perf_counter()

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        meta = checkpoint.load(self, folder)
        self.step, self.window = meta["step"], Window(**meta["window"])
        self._minutes_before = meta["minutes"]
        if meta["scaler"]:
            self.accelerator.scaler.load_state_dict(meta["scaler"])

    def say(self, lines: list[str]) -> None:
        """Print warnings once, on the first rank."""
        for line in lines if self.accelerator.is_main_process else []:
            print(f"burnish train: {line}", file=sys.stderr)


def train(recipe: RecipeConfig, *, resume: bool = True, progress: bool = True) -> TrainResult:
    """Fine-tune a policy as `recipe` says; goes on where an earlier, killed run of the same recipe stopped.

    Args:
        recipe: see core.config; `load_recipe` reads one.
        resume: False deletes the earlier checkpoints and figures of the run folder and starts over.
        progress: show a progress bar.

    Returns:
        Paths and final figures. A finished run is not repeated.

    Raises:
        BurnishError: anything wrong with recipe, data, policy, checkpoint or disk, or a loss that is not finite.
    """
    output = run_folder(recipe)
    if resume and (done := _finished(recipe, output)):
        return done
    with own_accelerate_state():
        run = Run(recipe, progress)
        if run.accelerator.is_main_process and not resume:
            for name in ("checkpoints", "policy", "adapter", "eval"):  # figures of the old weights go with them
                remove_folder(output / name)
            for name in ("train.json", "retention.json"):
                (output / name).unlink(missing_ok=True)
        run.accelerator.wait_for_everyone()
        newest = checkpoint.latest(output)
        if newest is not None:
            run.restore(newest)
        metrics = start_files(run, newest is not None)
        if run.recipe.train.self_check and newest is None:
            run.say(_static_checks(run))
        run.accelerator.wait_for_everyone()
        if newest is None:
            _measure_retention(run, metrics)
        loop(run, metrics)
        return _finish(run, metrics)


def loop(run: Run, metrics: Metrics | None, step: Callable[..., dict[str, float]] | None = None) -> None:
    """All optimiser steps from `run.step` on; `step` stands in for `train_step` (the benchmark's way in)."""
    from tqdm import tqdm

    config, accelerator = run.recipe.train, run.accelerator
    streams = Streams(run)
    watch = DivergenceGuard(run.output, accelerator.process_index, late=run.device.type != "cpu")
    first, since, waited = run.step, time.perf_counter(), 0.0
    shown = run.progress and accelerator.is_main_process
    bar = tqdm(total=config.steps, initial=run.step, desc="training", unit="step", disable=not shown)
    last_logged = run.step
    run.start_clock()
    try:
        while run.step < config.steps:
            edits = (step or train_step)(run, streams, watch, check=config.self_check and run.step == first)
            bar.update()
            stop = run.step >= config.steps
            if not stop and _out_of_time(run):
                stop = True
                run.say([f"train.max_minutes={config.max_minutes:g} are over: {run.step} of {config.steps} steps"])
            if run.step % config.log_every == 0 or stop:
                elapsed = max(time.perf_counter() - since, 1e-9)
                row = _row(run, edits, elapsed / (run.step - last_logged), (streams.waited - waited) / elapsed)
                bar.set_postfix(loss=f"{row['loss']:.4g}", wait=f"{row['data_wait_share']:.1%}", refresh=False)
                _log(run, metrics, row)
                since, waited, last_logged = time.perf_counter(), streams.waited, run.step
            if config.retention_every and run.step % config.retention_every == 0 and not stop:
                _measure_retention(run, metrics)
                since = time.perf_counter()
            if run.step % config.save_every == 0 and not stop:
                watch.flush(run.trained)
                _save(run)
                since = time.perf_counter()
            if stop:
                break
        watch.flush(run.trained)
    finally:
        bar.close()
        streams.close()


def train_step(run: Run, streams: "Streams", watch: DivergenceGuard, check: bool = False) -> dict[str, float]:
    """One optimiser step over `grad_accumulation` micro-batches; returns the figures of the gradient edits."""
    config, accelerator, step = run.recipe.train, run.accelerator, run.step
    _seed_step(run)
    seen: dict[str, Batch] = {}
    figures: dict[str, Tensor] = {}
    for micro in range(config.grad_accumulation):
        batch, language = streams.next()
        with accelerator.accumulate(run.wrapped):
            total, terms = run.wrapped(batch, language)
            accelerator.backward(total)
        run.window.add({"loss": total.detach(), **{f"loss_{name}": value for name, value in terms.items()}})
        suffix = f"_{micro}" if config.grad_accumulation > 1 else ""
        seen |= {f"robot{suffix}": batch} | ({f"language{suffix}": language} if language else {})
        figures |= {f"{name}{suffix}": value for name, value in {**terms, "total": total.detach()}.items()}
    accelerator.unscale_gradients(run.stepper)
    edits: dict[str, float] = {}
    if run.editors:
        grads = gradients(run.trained)
        for objective in run.editors:
            edits |= objective.edit_gradients(run, batch, grads)
        write_back(run.trained, grads)
    if check:
        selfcheck.check_ranks(run, gradients(run.trained), "gradients")
        run.say(selfcheck.report_unreached(run.trained))
        if step == 0 and config.imitation_weight > 0:
            run.say(selfcheck.loss_warning(terms["policy"].item(), bool(run.recipe.policy.path)))
    norm = clip(run.trained, config.max_grad_norm)
    run.window.add({"grad_norm": norm})
    if accelerator.scaler is None:  # with a scaler an infinite gradient is ordinary: it skips the step itself
        watch.look(step + 1, norm + 0 * total.detach(), figures, seen, run.trained)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    run.stepper.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step = step + 1
    if run.average is not None:
        run.average.update(run.step)
    if check:
        selfcheck.check_ranks(run, {name: p.data for name, p in run.trained.items()}, "weights")
    return edits


class Streams:
    """The robot stream and, where the language loss has weight, the language stream, prepared ahead of the step."""

    def __init__(self, run: Run):
        recipe, accelerator = run.recipe, run.accelerator
        start = run.step * recipe.train.grad_accumulation
        self.device = run.device
        sources: list[RobotData | LanguageData] = [run.data]
        if recipe.language.weight > 0:
            sources.append(
                LanguageData(Path(recipe.language.root), recipe.language.batch_size, recipe.train.seed,
                             accelerator.process_index, accelerator.num_processes, recipe.language.turns)
            )  # fmt: skip
        self.sources = sources
        self.k = start
        self.queues = [Prefetch(self._maker(source), start, recipe.data.workers) for source in sources]

    def _maker(self, source: RobotData | LanguageData):
        # On the CPU the images become floats in the thread; on a GPU they travel as bytes and become floats there.
        if self.device.type == "cpu":
            return lambda k: source.finish(source.raw(k), k)
        if self.device.type == "cuda":
            return lambda k: pin(source.raw(k))
        return source.raw

    def next(self) -> tuple[Batch, Batch | None]:
        """The next robot batch and language batch (None without that stream), on the device."""
        batches = [next(queue) for queue in self.queues]
        if self.device.type != "cpu":
            batches = [s.finish(to_device(b, self.device), self.k) for s, b in zip(self.sources, batches, strict=True)]
        self.k += 1
        return batches[0], batches[1] if len(batches) > 1 else None

    @property
    def waited(self) -> float:
        """Seconds that the step has stood still for data."""
        return sum(queue.waited for queue in self.queues)

    def close(self) -> None:
        for queue in self.queues:
            queue.close()


def _seed_step(run: Run) -> None:
    """All randomness of a step follows from seed, rank and step.

    Dropout inside the libraries' modules knows only torch's global generators, so those are seeded too
    (not by torch.manual_seed, which takes half a millisecond to visit every kind of device).
    """
    seed = derive_seed(run.recipe.train.seed, run.accelerator.process_index, "step", run.step)
    run.generator.manual_seed(seed)
    run.shared_generator.manual_seed(derive_seed(run.recipe.train.seed, "shared", run.step))
    torch.default_generator.manual_seed(seed)
    if run.device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif run.device.type == "mps":
        torch.mps.manual_seed(seed)


def _row(run: Run, edits: dict[str, float], seconds: float, wait_share: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": run.step, "minutes": run.minutes()} | run.window.means()
    row |= {"lr": learning_rate(run.step - 1, run.recipe.train), "step_seconds": seconds, "data_wait_share": wait_share}
    row |= {name: float(value) for name, value in edits.items()}
    for objective in run.objectives.values():
        row |= {name: float(value) for name, value in objective.metrics().items()}
    return row


def _log(run: Run, metrics: Metrics | None, row: dict[str, Any]) -> None:
    if metrics is not None:
        metrics.write({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()})
    if run.recipe.train.trackers:
        run.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def _out_of_time(run: Run) -> bool:
    """Whether `max_minutes` are over, by the first rank's clock so that all ranks stop at the same step."""
    limit = run.recipe.train.max_minutes
    if limit <= 0:
        return False
    if run.accelerator.num_processes == 1:
        return run.minutes() >= limit
    over = torch.tensor(float(run.minutes() >= limit), device=run.device)
    torch.distributed.broadcast(over, src=0)
    return bool(over.item())


def _save(run: Run) -> None:
    if run.accelerator.is_main_process:
        checkpoint.save(run)
        if time.perf_counter() - run.drawn > CURVES_EVERY:
            draw_curves(run.output / "metrics.jsonl", run.output / "curves.png")
            run.drawn = time.perf_counter()
    run.accelerator.wait_for_everyone()


def _measure_retention(run: Run, metrics: Metrics | None) -> None:
    """Question loss and accuracy of the weights that would be exported now, on the held-out questions."""
    questions = run.recipe.eval.questions
    if questions.root and metrics is not None and not Path(questions.root).is_dir():
        run.say([f"no question folder at {questions.root}: retention is not measured (see burnish questions)"])
    elif questions.root and metrics is not None:
        from burnish.evaluate.retention import retention

        with checkpoint.exported(run) as policy:
            figures = retention(
                policy, Path(questions.root), limit=min(questions.limit or RETENTION_LIMIT, RETENTION_LIMIT)
            )
        row = {"step": run.step, "retention_loss": figures.loss, "retention_accuracy": figures.accuracy}
        _log(run, metrics, row)
    run.accelerator.wait_for_everyone()


def _finish(run: Run, metrics: Metrics | None) -> TrainResult:
    """Last figures, last checkpoint, exported policy, and train.json, which says that the run is done."""
    _measure_retention(run, metrics)
    _save(run)
    result = _result(run.output, run.step, {})
    if run.accelerator.is_main_process and metrics is not None:
        checkpoint.export(run)
        draw_curves(metrics.path, result.curves)
        final = {name: value for name, value in metrics.last.items() if name != "step"}
        about = {"steps": run.step, "data_hash": run.data.hash, "final": final, "recipe": recipe_to_dict(run.recipe)}
        write_json(run.output / "train.json", about)
        result = _result(run.output, run.step, final)
    if run.recipe.train.trackers:
        run.accelerator.end_training()
    run.accelerator.wait_for_everyone()
    return result


def check_resumable(recipe: RecipeConfig) -> None:
    """Raise BurnishError when the run folder holds a run of another recipe; nothing is loaded or written."""
    output = run_folder(recipe)
    newest = checkpoint.latest(output)
    if (output / "train.json").is_file():
        before = read_object(output / "train.json")["recipe"]
        checkpoint.check_same_recipe(before, recipe, output / "train.json")
    elif newest is not None:
        checkpoint.check_same_recipe(checkpoint.read_meta(newest)["recipe"], recipe, newest)


def _result(output: Path, steps: int, final: dict[str, float]) -> TrainResult:
    return TrainResult(output, output / "policy", output / "metrics.jsonl", output / "curves.png", steps, final)


def _finished(recipe: RecipeConfig, output: Path) -> TrainResult | None:
    """The result of an earlier run of this very recipe that came to its end, or to that of its time."""
    from burnish.data.frames import dataset_hash

    path = output / "train.json"
    if not path.is_file() or not (output / "policy").is_dir():
        return None
    done = read_object(path)
    checkpoint.check_same_recipe(done["recipe"], recipe, path)
    limit = recipe.train.max_minutes
    if done["steps"] < recipe.train.steps and (limit <= 0 or done["final"].get("minutes", 0.0) < limit):
        return None  # it ran out of time, and has more now
    if demos_root(recipe).is_dir() and dataset_hash(demos_root(recipe)) != done["data_hash"]:
        raise BurnishError(f"{output} was trained on other data than {demos_root(recipe)} holds now",
                           "the same data set", "another --output, or --fresh (train, run) to start over")  # fmt: skip
    return _result(output, done["steps"], done["final"])


def start_files(run: Run, resumed: bool) -> Metrics | None:
    """recipe.yaml and metrics.jsonl, on the first rank only."""
    if not run.accelerator.is_main_process:
        return None
    run.output.mkdir(parents=True, exist_ok=True)
    save_recipe(run.recipe, run.output / "recipe.yaml")
    return Metrics(run.output / "metrics.jsonl", run.step if resumed else -1)


def _static_checks(run: Run) -> list[str]:
    mapping = getattr(getattr(run.policy, "config", None), "normalization_mapping", {})
    mode = getattr(mapping.get("ACTION"), "value", "MEAN_STD")
    names = run.data.meta.features["action"].get("names") or range(run.data.actions.shape[1])
    names = names.get("axes", range(run.data.actions.shape[1])) if isinstance(names, dict) else names
    return selfcheck.normalisation_warnings(
        run.data.actions[run.data.rows], run.data.meta.stats["action"], [str(n) for n in names], mode
    )
