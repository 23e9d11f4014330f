"""Every method on what a robot records: two cameras of 480x640, no simulator, by `burnish train`."""

import json
import math
import shutil

import fake
import pytest
import torch
from feature_fakes import make_vision
from safetensors.torch import load_file, save_file

from burnish.cli.main import main
from burnish.data.pairs import Pair, write_index
from burnish.weights.extract import extract
from workshop.tiny import make_tiny

POLICIES = ("smolvla", "pi05", "burnish_discrete")
"""pi0 sees by the code of pi05."""
CAMERAS = ("front", "wrist")
METHODS = {
    "align": "teacher: {{name: folder, path: {vision}}}, gradient_norm_ratio: 0.5",
    "capability": "delta: {delta}, weight: 0.1",
    "isolate": "method: aegis, questions: {questions}, anchor_samples: 6",
    "prefer": "pairs: {pairs}, batch_size: 2, pool: 1, score: {{draws: 1}}",
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """One data set and its decoded frames for all runs; questions, pairs, a teacher."""
    root = tmp_path_factory.mktemp("robot")
    fake.make_dataset(root / "data", episodes=3, frames=3, size=(480, 640), cameras=CAMERAS, action_dim=7)
    fake.make_questions(root / "questions", count=8)
    shutil.copytree(root / "data", root / "pairs")
    write_index(root / "pairs", [Pair((0, i), (2, i)) for i in range(2)], {"source": "test"}, 1e9)
    make_vision(root / "vision")
    return root


@pytest.fixture(scope="module", params=POLICIES)
def base(request, ground):
    """A policy folder, and beside it the delta of a fine-tune."""
    folder, tuned = ground / request.param, ground / f"{request.param}-tuned"
    make_tiny(request.param, folder, cameras=CAMERAS, state_dim=4)
    shutil.copytree(folder, tuned)
    draws = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    moved = {n: w + 0.01 * torch.randn(w.shape, generator=draws).to(w) for n, w in weights.items()}
    save_file(moved, tuned / "model.safetensors", metadata={"format": "pt"})
    extract(folder, tuned, output=ground / f"{request.param}-delta")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_on_two_wide_cameras(ground, base, tmp_path, method, capfd):
    folders = {name: ground / name for name in ("questions", "pairs", "vision")} | {"delta": f"{base}-delta"}
    entry = f"{{name: {method}, {METHODS[method].format(**folders)}}}"
    status = main([
        "train", f"--policy.path={base}", f"--data.root={ground / 'data'}", f"--output={tmp_path / 'run'}",
        f"--objectives=[{entry}]", "--train.steps=2", "--train.batch_size=2", "--train.log_every=1",
        "--train.warmup_steps=0", "--train.save_every=100",
        "--train.self_check=false",  # the actions hold their episode's number, whose quantiles do not spread
    ])  # fmt: skip
    assert status == 0, capfd.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert any(name.startswith((f"loss_{method}", method)) for name in rows[0]), rows[0]
    if method == "align":
        ratio = rows[1]["align_lambda"] * rows[1]["align_push_0"] / rows[1]["align_task_push_0"]
        assert ratio == pytest.approx(0.5, rel=1e-3)
    assert (tmp_path / "run/policy/model.safetensors").is_file()
