"""One training run, built in one direction: policy and data, what is trained, its optimiser, and only then methods."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import remove_folder, sweep
from burnish.core.options import number
from burnish.core.outputs import claim, kind_of
from burnish.core.reading import read_object
from burnish.core.recipe import demos_root, load_recipe, run_folder, save_recipe
from burnish.core.seeding import derive_seed, generator
from burnish.core.types import Batch
from burnish.data.mix import recipe_hash
from burnish.methods import objective as seat
from burnish.methods.gradients import dot, dots, stream_gradients
from burnish.methods.objective import Objective
from burnish.train import checkpoint
from burnish.train.logging import Metrics, Window
from burnish.train.optim import Average, adamw, add_parameters, mixed, prepare
from burnish.train.setup import make_accelerator, make_objectives, policy_and_data, precision_note
from burnish.train.sharded import Shards, switch_parameters
from burnish.train.step import OWN, Step

log = logging.getLogger("burnish")
KIND = "training run"
"""What the marker of a run folder says; `burnish train` and `burnish run` share it."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left behind: folders, files, and the last value of every logged figure."""

    output: Path
    policy: Path
    metrics: Path
    curves: Path
    steps: int
    final: dict[str, float]


class Run(seat.Run):
    """The state of a run; methods see it as `burnish.methods.objective.Run`, which says what its parts are.

    Nothing that a run holds holds the run, so that it goes when its last user does.
    """

    def __init__(self, recipe: RecipeConfig, progress: bool = True):
        self.recipe, self.progress = recipe, progress
        self.output = run_folder(recipe)
        self.accelerator = make_accelerator(recipe, self.output)
        device = self.accelerator.device
        self.device = device if device.type != "cpu" else torch.device("cpu")  # ranks say cpu:0
        self.say(precision_note(recipe.train.precision, self.device))
        self.sharded = recipe.train.shard and self.accelerator.num_processes > 1
        self.step, self.number = 0, self.accelerator.process_index
        self._numbered = 0, 0
        self.window, self.drawn = Window(), time.perf_counter()
        self._minutes_before, self._started = 0.0, math.nan
        self.generator = generator(recipe.train.seed, "setup", device=str(self.device))
        self.shared_generator = generator(recipe.train.seed, "setup", device=str(self.device))
        self.objectives = make_objectives(recipe)
        self._refuse_whole_gradients()
        # One rank decodes the frames, the others wait for its lock: a barrier of ranks has a time limit.
        self.policy, self.data, self.parent_hash = policy_and_data(recipe, progress, str(self.device))
        prepare(self.policy, recipe, self.objectives.values())
        self.policy.to(self.device).train()
        self.trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.trained, recipe.train)
        with mixed(recipe.train, self.accelerator):
            for objective in self.objectives.values():
                objective.setup(self)
        self._module = Step(self.policy, self.objectives).to(self.device)
        self._take_in_objectives(self._module.trained())
        self._place()
        self.average = Average(self.trained, recipe.train.ema_decay) if recipe.train.ema_decay > 0 else None
        for objective in self.objectives.values():
            objective.begin(self)
        self.editors = [o for o in self.objectives.values() if type(o).edit_gradients is not Objective.edit_gradients]

    def _place(self) -> None:
        """Put everything where it is trained: whole on this device, or in rows over all ranks."""
        self._shards: Shards | None = None
        if not self.sharded:
            self.wrapped, self.stepper = self.accelerator.prepare(self._module, self.optimizer)
            return
        self._shards = Shards(self._module, self.policy.blocks(), self.accelerator)
        before, self.trained = self.trained, self._module.trained()
        switch_parameters(self.optimizer, before, self.trained)
        self.wrapped, self.stepper = self._module, self.accelerator.prepare_optimizer(self.optimizer)

    def _refuse_whole_gradients(self) -> None:
        whole = [name for name, objective in self.objectives.items() if objective.needs_full_gradients]
        if self.sharded and whole:
            raise BurnishError(f"objective '{whole[0]}' needs whole gradients; with train.shard each process has rows",
                               "an objective for rows", "--train.shard=false")  # fmt: skip

    def _take_in_objectives(self, trained: dict[str, nn.Parameter]) -> None:
        """Parameters that methods made in `setup` are trained and averaged with the policy's."""
        own = {name: p for name, p in trained.items() if name.startswith(OWN)}
        changed = (trained.keys() - own.keys()) ^ self.trained.keys()
        if changed:
            raise BurnishError(f"an objective switched requires_grad of '{min(changed)}' in setup",
                               "what is trained is chosen in Objective.choose_trained")  # fmt: skip
        self.trained |= own
        add_parameters(self.optimizer, own, self.recipe.train)

    def forward(self, batch: Batch, language: Batch | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss (scalar with gradient) and the detached terms by name; synchronised between ranks."""
        if self._shards is None:
            return self.wrapped(self._module.loss, self, batch, language)
        with self.accelerator.autocast():  # which accelerate itself puts around what it wraps
            return self.wrapped(self._module.loss, self, batch, language)

    def dot(self, one: seat.Tensors, other: seat.Tensors) -> Tensor:
        return self.total(dot(one, other))

    def norm(self, tensors: seat.Tensors) -> Tensor:
        return self.dot(tensors, tensors).sqrt()

    def dots(self, one: Iterable[Tensor], others: Sequence[Iterable[Tensor]], group: Tensor, count: int) -> Tensor:
        return self.total(dots(one, others, group, count))

    def total(self, partial: Tensor) -> Tensor:
        return partial if self._shards is None else self._shards.total(partial)

    def inner_backward(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._shards is None else self._shards.inner_backward()

    def stream_gradients(
        self, loss: Tensor, names: Sequence[str], take: Callable[[int, Tensor], None], retain_graph: bool = False
    ) -> None:
        if self._shards is None:
            stream_gradients(loss, [self.trained[name] for name in names], take, retain_graph)
            return
        found = self._shards.gradients(loss, self.trained, retain_graph)
        for index, name in enumerate(names):
            if name in found:
                take(index, found.pop(name))

    def holding(self, values: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        if self._shards is None:
            raise BurnishError("weights that are whole are not exchanged", "train.shard")
        return self._shards.holding(values, self.trained)

    def ask[T](self, call: Callable[..., T], *args: Any) -> T:
        return call(*args) if self._shards is None else self._shards.ask(call, *args)

    def number_of(self, micro: int) -> int:
        """`number` of a micro-batch of the step to come, on this rank."""
        step, count = self._numbered
        world = self.accelerator.num_processes
        count += (self.step - step) * self.recipe.train.grad_accumulation * world
        return count + micro * world + self.accelerator.process_index

    def seed_step(self, micro: int = 0) -> None:
        """All randomness of a micro-batch follows from the seed and its number, that of a step from seed and step.

        Dropout inside the libraries' modules knows only torch's global generators, so those are seeded too
        (not by torch.manual_seed, which takes half a millisecond to visit every kind of device).
        """
        self.number = self.number_of(micro)
        seed = derive_seed(self.recipe.train.seed, 0, "step", self.number)
        self.generator.manual_seed(seed)
        self.shared_generator.manual_seed(derive_seed(self.recipe.train.seed, "shared", self.step))
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def minutes(self) -> float:
        """Minutes of training so far, earlier calls included; what is made ready before the first step is not."""
        since = 0.0 if math.isnan(self._started) else time.perf_counter() - self._started
        return self._minutes_before + since / 60

    def start_clock(self) -> None:
        self._started = time.perf_counter()

    def log_state(self) -> dict[str, Any]:
        """Time and unlogged figures, as a checkpoint keeps them."""
        return {"minutes": self.minutes(), "window": self.window.state()}

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        meta = checkpoint.load(self, folder)
        self.step, self.window = meta["step"], Window(**meta["window"])
        self._numbered = meta["step"], meta["batches"]
        before = meta["processes"] * meta["recipe"].get("train", {}).get("grad_accumulation", 1)
        now = self.accelerator.num_processes * self.recipe.train.grad_accumulation
        if now != before:
            self.say([f"a step has {now} batches of {self.recipe.train.batch_size} from here on, and had {before}"])
        self._minutes_before = meta["minutes"]
        if meta["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(meta["scaler"])

    def say(self, lines: list[str]) -> None:
        for line in lines if self.accelerator.is_main_process else []:
            log.warning("%s", line)


def claim_run(output: Path) -> AbstractContextManager[Path]:
    """`claim` of a run folder; one of an earlier version, without a marker, is told by its files."""
    return claim(output, KIND, is_run)


def is_run(folder: Path) -> bool:
    """Whether a folder without a marker holds a run of `burnish train` or `burnish run`."""
    if any(folder.glob("checkpoints/*/burnish/meta.json")):
        return True
    told = {"train.json": {"steps", "recipe"}, "run.json": {"stages", "name"}}
    for name, keys in told.items():
        with suppress(BurnishError):
            if keys <= read_object(folder / name).keys():
                return True
    return False


def start_over(output: Path) -> None:
    """Delete what an earlier training of a claimed run folder left, and what was measured of it; nothing else."""
    for name in ("checkpoints", "policy", "adapter"):
        remove_folder(output / name)
    for folder in filter(Path.is_dir, (output / "eval").glob("*")):
        ours = kind_of(folder) == "evaluation" or {"settings.json", "episodes.jsonl"} <= set(os.listdir(folder))
        if ours or not os.listdir(folder):
            remove_folder(folder)
    with suppress(OSError):
        (output / "eval").rmdir()
    for name in ("train.json", "retention.json"):
        (output / name).unlink(missing_ok=True)


def tidy(output: Path) -> None:
    """Remove what killed writers left in a claimed run folder."""
    sweep(output / "checkpoints")
    for name in ("checkpoints", "policy", "adapter", "eval"):
        sweep(output, name)


def check_resumable(recipe: RecipeConfig) -> None:
    """Raise BurnishError when the run folder holds a run of another recipe; nothing is loaded or written."""
    output = run_folder(recipe)
    newest = checkpoint.latest(output)
    if (output / "train.json").is_file():
        done = _read_done(output)
        checkpoint.check_same_recipe(done["recipe"], recipe, output / "train.json", done["processes"])
    elif newest is not None:
        meta = checkpoint.read_meta(newest)
        checkpoint.check_same_recipe(meta["recipe"], recipe, newest, meta["processes"])


def result(output: Path, steps: int, final: dict[str, float]) -> TrainResult:
    """The result of the run in `output`."""
    return TrainResult(output, output / "policy", output / "metrics.jsonl", output / "curves.png", steps, final)


def finished(recipe: RecipeConfig, output: Path) -> TrainResult | None:
    """The result of an earlier run of this very recipe that came to its end, or to that of its time."""
    path = output / "train.json"
    if not path.is_file() or not (output / "policy").is_dir():
        return None
    done = _read_done(output)
    checkpoint.check_same_recipe(done["recipe"], recipe, path, done["processes"])
    limit = recipe.train.max_minutes
    if done["steps"] < recipe.train.steps and (limit <= 0 or done["final"].get("minutes", 0.0) < limit):
        return None  # it ran out of time, and has more now
    found = recipe_hash(recipe)
    if found and found != done["data_hash"]:
        raise BurnishError(f"{output} was trained on other data than {demos_root(recipe)} holds now",
                           "the same data set", "another --output, or --fresh (train, run) to start over")  # fmt: skip
    return result(output, done["steps"], done["final"])


def _read_done(output: Path) -> dict[str, Any]:
    """train.json of a run folder; BurnishError where it is damaged."""
    path = output / "train.json"
    done = {"processes": 1, **read_object(path)}  # those of earlier versions do not say
    wanted = {"steps": int, "data_hash": str, "final": dict, "recipe": dict, "processes": int}
    wrong = [key for key, kind in wanted.items() if type(done.get(key)) is not kind]
    if wrong or not number(done["final"].get("minutes", 0.0)):
        raise BurnishError(f"{path} is damaged ('{(wrong or ['minutes'])[0]}' of it)", "what `burnish train` wrote",
                           f"rm '{path}'")  # fmt: skip
    return done


def start_files(run: Run, resumed: bool) -> Metrics | None:
    """recipe.yaml and metrics.jsonl, on the first rank only."""
    if not run.accelerator.is_main_process:
        return None
    note_recipe(run.recipe, run.output / "recipe.yaml")
    return Metrics(run.output / "metrics.jsonl", run.step if resumed else -1)


def note_recipe(recipe: RecipeConfig, path: Path) -> None:
    """Write recipe.yaml, unless the file says the same already: it may be a person's, with comments."""
    with suppress(BurnishError):
        if path.is_file() and load_recipe(path) == recipe:
            return
    save_recipe(recipe, path)
