"""What in LeRobot 0.6.1's samplers costs time or bits, trap by trap, and mutations of the executor that must show."""

from contextlib import contextmanager
from unittest.mock import patch

import lerobot.policies.common.vla_utils as helpers
import lerobot.policies.smolvla.smolvlm_with_expert as joint_module
import pytest
import torch
from test_executor import loaded, noise, observed, pair
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from burnish.core.seeding import seeded
from burnish.policies import load_policy
from burnish.runtime import family as family_module
from burnish.runtime import pi as pi_module
from burnish.runtime import smolvla as smolvla_module
from burnish.runtime.executor import Runtime
from burnish.sampling.solvers import make_solver
from workshop.tiny import make_tiny

KINDS = ("smolvla", "pi0", "pi05")


@pytest.fixture(scope="module")
def policies(tiny_smolvla, tiny_pi0, tiny_pi05):
    return {kind: loaded(folder) for kind, folder in zip(KINDS, (tiny_smolvla, tiny_pi0, tiny_pi05), strict=True)}


@pytest.fixture(params=KINDS)
def policy(request, policies):
    return policies[request.param]


@pytest.fixture
def half(tiny_smolvla):
    """SmolVLA as from the hub: language model and expert bf16, what reads state and actions float32."""
    policy = loaded(tiny_smolvla)
    policy.policy.model.vlm_with_expert.to(torch.bfloat16)
    return policy


def same(policy, runtime=None, seed=0):
    """Whether the exact tier still says what LeRobot says, on two observations in turn."""
    runtime = runtime or Runtime(policy)
    try:
        return all(torch.equal(*pair(policy, runtime, observed(policy, 3, s), noise(policy, 3, s))) for s in (seed, 9))
    except RuntimeError:
        return False


@contextmanager
def counted(owner, name):
    calls = []
    real = getattr(owner, name)

    def note(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    with patch.object(owner, name, note):
        yield calls


def test_trap_growing_cache(policy):
    """DynamicCache.update copies the whole prefix at every layer and step; here keys stay where they are."""
    runtime = Runtime(policy)
    encoded = runtime.encode(observed(policy))
    before = [None if keys is None else (keys.data_ptr(), keys.shape) for keys in encoded.keys]
    runtime.sample(encoded, noise(policy).noise)
    assert before == [None if keys is None else (keys.data_ptr(), keys.shape) for keys in encoded.keys]


def test_trap_cross_layers_project_once_and_count_from_zero(policies):
    policy = policies["smolvla"]
    runtime = Runtime(policy)
    parts = runtime.sampler.parts
    cross = next(e for e, crosses in zip(parts.expert_layers, parts.crosses, strict=True) if crosses)
    with counted(cross.self_attn.k_proj, "forward") as calls:
        encoded = runtime.encode(observed(policy))
        runtime.sample(encoded, noise(policy).noise)
    assert len(calls) == 1
    (own_sin, _), (cross_sin, cross_cos) = encoded.rope
    assert own_sin.shape[0] == 3 and not own_sin[:, :1].equal(torch.zeros_like(own_sin[:, :1]))
    assert not cross_sin[:, 0].any() and bool((cross_cos[:, 0] == 1).all())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 48), (8, 96), (50, 720), (3, 7, 100)])
def test_a_norm_in_one_call_has_the_bits_of_its_six_operations(shape, kind):
    draws = torch.Generator().manual_seed(0)
    module, x = LlamaRMSNorm(shape[-1], 1e-5), torch.randn(shape, generator=draws)
    module.weight.data.copy_(torch.randn(shape[-1], generator=draws))
    module, x = module.to(kind), x.to(kind)
    with patch.object(module, "forward", side_effect=module.forward) as called:
        found = smolvla_module.norm(module, x)
        assert called.call_count == (kind != torch.float32)
    wide = x.float()
    by_hand = module.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(kind)
    assert torch.equal(found, by_hand)


def test_trap_residual_keeps_the_type_of_o_proj(half):
    assert same(half) and Runtime(half).verify(observed(half))["bitwise"]

    def promoted(self, layer, x, seen):
        out = x + layer.self_attn.o_proj(seen.to(layer.self_attn.o_proj.weight.dtype))
        return self.mlp(layer, layer.post_attention_layernorm(out)) + out

    with patch.object(smolvla_module.SmolVLA, "_rest", promoted):
        assert not same(half)


