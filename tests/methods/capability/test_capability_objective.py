"""The objective in the real loop, on a policy that trains in milliseconds."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import burnish
from burnish.core.errors import BurnishError
from burnish.weights.delta import Delta
from burnish.weights.extract import extract
from burnish.weights.merge import merge


@pytest.fixture(scope="module")
def fake():
    spec = importlib.util.spec_from_file_location("capability_fake", Path(__file__).parents[2] / "train" / "fake.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(fake, tmp_path_factory):
    """Base, two fine-tunes (another seed stands for the capability), their delta, merged; two LoRA runs."""
    root = tmp_path_factory.mktemp("capability")
    with pytest.MonkeyPatch.context() as patch:
        fake.register(patch.setattr)
        fake.FakePolicy().save(root / "base")
        fake.make_dataset(root / "data")
        for name, seed, more in (("plain", 0, []), ("aux", 1, []), ("lora_a", 0, LORA), ("lora_b", 1, LORA)):
            burnish.train(run(fake, root, name, f"--train.seed={seed}", "--train.lr=0.02", *more), progress=False)
    parents = {"base": root / "base", "tuned": root / "aux/policy", "control": root / "plain/policy"}
    extract(**parents, output=root / "delta")
    extract(root / "base", root / "lora_a/adapter", root / "lora_b/adapter", output=root / "lora_delta")
    merge(root / "base", [(root / "delta", 1.1)], output=root / "merged")
    return root


LORA = ["--train.peft.method=lora", "--train.peft.rank=2", "--train.peft.target_modules=(backbone.0|head)"]


def run(fake, root, name, *more):
    shutil.rmtree(root / name, ignore_errors=True)
    return fake.recipe(root / "data", root / name, f"--policy.path={root / 'base'}", "--train.log_every=2", *more)


def train(fake, made, monkeypatch, name, start="merged", *more, **options):
    fake.register(monkeypatch.setattr)
    entry = {"name": "capability", "delta": str(made / "delta"), **options}
    given = [f"--policy.path={made / start}", f"--objectives=[{entry}]", *more]
    return burnish.train(run(fake, made, name, *given), progress=False)


def distance(made, result, gamma=False):
    start, end = load_file(made / "merged/model.safetensors"), load_file(result.policy / "model.safetensors")
    return torch.stack([(end[k] - start[k]).norm() for k in start]).norm().item()


def test_weight_zero_is_plain_fine_tuning(fake, made, monkeypatch):
    fake.register(monkeypatch.setattr)
    plain = burnish.train(run(fake, made, "none", f"--policy.path={made / 'merged'}"), progress=False)
    with_objective = train(fake, made, monkeypatch, "zero", weight=0.0)
    fake.assert_same_weights(plain.policy, with_objective.policy)
    assert set(load_file(plain.policy / "model.safetensors")) == set(load_file(made / "base/model.safetensors"))
    assert "loss_capability" not in with_objective.final and with_objective.final["capability_distance"] > 0


@pytest.mark.parametrize("kind", ["l1", "projection", "cosine", "ewc", "l2"])
def test_every_penalty_trains(fake, made, monkeypatch, kind):
    result = train(fake, made, monkeypatch, kind, kind=kind, weight=0.01, alpha=1.1)
    assert result.final["loss_capability"] == pytest.approx(0.01 * result.final["capability_penalty"], rel=1.0)
    assert ("capability_pinned" in result.final) == (kind == "l1")


def test_the_stronger_the_longer_it_stays(fake, made, monkeypatch):
    results = [train(fake, made, monkeypatch, f"w{w}", weight=w) for w in (0.0, 0.3, 30.0)]
    distances = [distance(made, r) for r in results]
    assert distances[0] > distances[1] > distances[2]
    assert results[1].final["capability_distance"] == pytest.approx(distances[1], rel=1e-4)
    assert results[2].final["capability_pinned"] > results[1].final["capability_pinned"] > 0


def test_a_ratio_does_not_depend_on_the_size_of_the_vector(fake, made, monkeypatch, tmp_path):
    from burnish.weights.control import control

    loud = control(made / "delta", "rescale", output=tmp_path / "loud", norm_of=made / "lora_delta")
    a = train(fake, made, monkeypatch, "quiet", gradient_norm_ratio=0.5)
    b = train(fake, made, monkeypatch, "loud", gradient_norm_ratio=0.5, delta=str(loud.path))
    assert distance(made, a) == pytest.approx(distance(made, b), rel=0.01)
    sizes = [Delta(path).norm() for path in (made / "delta", loud.path)]
    weights = [result.final["capability_weight"] for result in (a, b)]
    assert weights[0] / weights[1] == pytest.approx(sizes[1] / sizes[0], rel=0.05)


@pytest.mark.parametrize("kind", ["l1", "ewc", "projection"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_ratio_is_kept_at_every_step(fake, made, monkeypatch, kind, adapters):
    from burnish.methods.capability.objective import Capability

    plain, ratios = Capability.edit_gradients, []

    def watched(self, run, batch, grads):
        before = {name: grad.clone() for name, grad in grads.items()}
        figures = plain(self, run, batch, grads)
        added = {name: grad - before[name] for name, grad in grads.items()}
        covered = [name for name, grad in added.items() if grad.abs().sum() > 0]
        if covered:
            ratios.append(float(run.norm([added[n] for n in covered]) / run.norm([before[n] for n in covered])))
        return figures

    monkeypatch.setattr(Capability, "edit_gradients", watched)
    how = ("base", *LORA) if adapters else ("merged",)
    vector = made / ("lora_delta" if adapters else "delta")
    train(fake, made, monkeypatch, "ratio", *how, kind=kind, gradient_norm_ratio=0.3, delta=str(vector))
    assert len(ratios) > 3 and all(0.28 < ratio < 0.33 for ratio in ratios[1:]), ratios


def test_projected_gradients(fake, made, monkeypatch):
    """Adam blurs it, but movement along the vector is far smaller than without."""
    free = train(fake, made, monkeypatch, "free", weight=0.0)
    held = train(fake, made, monkeypatch, "held", kind="gradient")
    assert abs(held.final["capability_cosine"]) < abs(free.final["capability_cosine"]) or (
        abs(held.final["capability_cosine"]) < 0.02
    )


def test_retention_is_measured_along_the_vector(fake, made, monkeypatch):
    result = train(fake, made, monkeypatch, "retained", weight=0.0)  # alpha is 1.1, as the paper has it
    base, end = (load_file(p / "model.safetensors") for p in (made / "base", result.policy))
    tuned, plain = (load_file(made / n / "policy/model.safetensors") for n in ("aux", "plain"))
    gamma = {k: (tuned[k] - plain[k]).double() for k in base}
    along = sum(((end[k] - base[k]).double() * gamma[k]).sum() for k in base)
    whole = 1.1 * sum(g.square().sum() for g in gamma.values())
    assert result.final["capability_retained"] == pytest.approx(float(along / whole), abs=1e-3)


def test_lora_starts_where_it_was_merged(fake, made, monkeypatch):
    result = train(fake, made, monkeypatch, "lora", "base", *LORA, "--train.log_every=1",
                   delta=str(made / "lora_delta"), weight=0.01)  # fmt: skip
    assert result.final["loss_capability"] > 0 and "capability_pinned" not in result.final
    assert fake.figures(result.metrics)[0]["capability_penalty"] == 0  # B starts at zero


def test_lora_is_held_by_the_whole_product(fake, made, monkeypatch):
    """With no other loss to speak of, the logged distance is the norm of the merged update."""
    result = train(fake, made, monkeypatch, "r3d", "base", *LORA, delta=str(made / "lora_delta"), weight=1e-6)
    base, end = (load_file(p / "model.safetensors") for p in (made / "base", result.policy))
    names = ("backbone.0.weight", "head.weight")
    moved = torch.stack([(end[n] - base[n]).norm() for n in names]).norm().item()
    assert result.final["capability_distance"] == pytest.approx(moved, rel=1e-3)


def test_dora(fake, made, monkeypatch):
    dora = [LORA[0].replace("lora", "dora"), *LORA[1:]]
    result = train(fake, made, monkeypatch, "dora", "base", *dora, delta=str(made / "lora_delta"), weight=1e-6)
    base, end = (load_file(p / "model.safetensors") for p in (made / "base", result.policy))
    moved = torch.stack([(end[n] - base[n]).norm() for n in ("backbone.0.weight", "head.weight")]).norm().item()
    assert result.final["capability_distance"] == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "magic"}, "kind is 'magic'"),
        ({"reading": "r3"}, "unknown option 'reading'"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"normalize": True}, "unknown option 'normalize'"),
        ({"gradient_norm_ratio": -1.0}, "gradient_norm_ratio is -1.0"),
        ({"delta": ""}, "no delta"),
        ({"weight": "much"}, "weight is 'much'"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"delta": "nowhere"}, "no delta at nowhere"),
        ({"include": ["nothing_like_it"]}, "matches no tensor"),
    ],
)
def test_refusals(fake, made, monkeypatch, options, words):
    with pytest.raises(BurnishError, match=words):
        train(fake, made, monkeypatch, "refused", **options)


def test_a_frozen_policy_has_nothing_to_hold(fake, made, monkeypatch):
    with pytest.raises(BurnishError, match="is trained"):
        train(fake, made, monkeypatch, "frozen", "merged", "--train.freeze=[backbone]", include=["backbone"])


def test_gradients_of_factors_have_no_part_along_the_vector(fake, made, monkeypatch):
    with pytest.raises(BurnishError, match="kind gradient with train.peft.method lora"):
        train(fake, made, monkeypatch, "refused", "base", *LORA, delta=str(made / "lora_delta"), kind="gradient")


def test_a_weight_as_yaml_reads_it():
    from burnish.methods.capability.objective import Capability

    assert Capability(delta="somewhere", weight="1e-4").options.weight == 1e-4
    assert Capability(delta="somewhere").options.alpha == 1.1


def test_runs_of_two_seeds_are_told_apart(made):
    assert Delta(made / "delta").meta["runs_differ"] == ["train.seed 1 and 0"]
