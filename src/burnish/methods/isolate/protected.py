"""The loss whose gradient is protected: on the robot batch, on questions, against an anchor or the frozen base."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed
from burnish.core.types import Batch
from burnish.methods.isolate import distances
from burnish.methods.isolate.anchor import Anchor, Provenance, build, forward, question_batches, token_groups
from burnish.methods.isolate.options import Inputs, Options
from burnish.methods.objective import Run

if TYPE_CHECKING:
    from burnish.policies.base import Captured, Policy


class Questions:
    """Question batches beside the robot batches; batch k follows from the run's seed, k and the rank."""

    def __init__(self, run: Run, root: str, batch_size: int, turns: int):
        from burnish.data.loader import LanguageData

        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        seed = derive_seed(run.recipe.train.seed, "isolate")
        self.data = LanguageData(Path(root), batch_size, seed, rank, world, turns)
        self.device = run.device

    def batch(self, k: int) -> Batch:
        """Batch k, on the run's device."""
        from burnish.data.loader import to_device

        return self.data.finish(to_device(self.data.raw(k), self.device), k)


class Source:
    """Computes the protected loss of a micro-batch.

    Args:
        run: the run; its policy still holds the weights that it starts from.
        options, inputs: see Options and Inputs; without an anchor file one is built here, from the policy as it is.
        questions: question folder, or "".
    """

    def __init__(self, run: Run, options: Options, inputs: Inputs, questions: str):
        self.options = options
        self.layers = list(range(run.policy.num_layers))
        self.size = max(1, round(options.share * run.recipe.train.batch_size))
        self.questions = Questions(run, questions, self.size, options.turns) if options.asks else None
        self.frozen = self.anchor = None
        if options.distance == "tokens" and options.protect != "answers":
            self.frozen = copy.deepcopy(run.policy).eval().requires_grad_(False)
        if options.needs_anchor:
            self.anchor = self._anchor(run, questions, inputs.anchor, inputs.anchor_samples).to(run.device)

    def loss(self, policy: "Policy", batch: Batch, captured: "Captured | None", k: int) -> Tensor:
        """The protected loss (scalar with graph) of micro-batch k.

        Args:
            policy: in training.
            batch: robot batch.
            captured: hidden states of the training forward where `options.shares_forward`.
            k: number of the micro-batch since the run began.
        """
        if self.options.protect == "answers":
            return policy.language(self.questions.batch(k)).mean
        if captured is not None:
            return self._distance(batch, captured, None)
        batch = self.questions.batch(k) if self.options.protect == "questions" else _head(batch, self.size)
        return self._distance(batch, *forward(policy, batch, self.layers))

    def _distance(self, batch: Batch, captured: "Captured", answers: Tensor | None) -> Tensor:
        """Sum over layers and token groups of the distance of the states from the anchor."""
        options = self.options
        reference = None
        if self.frozen is not None:
            with torch.no_grad():
                reference, _ = forward(self.frozen, batch, self.layers)
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
            return distances.tokens(states, reference)
        moments = self.anchor.moments[layer, group]
        distance = distances.w2_diagonal if self.options.distance == "w2" else distances.w2_normalised
        return distance(states, moments.mean, moments.variance)

    def _anchor(self, run: Run, questions: str, path: str, samples: int) -> Anchor:
        from burnish.policies.vqa import PROMPT

        options = self.options
        if path:
            anchor = Anchor.load(Path(path))
            with torch.no_grad():
                captured, _ = forward(run.policy, _head(next(robot_batches(run, 1)), 1), [0])
            anchor.check(path, run.parent_hash, run.policy.num_layers, captured.hidden[0].shape[-1])
            _check_settings(anchor, path, {"inputs": "questions", "tokens": options.tokens, "answers": options.answers})
            return anchor
        if not questions:
            raise BurnishError("isolate: nothing to build the anchor from", "questions: FOLDER or anchor: FILE",
                               "burnish data questions --help, or method: self_anchor")  # fmt: skip
        about = Provenance(run.parent_hash, run.policy.num_layers, 0, "questions", Path(questions).name, 0,
                           template=PROMPT, answers=options.answers, tokens=options.tokens)  # fmt: skip
        size, show = min(run.recipe.train.batch_size, samples), run.progress and run.accelerator.is_main_process
        return build(run.policy, question_batches(Path(questions), samples, size, 0, run.device, progress=show), about)


def _check_settings(anchor: Anchor, path: str, wanted: dict[str, Any]) -> None:
    command = "burnish method isolate anchor"
    fixes = {"tokens": f"{command} --tokens {wanted['tokens']}", "answers": f"{command}, with --answers or without"}
    for key, value in wanted.items():
        found = getattr(anchor.about, key)
        if found != value:
            raise BurnishError(f"{path} was built with {key}={found}", f"{key}={value} as the run wants",
                               fixes.get(key, "another anchor"))  # fmt: skip


def robot_batches(run: Run, samples: int) -> Iterator[Batch]:
    """The first batches of the run's data, about `samples` frames."""
    from burnish.data.loader import to_device

    count = max(1, samples // run.recipe.train.batch_size)
    for k in range(count):
        yield run.data.finish(to_device(run.data.raw(k), run.device), k)


def _head(batch: Batch, size: int) -> Batch:
    return {key: value[:size] for key, value in batch.items()}
