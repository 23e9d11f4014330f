"""burnish_discrete: the end of an episode is no secret in the masks, scores share what they can, and precision."""

import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.types import Draws
from burnish.policies import load_policy
from burnish.policies.base import Policy
from burnish.policies.discrete import losses, modeling_discrete
from burnish.policies.discrete.network import bucketed
from burnish.policies.keys import TOKENS
from workshop.tiny import make_tiny

STYLES = {
    "autoregressive": {"training": "autoregressive"}, "parallel": {"training": "parallel"}, "diffusion": {},
    "blocks": {"block_size": 14, "noise": "pipeline"}, "shifted": {"block_size": 7, "shift": True, "noise": "d2f"},
    "open": {"prompt_sees_actions": True},
}  # fmt: skip
T, A, L = 8, 7, 56


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scores")
    return {name: make_tiny("burnish_discrete", root / name, cameras=("top", "wrist"), overrides=options)
            for name, options in STYLES.items()}  # fmt: skip


@pytest.fixture(params=STYLES)
def policy(folders, request):
    return load_policy(folders[request.param])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# The tail beyond the end of an episode.


def test_the_end_of_an_episode_hides_and_weighs_nothing(policy, batch):
    draws = policy.draw(3, rng())
    whole = {**batch, "action_is_pad": torch.zeros(3, T, dtype=torch.bool)}
    with policy.watch_tokens() as seen:
        policy.loss(batch, draws)
        policy.loss(whole, draws)
    assert seen[0].hidden.equal(draws.masks) and seen[0].hidden.equal(seen[1].hidden)
    assert seen[0].weight.equal(seen[1].weight) and seen[0].weight[2, 6 * A :].any()
    tail = seen[0].ids.view(3, T, A)[2, 5:]
    assert tail.equal(tail[:1].expand(3, -1)), "two steps that repeat the last action"


def test_a_late_visible_token_does_not_tell_that_the_episode_goes_on(folders, monkeypatch):
    """Half of the chunks are cut. Of those in which a late token is seen, half must be cut as well (0 % once)."""
    policy, count = load_policy(folders["diffusion"]), 2000
    monkeypatch.setattr(policy.policy, "logits", lambda prompt, ids, hidden: torch.zeros(*ids.shape, 16))
    cut = torch.arange(count) % 2 == 0
    padded = cut[:, None] & (torch.arange(T) >= 4)
    out = policy.policy.token_losses(None, torch.zeros(count, T, A), policy.draw(count, rng()), padded)
    late = (~out["hidden"][:, 4 * A :]).any(1)
    assert abs(float(cut[late].float().mean()) - 0.5) < 0.04
    scored = out["weight"][:, 4 * A :].sum(1)
    torch.testing.assert_close(scored[cut].mean(), scored[~cut].mean(), rtol=0.1, atol=0)


def test_padded_steps_repeat_the_last_action_before_them():
    actions, padded = torch.arange(6.0).view(2, 3, 1), torch.tensor([[False, False, True], [True, True, True]])
    assert losses.repeat_last(actions, padded)[..., 0].tolist() == [[0, 1, 1], [3, 3, 3]]
    assert losses.repeat_last(actions, None) is actions


def test_weights_of_the_likelihood_bound(folders, batch):
    """1 / t: every token of a block counts the inverse of its hidden share, as D2F and Dream-VLA train."""
    policy = load_policy(folders["blocks"], overrides={"token_weights": "inverse_share"})
    draws = policy.draw(3, rng())
    with policy.watch_tokens() as seen:
        policy.loss(batch, draws)
    hidden = draws.masks.view(3, 4, 14)
    wanted = draws.learned.view(3, 4, 14) * (14 / hidden.sum(2, keepdim=True).clamp_min(1))
    torch.testing.assert_close(seen[0].weight.view(3, 4, 14), wanted)


def test_doubled_blocks_are_learned_given_clean_ones(folders, batch):
    """One pass over both copies: every block as if all blocks before it were known."""
    policy = load_policy(folders["blocks"], overrides={"doubled": True, "noise": "sorted"})
    plain, draws = load_policy(folders["blocks"]), policy.draw(3, rng())
    with policy.watch_tokens() as seen:
        policy.loss(batch, draws)
    for block in range(4):
        at = slice(14 * block, 14 * block + 14)
        masks = draws.masks.clone()
        masks[:, : 14 * block] = False
        with plain.watch_tokens() as alone:
            plain.loss(batch, Draws(draws.noise, draws.time, masks, draws.learned))
        torch.testing.assert_close(seen[0].logits[:, at], alone[0].logits[:, at], rtol=1e-4, atol=1e-4)
    with pytest.raises(BurnishError, match="doubled without blocks"):
        load_policy(folders["diffusion"], overrides={"doubled": True})


