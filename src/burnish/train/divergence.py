"""Stops a run at the first NaN or infinity, with the batch saved and the culprit named."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.types import Batch


class DivergenceGuard:
    """Looks at one number per step. On a GPU it looks one step late, so that the host never waits for the device."""

    def __init__(self, output: Path, rank: int, late: bool):
        self.output, self.rank, self.late = output, rank, late
        self._before: tuple | None = None

    def look(self, step: int, health: Tensor, terms: dict[str, Tensor], batches: dict[str, Batch],
             trained: dict[str, nn.Parameter]) -> None:  # fmt: skip
        """Raise BurnishError when `health` (loss and gradient norm in one) of this or the last step is not finite."""
        now = (step, health, terms, batches)
        seen = self._before if self.late else now
        self._before = now
        if seen is not None and not math.isfinite(seen[1].item()):
            self._stop(*seen, trained)

    def flush(self, trained: dict[str, nn.Parameter]) -> None:
        """Look at the last step too; call before its weights are written anywhere."""
        if self._before is not None and not math.isfinite(self._before[1].item()):
            self._stop(*self._before, trained)
        self._before = None

    def _stop(self, step: int, health: Tensor, terms: dict[str, Tensor], batches: dict[str, Batch],
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
        raise BurnishError(
            f"step {step}: {culprit}; the batch is saved in {path}",
            "finite numbers",
            "a lower train.lr, or look at its episodes",
        )


def save_batch(batches: dict[str, Batch], path: Path, about: dict) -> None:
    """Tensors as <stream>/<key> in safetensors; strings, episodes and frames in a JSON file beside it."""
    from safetensors.torch import save_file

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
