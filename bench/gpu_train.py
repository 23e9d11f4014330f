"""Parts 2 and 3: training steps of SmolVLA and pi05 in bf16, LeRobot's plain loop, ours, and ours with each method."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from bench.gpu_meter import H100_BF16_TFLOPS, Setting, attempted, flops, kept, median_of, ratio, roofline, timed

METHODS = {
    "align": "{{name: align, teacher: {{name: scene3d, path: {teacher}}}, cache: 'off'}}",
    "isolate": "{{name: isolate, questions: {questions}}}",
    "isolate_aegis": "{{name: isolate, method: aegis, questions: {questions}}}",
    "prefer": "{{name: prefer, pairs: {pairs}, batch_size: 4, pool: 1}}",
    "capability": "{{name: capability, delta: {delta}}}",
}
"""Entries of `objectives:`; `distill` is for policies of masked tokens and has a plain step of its own beside it."""
DISTILL = "{name: distill, teacher: copy}"
BATCHES = (8, 32)


def smolvla(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """SmolVLA-450M, all of it trained: LeRobot's loop and ours at batch 8 and 32, every method at 8."""
    n, precision = setting.pick(6, 1), "bf16" if setting.gpu else "no"  # a CPU is slow in bf16
    with _ground(setting) as ground:
        yield "roofline", roofline(setting)
        policy = _real("smolvla", setting)
        yield "policy", {"parameters": sum(p.numel() for p in policy.parameters())}
        sizes = setting.pick(BATCHES, (2,))
        for size in sizes:
            yield f"lerobot_{size}", _lerobot(setting, ground, policy, _words(size, precision), n)
            yield f"ours_{size}", _ours(setting, ground, policy, n, _words(size, precision))
        for name, entry in METHODS.items():
            if name == "capability":
                _delta(ground, policy)
            objective = entry.format(**{place.name: place for place in ground.iterdir()})
            yield name, _ours(setting, ground, policy, n, _words(sizes[0], precision, objective))
        del policy
        policy = _real("discrete-smol", setting)
        yield "ours_discrete", _ours(setting, ground, policy, n, _words(sizes[0], precision))
        yield "distill", _ours(setting, ground, policy, n, _words(sizes[0], precision, DISTILL))


