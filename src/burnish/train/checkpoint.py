"""Checkpoints: a LeRobot policy folder plus `burnish/`, whole or absent, from which a run goes on bit for bit.

    checkpoints/000500/            config.json, model.safetensors, processors: what is exported (averaged, merged)
    checkpoints/000500/burnish/    weights.safetensors    trained parameters and buffers, as they are in training
                                   optimizer.safetensors  AdamW's state by parameter name
                                   average.safetensors    the moving average, where there is one
                                   objectives.safetensors every objective's state, <objective>.<name>
                                   meta.json              step, recipe, hashes, commit, log window, scaler
    checkpoints/last               link to the newest

A run whose weights are sharded keeps the four files' tensors in burnish/state/ instead, a file from every rank in the
safetensors form of torch.distributed.checkpoint. Either kind is read by any number of ranks, sharded or not.

All randomness of a micro-batch follows from the seed and its number, counted over steps and ranks, and so does its
data: that number is the RNG state and the data position.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish import __version__
from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import new_folder, point_to, remove_folder, require_space, write_json
from burnish.core.options import number
from burnish.core.provenance import commit
from burnish.core.reading import read_object, regular_file
from burnish.core.recipe import flatten, recipe_from_dict, recipe_to_dict
from burnish.methods.gradients import local, own_rows, whole
from burnish.methods.objective import Run
from burnish.policies.base import Policy
from burnish.train import sharded_state
from burnish.train.optim import empty_optimizer_tensors, load_optimizer_tensors, merged, optimizer_tensors
from burnish.train.setup import process_count
from burnish.train.sharded import rows_like

FORMAT = 1
log = logging.getLogger("burnish")
STATE = "state"
KEEP = 2
_META = {
    "step": int, "recipe": dict, "parent_hash": str, "data_hash": str, "minutes": int | float, "window": dict,
    "scaler": dict, "objectives": dict, "optimizer": list, "processes": int,
}  # fmt: skip
_MAY_CHANGE = (
    "name", "output", "demos.", "eval.", "data.workers", "data.cache_dir", "data.cache_gb", "data.root",
    "train.log_every", "train.save_every", "train.retention_every", "train.max_minutes", "train.trackers",
    "train.self_check", "train.keep_checkpoints", "train.shard",
)  # fmt: skip
"""Fields (or sections) that may differ on resuming: they do not touch the arithmetic, or have a hash of their own."""


@contextmanager
def exported(run: Run):
    """Inside, `run.policy` is what is handed out: averaged weights, adapters merged, evaluation mode.

    Sharded adapters stay beside their layers, which is the same but for rounding; `_write_policy` merges them.
    """
    with ExitStack() as stack:
        if run.average is not None:
            stack.enter_context(run.average.swapped())
        if run.recipe.train.peft.method != "none" and not run.sharded:
            stack.enter_context(merged(run.policy))
        training = run.policy.training
        run.policy.eval()
        yield run.policy
        run.policy.train(training)


def save(run: Run, log_state: dict[str, Any]) -> Path:
    """Write checkpoints/<step>/ of `run`, move `last`, drop older ones than the newest two.

    The first rank calls this; where weights are sharded, every rank does. `log_state` is kept in meta.json as it is:
    minutes of training, and the figures that no row has yet.
    """
    target = run.output / "checkpoints" / f"{run.step:06d}"
    tensors = _training_state(run)
    size = sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())
    size += sum(p.numel() * p.element_size() for p in run.policy.parameters())
    require_space(run.output, size, f"checkpoint {target}")
    with _new_folder(run, target) as folder:
        _write_policy(run, folder, target)
        if run.sharded:
            sharded_state.write(folder / "burnish" / STATE, tensors)
        if run.accelerator.is_main_process:
            (folder / "burnish").mkdir(exist_ok=True)
            for name, part in tensors.items() if not run.sharded else ():
                _save_tensors(part, folder / "burnish" / f"{name}.safetensors")
            write_json(folder / "burnish" / "meta.json", _meta(run, log_state))
    if run.accelerator.is_main_process:
        point_to(target.parent / "last", target.name)
        drop(run.output, KEEP)
    return target


@contextmanager
def _new_folder(run: Run, target: Path) -> Iterator[Path]:
    """`new_folder`; where weights are sharded, all ranks fill the one folder and the first renames it at the end."""
    if not run.sharded:
        with new_folder(target) as folder:
            yield folder
        return
    main, wait = run.accelerator.is_main_process, run.accelerator.wait_for_everyone
    with new_folder(target) if main else nullcontext(target.with_name(f".{target.name}.new")) as folder:
        wait()
        yield folder
        wait()
    wait()


def _write_policy(run: Run, folder: Path, home: Path) -> None:
    """The policy that is handed out as an ordinary folder; where it is sharded, tensor by tensor through one rank."""
    with exported(run) as policy:
        _check_finite(run, policy)
        state = sharded_state.Whole(policy.stored()) if run.sharded else None
        if state is not None and not run.accelerator.is_main_process:
            state.follow()
            return
        policy.save(folder, home=home, **({} if state is None else {"state_dict": state}))
        run.data.describe(folder)


def drop(output: Path, keep: int) -> None:
    """Remove all checkpoints of a run folder but the newest `keep`."""
    for old in _finished(output)[: -keep or None]:
        remove_folder(old)
    if not keep:
        remove_folder(output / "checkpoints")


def export(run: Run) -> Path:
    """Write the final policy folder <output>/policy and, with adapters, <output>/adapter in peft's format."""
    target = run.output / "policy"
    with _new_folder(run, target) as folder:
        _write_policy(run, folder, target)
    if run.recipe.train.peft.method != "none":
        with _new_folder(run, run.output / "adapter") as folder:
            _save_adapter(run, folder)
    return target


