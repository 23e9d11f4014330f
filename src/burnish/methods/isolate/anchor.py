"""An anchor: what the hidden states of a frozen base look like, layer by layer, and where that knowledge comes from."""

import json
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.core.types import Batch

if TYPE_CHECKING:
    from burnish.policies.base import Captured, Policy

FORMAT = 1


@dataclass
class Moments:
    """Mean and variance of hidden states, whatever the batches and padding (Chan, Golub & LeVeque 1979).

    Args:
        count: positions seen, a float64 scalar.
        mean: [D] float64.
        spread: [D] float64, sum of squared deviations from the mean.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "Moments":
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in ((), (width,), (width,))))

    def add(self, rows: Tensor) -> None:
        """Take in rows [N, D]."""
        if len(rows) == 0:
            return
        values = rows.detach().to(self.mean.device, torch.float64)
        mean, total = values.mean(0), self.count + len(values)
        share, shift = len(values) / total, mean - self.mean
        self.mean = self.mean + share * shift
        self.spread = self.spread + (values - mean).square().sum(0) + self.count * share * shift.square()
        self.count = total

    @property
    def variance(self) -> Tensor:
        """[D], dividing by the count."""
        return self.spread / self.count.clamp_min(1)


@dataclass(frozen=True)
class Provenance:
    """Where an anchor comes from.

    Args:
        base_hash: of the weights of the frozen policy.
        layers, width: of its backbone.
        inputs: "questions" or "robot".
        source: name of the question folder or data set.
        samples: images asked about, or robot frames.
        template: how a question becomes text; empty for robot inputs.
        answers: whether the rows of answers count too.
        tokens: "apart" (image and text each have a Gaussian) or "pooled".
    """

    base_hash: str
    layers: int
    width: int
    inputs: str
    source: str
    samples: int
    template: str = ""
    answers: bool = False
    tokens: str = "apart"
    format: int = FORMAT


@dataclass
class Anchor:
    """Statistics for each (layer, token group), float64, with their provenance."""

    about: Provenance
    moments: dict[tuple[int, str], Moments] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one safetensors file; a kill leaves the old one or none.

        Raises:
            BurnishError: no room, or not allowed.
        """
        from safetensors.torch import save_file

        from burnish.core.files import new_file

        tensors = {}
        for (layer, group), one in self.moments.items():
            for name in ("count", "mean", "spread"):
                tensors[f"{layer}.{group}.{name}"] = getattr(one, name).cpu().contiguous()
        with new_file(path) as file:
            save_file(tensors, file, metadata={"about": json.dumps(asdict(self.about))})

    @classmethod
    def load(cls, path: Path) -> "Anchor":
        """Read what `save` wrote.

        Raises:
            BurnishError: no such file, or no anchor of this format.
        """
        from safetensors import SafetensorError, safe_open

        make = "burnish method isolate anchor --help"
        if not path.is_file():
            raise BurnishError(f"no anchor at {path}", "a file that `burnish method isolate anchor` wrote", make)
        try:
            with safe_open(path, "pt") as file:
                about = Provenance(**_present(json.loads((file.metadata() or {})["about"])))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise BurnishError(f"{path} is no anchor ({error})", f"an anchor of format {FORMAT}", make) from None
        if about.format != FORMAT:
            raise BurnishError(f"{path} has format {about.format}", str(FORMAT), make)
        moments = {}
        try:
            for name, tensor in tensors.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"'{name}' is not finite")
                layer, group, part = name.split(".")
                if part == "count":
                    parts = (tensors[f"{layer}.{group}.{part}"] for part in ("count", "mean", "spread"))
                    count, mean, spread = parts
                    moments[int(layer), group] = Moments(count, mean, spread.diagonal() if spread.ndim == 2 else spread)
            lacking = set(range(about.layers)) - {layer for layer, _ in moments}
            if lacking or any(len(m.mean) != about.width for m in moments.values()):
                raise ValueError(f"layers {sorted(lacking)} are missing" if lacking else "a layer of another width")
        except (KeyError, ValueError) as error:
            raise BurnishError(f"{path} is damaged ({error})", "a whole anchor", make) from None
        return cls(about, moments)

    def check(self, path: Path | str, base_hash: str, layers: int, width: int) -> None:
        """Raise BurnishError unless the anchor was built from the very weights that training starts from."""
        fix = "burnish method isolate anchor with the policy of policy.path"
        for what, found, expected in (("layers", self.about.layers, layers), ("channels", self.about.width, width)):
            if found != expected:
                raise BurnishError(f"{path} is the anchor of a backbone with {found} {what}", f"{expected}", fix)
        if self.about.base_hash != base_hash:
            raise BurnishError(
                f"{path} is the anchor of other weights ({self.about.base_hash})", f"the base {base_hash}", fix
            )

    def to(self, device: torch.device) -> "Anchor":
        moved = {k: Moments(*(t.to(device) for t in (m.count, m.mean, m.spread))) for k, m in self.moments.items()}
        return Anchor(self.about, moved)


