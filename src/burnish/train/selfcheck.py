"""What a start-up check can tell before hours are spent: unequal ranks, clipped actions, an implausible loss."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.seeding import generator
from burnish.core.types import Batch
from burnish.methods.inputs import robot_batches
from burnish.methods.objective import Run
from burnish.policies.base import Policy
from burnish.policies.keys import IMAGES

LOSS_BAND = (1e-5, 10.0)
"""Flow matching on normalised actions: a net that knows nothing predicts about 0, whose loss is
1 (noise) + 1 (normalised actions) = 2; a base that is sure of another robot's actions reaches 5, and cross-entropy over
bins 6. Far above that the normalisation does not fit; below 1e-5 the targets are constant."""
CAMERAS_AGAIN = 10
"""Steps after which a camera that reached nothing at the start is looked at again."""
OUTLIER = 4.0
"""Standard deviations beyond which an action counts as outside, where the policy normalises by mean and deviation."""


def check_statistics(stats: dict[str, Any] | None, keys: tuple[str, ...], root) -> None:
    """Raise BurnishError unless the data set has mean and deviation of `keys`."""
    for key in keys:
        for figure in ("mean", "std", "min", "max"):
            if not stats or key not in stats or figure not in stats[key]:
                raise BurnishError(f"{root}/meta/stats.json has no '{figure}' of '{key}'",
                                   "statistics of every input and output", f"burnish data inspect {root}")  # fmt: skip
            if not _finite(stats[key][figure]):
                raise BurnishError(f"{root}/meta/stats.json: '{figure}' of '{key}' is not finite", "finite statistics")


def _finite(values: Any) -> bool:
    try:
        return bool(np.isfinite(np.asarray(values, dtype=np.float64)).all())
    except (TypeError, ValueError):  # text, or rows of unequal length
        return False


def normalisation_warnings(
    actions_NA: np.ndarray, stats: dict[str, Any], names: list[str], mode: str = "MEAN_STD"
) -> list[str]:
    """One line for each action dimension that the normalisation handles badly.

    Args:
        actions_NA: actions in environment units.
        stats: LeRobot's statistics of "action" (mean, std, min, max, q01, q99).
        mode: LeRobot's NormalizationMode: MEAN_STD, MIN_MAX, QUANTILES, QUANTILE10 or IDENTITY.
    """
    values = {key: np.asarray(value, dtype=np.float64).reshape(-1) for key, value in stats.items()}
    low, high, scale = _range(values, mode)
    lines = []
    for a, name in enumerate(names):
        column = actions_NA[:, a]
        if scale[a] < 1e-6:
            lines.append(f"action '{name}' never changes in the statistics (range {scale[a]:.2g}); it cannot be "
                         "learned")  # fmt: skip
            continue
        share = float(np.mean((column < low[a]) | (column > high[a])))
        if share > 0.01:
            lines.append(f"action '{name}': {share:.1%} of the values lie outside the normalised range "
                         f"({mode.lower()})")  # fmt: skip
    return lines


def _range(values: dict[str, np.ndarray], mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if mode == "MEAN_STD":
        spread = OUTLIER * values["std"]
        return values["mean"] - spread, values["mean"] + spread, values["std"]
    if mode in ("QUANTILES", "QUANTILE10"):
        low, high = ("q01", "q99") if mode == "QUANTILES" else ("q10", "q90")
        if low in values and high in values:
            width = values[high] - values[low]
            return values[low] - 0.5 * width, values[high] + 0.5 * width, width
    return values["min"] - 1e-6, values["max"] + 1e-6, values["max"] - values["min"]


def loss_warning(loss: float, from_base: bool) -> list[str]:
    """A line when the first imitation loss of a policy lies outside the plausible band."""
    if not from_base or LOSS_BAND[0] <= loss <= LOSS_BAND[1]:
        return []
    return [f"the first loss is {loss:.3g}, outside {LOSS_BAND[0]:g} to {LOSS_BAND[1]:g}: do the normalisation "
            "statistics and camera order fit the base?"]  # fmt: skip


def fingerprint(tensors: dict[str, Tensor]) -> Tensor:
    """[P, 2] two float64 sums for each tensor; equal tensors have equal rows, to the last bit."""
    rows = []
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1).double()
        weight = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.float64).remainder_(1021)
        rows.append(torch.stack([flat.sum(), (flat * weight).sum()]))
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.float64)


def check_ranks(run: Run, tensors: dict[str, Tensor], what: str) -> None:
    """Raise BurnishError on every rank when `tensors` (same names, in any order) differ between ranks."""
    if run.accelerator.num_processes == 1 or run.sharded:  # ranks that hold different rows have nothing to compare
        return
    own = dict(zip(tensors, fingerprint(tensors).cpu().tolist(), strict=True))
    everyone = gather_object([own])
    names = sorted(set().union(*everyone))
    different = [n for n in names if any(other.get(n) != everyone[0].get(n) for other in everyone)]
    if different:
        shown = ", ".join(different[:4]) + (", ..." if len(different) > 4 else "")
        raise BurnishError(
            f"{what} of {len(different)} parameters differ between the {len(everyone)} processes: {shown}",
            "equal ones on every rank",
            "let the module run inside the step's forward and make edit_gradients depend on `grads` alone",
        )


def check_cameras(run: Run, batch: Batch) -> None:
    """Look before the first step and again after ten whether every camera of the policy changes its loss.

    A black picture in a camera's place (a white one where it is black) changes nothing where a rename map, a wrong name
    or a zero weight keeps the camera out. At the start that is a warning, as a new gate may open; later it is an error.
    """
    again = min(CAMERAS_AGAIN, run.recipe.train.steps - 1)
    if run.step not in (0, again):
        return
    if run.sharded:  # all ranks must ask the same
        batch = next(iter(robot_batches(run, 1)))
    unseen = run.ask(unseen_cameras, run.policy, batch)
    if not unseen:
        return
    found = f"camera '{unseen[0]}' reaches nothing: a black picture in its place leaves the loss as it is"
    if run.step < again or again == 0:
        run.say([f"{found} (looked at again after {again} steps)"])
        return
    kept = ", ".join(name for name in run.policy.cameras if name not in unseen)
    raise BurnishError(f"{found}, after {run.step} steps too", "cameras that the policy looks at",
                       f"--data.cameras='[{kept}]', or --train.self_check=false to train all the same")  # fmt: skip


@torch.no_grad()
def unseen_cameras(policy: Policy, batch: Batch) -> list[str]:
    """The cameras that neither loss nor actions depend on, by two samples of `batch` that have them, on equal draws.

    The loss alone would not do: where statistics blow its targets up, a picture's part is lost in rounding.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in policy.cameras:  # with several data sets a mask says which samples have the camera
        there = batch.get(f"{IMAGES}{name}_padding_mask", torch.ones(len(batch["task"]), dtype=torch.bool))
        groups.setdefault(tuple(there.nonzero()[:2, 0].tolist()), []).append(name)
    groups.pop((), None)
    training = policy.training
    policy.eval()
    try:
        return [name for rows, names in groups.items() for name in _unseen(policy, _rows(batch, rows), names)]
    finally:
        policy.train(training)


