"""Every kind of policy that acts is served, through its verbs: what comes out is what `act` says by itself."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import fake
import numpy as np
import pytest
import torch

from burnish.core.config import CacheConfig
from burnish.core.errors import BurnishError
from burnish.core.provenance import weights_hash
from burnish.policies import load_policy
from burnish.sampling.steering import Steering
from workshop.tiny import make_tiny

pytest.importorskip("msgpack")
pytest.importorskip("prometheus_client")

from serve_fakes import served  # noqa: E402

from burnish.runtime.client import PolicyClient  # noqa: E402
from burnish.runtime.serve.batcher import Batcher  # noqa: E402
from burnish.runtime.serve.metrics import Metrics  # noqa: E402
from burnish.runtime.serve.openpi import OpenPi  # noqa: E402
from burnish.runtime.serve.rows import Row, profile_keys, stack  # noqa: E402
from burnish.runtime.serve.wire import pack_openpi, unpack_openpi  # noqa: E402

TASKS = ("lift the red cube", "open", "put the green ball on the plate and then open the drawer")


def observations(policy, count):
    random = np.random.default_rng(0)
    views = {f"observation.images.{name}": random.integers(0, 255, (count, *size, 3), np.uint8)
             for name, size in policy.view_sizes.items()}  # fmt: skip
    return [{**{key: value[i] for key, value in views.items()}, "task": TASKS[i % 3],
             "observation.state": random.standard_normal(policy.state_dim)} for i in range(count)]  # fmt: skip


def row_of(policy, one):
    views = {name: one[f"observation.images.{name}"][None] for name in policy.cameras}
    return Row(views, one["observation.state"].astype(np.float32)[None], one["task"])


def actions(answers):
    return np.stack([one.actions for one in answers])


def by_itself(policy, seen, seed):
    """The same through `act`, with a batch made by hand."""
    batch = {"task": [seen["task"]]}
    times = len(policy.window.observations)
    for name in policy.cameras:
        view = torch.from_numpy(seen[f"observation.images.{name}"]).permute(2, 0, 1).float() / 255
        batch[f"observation.images.{name}"] = view[None] if times == 1 else view[None, None].repeat(1, times, 1, 1, 1)
    state = torch.from_numpy(seen["observation.state"]).float()[None]
    batch["observation.state"] = state if times == 1 else state[:, None].repeat(1, times, 1)
    return policy.act(batch, policy.draw(1, torch.Generator().manual_seed(seed))).actions[0].numpy()


@pytest.mark.parametrize("kind", ["smolvla", "pi05", "burnish_discrete", "act", "diffusion", "openvla"])
def test_every_policy_that_acts_is_served(kind, tmp_path, request):
    """Alone its answer is that of `act`, bit for bit; in a batch as near as that policy's own batches are."""
    if kind in ("smolvla", "pi05"):
        folder = request.getfixturevalue(f"tiny_{kind}")
    else:
        folder = make_tiny(kind, tmp_path / kind, cameras=("top",))
    policy = load_policy(folder)
    sent = observations(policy, 3)

    async def run(thread, width):
        batcher = Batcher(policy, thread, Metrics(), width=width, wait=0.5)
        service = OpenPi(batcher, profile_keys(policy, "lerobot"))
        service.warm()
        batcher.clients = 3
        task = asyncio.ensure_future(batcher.run())
        frames = [service.session().answer(pack_openpi({**one, "burnish": {"seed": i}})) for i, one in enumerate(sent)]
        found = [unpack_openpi(frame) for frame in await asyncio.gather(*frames)]
        task.cancel()
        return found, unpack_openpi(service.greeting)

    with ThreadPoolExecutor(1) as thread:
        alone, about = asyncio.run(run(thread, 1))
        together, _ = asyncio.run(run(thread, 3))
    assert about["policy"] == kind and about["action_horizon"] == policy.act_steps
    assert [one["server_timing"]["rows"] for one in (*alone, *together)] == [1, 1, 1, 3, 3, 3]
    for i, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert one["actions"].shape == (policy.act_steps, policy.action_dim) and one["actions"].dtype == np.float32
        assert np.array_equal(one["actions"], by_itself(policy, sent[i], i))
        if not kind.startswith("openvla"):  # greedy tokens of random weights: a last bit may turn one
            np.testing.assert_allclose(other["actions"], one["actions"], rtol=1e-3, atol=2e-3)


def test_an_exact_answer_never_depends_on_others(tiny_smolvla):
    """Bit for bit, whoever shares the call and however long their texts are."""
    policy = load_policy(tiny_smolvla)
    rows = [row_of(policy, one) for one in observations(policy, 4)]
    with ThreadPoolExecutor(1) as thread:
        batcher = Batcher(policy, thread, Metrics(), width=4, exact=True)
        alone = [actions(batcher.act([row], [i]))[0] for i, row in enumerate(rows)]
        together = actions(batcher.act(rows, range(4)))
        turned = actions(batcher.act(rows[::-1], range(3, -1, -1)))[::-1]
    assert all(np.array_equal(alone[i], together[i]) and np.array_equal(alone[i], turned[i]) for i in range(4))


