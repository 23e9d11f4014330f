"""Asymmetric distillation: a policy with attention over blocks learns from one whose tokens all see one another.

Fast-dVLA (arXiv 2603.25661), equation 4, after D2F (arXiv 2508.09192): both get the same partly hidden tokens; on the
hidden ones the student's distribution is drawn to the teacher's, which also sees the later blocks. Labels serve only to
make the input.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.options import option, read_options
from burnish.core.reading import read_object
from burnish.core.renames import POLICY_FIELDS, rename
from burnish.core.types import Batch, PolicyLoss
from burnish.methods.objective import OBJECTIVES, Extra, Objective, Run, num_bytes
from burnish.methods.reference import check_adapters, without_adapters
from burnish.policies.base import Policy, TokenForward, require
from burnish.policies.discrete.losses import inverse_share
from burnish.policies.keys import CONFIG
from burnish.policies.load import resolve


def divergence(teacher: Tensor, student: Tensor, direction: str = "forward") -> Tensor:
    """Kullback-Leibler divergence of every token, in nats.

    Args:
        teacher, student: logits [..., V].
        direction: "forward" is KL(teacher || student), what D2F's code minimises; "reverse" is KL(student || teacher),
            what both papers print.

    Returns:
        [...], with gradient where the arguments have one.
    """
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    if direction == "reverse":
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class DistillOptions:
    """What the objective does."""

    teacher: str = option(
        "adapters_off", "the policy without its LoRA layers (needs train.peft), or a frozen copy of its start",
        choices=("adapters_off", "copy"),
    )  # fmt: skip
    direction: str = option("forward", "see `divergence`", choices=("forward", "reverse"))
    weights: str = option("equal", "of tokens, see `inverse_share`", choices=("equal", "inverse_share"))
    weight: float = option(1.0, "of the loss", least=0)


@OBJECTIVES.register("distill")
class Distill(Objective):
    """Draws a block-causal burnish_discrete towards what it would say with attention over the whole chunk.

    `train.imitation_weight: 0` is the paper's loss; above 0 the cross-entropy against the labels is added, on the same
    forward.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.options = read_options(DistillOptions, options, "distill")
        self._seen: list[TokenForward] = []
        self._agreement: Tensor | None = None

    def cost(self, recipe: RecipeConfig, policy: Policy) -> Extra:
        kept = num_bytes(p for p in policy.parameters() if p.requires_grad) if self.options.teacher == "copy" else 0
        return Extra(kept, 0 if recipe.train.imitation_weight > 0 else recipe.train.batch_size)

    def setup(self, run: Run) -> None:
        policy = run.policy
        require(policy, "masked_diffusion", "distill")
        student = policy.token_model()
        self.block, self.teacher_block = student.block, student.length
        self.teacher_prompt = student.prompt_sees_actions or _prompt_sees_actions(run.recipe.policy.path)
        if self.teacher_block == self.block and self.teacher_prompt == student.prompt_sees_actions:
            raise BurnishError(f"distill: a student that sees all {self.block} tokens at once, as its teacher does",
                               "blocks", f"--policy.overrides.block_size={policy.action_dim}")  # fmt: skip
        # In a list, so that the copy is neither trained nor saved with the run.
        self._copy: list[Policy] = []
        if self.options.teacher == "copy":
            # Those that are not trained stay what they are, and one of each is enough.
            frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
            self._copy = [copy.deepcopy(policy, frozen).eval().requires_grad_(False)]
        else:
            check_adapters(policy)

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        with run.policy.watch_tokens() as self._seen:
            yield

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        if not self._seen:  # without imitation loss the loop runs no forward of its own
            with self.watch(run):
                run.policy.loss(batch, run.policy.draw(len(batch["action"]), run.generator))
        student, self._seen = self._seen[-1], []
        teacher = self._ask_teacher(run.policy, batch, student)
        weight = student.weight
        if self.options.weights == "inverse_share":
            weight = weight * inverse_share(student.hidden, self.block)
        nats = divergence(teacher, student.logits, self.options.direction)
        with torch.no_grad():
            same = (teacher.argmax(-1) == student.logits.argmax(-1)) & (weight > 0)
            self._agreement = same.sum() / (weight > 0).sum().clamp_min(1)
        return {"distill": self.options.weight * (nats * weight).sum() / weight.sum().clamp_min(1)}

    def metrics(self) -> dict[str, float]:
        """Share of hidden tokens on which student and teacher prefer the same id."""
        return {} if self._agreement is None else {"distill_agreement": float(self._agreement)}

    @torch.no_grad()
    def _ask_teacher(self, policy: Policy, batch: Batch, student: TokenForward) -> Tensor:
        asked = self._copy[0] if self._copy else policy
        with without_adapters(policy) if not self._copy else nullcontext():
            return asked.token_logits(batch, student, self.teacher_block, self.teacher_prompt)


def _prompt_sees_actions(parent: str) -> bool:
    """Whether the prompt of the policy that training starts from saw actions: as teacher it does so still."""
    if not parent:
        return False
    fields = read_object(resolve(parent) / CONFIG)
    return bool(rename(fields, POLICY_FIELDS.get(fields.get("type"), {})).get("prompt_sees_actions"))
