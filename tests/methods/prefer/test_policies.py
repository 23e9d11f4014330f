"""Scores of real policies with tiny weights: one pass for all chunks and draws, and the ODE oracle."""

import json
import shutil

import pytest
import torch

from burnish import train
from burnish.core.errors import BurnishError
from burnish.core.recipe import load_recipe
from burnish.core.types import Draws
from burnish.data.pairs import Pair, write_index
from burnish.methods.prefer.draws import ScoreConfig
from burnish.methods.prefer.objective import score_config
from burnish.methods.prefer.scoring import pair_draws, policy_seeds
from burnish.policies import load_policy
from burnish.policies.base import Policy
from burnish.runtime.flow_likelihood import agreement, ode_scores
from workshop.tiny import make_tiny

FLOWS = ("smolvla", "pi0", "pi05")
TASKS = ["pick up the red cube", "open", "put the green ball on the plate"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=FLOWS)
def flow(request):
    return load_policy(request.getfixturevalue(f"tiny_{request.param}"))


def observations(g, n=3):
    return {
        "observation.images.top": torch.rand(n, 3, 32, 32, generator=g),
        "observation.images.wrist": torch.rand(n, 3, 32, 32, generator=g),
        "observation.state": torch.randn(n, 7, generator=g),
        "task": TASKS[:n],
    }


def several(policy, g, B=3, C=2, K=2, own=False):
    drawn = policy.draw(B * C * K if own else B * K, g)
    shape = (B, C, K) if own else (B, K)
    return Draws(drawn.noise.unflatten(0, shape), drawn.time.unflatten(0, shape))


@pytest.mark.parametrize("own", [False, True], ids=["shared draws", "draws of their own"])
def test_one_pass_equals_one_forward_each_with_gradients(flow, own):
    g = rng()
    flow.train()
    batch, candidates = observations(g), torch.randn(3, 2, 8, 7, generator=g)
    batch["action_is_pad"] = torch.zeros(3, 2, 8, dtype=torch.bool)
    batch["action_is_pad"][2, 1, 6:] = True
    draws, weight = several(flow, g, own=own), torch.randn(3, 2, 2, generator=g)
    found = []
    for way in (flow.scores, lambda *given: Policy.scores(flow, *given)):
        flow.zero_grad(set_to_none=True)
        scores = way(batch, candidates, draws)
        (scores * weight).sum().backward()
        gradient = {n: p.grad.clone() for n, p in flow.named_parameters() if p.grad is not None and p.grad.any()}
        found.append((scores.detach(), gradient))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    assert found[0][1].keys() == found[1][1].keys()
    difference = sum((found[0][1][n] - g2).square().sum() for n, g2 in found[1][1].items()).sqrt()
    assert difference / sum(g2.square().sum() for g2 in found[1][1].values()).sqrt() < 1e-6


def test_equal_draws_give_equal_bits_and_padding_has_no_say(flow):
    g = rng(1)
    batch, candidates = observations(g), torch.randn(3, 2, 8, 7, generator=g)
    draws = several(flow, g)
    with torch.no_grad():
        once = flow.scores(batch, candidates, draws)
        assert torch.equal(once, flow.scores(batch, candidates, draws))
        flow.policy.model.action_out_proj.weight[7:] += 1.0  # the model's idle output dimensions
        torch.testing.assert_close(flow.scores(batch, candidates, draws), once)
        padded = {**batch, "action_is_pad": torch.zeros(3, 2, 8, dtype=torch.bool)}
        padded["action_is_pad"][..., 5:] = True
        # Errors of padded steps do not count; what the model sees there is the chunk that the data set repeats.
        full, cut = flow.scores(batch, candidates, draws), flow.scores(padded, candidates, draws)
    assert (cut > full).all()


def test_a_chunk_of_other_length_is_named(flow):
    batch, draws = observations(rng(), 1), several(flow, rng(), B=1)
    with pytest.raises(BurnishError, match=r"actions of shape \(1, 2, 5, 7\); expected \[B, 8, 7\]"):
        flow.scores(batch, torch.zeros(1, 2, 5, 7), draws)


def test_velocity_is_what_the_score_measures(flow):
    g = rng(2)
    batch, chunk = observations(g), torch.randn(3, 8, 7, generator=g)
    draws = several(flow, g)
    with torch.no_grad():
        clean = flow.to_model(batch, chunk)[:, None]
        t = draws.time[..., None, None]
        velocity = flow.velocity(batch, t * draws.noise + (1 - t) * clean, draws.time)
        errors = (velocity - (draws.noise - clean))[..., :7].square().sum((-1, -2))
        torch.testing.assert_close(flow.scores(batch, chunk[:, None], draws)[:, 0], -errors)


def test_ode_of_a_policy_exact_against_many_probes(tmp_path):
    policy = load_policy(make_tiny("smolvla", tmp_path / "p", cameras=("top", "wrist"), action_dim=2,
                                   overrides={"chunk_size": 2, "n_action_steps": 2}))  # fmt: skip
    g = rng()
    batch, chunks = observations(g), torch.randn(3, 2, 2, 2, generator=g)
    exact = ode_scores(policy, batch, chunks, steps=6)
    estimate = ode_scores(policy, batch, chunks, steps=6, probes=200)
    assert exact.shape == (3, 2) and not torch.equal(exact, estimate)
    torch.testing.assert_close(exact, estimate, atol=0.2, rtol=0)
    assert agreement(exact, estimate)["rank_correlation"] > 0.95


