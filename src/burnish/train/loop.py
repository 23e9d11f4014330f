"""The one training loop. It knows no method by name: objectives are called at fixed places, see methods/objective."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError, out_of_memory
from burnish.core.files import write_json
from burnish.core.progress import progress_bar
from burnish.core.recipe import recipe_to_dict, run_folder
from burnish.core.types import Batch
from burnish.train import checkpoint, selfcheck
from burnish.train.cost import fitted
from burnish.train.logging import Metrics, draw_curves, peak_memory
from burnish.train.optim import learning_rate, mixed
from burnish.train.run import Run, TrainResult, claim_run, finished, result, start_files, start_over, tidy
from burnish.train.selfcheck import DivergenceGuard
from burnish.train.setup import is_first_process, own_accelerate_state
from burnish.train.step import Streams, clip, gradients, write_back

RETENTION_LIMIT = 256
"""Questions asked when retention is measured during training."""
LEAST_SCALE = 1e-4
"""Of fp16's gradients: some 30 halvings below where it starts."""
CURVES_EVERY = 60.0
"""Seconds that pass at least before curves.png is drawn again (with the next checkpoint)."""


def train(recipe: RecipeConfig, *, resume: bool = True, progress: bool = True) -> TrainResult:
    """Fine-tune a policy as `recipe` says; goes on where an earlier, killed run of the same recipe stopped.

    Args:
        recipe: see core.config; `load_recipe` reads one.
        resume: False deletes the earlier checkpoints and figures of the run folder and starts over. A folder that
            holds files of another kind is refused either way.
        progress: show a progress bar.

    Returns:
        Paths and final figures. A finished run is not repeated.

    Raises:
        BurnishError: anything wrong with recipe, data, policy, checkpoint or disk, a loss or weights that are not
            finite, or an output folder that is somebody's work or is being written by another process.
    """
    recipe = fitted(recipe)
    output, first = run_folder(recipe), is_first_process()
    start = Path(recipe.policy.path).resolve()
    if not resume and recipe.policy.path and output.resolve() in start.parents:
        raise BurnishError(f"starting over in {output} would delete the policy {recipe.policy.path} that training "
                           "starts from", "a policy outside the run", "another --output")  # fmt: skip
    with claim_run(output) if first else nullcontext():
        if first:
            tidy(output)
        if resume and (done := finished(recipe, output)):
            if first:
                _drop_checkpoints(recipe, done)
            return done
        try:
            return _train(recipe, output, resume, progress)
        except (MemoryError, RuntimeError, OSError) as error:
            if not out_of_memory(error):
                raise
            size, passes = recipe.train.batch_size, recipe.train.grad_accumulation
            smaller = f"--train.batch_size={-(-size // 2)} --train.grad_accumulation={2 * passes}"
            if size == 1:
                smaller = "" if recipe.train.memory.checkpointing else "--train.memory.checkpointing=true"
            raise BurnishError(f"not enough memory to train on {size} samples at once", fix=smaller) from error


def _train(recipe: RecipeConfig, output: Path, resume: bool, progress: bool) -> TrainResult:
    with own_accelerate_state():
        run = Run(recipe, progress)
        if run.accelerator.is_main_process and not resume:
            start_over(output)
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
    config, accelerator = run.recipe.train, run.accelerator
    streams = Streams(run)
    watch = DivergenceGuard(run.output, accelerator.process_index, late=run.device.type != "cpu")
    first, since, waited = run.step, time.perf_counter(), 0.0
    shown = run.progress and accelerator.is_main_process
    bar = progress_bar(total=config.steps, initial=run.step, desc="training", unit="step", shown=shown)
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
                _check_scale(accelerator.scaler)
                elapsed = max(time.perf_counter() - since, 1e-9)
                row = _row(run, edits, elapsed / (run.step - last_logged), (streams.waited - waited) / elapsed, stop)
                bar.set_postfix(loss=f"{row['loss']:.4g}", wait=f"{row['data_wait_share']:.1%}", refresh=False)
                _log(run, metrics, row)
                since, waited, last_logged = time.perf_counter(), streams.waited, run.step
            pause = time.perf_counter()
            if config.retention_every and run.step % config.retention_every == 0 and not stop:
                _measure_retention(run, metrics)
            if run.step % config.save_every == 0 and not stop:
                watch.flush(run.trained)
                _save(run)
            since += time.perf_counter() - pause
            if stop:
                break
        watch.flush(run.trained)
    finally:
        bar.close()
        streams.close()