def pi05(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """pi05: LoRA at batch 4 and all weights at batch 4 and 8, with what there is that makes training smaller."""
    n = setting.pick(4, 1)
    memory = _memory_options()
    lora = ["--train.peft.method=lora", *memory["checkpointing"], *memory["frozen"]]
    full = [*memory["checkpointing"], *memory["optimizer"]]
    with _ground(setting) as ground:
        yield "roofline", roofline(setting)
        cases = (("lora_4", 4, lora), ("full_4", 4, full), ("full_8", 8, full))
        for name, size, more in cases[: setting.pick(3, 2)]:
            policy = _real("pi05", setting, {} if memory["checkpointing"] else {"gradient_checkpointing": True})
            found = _ours(setting, ground, policy, n, [*_words(setting.pick(size, 2), "bf16"), *more])
            yield name, {"parameters": sum(p.numel() for p in policy.parameters()), "options": more, **found}
            del policy
            setting.clear()


def _memory_options() -> dict[str, list[str]]:
    """Words of the recipe for checkpointing, frozen weights in bf16 and the 8-bit optimiser, where they exist."""
    from importlib.util import find_spec

    from burnish.core.config import TrainConfig

    there = any(field.name == "memory" for field in fields(TrainConfig))
    small = there and find_spec("torchao") is not None
    return {
        "checkpointing": ["--train.memory.checkpointing=true"] if there else [],
        "frozen": ["--train.memory.frozen_dtype=bf16"] if there else [],
        "optimizer": ["--train.memory.optimizer=adamw8bit"] if small else [],
    }


def _words(size: int, precision: str, objective: str = "") -> list[str]:
    return [f"--train.batch_size={size}", f"--train.precision={precision}", f"--objectives=[{objective}]"]


def _real(name: str, setting: Setting, overrides: dict[str, Any] | None = None) -> Any:
    from workshop.real import make_real

    setting.clear()
    return make_real(name, device=setting.device, image_size=setting.pick(256, 32), overrides=overrides,
                     tiny=setting.rehearse)  # fmt: skip


@contextmanager
def _ground(setting: Setting) -> Iterator[Path]:
    """A folder with data, preference pairs over it, questions and a teacher with random weights."""
    import av
    from safetensors.torch import save_file

    from bench.isolate import make_questions
    from bench.train import make_frames
    from burnish.core.seeding import seeded
    from burnish.data.pairs import Pair, write_index
    from burnish.teachers.scene3d import DEFAULTS, SceneNet

    with TemporaryDirectory(prefix="burnish-gpu-") as temporary:
        folder = Path(temporary)
        av.logging.set_libav_level(av.logging.ERROR)  # the encoder tells its life otherwise
        make_frames(folder / "data", episodes=3, frames=setting.pick(24, 8), size=setting.pick(256, 32))
        shutil.copytree(folder / "data", folder / "pairs")
        write_index(folder / "pairs", [Pair((0, i), (2, i)) for i in range(8)], {"source": "bench"}, 1e9)
        make_questions(folder / "questions")
        (folder / "teacher").mkdir()
        with seeded(0):
            save_file(SceneNet(**DEFAULTS).state_dict(), folder / "teacher" / "model.safetensors")
        (folder / "teacher" / "config.json").write_text(json.dumps({"model": DEFAULTS}))
        (folder / "delta").mkdir()  # made when it is asked for, which takes a while at real size
        yield folder


def _delta(ground: Path, policy: Any) -> None:
    """The delta of a fine-tune that moved everything a little, as `burnish weights extract` writes it."""
    import torch

    from burnish.weights.extract import extract

    random = torch.Generator().manual_seed(0)
    weights = {name: value.detach().cpu() for name, value in policy.policy.state_dict().items()}
    tuned = {n: v + 1e-3 * torch.randn(v.shape, generator=random) if v.is_floating_point() else v
             for n, v in weights.items()}  # fmt: skip
    for name, state in (("base", weights), ("tuned", tuned)):
        policy.save(ground / name, state_dict=state)
    (ground / "delta").rmdir()
    extract(ground / "base", ground / "tuned", output=ground / "delta")
    for name in ("base", "tuned"):
        shutil.rmtree(ground / name)


@contextmanager
def _run(setting: Setting, ground: Path, policy: Any, words: list[str]) -> Iterator[Any]:
    """A run of ours that trains `policy` where it is; afterwards what was added to it is gone."""
    from burnish.core.recipe import load_recipe
    from burnish.train.run import Run
    from burnish.train.setup import own_accelerate_state

    recipe = load_recipe(None, [
        "--name=bench", f"--output={ground / 'run'}", f"--data.root={ground / 'data'}",
        f"--policy.path={ground / 'policy'}",
        "--train.steps=1000", "--train.log_every=1000", "--train.self_check=false",
        *words,
    ])  # fmt: skip
    for name in ("run", "policy"):
        (ground / name).mkdir(exist_ok=True)
    policy.config.save_pretrained(ground / "policy")  # all that is read of the folder; the policy is in memory
    with ExitStack() as stack:
        stack.callback(setting.clear)
        stack.callback(shutil.rmtree, ground / "run")
        stack.enter_context(own_accelerate_state())
        stack.enter_context(patch("burnish.policies.load_policy", lambda *_, **__: policy))
        if not setting.gpu:  # a rehearsal beside a GPU stays on the CPU
            stack.enter_context(patch.dict("os.environ", {"ACCELERATE_USE_CPU": "true"}))
        policy.requires_grad_(True)
        yield Run(recipe, progress=False)


def _ours(setting: Setting, ground: Path, policy: Any, n: int, words: list[str]) -> dict[str, Any]:
    """Steps of our loop, loading and augmentation of the data included, or why there are none."""
    from burnish.train.loop import train_step
    from burnish.train.selfcheck import DivergenceGuard
    from burnish.train.step import Streams

    def steps() -> dict[str, Any]:
        with _run(setting, ground, policy, words) as run:
            streams, watch = Streams(run), DivergenceGuard(run.output, 0, late=setting.gpu)
            try:
                found = _measured(setting, run, lambda: train_step(run, streams, watch), n)
            finally:
                streams.close()
            return found | {"trained": sum(p.numel() for p in run.trained.values()),
                             "words": [word.replace(f"{ground}/", "FOLDER/") for word in words]}  # fmt: skip

    return attempted(steps)


def _lerobot(setting: Setting, ground: Path, policy: Any, words: list[str], n: int) -> dict[str, Any]:
    """lerobot-train's step on finished batches: preprocessor, forward under autocast, backward, clip, AdamW."""
    import torch

    def steps() -> dict[str, Any]:
        with _run(setting, ground, policy, words) as run:
            data, config = run.data, policy.config
            batches = [_finished(run, data.raw(k), k) for k in range(4)]
            optimizer = config.get_optimizer_preset().build(policy.policy.parameters())
            trained, at = [p for p in policy.policy.parameters() if p.requires_grad], iter(range(10**9))

            def step() -> None:
                batch = policy.preprocessor(dict(batches[next(at) % len(batches)]))
                with run.accelerator.autocast():
                    loss, _ = policy.policy.forward(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, config.optimizer_grad_clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            return _measured(setting, run, step, n)

    return attempted(steps)


def _finished(run: Any, batch: dict[str, Any], k: int) -> dict[str, Any]:
    from burnish.data.loader import to_device

    found = run.data.finish(to_device(batch, run.device), k)
    return {key: value for key, value in found.items() if not key.startswith("shift.")}


def _measured(setting: Setting, run: Any, step: Callable[[], Any], n: int) -> dict[str, Any]:
    """Times of a step, its arithmetic, and the token positions that go through the networks in it."""
    lengths: list[int] = []
    hooks = [module.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[:2].numel()))
             for module in run.policy.token_counters()]  # fmt: skip
    step()  # allocates the optimiser's state, and is not what counts
    lengths.clear()
    operations = flops(step)
    for hook in hooks:
        hook.remove()
    return {"tokens": sum(lengths), "tflop": operations / 1e12} | timed(setting, step, n, warmup=setting.pick(2, 0))


