"""Exact caches change nothing, and a changed input never hits; old pictures are used, compared, and stopped."""

import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from test_executor import KINDS, loaded, noise, observed

from burnish.core.config import CacheConfig, EvalConfig
from burnish.core.errors import BurnishError
from burnish.core.provenance import weights_hash
from burnish.core.types import Chunk
from burnish.envs.base import make_env
from burnish.evaluate.rollout import _batched, _Job
from burnish.policies import load_policy
from burnish.runtime.caches import EVERY, Reuse, keeping, similarity
from burnish.runtime.executor import Runtime
from burnish.runtime.serve.run import runner
from burnish.runtime.serve.server import ServeOptions
from burnish.sampling.kept import Kept
from workshop.tiny import make_tiny

STATE = "observation.state"


@pytest.fixture(scope="module")
def policies(tiny_smolvla, tiny_pi0, tiny_pi05):
    return {kind: loaded(folder) for kind, folder in zip(KINDS, (tiny_smolvla, tiny_pi0, tiny_pi05), strict=True)}


def changed(batch, picture):
    """The same observation but for one thing, which is hardly to be seen."""
    one = {name: value.clone() if isinstance(value, torch.Tensor) else list(value) for name, value in batch.items()}
    return {
        "state": lambda: one | {STATE: one[STATE] + 0.2},
        "pixel": lambda: (one[picture][-1, 0, 0].__setitem__(0, 0.123), one)[1],
        "rows": lambda: one | {picture: one[picture].flip(0)},
        "text": lambda: one | {"task": ["push", *one["task"][1:]]},
    }


def equal(runtime, policy, batch, draws):
    return torch.equal(runtime.act(batch, draws).actions, policy.act(batch, draws).actions)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_again_has_the_bits_of_what_is_computed(policies, kind):
    policy = policies[kind]
    kept, draws, batch = Kept(), noise(policy), observed(policy)
    picture, runtime = policy.camera_keys[0], Runtime(policy, kept=kept)
    assert equal(runtime, policy, batch, draws) and equal(runtime, policy, batch, noise(policy, seed=7))
    assert kept.counts["encoding hits"] == 1 and kept.counts["views hits"] == 0
    for _ in range(2):  # the first time both ways are compared where few rows run alone
        assert equal(runtime, policy, changed(batch, picture)["state"](), draws)
    for name in ("pixel", "rows", "text"):
        before = kept.counts["encoding hits"]
        assert equal(runtime, policy, changed(batch, picture)[name](), draws), name
        assert kept.counts["encoding hits"] == before
    assert kept.counts["prompt hits"] == (1 if kind != "pi05" else 0)
    assert kept.counts["views hits"] > 0  # the other camera's
    assert equal(runtime, policy, batch, draws)
    with torch.no_grad():
        next(policy.parameters()).mul_(1.01)
        policy.flow_parts().action_in.weight.mul_(1.01)
    assert equal(runtime, policy, batch, draws)  # other weights


@pytest.mark.parametrize("kind", ["smolvla", "pi0"])
def test_the_state_runs_alone(policies, kind):
    policy = policies[kind]
    batch, draws, kept = observed(policy), noise(policy), Kept()
    runtime = Runtime(policy, tier="fused", kept=kept)
    first = runtime.act(batch, draws).actions
    other = batch | {STATE: batch[STATE] - 0.4}
    family, calls = runtime.sampler.family, []
    family.encode, real = lambda inputs: calls.append(1) or real(inputs), family.encode
    found = runtime.act(other, draws).actions
    assert not calls and not found.equal(first)
    torch.testing.assert_close(found, policy.act(other, draws).actions, rtol=1e-4, atol=1e-5)
    assert runtime.act(batch, draws).actions.equal(first), "what is kept is not written into"


def mutations():
    """Keys that leave something out: each must show."""
    key = Kept.key

    def shapes(self, *parts):
        return repr([(tuple(p.shape), p.dtype) for p in parts]).encode()

    def first_row(self, *parts):
        return key(self, *(p[:1].contiguous() for p in parts))

    def without_last(self, *parts):
        return key(self, *parts[:-1]) if len(parts) > 1 else key(self, *parts)

    return {"shapes": shapes, "first row": first_row, "without its last part": without_last}


@pytest.mark.parametrize("name", mutations())
def test_a_hit_of_a_changed_input_is_caught(policies, name, monkeypatch):
    policy = policies["smolvla"]
    monkeypatch.setattr(Kept, "key", mutations()[name])
    runtime, batch, draws = Runtime(policy, kept=Kept()), observed(policy), noise(policy)
    runtime.act(batch, draws)
    cases = changed(batch, policy.camera_keys[0]).values()
    assert not all(equal(runtime, policy, case(), draws) for case in cases)