# Scores.


@pytest.mark.parametrize("own", [False, True], ids=["shared draws", "draws of their own"])
def test_all_scores_in_one_pass_equal_one_pass_each(policy, batch, own, monkeypatch):
    at_once = 1 if own and policy.config.block_size == 14 else 1 << 20  # or one chunk in a pass
    monkeypatch.setattr(modeling_discrete, "_TOKENS_AT_ONCE", at_once)
    C, K = 2, 3
    drawn = policy.draw(3 * C * K if own else 3 * K, rng(1))
    shape = (3, C, K) if own else (3, K)
    draws = Draws(drawn.noise.unflatten(0, shape), drawn.time.unflatten(0, shape))
    candidates = 0.4 * torch.randn(3, C, T, A, generator=rng(2))
    padded = torch.zeros(3, C, T, dtype=torch.bool)
    padded[2, 1, 6:] = True
    given = {**batch, "action_is_pad": padded}
    calls = []
    monkeypatch.setattr(policy.policy.model, "embed_image", _counted(policy.policy.model.embed_image, calls))
    found = policy.scores(given, candidates, draws)
    assert len(calls) == 2, "each view once"
    expected = Policy.scores(policy, given, candidates, draws)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    if at_once > 1:
        found.sum().backward()
        ours = policy.policy.model.head.weight.grad.clone()
        policy.zero_grad()
        expected.sum().backward()
        torch.testing.assert_close(ours, policy.policy.model.head.weight.grad, rtol=1e-3, atol=1e-3)


def _counted(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


# Precision and shapes.


def test_bin_edges_stay_out_of_half_precision(folders, batch):
    plain = load_policy(folders["diffusion"])
    actions = torch.rand(500, T, A, generator=rng()) * 2 - 1
    ids = plain.policy.model.tokens.encode(actions)
    half = load_policy(folders["diffusion"], overrides={"dtype": "bfloat16"})
    assert half.policy.model.head.weight.dtype == torch.bfloat16
    assert half.policy.model.tokens.edges.dtype == torch.float32
    assert half.policy.model.tokens.encode(actions).equal(ids)
    assert torch.isfinite(half.act(batch).actions).all()
    assert abs(float(half.loss(batch, half.draw(3, rng())).total - plain.loss(batch, plain.draw(3, rng())).total)) < 0.1
    assert plain.bfloat16().policy.model.tokens.encode(actions).equal(ids)
    assert plain.double().policy.model.tokens.edges.dtype == torch.float64


def test_bfloat16_is_stored_and_loaded_again(folders, batch, tmp_path):
    half = load_policy(folders["blocks"], overrides={"dtype": "bfloat16"})
    half.save(tmp_path / "p")
    again = load_policy(tmp_path / "p")
    assert again.config.dtype == "bfloat16" and again.policy.model.tokens.edges.dtype == torch.float32
    assert again.act(batch).actions.equal(half.act(batch).actions)
    back = load_policy(tmp_path / "p", overrides={"dtype": "float32"})
    assert back.policy.model.head.weight.dtype == torch.float32


@pytest.mark.parametrize("style", ["autoregressive", "shifted"])
def test_text_in_buckets_changes_no_chunk(folders, style, batch, monkeypatch):
    from burnish.policies.discrete import policy as module

    policy = load_policy(folders[style])
    plain, lengths = policy.act(batch).actions, []

    def padded(prepared):
        found = bucketed(prepared, 16)
        lengths.append((prepared[TOKENS].shape[1], found[TOKENS].shape[1]))
        return found

    monkeypatch.setattr(module, "bucketed", padded)
    assert policy.act(batch).actions.equal(plain)
    assert lengths[0][1] % 16 == 0 and lengths[0][0] % 16
    assert bucketed({TOKENS: torch.zeros(1, 16), "other": 1}, 16)["other"] == 1


def test_drawn_chunks_follow_the_draws(folders, batch):
    policy = load_policy(folders["diffusion"], overrides={"decoder": "dd_vla"})
    draws = policy.draw(3, rng())
    one, again, other = policy.act(batch, draws), policy.act(batch, draws), policy.act(batch, policy.draw(3, rng(1)))
    assert one.actions.equal(again.actions) and not one.actions.equal(other.actions)
    first = Draws(draws.noise[:1], draws.time[:1])
    alone = policy.act({k: v[:1] for k, v in batch.items()}, first)
    torch.testing.assert_close(alone.actions, one.actions[:1])