def test_committed_actions_are_continued(tiny_smolvla):
    policy = load_policy(tiny_smolvla)
    row = row_of(policy, observations(policy, 1)[0])
    with ThreadPoolExecutor(1) as thread:
        batcher = Batcher(policy, thread, Metrics(), width=2)
        free = actions(batcher.act([row], [1]))
        again = actions(batcher.act([row], [2], free[:, :3]))
    np.testing.assert_allclose(again[:, :3], free[:, :3], atol=1e-4)
    assert not np.allclose(again[:, 3:], free[:, 3:], atol=1e-3)


@pytest.mark.parametrize("mode", ["guided", "inpaint"])
def test_a_session_goes_on_from_its_last_chunk(tiny_smolvla, mode):
    """What the server makes of chunk, executed and delay is the policy's own steering, beside another client."""
    policy = load_policy(tiny_smolvla)
    sent = observations(policy, 2)

    async def run(thread):
        batcher = Batcher(policy, thread, Metrics(), width=2, wait=0.5, mode=mode)
        service = OpenPi(batcher, profile_keys(policy, "lerobot"), mode=mode)
        batcher.clients = 2
        task = asyncio.ensure_future(batcher.run())
        sessions = [service.session() for _ in range(2)]

        async def ask(*places):
            return [unpack_openpi(one)["actions"] for one in await asyncio.gather(*(
                session.answer(pack_openpi({**one, "burnish": {"seed": 3 + i, **place}}))
                for i, (session, one, place) in enumerate(zip(sessions, sent, places, strict=True))))]  # fmt: skip

        first = await ask({}, {})
        raws = [session.last[1] for session in sessions]
        second = await ask({"chunk": 0, "executed": 3, "delay": 2}, {"chunk": 0, "executed": 5, "delay": 1})
        other = await ask({"chunk": 7, "executed": 3, "delay": 2}, {"chunk": 1, "executed": 8, "delay": 2})
        task.cancel()
        return first, raws, second, other

    with ThreadPoolExecutor(1) as thread:
        first, raws, second, other = asyncio.run(run(thread))
    for i, (executed, delay) in enumerate(((3, 2), (5, 1))):
        batcher = Batcher(policy, None, Metrics(), width=1, mode=mode)
        by_hand = batcher.policy.act(
            stack(policy, [row_of(policy, sent[i])]), policy.draw(1, torch.Generator().manual_seed(3 + i)),
            steering=Steering(raws[i][None, executed:], delay, mode=mode),
        ).actions[0]  # fmt: skip
        np.testing.assert_allclose(second[i], by_hand.numpy(), atol=2e-4)
        assert np.abs(second[i] - first[i]).max() > 1e-3
        np.testing.assert_allclose(other[i], first[i], atol=2e-4)  # an unknown chunk, or one without rows left: afresh


def test_a_faster_server_says_how_it_was_started_and_counts(tiny_smolvla, tmp_path):
    """By the executor and another sampler; an unchanged picture is found again, an old one is used and compared."""
    fake.make_dataset(tmp_path / "data", cameras=("top", "wrist"), action_dim=7, episodes=2)
    policy = load_policy(tiny_smolvla)
    measured = {"spread": 1000.0, "binary": [], "module": weights_hash(policy)}
    (tmp_path / "runtime.json").write_text(json.dumps(measured))
    (sent,) = observations(policy, 1)
    cache = CacheConfig("images", 9, measured=str(tmp_path / "runtime.json"))
    options = {"tier": "exact", "sampler": "ab2:3", "data": str(tmp_path / "data"), "cache": cache, "width": 1}
    with served(policy, **options) as one, PolicyClient(one.address) as robot:
        about, found = robot.metadata, []
        for call in range(6):
            moved = {key: 255 - value if key.startswith("observation.images") and call else value
                     for key, value in sent.items()}  # fmt: skip
            found.append(robot.infer(moved, seed=7, delay=call)["actions"])
        stats = json.loads(one.server.metrics.stats(0))
        text = one.server.metrics.text()
    assert (about["tier"], about["sampler"], about["cache"], about["fps"]) == ("exact", "ab2:3", "images", 10)
    assert len(about["action_names"]) == 7
    policy.sampler = "ab2:3"
    assert np.array_equal(found[0], by_itself(policy, sent, 7)) and all(np.array_equal(found[0], f) for f in found)
    assert stats["cache"]["encoding_hits"] >= 4 and stats["cache"]["reused"] == 5
    assert stats["cache"]["compared"] == 4 and stats["delay_p95"] == 4
    assert 'burnish_cache{what="reused"} 5.0' in text and "burnish_delay_steps_count 5.0" in text


def test_a_mode_needs_a_policy_that_can(tmp_path):
    policy = load_policy(make_tiny("act", tmp_path / "act"))
    with pytest.raises(BurnishError, match="--async guided"):
        OpenPi(Batcher(policy, None, Metrics()), profile_keys(policy, "lerobot"), mode="guided")