def test_a_weight_that_changed_is_caught(policies, monkeypatch):
    policy = policies["pi0"]
    monkeypatch.setattr(Kept, "begin", lambda self, model: self._hashed.clear())
    runtime, batch, draws = Runtime(policy, kept=Kept()), observed(policy), noise(policy)
    runtime.act(batch, draws)
    with torch.no_grad():
        policy.flow_parts().text_layers[0].self_attn.k_proj.weight.mul_(1.5)
    assert not equal(runtime, policy, batch, draws)


@pytest.mark.parametrize("decoder", ["pipelined", "sequential"])
def test_tokens_find_their_prompt_again(tmp_path, decoder):
    overrides = {"block_size": 7, "decoder": decoder}
    policy = load_policy(make_tiny("burnish_discrete", tmp_path / "p", overrides=overrides)).eval()
    batch, kept = observed(policy, 2), Kept()
    cases = changed(batch, policy.camera_keys[0])
    states = [batch, batch, cases["state"](), cases["pixel"](), cases["text"]()]
    plain = [policy.act(one) for one in states]
    with keeping(policy, kept):
        found = [policy.act(one) for one in states]
    assert all(a.tokens.equal(b.tokens) for a, b in zip(found, plain, strict=True))
    assert (kept.counts["prompt hits"], kept.counts["prompt misses"]) == (2, 3), kept.counts
    assert kept.counts["views hits"] >= 3 and policy.policy.model.kept is None
    before = kept.counts.copy()
    policy.act(batch)
    assert kept.counts == before


# Old pictures.


class Looking:
    """A chunk is the mean of what is seen, in units of the spread, and the state."""

    action_dim, supports, state_dict = 2, staticmethod(lambda capability: True), staticmethod(dict)

    def act(self, batch):
        raw = (batch["observation.images.a"].flatten(1).mean(1) + batch[STATE][:, 0])[:, None, None]
        return Chunk(raw, raw.expand(-1, 3, 2).clone())


def scene(*values, state=0.0, text="go"):
    pictures = torch.stack([torch.full((3, 16, 16), float(v)) for v in values])
    return {"observation.images.a": pictures, STATE: torch.full((len(values), 1), state), "task": [text] * len(values)}


def spread_file(tmp_path, **found):
    made = {"spread": 1.0, "binary": [], "module": weights_hash(Looking())}
    (tmp_path / "runtime.json").write_text(json.dumps(made | found))
    return str(tmp_path / "runtime.json")


def calls(reuse, seen, keys=("r",)):
    policy, used = Looking(), []
    for batch in seen:
        shown, due = reuse.look(keys, batch)
        chunk = policy.act(shown)
        reuse.compare(due, chunk, lambda batch=batch: policy.act(batch))
        used.append(shown["observation.images.a"][:, 0, 0, 0].tolist())
    return used


def test_pictures_are_used_until_they_are_old_and_states_never(tmp_path):
    reuse = Reuse(CacheConfig("images", 2, guard=False), Looking())
    pictures = [scene(i / 10, state=i) for i in range(6)]
    assert [row[0] for row in calls(reuse, pictures)] == pytest.approx([0, 0, 0, 0.3, 0.3, 0.3])
    assert reuse.counts == {"fresh": 2, "reused": 4}
    assert reuse.look(["r"], scene(0.9, state=9))[0][STATE].item() == 9
    old = Reuse(CacheConfig("prefix", 2, guard=False), Looking())
    calls(old, [scene(0.1, state=1)])
    assert old.look(["r"], scene(0.9, state=9))[0][STATE].item() == 1
    assert old.look(["r"], scene(0.9, text="stop"))[0]["observation.images.a"].max() == pytest.approx(0.9)
    old.forget("r")
    assert old.look(["r"], scene(0.5, text="stop"))[0]["observation.images.a"].max() == 0.5


def test_rows_are_robots_each_for_itself_and_copies_follow_the_last():
    reuse = Reuse(CacheConfig("images", 9, guard=False), Looking())
    calls(reuse, [scene(0.1, 0.2)], keys=("a", "b"))
    shown, _ = reuse.look(("b", "c"), scene(0.5, 0.6, 0.6) | {"task": ["go", "go", "long"]})
    assert shown["observation.images.a"][:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.6, 0.6])


def test_pictures_of_so_many_robots_are_kept():
    reuse = Reuse(CacheConfig("images", 9, guard=False), Looking(), most=2)
    for key in "abc":
        calls(reuse, [scene(0.1)], keys=(key,))
    assert list(reuse._anchors) == ["b", "c"]


def test_a_moving_object_trips_the_guard(tmp_path):
    """It slides a fifth of the spread a call: on the average of the comparisons that is too much before one is, and it
    is seen on the second old call, not when an episode is half over."""
    reuse = Reuse(CacheConfig("images", 1000, measured=spread_file(tmp_path, spread=0.5)), Looking())
    used = calls(reuse, [scene(i / 10) for i in range(12)])
    assert [row[0] for row in used] == pytest.approx([0, 0, 0] + [i / 10 for i in range(3, 12)])
    assert reuse.counts["stopped"] == 1 and reuse.counts["compared"] == 2
    reuse.forget("r")
    assert calls(reuse, [scene(0.5), scene(0.9)])[1] == [0.5], "until the next episode"
    calm = Reuse(CacheConfig("images", 1000, measured=spread_file(tmp_path, spread=100.0)), Looking())
    calls(calm, [scene(i / 10) for i in range(12)])
    assert calm.counts["stopped"] == 0 and calm.counts["compared"] == EVERY + 1, "the first ones, and the eighth"