def test_trap_tables_are_not_rebuilt(policy):
    """Rotations, masks, layers and embeddings of time, by step and layer in LeRobot; no copy to the device either."""
    runtime = Runtime(policy)
    encoded, draws = runtime.encode(observed(policy)), noise(policy).noise
    want = runtime.sample(encoded, draws)
    runtime.encode(observed(policy))

    def forbidden(*_args, **_kwargs):
        raise AssertionError("made anew")

    rotary = runtime.sampler.parts.rotary
    with patch.object(helpers, "create_sinusoidal_pos_embedding", forbidden), \
         patch.object(helpers, "make_att_2d_masks", forbidden), \
         patch.object(joint_module, "apply_rope", forbidden), \
         patch.object(torch, "tensor", forbidden), \
         patch.object(smolvla_module, "rotation", forbidden), \
         patch.object(type(rotary[-1]) if rotary else nn.Identity, "forward", forbidden):  # fmt: skip
        assert torch.equal(runtime.sample(encoded, draws), want)


def test_trap_times_are_lerobots_numbers(policy):
    """1 + i * (-1 / N) and not 1 - i / N; and N steps, where `while time >= -dt / 2` sums up what floats lose."""
    for steps in (1, 3, 7, 10, 50):
        times = []
        make_solver(f"euler:{steps}")(
            lambda points, time, times=times: times.append(time) or points * 0, torch.zeros(1)
        )
        assert times == [1.0 + i * (-1.0 / steps) for i in range(steps)]


def test_trap_cloned_keys(policies):
    def forbidden(*_args):
        raise AssertionError("cloned")

    import lerobot.policies.pi0.modeling_pi0 as pi0
    import lerobot.policies.pi05.modeling_pi05 as pi05

    for kind, module in (("pi0", pi0), ("pi05", pi05)):
        runtime, batch = Runtime(policies[kind]), observed(policies[kind])
        with patch.object(module, "clone_past_key_values", forbidden):
            runtime.act(batch, noise(policies[kind]))


