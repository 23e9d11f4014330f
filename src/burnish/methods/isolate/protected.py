"""The loss whose gradient is protected: on the robot batch, on questions, against an anchor or the frozen base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.types import Batch
from burnish.methods.inputs import Questions, forward, question_batches, robot_batches, token_groups
from burnish.methods.isolate.anchor import (
    Anchor,
    Provenance,
    build,
    build_from_questions,
    refuse_gap,
    token_distance,
    w2_diagonal,
    w2_normalised,
)
from burnish.methods.isolate.options import Inputs, Options
from burnish.methods.objective import Run
from burnish.methods.start import Frozen
from burnish.policies.base import Captured, Policy
from burnish.policies.vqa import PROMPT

GAP_SAMPLES = 64
"""Robot frames, or questions, on which a run's base is held against its anchor."""


class Source:
    """Computes the protected loss of a micro-batch.

    Args:
        run: the run; its policy still holds the weights that it starts from.
        options, inputs: see Options and Inputs; without an anchor file one is built here, from the policy as it is.
        questions: question folder, or "".

    Attributes:
        gaps: how far the base is from the anchor, on "questions" and "robot" inputs (see Anchor.gap).
    """

    def __init__(self, run: Run, options: Options, inputs: Inputs, questions: str):
        self.options = options
        self.layers = list(range(run.policy.num_layers))
        self.size = max(1, round(options.share * run.recipe.train.batch_size))
        self.questions = Questions(run, questions, self.size, options.turns) if options.asks else None
        self.frozen = self.anchor = None
        self.gaps: dict[str, float] = {}
        if options.needs_anchor:
            self.anchor = self._anchor(run, questions, inputs.anchor, inputs.anchor_samples).to(run.device)
            self._hold_against(run, questions, inputs.anchor)

    def begin(self, run: Run, trained: Mapping[str, Tensor]) -> None:
        """Keep the start, where it is compared with, of the trained backbone parameters (this rank's rows by name)."""
        if self.options.distance == "tokens" and self.options.protect != "answers":
            # An edit holds a gradient as large as the weights from step to step: the start waits on disk beside it.
            holding = run.holding if run.sharded else None
            self.frozen = Frozen(run.policy, trained, run.output if self.options.edits else None, holding)

    def loss(self, policy: Policy, batch: Batch, captured: Captured | None, k: int) -> Tensor:
        """The protected loss (scalar with graph) of micro-batch k.

        Args:
            policy: in training.
            captured: hidden states of the training forward where `options.shares_forward`.
            k: number of the micro-batch since the run began.
        """
        if self.options.protect == "answers":
            return policy.language(self.questions.batch(k)).mean
        if captured is not None:
            return self._distance(batch, captured, None)
        batch = self.questions.batch(k) if self.options.protect == "questions" else _head(batch, self.size)
        return self._distance(batch, *forward(policy, batch, self.layers))

    def _distance(self, batch: Batch, captured: Captured, answers: Tensor | None) -> Tensor:
        """Sum over layers and token groups of the distance of the states from the anchor."""
        options = self.options
        reference = None if self.frozen is None else self.frozen.call(forward, batch, self.layers)[0]
        masks = token_groups(captured, options.tokens, None if options.answers else answers)
        total = torch.zeros((), device=next(iter(masks.values())).device)
        for group, mask in masks.items():
            rows = mask.reshape(-1).nonzero().squeeze(1)
            if len(rows) == 0:  # an empty instruction has no text rows
                continue
            for layer in self.layers:
                states = captured.hidden[layer].flatten(0, 1)[rows].float()
                other = None if reference is None else reference.hidden[layer].flatten(0, 1)[rows]
                total = total + self._layer_distance(states, other, layer, group)
        return total

    def _layer_distance(self, states: Tensor, reference: Tensor | None, layer: int, group: str) -> Tensor:
        if reference is not None:
            return token_distance(states, reference)
        moments = self.anchor.moments[layer, group]
        distance = w2_diagonal if self.options.distance == "w2" else w2_normalised
        return distance(states, moments.mean, moments.variance)

    def _anchor(self, run: Run, questions: str, path: str, samples: int) -> Anchor:
        options = self.options
        wrong = options.control == "wrong_anchor"
        if path and not wrong:
            anchor = Anchor.load(Path(path))
            with torch.no_grad():
                captured, _ = forward(run.policy, _head(next(robot_batches(run, 1)), 1), [0])
            anchor.check(path, run.parent_hash, run.policy.num_layers, captured.hidden[0].shape[-1])
            _check_settings(anchor, path, {"tokens": options.tokens, "answers": options.answers})
            return anchor
        if not questions:
            raise BurnishError("isolate: nothing to build the anchor from", "questions: FOLDER or anchor: FILE",
                               "burnish data questions --help, or method: self_anchor")  # fmt: skip
        about = Provenance(run.parent_hash, run.policy.num_layers, 0, Path(questions).name, 0,
                           template=PROMPT, answers=options.answers, tokens=options.tokens)  # fmt: skip
        show = run.progress and run.accelerator.is_main_process
        return build_from_questions(run.policy, Path(questions), samples, run.recipe.train.batch_size, about,
                                    run.device, wrong=wrong, progress=show)  # fmt: skip

    def _hold_against(self, run: Run, questions: str, path: str) -> None:
        """Say how far the base is from the anchor, on questions and on the robot's inputs: nothing has drifted."""
        anchor, wrong = self.anchor, self.options.control == "wrong_anchor"
        self.gaps["questions"] = anchor.about.gap
        if questions and (path or wrong):
            size = min(run.recipe.train.batch_size, GAP_SAMPLES)
            asked = build(run.policy, question_batches(Path(questions), GAP_SAMPLES, size, 0, run.device), anchor.about)
            self.gaps["questions"] = anchor.gap(asked)
            if not wrong and anchor.about.source == Path(questions).name:
                refuse_gap(self.gaps["questions"], asked.about.samples, path)
        robot = build(run.policy, robot_batches(run, GAP_SAMPLES), anchor.about)
        self.gaps["robot"] = anchor.gap(robot)
        run.say([
            "isolate: before the first step the anchor loss is {questions:.3g} of the anchor's variance on questions "
            "and {robot:.3g} on the robot's inputs".format(**self.gaps)
        ])  # fmt: skip


def _check_settings(anchor: Anchor, path: str, wanted: dict[str, Any]) -> None:
    command = "burnish method isolate anchor"
    fixes = {"tokens": f"{command} --tokens {wanted['tokens']}", "answers": f"{command}, with --answers or without"}
    for key, value in wanted.items():
        found = getattr(anchor.about, key)
        if found != value:
            raise BurnishError(f"{path} was built with {key}={found}", f"{key}={value} as the run wants",
                               fixes[key])  # fmt: skip


def _head(batch: Batch, size: int) -> Batch:
    return {key: value[:size] for key, value in batch.items()}
