"""Batches that a method asks for beside those of the training loop, and the backbone's states of any batch."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.core.reading import read_text
from burnish.core.seeding import derive_seed
from burnish.core.types import Batch
from burnish.data.loader import LanguageData, to_device
from burnish.methods.objective import Run
from burnish.policies.base import Captured, Policy


class Questions:
    """Question batches beside the robot batches; batch k follows from the run's seed and k."""

    def __init__(self, run: Run, root: str, batch_size: int, turns: int):
        seed = derive_seed(run.recipe.train.seed, "isolate")
        self.data = LanguageData(Path(root), batch_size, seed, turns=turns)
        self.device = run.device

    def batch(self, k: int) -> Batch:
        """Batch k, on the run's device."""
        return self.data.finish(to_device(self.data.raw(k), self.device), k)


def question_batches(root: Path, samples: int, batch_size: int, seed: int, device: torch.device | str, *,
                     skip: int = 0, progress: bool = False) -> Iterable[Batch]:  # fmt: skip
    """Batches of questions from a folder, in an order that follows from `seed`; at most one pass over it.

    Args:
        samples: questions, at most.
        batch_size: questions in a batch; the last one may have fewer.
        skip: questions of that order that are left out at its beginning.
    """
    data = LanguageData(root, 1, seed)
    end = min(skip + samples, len(data.questions))
    for first in progress_bar(range(skip, end, batch_size), desc="anchor", unit="batch", shown=progress):
        rows = [data.raw(k) for k in range(first, min(first + batch_size, end))]
        batch = {name: [value for row in rows for value in row[name]] for name in rows[0]}
        batch[data.key] = torch.stack(batch[data.key])
        yield data.finish(to_device(batch, torch.device(device)), first)


def robot_batches(run: Run, samples: int) -> Iterator[Batch]:
    """The first batches of the run's data, about `samples` frames."""
    for k in range(max(1, samples // run.recipe.train.batch_size)):
        yield run.data.finish(to_device(run.data.raw(k), run.device), k)


def noise(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches with uniform noise in place of their pictures."""
    draws = torch.Generator().manual_seed(0)
    for batch in batches:
        yield {
            name: torch.rand(value.shape, generator=draws).to(value) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }


def token_groups(captured: Captured, tokens: str, leave_out: Tensor | None = None) -> dict[str, Tensor]:
    """Which rows of a captured forward belong to which group, bool [B, S] each; never padding, state or actions.

    Args:
        tokens: "apart" or "pooled".
        leave_out: bool [B, S] of rows that count nowhere (answers, say).
    """
    image, text = captured.layout["image"], captured.layout["text"]
    if leave_out is not None:
        text = text & ~leave_out
    return {"image": image, "text": text} if tokens == "apart" else {"tokens": image | text}


def forward(policy: Policy, batch: Batch, layers: Sequence[int]) -> tuple[Captured, Tensor | None]:
    """Hidden states of one forward through the policy's own prefix, and which rows are answers (bool [B, S] or None).

    Args:
        batch: questions, or robot frames. The randomness of a robot forward is the action expert's, which the backbone
            never sees.
    """
    with policy.capture(layers) as captured:
        if "question" in batch:
            return captured, policy.language(batch, through="prefix").mask
        draws = policy.draw(len(batch["task"]), torch.Generator().manual_seed(0))
        policy.loss(batch, draws)
        return captured, None


def read_passages(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that hold more than blanks."""
    passages = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not passages:
        raise BurnishError(f"{path} holds no text", "one passage per line")
    return passages