def _present(about: dict[str, Any]) -> dict[str, Any]:
    """Provenance without the field of earlier files that could hold full covariances."""
    return {name: value for name, value in about.items() if name != "covariance"}


def token_groups(captured: "Captured", tokens: str, leave_out: Tensor | None = None) -> dict[str, Tensor]:
    """Which rows of a captured forward belong to which group, bool [B, S] each; never padding, state or actions.

    Args:
        captured: of a forward.
        tokens: "apart" or "pooled".
        leave_out: bool [B, S] of rows that count nowhere (answers, say).
    """
    image, text = captured.layout["image"], captured.layout["text"]
    if leave_out is not None:
        text = text & ~leave_out
    return {"image": image, "text": text} if tokens == "apart" else {"tokens": image | text}


def forward(policy: "Policy", batch: Batch, layers: Sequence[int]) -> tuple["Captured", Tensor | None]:
    """Hidden states of one forward on questions or robot frames, and which rows are answers (bool [B, S] or None).

    The randomness of a robot forward is the action expert's, which the backbone never sees.
    """
    with policy.capture(layers) as captured:
        if "question" in batch:
            return captured, policy.language(batch).mask
        draws = policy.draw(len(batch["task"]), torch.Generator().manual_seed(0))
        policy.loss(batch, draws)
        return captured, None


@contextmanager
def evaluating(policy: "Policy"):
    """Inside, the policy is in eval mode; afterwards in the mode that it was in."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


@torch.no_grad()
def build(policy: "Policy", batches: Iterable[Batch], about: Provenance) -> Anchor:
    """An anchor of `policy` as it is now.

    Args:
        policy: the frozen base.
        batches: questions or robot frames.
        about: samples, layers and width are filled in.

    Raises:
        BurnishError: there was no batch.
    """
    moments: dict[tuple[int, str], Moments] = {}
    samples = width = 0
    with evaluating(policy):
        for batch in batches:
            captured, answers = forward(policy, batch, range(policy.num_layers))
            masks = token_groups(captured, about.tokens, None if about.answers else answers)
            for layer, hidden in captured.hidden.items():
                width = hidden.shape[-1]
                for group, mask in masks.items():
                    moments.setdefault((layer, group), Moments.empty(width, hidden.device)).add(hidden[mask])
            samples += len(next(iter(masks.values())))
    if not samples:
        raise BurnishError(f"{about.source} gave no sample for the anchor", "at least one")
    return Anchor(replace(about, samples=samples, width=width, layers=policy.num_layers), moments)


def question_batches(root: Path, samples: int, batch_size: int, seed: int, device: torch.device | str, *,
                     rank: int = 0, world: int = 1, progress: bool = False) -> Iterable[Batch]:  # fmt: skip
    """Batches of questions from a folder, in an order that follows from `seed`; at most one pass over it.

    Raises:
        BurnishError: not a question folder, or an empty one.
    """
    from burnish.data.loader import LanguageData, to_device

    data = LanguageData(root, batch_size, seed, rank, world)
    left = min(samples, len(data.questions)) // world
    for k in progress_bar(range(-(-left // batch_size)), desc="anchor", unit="batch", shown=progress):
        batch = data.finish(to_device(data.raw(k), torch.device(device)), k)
        size, left = min(left, batch_size), left - batch_size
        yield {name: value[:size] for name, value in batch.items()}
