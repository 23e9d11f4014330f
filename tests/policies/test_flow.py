"""The verbs of all three policies, against LeRobot's own methods and closed forms."""

import copy

import pytest
import torch
from idle import idle_parameters

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.policies.flow import _committed
from burnish.policies.steered import replaced


@pytest.mark.parametrize(("kind", "tower"), [("tiny_smolvla", "vision_model"), ("tiny_pi0", "vision_tower")])
def test_what_is_trained_follows_from_the_config(kind, tower, request):
    """As smolvla_base: the VLM stays as it is where the config trains the expert alone, else the vision tower may."""
    folder = request.getfixturevalue(kind)

    def trained(**overrides):
        policy = load_policy(folder, overrides=overrides)
        every = [name for name, _ in policy.named_parameters()]
        backbone = {name for name, _ in policy.backbone_parameters()}
        return {name for name, p in policy.named_parameters() if p.requires_grad}, every, backbone

    found, every, backbone = trained()
    assert found == set(every) and backbone < found
    assert trained(train_expert_only=True, freeze_vision_encoder=True)[0] == set(every) - backbone
    eyes = {name for name in every if f".{tower}." in name}
    assert eyes and trained(freeze_vision_encoder=True)[0] == set(every) - eyes


def rows(batch, index):
    return {k: [v[i] for i in index] if isinstance(v, list) else v[index] for k, v in batch.items()}


def draw(policy, seed=0, size=3):
    return policy.draw(size, torch.Generator().manual_seed(seed))


def lerobot_loss(policy, batch, draws, reduction):
    """LeRobot's own forward with our draws handed to its samplers."""
    model = policy.policy.model
    model.sample_noise, model.sample_time = lambda *_: draws.noise, lambda *_: draws.time
    loss, _ = policy.policy.forward(policy.preprocessor(batch), reduction=reduction)
    del model.sample_noise, model.sample_time
    return loss


def test_loss_is_lerobots(policy, batch):
    draws = draw(policy)
    if policy.config.type != "smolvla":  # LeRobot's pi policies count padded steps
        batch.pop("action_is_pad")
    out = policy.loss(batch, draws)
    torch.testing.assert_close(out.per_sample, lerobot_loss(policy, batch, draws, "none"))
    torch.testing.assert_close(out.total, lerobot_loss(policy, batch, draws, "mean"))


def test_equal_draws_give_equal_losses(policy, batch):
    first, again = policy.loss(batch, draw(policy)), policy.loss(batch, draw(policy))
    assert first.per_sample.equal(again.per_sample) and first.total.equal(again.total)
    assert not first.per_sample.equal(policy.loss(batch, draw(policy, 1)).per_sample)


def test_own_draws_come_from_the_own_generator(policy, batch):
    before = torch.get_rng_state()
    losses = []
    for _ in range(2):
        policy.generator.manual_seed(3)
        losses += [policy.loss(batch).total, policy.loss(batch).total]
    assert losses[0].equal(losses[2]) and losses[1].equal(losses[3]) and not losses[0].equal(losses[1])
    policy.act(batch)
    assert torch.get_rng_state().equal(before)


def test_times_are_beta_and_noise_normal(policy):
    draws = draw(policy, size=4000)
    mean = 0.999 * 1.5 / 2.5 + 0.001
    variance = 0.999**2 * 1.5 / (2.5**2 * 3.5)
    assert abs(draws.time.mean() - mean) < 4 * (variance / 4000) ** 0.5
    assert abs(draws.time.var() - variance) < 0.005 and draws.time.min() > 0 and draws.time.max() <= 1
    assert draws.noise.shape == (4000, 8, 8) and abs(draws.noise.std() - 1) < 0.01


