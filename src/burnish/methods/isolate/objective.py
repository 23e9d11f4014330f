"""`isolate`: keeps the VLM's knowledge while its policy is fine-tuned (AEGIS, arXiv:2604.16067, and what competes)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.options import check, read_options
from burnish.core.types import Batch, PolicyLoss
from burnish.methods.gradients import Layout, Vector, dot, local, of_next_layers, own_rows, parts, stop_decay
from burnish.methods.inputs import Questions
from burnish.methods.isolate.options import Inputs, resolve
from burnish.methods.isolate.probe import Probe, ProbeOptions
from burnish.methods.isolate.project import AdamWatch, Direction, Edited, edit
from burnish.methods.isolate.protected import Source
from burnish.methods.objective import OBJECTIVES, Extra, Objective, Run, num_bytes, thaw
from burnish.methods.reference import train_around_adapters
from burnish.methods.start import Start
from burnish.policies.base import Captured, Policy, recomputing, require


@OBJECTIVES.register("isolate")
class Isolate(Objective):
    """Protects the backbone by the chosen method; all of them stand behind this one option.

    Args:
        method: auto, or a name of options.METHODS.
        questions, anchor, anchor_samples: see Inputs.
        probe: what to watch beside the loss, see ProbeOptions; {} watches nothing.
        options: fields of Options that differ from the method's own.
    """

    def __init__(self, method: str = "auto", questions: str = "", anchor: str = "", anchor_samples: int = 3000,
                 probe: dict[str, Any] | None = None, **options: Any):  # fmt: skip
        super().__init__()
        self.inputs = Inputs(questions, anchor, anchor_samples)
        check(self.inputs, "isolate")  # mistakes show before data is loaded
        self.watched = read_options(ProbeOptions, probe, "isolate: probe") if probe else None
        self.method, self.options = resolve(method, options)
        self.reads_moments = self.options.edits and self.options.rule != "replace"
        if self.options.control == "wrong_anchor" and anchor:
            raise BurnishError("isolate: an anchor file for a control that builds its own", "questions: FOLDER alone")

    def choose_trained(self, recipe: RecipeConfig, policy: Policy) -> None:
        if self.options.asks and not (self.inputs.questions or recipe.language.root):
            raise BurnishError(f"isolate: method '{self.method}' needs a question folder",
                               "questions: FOLDER or language.root",
                               "burnish data questions --help, or method: auto")  # fmt: skip
        if self.watched or (self.options.uses_source and self.options.protect != "answers"):
            require(policy, "capture", "isolate")
        if self.options.asks:
            require(policy, "language", "isolate")
        rule, others = self.options.rule, [entry["name"] for entry in recipe.objectives if entry["name"] != "isolate"]
        if rule in ("freeze", "replace") and (recipe.language.weight > 0 or (others and rule == "replace")):
            what = "language.weight" if recipe.language.weight > 0 else f"objective '{others[0]}'"
            raise BurnishError(f"isolate: by method '{self.method}' the backbone learns nothing from {what}",
                               "language.weight 0 and no other objective", "another method, such as l2sp")  # fmt: skip
        if rule == "freeze":
            for _, parameter in policy.backbone_parameters():
                parameter.requires_grad_(False)
        if rule == "lora":
            if recipe.train.peft.method == "none":
                raise BurnishError("isolate: method 'lora' needs adapters", "train.peft.method lora or dora",
                                   "--train.peft.method=lora")  # fmt: skip
            train_around_adapters(recipe, policy)

    def cost(self, recipe: RecipeConfig, policy: Policy) -> Extra:
        """The protected gradient, or the start, as large as what is trained of the backbone; and the questions."""
        options = self.options
        backbone = num_bytes(p for _, p in policy.backbone_parameters() if p.requires_grad)
        kept = backbone if options.edits or options.rule == "l2sp" else 0
        if options.uses_source and options.distance == "tokens" and options.protect != "answers" and not options.edits:
            kept += backbone
        asks = options.uses_source and not options.shares_forward or options.rule == "replay"
        return Extra(kept, max(1, round(options.share * recipe.train.batch_size)) if asks else 0)

    def setup(self, run: Run) -> None:
        options, questions = self.options, self.inputs.questions or run.recipe.language.root
        self.probe = Probe(run, questions, self.watched) if self.watched else None
        self._backbone = {name: p for name, p in run.policy.backbone_parameters() if p.requires_grad}
        if not self._backbone and options.rule not in ("none", "freeze", "lora"):
            raise BurnishError(f"isolate: method '{self.method}' has nothing to protect, as the backbone is frozen",
                               "trained backbone parameters", thaw(run.recipe))  # fmt: skip
        needs_source = options.uses_source or options.rule == "replay"
        self.source = Source(run, options, self.inputs, questions) if needs_source else None
        self._asked = self._answers(run, questions)
        self._micro, self._last_step, self._ended = -1, -1, False
        self._sum: list[Tensor | None] = []
        self._measured: dict[str, float | Tensor] = {}
        self._captured: Captured | None = None
        self._direction: Direction | None = None
        self._adam: AdamWatch | None = None
        for parameter in self._backbone.values() if options.edits or options.rule == "l2sp" else ():
            parameter.data = parameter.data.contiguous()

    def begin(self, run: Run) -> None:
        options = self.options
        self._backbone = {name: run.trained[name] for name in self._backbone}
        mine = {name: local(p) for name, p in self._backbone.items()}
        if self.source is not None:
            self.source.begin(run, mine)
        if options.edits or options.rule == "l2sp":
            granularity = options.granularity if options.edits else "global"
            shapes = {name: tensor.shape for name, tensor in mine.items()}
            self.layout = Layout(shapes, granularity, run.device, run.dots)
        if options.edits and options.rule != "replace":
            self._adam = AdamWatch(run.optimizer, self._backbone, self.layout)
        if options.rule == "l2sp":
            self._start = Start(mine)
        if options.rule not in ("none", "freeze", "lora"):
            stop_decay(run.optimizer, self._backbone)

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        if self.options.shares_forward and (self.options.rule == "penalty" or self._due(run)):
            with run.policy.capture(self.source.layers) as self._captured:
                yield
        else:
            yield

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        if run.step != self._last_step:
            self._micro, self._last_step, self._sum, self._measured = -1, run.step, [], {}
        self._micro += 1
        options = self.options
        k = run.number
        captured, self._captured = self._captured, None
        if options.rule == "replay":
            # As in a mixed batch, a question counts as much as a robot frame; times `weight`.
            share = self.source.size / run.recipe.train.batch_size
            return {"replay": options.weight * share * run.policy.language(self.source.questions.batch(k)).mean}
        if options.rule == "penalty":
            return {"anchor": options.weight * self.source.loss(run.policy, batch, captured, k)}
        if options.edits and options.protect != "random" and self._due(run):
            self._direction = None  # the old one and the new one are never in memory together
            self._take(run, self.source.loss(run.policy, batch, captured, k), shared=captured is not None)
        return {}

    def _due(self, run: Run) -> bool:
        """Whether the protected gradient is taken at this step.

        Also after every checkpoint, so that a resumed run, which has none, equals an uninterrupted one; and, where the
        run protects against itself, at its second step, since at the first it equals its start.
        """
        if self.options.edits and self._direction is None:
            return True
        second = self.options.protect == "self" and run.step == 1
        return second or run.step % self.options.every == 0 or run.step % run.recipe.train.save_every == 0

    def _take(self, run: Run, loss: Tensor, shared: bool) -> None:
        """Add this micro-batch's protected gradient to the sum; ranks are averaged once, in `edit_gradients`."""
        self._measured["isolate_protected_loss"] = loss.detach()
        scaler = run.accelerator.scaler
        scale = torch.ones((), device=run.device) if scaler is None else scaler.scale(torch.ones((), device=run.device))
        self._sum = self._sum or [None] * len(self._backbone)

        def add(index: int, gradient: Tensor) -> None:
            gradient = gradient if scaler is None else gradient.float() / scale
            before = self._sum[index]
            # Not in place: autograd may have handed the very same tensor to two parameters.
            self._sum[index] = gradient if before is None else before + gradient

        with torch.autocast(run.device.type, enabled=False):
            run.stream_gradients(loss * scale, list(self._backbone), add, retain_graph=shared)

    @torch.no_grad()
    def edit_gradients(self, run: Run, batch: Batch, grads: dict[str, Tensor]) -> dict[str, float]:
        if self.options.rule == "l2sp":
            return self._pull_back(run, grads)
        if not self.options.edits:
            return {}
        if self.options.rule == "replace":  # what questions reach is trained, whether actions reach it or not
            grads |= {name: torch.zeros_like(local(p)) for name, p in self._backbone.items() if name not in grads}
        mine = {name: grads[name].contiguous() for name in self._backbone if name in grads}
        grads |= mine
        if self.options.protect == "random":
            self._direction = None
            draws = {"generator": run.shared_generator, "device": run.device}
            self._sum = [own_rows(torch.randn(p.shape, **draws), p) for p in self._backbone.values()]
        if self._sum and mine:
            self._direction = self._refresh(run, mine)
        if self._direction is None or not mine:
            return {}
        gradient = self.layout.parts(mine)
        if self.options.rule == "replace":
            for part, questions in zip(gradient, self._direction.vector, strict=True):
                part.copy_(questions).mul_(self.options.weight)
            return dict(self._measured)
        return self._project(run, gradient, self._direction)

    def _refresh(self, run: Run, reached: dict[str, Tensor]) -> Direction:
        """The protected direction of this step, from what all micro-batches and ranks summed up.

        Parameters that the task does not reach stay as they are, so they are left out of the direction too.
        """
        found = {n: g for n, g in zip(self._backbone, self._sum, strict=True) if g is not None and n in reached}
        self._sum = []
        if run.accelerator.num_processes > 1 and not run.sharded and self.options.protect != "random":
            for name, gradient in reached.items():  # ranks must agree on the names, so none is left out
                own = found.get(name, torch.zeros_like(gradient))
                found[name] = run.accelerator.reduce(own, reduction="mean")
        if self.options.rule == "replace" and self._micro:  # elsewhere a direction's length does not matter
            found = {name: gradient / (self._micro + 1) for name, gradient in found.items()}
        if self.options.control == "shuffled":
            found = of_next_layers(found)
        return Direction(self.layout.parts({n: g.contiguous() for n, g in found.items()}), self.layout)

    def _project(self, run: Run, gradient: Vector, direction: Direction) -> dict[str, float]:
        """Edit `gradient` [P] in place; the figures are tensors that are read when a row is logged."""
        options = self.options
        in_metric = options.optimiser == "preconditioned"
        metric = partial(self._adam.metric, gradient, run.step + 1) if in_metric else None
        factor, edited = edit(gradient, direction, self.layout, options.rule, options.strength, metric, _is_logged(run))
        if options.optimiser != "plain":  # the metric holds only if Adam's second moment is the one it was made of
            self._adam.route(gradient, direction, factor, clipped=not in_metric)
        return {} if edited is None else self._figures(run, edited, direction)

    def _figures(self, run: Run, edited: Edited, direction: Direction) -> dict[str, Any]:
        self._adam.measure(direction)
        premise = {} if self._asked is None else {"isolate_answer_cosine": run.ask(self._answer_cosine, run, direction)}
        return {
            "isolate_cosine": edited.cosine.mean(), "isolate_conflict_rate": edited.conflict_rate,
            "isolate_removed_norm_fraction": edited.removed_overall,
            "isolate_removed_norm_fraction_max": edited.removed.max(), **premise, **self._measured,
        }  # fmt: skip

    def _answers(self, run: Run, questions: str) -> Questions | None:
        """Questions whose answers the protected gradient is compared with, where there are any and it is not theirs."""
        options = self.options
        projects = options.edits and options.rule != "replace" and options.protect != "answers"
        if not (projects and questions and run.policy.supports("language")):
            return None
        return Questions(run, questions, min(16, run.recipe.train.batch_size), 1)

    @torch.enable_grad()
    def _answer_cosine(self, run: Run, direction: Direction) -> Tensor:
        """Mean over groups of the cosine of the protected gradient and that of the loss on answers.

        What is protected stands for what the backbone knows only as far as this is above zero.
        """
        names = list(self._backbone)
        vector, square = direction.vector, direction.square
        found = torch.zeros(len(self.layout.groups), 2, dtype=torch.float64, device=run.device)

        def add(index: int, gradient: Tensor) -> None:
            found.add_(self.layout.dots_of(names[index], gradient.float().contiguous(), vector))

        with run.accelerator.autocast(), recomputing(run.policy):  # all gradients are there beside it
            loss = run.policy.language(self._asked.batch(run.step)).mean
        run.stream_gradients(loss, names, add)
        along, own = run.total(found).unbind(1)
        scale = (own * square).sqrt()
        return torch.where(scale > 0, along / scale, 0.0).sum() / (scale > 0).sum().clamp_min(1)

    def _pull_back(self, run: Run, grads: dict[str, Tensor]) -> dict[str, float]:
        """L2-SP: the gradient of weight / 2 times the squared distance from the start."""

        def away(names: Iterable[str]) -> Iterator[Tensor]:
            return chain.from_iterable(self._start.away(name, local(self._backbone[name])) for name in names)

        mine = {name: grads[name].contiguous() for name in self._backbone if name in grads}
        grads |= mine
        for part, distance in zip(parts(mine), away(mine), strict=True):
            part.add_(distance, alpha=self.options.weight)
        if not _is_logged(run):
            return {}
        square = sum(dot([part], [part]) for part in away(self._backbone))
        return {"isolate_distance": run.total(square).sqrt()}

    def end(self, run: Run) -> None:
        self._ended = True

    def metrics(self) -> dict[str, float]:
        figures = {} if self.probe is None else self.probe.measure(self._last_step + 1, self._ended)
        if self.source is not None:
            figures |= {f"isolate_gap_{inputs}": gap for inputs, gap in self.source.gaps.items()}
        if self._adam is not None and self._adam.leak is not None:
            figures["isolate_leak"] = float(self._adam.leak.mean())
            figures["isolate_leak_share"] = float((self._adam.leak > 0).double().mean())
        return figures


def _is_logged(run: Run) -> bool:
    step, config = run.step + 1, run.recipe.train
    return step % config.log_every == 0 or step >= config.steps
