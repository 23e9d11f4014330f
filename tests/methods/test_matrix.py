"""Every method on every policy: it trains, resumes to the same bits, and stands beside another method; or says no.

What is peculiar to one method or one policy has tests of its own; a new one of either adds a line here.
"""

import json
import math
import shutil
from contextlib import contextmanager
from importlib.util import find_spec

import fake
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import adaptive_avg_pool2d

from burnish.core.errors import BurnishError
from burnish.core.recipe import load_recipe
from burnish.data.pairs import Pair, write_index
from burnish.teachers.base import Teacher
from burnish.train import checkpoint
from burnish.train.loop import train_step
from burnish.train.run import Run
from burnish.train.selfcheck import DivergenceGuard
from burnish.train.setup import own_accelerate_state
from burnish.train.step import Streams
from burnish.weights.extract import extract
from workshop.tiny import make_tiny

pytestmark = pytest.mark.usefixtures("few_held")
POLICIES = ("smolvla", "pi0", "pi05", "burnish_discrete", "pi0_fast", "act", "vqbet", "openvla", "openvla_oft")
POLICIES += ("diffusion",) if find_spec("diffusers") else ()
CAMERAS = ("top", "wrist")
ONE_CAMERA, BLIND = ("vqbet",), ("vqbet", "diffusion")
"""The second see nothing in 32 pixels, which are one place of their spatial softmax."""
METHODS = {
    "align": (
        "teacher: {{name: 'test_matrix:Brightness'}}, pairs: [[0, 0], [1, 0]], cache: 'off', gradient_norm_ratio: 0.5, "
        "measure_every: 2, warmup_steps: 5, decay: true"
    ),
    "capability": "delta: {delta}, weight: 0.1",
    "distill": "teacher: copy",
    "few_steps": "steps: 2, teacher_steps: 4",
    "isolate": "method: aegis, questions: {questions}, anchor_samples: 6, every: 3",
    "prefer": "pairs: {pairs}, batch_size: 2, pool: 1, score: {{draws: 2}}",
    "retrieve": "hidden: 8, width: 4, window: 2, far: 5",
}
"""The inside of each entry; `{...}` are folders made below."""
BESIDE = {"align": "isolate", "capability": "align", "distill": "isolate", "few_steps": "prefer", "isolate": "prefer",
          "prefer": "capability", "retrieve": "align"}  # fmt: skip
LACKS = {
    "no masked tokens": [("distill", kind) for kind in POLICIES if kind != "burnish_discrete"],
    "no language model": [("isolate", "act"), *[("retrieve", kind) for kind in ("act", "vqbet", "diffusion")]],
    "no model that the executor can run": [
        ("few_steps", kind) for kind in POLICIES if kind not in ("smolvla", "pi0", "pi05")
    ],
    "no hidden states": [(method, kind) for method in ("isolate", "align") for kind in ("vqbet", "diffusion")],
    "no log-probability": [("prefer", kind) for kind in ("act", "vqbet", "diffusion")],
}
REFUSED = {pair: lack for lack, pairs in LACKS.items() for pair in pairs if pair[1] in POLICIES}
ALIKE = {("retrieve", kind) for kind in ("pi0", "pi0_fast", "openvla_oft")}
"""What runs through the code of another kind: the tower of pi05, that of openvla."""
SERVED = [(m, kind) for m in METHODS for kind in POLICIES if (m, kind) not in REFUSED and (m, kind) not in ALIKE]
OVERRIDES = {"burnish_discrete": {"block_size": 28, "noise": "pipeline"}}
"""A student whose blocks of four steps are what `distill` is for; the other methods take it as well."""


class Brightness(Teacher):
    """One layer: how bright each patch is."""

    widths = (3,)

    def __init__(self, grid):
        super().__init__()
        self.grid, self.identity = tuple(grid), {"name": "brightness", "grid": list(grid)}

    def features(self, views, layers):
        cells = adaptive_avg_pool2d(views.images.flatten(0, 1), self.grid).permute(0, 2, 3, 1)
        return {layer: cells.unflatten(0, views.images.shape[:2]) for layer in layers}


def cameras_of(kind):
    return CAMERAS[: 1 if kind in ONE_CAMERA else 2]


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """Data, questions, pairs; and of each policy a base and the delta of a fine-tune."""
    root = tmp_path_factory.mktemp("matrix")
    fake.make_dataset(root / "data", cameras=CAMERAS, action_dim=7)
    fake.make_questions(root / "questions")
    shutil.copytree(root / "data", root / "pairs")
    write_index(root / "pairs", [Pair((0, i), (2, i)) for i in range(4)], {"source": "test"}, 1e9)
    for kind in POLICIES:
        base, tuned = make_tiny(kind, root / kind, cameras=cameras_of(kind), state_dim=4), root / f"{kind}-tuned"
        shutil.copytree(base, tuned)
        draws = torch.Generator().manual_seed(0)
        weights = load_file(base / "model.safetensors")
        numbers = {n: w for n, w in weights.items() if w.is_floating_point()}
        moved = {n: w + 0.01 * torch.randn(w.shape, generator=draws).to(w) for n, w in numbers.items()}
        save_file({**weights, **moved}, tuned / "model.safetensors", metadata={"format": "pt"})
        extract(base, tuned, output=root / f"{kind}-delta")
    return root


