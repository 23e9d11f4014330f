"""Figures of a run: metrics.jsonl, curves.png, the progress bar and accelerate's trackers."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.figures import new_figure, save_figure
from burnish.core.files import disk_errors, write_text
from burnish.core.reading import read_text
from burnish.evaluate.records import rows_of

_PANELS = ("loss", "lr", "grad_norm", "data_wait_share", "retention_loss", "retention_accuracy")


class Window:
    """Sums of figures since the last log line, kept on the device: reading them is the only wait for it."""

    def __init__(self, sums: dict[str, float] | None = None, counts: dict[str, int] | None = None):
        self._sums: dict[str, Tensor | float] = dict(sums or {})
        self._counts: dict[str, int] = dict(counts or {})

    def add(self, figures: dict[str, Tensor]) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def state(self) -> dict[str, Any]:
        """JSON-able; restored with Window(**state)."""
        return {"sums": {name: float(value) for name, value in self._sums.items()}, "counts": self._counts}

    def means(self) -> dict[str, float]:
        """Mean of each figure; empties the window."""
        names = list(self._sums)
        values = [torch.as_tensor(self._sums[name], dtype=torch.float32).reshape(()) for name in names]
        device = next((v.device for v in values if v.device.type != "cpu"), torch.device("cpu"))
        read = torch.stack([v.to(device) for v in values]).cpu().tolist() if values else []
        means = {name: value / self._counts[name] for name, value in zip(names, read, strict=True)}
        self._sums, self._counts = {}, {}
        return means


def peak_memory(device: torch.device) -> dict[str, float]:
    """{"memory_gb": the most that tensors took since the last call, in 10^9 bytes}; {} where no GPU counts it."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory_gb": peak}


class Metrics:
    """The file metrics.jsonl, one object per line with at least "step".

    Args:
        step: rows after this step are dropped (work that a killed run did after its last checkpoint); -1 drops all.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        rows = [row for row in read_rows(path) if row["step"] <= step] if step >= 0 else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.last = rows[-1] if rows else {}

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; a full disk leaves no half line."""
        size = self.path.stat().st_size
        try:
            with disk_errors(self.path), open(self.path, "ab") as file:
                file.write((json.dumps(row) + "\n").encode())
        except BaseException:
            with open(self.path, "r+b") as file:
                file.truncate(size)
            raise
        self.last = self.last | row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file; a last line cut by a kill is left out."""
    text = read_text(path) if path.is_file() else ""
    rows = list(rows_of(text, path)) if "\n" in text else []  # else a kill has cut the only line
    for where, row in rows:
        if type(row.get("step")) is not int:
            raise BurnishError(f"{where} is no row of figures", 'an object with "step"', f"rm '{path}'")
    return [row for _, row in rows]


def draw_curves(metrics: Path, target: Path) -> None:
    """Draw the main columns of metrics.jsonl over the step into a PNG, atomically."""
    rows = read_rows(metrics)
    columns = {name for row in rows for name in row}
    names = [n for n in _PANELS if n in columns] + sorted(n for n in columns if n.startswith("loss_"))
    if not names:
        return
    figure = new_figure(4.2 * min(3, len(names)), 2.6 * -(-len(names) // 3), constrained=False)
    figure.subplots_adjust(hspace=0.5, wspace=0.3, left=0.07, right=0.98)
    for place, name in enumerate(names):
        axis = figure.add_subplot(-(-len(names) // 3), min(3, len(names)), place + 1)
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 10 else None, linewidth=1.2)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if name.startswith("loss") and points and min(value for _, value in points) > 0:
            axis.set_yscale("log")
    save_figure(figure, target, dpi=110)
