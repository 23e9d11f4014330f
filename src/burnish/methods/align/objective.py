"""The objective `align`: multi-layer alignment of hidden vision tokens with a frozen 3D teacher.

Sun et al. 2026 (ROCKET, arXiv 2602.17951); one layer is Spatial Forcing (Li et al. 2025, arXiv 2510.12276).
docs/methods/align.md lists every option and where its default comes from.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.core.types import Batch, PolicyLoss
from burnish.data.augment import to_float
from burnish.data.feature_cache import CacheKey
from burnish.data.loader import RobotData, to_device
from burnish.methods.align.aligner import Aligner, coherence, cosine, pairwise_cosine, scale_gradient, token_grid
from burnish.methods.align.layers import Pairs, check_pairs, choose_pairs
from burnish.methods.align.options import AlignConfig, make_config
from burnish.methods.align.targets import IMAGES, choose_teacher, make_targets
from burnish.methods.objective import OBJECTIVES, Objective, Run, thaw
from burnish.policies.base import Captured, require
from burnish.teachers.base import Teacher, file_hash, fingerprint, make_teacher
from burnish.teachers.placing import Placement

STRONGEST = 1e6
"""lambda is never set above this: where the alignment gradient vanishes, no lambda gives it a norm."""
log = logging.getLogger("burnish")


@OBJECTIVES.register("align")
class Align(Objective):
    """Pulls hidden vision tokens of several layers towards a teacher's.

    The projectors are trained and saved with the run and never exported. With weight 0 nothing is built or called.

    Args:
        preset: default, spatial_forcing, paper or released_code.
        options: fields of options.AlignConfig.
    """

    def __init__(self, preset: str = "default", **options: Any):
        super().__init__()
        self.config = make_config(preset, options)
        self.captured: Captured | None = None
        self._figures: dict[str, Tensor] = {}
        self._measured = -1

    @property
    def on(self) -> bool:
        """Whether there is anything to align."""
        return self.config.weight > 0 or self.config.gradient_norm_ratio > 0

    def setup(self, run: Run) -> None:
        if not self.on:
            return
        config, policy = self.config, run.policy
        require(policy, "capture", "align")
        if not any(p.requires_grad for _, p in policy.backbone_parameters()):
            raise BurnishError("align: the backbone is frozen, so nothing can be aligned", "trained backbone layers",
                               thaw(run.recipe))  # fmt: skip
        if run.recipe.train.imitation_weight == 0:
            raise BurnishError("align: with train.imitation_weight 0 no forward is made whose tokens could be aligned",
                               "a weight above 0", "--train.imitation_weight=1.0")  # fmt: skip
        shapes = _probe(run)
        placements = place_views(run)
        grid = token_grid(shapes, policy.cameras, placements)
        self.spec = config.teacher or choose_teacher(Path(run.data.root), policy.cameras)
        teacher = make_teacher(self.spec, grid)
        if not config.teacher and run.accelerator.is_main_process:
            log.info("align: the teacher is %s", self.spec)
        pairs = self._pairs(run, len(teacher.widths))
        self.layers = sorted({0} | {s for s, _ in pairs})
        key = cache_key(config, teacher, pairs, run.data, policy.cameras, grid, placements)
        # No barrier of ranks: features may take hours, and a barrier has a time limit. The cache has a lock.
        self.targets = make_targets(
            self.spec, teacher, key, run.data, cache=config.cache, device=run.device, progress=run.progress
        )
        width = shapes.hidden[0].shape[-1]
        draws = generator(run.recipe.train.seed, "align")
        self.aligner = Aligner(config, pairs, width, teacher.widths, policy.cameras, key.shown(), draws).to(run.device)
        # lambda: a tensor, so that setting it costs no wait; a buffer, so that it resumes.
        self.register_buffer("strength", torch.tensor(float(config.weight or 1.0), device=run.device))

    def _pairs(self, run: Run, teacher_layers: int) -> Pairs:
        """The pairs of the options; says where a strategy finds fewer than it is named for."""
        config, student_layers = self.config, run.policy.num_layers
        if config.pairs:
            return check_pairs(config.pairs, student_layers, teacher_layers)
        chosen = choose_pairs(
            config.select, config.count, student_layers, teacher_layers, released=config.released_last
        )
        pairs = check_pairs(chosen, student_layers, teacher_layers)
        wanted = config.count if config.select == "e2m_last1" else int(config.select.partition("uniform-")[2] or 0)
        if len(pairs) < wanted:
            run.say([f"align: {config.select} makes {len(pairs)} of {wanted} pairs, {[list(pair) for pair in pairs]}: "
                     f"the student has {student_layers} layers, the teacher {teacher_layers}"])  # fmt: skip
        return pairs

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        if not self.on or run.step >= self.config.stop_after * run.recipe.train.steps:
            yield
            return
        with run.policy.capture(self.layers) as self.captured:
            yield

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        captured, self.captured = self.captured, None
        if captured is None:
            return {}
        config, states, schedule = self.config, dict(captured.hidden), self._schedule(run)
        ratio = config.gradient_norm_ratio
        factor = torch.ones_like(self.strength)
        if ratio:
            captured.hidden.update({layer: scale_gradient(state, factor) for layer, state in states.items()})
        losses = self.aligner(captured, self.targets(batch))
        total, task = self.aligner.total(losses), out.total * run.recipe.train.imitation_weight
        if torch.is_grad_enabled():
            trained = {layer: states[layer] for layer in self.layers if states[layer].requires_grad}
            if not trained:
                raise BurnishError("align: the backbone is frozen up to every aligned layer, so nothing can be aligned",
                                   "trained backbone layers", thaw(run.recipe))  # fmt: skip
            rows = captured.layout["image"]
            if config.measure_every and run.step % config.measure_every == 0 and run.step != self._measured:
                self._measured = run.step
                with run.inner_backward():
                    self._measure(trained, rows, losses, task)
            if ratio:  # what was measured saw a factor of 1; the backward pass to come sees lambda
                self._set_strength(run, min(trained.items()), rows, total, task)
                factor.copy_(self.strength * schedule)
        for (student, teacher), value in zip(self.aligner.pairs, losses, strict=True):
            self._figures[f"align_{student}_{teacher}"] = value.detach()
        # With a given ratio lambda acts on the student alone: multiplying the loss would also multiply the projectors'
        # gradient, and clipping by the norm of all gradients would then starve the task.
        return {"align": total if ratio else self.strength * schedule * total}

    def metrics(self) -> dict[str, float]:
        """Loss of each pair, lambda, and the last measurement of the gradients."""
        if not self.on:
            return {}
        figures = {"align_lambda": self.strength, **self._figures}
        return {name: float(value) for name, value in figures.items()}

    def get_extra_state(self) -> dict[str, Any]:
        """The last measurement, which a resumed run goes on logging."""
        return {"figures": {name: float(value) for name, value in self._figures.items()}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._figures = {name: torch.tensor(value) for name, value in state["figures"].items()}

    def _schedule(self, run: Run) -> float:
        config = self.config
        rise = min(1.0, (run.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if not config.decay:
            return rise
        return rise * 0.5 * (1 + math.cos(math.pi * run.step / (config.stop_after * run.recipe.train.steps)))

    def _measure(self, trained: dict[int, Tensor], rows_BS: Tensor, losses: list[Tensor], task: Tensor) -> None:
        """Gradients of every pair and of the task on the image tokens, at the shallowest and the deepest layer."""
        layers = sorted({min(trained), max(trained)})
        states = [trained[layer] for layer in layers]
        by_pair = [_gradients(loss, states, rows_BS) for loss in losses]
        by_task = _gradients(task, states, rows_BS)
        figures = {}
        for place, layer in enumerate(layers):
            chosen = [i for i, (student, _) in enumerate(self.aligner.pairs) if student >= layer]
            if not chosen:
                continue
            mine = [by_pair[i][place] for i in chosen]
            whole = sum(self.aligner.shares[i] * by_pair[i][place] for i in chosen)
            figures[f"align_coherence_{layer}"] = coherence(mine)
            figures[f"align_task_cosine_{layer}"] = cosine(whole, by_task[place])
            figures[f"align_push_{layer}"] = whole.norm()
            figures[f"align_task_push_{layer}"] = by_task[place].norm()
        matrix = pairwise_cosine([g[0] for g in by_pair])
        for a in range(len(losses)):
            for b in range(a):
                names = [f"{s}_{t}" for s, t in (self.aligner.pairs[b], self.aligner.pairs[a])]
                figures[f"align_cosine_{names[0]}_vs_{names[1]}"] = matrix[a, b]
        figures["align_projector_similarity"] = self.aligner.projectors.similarity()
        self._figures |= {name: value.detach() for name, value in figures.items()}

    def _set_strength(
        self, run: Run, shallowest: tuple[int, Tensor], rows_BS: Tensor, total: Tensor, task: Tensor
    ) -> None:
        """lambda that gives alignment's gradient on the shallowest image tokens its share of the norm of the task's.

        Measured at every step on the very batch: two gradients at one state, without those of any weight.
        """
        layer, state = shallowest
        with run.inner_backward():
            pulls = [_gradients(value, [state], rows_BS)[0] for value in (total, task)]
        squares = torch.stack([pull.float().square().sum() for pull in pulls])
        if run.accelerator.num_processes > 1:  # of the whole batch, and equal on all ranks
            squares = run.accelerator.reduce(squares, "mean")
        push, task_push = squares.sqrt()
        with torch.no_grad():
            wanted = self.config.gradient_norm_ratio * task_push / push.clamp_min(1e-30)
            self.strength.copy_(wanted.clamp_max(STRONGEST))
        self._figures |= {f"align_push_{layer}": push, f"align_task_push_{layer}": task_push}


def _gradients(value: Tensor, states: list[Tensor], rows_BS: Tensor) -> list[Tensor]:
    """Gradients of a scalar on the image tokens of some states, zero elsewhere."""
    found = torch.autograd.grad(value, states, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(s) if g is None else g * rows_BS[..., None] for g, s in zip(found, states, strict=True)]


def _probe(run: Run) -> Captured:
    """The token layout and the width of the policy, from one forward on two rows of the data."""
    data = run.data
    small: Batch = to_device({name: value[:2] for name, value in data.raw(0).items()}, run.device)
    small |= {key: to_float(small[key]) for key in data.cameras}
    draws = run.policy.draw(len(small["action"]), generator("align", "probe", device=str(run.device)))
    with torch.no_grad(), run.policy.capture([0]) as captured:
        run.policy.loss(small, draws)
    return captured


def place_views(run: Run) -> list[Placement]:
    """How the policy pads each camera's view, in the order of its cameras."""
    sizes = view_sizes(run.data, run.policy.cameras)
    return [Placement.of(run.policy.view_mask(size)) for size in sizes]