def recipe(ground, kind, output, *methods, more=()):
    folders = {name: ground / name for name in ("questions", "pairs")} | {"delta": ground / f"{kind}-delta"}
    entries = ", ".join(f"{{name: {method}, {METHODS[method].format(**folders)}}}" for method in methods)
    return load_recipe(None, [
        f"--policy.path={ground / kind}", f"--policy.overrides={json.dumps(OVERRIDES.get(kind, {}))}",
        f"--data.root={ground / 'data'}", f"--output={output}", f"--objectives=[{entries}]", "--train.steps=2",
        f"--data.cameras=[{', '.join(cameras_of(kind))}]", f"--train.self_check={str(kind not in BLIND).lower()}",
        "--train.batch_size=2", "--train.grad_accumulation=2", "--train.log_every=1", "--train.save_every=1",
        "--train.lr=1e-3", "--train.warmup_steps=0", "--train.ema_decay=0.9", "--data.workers=1", *more,
    ])  # fmt: skip


@contextmanager
def started(made):
    with own_accelerate_state():
        yield Run(made, progress=False)


def step(run):
    """One step of the loop, and what would be logged after it."""
    streams = Streams(run)
    try:
        edits = train_step(run, streams, DivergenceGuard(run.output, 0, late=False))
    finally:
        streams.close()
    return {**run.window.means(), **edits, **{k: v for o in run.objectives.values() for k, v in o.metrics().items()}}


def state(run):
    """Copies of all that a checkpoint keeps."""
    return {
        f"{part}/{name}": tensor.clone()
        for part, tensors in checkpoint._training_state(run).items()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("method", "kind"), SERVED)
def test_a_method_trains_and_resumes_to_the_same_bits(ground, tmp_path, method, kind):
    made = recipe(ground, kind, tmp_path / "run", method)
    with started(made) as run:
        before = state(run)
        step(run)
        checkpoint.save(run, run.log_state())
        row, whole = step(run), state(run)
    moved = [name for name in before if name.startswith("weights/") and not torch.equal(before[name], whole[name])]
    assert moved and all(math.isfinite(value) for value in row.values())
    assert any(name.startswith((f"loss_{method}", method)) for name in row), "the method left no figure"
    with started(made) as again:
        again.restore(checkpoint.latest(tmp_path / "run"))
        assert again.step == 1
        resumed_row, resumed = step(again), state(again)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert row == resumed_row


@pytest.mark.parametrize(("method", "kind"), [pair for pair in SERVED if (BESIDE[pair[0]], pair[1]) in SERVED])
def test_a_method_stands_beside_another(ground, tmp_path, method, kind):
    with started(recipe(ground, kind, tmp_path / "run", method, BESIDE[method])) as run:
        row = step(run)
    assert all(math.isfinite(value) for value in row.values())
    for name in (method, BESIDE[method]):
        assert any(figure.startswith((f"loss_{name}", name)) for figure in row), f"{name} left no figure"


@pytest.mark.parametrize(("method", "kind"), list(REFUSED))
def test_a_method_says_which_policy_it_cannot_serve(ground, tmp_path, method, kind):
    with (
        pytest.raises(BurnishError, match=REFUSED[method, kind]) as error,
        started(recipe(ground, kind, tmp_path / "run", method)),
    ):
        pass
    assert "\n" not in str(error.value) and kind in str(error.value)


@pytest.mark.parametrize(
    ("method", "lack"),
    [("align", "hidden states"), ("distill", "masked tokens"),
     ("few_steps", "model that the executor can run"), ("isolate", "hidden states"),
     ("prefer", "log-probability"), ("retrieve", "language model")],
)  # fmt: skip
def test_a_policy_that_does_nothing_but_act_is_told_apart(ground, dataset, tmp_path, monkeypatch, method, lack):
    fake.register(monkeypatch.setattr)
    monkeypatch.setattr(fake.FakePolicy, "capabilities", frozenset())
    more = ["--policy.path=fake", f"--data.root={dataset}", "--data.cameras=[front]"]
    with (
        pytest.raises(BurnishError, match=f"{method}: a policy of type fake has no .*{lack}") as error,
        started(recipe(ground, "smolvla", tmp_path / "run", method, more=more)),
    ):
        pass
    assert "\n" not in str(error.value)
