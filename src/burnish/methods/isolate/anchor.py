"""An anchor: what the hidden states of a frozen base look like, layer by layer, and where that knowledge comes from.

Questions go through the policy's own prefix (`Policy.language` with through="prefix"), so that an anchor and a robot
batch are states of one function, and what stands between them is the pictures and the words alone.

Distances from it are differentiable in the states [N, D], rows of tokens without padding, and 0 where they agree.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.files import new_file
from burnish.core.options import read_options
from burnish.core.reading import parse_json, regular_file
from burnish.core.types import Batch
from burnish.data.questions import open_questions
from burnish.methods.inputs import forward, noise, question_batches, token_groups
from burnish.methods.start import evaluating
from burnish.policies.base import Policy

FORMAT = 2
"""1 had states of the VLM's own reading, which SmolVLA never sees on robot inputs."""
GROUPS = {"apart": ("image", "text"), "pooled": ("tokens",)}
HELD_OUT = 256
"""Questions that an anchor is held against, at most; and never more than a fifth of a folder."""
MOST_GAP = 0.1
MAKE = "burnish method isolate anchor --help"
_MOST_BYTES = 2**30
_PARTS = ("count", "mean", "spread")


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
        source: name of the question folder.
        template: how a question becomes text.
        answers: whether the rows of answers count too.
        tokens: "apart" (image and text each have a Gaussian) or "pooled".
        gap: of the base itself on `held_out` questions that the anchor has not seen, see `Anchor.gap`.
    """

    base_hash: str
    layers: int
    width: int
    source: str
    samples: int
    template: str = ""
    answers: bool = False
    tokens: str = "apart"
    gap: float = 0.0
    held_out: int = 0
    format: int = FORMAT


@dataclass
class Anchor:
    """Statistics for each (layer, token group), float64, with their provenance."""

    about: Provenance
    moments: dict[tuple[int, str], Moments] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one safetensors file; a kill leaves the old one or none."""
        tensors = {
            f"{layer}.{group}.{name}": getattr(one, name).cpu().contiguous()
            for (layer, group), one in self.moments.items() for name in _PARTS
        }  # fmt: skip
        with new_file(path) as file:
            save_file(tensors, file, metadata={"about": json.dumps(asdict(self.about))})

    @classmethod
    def load(cls, path: Path) -> "Anchor":
        if not path.is_file():
            raise BurnishError(f"no anchor at {path}", "a file that `burnish method isolate anchor` wrote", MAKE)
        regular_file(path, most=_MOST_BYTES)
        try:
            with safe_open(path, "pt") as file:
                header = (file.metadata() or {})["about"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise BurnishError(f"{path} is no anchor ({error})", f"an anchor of format {FORMAT}", MAKE) from None
        about = _provenance(parse_json(header, f"the header of {path}"), path)
        try:
            return cls(about, _moments(about, tensors))
        except (KeyError, ValueError) as error:
            raise BurnishError(f"{path} is damaged ({error})", "a whole anchor", MAKE) from None

    def check(self, path: Path | str, base_hash: str, layers: int, width: int) -> None:
        """Raise BurnishError unless the anchor was built from the very weights that training starts from."""
        fix = "burnish method isolate anchor, with the policy that training starts from"
        for what, found, expected in (("layers", self.about.layers, layers), ("channels", self.about.width, width)):
            if found != expected:
                raise BurnishError(f"{path} is the anchor of a backbone with {found} {what}", f"{expected}", fix)
        if self.about.base_hash != base_hash:
            raise BurnishError(f"{path} is the anchor of other weights ({self.about.base_hash})",
                               f"the base {base_hash}", fix)  # fmt: skip
        refuse_gap(self.about.gap, self.about.held_out, str(path))

    def gap(self, other: "Anchor") -> float:
        """The anchor loss (w2, summed over layers and groups) of what `other` saw, over the summed variance of this.

        About 1.5 / N for N independent rows of the anchor's own distribution.
        """
        loss = total = 0.0
        for key in self.moments.keys() & other.moments.keys():  # robot inputs without an instruction have no text
            mine, theirs = self.moments[key], other.moments[key]
            loss += float(w2_of_moments(theirs.mean, theirs.variance, mine.mean, mine.variance))
            total += float(mine.variance.sum())
        return loss / total if total > 0 else float("nan")

    def to(self, device: torch.device) -> "Anchor":
        moved = {k: Moments(*(t.to(device) for t in (m.count, m.mean, m.spread))) for k, m in self.moments.items()}
        return Anchor(self.about, moved)


def refuse_gap(gap: float, questions: int, what: str) -> None:
    """Raise BurnishError unless a base agrees with its own anchor on held-out questions (see `Anchor.gap`).

    Few questions differ by chance: 3 / N is twice the distance that N independent ones may be expected to have.
    """
    most = max(MOST_GAP, 3 / max(questions, 1))
    if not 0 <= gap <= most:
        raise BurnishError(
            f"{what}: anchor and base do not agree: on {questions} held-out questions the anchor loss of the base is "
            f"{gap:.3g} of the anchor's variance", f"at most {most:.3g}",
            "burnish method isolate anchor, with these weights and with questions of one kind",
        )  # fmt: skip


def _provenance(about: object, path: Path) -> Provenance:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise BurnishError(f"{path} is an anchor of format {str(found)[:40]}", f"{FORMAT}, built through the policy's "
                           "own prefix", "burnish method isolate anchor, to build it again")  # fmt: skip
    known = {one.name for one in fields(Provenance)}
    if about.keys() != known:
        odd = min(map(str, known ^ about.keys()))
        raise BurnishError(f"{path} is damaged: '{odd}' is missing or unknown", "a whole anchor", MAKE)
    found = read_options(Provenance, about, f"{path} is damaged")
    if found.tokens not in GROUPS:
        raise BurnishError(f"{path} is damaged: tokens is '{found.tokens[:40]}'", " or ".join(GROUPS), MAKE)
    return found


def _moments(about: Provenance, tensors: dict[str, Tensor]) -> dict[tuple[int, str], Moments]:
    """The statistics in a file's tensors; ValueError or KeyError where they are not those that `about` tells of."""
    groups = GROUPS[about.tokens]
    if about.layers < 1 or len(tensors) != about.layers * len(groups) * len(_PARTS):
        raise ValueError(f"{len(tensors)} tensors for {about.layers} layers")
    moments = {}
    for layer in range(about.layers):
        for group in groups:
            count, mean, spread = (tensors[f"{layer}.{group}.{part}"] for part in _PARTS)
            if count.shape != () or not mean.shape == spread.shape == (about.width,):
                raise ValueError(f"layer {layer} has statistics of {tuple(mean.shape)}, not of {about.width} channels")
            if any(part.dtype != torch.float64 or not bool(part.isfinite().all()) for part in (count, mean, spread)):
                raise ValueError(f"statistics of layer {layer} are not finite numbers in float64")
            if count < 1 or (spread < 0).any():
                raise ValueError(f"layer {layer} has a negative variance or no samples")
            moments[layer, group] = Moments(count, mean, spread)
    return moments


@torch.no_grad()
def build(policy: Policy, batches: Iterable[Batch], about: Provenance) -> Anchor:
    """An anchor of `policy` as it is now.

    Args:
        about: samples, layers and width are filled in.
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


def build_from_questions(
    policy: Policy, root: Path, samples: int, batch_size: int, about: Provenance, device: torch.device | str, *,
    wrong: bool = False, progress: bool = False,
) -> Anchor:  # fmt: skip
    """`build` on a question folder, held against questions of it that are kept aside.

    Args:
        samples: questions, at most; all but those kept aside where there are fewer.
        wrong: the control: an anchor of noise in place of the pictures, which nothing is held against.

    Raises:
        BurnishError: not a question folder, an empty one, or the base disagrees with its own anchor.
    """
    total = len(open_questions(root).entries)
    aside = min(HELD_OUT, total // 5)
    used = max(1, min(samples, total - aside))
    size = min(batch_size, used)
    batches = question_batches(root, used, size, 0, device, progress=progress)
    if wrong:
        return build(policy, noise(batches), about)
    anchor = build(policy, batches, about)
    held = question_batches(root, aside or used, size, 0, device, skip=used if aside else 0)
    gap = anchor.gap(build(policy, held, about))
    refuse_gap(gap, aside or used, "isolate")
    anchor.about = replace(anchor.about, gap=gap, held_out=aside or used)
    return anchor


FLOOR = 1e-6
"""A standard deviation is sqrt(variance + FLOOR * mean anchor variance), on both sides: its gradient stays finite."""


def w2_diagonal(rows: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians with diagonal covariance (AEGIS's anchor penalty).

    |mu - mean|^2 + |sigma - std|^2, with the population statistics mu, sigma [D] of `rows`. On a fresh batch of N
    independent rows of the anchor's own distribution it is about 1.5 * sum(variance) / N, not 0.

    Args:
        rows: [N, D].
        mean, variance: [D] of the anchor.
    """
    own_mean = rows.mean(0)
    return w2_of_moments(own_mean, (rows - own_mean).square().mean(0), mean, variance)


def w2_of_moments(own_mean: Tensor, own_variance: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """`w2_diagonal` of rows with this mean and variance [D]."""
    shift, spread = _gaps(own_mean, own_variance, mean, variance)
    return shift.square().sum() + spread.square().sum()


def w2_normalised(rows: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """As `w2_diagonal` with every channel in units of its anchor deviation, averaged over channels.

    A few channels of huge activation carry most of the plain distance; here all channels count alike.
    """
    own_mean = rows.mean(0)
    shift, spread = _gaps(own_mean, (rows - own_mean).square().mean(0), mean, variance)
    scale = (variance + FLOOR * variance.mean()).to(rows)
    return ((shift.square() + spread.square()) / scale).mean()


def token_distance(rows: Tensor, reference: Tensor) -> Tensor:
    """Squared distance of each state from the frozen model's state of the same token, relative to their variance.

    Args:
        rows, reference: [N, D].
    """
    reference = reference.to(rows)
    spread = (reference - reference.mean(0)).square().mean().clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows - reference).square().mean() / spread


def _gaps(own_mean: Tensor, own_variance: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    floor = FLOOR * variance.mean()
    own_deviation = (own_variance + floor.to(own_mean)).sqrt()
    return own_mean - mean.to(own_mean), own_deviation - (variance + floor).sqrt().to(own_mean)
