"""What the backbone of a policy still knows: losses and greedy answers on held-out scene questions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.data.questions import open_questions
from burnish.evaluate.stats import Rate, mcnemar, paired_interval, wilson
from burnish.policies.base import Policy


@dataclass(frozen=True)
class Retention:
    """Answers of one policy to one fixed set of questions.

    Args:
        loss: mean next-token loss over all answer tokens, in nats.
        interval: share of exact answers with n and Wilson interval.
        by_kind: the same for each kind of question.
        correct: one flag for each question, in the order of the set.
        losses: one number for each question, whose mean is `loss`: the loss summed over its answer, in units of the
            mean number of tokens of an answer.
    """

    loss: float
    interval: Rate
    by_kind: dict[str, Rate]
    correct: list[bool]
    losses: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of exact answers."""
        return self.interval.rate

    @property
    def n(self) -> int:
        """How many questions."""
        return self.interval.n

    def to_dict(self) -> dict[str, Any]:
        """As retention.json holds it."""
        by_kind = {kind: rate.to_dict() for kind, rate in self.by_kind.items()}
        return {
            "loss": self.loss, "accuracy": self.interval.to_dict(), "by_kind": by_kind, "correct": self.correct,
            "losses": self.losses,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> "Retention":
        """What `to_dict` gave."""
        by_kind = {kind: wilson(rate["successes"], rate["n"]) for kind, rate in kept["by_kind"].items()}
        correct = kept["correct"]
        return cls(kept["loss"], wilson(sum(correct), len(correct)), by_kind, correct, kept["losses"])

    def __str__(self) -> str:
        return f"answer loss {self.loss:.3f}, exact answers {self.interval}"


def retention(
    policy: Policy, questions_root: Path | str, *, limit: int = 1000, batch_size: int = 64, progress: bool = False
) -> Retention:
    """Loss and exact-match accuracy of the policy's backbone on a question folder (see `burnish data questions`).

    Args:
        policy: left in the mode that it was in.
        questions_root: folder with images.npy uint8 [N, H, W, 3], questions.jsonl and meta.json.
        limit: at most so many questions, drawn without a seed: always the same ones; 0 means all.
        batch_size: questions in a batch.
        progress: show a bar on stderr.

    Raises:
        BurnishError: a folder that is not a question folder.
    """
    questions = open_questions(questions_root)
    chosen = _subset(questions.entries, limit)
    was_training = policy.training
    policy.eval()
    sums, tokens, correct = [], 0, []
    try:
        with torch.no_grad(), progress_bar(total=len(chosen), desc="questions", shown=progress) as bar:
            for entries in batched(chosen, batch_size):
                batch = _batch(entries, questions.images, questions.camera, policy)
                loss = policy.language(batch)
                sums += (loss.per_token * loss.mask).double().sum(1).tolist()
                tokens += int(loss.mask.sum())
                answers = policy.answer(batch, max_new_tokens=16)
                correct += [_same(a, entry["answer"]) for a, entry in zip(answers, entries, strict=True)]
                bar.update(len(entries))
    finally:
        policy.train(was_training)
    kinds = sorted({entry["kind"] for entry in chosen})
    flags = {kind: [c for c, entry in zip(correct, chosen, strict=True) if entry["kind"] == kind] for kind in kinds}
    by_kind = {kind: wilson(sum(some), len(some)) for kind, some in flags.items()}
    losses = [one * len(sums) / max(tokens, 1) for one in sums]
    return Retention(sum(sums) / max(tokens, 1), wilson(sum(correct), len(correct)), by_kind, correct, losses)


def compare_retention(base: Retention, tuned: Retention) -> dict[str, Any]:
    """Paired test of two policies on the same questions; `difference` is tuned minus base, with a 95 % interval.

    Raises:
        BurnishError: they answered different numbers of questions.
    """
    if base.n != tuned.n:
        raise BurnishError(f"{base.n} and {tuned.n} answers", "both policies on the same questions")
    before, after = np.array(base.correct, dtype=int), np.array(tuned.correct, dtype=int)
    low, high = paired_interval(after - before, np.random.default_rng(0))
    forgotten, learned = int((before > after).sum()), int((after > before).sum())
    return {
        "n": base.n, "difference": float((after - before).mean()), "low": low, "high": high, "forgotten": forgotten,
        "learned": learned, "p": mcnemar(forgotten, learned), "loss_difference": tuned.loss - base.loss,
    }  # fmt: skip


def _subset(questions: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The same `limit` questions every time, spread over the whole folder, in its order."""
    if not 0 < limit < len(questions):
        return questions
    chosen = np.random.default_rng(0).permutation(len(questions))[:limit]
    return [questions[i] for i in sorted(chosen.tolist())]


def _batch(entries: Sequence[dict[str, Any]], images: np.ndarray, camera: str, policy: Policy) -> dict[str, Any]:
    pixels = torch.from_numpy(np.stack([images[entry["image"]] for entry in entries]))
    parameter = next(policy.parameters(), None)
    device = "cpu" if parameter is None else parameter.device
    return {
        f"observation.images.{camera}": pixels.to(device).permute(0, 3, 1, 2).float() / 255,
        "question": [entry["question"] for entry in entries],
        "answer": [entry["answer"] for entry in entries],
    }


def _same(given: str, expected: str) -> bool:
    """Exact match but for case, blanks around it and a full stop."""
    return given.strip().rstrip(".").lower() == expected.strip().rstrip(".").lower()
