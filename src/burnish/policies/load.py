"""Open a policy folder: the registry knows the wrapper of its type, and the wrapper what is peculiar to it."""

import logging
import shlex
from pathlib import Path
from typing import Any

import torch

from burnish.core import renames
from burnish.core.errors import BurnishError
from burnish.core.options import home
from burnish.core.provenance import weights_hash
from burnish.core.reading import read_object
from burnish.core.registry import Registry
from burnish.policies import folder as folders
from burnish.policies import pipelines, tensors
from burnish.policies.base import Policy
from burnish.policies.keys import ADAPTER, CONFIG, INDEX, PREPROCESSOR, WEIGHTS
from burnish.policies.lerobot import LeRobotPolicy, known_types
from burnish.policies.pretrained import is_hub_name
from burnish.policies.wrapper import PolicyWrapper

log = logging.getLogger("burnish")
ASSETS = Path(__file__).resolve().parent.parent / "assets"
_BELOW = ("policy", "pretrained_model", "last/pretrained_model", "*/pretrained_model", "checkpoints/*/pretrained_model",
          "*/policy", "*/*/policy")  # fmt: skip
"""Where policies lie in the run folders of burnish and LeRobot."""

POLICIES: Registry[type[PolicyWrapper]] = Registry("policy", room="burnish.policies", module="policy")
"""Wrappers by LeRobot's name of the policy's type; those of outside packages by entry points `burnish.policies`."""


FOREIGN = {
    "dream-vla": "Dream-VLA: a diffusion language model and a vision tower that exist as code of its own alone",
    "dream-vl": "Dream-VL, the language model of Dream-VLA, which acts only as that",
    "Emu3": "UD-VLA or another policy on Emu3: it denoises the tokens of future images beside those of actions",
}
"""Published policies that cannot be loaded, by the `model_type` of their config.json, and what they would need."""


def load(path: Path | str, *, overrides: dict[str, Any] | None = None, device: str = "cpu",
         dataset_stats: dict[str, Any] | None = None, features: dict[str, Any] | None = None,
         stats_source: str = "the given statistics") -> PolicyWrapper:  # fmt: skip
    """Load a LeRobot policy folder; see `burnish.policies.load_policy`. Errors call the statistics `stats_source`."""
    folder, device = resolve(path), choose_device(device)
    raw = read_object(folder / CONFIG, folder)
    name = raw.get("type") or raw.get("model_type")  # the second as transformers calls it
    kind, old = kind_of(name, f"in {folder / CONFIG}"), renames.POLICY_FIELDS.get(name, {})
    if kind.own_folder:
        return kind.load(folder, raw, overrides=overrides or {}, device=device, dataset_stats=dataset_stats,
                         features=features, stats_source=stats_source)  # fmt: skip
    changes = folders.known_fields(renames.rename(overrides or {}, old), name)
    raw = kind.read_config({**renames.rename(raw, old), **changes, "type": name}, folder)
    config = folders.decode_config(raw, str(folder / CONFIG), features, device)
    state = tensors.read_weights(folder)
    earlier: dict[str, Any] = {}
    if not (folder / PREPROCESSOR).exists():
        earlier = tensors.old_statistics(state, [*config.input_features, *config.output_features])
    if dataset_stats is None and earlier:
        log.warning("%s has LeRobot's earlier layout: its statistics are taken from the weights", folder)
        dataset_stats, stats_source = earlier, str(folder / WEIGHTS)
    processors = pipelines.load_processors(config, folder, dataset_stats, kind.tokenizer_folder, source=stats_source,
                                           renamed=features is not None, own=kind.own_steps(config))  # fmt: skip
    policy = kind.build(config, 0, folder)
    renamed = kind.rename_tensors(policy, state)
    tensors.load_tensors(policy, renamed, str(folder / WEIGHTS), new_data=features is not None)
    opened = kind.open(policy.to(device).eval(), *processors, folder, dataset_stats)
    opened.read_extras(folder)
    return opened


def kind_of(name: Any, where: str = "") -> type[PolicyWrapper]:
    """The wrapper of a type: its own, one of an installed package, or that of all other types that LeRobot knows."""
    if name in POLICIES:
        return POLICIES.get(name)
    if isinstance(name, str) and name in known_types():
        return LeRobotPolicy
    about = f" ({FOREIGN[name]})" if isinstance(name, str) and name in FOREIGN else ""
    known = ", ".join(sorted({*POLICIES, *known_types()}))
    raise BurnishError(f"policy type {name!r}{about} {where}".rstrip(), f"one of {known}")


def resolve(path: Path | str) -> Path:
    """The folder behind a path or the name of a shipped base.

    Raises:
        BurnishError: there is no policy; it says what to do where the path is a hub name, a run's folder above the
            policy, or an adapter without its base.
    """
    folder = Path(home(str(path)))
    if not folder.is_dir() and len(folder.parts) == 1 and (ASSETS / folder).is_dir():
        folder = ASSETS / folder
    if (folder / ADAPTER).is_file() and not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        raise _adapter(folder.absolute())
    if not (folder / CONFIG).is_file():
        shipped = sorted(p.parent.name for p in ASSETS.glob(f"*/{CONFIG}"))
        also = f" or a shipped base ({', '.join(shipped)})" if shipped else ""
        if is_hub_name(str(path)):
            raise BurnishError(f"no policy at {path}: names of the Hugging Face hub are not fetched",
                               f"a LeRobot policy folder{also}", _download(str(path)))  # fmt: skip
        below = sorted({place.parent for pattern in _BELOW for place in folder.glob(f"{pattern}/{CONFIG}")})
        raise BurnishError(f"no policy at {path}: it has no {CONFIG}", f"a LeRobot policy folder{also}",
                           " or ".join(map(str, below[-3:])) or _named(folder))  # fmt: skip
    return folder.absolute()


def _adapter(folder: Path) -> BurnishError:
    """The error of a folder with LoRA factors alone; its remedy makes a whole policy of them."""
    places = [(ADAPTER, "base_model_name_or_path"), (CONFIG, "pretrained_path")]
    stored = [read_object(folder / file, folder).get(key) for file, key in places if (folder / file).is_file()]
    base = next((name for name in stored if isinstance(name, str) and name), "BASE")
    fetched = is_hub_name(base)
    words = [Path(base).name if fetched else base, "--tuned", str(folder), "-o", f"{folder}-merged"]
    merge = f"burnish weights merge {shlex.join(words)}"
    return BurnishError(f"{folder} is a peft adapter without its base ({ADAPTER}, no {WEIGHTS})",
                        "a whole policy" if base != "BASE" else "a whole policy, made with the BASE it was trained on",
                        f"{_download(base)} && {merge}" if fetched else merge)  # fmt: skip


def _named(folder: Path) -> str:
    """How to get a base that is called by its type or by the last word of its name on the hub."""
    kind = str(folder).removesuffix("_base")
    return _download(f"lerobot/{kind}_base") if kind in ("smolvla", "pi0", "pi05") else ""


def _download(name: str) -> str:
    return f"hf download {name} --local-dir {Path(name).name}"


def choose_device(name: str = "") -> str:
    """`name`, or for "" a GPU where there is one; raises BurnishError for one that is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    folders.check_device(name)
    return name


def policy_and_hash(policy: Policy | Path | str, device: str = "") -> tuple[Policy, str]:
    """A policy, loaded where its folder is given, and the hash of what was given (see `weights_hash`)."""
    if not isinstance(policy, str | Path):
        return policy, weights_hash(policy)
    folder = resolve(policy)
    return load(folder, device=device), weights_hash(folder)
