"""From a data set to a recipe: what is wrong with it, what fits the memory at hand, what is held out, how long."""

import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from burnish.core.errors import BurnishError
from burnish.core.files import write_text
from burnish.core.outputs import require_outside
from burnish.core.reading import read_object, read_text
from burnish.core.recipe import merge, recipe_from_dict
from burnish.core.seeding import derive_seed
from burnish.data.checks import require
from burnish.data.dataset import Dataset, open_named
from burnish.data.inspect import Inspection, inspect_dataset
from burnish.policies.keys import CONFIG
from burnish.policies.load import resolve
from burnish.train.cost import GB, memory, predicting, seconds

PASSES = 40
"""How often training goes through its frames: about what LeRobot trains ACT and SmolVLA for."""
FEWEST, MOST = 1_000, 30_000
"""Steps, whatever the number of frames."""
HELD_OUT, MOST_HELD_OUT = 0.1, 20
FROM_SCRATCH = ("act", "diffusion")
"""Types that need no weights and read no sentence; the first is proposed without a policy."""
PRESETS: dict[str, dict[str, Any]] = {
    "as its config trains it": {},
    "as its config trains it, activations computed again": {"memory": {"checkpointing": True}},
    "LoRA, activations computed again": {"memory": {"checkpointing": True}, "peft": {"method": "lora"}, "lr": 1e-4},
}
"""Changes of `train`, tried one after the other until a step fits."""


@dataclass
class Proposal:
    """A recipe and why it is so.

    Args:
        values: the recipe as nested values, without defaults.
        left_out: episodes that training could not read.
        peak, room: bytes that a step is predicted to take, and that there are.
        minutes: of all steps, roughly; None for a machine elsewhere.
    """

    values: dict[str, Any]
    inspection: Inspection
    left_out: list[int]
    remarks: list[str]
    preset: str = ""
    peak: float = 0.0
    room: float = 0.0
    minutes: float | None = None

    @property
    def facts(self) -> list[str]:
        """Method, batch, steps, memory, time, held-out episodes: a line each."""
        train, held_out = self.values["train"], self.values["data"]["held_out"]
        batch = train["batch_size"] * train["grad_accumulation"]
        policy = self.values["policy"].get("path") or f"{self.values['policy']['type']} from scratch"
        time = f", about {math.ceil(self.minutes)} min by this machine's matrix products" if self.minutes else ""
        lines = [f"policy     {policy}: {self.preset}",
                 f"steps      {train['steps']} of {batch} samples, {train['batch_size']} in a forward pass{time}",
                 f"memory     {self.peak / GB:.1f} GB predicted of {self.room / GB:.1f}",
                 f"held out   {len(held_out)} episodes: {', '.join(map(str, held_out)) or 'none'}"]  # fmt: skip
        if self.left_out:
            lines.append(f"left out   {len(self.left_out)} damaged episodes: {', '.join(map(str, self.left_out[:9]))}")
        return [*lines, *self.remarks]

    def write(self, path: Path) -> None:
        """Write the recipe as YAML with its facts above; BurnishError where one with other values is in the way."""
        head = ["Proposed by `burnish start`; edit at will.", f"  burnish run {shlex.quote(str(path))}", *self.facts]
        values = yaml.safe_dump(self.values, sort_keys=False, default_flow_style=None, width=110)
        require_outside(path)
        if os.path.lexists(path):
            if not path.is_dir() and re.sub("(?m)^#.*\n", "", read_text(path)) == values:
                return  # the facts above may differ: free memory is never the same twice
            free = next(one for k in range(2, 10_000) if not (one := path.with_stem(f"{path.stem}-{k}")).exists())
            raise BurnishError(f"{path} exists and says something else", "a new file", f"--output {free}")
        write_text(path, "".join(f"# {line}\n" for line in head) + values)