def test_trap_modulation_of_another_width(policies):
    """A table made for one row, used for three: last bits differ, because a GEMV is not a GEMM."""
    policy = policies["pi05"]
    runtime = Runtime(policy)
    made = []
    for norm in runtime.sampler.family._norms():
        norm.dense.register_forward_pre_hook(lambda _module, args: made.append(len(args[0])))
    for rows in (1, 3, 1, 3):
        runtime.act(observed(policy, rows), noise(policy, rows))
    assert set(made[: len(made) // 2]) == {1} and set(made[len(made) // 2 :]) == {3}
    assert len(made) == 2 * runtime.sampler.parts.steps * len(runtime.sampler.family._norms())

    def of_one(self, time, width, real=pi_module.Pi.condition):
        return real(self, time, 1).expand(-1, width, -1, -1)

    with patch.object(pi_module.Pi, "condition", of_one):
        assert not same(policy)


def test_trap_attention_switched_for_everybody(policies):
    """pi's sampler sets `_attn_implementation` for good at its first call; the executor touches no config."""
    policy = policies["pi0"]
    config = policy.expert.config
    before, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        batch, draws = observed(policy), noise(policy)
        ours = Runtime(policy).act(batch, draws).actions
        assert config._attn_implementation == "sdpa"
        assert torch.equal(ours, policy.act(batch, draws).actions) and config._attn_implementation == "eager"
    finally:
        config._attn_implementation = before


def test_trap_compile_model_changes_the_process(policies):
    before = torch.get_float32_matmul_precision()
    with patch.object(torch, "compile", lambda function, **_options: function):
        runtime = Runtime(policies["smolvla"], tier="compiled")
    runtime.act(observed(policies["smolvla"]), noise(policies["smolvla"]))
    assert torch.get_float32_matmul_precision() == before


def test_trap_modes_are_left_alone(policy):
    """select_action walks all modules to switch to evaluation at every control step."""
    policy.train()
    try:
        with patch.object(nn.Module, "eval", lambda self: pytest.fail("walked")):
            out = Runtime(policy).act(observed(policy), noise(policy)).actions
        assert policy.training and not out.is_inference() and not out.requires_grad and same(policy)
    finally:
        policy.eval()


def test_trap_guidance_without_the_weights_gradients(policy):
    """The vector-Jacobian product that guidance takes, against autograd through LeRobot's own step."""
    runtime, batch, draws = Runtime(policy), observed(policy), noise(policy)
    inputs, _ = policy.begin(batch)
    points, weight = draws.noise.clone().requires_grad_(), torch.randn(draws.noise.shape)
    encoded, family = runtime.encode(batch), runtime.sampler.family
    found = family.velocity(encoded, points, family.condition(0.6, 3))
    (ours,) = torch.autograd.grad(found, points, weight)
    lerobots = points.detach().clone().requires_grad_()
    theirs = policy.velocities(inputs, lerobots[:, None], torch.full((3, 1), 0.6))[:, 0]
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    (want,) = torch.autograd.grad(theirs, lerobots, weight)
    torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-5)
    assert torch.equal(*pair(policy, runtime, batch, draws))  # the buffers are none the worse for it


@pytest.mark.parametrize("kind", KINDS)
def test_trap_dead_tokens_and_cameras(kind, tmp_path):
    """Prompts are padded and empty cameras run through everything; the fused tiers leave both out."""
    policy = loaded(make_tiny(kind, tmp_path / kind, cameras=("top",), overrides={"empty_cameras": 1}))
    batch, lengths = observed(policy, 1), {}
    for tier in ("exact", "fused"):
        runtime = Runtime(policy, tier=tier)
        with counted(runtime.sampler.family, "embed_image") as looked:
            lengths[tier] = runtime.encode(batch).length
        found = runtime.verify(batch)
        assert found["holds"] and len(looked) == (1 if tier == "fused" else len(policy.begin(batch)[0][0]))
    pads = policy.begin(batch)[0]
    used = int(pads[3].sum()) + 16 * (len(pads[0]) - 1 if kind != "smolvla" else len(pads[0]))
    assert lengths["fused"] < lengths["exact"] or (kind == "smolvla" and lengths["exact"] == used + 1)


def variant(name, tmp_path):
    kind, _, field = name.partition(":")
    fields = {
        "marks": {"add_image_special_tokens": True}, "prefix_length": {"prefix_length": 90},
        "self_attention": {"attention_mode": "self_attn"}, "fewer_experts": {"num_expert_layers": 2,
                                                                            "self_attn_every_n_layers": -1},
        "empty": {"empty_cameras": 1}, "bf16": {"dtype": "bfloat16"},
    }[field]  # fmt: skip
    return loaded(make_tiny(kind, tmp_path / kind, cameras=("top", "wrist"), overrides=fields))


@pytest.mark.parametrize("name", ["smolvla:marks", "smolvla:prefix_length", "smolvla:self_attention",
                                  "smolvla:fewer_experts", "smolvla:empty", "pi0:empty", "pi05:empty", "pi0:bf16",
                                  "pi05:bf16"])  # fmt: skip
def test_every_layout_is_bitwise(name, tmp_path):
    policy = variant(name, tmp_path)
    assert same(policy)
    batch = observed(policy) | {"observation.images.wrist_padding_mask": torch.tensor([True, False, True])}
    for tier in ("exact", "fused"):
        found = Runtime(policy, tier=tier).verify(batch)
        assert found["holds"], (tier, found)


def test_weights_that_change_are_noticed(policy, tiny_smolvla, tiny_pi0, tiny_pi05):
    """A training step, an adapter put in, and the adapter merged: kept tables are of the weights as they are now."""
    from peft import LoraConfig, LoraModel

    folder = {"smolvla": tiny_smolvla, "pi0": tiny_pi0, "pi05": tiny_pi05}[policy.name]
    policy = loaded(folder)
    runtimes = {tier: Runtime(policy, tier=tier) for tier in ("exact", "fused")}

    def check():
        assert same(policy, runtimes["exact"])
        assert all(runtime.verify(observed(policy))["holds"] for runtime in runtimes.values())

    check()
    batch = observed(policy) | {"action": torch.randn(3, 8, 7, generator=torch.Generator().manual_seed(0))}
    policy.train()
    optimiser = torch.optim.SGD(policy.parameters(), lr=0.05)
    policy.loss(batch, noise(policy)).total.backward()
    optimiser.step()
    policy.eval()
    check()
    with policy.capture([0, 1]):
        policy.loss(batch, noise(policy))
    check()
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=policy.adapter_targets, init_lora_weights=False)
    with seeded(0):  # some random adapters blow rounding up beyond the tier's promise
        tuner = LoraModel(policy, lora, "default")
    check()
    assert tuner.merge_and_unload() is policy
    check()


def test_mutations_show(policies):
    """A cache that is appended to instead of written in place; keys of the observation before."""
    policy = policies["smolvla"]

    def appended(buffer, start, new, dim):
        return torch.cat([buffer, new], dim)

    with patch.object(smolvla_module, "extend", appended):
        assert not same(policy)
    runtime = Runtime(policy)
    stale = runtime.encode(observed(policy, 3, 5))
    with patch.object(runtime.sampler, "encode", lambda inputs: stale):
        assert not same(policy, runtime)
    assert same(policy, runtime) and family_module.extend is smolvla_module.extend


def test_a_loaded_state_is_noticed(tiny_pi05):
    policy, other = load_policy(tiny_pi05).eval(), loaded(tiny_pi05)
    runtime = Runtime(policy)
    assert same(policy, runtime)
    policy.load_state_dict(other.state_dict())
    assert same(policy, runtime)