def test_verify_score_from_the_command_line(tmp_path, capsys, dataset):
    from burnish.cli.main import main

    folder = make_tiny("smolvla", tmp_path / "p", cameras=("front",), state_dim=4, action_dim=3,
                       overrides={"chunk_size": 2, "n_action_steps": 2})  # fmt: skip
    data = shutil.copytree(dataset, tmp_path / "data")
    arguments = ["policy", "verify", "score", str(folder), str(data), "--observations", "2", "--candidates", "3",
                 "--draws", "2", "--steps", "2", "--json", "--output", str(tmp_path / "score.json")]  # fmt: skip
    assert main(arguments) == 0
    written = json.loads((tmp_path / "score.json").read_text())
    assert "sign_agreement_elbo_2_shared" in written["figures"] and "verify score" in written["command"]
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["weight"], r["shared"]) for r in rows] == [
        ("elbo", True), ("elbo", False), ("uniform", True), ("uniform", False)
    ]  # fmt: skip
    assert all(-1 <= r["rank_correlation"] <= 1 and 0 <= r["sign_agreement"] <= 1 for r in rows)
    tokens = make_tiny("burnish_discrete", tmp_path / "d", cameras=("front",), state_dim=4, action_dim=3)
    assert main(["policy", "verify", "score", str(tokens), str(data)]) == 2
    assert "a policy of type burnish_discrete has no velocity field" in capsys.readouterr().err


@pytest.mark.parametrize("training", ["autoregressive", "parallel", "diffusion"])
def test_token_and_diffusion_policies_score_behind_the_same_verb(tmp_path, training):
    overrides = {"training": training} if training != "diffusion" else {}
    policy = load_policy(
        make_tiny("burnish_discrete", tmp_path / "p", cameras=("top", "wrist"), overrides=overrides)
    ).eval()
    config = score_config(policy, ScoreConfig())
    assert config.draws == (4 if training == "diffusion" else 1) and config.weight == "uniform"
    g = rng()
    batch = observations(g)
    candidates = 0.3 * torch.randn(3, 2, 8, 7, generator=g)
    candidates[0, 1] = candidates[0, 0]
    drawn = pair_draws(policy, config, policy_seeds(0, [0, 1, 2], [0, 0, 0]))
    with torch.no_grad():
        scores = policy.scores(batch, candidates, drawn.draws)
        again = pair_draws(policy, config, policy_seeds(0, [0, 1, 2], [1, 1, 1]))
        other = policy.scores(batch, candidates, again.draws)
    assert scores.shape == (3, 2, config.draws) and (scores < 0).all()
    # Equal chunks under shared masks have no margin, but for the rounding of sums in another order: they share a pass.
    torch.testing.assert_close(scores[0, 0], scores[0, 1], rtol=0, atol=2e-4)
    assert torch.equal(scores, other) == (training != "diffusion")


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "burnish_discrete"])
def test_preferences_train_on_real_policies(tmp_path, dataset, kind):
    """Adapters alone, the reference by switching them off; the exported policy loads."""
    folder = make_tiny(kind, tmp_path / "base", cameras=("front",), state_dim=4, action_dim=3,
                       overrides={"chunk_size": 4, "n_action_steps": 4})  # fmt: skip
    root = shutil.copytree(dataset, tmp_path / "pairs")
    write_index(root, [Pair((0, i), (2, i)) for i in range(4)], {"source": "test"}, 1e9)
    entry = {"name": "prefer", "pairs": str(root), "batch_size": 2, "reference": "adapter_off", "score": {"draws": 2}}
    method = "dora" if kind == "smolvla" else "lora"
    recipe = load_recipe(None, [
        f"--policy.path={folder}", f"--data.root={root}", f"--output={tmp_path / 'run'}", "--train.steps=4",
        "--train.batch_size=1", "--train.imitation_weight=0", "--train.warmup_steps=0", "--train.lr=0.003",
        "--train.log_every=1", f"--train.peft.method={method}", "--train.peft.rank=4",
        f"--objectives={json.dumps([entry])}",
    ])  # fmt: skip
    result = train(recipe, progress=False)
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert rows[0]["prefer_margin"] == pytest.approx(0, abs=1e-3) and rows[-1]["prefer_margin"] > 0
    load_policy(result.policy)


def test_the_bench_compares_layouts_of_equal_gradients(tiny_smolvla):
    from bench import prefer as bench
    from burnish.core.config import PeftConfig
    from burnish.train.optim import add_adapters

    policy = load_policy(tiny_smolvla)
    add_adapters(policy, PeftConfig(method="lora", rank=4, alpha=8))
    bench._disturb(policy)
    steps = bench._Steps(policy)
    assert steps.parity(4) < 1e-6
    ratio, scatter = steps.margin_variance(2, 6)
    assert ratio > 1 and scatter["shared"] > 0
    assert bench._kept_bytes(steps.packed(1, "cached")) > bench._kept_bytes(steps.sft) > 0
