"""The exact tier is LeRobot's sampler, bit for bit; the others keep to what they promise."""

import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.runtime.executor import Runtime
from burnish.sampling.kept import Kept
from burnish.sampling.solvers import make_solver
from burnish.sampling.steering import Steering

KINDS = ("smolvla", "pi0", "pi05")
TASKS = ["pick up the red cube", "open", "put the green ball on the plate and then open the drawer"]


def loaded(folder, **fields):
    """The policy, its adaptive norms made to matter: LeRobot starts them at zero."""
    policy = load_policy(folder, overrides=fields or None).eval()
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "norm.dense.weight" in name:
                weight.normal_(std=0.2, generator=draws)
    return policy


@pytest.fixture(scope="module")
def policies(tiny_smolvla, tiny_pi0, tiny_pi05):
    return {kind: loaded(folder) for kind, folder in zip(KINDS, (tiny_smolvla, tiny_pi0, tiny_pi05), strict=True)}


@pytest.fixture(params=KINDS)
def policy(request, policies):
    return policies[request.param]


def observed(policy, rows=3, seed=0):
    draws = torch.Generator().manual_seed(seed)
    batch = {key: torch.rand(rows, 3, 32, 32, generator=draws) for key in policy.camera_keys}
    return {**batch, "observation.state": torch.randn(rows, 7, generator=draws), "task": TASKS[:rows]}


def noise(policy, rows=3, seed=1):
    return policy.draw(rows, torch.Generator().manual_seed(seed))


def pair(policy, runtime, batch, draws):
    return runtime.act(batch, draws).actions, policy.act(batch, draws).actions


@pytest.mark.parametrize("rows", [1, 3])
def test_exact_is_bitwise_lerobots_sampler(policy, rows):
    batch, draws, runtime = observed(policy, rows), noise(policy, rows), Runtime(policy)
    inputs, _ = policy.begin(batch)
    with torch.no_grad():
        want = policy.policy.model.sample_actions(*inputs, noise=draws.noise)
    assert torch.equal(runtime.sampler(inputs, draws.noise), want)
    assert torch.equal(*pair(policy, runtime, batch, draws)) and runtime.verify(batch)["bitwise"]


def test_exact_under_autocast_as_training_has_it(policy):
    """Texts of several lengths: rows of padding see nothing, and in bf16 the most that a weight may be is -inf."""
    batch, draws = observed(policy), noise(policy)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = pair(policy, Runtime(policy), batch, draws)
    assert bool(theirs.isfinite().all()) and torch.equal(ours, theirs)
    fused = Runtime(policy, tier="fused")  # whose tables, made in there, serve outside too
    with torch.autocast("cpu", torch.bfloat16):
        fused.act(batch, draws)
    assert fused.verify(batch)["holds"]


@pytest.mark.parametrize("tier", ["exact", "fused"])
def test_calls_inside_inference_mode_leave_tables_that_serve_outside(policy, tier):
    """Also those that stay: what is kept of an observation is written into, a pass backwards reads the rest."""
    batch, draws = observed(policy), noise(policy)
    old = policy.act(batch, draws).raw[:, 2:]
    for kept in (None, Kept()):
        runtime = Runtime(policy, tier=tier, kept=kept)
        with torch.inference_mode():
            expected = runtime.act(batch, draws).actions.clone()
        assert torch.equal(runtime.act(batch, draws).actions, expected)
        runtime.act(batch, draws, steering=Steering(old, delay=2, jacobian="vjp"))


def test_calls_leave_nothing_behind(policy):
    """Interleaved observations, of several widths, each time with LeRobot's result; and each again."""
    runtime = Runtime(policy)
    for seed, rows in ((0, 3), (1, 3), (0, 3), (2, 1), (0, 3), (0, 3)):
        assert torch.equal(*pair(policy, runtime, observed(policy, rows, seed), noise(policy, rows, seed)))


def test_one_encoding_serves_several_chunks(policy):
    batch, runtime = observed(policy, 1), Runtime(policy)
    encoded, draws = runtime.encode(batch), [noise(policy, 1, seed).noise for seed in range(3)]
    alone = [runtime.sample(encoded, each) for each in draws]
    assert torch.equal(runtime.sample(encoded, draws[0]), alone[0])
    assert all(torch.equal(runtime.sample(runtime.encode(batch), d), one) for d, one in zip(draws, alone, strict=True))
    together = runtime.sample(encoded.repeat(3), torch.cat(draws))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_committed_actions(policy):
    batch, draws, runtime = observed(policy), noise(policy), Runtime(policy)
    prefix = torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(5))
    for given in (prefix, prefix[:, :0]):
        assert torch.equal(runtime.act(batch, draws, given).actions, policy.act(batch, draws, given).actions)


def test_what_time_makes_of_a_step_belongs_to_the_type_and_place_of_the_weights(policies):
    family, made = Runtime(policies["smolvla"]).sampler.family, []
    for kind in (torch.float32, torch.float64, torch.float32):
        family.parts.action_in.to(kind)
        family.timed(0.5, 1, lambda: made.append(1))
    assert len(made) == 2


@pytest.mark.parametrize("jacobian", ["identity", "vjp"])
def test_steered_chunks(policy, jacobian):
    """Real-time chunking's pull on every step, and inpainting, as the policy itself does them."""
    runtime, batch, draws = Runtime(policy), observed(policy), noise(policy)
    old = policy.act(batch, draws).raw[:, 2:]
    for mode in ("guided", "inpaint", "guided"):
        steering = Steering(old, delay=2, mode=mode, jacobian=jacobian)
        ours, theirs = (runner.act(batch, draws, steering=steering) for runner in (runtime, policy))
        torch.testing.assert_close(ours.raw, theirs.raw, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.raw[:, :2, :7], old[:, :2, :7])
    assert torch.equal(*pair(policy, runtime, batch, draws))
    several = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(runtime.candidates(batch, several).raw, policy.candidates(batch, several).raw)


def test_named_samplers(policy):
    """AB2 instead of Euler, steered too: as the policy samples by it."""
    batch, draws = observed(policy), noise(policy)
    old = policy.act(batch, draws).raw[:, 2:]
    policy.sampler = "ab2:4"
    try:
        runtime = Runtime(policy)
        for options in ({}, {"steering": Steering(old, delay=2, jacobian="identity")}):
            ours, theirs = (runner.act(batch, draws, **options).raw for runner in (runtime, policy))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        policy.sampler = ""  # a solver of the caller's own, whose steps the pull's clip follows too
        ours = Runtime(policy, solver=make_solver("ab2:4")).act(batch, draws, **options).raw
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert runtime.verify(batch)["bitwise"], "what the tier does is measured on LeRobot's own steps"
    finally:
        policy.sampler = ""


def test_unknown_tiers_and_policies_are_refused(policies):
    with pytest.raises(BurnishError, match="tier 'quick'"):
        Runtime(policies["pi0"], tier="quick")