def test_one_error_or_a_gripper_that_turns_trips_it_too(tmp_path):
    for spread, binary, values in ((0.3, [], [0, 0, 0, 0, 0.5]), (100, [1], [-0.1] * 4 + [0.1])):
        measured = spread_file(tmp_path, spread=spread, binary=binary)
        reuse = Reuse(CacheConfig("images", 1000, measured=measured), Looking())
        calls(reuse, [scene(value) for value in values])
        assert reuse.counts["stopped"] == 1


def test_a_comparison_that_fails_ends_the_use_of_old_pictures_and_no_server(tmp_path, caplog):
    from burnish.runtime.serve.batcher import Batcher

    reuse, policy = Reuse(CacheConfig("images", 9, measured=spread_file(tmp_path)), Looking()), Looking()
    calls(reuse, [scene(0.1)])
    shown, due = reuse.look(["r"], scene(0.2))
    chunk = policy.act(shown)
    batcher = Batcher.__new__(Batcher)
    batcher._after = lambda: reuse.compare(due, chunk, lambda: torch.zeros(2) + torch.zeros(3))
    batcher._compare()
    assert "could not be compared" in caplog.text and batcher._after is None
    assert reuse.look(["r"], scene(0.3))[0]["observation.images.a"].max() == pytest.approx(0.3)


def test_a_guard_that_is_left_out_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(Reuse, "compare", lambda self, due, chunk, act: None)
    with pytest.raises(AssertionError):
        test_a_moving_object_trips_the_guard(tmp_path)


def test_similarity_is_a_cosine_of_small_pictures():
    a, b = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    small = [torch.nn.functional.avg_pool2d(2 * x - 1, 2).flatten() for x in (a, b)]
    assert similarity(a, b) == pytest.approx(float(small[0] @ small[1] / small[0].norm() / small[1].norm()), abs=1e-6)
    reuse = Reuse(CacheConfig("images", 9, similarity=0.98, guard=False), Looking())
    first = scene(0.2) | {"observation.images.a": a[None]}
    calls(reuse, [first])
    assert reuse.look(["r"], first | {"observation.images.a": b[None]})[0]["observation.images.a"].equal(b[None])


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "does not know"), ({"spread": 0}, "no spread"), ({"binary": [True]}, "no spread"),
     ({"spread": "x"}, "no spread"), ({"binary": [2]}, "the policy's 2"), ({"binary": [-1]}, "the policy's 2")],
)  # fmt: skip
def test_a_guard_wants_a_measured_spread(tmp_path, content, said):
    path = "" if content is None else spread_file(tmp_path, **content)
    with pytest.raises(BurnishError, match=said):
        Reuse(CacheConfig("images", measured=path), Looking())


def test_a_spread_is_that_of_the_weights_that_act(policies, tmp_path):
    """In a server and in an evaluation alike."""
    policy, server = policies["smolvla"], SimpleNamespace(metrics=SimpleNamespace())
    spec = SimpleNamespace(action_names=range(policy.action_dim), cameras=policy.cameras, fps=10)

    def served(cache):
        return runner(policy, ServeOptions(cache=cache, clients=3), ExitStack(), server)[1]

    def evaluated(cache):
        job = _Job(EvalConfig(env="tabletop:lift", cache=cache, batch_size=5), 16, False, False, make_env)
        return _batched(job, policy, spec, None, 1).reuse

    for way, most in ((served, 6), (evaluated, 5)):
        config = CacheConfig("images", measured=spread_file(tmp_path, module=weights_hash(policy)))
        assert (way(config).spread, way(config).most) == (1.0, most)
        spread_file(tmp_path, module=weights_hash(policies["pi0"]))
        with pytest.raises(BurnishError, match="other weights.*verify runtime"):
            way(config)


def test_an_episode_may_end_while_the_last_one_is_compared(tmp_path):
    """A server's loop forgets; its other thread compares."""
    reuse, policy = Reuse(CacheConfig("images", 9, measured=spread_file(tmp_path)), Looking()), Looking()
    calls(reuse, [scene(0.1)])
    shown, due = reuse.look(["r"], scene(0.2))
    chunk = policy.act(shown)
    reuse.compare(due, chunk, lambda: (reuse.forget("r"), policy.act(scene(0.2)))[1])
    assert reuse.counts["compared"] == 1
    assert reuse.look(["r"], scene(0.3))[0]["observation.images.a"].max() == pytest.approx(0.3)
