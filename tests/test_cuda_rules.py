"""What CUDA would refuse or wait for, shown without a GPU: tensors that pretend to be on one, and recorded calls."""

import gc
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import bench
from burnish.core import provenance
from burnish.core.config import PeftConfig
from burnish.core.errors import BurnishError
from burnish.core.provenance import machine, weights_hash
from burnish.core.seeding import seeded
from burnish.core.types import Draws
from burnish.data.augment import augment
from burnish.policies import language as language_verbs
from burnish.policies import load_policy
from burnish.runtime import profile as profiling
from burnish.runtime.executor import Sampler
from burnish.runtime.observations import observations
from burnish.runtime.profile import dissect, profile
from burnish.sampling import passes
from burnish.sampling.steering import Steering
from burnish.sampling.token_model import make_decoder
from burnish.train.logging import peak_memory
from burnish.train.optim import add_adapters
from burnish.train.setup import precision_note
from workshop.real import SIZES, make_real
from workshop.tiny import make_tiny

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def tiny_discrete(tmp_path_factory):
    overrides = {"block_size": 7, "decoder": "pipelined"}
    return make_tiny("burnish_discrete", tmp_path_factory.mktemp("cuda") / "p", overrides=overrides)


@contextmanager
def pretended(monkeypatch):
    """Inside, tensors may say that they are on a GPU: mixing devices and reading values on the host are errors."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def on_gpu(mode, policy, batch):
    """Policy and batch as fakes on the GPU; values that a first call keeps on the host were kept before."""
    with torch.no_grad():
        for module in policy.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                fake = mode.from_tensor(tensor.detach()).to(CUDA)
                made = torch.nn.Parameter(fake, tensor.requires_grad) if name in module._parameters else fake
                (module._parameters if name in module._parameters else module._buffers)[name] = made
    return {k: mode.from_tensor(v).to(CUDA) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


# Host waits: what a step reads, the host waits for.


def test_a_smolvla_step_mixes_no_devices_and_reads_nothing(tiny_smolvla, monkeypatch):
    policy = load_policy(tiny_smolvla).train()
    batch = {**observations(policy, 2), "action": torch.zeros(2, 8, 7)}
    inputs = policy._inputs(batch, batch["action"])[1]
    draws = policy.draw(2, torch.Generator().manual_seed(0))
    policy.policy.model.forward(*inputs, policy._pad(batch["action"]), draws.noise, draws.time)
    images, masks, *rest = inputs
    with pretended(monkeypatch) as mode:
        moved = on_gpu(mode, policy, {"noise": draws.noise, "time": draws.time, "action": batch["action"]})
        images, masks = ([mode.from_tensor(part).to(CUDA) for part in parts] for parts in (images, masks))
        rest = [mode.from_tensor(part).to(CUDA) for part in rest]
        action = policy._pad(moved["action"])
        errors = policy.policy.model.forward(images, masks, *rest, action, moved["noise"], moved["time"])
        assert errors.device == CUDA and errors.requires_grad


def test_answers_are_found_on_the_host(tiny_smolvla, monkeypatch):
    policy = load_policy(tiny_smolvla)
    size = policy.vlm.config.text_config.hidden_size
    plain = language_verbs.vqa.encode

    def on_host(*given, **options):
        with unset_fake_temporarily():
            return plain(*given, **options)

    monkeypatch.setattr(language_verbs.vqa, "encode", on_host)
    with pretended(monkeypatch) as mode:
        on_gpu(mode, policy, {})
        image = torch.zeros(2, 4, size, device=CUDA)
        for backbone in (policy.backbone, policy.prefix):
            found = language_verbs.answer_loss(backbone, image, ["red?", "how many?"], ["yes", "12"])
            assert found.mean.device == CUDA


def test_the_pretended_device_refuses_what_a_gpu_waits_for(monkeypatch):
    """The tests above would pass on a device that refuses nothing."""
    with pretended(monkeypatch):
        found = torch.zeros(3, device=CUDA)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(found.sum() > 0)
        with pytest.raises(Exception, match="nonzero"):
            found[found > 0]
        with pytest.raises(Exception, match="device"):
            found + torch.zeros(3)


def test_places_of_patches_are_those_that_the_mask_gives(tiny_smolvla):
    """The second image of a size skips the mask: the same numbers and gradients, in training and under bf16."""
    tower = load_policy(tiny_smolvla).vlm.model.vision_model
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    found = []
    for given in (mask, None, None):
        tower.zero_grad()
        out = tower(pixel_values=pictures, patch_attention_mask=given).last_hidden_state
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in tower.parameters())])
    assert len(tower.places) == 1
    assert all(torch.equal(one, other) for later in found[1:] for one, other in zip(found[0], later, strict=True))
    assert "places" not in "".join(tower.state_dict())


def test_augmentation_sends_its_constants_once(monkeypatch):
    pictures = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    augment(pictures, torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("numbers are sent to the device again"))
    augment(pictures, torch.Generator().manual_seed(0))


# Devices.


def test_processors_follow_the_policy(tiny_pi05):
    policy = load_policy(tiny_pi05)
    step = next(s for s in policy.preprocessor.steps if hasattr(s, "tensor_device"))
    assert step.tensor_device == torch.device("cpu")
    policy.to("meta")
    assert step.tensor_device == torch.device("meta") and not step.non_blocking


def test_training_loads_the_policy_onto_its_device(dataset, tmp_path, monkeypatch):
    from burnish.core.recipe import load_recipe
    from burnish.train import setup

    asked = {}

    def load(*_, device="cpu", **__):
        asked["device"] = device
        raise BurnishError("enough")

    monkeypatch.setattr("burnish.policies.load_policy", load)
    recipe = load_recipe(None, ["--policy.path=small", f"--data.root={dataset}", f"--output={tmp_path}"])
    with pytest.raises(BurnishError, match="enough"):
        setup.policy_and_data(recipe, False, "cuda:0")
    assert asked == {"device": "cuda:0"}


def test_a_cpu_run_never_carries_the_name_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    assert "H100" in machine("cuda")["device"] and "H100" in machine()["device"]
    assert machine("cpu")["device"].endswith("no GPU") and "H100" not in machine(torch.device("cpu"))["device"]


def test_a_bench_hides_a_gpu_that_is_not_asked_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("bench.import_module", lambda name: SimpleNamespace(run=lambda args: {"figures": {}}))
    asked = {"output": "", "json": False}
    assert bench.main(SimpleNamespace(name="train", device="cuda", **asked)) == 0
    assert bench.os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    with pytest.raises(BurnishError, match="bench prefer on a GPU"):
        bench.main(SimpleNamespace(name="prefer", device="cuda", **asked))
    assert bench.main(SimpleNamespace(name="train", device="cpu", **asked)) == 0
    assert bench.os.environ["CUDA_VISIBLE_DEVICES"] == ""


# Generators.


def test_random_weights_leave_every_generator_alone(tiny_smolvla, nano_vlm, monkeypatch):
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("the GPU's generator was seeded for good"))
    before = torch.get_rng_state()
    policy = load_policy(tiny_smolvla)
    add_adapters(policy, PeftConfig(method="lora", rank=2))
    assert torch.get_rng_state().equal(before)


def test_seeded_draws_what_manual_seed_draws():
    before = torch.get_rng_state()
    with seeded(5):
        found = torch.rand(3)
    assert found.equal(torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.get_rng_state().equal(before)


# Memory, precision, hashes.


def test_the_peak_is_read_and_set_back(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("read") or 3e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    assert peak_memory(torch.device("cuda")) == {"memory_gb": 3.0} and calls == ["read", "reset"]
    assert peak_memory(torch.device("cpu")) == {}


def test_float32_on_a_gpu_is_told():
    (line,) = precision_note("no", torch.device("cuda"))
    assert "--train.precision=bf16" in line
    assert precision_note("bf16", torch.device("cuda")) == precision_note("no", torch.device("cpu")) == []


def test_a_file_is_hashed_once_until_it_changes(tiny_smolvla, tmp_path, monkeypatch):
    read, plain = [], provenance.hashlib.file_digest
    monkeypatch.setattr(provenance.hashlib, "file_digest", lambda *given: read.append(1) or plain(*given))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(tiny_smolvla) / name).read_bytes())
    first = weights_hash(tmp_path)
    assert weights_hash(tmp_path) == first and len(read) == 1
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(data))
    assert weights_hash(tmp_path) != first and len(read) == 2


# Graphs.


@pytest.fixture
def graphs(monkeypatch):
    """Passes are captured as on a GPU: whoever waits for the device meanwhile is refused."""
    state = SimpleNamespace(capturing=False, captured=0)

    def capture(buffers, work, _pool):
        state.capturing, state.captured, before = True, state.captured + 1, buffers.clone()
        try:
            outcome = work()
        finally:
            state.capturing = False
            buffers.copy_(before)  # what is captured is not run
        return SimpleNamespace(replay=lambda: outcome.copy_(work())), outcome

    plain = profiling.Clock.now

    def now(clock):
        assert not state.capturing, "a synchronisation inside a graph capture"
        return plain(clock)

    monkeypatch.setattr(passes.Passes, "_can_graph", lambda self, device: self.plan.graph is not False)
    monkeypatch.setattr(passes, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(profiling.Clock, "now", now)
    return state


def test_a_profile_looks_into_passes_and_not_into_graphs(tiny_discrete, graphs):
    policy = load_policy(tiny_discrete)
    batches = [observations(policy, 1, seed=seed) for seed in range(2)]
    found = profile(policy, batches, repeats=2, warmup=1, progress=False).figures()
    assert graphs.captured > 0 and found["stages"]["passes"]["median"] > 0 and found["passes"] > 1


def test_a_look_into_a_call_leaves_its_graphs_whole(tiny_discrete, graphs):
    policy = load_policy(tiny_discrete)
    plain = load_policy(tiny_discrete, overrides={"decoder_options": {"graph": False}})
    one, two = (observations(policy, 1, seed=seed) for seed in range(2))
    for batch in (one, two, one):
        assert policy.act(batch).actions.equal(plain.act(batch).actions)
        dissect(policy, two)


def test_losing_plans_of_auto_are_freed(graphs, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "sampling")
    from toy import ToyModel

    from burnish.sampling import autotune

    model, made = ToyModel(length=28, layers=1), []

    class Watched(autotune.BlockDecoder):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(weakref.ref(self))

    monkeypatch.setattr(autotune, "BlockDecoder", Watched)
    decoder = make_decoder("auto", model, repeats=1)
    for seed in (1, 2):
        decoder(model.prompts(1, seed=seed))
    gc.collect()
    alive = [ref() for ref in made if ref() is not None]
    assert len(made) > 3 and len(alive) == len(set(decoder.chosen.values())) == 1


# Policies of real size.


@pytest.mark.parametrize(("name", "billions"), [("smolvla", 0.45), ("pi0", 4.03), ("pi05", 4.14)])
def test_real_sizes_are_real(name, billions):
    policy = make_real(name, device="meta")
    assert sum(p.numel() for p in policy.parameters()) / 1e9 == pytest.approx(billions, rel=0.05)


@pytest.mark.parametrize("name", ["pi0", "openvla-7b"])
def test_tiny_twins_act(name):
    """The others are met in the rehearsal of bench/gpu.py."""
    policy = make_real(name, tiny=True, image_size=32)
    again = make_real(name, tiny=True, image_size=32)
    draws = policy.draw(1, torch.Generator().manual_seed(0))
    found = policy.act(observations(policy, 1), draws).actions
    assert found.shape == (1, policy.chunk_size, 7) and found.isfinite().all()
    assert found.equal(again.act(observations(policy, 1), draws).actions)


def test_an_unknown_size_is_named():
    with pytest.raises(BurnishError, match="'gpt'"):
        make_real("gpt")
    assert {"smolvla", "pi0", "pi05", "openvla-7b", "discrete-3b", "discrete-7b"} <= set(SIZES)


def test_draws_made_on_the_cpu_reach_any_device():
    drawn = Draws(torch.zeros(1, 2, 3), torch.zeros(1)).to("meta")
    assert drawn.noise.device.type == drawn.time.device.type == "meta"


# CUDA graphs.


class NoCopies(TorchDispatchMode):
    """Refuses what a capture refuses: copies between host and device that wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sent = [t for t in args if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.ndim]
        if sent and isinstance(found, torch.Tensor) and found.device.type == "cuda":
            raise RuntimeError(f"{func} copies {tuple(sent[0].shape)} from the host")
        return found


@pytest.mark.parametrize("guided", ["", "identity"])  # a pass backwards wants a device that is there
@pytest.mark.parametrize("tier", ["exact", "fused"])
@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
def test_what_a_graph_captures_copies_and_reads_nothing(kind, tier, guided, tmp_path, monkeypatch):
    policy = load_policy(make_tiny(kind, tmp_path / "p"))
    batch = observations(policy, 2)
    with torch.no_grad():
        inputs, noise = policy.begin(batch)[0], policy.draw(2, torch.Generator().manual_seed(0)).noise
        plain = Sampler(policy.flow_parts(), tier)
        plain(inputs, noise)  # what a first image of a size reads on the host
        guide = policy.guide(Steering(noise[:, 1:], 1, jacobian=guided), noise) if guided else None
        plain.graphs = lambda tensors, *how: (tensors, how)
        tensors, how = plain(inputs, noise, guide=guide)
        with pretended(monkeypatch) as mode:
            moved = list(on_gpu(mode, policy, dict(enumerate(tensors))).values())
            sampler = Sampler(policy.flow_parts(), tier, graph=True)
            want = sampler._work(moved, *how)
            with NoCopies():
                assert sampler._work(moved, *how).shape == want.shape