def _check_finite(run: Run, policy: Policy) -> None:
    """The guard looks at loss and gradients; a step of finite gradients may still overflow."""
    tensors = {**run.trained, **dict(policy.named_parameters())}
    wrong = torch.stack([(~torch.isfinite(local(tensor))).sum() for tensor in tensors.values()])
    bad = [name for name, count in zip(tensors, run.total(wrong).tolist(), strict=True) if count]
    if bad:
        found = f"step {run.step}: {len(bad)} of {len(tensors)} tensors are not finite, such as '{bad[0]}'"
        fix = f"--fresh --train.lr={run.recipe.train.lr / 10:g}; the checkpoints before are whole"
        raise BurnishError(found, "finite weights", fix)


def latest(output: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, None when there is none."""
    finished = _finished(output)
    return finished[-1] if finished else None


def load(run: Run, folder: Path) -> dict[str, Any]:
    """Bring `run` to the state of a checkpoint; returns its meta.

    Raises:
        BurnishError: another recipe, data set or base policy made it, or tensors are missing, extra or misshapen.
    """
    meta = read_meta(folder)
    check_same_recipe(meta["recipe"], run.recipe, folder, meta["processes"])
    if re.fullmatch("[0-9a-f]{16}", meta["parent_hash"]):  # SHA-256, of earlier versions
        log.warning("%s: an earlier version hashed its base policy otherwise, so it is not compared", folder)
        meta["parent_hash"] = run.parent_hash
    for key, now, what in (("parent_hash", run.parent_hash, "base policy"), ("data_hash", run.data.hash, "data set")):
        if meta[key] != now:
            raise BurnishError(f"{folder} was made with another {what} (hash {meta[key]})", f"hash {now}",
                               "another --output, or --fresh (train, run) to start over")  # fmt: skip
    state = _training_state(run)
    # AdamW makes its state at the first step, so a fresh run has nothing to fill; the meta has the names.
    state["optimizer"] = empty_optimizer_tensors(run.trained, meta["optimizer"])
    if (folder / "burnish" / STATE).is_dir():
        sharded_state.read(folder / "burnish" / STATE, state, no_dist=not run.sharded)
    else:
        for name, part in state.items():
            path = folder / "burnish" / f"{name}.safetensors"
            saved = _read_tensors(path)
            _copy_into(part, _without_repeats(saved, part) if name == "objectives" else saved, path)
    load_optimizer_tensors(run.optimizer, run.trained, state["optimizer"])
    for name, objective in run.objectives.items():
        extra_state = meta["objectives"].get(name)
        if extra_state is not None:
            objective.set_extra_state(extra_state)
    return meta


def read_meta(folder: Path) -> dict[str, Any]:
    """The checkpoint's meta.json; BurnishError when it is missing or from another format."""
    path = folder / "burnish" / "meta.json"
    if not path.exists():
        raise BurnishError(f"{folder} has no training state, {path.name} of it", "a whole one", f"rm -r '{folder}'")
    meta = read_object(path)
    if meta.get("format") != FORMAT:
        raise BurnishError(f"{path} has format {meta.get('format')}", f"{FORMAT}", "the burnish version that wrote it")
    wrong = [key for key, kind in _META.items() if not isinstance(meta.get(key), kind)]
    wrong += [] if wrong else [key for key in ("step", "minutes") if not number(meta[key]) or meta[key] < 0]
    wrong += [] if wrong or all(isinstance(name, str) for name in meta["optimizer"]) else ["optimizer"]
    train = {} if wrong else meta["recipe"].get("train", {})
    passes = train.get("grad_accumulation", 1) if isinstance(train, dict) else None
    wrong += [] if type(passes) is int and passes > 0 else ["recipe"]
    parts = [] if wrong else list(meta["window"].values())
    # The sum of a step that overflowed in fp16 is not finite.
    values = [one for part in parts for one in (part.values() if isinstance(part, dict) else [None])]
    figures = all(type(one) is float or number(one) for one in values)
    if wrong or not figures or meta["window"].keys() != {"sums", "counts"}:
        raise BurnishError(f"{path} is damaged ('{(wrong or ['window'])[0]}' of it)", "what `burnish train` wrote",
                           f"rm -r '{folder}'")  # fmt: skip
    return {
        "batches": meta["step"] * passes * meta["processes"],
        **meta,
    }  # one of an earlier version did not change its number of processes


def check_same_recipe(before: dict[str, Any], recipe: RecipeConfig, where: Path, processes: int = 1) -> None:
    """Raise BurnishError naming every field that differs and would change the training.

    `processes` is their number there: with another one now, `grad_accumulation` may make up for it.
    """
    # A field that came into being after that run has its default there.
    old = flatten(recipe_to_dict(recipe_from_dict(before, str(where))))
    new = flatten(recipe_to_dict(recipe))
    passes = "train.grad_accumulation"
    if old[passes] * processes == new[passes] * process_count():
        old[passes] = new[passes]
    if recipe.train.memory.fit_gb:  # which splits batches, and must not look like a change by itself
        for one in (old, new):
            one["train.batch_size"] *= one.pop(passes)
    changed = [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise BurnishError(f"the recipe has changed since {where}: {', '.join(changed)}", "the same values to resume",
                           "another --output, or --fresh (train, run) to start over")  # fmt: skip


def _finished(output: Path) -> list[Path]:
    folder = output / "checkpoints"
    found = [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def _training_state(run: Run) -> dict[str, dict[str, Tensor]]:
    policy = {name: p.detach() for name, p in run.trained.items() if not name.startswith("objectives.")}
    state = {
        "weights": policy | {f"buffer:{name}": b for name, b in _buffers(run.policy).items()},
        "optimizer": optimizer_tensors(run.optimizer, run.trained),
        "objectives": {
            f"{name}.{key}": value
            for name, objective in run.objectives.items()
            for key, value in objective.state_dict(keep_vars=False).items()
            if isinstance(value, Tensor)
        },
    }
    if run.average is not None:
        shadow = run.average.shadow
        state["average"] = {name: rows_like(p, shadow[name]) for name, p in run.trained.items()}
    return state


def _buffers(policy: Policy) -> dict[str, Tensor]:
    """The policy's persistent buffers (running statistics and the like)."""
    kept = policy.state_dict().keys()
    return {name: buffer for name, buffer in policy.named_buffers() if name in kept}


def _meta(run: Run, log_state: dict[str, Any]) -> dict[str, Any]:
    extra = {
        name: value
        for name, objective in run.objectives.items()
        for key, value in objective.state_dict().items()
        if not isinstance(value, Tensor) and key == "_extra_state"
    }
    scaler = run.accelerator.scaler.state_dict() if run.accelerator.scaler is not None else {}
    return {
        "format": FORMAT,
        "step": run.step,
        "recipe": recipe_to_dict(run.recipe),
        "parent_hash": run.parent_hash,
        "data_hash": run.data.hash,
        "commit": commit(),
        "versions": {"burnish": __version__, "torch": torch.__version__},
        "processes": run.accelerator.num_processes,
        "batches": run.number_of(0) - run.accelerator.process_index,
        "randomness": "every draw follows from train.seed and the number of the micro-batch",
        **log_state,
        "scaler": scaler,
        "objectives": extra,
        "optimizer": sorted(optimizer_tensors(run.optimizer, run.trained)),
    }


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    whole: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        # The writer refuses memory that two share, and reads all else where it lies: no copy as large as the state.
        shared = storage.nbytes() != value.nbytes or storage.data_ptr() in places
        whole[name] = value.clone() if shared else value
        places.add(storage.data_ptr())
    save_file(whole, path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.exists():
        regular_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BurnishError(f"{path} is unreadable ({error})", "a whole checkpoint",
                           f"rm -r '{path.parents[1]}'") from error  # fmt: skip


def _same_names(expected: set[str], found: set[str], path: Path) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        words = [f"lacks '{missing[0]}' ({len(missing)} in all)"] if missing else []
        words += [f"has the extra tensor '{extra[0]}' ({len(extra)} in all)"] if extra else []
        raise BurnishError(f"{path} {' and '.join(words)}", "exactly the tensors of this run")


def _without_repeats(saved: dict[str, Tensor], live: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what earlier versions stored again under a second name: a part that several parts of a method share."""
    kept = {name: tensor for name, tensor in saved.items() if name in live}

    def repeated(name: str) -> bool:
        end = name.rpartition(".")[2]
        same = (t for other, t in kept.items() if other.endswith(f".{end}"))
        return any(t.shape == saved[name].shape and torch.equal(t, saved[name]) for t in same)

    return kept | {name: tensor for name, tensor in saved.items() if name not in live and not repeated(name)}


def _copy_into(live: dict[str, Tensor], saved: dict[str, Tensor], path: Path) -> None:
    _same_names(set(live), set(saved), path)
    with torch.no_grad():
        for name, tensor in live.items():
            if saved[name].shape != tensor.shape:
                raise BurnishError(f"{path}: '{name}' has shape {tuple(saved[name].shape)}", f"{tuple(tensor.shape)}")
            local(tensor).copy_(own_rows(saved[name], tensor))


def _save_adapter(run: Run, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, which peft.PeftModel.from_pretrained reads."""
    from peft import get_peft_model_state_dict

    config = run.policy.peft_config["default"]
    beside = [name for name in run.trained if "lora_" not in name and not name.startswith("objectives.")]
    if beside:
        run.say([f"{len(beside)} tensors were trained beside the adapters, such as '{beside[0]}': they are in "
                 f"{run.output / 'policy'}, not in {run.output / 'adapter'}"])  # fmt: skip
    with ExitStack() as stack:
        if run.average is not None:
            stack.enter_context(run.average.swapped())
        tensors = get_peft_model_state_dict(run.policy, adapter_name="default")
        tensors = {f"base_model.model.{name}": whole(t) for name, t in tensors.items()}
        if run.accelerator.is_main_process:
            _save_tensors(tensors, folder / "adapter_model.safetensors")
            config.save_pretrained(folder)