def train_step(run: Run, streams: Streams, watch: DivergenceGuard, check: bool = False) -> dict[str, float]:
    """One optimiser step over `grad_accumulation` micro-batches; returns the figures of the gradient edits."""
    config, accelerator, step = run.recipe.train, run.accelerator, run.step
    seen: dict[str, Batch] = {}
    figures: dict[str, Tensor] = {}
    for micro in range(config.grad_accumulation):
        run.seed_step(micro)
        batch, language = streams.next()
        with accelerator.accumulate(run.wrapped):
            total, terms = run.forward(batch, language)
            accelerator.backward(total)
        run.window.add({"loss": total.detach(), **{f"loss_{name}": value for name, value in terms.items()}})
        suffix = f"_{micro}" if config.grad_accumulation > 1 else ""
        seen |= {f"robot{suffix}": batch} | ({f"language{suffix}": language} if language else {})
        figures |= {f"{name}{suffix}": value for name, value in {**terms, "total": total.detach()}.items()}
    if config.self_check:
        with mixed(config, accelerator):
            selfcheck.check_cameras(run, batch)
    accelerator.unscale_gradients(run.stepper)
    edits: dict[str, float] = {}
    if run.editors:
        before = gradients(run.trained)
        grads = dict(before)
        for objective in run.editors:
            edits |= objective.edit_gradients(run, batch, grads)
        write_back(run.trained, grads, before)
    if check:
        selfcheck.check_ranks(run, gradients(run.trained), "gradients")
        run.say(selfcheck.report_unreached(run.trained))
        if step == 0 and config.imitation_weight > 0:
            run.say(selfcheck.loss_warning(terms["policy"].item(), bool(run.recipe.policy.path)))
    norm = clip(run.trained, config.max_grad_norm, run.total if run.sharded else None)
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


def _check_scale(scaler: torch.amp.GradScaler | None) -> None:
    """The scaler skips a step that overflows and halves its scale; one that does nothing else trains nothing."""
    if scaler is not None and scaler.get_scale() < LEAST_SCALE:
        raise BurnishError("every step overflows in fp16", "finite losses", "--train.precision=bf16, or no")


def _row(run: Run, edits: dict[str, float], seconds: float, wait_share: float, last: bool) -> dict[str, Any]:
    means = run.window.means()
    if run.accelerator.num_processes > 1:  # of the whole batch
        own = torch.tensor(list(means.values()), device=run.device)
        means = dict(zip(means, run.accelerator.reduce(own, "mean").tolist(), strict=True))
    row: dict[str, Any] = {"step": run.step, "minutes": run.minutes()} | means
    row |= {"lr": learning_rate(run.step - 1, run.recipe.train), "step_seconds": seconds, "data_wait_share": wait_share}
    row |= peak_memory(run.device) | {name: float(value) for name, value in edits.items()}
    with mixed(run.recipe.train, run.accelerator):
        for objective in run.objectives.values():
            if last:
                run.ask(objective.end, run)
            row |= {name: float(value) for name, value in run.ask(objective.metrics).items()}
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
    main = run.accelerator.is_main_process
    if main or run.sharded:
        checkpoint.save(run, run.log_state())
    if main and time.perf_counter() - run.drawn > CURVES_EVERY:
        draw_curves(run.output / "metrics.jsonl", run.output / "curves.png")
        run.drawn = time.perf_counter()
    run.accelerator.wait_for_everyone()


def _measure_retention(run: Run, metrics: Metrics | None) -> None:
    """Question loss and accuracy of the weights that would be exported now, on the held-out questions."""
    questions = run.recipe.eval.questions
    if questions.root and not Path(questions.root).is_dir():
        run.say([f"no question folder at {questions.root}: retention is not measured (see burnish data questions)"])
    elif questions.root and (metrics is not None or run.sharded):
        from burnish.evaluate.retention import retention

        limit = min(questions.limit or RETENTION_LIMIT, RETENTION_LIMIT)
        with checkpoint.exported(run) as policy, mixed(run.recipe.train, run.accelerator):
            figures = run.ask(partial(retention, limit=limit), policy, Path(questions.root))
        row = {"step": run.step, "retention_loss": figures.loss, "retention_accuracy": figures.accuracy}
        _log(run, metrics, row)
    run.accelerator.wait_for_everyone()


def _finish(run: Run, metrics: Metrics | None) -> TrainResult:
    """Last figures, last checkpoint, exported policy, and train.json, which says that the run is done."""
    _measure_retention(run, metrics)
    _save(run)
    done = result(run.output, run.step, {})
    if metrics is not None or run.sharded:
        checkpoint.export(run)
    if metrics is not None:
        draw_curves(metrics.path, done.curves)
        final = {name: value for name, value in metrics.last.items() if name != "step"}
        about = {"steps": run.step, "data_hash": run.data.hash, "final": final, "recipe": recipe_to_dict(run.recipe),
                 "processes": run.accelerator.num_processes}  # fmt: skip
        write_json(run.output / "train.json", about)
        done = result(run.output, run.step, final)
        _drop_checkpoints(run.recipe, done)
    if run.recipe.train.trackers:
        run.accelerator.end_training()
    run.accelerator.wait_for_everyone()
    return done


def _drop_checkpoints(recipe: RecipeConfig, done: TrainResult) -> None:
    """After the end the newest checkpoint is enough; a run that has only run out of time needs it to go on."""
    keep = 1 if recipe.train.keep_checkpoints is None else recipe.train.keep_checkpoints
    checkpoint.drop(done.output, keep if done.steps >= recipe.train.steps else max(1, keep))


def _static_checks(run: Run) -> list[str]:
    mode = run.policy.normalization("ACTION") or "MEAN_STD"
    names = run.data.meta.features["action"].get("names") or range(run.data.actions.shape[1])
    names = names.get("axes", range(run.data.actions.shape[1])) if isinstance(names, dict) else names
    return selfcheck.normalisation_warnings(
        run.data.actions[run.data.indices], run.data.meta.stats["action"], [str(n) for n in names], mode
    )