def propose(data: Path | str, policy: str = "", *, gpu: float = 0.0, quick: bool = False,
            output: Path | None = None) -> Proposal:  # fmt: skip
    """Look at a data set and say how to train on it, and on what to measure.

    Args:
        data: LeRobotDataset folder.
        policy: LeRobot policy folder to fine-tune, a shipped base, or one of `FROM_SCRATCH`, "" being the first.
        gpu: memory in GB of the card that will train; 0 means what is here: a GPU, else this machine's memory.
        quick: do not decode every video.
        output: where the recipe will be written, which names the run; None means the data set's name.

    Raises:
        BurnishError: no data set, none of its episodes can be trained on, no such policy, or nothing that fits.
    """
    policy = policy or FROM_SCRATCH[0]
    folder = None if policy in FROM_SCRATCH else resolve(policy)
    found = inspect_dataset(data, quick=quick)
    meta = open_named(data)
    columns = {key: one["columns"][0] if len(one["columns"]) == 1 else list(one["columns"])
               for key, one in meta.features.items() if one["columns"] != (key,)}  # fmt: skip
    bad = {episode for one in found.problems if one.kind == "error" and one.stops for episode in one.episodes}
    good = require(meta, sorted(set(meta.episodes) - bad), meta.camera_keys)
    bad = set(meta.episodes) - set(good)
    held_out = hold_out(meta, good)
    trained = [episode for episode in good if episode not in held_out]
    named = output.stem if output else Path(data).resolve().name
    root = {"root": str(data), **({"columns": columns} if columns else {}), **({"episodes": trained} if bad else {})}
    chunk = int(min(100, max(8, round(2 * meta.fps))))  # two seconds, half of which is executed
    long = {"overrides": {"chunk_size": chunk, "n_action_steps": chunk // 2}} if policy == "act" else {}
    raw = read_object(folder / CONFIG, folder) if folder else {"type": policy, **long}
    values = {
        "name": re.sub(r"[^\w.-]+", "-", named).strip(".-~")[:80] or "mine",
        "policy": {"path": policy} if folder else raw,
        "data": root | {"held_out": held_out},
        "train": _optimiser(raw),
    }  # fmt: skip
    remarks = [f"mapped     {', '.join(columns)} by data.columns"] * bool(columns)
    proposal = Proposal(values, found, sorted(bad), [*remarks, *_remarks(found, raw.get("type"), held_out, data)])
    _fit(proposal, sum(meta.episodes[episode].length for episode in trained), gpu)
    return proposal


def _fit(proposal: Proposal, frames: int, gpu: float) -> None:
    """Fill in the first preset of which a step fits, with as large a batch as fits, steps and time."""
    proposal.room, on_gpu = memory(gpu)
    wanted = 32 if on_gpu else 8
    proposal.values["train"] |= {"batch_size": wanted} | ({"precision": "bf16"} if on_gpu else {})
    steps = int(min(MOST, max(FEWEST, math.ceil(PASSES * frames / wanted / 100) * 100)))
    for preset, changes in PRESETS.items():
        train = dict(proposal.values["train"])
        merge(train, {**changes, **({"memory": changes["memory"] | {"frozen_dtype": "bf16"}}
                                    if on_gpu and "peft" in changes else {})})  # fmt: skip
        with predicting(recipe_from_dict(proposal.values | {"train": train}), on_gpu) as prediction:
            for size in (wanted, wanted // 4, max(1, wanted // 16)):
                proposal.peak = prediction.cost(size).peak
                if proposal.peak > proposal.room:
                    continue
                train |= {"steps": steps, "batch_size": size, "grad_accumulation": wanted // size,
                          "warmup_steps": steps // 20, "save_every": steps // 5}  # fmt: skip
                proposal.values["train"], proposal.preset = train, preset
                if not gpu:
                    proposal.minutes = seconds(prediction.work(size) * wanted / size, on_gpu) * steps / 60
                return
    root, more = proposal.values["data"]["root"], math.ceil(proposal.peak / GB / 8) * 8
    raise BurnishError(f"a step is predicted to take {proposal.peak / GB:.1f} GB, and there are "
                       f"{proposal.room / GB:.1f}", "a smaller policy, or a card with more memory",
                       f"burnish start {shlex.quote(root)} --gpu {more}")  # fmt: skip


def hold_out(meta: Dataset, episodes: list[int]) -> list[int]:
    """A tenth of the episodes, at most 20, evenly from every instruction; at least two, as an interval takes, of fewer
    than five one, and of a single one none."""
    least = 1 + (len(episodes) > 4)
    count = min(MOST_HELD_OUT, max(least, round(HELD_OUT * len(episodes))), len(episodes) - 1)
    groups: dict[int, list[int]] = {}
    for episode in episodes:
        groups.setdefault(int(meta.rows.keys["task_index"][meta.rows.span(episode)[0]]), []).append(episode)
    places = []
    for task, group in groups.items():  # the k-th of n stands at (k + 1/2) / n, so the first of all are of every task
        order = np.random.default_rng(derive_seed("held out", task)).permutation(len(group))
        places += [((k + 0.5) / len(group), task, group[i]) for k, i in enumerate(order)]
    return sorted(episode for *_, episode in sorted(places)[:count])


def _optimiser(raw: dict[str, Any]) -> dict[str, Any]:
    """Learning rate, decay, betas and clipping that LeRobot trains a type with; burnish's own for other types."""
    from lerobot.configs.policies import PreTrainedConfig

    from burnish.policies.lerobot import known_types

    if raw.get("type") not in known_types():
        return {}
    preset = PreTrainedConfig.get_choice_class(raw["type"])(device="cpu").get_optimizer_preset()
    return {"lr": preset.lr, "weight_decay": preset.weight_decay, "betas": list(preset.betas),
            "max_grad_norm": preset.grad_clip_norm}  # fmt: skip


def _remarks(found: Inspection, kind: Any, held_out: list[int], data: Path | str) -> list[str]:
    said = [] if held_out else ["a single episode: nothing is left to measure on"]
    if kind in FROM_SCRATCH:
        count = len(found.instructions)
        said += [f"{kind} reads no instruction, and there are {count}"] * (count > 1)
        said.append("a pretrained policy that reads them: hf download lerobot/smolvla_base --local-dir smolvla_base && "
                    f"burnish start {shlex.quote(str(data))} --policy smolvla_base -o smolvla.yaml")  # fmt: skip
    return said
