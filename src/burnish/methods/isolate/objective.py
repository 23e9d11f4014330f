"""`isolate`: the objective that keeps the VLM's knowledge while its policy is fine-tuned."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, PolicyLoss
from burnish.methods.isolate.adam import AdamWatch
from burnish.methods.isolate.layout import Layout, Vector
from burnish.methods.isolate.options import resolve
from burnish.methods.isolate.probe import Probe, check_probe
from burnish.methods.isolate.project import Direction, Edited, Rule, edit, edit_several, orthonormal
from burnish.methods.isolate.protected import Source
from burnish.methods.objective import OBJECTIVES, Objective, Run

if TYPE_CHECKING:
    from burnish.core.config import RecipeConfig
    from burnish.policies.base import Policy


@OBJECTIVES.register("isolate")
class Isolate(Objective):
    """Protects the backbone by the chosen method; all of them stand behind this one option.

    Args:
        method: auto, or a name of options.METHODS.
        questions: question folder (see `burnish questions`); "" takes the recipe's language.root.
        anchor: file of `burnish anchor build`; "" builds the anchor before the first step.
        anchor_samples: questions or robot frames to build it from (the paper's number).
        probe: what to watch beside the loss, see Probe; {} watches nothing.
        options: fields of Options that differ from the method's own.
    """

    def __init__(self, method: str = "auto", questions: str = "", anchor: str = "", anchor_samples: int = 3000,
                 probe: dict[str, Any] | None = None, **options: Any):  # fmt: skip
        super().__init__()
        self.given, self.root = options, questions
        self.anchor_path, self.anchor_samples, self.probe_options = anchor, anchor_samples, dict(probe or {})
        # Mistakes show before data is loaded.
        if not all(isinstance(value, str) for value in (questions, anchor)) or type(anchor_samples) is not int:
            raise BurnishError(f"isolate: questions {questions!r}, anchor {anchor!r}, "
                               f"anchor_samples {anchor_samples!r}", "two paths and a whole number")  # fmt: skip
        if anchor_samples < 1:
            raise BurnishError(f"isolate: anchor_samples is {anchor_samples}", "at least 1")
        check_probe(self.probe_options)
        self.method, self.options = resolve(method, options, questions or "later")

    def setup(self, run: Run) -> None:
        questions = self.root or run.recipe.language.root
        self.probe = Probe(run, questions, **self.probe_options) if self.probe_options else None
        self._micro, self._last_step = -1, -1
        self._sums: list[list[Tensor | None]] = []
        self._measured: dict[str, float | Tensor] = {}
        self._captured = None
        backbone = {name: p for name, p in run.policy.backbone_parameters() if p.requires_grad}
        self._backbone = backbone
        self.source = None
        if self.options.uses_source and self.options.protect != "random":
            self.source = Source(run, self.options, questions, self.anchor_path, self.anchor_samples)
        elif self.options.rule == "replay":
            self.source = Source(run, self.options, questions, "", 0)
        if not backbone and self.options.rule not in ("none", "freeze", "lora"):
            raise BurnishError(f"isolate: method '{self.method}' has nothing to protect, as the backbone is frozen",
                               "trained backbone parameters", "fewer patterns in train.freeze, or no isolate"
                               )  # fmt: skip
        if self.options.edits:
            self.layout = Layout({n: p.shape for n, p in backbone.items()}, self.options.granularity, run.device)
            self._direction: Direction | tuple[Tensor, Tensor] | None = None
            self._adam: AdamWatch | None = None
            self.in_place = self._edits_in_place(run)
        if self.options.rule == "l2sp":
            self._start = {name: p.detach().clone() for name, p in backbone.items()}

    def choose_trained(self, recipe: "RecipeConfig", policy: "Policy") -> None:
        resolve(self.method, self.given, self.root or recipe.language.root)  # by now it is known whether there are any
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
            _train_what_surrounds(recipe, policy)

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        if self.options.shares_forward and (self.options.rule == "penalty" or self._due(run)):
            with run.policy.capture(self.source.layers) as self._captured:
                yield
        else:
            yield

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        if run.step != self._last_step:
            self._micro, self._last_step, self._sums, self._measured = -1, run.step, [], {}
        self._micro += 1
        options, terms = self.options, {}
        k = run.step * run.recipe.train.grad_accumulation + self._micro
        captured, self._captured = self._captured, None
        if options.rule == "replay":
            # As in a mixed batch, a question counts as much as a robot frame; times `weight`.
            share = self.source.size / run.recipe.train.batch_size
            terms["replay"] = options.weight * share * run.policy.language(self.source.questions.batch(k)).mean
        elif options.rule == "penalty":
            (protected,) = self.source.losses(run.policy, batch, captured, k)
            terms["anchor"] = options.weight * protected
        elif options.edits and options.protect != "random" and self._due(run):
            self._take(run, self.source.losses(run.policy, batch, captured, k), shared=captured is not None)
        return terms

    def _due(self, run: Run) -> bool:
        """Whether the protected gradient is taken at this step.

        Also after every checkpoint, so that a resumed run, which has none, equals an uninterrupted one; and, where the
        run protects against itself, at its second step, since at the first it equals its start.
        """
        if self.options.edits and self._direction is None:
            return True
        second = self.options.protect == "self" and run.step == 1
        return second or run.step % self.options.every == 0 or run.step % run.recipe.train.save_every == 0

    def _take(self, run: Run, losses: Iterator[Tensor], shared: bool) -> None:
        """Add this micro-batch's protected gradients to the sums, without touching any `.grad`.

        torch.autograd.grad leaves the hooks that synchronise ranks alone, so this backward is local, and the ranks'
        sums are averaged once in `edit_gradients`.
        """
        parameters = list(self._backbone.values())
        scaler = run.accelerator.scaler
        scale = torch.ones((), device=run.device) if scaler is None else scaler.scale(torch.ones((), device=run.device))
        for number, loss in enumerate(losses):
            self._measured["isolate_protected_loss"] = loss.detach()
            with torch.autocast(run.device.type, enabled=False):
                grads = torch.autograd.grad(loss * scale, parameters, retain_graph=shared, allow_unused=True)
            grads = [None if g is None else g.float() / scale for g in grads] if scaler is not None else list(grads)
            if number == len(self._sums):
                self._sums.append(grads)
            else:
                before = self._sums[number]
                self._sums[number] = [
                    a if b is None else b if a is None else a + b for a, b in zip(before, grads, strict=True)
                ]

    @torch.no_grad()
    def edit_gradients(self, run: Run, batch: Batch, grads: dict[str, Tensor]) -> dict[str, float]:
        if self.options.rule == "l2sp":
            return self._pull_back(grads)
        if not self.options.edits:
            return {}
        mine = {name: grads[name] for name in self._backbone if name in grads}
        if self.options.rule == "replace":  # what questions reach is trained, whether actions reach it or not
            mine = {name: grads[name] if name in grads else torch.zeros_like(p) for name, p in self._backbone.items()}
        if not mine:
            return {}
        if self.options.protect == "random":
            self._sums = [[torch.randn(p.shape, generator=run.shared_generator, device=run.device)
                           for p in self._backbone.values()]]  # fmt: skip
        if self._sums:
            self._direction = self._refresh(run, mine)
        if self.in_place:
            return self._project(run, self.layout.pieces(mine))
        gradient = self.layout.flatten(mine)
        figures = self._project(run, gradient)
        edited = self.layout.views(gradient)
        grads.update({name: edited[name] for name in mine})
        return figures

    def _edits_in_place(self, run: Run) -> bool:
        """Whether gradients are edited where they lie; the other ways need them in one buffer (see `Layout`)."""
        options = self.options
        simple = options.rule != "replace" and options.optimiser == "plain" and not options.restore
        local = run.device.type == "cpu" and run.accelerator.num_processes == 1
        plain = all(p.is_contiguous() and p.dtype is torch.float32 for p in self._backbone.values())
        return simple and local and plain and options.directions == 1

    def _refresh(self, run: Run, reached: dict[str, Tensor]) -> "Direction | tuple[Tensor, Tensor]":
        """The protected direction(s) of this step, from what all micro-batches and ranks summed up.

        Parameters that the task does not reach stay as they are, so they are left out of the direction too.
        """
        named = [
            {n: g for n, g in zip(self._backbone, sums, strict=True) if g is not None and n in reached}
            for sums in self._sums
        ]
        self._sums = []
        if self.in_place:  # a sum does for a mean: the length of a direction does not matter
            return Direction(self.layout.pieces({n: g.contiguous() for n, g in named[0].items()}), self.layout)
        random, flats = self.options.protect == "random", []
        for one in named:
            flat = self.layout.flatten(one).div_(1 if random else self._micro + 1)
            if run.accelerator.num_processes > 1 and not random:
                flat = run.accelerator.reduce(flat, reduction="mean")
            flats.append(Direction(flat, self.layout))
        if len(flats) == 1:
            return flats[0]
        return orthonormal(torch.stack([one.unit(self.layout) for one in flats]), self.layout)

    def _project(self, run: Run, gradient: Vector) -> dict[str, float]:
        """Edit `gradient` [P] in place; the figures are tensors that are read when a row is logged."""
        options, direction, measured = self.options, self._direction, self._is_logged(run)
        if direction is None:
            return {}
        if options.rule == "replace":
            gradient.copy_(direction.flat).mul_(options.weight)
            return dict(self._measured)
        plain = gradient.clone() if options.optimiser != "plain" or options.symmetric else None
        rule = Rule(options.rule, options.strength)
        if self._adam is None and (measured or options.optimiser != "plain"):
            self._adam = AdamWatch(run.optimizer, self._backbone, self.layout)
        if isinstance(direction, tuple):
            edited = edit_several(gradient, *direction, self.layout, rule)
        else:
            metric = self._adam.metric(gradient, run.step + 1) if options.optimiser == "preconditioned" else None
            edited = edit(gradient, direction, self.layout, rule, metric, measured)
            if options.restore:
                gradient.add_(self._restoring(direction, plain), alpha=options.restore)
        if options.optimiser != "plain":  # the metric holds only if Adam's second moment is the one it was made of
            self._adam.route(plain, gradient, clipped=options.optimiser != "preconditioned")
        return self._figures(edited, direction) if measured else {}

    def _restoring(self, direction: Direction, plain: Tensor | None) -> Tensor:
        """[P]: the protected gradient itself, projected against the task gradient `plain` for PCGrad."""
        if not self.options.symmetric:
            return direction.flat
        own = direction.flat.clone()
        edit(own, Direction(plain, self.layout), self.layout, Rule("conflict"), measure=False)
        return own

    def _figures(self, edited: Edited, direction: "Direction | tuple[Tensor, Tensor]") -> dict[str, Any]:
        self._adam.measure(direction.flat if isinstance(direction, Direction) else direction[0].sum(0))
        return {
            "isolate_cosine": edited.cosine.mean(), "isolate_firing": edited.firing,
            "isolate_shed": edited.shed_overall, "isolate_shed_max": edited.shed.max(), **self._measured,
        }  # fmt: skip

    def _is_logged(self, run: Run) -> bool:
        step, config = run.step + 1, run.recipe.train
        return step % config.log_every == 0 or step >= config.steps

    def _pull_back(self, grads: dict[str, Tensor]) -> dict[str, float]:
        """L2-SP: the gradient of weight / 2 times the squared distance from the start."""
        names = [name for name in self._start if name in grads]
        away = torch._foreach_sub([self._backbone[n].detach() for n in names], [self._start[n] for n in names])
        torch._foreach_add_([grads[n] for n in names], away, alpha=self.options.weight)
        return {"isolate_distance": torch.stack(torch._foreach_norm(away)).norm()}

    def metrics(self) -> dict[str, float]:
        figures = {} if self.probe is None else self.probe.measure(self._last_step + 1)
        if self.options.edits and self._adam is not None and self._adam.leak is not None:
            figures["isolate_leak"] = float(self._adam.leak.mean())
            figures["isolate_leak_share"] = float((self._adam.leak > 0).double().mean())
        return figures


def _train_what_surrounds(recipe: "RecipeConfig", policy: "Policy") -> None:
    """Adapters freeze everything else; the action expert is new to the task and learns in full."""
    inside = {name for name, _ in policy.backbone_parameters()}
    adapted = [name for name, _ in policy.named_parameters() if ".lora_" in name and name not in inside]
    if adapted or recipe.train.train_only:  # the recipe says itself what is trained of the rest
        return
    for name, parameter in policy.named_parameters():
        if name not in inside and not any(re.search(p, name) for p in recipe.train.freeze):
            parameter.requires_grad_(True)
