"""`pytest -m gpu`: what only a GPU can show. Everything here is skipped without one."""

import pytest
import torch

from burnish.policies import load_policy
from burnish.runtime.observations import observations
from burnish.runtime.profile import profile
from workshop.tiny import make_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05", "burnish_discrete"])
def test_the_gpu_gives_the_numbers_of_the_cpu(kind, tmp_path, monkeypatch):
    from bench.gpu_parity import OVERRIDES, compare

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    folder = make_tiny(kind, tmp_path / kind, overrides=OVERRIDES.get(kind))
    found = compare(load_policy(folder), load_policy(folder, device="cuda"))
    assert {n: v for n, v in found.items() if v > (1e-4 if n.endswith("float32") else 1e-2)} == {}


@pytest.mark.parametrize("method", ["lora", "none"])
def test_training_leaves_the_generator_and_logs_its_memory(method, dataset, tmp_path):
    import burnish
    from burnish.core.recipe import load_recipe

    base = make_tiny("smolvla", tmp_path / "base", cameras=("front",), state_dim=4, action_dim=3)
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    result = burnish.train(load_recipe(None, [
        f"--policy.path={base}", f"--data.root={dataset}", f"--output={tmp_path / 'run'}", "--train.steps=2",
        "--train.batch_size=2", "--train.log_every=1", f"--train.peft.method={method}", "--train.precision=bf16",
    ]), progress=False)  # fmt: skip
    assert torch.cuda.get_rng_state().equal(before) and result.final["memory_gb"] > 0


def test_our_part_of_a_step_waits_for_nothing(dataset, tmp_path):
    """Preparing a batch, drawing and the optimiser; LeRobot's own forward still sends constants."""
    from burnish.data.augment import augment
    from burnish.train.selfcheck import DivergenceGuard

    pictures = torch.zeros(4, 32, 32, 3, dtype=torch.uint8, device="cuda")
    guard, health = DivergenceGuard(tmp_path, 0, late=True), torch.ones((), device="cuda")
    draws = torch.Generator("cuda").manual_seed(0)
    augment(pictures, draws)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(pictures, draws)
        for step in range(3):
            guard.look(step, health, {}, {}, {})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_token_policy_is_profiled_with_graphs(tmp_path):
    folder = make_tiny("burnish_discrete", tmp_path / "p", overrides={"block_size": 7, "decoder": "pipelined"})
    policy = load_policy(folder, device="cuda")
    found = profile(policy, [observations(policy, 1)], repeats=2, warmup=1, progress=False).figures()
    assert found["passes"] > 1 and found["stages"]["passes"]["median"] > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_graphs_of_a_second_gpu_replay_what_they_are_given():
    from burnish.runtime.executor import Graphs

    for device in ("cuda:0", "cuda:1"):
        graphs = Graphs(lambda tensors: tensors[0] * 2)
        for value in (1.0, 1.0, 5.0):
            assert graphs([torch.full((3,), value, device=device)]).tolist() == [2 * value] * 3
        assert len(graphs.held) == 1


@pytest.mark.parametrize("jacobian", ["identity", "vjp"])
def test_a_guided_chunk_is_replayed(jacobian, tmp_path):
    from burnish.runtime.executor import Runtime
    from burnish.sampling.steering import Steering

    policy = load_policy(make_tiny("smolvla", tmp_path / "base"), device="cuda").eval()
    plain, graphed = Runtime(policy, graph=False), Runtime(policy)
    draws, batch = policy.draw(2, torch.Generator().manual_seed(0)), observations(policy, 2)
    for delay in (1, 1, 2):
        steering = Steering(plain.act(batch, draws).raw[:, delay:], delay, jacobian=jacobian)
        assert graphed.act(batch, draws, steering=steering).raw.equal(plain.act(batch, draws, steering=steering).raw)
    assert len(graphed.sampler.graphs.held) == 1


def test_a_new_policy_is_drawn_on_the_gpu():
    from workshop.real import make_real

    before = torch.cuda.get_rng_state()
    policy = make_real("smolvla", device="cuda", tiny=True, image_size=32)
    assert policy.device.type == "cuda" and torch.cuda.get_rng_state().equal(before)
    assert policy.act(observations(policy, 1)).actions.isfinite().all()
