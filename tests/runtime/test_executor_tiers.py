"""Tiers that round otherwise: what they promise, compiled steps, and the bookkeeping of CUDA graphs."""

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_executor import KINDS, loaded, noise, observed

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.runtime import executor as module
from burnish.runtime.executor import Graphs, Runtime, shapes
from burnish.sampling import passes
from burnish.sampling.passes import without_graphs
from burnish.sampling.steering import Steering

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture(scope="module")
def policies(tiny_smolvla, tiny_pi0, tiny_pi05):
    return {kind: loaded(folder) for kind, folder in zip(KINDS, (tiny_smolvla, tiny_pi0, tiny_pi05), strict=True)}


@pytest.fixture(params=KINDS)
def policy(request, policies):
    return policies[request.param]


@pytest.mark.parametrize("rows", [1, 3])
def test_fused_rounds_otherwise_and_no_more(policy, rows):
    found = Runtime(policy, tier="fused").verify(observed(policy, rows))
    assert found["relative"] <= 1e-6 and found["holds"] and not found["bitwise"]


def test_fused_multiplies_less(policy):
    """One product of matrices for queries, keys and values, and one for gate and up."""
    counts = {}
    for tier in ("exact", "fused"):
        runtime = Runtime(policy, tier=tier)
        encoded, family = runtime.encode(observed(policy)), runtime.sampler.family
        condition = family.condition(0.5, 3)
        family.velocity(encoded, noise(policy).noise, condition)
        with torch.profiler.profile() as found:
            family.velocity(encoded, noise(policy).noise, condition)
        counts[tier] = sum(event.count for event in found.key_averages() if event.key in ("aten::addmm", "aten::mm"))
    own = sum(not crosses for crosses in runtime.sampler.parts.crosses)
    assert counts["exact"] - counts["fused"] >= 2 * own + len(runtime.sampler.parts.expert_layers)


def test_bf16_stays_within_the_spread_and_follows_the_weights(policy):
    policy = copy.deepcopy(policy)
    runtime = Runtime(policy, tier="bf16")
    found = runtime.verify(observed(policy))
    assert found["holds"] and found["spread"] <= 0.02 and abs(found["kept"] - 1) <= 0.02
    with torch.no_grad():
        policy.policy.model.action_out_proj.bias.add_(1)
    assert runtime.verify(observed(policy))["holds"]
    assert runtime.sampler.parts.text_layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert policy.policy.model.action_in_proj.weight.dtype == torch.float32


def test_a_tier_that_breaks_its_promise_is_refused(policy, monkeypatch):
    sampler, inputs = Runtime(policy, tier="fused").sampler, policy.begin(observed(policy))[0]
    sampler.require(inputs, noise(policy).noise)
    real = module.Sampler.sample
    monkeypatch.setattr(module.Sampler, "sample", lambda *args: real(*args) * 1.01)
    with pytest.raises(BurnishError, match="tier 'fused' differs from LeRobot's sampler by 0.01 on this"):
        sampler.require(inputs, noise(policy).noise)


def test_a_compiled_step_is_one_graph_for_all_steps(policies, monkeypatch):
    """Traced, not lowered: that takes minutes and is the bench's."""
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounter

    policy, real = policies["pi05"], torch.compile
    dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda function, options, **others: real(function, backend=counter, **others))
    runtime = Runtime(policy, tier="compiled")
    found = runtime.verify(observed(policy, 1))
    runtime.act(observed(policy, 1, 5))
    assert found["holds"] and counter.frame_count == 1
    dynamo.reset()


@pytest.fixture
def recorded(monkeypatch):
    """Graphs for a machine without a GPU: a replay does again what was recorded. Returns what was recorded."""
    found = []

    def record(_device, work, warm):
        warm()
        output = work().clone()
        found.append(output)
        return SimpleNamespace(replay=lambda: output.copy_(work())), output

    monkeypatch.setattr(module, "record", record)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
    return found


def test_graphs_replay_what_they_are_given(recorded, monkeypatch):
    graphs = Graphs(lambda tensors: tensors[0] * 2 + tensors[1])
    one, other = [torch.ones(3), torch.zeros(3)], [torch.ones(3) * 5, torch.ones(3)]
    first = graphs(one)
    again = graphs(one)
    assert graphs(other).tolist() == [11.0] * 3 and again.tolist() == first.tolist() == [2.0] * 3
    assert one[0].tolist() == [1.0] * 3, "the caller's tensors are read, not kept"
    held = next(iter(graphs.held.values()))
    held.inputs[0].copy_(torch.zeros(3))
    assert graphs(one).tolist() == [2.0] * 3 and len(recorded) == 1
    with monkeypatch.context() as autocast:  # which PyTorch refuses without a GPU
        autocast.setattr(torch, "is_autocast_enabled", lambda _kind: True)
        graphs(one)
    assert len(graphs.held) == 2, "what autocast computes is another graph"
    with without_graphs():
        graphs([torch.ones(5), torch.ones(5)])
    assert len(recorded) == 2
    assert shapes([torch.ones(5)]) != shapes([torch.ones(5, device="meta")]), "a graph belongs to its device"
    graphs.clear()
    assert not graphs.held and graphs(one).tolist() == [2.0] * 3 and len(recorded) == 3