def smolvla_figures(found: dict[str, Any]) -> dict[str, Any]:
    plain, best = found.get("ours_8", found.get("ours_2", {})), found.get("roofline", {}).get("product_tflops")
    names = [n for n in found if n.startswith(("lerobot_", "ours_")) and n != "ours_discrete"]
    rows = {name: _row(found[name], best) for name in names if "median" in found[name]}
    shown = {f"{name}_{what}": value for name, row in rows.items() for what, value in row.items()}
    for size in (*BATCHES, 2):
        theirs, ours = median_of(found, f"lerobot_{size}"), median_of(found, f"ours_{size}")
        shown[f"step_over_lerobot_{size}"] = ratio(ours, theirs)
    for name in METHODS:
        shown[f"step_ratio_{name}"] = ratio(median_of(found, name), plain.get("median"))
        shown[f"peak_gb_{name}"] = found.get(name, {}).get("peak_gb")
    shown["step_ratio_distill"] = ratio(median_of(found, "distill"), median_of(found, "ours_discrete"))
    return kept(shown)


def pi05_figures(found: dict[str, Any]) -> dict[str, Any]:
    best = found.get("roofline", {}).get("product_tflops")
    rows = {name: _row(row, best) for name, row in found.items() if "median" in row}
    return kept({f"{name}_{what}": value for name, row in rows.items() for what, value in row.items()})


def _row(row: dict[str, Any], best: float | None) -> dict[str, Any]:
    """What is shown of a training step; shares are of the measured product and of the data sheet's number."""
    seconds = row["median"] / 1000
    per_second = row["tflop"] / seconds
    return {
        "step_ms": row["median"], "tokens_per_s": row["tokens"] / seconds, "tflops": per_second,
        "product_share": ratio(per_second, best), "datasheet_share": per_second / H100_BF16_TFLOPS,
        "peak_gb": row.get("peak_gb"),
    }  # fmt: skip


TARGETS = {"lora_4_peak_gb": "<= 22", "full_4_peak_gb": "<= 72", "full_8_peak_gb": "<= 72"}