def test_samples_do_not_see_their_neighbours(policy, batch):
    """Shorter instructions are padded to longer ones; that must not matter."""
    draws = draw(policy)
    together = policy.loss(batch, draws).per_sample
    chunk = policy.act(batch, draws).actions
    for i in range(3):
        alone = type(draws)(draws.noise[[i]], draws.time[[i]])
        torch.testing.assert_close(policy.loss(rows(batch, [i]), alone).per_sample, together[[i]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(policy.act(rows(batch, [i]), alone).actions, chunk[[i]], rtol=1e-4, atol=1e-5)


def test_padded_steps_count_nothing(policy, batch):
    draws = draw(policy)
    out, score = policy.loss(batch, draws), policy.score(batch, batch["action"], draws)
    entries = torch.tensor([8 * 7, 8 * 7, 6 * 7])
    torch.testing.assert_close(out.per_sample * entries, -score)
    torch.testing.assert_close(out.total, -score.sum() / entries.sum())
    if policy.config.type == "smolvla":  # its action rows are causal, so padded ones cannot even be seen
        changed = {**batch, "action": batch["action"].clone()}
        changed["action"][2, 6:] += 5
        torch.testing.assert_close(policy.loss(changed, draws).per_sample, out.per_sample)


def test_score_prefers_what_the_loss_prefers(policy, batch):
    draws = draw(policy)
    batch.pop("action_is_pad")
    far = batch["action"] + 3
    by_loss = policy.loss({**batch, "action": far}, draws).per_sample - policy.loss(batch, draws).per_sample
    by_score = policy.score(batch, batch["action"], draws) - policy.score(batch, far, draws)
    torch.testing.assert_close(by_score, by_loss * 56, rtol=1e-4, atol=1e-4)
    assert by_score.requires_grad


def test_act_is_lerobots_sampler_in_environment_units(policy, batch):
    draws = draw(policy)
    observation = {k: v for k, v in batch.items() if not k.startswith("action")}
    chunk = policy.act(observation, draws).actions
    inner = policy.policy
    inner.model.sample_noise = lambda *_: draws.noise
    normalised = inner.predict_action_chunk(policy.preprocessor(observation))
    del inner.model.sample_noise
    stats = policy.postprocessor.steps[0].state_dict()
    if policy.config.type == "pi05":
        low, high = stats["action.q01"], stats["action.q99"]
        expected = (normalised + 1) / 2 * (high - low) + low
    else:
        expected = normalised * stats["action.std"] + stats["action.mean"]
    torch.testing.assert_close(chunk, expected)
    assert chunk.shape == (3, 8, 7) and not chunk.requires_grad
    assert policy.act(observation, draws).actions.equal(chunk)


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_prefix_comes_back_unchanged(policy, batch, steps):
    draws, prefix = draw(policy), batch["action"][:, :steps]
    chunk = policy.act(batch, draws, prefix=prefix).actions
    assert chunk[:, :steps].equal(prefix)
    free = policy.act(batch, draws).actions
    assert "denoise_step" not in vars(policy.policy.model)
    assert not chunk[:, steps:].equal(free[:, steps:]) or steps == 8
    assert policy.act(batch, draws, prefix=prefix[:, :0]).actions.equal(free)


def test_committed_rows_arrive_by_the_sampler_itself(policy, batch):
    """Not only overwritten at the end: Euler steps along the straight line end at the committed actions."""
    prepared = policy._prepare({k: v for k, v in batch.items() if k != "action"}, None)
    noise, clean = draw(policy).noise, torch.randn(3, 4, 8)
    with _committed(policy.policy.model, noise, clean):
        out = policy.policy.model.sample_actions(*policy.model_inputs(prepared), noise=noise)
    torch.testing.assert_close(out[:, :4], clean, rtol=1e-4, atol=1e-5)


def test_what_stood_in_the_place_of_the_step_stands_there_again(policy):
    model, noise = policy.policy.model, draw(policy).noise
    with replaced(model, "denoise_step", model.denoise_step):
        before = vars(model)["denoise_step"]
        with _committed(model, noise, noise[:, :2]):
            pass
        assert vars(model).get("denoise_step") is before


def test_unused_parameters_are_those_without_gradient(policy, batch):
    policy.loss(batch, draw(policy)).total.backward()
    idle = {n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == set(idle_parameters(policy))


def test_backbone_parameters_are_the_vlm(policy):
    names = {name for name, _ in policy.backbone_parameters()}
    every = {name for name, _ in policy.named_parameters()}
    assert names < every and all("expert." not in n.replace("with_expert.", "") for n in names)
    assert sum(p.numel() for _, p in policy.backbone_parameters()) == sum(p.numel() for p in policy.vlm.parameters())
    assert all(p.requires_grad for p in policy.parameters())


def test_copies_are_independent(policy, batch):
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        twin.policy.model.action_in_proj.weight.add_(1)
    assert not twin.policy.model.action_in_proj.weight.equal(policy.policy.model.action_in_proj.weight)
    assert not twin.loss(batch, draw(policy)).total.equal(policy.loss(batch, draw(policy)).total)
    policy.generator.manual_seed(1)
    twin = copy.deepcopy(policy)
    assert twin.loss(batch).total.equal(policy.loss(batch).total)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"observation.state": torch.zeros(3, 5)}, "observation.state of 5 dimensions"),
        ({"action": torch.zeros(3, 8, 6)}, "action of 6 dimensions"),
        ({"action": torch.zeros(3, 5, 7)}, r"\[B, 8, 7\]"),
        ({"observation.images.wrist": None}, "without observation.images.wrist"),
        ({"task": None}, "without task"),
    ],
)
def test_bad_batches(policy, batch, change, said):
    bad = {k: v for k, v in {**batch, **change}.items() if v is not None}
    with pytest.raises(BurnishError, match=said):
        policy.loss(bad, draw(policy))


@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 1.0), (2.0, 3.0)])
def test_times_follow_the_beta_distribution(alpha, beta):
    """The samples' distribution function, by scipy, gives back the uniform numbers they came from."""
    from scipy.stats import beta as distribution

    from burnish.policies.flow import _beta_quantile

    uniform = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    times = _beta_quantile(uniform, alpha, beta)
    torch.testing.assert_close(torch.from_numpy(distribution.cdf(times.numpy(), alpha, beta)), uniform)