def test_graphs_forget_the_one_unused_for_longest(recorded, monkeypatch):
    reserved = iter(range(0, 2000, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: next(reserved))
    graphs = Graphs(lambda tensors: tensors[0] + 1, limit=250)
    for width in (1, 2, 1, 3, 2, 2):
        graphs([torch.zeros(width)])
    assert [key[0][0] for key in graphs.held] == [(1,), (3,)]
    assert len(recorded) == 3, "one that had to go is not captured again and again"


@pytest.mark.parametrize("fault", ["refuses", "differs", "writes nothing"])
def test_a_graph_that_cannot_be_is_done_without(monkeypatch, caplog, fault):
    def record(_device, work, warm):
        warm()
        if fault == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return SimpleNamespace(replay=lambda: None), work() + (1e-3 if fault == "differs" else 0)

    monkeypatch.setattr(module, "record", record)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
    graphs, calls = Graphs(lambda tensors: calls.append(1) or tensors[0] + 1), []
    for _ in range(3):
        assert graphs([torch.zeros(2)]).tolist() == [1.0, 1.0]
    assert not graphs.held and len(calls) <= 5
    assert [message for message in caplog.messages if "no CUDA graph" in message][1:] == []
    assert "not permitted" in caplog.text if fault == "refuses" else "other numbers" in caplog.text


def test_a_graph_is_captured_on_a_stream_of_its_own_device(monkeypatch):
    """One for each device: graphs that share a pool want the same one."""
    present, streams = [], []

    @contextmanager
    def device(index):
        present.append(index)
        yield
        present.pop()

    def graph(_graph, pool, stream=None, capture_error_mode=""):
        streams.append(stream)
        return nullcontext()

    fakes = {
        "device": device, "current_device": lambda: present[-1], "graph": graph, "CUDAGraph": object,
        "Stream": lambda: SimpleNamespace(device=present[-1], wait_stream=lambda _: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
        "stream": lambda _: nullcontext(), "synchronize": lambda: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(passes, "_CAPTURES", {})
    for index in (0, 1, 0):
        passes.record(index, lambda: None, lambda: None)
    assert [stream.device for stream in streams] == [0, 1, 0] and streams[0] is streams[2]


@pytest.mark.parametrize("tier", ["exact", "fused"])
def test_a_graphed_runtime(policy, recorded, tier):
    """Prompts in buckets, context of other observations, weights that change: everything but the capture itself."""
    policy = copy.deepcopy(policy)
    runtime = Runtime(policy, tier=tier)
    sampler = runtime.sampler
    assert sampler.graphs is None, "this is no GPU"
    sampler.graphs = Graphs(sampler._work)
    sampler._build()
    inputs, _ = policy.begin(observed(policy, 3))
    for seed in (0, 0, 1, 0):
        found = runtime.verify(observed(policy, 3, seed))
        assert found["holds"], found
    prompt = sampler._trimmed(inputs)[2]
    assert tier == "exact" or prompt.shape[1] == inputs[2].shape[1] or prompt.shape[1] % 16 == 0
    assert len(sampler.graphs.held) == len(recorded) == 1
    with torch.no_grad():
        policy.policy.model.action_out_proj.bias.add_(1)
    assert runtime.verify(observed(policy, 3))["holds"] and len(recorded) == 2


@pytest.mark.parametrize("mode", ["identity", "vjp", "inpaint"])
def test_a_graph_goes_on_from_old_chunks(policy, recorded, mode):
    """One graph for all delays and rests; what they hold is read from buffers."""
    how = {"mode": "inpaint"} if mode == "inpaint" else {"jacobian": mode}
    plain, graphed = Runtime(policy), Runtime(policy)
    graphed.sampler.graphs = Graphs(graphed.sampler._work)
    batch, draws = observed(policy, 3), noise(policy)
    old = plain.act(batch, draws).raw
    assert graphed.act(batch, draws).raw.equal(old)
    for seed, (rest, delay, end) in enumerate([(old[:, 2:], 1, None), (old[:, 2:], 1, None), (old[:, 3:], 2, 4),
                                               (old[:, 1:], torch.tensor([0, 2, 1]), None)]):  # fmt: skip
        steering = Steering(rest, delay, end, **how)
        batch = observed(policy, 3, seed)
        want = plain.act(batch, draws, steering=steering).raw
        assert graphed.act(batch, draws, steering=steering).raw.equal(want) and not want.equal(old)
    assert len(recorded) == len(graphed.sampler.graphs.held) == 2, "with and without a guide"
    graphed.act(batch, draws, steering=Steering(old[:, 2:], 1, clip=0.5, **how))
    assert len(recorded) == 3, "another clip is another graph"
    graphed.act(batch, draws, steering=Steering(old[:, 2:], 1, sigma=torch.ones(old.shape[2]), **how))
    assert len(recorded) == 3, "a sigma of each dimension is computed without one"


@GPU
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tier", ["exact", "fused"])
def test_graph_on_a_gpu(kind, tier, request):
    policy = load_policy(request.getfixturevalue(f"tiny_{kind}"), device="cuda").eval()
    runtime = Runtime(policy, tier=tier)
    runtime.warm(observed(policy, 3))
    assert len(runtime.sampler.graphs.held) == 1
    for seed in (0, 1, 0):
        assert runtime.verify(observed(policy, 3, seed))["holds"]
