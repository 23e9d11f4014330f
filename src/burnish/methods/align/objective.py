"""The objective `align`: multi-layer alignment of hidden vision tokens with a frozen 3D teacher.

Sun et al. 2026 (ROCKET, arXiv 2602.17951); one layer is Spatial Forcing (Li et al. 2025, arXiv 2510.12276).
docs/methods/align.md lists every option and where its default comes from.
"""

import math
from collections.abc import Iterator
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
from burnish.data.loader import to_device
from burnish.methods.align.aligner import Aligner, square_grid
from burnish.methods.align.coherence import coherence, cosine, pairwise_cosine, scale_gradient
from burnish.methods.align.layers import check_pairs, choose_pairs
from burnish.methods.align.options import make_config
from burnish.methods.align.targets import make_targets
from burnish.methods.objective import OBJECTIVES, Objective, Run
from burnish.policies.base import Captured, require
from burnish.teachers.base import file_hash, fingerprint, make_teacher

STRONGEST = 100.0
"""lambda is never set above this: where the alignment gradient vanishes, no lambda gives it a norm."""


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
                               "train.freeze, train.train_only or the policy's train_expert_only")  # fmt: skip
        if run.recipe.train.imitation_weight == 0:
            raise BurnishError("align: with train.imitation_weight 0 no forward is made whose tokens could be aligned",
                               "a weight above 0", "--train.imitation_weight=1.0")  # fmt: skip
        shapes = _probe(run)
        grid = square_grid(shapes, policy.cameras)
        teacher = make_teacher(config.teacher, grid)
        pairs = config.pairs or choose_pairs(
            config.select, config.count, policy.num_layers, len(teacher.widths), released=config.released_last
        )
        pairs = check_pairs(pairs, policy.num_layers, len(teacher.widths))
        self.layers = sorted({0} | {s for s, _ in pairs})
        key = cache_key(config, teacher, pairs, run.data, policy.cameras, grid)
        with run.accelerator.main_process_first():
            self.targets = make_targets(
                config.teacher, teacher, key, run.data, cache=config.cache, device=run.device,
                progress=run.progress and run.accelerator.is_main_process,
            )  # fmt: skip
        width = shapes.hidden[0].shape[-1]
        draws = generator(run.recipe.train.seed, "align")
        self.aligner = Aligner(config, pairs, width, teacher.widths, policy.cameras, draws).to(run.device)
        # lambda: a tensor, so that setting it costs no wait; a buffer, so that it resumes.
        self.register_buffer("strength", torch.tensor(float(config.weight or 1.0), device=run.device))

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
        strength = self.strength * self._schedule(run)  # a copy: a measurement changes the buffer in place
        states = dict(captured.hidden)
        if self.config.gradient_norm_ratio:
            captured.hidden.update({layer: scale_gradient(state, strength) for layer, state in states.items()})
        losses = self.aligner(captured, self.targets(batch))
        total = self.aligner.total(losses)
        every = self.config.measure_every
        if every and run.step % every == 0 and run.step != self._measured:
            self._measured = run.step
            task = out.total * run.recipe.train.imitation_weight
            self._measure(run, states, captured.layout["image"], losses, task)
        for (student, teacher), value in zip(self.aligner.pairs, losses, strict=True):
            self._figures[f"align_{student}_{teacher}"] = value.detach()
        # With a given ratio lambda acts on the student alone: multiplying the loss would also multiply the projectors'
        # gradient, and clipping by the norm of all gradients would then starve the task.
        return {"align": total if self.config.gradient_norm_ratio else strength * total}

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

    def _measure(
        self, run: Run, hidden: dict[int, Tensor], rows_BS: Tensor, losses: list[Tensor], task: Tensor
    ) -> None:
        """Gradients of every pair and of the task with respect to the image tokens of each captured layer."""
        trained = [layer for layer in self.layers if hidden[layer].requires_grad]
        if not trained:
            raise BurnishError(
                "align: the backbone is frozen up to every aligned layer, so nothing can be aligned",
                "trained backbone layers", "train.freeze, train.train_only or the policy's train_expert_only",
            )  # fmt: skip
        states = [hidden[layer] for layer in trained]

        def gradients(value: Tensor, divisor: Tensor | float = 1.0) -> list[Tensor]:
            found = torch.autograd.grad(value, states, retain_graph=True, allow_unused=True)
            return [s.new_zeros(()).expand_as(s) if g is None else g * rows_BS[..., None] / divisor
                    for g, s in zip(found, states, strict=True)]  # fmt: skip

        lam = self.strength * self._schedule(run)
        by_pair = [gradients(loss, lam.clamp_min(1e-12) if self.config.gradient_norm_ratio else 1.0) for loss in losses]
        by_task = gradients(task)
        figures = {}
        for place, layer in enumerate(trained):
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
        if self.config.gradient_norm_ratio:
            self._set_strength(run, figures[f"align_push_{trained[0]}"], figures[f"align_task_push_{trained[0]}"])

    @torch.no_grad()
    def _set_strength(self, run: Run, push: Tensor, task_push: Tensor) -> None:
        """lambda that gives alignment's gradient on the shallowest image tokens its share of the norm of the task's."""
        if run.accelerator.num_processes > 1:  # ranks see different batches and must agree
            push, task_push = run.accelerator.reduce(torch.stack([push, task_push]), "mean")
        wanted = (self.config.gradient_norm_ratio * task_push / push.clamp_min(1e-12)).clamp_max(STRONGEST)
        self.strength.copy_(wanted if run.step == 0 else 0.8 * self.strength + 0.2 * wanted)


def _probe(run: Run) -> Captured:
    """The token layout and the width of the policy, from one forward on two rows of the data."""
    data = run.data
    small: Batch = to_device({name: value[:2] for name, value in data.raw(0).items()}, run.device)
    small |= {key: to_float(small[key]) for key in data.cameras}
    draws = run.policy.draw(len(small["action"]), generator("align", "probe", device=str(run.device)))
    with torch.no_grad(), run.policy.capture([0]) as captured:
        run.policy.loss(small, draws)
    return captured


def cache_key(config, teacher, pairs, data, cameras, grid) -> CacheKey:
    """What the features of this run depend on.

    Raises:
        BurnishError: images are not square, so the policy pads them and tokens lie elsewhere than the teacher's.
    """
    sizes = {tuple(array.shape[1:3]) for array in data.frames.arrays.values()}
    if len(sizes) > 1:
        raise BurnishError(f"align: views of several sizes, {' and '.join(f'{h}x{w}' for h, w in sorted(sizes))}",
                           "one size for all cameras", "--data.image_size=...")  # fmt: skip
    size = sizes.pop()
    if size[0] != size[1]:
        raise BurnishError(
            f"align: views of {size[0]}x{size[1]} pixels, which the policy pads to a square",
            "square views", "cut or pad the data set's images",
        )  # fmt: skip
    identity = dict(teacher.identity)
    if teacher.needs_geometry:  # depth and poses lie beside the data set, whose hash does not know them
        folder = Path(data.root) / "ground_truth"
        identity["geometry"] = fingerprint([file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()])
    return CacheKey(
        teacher=identity, data=data.hash, cameras=list(cameras), image_size=[int(edge) for edge in size],
        layers=sorted({t for _, t in pairs}), grid=list(grid), pooling=config.pooling, positional=config.positional,
        standardise=teacher.standardise, format=config.cache_format, components=config.components,
    )  # fmt: skip
