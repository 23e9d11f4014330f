"""Asymmetric distillation: a policy with attention over blocks learns from one whose tokens all see one another.

Fast-dVLA (arXiv 2603.25661), equation 4, after D2F (arXiv 2508.09192): both get the same partly hidden tokens; on the
hidden ones the student's distribution is drawn to the teacher's, which also sees the later blocks. Labels serve only to
make the input.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.files import read_object
from burnish.core.options import number
from burnish.core.types import Batch, PolicyLoss
from burnish.methods.objective import OBJECTIVES, Objective
from burnish.methods.reference import check_adapters, without_adapters
from burnish.policies.discrete.policy import Discrete, TokenForward

if TYPE_CHECKING:
    from burnish.methods.objective import Run

DIRECTIONS, TEACHERS, WEIGHTS = ("forward", "reverse"), ("adapters_off", "copy"), ("equal", "inverse_share")


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


def inverse_share(hidden: Tensor, block: int) -> Tensor:
    """[B, L]: for each token the block's length over its number of hidden tokens; D2F divides by the share drawn."""
    blocks = hidden.view(len(hidden), -1, block).float()
    return (block / blocks.sum(-1).clamp_min(1)).repeat_interleave(block, dim=1)


@OBJECTIVES.register("distill")
class Distill(Objective):
    """Draws a block-causal burnish_discrete towards what it would say with attention over the whole chunk.

    `train.imitation_weight: 0` is the paper's loss; above 0 the cross-entropy against the labels is added, on the same
    forward.

    Args:
        teacher: "adapters_off" is the policy without its LoRA layers (needs train.peft), "copy" a frozen copy of the
            weights that the run starts from.
        direction: see `divergence`.
        weights: "equal", or "inverse_share", see that function.
        weight: of the loss.
        teacher_block: action tokens that see one another in the teacher; 0 means all.
    """

    def __init__(
        self,
        teacher: str = "adapters_off",
        direction: str = "forward",
        weights: str = "equal",
        weight: float = 1.0,
        teacher_block: int = 0,
    ):
        super().__init__()
        for name, value, known in (("teacher", teacher, TEACHERS), ("direction", direction, DIRECTIONS),
                                   ("weights", weights, WEIGHTS)):  # fmt: skip
            if value not in known:
                raise BurnishError(f"distill: {name} is '{value}'", f"one of {', '.join(known)}")
        if not number(weight) or weight < 0 or type(teacher_block) is not int or teacher_block < 0:
            raise BurnishError(f"distill: weight {weight!r}, teacher_block {teacher_block!r}",
                               "a weight of at least 0, and whole tokens or 0 for all")  # fmt: skip
        self.teacher, self.direction, self.weights, self.weight = teacher, direction, weights, weight
        self.teacher_block = teacher_block
        self._seen: list[TokenForward] = []
        self._agreement: Tensor | None = None

    def setup(self, run: "Run") -> None:
        policy = run.policy
        if not isinstance(policy, Discrete) or policy.config.training != "diffusion":
            raise BurnishError(f"distill: a {type(policy).__name__} without masked tokens",
                               "a burnish_discrete policy trained by diffusion")  # fmt: skip
        block = self.teacher_block or policy.length
        self.teacher_opened = policy.config.prompt_sees_actions or _opened(run.recipe.policy.path)
        if policy.length % block or (
            block == policy.config.block and self.teacher_opened == policy.config.prompt_sees_actions
        ):
            raise BurnishError(f"distill: a teacher with blocks of {block} tokens, a student with blocks of "
                               f"{policy.config.block}", f"blocks that divide {policy.length} and differ",
                               "--policy.overrides.block_size=" + str(policy.action_dim))  # fmt: skip
        if self.teacher == "adapters_off":
            check_adapters(policy)
        # In a list, so that the copy is neither trained nor saved with the run.
        self._copy: list[Any] = []
        if self.teacher == "copy":
            self._copy = [copy.deepcopy(policy).eval().requires_grad_(False)]

    @contextmanager
    def watch(self, run: "Run") -> Iterator[None]:
        with run.policy.watch_tokens() as self._seen:
            yield

    def loss(self, run: "Run", batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        if not self._seen:  # without imitation loss the loop runs no forward of its own
            with self.watch(run):
                run.policy.loss(batch, run.policy.draw(len(batch["action"]), run.generator))
        student, self._seen = self._seen[-1], []
        teacher = self._ask_teacher(run.policy, batch, student)
        weight = student.weight
        if self.weights == "inverse_share":
            weight = weight * inverse_share(student.hidden, run.policy.config.block)
        nats = divergence(teacher, student.logits, self.direction)
        with torch.no_grad():
            same = (teacher.argmax(-1) == student.logits.argmax(-1)) & (weight > 0)
            self._agreement = same.sum() / (weight > 0).sum().clamp_min(1)
        return {"distill": self.weight * (nats * weight).sum() / weight.sum().clamp_min(1)}

    def metrics(self) -> dict[str, float]:
        """Share of hidden tokens on which student and teacher prefer the same id."""
        return {} if self._agreement is None else {"distill_agreement": float(self._agreement)}

    @torch.no_grad()
    def _ask_teacher(self, policy: Discrete, batch: Batch, student: TokenForward) -> Tensor:
        asked = self._copy[0] if self._copy else policy
        with without_adapters(policy) if not self._copy else nullcontext():
            return asked.token_logits(batch, student, self.teacher_block or policy.length, self.teacher_opened)


def _opened(parent: str) -> bool:
    """Whether the policy that training starts from let its prompt see actions: as teacher it does so still."""
    from burnish.policies.load import resolve

    return bool(parent) and bool(read_object(resolve(parent) / "config.json").get("prompt_sees_actions"))
