"""What is recorded of the run that a checkpoint comes from, and how two runs differ apart from their methods.

A task vector is the difference of two fine-tunes. Whatever else differs between them (seed, steps, data, batch size) is
in it as well, and no arithmetic takes it out again.
"""

import os
from pathlib import Path
from typing import Any

from burnish.core.reading import read_object
from burnish.core.recipe import flatten

_MAY_DIFFER = (
    "name", "output", "objectives", "language.", "demos.", "eval.", "data.workers", "data.cache_dir", "data.root",
    "train.log_every", "train.save_every", "train.retention_every", "train.max_minutes", "train.trackers",
    "train.self_check",
)  # fmt: skip
"""Fields of a recipe, or beginnings of them: the methods, which the vector is made of, and what touches no number."""


def facts(path: Path) -> dict[str, Any]:
    """What `burnish train` recorded of the run that made the checkpoint or adapter at `path`; {} where nothing did.

    A policy or adapter folder lies in its run's folder, beside train.json; a checkpoint holds burnish/meta.json.
    """
    folder = Path(os.path.realpath(path if path.is_dir() else path.parent))
    for file in (folder / "burnish" / "meta.json", folder.parent / "train.json"):
        if file.is_file():
            found = read_object(file, file.parent)
            break
    else:
        return {}
    recipe = found.get("recipe")
    if not isinstance(recipe, dict):
        return {}  # of another tool
    kept = {name: value for name, value in flatten(recipe).items() if not name.startswith(_MAY_DIFFER)}
    steps = found.get("steps", found.get("step"))
    return kept | {"data": found.get("data_hash"), "steps": steps}


def differences(tuned: Path, control: Path) -> list[str]:
    """How the runs behind two checkpoints differ in more than their methods, one line each; [] where they do not.

    Raises:
        BurnishError: a record is there and unreadable.
    """
    one, other = facts(tuned), facts(control)
    unknown = [str(path) for path, found in ((tuned, one), (control, other)) if not found]
    if unknown:
        return [f"nothing is recorded of the training of {' and '.join(unknown)}"]
    shared = sorted(one.keys() & other.keys())  # a field that came into being between the two runs is not compared
    return [f"{name} {one[name]!r:.80} and {other[name]!r:.80}" for name in shared if one[name] != other[name]]
