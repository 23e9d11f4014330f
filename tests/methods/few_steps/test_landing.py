"""Grid distillation: its targets and loss in closed form, the fixed point, what is trained, and two ranks."""

import json
import math

import fake
import pytest
import torch
from ranks import train_and_keep, two_ranks

from burnish.core.errors import BurnishError
from burnish.core.recipe import load_recipe
from burnish.methods.few_steps.objective import FewSteps, landing_error, teacher_points, times
from burnish.policies import load_policy
from burnish.sampling.solvers import make_solver
from burnish.train.run import Run
from burnish.train.setup import own_accelerate_state
from workshop.tiny import make_tiny


def noise(rows=5, dtype=torch.float64):
    return torch.randn(rows, 4, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)


def field(points, time):
    return torch.sin(2 * points) + time


def test_teacher_points_end_where_its_sampler_does():
    at = noise()
    points = teacher_points(field, at, 4, 12)
    assert points.shape == (5, 5, 4, 3) and torch.equal(points[:, 0], at)
    assert torch.equal(points[:, -1], make_solver("euler:12")(field, at))
    half = at
    for k in range(6):
        half = half - field(half, 1 - k / 12) / 12
    assert torch.allclose(points[:, 2], half)


def test_the_mean_velocity_of_a_stretch_lands():
    """The student that answers with (x_k - x_(k+1)) K has no error, and K Euler steps end where the teacher does."""
    at, K = noise(), 3
    points = teacher_points(field, at, K, 12)
    velocities = (points[:, :-1] - points[:, 1:]) * K
    assert landing_error(points, velocities).abs().max() < 1e-12
    answers = iter(velocities.unbind(1))
    asked = []

    def student(x, t):
        asked.append(t)
        return next(answers)

    assert torch.allclose(make_solver(f"euler:{K}")(student, at), points[:, -1])
    assert torch.allclose(times(K, points)[0], torch.tensor(asked, dtype=points.dtype))


def test_of_a_gaussian_one_step_is_the_affine_map():
    """Data normal(m, s^2): the teacher lands near m + s noise, so the best one-step velocity is (1 - s) noise - m; the
    exact field at t = 1 answers noise - m instead, and misses by s noise."""
    m, s, at = 0.4, 0.3, noise(2000)

    def exact(x, t):
        return -m + (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * m)

    points = teacher_points(exact, at, 1, 1024)
    assert landing_error(points, ((1 - s) * at - m)[:, None]).abs().max() < 0.01
    missed = landing_error(points, exact(at, 1.0)[:, None]).square().mean().sqrt()
    assert missed == pytest.approx(s, rel=0.03)


@pytest.mark.parametrize(("options", "said"), [
    ({"steps": 3}, "multiple"), ({"steps": 4, "teacher_steps": 4}, "more than those"), ({"steps": 0}, "at least 1"),
    ({"imitation": 1}, "imitation"),
])  # fmt: skip
def test_bad_options(options, said):
    with pytest.raises(BurnishError, match=said):
        FewSteps(**options)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("few_steps")
    fake.make_dataset(root / "data", cameras=("top",), action_dim=7)
    make_tiny("smolvla", root / "policy", cameras=("top",), state_dim=4)
    return root


def recipe(root, output, steps=2, *more):
    return load_recipe(None, [
        f"--policy.path={root / 'policy'}", f"--data.root={root / 'data'}", f"--output={output}",
        "--objectives=[{name: few_steps, steps: 1, teacher_steps: 4}]", f"--train.steps={steps}",
        "--train.batch_size=8", "--train.log_every=1", "--train.save_every=100", "--train.lr=2e-3",
        "--train.warmup_steps=0", "--train.imitation_weight=0", "--train.weight_decay=0", "--data.cameras=[top]",
        "--data.workers=1", "--data.augment=false", *more,
    ])  # fmt: skip


def test_it_learns_and_leaves_the_language_model_alone(ground, tmp_path):
    from burnish.train.loop import train

    done = train(recipe(ground, tmp_path / "run", 40), progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["few_steps_gap"] for row in rows if "few_steps_gap" in row]
    assert sum(gaps[-5:]) < 0.7 * sum(gaps[:5])
    before, after = load_policy(ground / "policy"), load_policy(done.policy)
    assert after.flow_parts().steps == 1
    weights = after.state_dict()
    kept = {name for name, _ in before.backbone_parameters()}
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, weights[name])}
    assert kept and moved and not kept & moved


def test_a_step_is_the_formula(ground, tmp_path):
    """The loss of a fresh run: teacher and student are one network, so it is the teacher's own error of one step."""
    with own_accelerate_state():
        run = Run(recipe(ground, tmp_path / "run"), progress=False)
        objective, batch = run.objectives["few_steps"], run.data.finish(run.data.raw(0), 0)
        run.generator.manual_seed(5)
        with torch.no_grad():
            found = objective.loss(run, batch, None)["few_steps"]
        policy = run.policy.eval()  # with the statistics of the data
        at = policy.draw(8, run.generator.manual_seed(5)).noise

        def velocity(x, t):
            with torch.no_grad():
                return policy.velocity(batch, x[:, None], torch.full((8, 1), t))[:, 0]

        x = at
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - velocity(x, t) / 4
        want = (at - velocity(at, 1.0) - x)[..., :7].square().mean()
    assert math.isclose(found.item(), want.item(), rel_tol=1e-4)


def rank_main(rank, root, output):
    kept = train_and_keep(recipe(root, output, 2))[1]
    with open(f"{output}.{rank}.json", "w") as file:
        json.dump(kept, file)


def test_two_ranks_end_with_equal_weights(ground, tmp_path):
    two_ranks(rank_main, ground, tmp_path / "run")
    one, two = (json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in range(2))
    assert one == two and one
