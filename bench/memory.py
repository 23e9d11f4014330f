"""What each method adds to the memory of a training: peak resident set of `burnish train`, each in its own process.

The unit is P, the bytes of the trained parameters in float32. Plain training holds four of them while it steps
(weights, gradients, AdamW's two moments). Beside each peak stands what `burnish method cost` predicts of it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError

STEPS = 3
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vlm": {
            "text": {"hidden_size": 448, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 7,
                     "num_key_value_heads": 1, "head_dim": 64},
            "vision": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
            "image_size": 32, "patch_size": 8, "scale_factor": 2,
        },
        "image": 32, "batch": 2,
    },
    "smolvla": {
        "vlm": {
            "text": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 16, "num_attention_heads": 15,
                     "num_key_value_heads": 5, "head_dim": 64},
            "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                       "num_attention_heads": 12},
            "image_size": 512, "patch_size": 16, "scale_factor": 4,
        },
        "image": 256, "batch": 1,
    },
}  # fmt: skip
"""About 25 million parameters, and SmolVLA's own widths and depths (its vocabulary is left out: 49,280 words)."""
VARIANTS: dict[str, tuple[str, str]] = {
    "plain": ("smolvla", ""),
    "align": ("smolvla", "name: align, teacher: {{name: scene3d, path: {teacher}}}"),
    "isolate": ("smolvla", "name: isolate, questions: {questions}"),
    "isolate_aegis": ("smolvla", "name: isolate, method: aegis, anchor_samples: 64, questions: {questions}"),
    "capability": ("smolvla", "name: capability, delta: {delta}"),
    "capability_projection": (
        "smolvla",
        "name: capability, kind: projection, gradient_norm_ratio: 0.3, delta: {delta}",
    ),
    "prefer": ("smolvla", "name: prefer, pairs: {pairs}, batch_size: {batch}, pool: 1"),
    "plain_discrete": ("burnish_discrete", ""),
    "distill": ("burnish_discrete", "name: distill, teacher: copy"),
}
"""Name to (policy type, entry in `objectives:`)."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Three steps, the last checkpoint and the exported policy of every method, one process after the other.

    Figures:
        <method>_over_plain: peak of the whole command less that of plain training on the same policy, in P.
        method_extra_p: the largest of these.
        cost_error: of the predicted peak, relative to the measured one, the worst over plain and all methods.
    """
    from burnish.core.provenance import commit, machine

    size = SIZES[args.size]
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as temporary:
        folder = Path(temporary)
        made = _alone(_prepare, folder, size)
        found = {}
        for name in VARIANTS:
            words = _words(folder, name, size)
            found[name] = _measure(folder, words) | {"predicted": _alone(predicted, folder, words)}
            _say(name, found[name])
    info, figures = machine(), {}
    for name, (kind, entry) in VARIANTS.items():
        if entry:
            plain = found["plain" if kind == "smolvla" else "plain_discrete"]
            figures[f"{name}_over_plain"] = (found[name]["peak"] - plain["peak"]) / plain["P"]
            found[name]["steps_over_plain"] = (found[name]["steps"] - plain["steps"]) / plain["P"]
    figures["method_extra_p"] = max(figures.values())
    figures["cost_error"] = max(abs(one["predicted"]["peak"] / one["peak"] - 1) for one in found.values())
    return {
        "name": "memory", "device": info.pop("device"), "versions": info, "n": 1, "figures": figures,
        "command": "python -m bench memory" + (" --size smolvla" if args.size == "smolvla" else "") + " --json",
        "detail": {"commit": commit(), "size": args.size, "batch_size": size["batch"], "steps": STEPS,
                   "fixtures": made, "bytes": found},
    }  # fmt: skip


def _say(name: str, found: dict[str, float]) -> None:
    phases = ", ".join(f"{phase} {found[phase] / found['P']:.2f}" for phase in ("setup", "steps", "end"))
    error = found["predicted"]["peak"] / found["peak"] - 1
    print(f"{name}: {found['P'] / 1e6:.0f} MB trained; peak in P: {phases}; predicted {error:+.1%}", file=sys.stderr)