def _unseen(policy: Policy, few: Batch, names: list[str]) -> list[str]:
    draws = policy.draw(len(few["task"]), generator(0, "cameras", device=str(policy.device)))
    whole = policy.loss(few, draws).per_sample
    blank = {name: _blanked(few, f"{IMAGES}{name}") for name in names}
    unseen = [name for name in blank if torch.equal(whole, policy.loss(blank[name], draws).per_sample)]
    acted = policy.act(few, draws).actions if unseen else None
    return [name for name in unseen if torch.equal(acted, policy.act(blank[name], draws).actions)]


def _rows(batch: Batch, rows: tuple[int, ...]) -> Batch:
    return {k: v[list(rows)] if isinstance(v, Tensor) else [v[i] for i in rows] for k, v in batch.items()}


def _blanked(batch: Batch, key: str) -> Batch:
    picture = batch[key]
    return {**batch, key: torch.zeros_like(picture) if bool(picture.any()) else torch.ones_like(picture)}


def report_unreached(trained: dict[str, nn.Parameter]) -> list[str]:
    """A line that names trained parameters which no loss reaches (they stay as they are)."""
    idle = [name for name, p in trained.items() if p.grad is None]
    if not idle:
        return []
    return [f"{len(idle)} of {len(trained)} trained tensors are reached by no loss, such as '{idle[0]}'"]


