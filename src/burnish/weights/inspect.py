"""What a delta is made of, and how it lies to others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.figures import new_figure, save_figure
from burnish.core.outputs import claim
from burnish.weights.delta import Delta
from burnish.weights.names import GROUPS, module_of
from burnish.weights.rounding import Buffers, dot
from burnish.weights.tensorfile import blocks

_FIGURES = {"norm.png", "cosine.png"}


def inspect(delta: Path | str, others: Sequence[Path | str] = ()) -> dict[str, Any]:
    """Figures of a delta.

    Args:
        delta: its folder.
        others: deltas to compare with, for instance the difference of two seeds.

    Returns:
        `norm`; `groups`: share of the squared norm in vision, language, expert and head; `modules`: norm, norm over
        the tuned weights' norm, elements and group of each; `others`: for each other delta its norm, the cosine (whole
        and by module) and the share of common non-zero elements whose signs differ; `geometry` as recorded.
    """
    own = Delta(delta)
    norms = {name: entry["norm"] for name, entry in own.tensors.items()}
    total = own.norm()
    modules: dict[str, dict[str, Any]] = {}
    groups = dict.fromkeys(GROUPS[:4], 0.0)
    for name, entry in own.tensors.items():
        nothing = {"group": entry["group"], "square": 0.0, "tuned": 0.0, "elements": 0}
        found = modules.setdefault(module_of(name), nothing)
        found["square"] += norms[name] ** 2
        found["tuned"] += entry.get("norm_tuned", 0.0) ** 2
        found["elements"] += int(np.prod(entry["shape"]))
        groups[entry["group"]] += norms[name] ** 2 / total**2 if total > 0 else 0.0
    table = {
        name: {
            "group": m["group"], "norm": m["square"] ** 0.5, "elements": m["elements"],
            "relative": (m["square"] / m["tuned"]) ** 0.5 if m["tuned"] > 0 else None,
        }
        for name, m in modules.items()
    }  # fmt: skip
    return {
        "delta": str(own.path), "norm": total, "tensors": len(own.tensors), "groups": groups, "modules": table,
        "others": {str(path): against(own, Delta(path)) for path in others}, "geometry": own.meta["geometry"],
        "rounding_noise": own.meta["rounding_noise"], "not_exact": own.meta["not_exact"],
        "control_vector": own.meta.get("control_vector"), "runs_differ": own.meta.get("runs_differ", []),
    }  # fmt: skip


def against(own: Delta, other: Delta) -> dict[str, Any]:
    """Cosine and sign conflict of two deltas over the tensors they share."""
    common = [n for n in own.tensors if n in other.tensors and own.tensors[n]["shape"] == other.tensors[n]["shape"]]
    if not common:
        raise BurnishError(f"{own.path} and {other.path} share no tensor", "deltas of one architecture")
    sums: dict[str, np.ndarray] = {}  # module to [dot, square, other's square, conflicts, both non-zero]
    buffers = Buffers()
    for name in common:
        own.check(name)
        other.check(name)
        size, row = int(np.prod(own.tensors[name]["shape"])), sums.setdefault(module_of(name), np.zeros(5))
        for at, end in blocks(0, size):
            x = own.healthy_values(name, at, end, buffers(0, end - at))
            y = other.healthy_values(name, at, end, buffers(1, end - at))
            signs = np.sign(x) * np.sign(y)
            row += (dot(x, y), dot(x, x), dot(y, y), (signs < 0).sum(), (signs != 0).sum())
    whole = np.sum(list(sums.values()), axis=0)
    return {
        "norm": float(whole[2] ** 0.5), "norm_ratio": float((whole[2] / whole[1]) ** 0.5) if whole[1] > 0 else None,
        "cosine": _cosine(whole), "sign_conflict": float(whole[3] / max(1.0, whole[4])),
        "modules": {module: _cosine(row) for module, row in sums.items()},
    }  # fmt: skip


def _cosine(row: np.ndarray) -> float | None:
    return float(row[0] / (row[1] * row[2]) ** 0.5) if row[1] > 0 and row[2] > 0 else None


def table(found: dict[str, Any], most: int = 20) -> str:
    """The figures as text; the modules with the largest norm first."""
    lines = [f"{found['delta']}: norm {found['norm']:.4g} in {found['tensors']} tensors"]
    lines += ["energy: " + ", ".join(f"{group} {share:.1%}" for group, share in found["groups"].items() if share > 0)]
    for key, value in found["geometry"].items():
        lines.append(f"{key.replace('_', ' ')}: {value:.3f}")
    lines += [f"the two runs differ in more than their methods: {one}" for one in found["runs_differ"]]
    for path, other in found["others"].items():
        lines.append(f"to {path}: cosine {_said(other['cosine'])}, norm ratio {_said(other['norm_ratio'])}, "
                     f"signs differ in {other['sign_conflict']:.1%}")  # fmt: skip
    ranked = sorted(found["modules"].items(), key=lambda item: -item[1]["norm"])
    lines.append(f"{'norm':>10s} {'relative':>9s}  module")
    lines += [f"{m['norm']:10.4g} {_said(m['relative']):>9s}  {name} ({m['group']})" for name, m in ranked[:most]]
    if len(ranked) > most:
        lines.append(f"{'':20s}  ... and {len(ranked) - most} more (--json has all)")
    return "\n".join(lines)


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw(found: dict[str, Any], folder: Path | str) -> list[Path]:
    """norm.png (norm of each module, coloured by part) and, with others, cosine.png; returns their paths."""
    with claim(Path(folder), "figures of a task vector", lambda old: {p.name for p in old.iterdir()} <= _FIGURES):
        return _draw(found, Path(folder))


def _draw(found: dict[str, Any], folder: Path) -> list[Path]:
    from matplotlib.patches import Patch

    colours = dict(zip(GROUPS[:4], ("tab:green", "tab:blue", "tab:orange", "tab:red"), strict=True))
    modules = found["modules"]
    figure, axis = _module_axis(list(modules), "norm of the delta")
    axis.barh(range(len(modules)), [m["norm"] for m in modules.values()],
              color=[colours[m["group"]] for m in modules.values()])  # fmt: skip
    handles = [Patch(color=colours[g], label=f"{g} {share:.0%}") for g, share in found["groups"].items() if share > 0]
    axis.legend(handles=handles, title="share of energy")
    paths = [folder / "norm.png"]
    save_figure(figure, paths[0])
    if found["others"]:
        figure, axis = _module_axis(list(modules), "cosine to the other delta")
        for path, other in found["others"].items():
            shown = [other["modules"].get(name) for name in modules]
            axis.plot([np.nan if v is None else v for v in shown], range(len(shown)), "o-", ms=3, label=Path(path).name)
        axis.axvline(0, color="0.6", lw=0.8)
        axis.legend()
        paths.append(folder / "cosine.png")
        save_figure(figure, paths[1])
    return paths


def _module_axis(names: list[str], label: str) -> tuple[Any, Any]:
    """A figure with one row for each module."""
    figure = new_figure(9, 1.2 + 0.2 * len(names))
    axis = figure.subplots()
    axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    return figure, axis
