"""Going on from an old chunk, in LeRobot's own samplers, of the three flow-matching policies."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd.functional import jacobian

from burnish.core.errors import BurnishError
from burnish.core.types import Draws
from burnish.policies import load_policy
from burnish.policies.pi import small_pi
from burnish.policies.steered import conditioned
from burnish.sampling.steering import Steering

T, A = 8, 7


@pytest.fixture
def policy(policy):
    return policy.eval()


def draw(policy, seed=0, size=3):
    return policy.draw(size, torch.Generator().manual_seed(seed))


def old_chunk(policy, batch, seed=1):
    return policy.act(batch, draw(policy, seed))


@pytest.mark.parametrize("how", ["vjp", "identity"])
def test_steered_chunk_goes_on_from_the_old_one(policy, batch, how):
    draws, old = draw(policy), old_chunk(policy, batch)
    plain = policy.act(batch, draws)
    weights, trained = dict(vars(policy.policy.model)), [p.requires_grad for p in policy.parameters()]
    steering = Steering(old.raw[:, 2:], torch.tensor([2, 0, 3]), torch.tensor([6, 0, 3]), jacobian=how)
    found = policy.act(batch, draws, steering=steering)
    assert found.actions[0, :2].equal(old.actions[0, 2:4]) and found.actions[2, :3].equal(old.actions[2, 2:5])
    assert found.actions[1].equal(plain.actions[1]) and found.raw[1].equal(
        plain.raw[1]
    )  # no weight: plain, bit for bit
    apart = (found.raw - old.raw.roll(-2, 1)).abs()[0, 2:6, :A].mean()
    assert apart < (plain.raw - old.raw.roll(-2, 1)).abs()[0, 2:6, :A].mean()
    assert vars(policy.policy.model).keys() == weights.keys() and all(p.grad is None for p in policy.parameters())
    assert any(trained) and [p.requires_grad for p in policy.parameters()] == trained
    assert policy.act(batch, draws).actions.equal(plain.actions)


def test_inpainting_is_what_a_prefix_does(policy, batch):
    draws, old = draw(policy), old_chunk(policy, batch)
    steering = Steering(old.raw[:, 2:], 3, mode="inpaint")
    by_rows = policy.act(batch, draws, steering=steering).actions
    by_prefix = policy.act(batch, draws, prefix=old.actions[:, 2:5]).actions
    torch.testing.assert_close(by_rows, by_prefix, rtol=1e-4, atol=1e-5)


def test_the_formula_against_finite_differences(policy, batch):
    """One guided step from noise, with the Jacobian taken column by column from differences of the velocity."""
    batch = {k: v[:1] for k, v in batch.items()}
    noise, t, eps = draw(policy, size=1).noise, 1.0, 1e-2
    old = torch.randn(1, T, noise.shape[-1], generator=torch.Generator().manual_seed(3))
    guide = policy.guide(Steering(old, 2, 5, jacobian="vjp", clip=3.0), noise)

    def velocity(points):
        return policy.velocity(batch, points[:, None], torch.full((1, 1), t))[:, 0]

    with torch.no_grad():
        clean = noise - t * velocity(noise)
        error = (guide.weight * (old - clean)).flatten()
        steps = eps * torch.eye(noise.numel()).view(1, -1, *noise.shape[1:])
        both = policy.velocity(
            batch, torch.cat([noise + steps, noise - steps], 1), torch.full((1, 2 * noise.numel()), t)
        )
        slopes = (both[0, : noise.numel()] - both[0, noise.numel() :]).flatten(1) / (2 * eps)  # row j: d v / d x_j
        pull = error - t * slopes @ error
        expected = velocity(noise) - 3.0 * pull.view_as(noise)
        got = guide.velocity(velocity, noise, t)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3)


def test_where_a_correction_can_go(policy, batch):
    """A row of SmolVLA's chunk sees no later row, so that the Jacobian's transpose moves none behind the weighted."""
    batch = {k: v[:1] for k, v in batch.items()}
    policy.requires_grad_(False)
    x = draw(policy, size=1).noise

    def clean(points):
        return points - 0.5 * policy.velocity(batch, points[:, None], torch.full((1, 1), 0.5))[:, 0]

    blocks = jacobian(clean, x)[0, :, :, 0].square().sum((1, 3))
    causal = policy.config.type == "smolvla"
    assert (blocks.triu(1).max() == 0) == causal and blocks.tril(-1).max() > 0
    assert policy.jacobian == ("identity" if causal else "vjp")


def test_candidates_share_one_encoding_and_are_those_of_single_calls(policy, batch):
    noise = torch.stack([draw(policy, seed).noise for seed in range(4)], 1)
    calls, inner = [], policy.inner.forward
    policy.inner.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    found = policy.candidates(batch, noise)
    shared, _ = len(calls), calls.clear()
    for k in range(4):
        alone = policy.act(batch, Draws(noise[:, k], torch.ones(3)))
        torch.testing.assert_close(found.actions[:, k], alone.actions, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.raw[:, k], alone.raw, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4 * shared


def test_training_with_delays(policy, batch):
    draws = draw(policy)
    plain = policy.loss(batch, draws)
    none = policy.loss(batch, Draws(draws.noise, draws.time, delay=torch.zeros(3, dtype=torch.long)))
    # pi05 modulates every row by itself then, and not every CPU multiplies one row and several to the same bits.
    close = 1e-6 if policy.name == "pi05" else 0.0
    torch.testing.assert_close(none.per_sample, plain.per_sample, rtol=close, atol=0)
    torch.testing.assert_close(none.total, plain.total, rtol=close, atol=0)
    assert draw(policy).delay is None
    policy.rtc_training_max_delay = 4
    assert draw(policy).delay is None
    policy.train()
    drawn = policy.draw(2000, torch.Generator().manual_seed(0))
    assert draw(policy).noise.equal(draws.noise) and draw(policy).time.equal(draws.time)
    assert drawn.delay.bincount().tolist() == pytest.approx([400] * 5, abs=80)


def test_shown_rows_are_seen_clean_and_count_nothing(policy, batch):
    """Their noise does not matter, their actions do; loss and gradient come from the other rows alone."""
    draws, delay = draw(policy), torch.tensor([3, 0, 2])
    first = policy.loss(batch, Draws(draws.noise, draws.time, delay=delay))
    other = draws.noise.clone()
    other[0, :3], other[2, :2] = 9.0, -9.0
    assert policy.loss(batch, Draws(other, draws.time, delay=delay)).per_sample.equal(first.per_sample)
    changed = {**batch, "action": batch["action"].clone()}
    changed["action"][0, 0] += 1.0
    later = policy.loss(changed, Draws(draws.noise, draws.time, delay=delay))
    assert not later.per_sample[0].equal(first.per_sample[0]) and later.per_sample[1].equal(first.per_sample[1])
    with policy_errors(policy) as caught:
        policy.loss(batch, Draws(draws.noise, draws.time, delay=delay))
    (errors, valid) = caught[0]
    assert valid.sum(1).tolist() == [5, 8, 4] and errors[0, :3].abs().max() == 0
    summed = errors.sum((1, 2))
    torch.testing.assert_close(first.per_sample, summed / (torch.tensor([5, 8, 4]) * A))
    torch.testing.assert_close(first.total, summed.sum() / (17 * A))


class policy_errors:
    """What `_errors` of a policy returned inside."""

    def __init__(self, policy):
        self.policy, self.found = policy, []

    def __enter__(self):
        inner = self.policy._errors
        self.policy._errors = lambda *args: self.found.append(inner(*args)) or self.found[-1]
        return self.found

    def __exit__(self, *_):
        del self.policy._errors


def test_a_conditioned_field_at_the_rows_own_time(policy, batch):
    """All rows shown: the network's answer is that at time 0, whatever the others' time is."""
    batch = {k: v[:1] for k, v in batch.items()}
    x = draw(policy, size=1).noise
    with torch.no_grad():
        at_zero = policy.velocity(batch, x[:, None], torch.zeros(1, 1))
        with conditioned(policy.policy.model, x, torch.ones(1, T, dtype=torch.bool)):
            shown = policy.velocity(batch, torch.zeros_like(x)[:, None], torch.full((1, 1), 0.7))
        assert policy.velocity(batch, x[:, None], torch.zeros(1, 1)).equal(at_zero)
    torch.testing.assert_close(shown, at_zero, rtol=1e-5, atol=1e-6)


def test_the_folder_remembers_and_lerobot_reads_it_as_ever(policy, batch, tmp_path):
    policy.rtc_training_max_delay = 3
    policy.save(tmp_path / "p")
    again = load_policy(tmp_path / "p")
    assert again.rtc_training_max_delay == 3
    sizes = small_pi(policy.sizes, image_size=32) if policy.config.type != "smolvla" else nullcontext()
    with sizes:
        plain = type(policy.policy).from_pretrained(tmp_path / "p")
    assert not hasattr(plain.config, "rtc_training_max_delay")
    draws = draw(policy)
    prepared = again.preprocessor({k: v for k, v in batch.items() if not k.startswith("action")})
    chunk = plain.eval().predict_action_chunk(prepared, noise=draws.noise)[..., :A]
    torch.testing.assert_close(again.postprocessor(chunk), policy.act(batch, draws).actions)
    (tmp_path / "p/rtc.json").write_text('{"rtc_training_max_delay": 99}')
    with pytest.raises(BurnishError, match="from 0 to 7"):
        load_policy(tmp_path / "p")


def test_trained_steering_only_up_to_what_was_trained(policy, batch):
    draws, old = draw(policy), old_chunk(policy, batch)
    steering = Steering(old.raw[:, 2:], 3, mode="trained")
    with pytest.raises(BurnishError, match="a delay of 3 steps for a policy that was trained for 0"):
        policy.act(batch, draws, steering=steering)
    policy.rtc_training_max_delay = 3
    found = policy.act(batch, draws, steering=steering).actions
    assert found[:, :3].equal(old.actions[:, 2:5]) and not found[:, 3:].equal(policy.act(batch, draws).actions[:, 3:])


def test_refusals(policy, batch):
    old = old_chunk(policy, batch)
    steering = Steering(old.raw[:, 2:], 3)
    with pytest.raises(BurnishError, match="one of the two"):
        policy.act(batch, prefix=old.actions[:, :2], steering=steering)
    policy.config.use_relative_actions = True
    with pytest.raises(BurnishError, match="relative to the state"):
        policy.act(batch, steering=steering)