class DivergenceGuard:
    """Looks at one number per step. On a GPU it looks one step late, so that the host never waits for the device."""

    def __init__(self, output: Path, rank: int, late: bool):
        self.output, self.rank, self.late = output, rank, late
        self._before: tuple | None = None

    def look(self, step: int, health: Tensor, terms: dict[str, Tensor], batches: dict[str, Batch],
             trained: dict[str, nn.Parameter]) -> None:  # fmt: skip
        """Raise BurnishError when `health` (loss and gradient norm in one) of this or the last step is not finite."""
        now = (step, _sent(health), terms, batches)
        seen = self._before if self.late else now
        self._before = now
        if seen is not None and not math.isfinite(seen[1]()):
            self._stop(seen[0], *seen[2:], trained)

    def flush(self, trained: dict[str, nn.Parameter]) -> None:
        """Look at the last step too; call before its weights are written anywhere."""
        if self._before is not None and not math.isfinite(self._before[1]()):
            self._stop(self._before[0], *self._before[2:], trained)
        self._before = None

    def _stop(self, step: int, terms: dict[str, Tensor], batches: dict[str, Batch],
              trained: dict[str, nn.Parameter]) -> None:  # fmt: skip
        path = self.output / ("nan_batch.safetensors" if self.rank == 0 else f"nan_batch_{self.rank}.safetensors")
        bad_terms = [name for name, value in terms.items() if not torch.isfinite(value).all()]
        bad_grads = [n for n, p in trained.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
        save_batch(
            batches, path, {"step": step, "terms": {k: str(float(v)) for k, v in terms.items()}, "gradients": bad_grads}
        )
        if bad_terms:
            culprit = f"loss term '{bad_terms[0]}' is {terms[bad_terms[0]].item()}"
        elif bad_grads:
            culprit = f"the gradient of '{bad_grads[0]}' ({len(bad_grads)} in all) is not finite"
        else:
            culprit = "the gradient norm is not finite"
        raise BurnishError(f"step {step}: {culprit}; the batch is saved in {path}", "finite numbers",
                           "--fresh with a smaller --train.lr, or look at its episodes")  # fmt: skip


def _sent(number: Tensor) -> Callable[[], float]:
    """What reads a number later, and does not wait for work that was queued since, as `item` would."""
    if number.device.type != "cuda":
        return number.item
    host, there = torch.empty_like(number, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(number, non_blocking=True)
    there.record()
    return lambda: there.synchronize() or host.item()


def save_batch(batches: dict[str, Batch], path: Path, about: dict) -> None:
    """Tensors as <stream>/<key> in safetensors; strings, episodes and frames in a JSON file beside it."""
    tensors, words = {}, {}
    for stream, batch in batches.items():
        for key, value in batch.items():
            if isinstance(value, Tensor):
                tensors[f"{stream}/{key}"] = value.detach().cpu().contiguous()
            else:
                words[f"{stream}/{key}"] = list(value)
            if key in ("index", "episode_index"):
                words[f"{stream}/{key}"] = value.tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    write_json(path.with_suffix(".json"), json.loads(json.dumps(about)) | words)