def _alone(call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)` in a fresh process; what it returns goes through JSON."""
    code = (f"import json, sys; from pathlib import Path; from bench.memory import {call.__name__} as call; "
            "print('\\n' + json.dumps(call(Path(sys.argv[1]), *json.loads(sys.argv[2]))))")  # fmt: skip
    first, *rest = arguments
    command = [sys.executable, "-c", code, str(first), json.dumps(rest)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "2"})
    if done.returncode:
        raise BurnishError(f"bench memory: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _words(folder: Path, name: str, size: dict[str, Any]) -> list[str]:
    kind, entry = VARIANTS[name]
    places = {place: folder / place for place in ("teacher", "questions", "delta", "pairs")}
    return [
        "train", f"--policy.path={folder / kind}", f"--data.root={folder / 'data'}", f"--output={folder / 'run'}",
        f"--objectives=[{'{' + entry.format(**places, batch=size['batch']) + '}' if entry else ''}]",
        f"--train.steps={STEPS}", f"--train.batch_size={size['batch']}", "--train.log_every=1", "--data.workers=1",
        "--train.self_check=false", "--quiet",
    ]  # fmt: skip


def _measure(folder: Path, words: list[str]) -> dict[str, Any]:
    found = _alone(child, folder, words)
    shutil.rmtree(folder / "run")
    return found | {"peak": max(found[phase] for phase in ("setup", "steps", "end"))}


def child(folder: Path, words: list[str]) -> dict[str, float]:
    """`burnish` with `words` in this process; peak bytes before, during and after the steps, and P."""
    from burnish.cli.main import main
    from burnish.train import loop as training

    plain, found = training.loop, {}

    def measured(run: Any, metrics: Any, **options: Any) -> None:
        found["setup"] = _peak()
        plain(run, metrics, **options)
        found["steps"] = _peak()
        trained = [p for name, p in run.trained.items() if not name.startswith("objectives.")]
        found["P"] = 4 * sum(p.numel() for p in trained)

    training.loop = measured
    _peak()
    if main(words) != 0:
        raise BurnishError(f"burnish {' '.join(words)} failed")
    return found | {"end": _peak()}


def predicted(folder: Path, words: list[str]) -> dict[str, Any]:
    """What `burnish method cost` says of `burnish` with `words`, in bytes."""
    from burnish.core.recipe import load_recipe
    from burnish.train.cost import predict

    found = predict(load_recipe(None, [word for word in words if word.startswith("--") and "=" in word]))
    return {"peak": found.peak, "parts": found.parts}


def _peak() -> float:
    """Largest resident set since the last call, in bytes; the kernel's mark is set back."""
    with open("/proc/self/status") as file:
        found = int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return float(found)


def _prepare(folder: Path, size: dict[str, Any]) -> dict[str, Any]:
    """Data, pairs, questions, a teacher; of each policy type a base with random weights, and a delta of the first."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from safetensors.torch import save_file

    from bench.isolate import make_questions
    from bench.train import make_frames
    from burnish.data.pairs import Pair, write_index
    from burnish.policies import create_policy
    from burnish.policies.keys import ACTION, STATE
    from burnish.teachers.scene3d import DEFAULTS, SceneNet
    from workshop.tiny import build_vlm, default_statistics

    make_frames(folder / "data", episodes=4, frames=24, size=size["image"])
    make_questions(folder / "questions")
    shutil.copytree(folder / "data", folder / "pairs")
    write_index(folder / "pairs", [Pair((0, i), (2, i)) for i in range(4)], {"source": "bench"}, 1e9)
    (folder / "teacher").mkdir()
    save_file(SceneNet(**DEFAULTS).state_dict(), folder / "teacher" / "model.safetensors")
    (folder / "teacher" / "config.json").write_text(json.dumps({"model": DEFAULTS}))
    build_vlm(folder / "vlm", **size["vlm"])
    features = {
        "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, size["image"], size["image"])),
        STATE: PolicyFeature(FeatureType.STATE, (8,)), ACTION: PolicyFeature(FeatureType.ACTION, (7,)),
    }  # fmt: skip
    counts = {}
    for kind, fields in (("smolvla", {"num_steps": 3}), ("burnish_discrete", {"bins": 16, "block_size": 28})):
        fields = {"chunk_size": 8, "n_action_steps": 8, **fields}
        policy = create_policy(folder / "vlm", features, default_statistics(8, 7), fields, type=kind)
        policy.save(folder / kind)
        counts[kind] = sum(p.numel() for p in policy.parameters())
    shutil.rmtree(folder / "vlm")
    _tuned(folder, torch.Generator().manual_seed(0))
    return {"parameters": counts}


def _tuned(folder: Path, draws: Any) -> None:
    """The delta of a fine-tune that moved everything a little, as `burnish weights extract` writes it."""
    import torch
    from safetensors.torch import load_file, save_file

    from burnish.weights.extract import extract

    shutil.copytree(folder / "smolvla", folder / "tuned")
    weights = load_file(folder / "smolvla" / "model.safetensors")
    for value in weights.values():
        if value.is_floating_point():
            value += 0.001 * torch.randn(value.shape, generator=draws)
    save_file(weights, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    extract(folder / "smolvla", folder / "tuned", output=folder / "delta")
    shutil.rmtree(folder / "tuned")