def view_sizes(data: RobotData, cameras: Sequence[str]) -> list[tuple[int, int]]:
    """[H, W] of each camera's frames as they are trained on."""
    arrays = data.frames.arrays
    sizes = [arrays[camera if camera in arrays else f"{IMAGES}{camera}"].shape[1:3] for camera in cameras]
    return [(int(height), int(width)) for height, width in sizes]


def cache_key(
    config: AlignConfig, teacher: Teacher, pairs: Pairs, data: RobotData, cameras: Sequence[str],
    grid: tuple[int, int], placements: Sequence[Placement] = (),
) -> CacheKey:  # fmt: skip
    """What the features of this run depend on; without `placements` no view is padded."""
    identity = dict(teacher.identity)
    if teacher.needs_geometry:  # depth and poses lie beside the data set, whose hash does not know them
        folder = Path(data.root) / "ground_truth"
        identity["geometry"] = fingerprint([file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()])
    return CacheKey(
        teacher=identity, data=data.hash, cameras=list(cameras),
        image_sizes=[list(size) for size in view_sizes(data, cameras)], layers=sorted({t for _, t in pairs}),
        grid=list(grid), pooling=config.pooling, positional=config.positional, standardise=teacher.standardise,
        format=config.cache_format, components=config.components,
        placed=[placement.numbers() for placement in placements],
    )  # fmt: skip
