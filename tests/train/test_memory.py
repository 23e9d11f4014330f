"""What makes training smaller leaves it what it was, and its peak is predicted."""

import copy
import json
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import fake
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from burnish.cli.main import main
from burnish.core.config import MemoryConfig, RecipeConfig, TrainConfig
from burnish.core.errors import BurnishError
from burnish.core.recipe import load_recipe
from burnish.core.types import Draws
from burnish.policies import load_policy
from burnish.policies.base import recomputing
from burnish.train import checkpoint, cost, optim
from burnish.train.cost import Tokens, empty_batch
from burnish.train.loop import train
from burnish.train.optim import halve_frozen, prepare, state_bytes


def gradients(policy: nn.Module, size: int = 2, precision: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients on pictures and draws of a seed."""
    batch = empty_batch(policy, size)
    draws = torch.Generator().manual_seed(0)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            batch[name] = torch.rand(value.shape, generator=draws)
    policy.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision):
        loss = policy.loss(batch, policy.draw(size, torch.Generator().manual_seed(1))).total
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def policies(tiny_smolvla, tiny_pi05):
    return {path.name: load_policy(path).train() for path in (tiny_smolvla, tiny_pi05)}


@pytest.mark.parametrize("kind", ["smolvla", "pi05"])
def test_recomputed_activations_give_the_same_gradients(policies, kind):
    plain, small = policies[kind], copy.deepcopy(policies[kind])
    small.recompute()
    copied = copy.deepcopy(small)  # runs its own weights, not those it was copied from
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    expected, found = gradients(plain), gradients(small)
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-8, msg=name)
    assert gradients(copied)[0] != expected[0]
    with recomputing(plain):
        pass
    assert gradients(plain)[0] == expected[0] and not any("forward" in vars(module) for module in plain.modules())


class Held:
    """A saved tensor: goes with the part of the graph that holds it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(policy: nn.Module, size: int) -> int:
    """What autograd keeps of a real forward for its backward, parameters aside: told by torch's own hooks."""
    own = {t.untyped_storage().data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    packed: list[weakref.ref[Held]] = []

    def pack(tensor: torch.Tensor) -> Held:
        held = Held(tensor.detach())  # an output would hold its own node, and neither would ever go
        packed.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = policy.loss(empty_batch(policy, size), policy.draw(size, torch.Generator())).total
    kept = {held.tensor.untyped_storage() for held in (ref() for ref in packed) if held is not None}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
    assert loss.requires_grad  # and so the graph is there
    return sum(size for place, size in sizes.items() if place not in own)


@pytest.mark.parametrize("kind", ["smolvla", "pi05"])
def test_activations_are_predicted(request, policies, kind):
    """Fake tensors against torch's hooks on real ones; and less of them is kept where they are computed again."""
    folder = request.getfixturevalue(f"tiny_{kind}")
    recipe = RecipeConfig()
    recipe.policy.path, recipe.data.root, recipe.train.batch_size = str(folder), "absent", 8
    plain = cost.predict(recipe)
    policy = copy.copy(policies[kind])
    policy.preprocessor = Tokens(policy.config)
    assert plain.parts["activations"] == pytest.approx(saved_bytes(policy, 8), rel=0.1)
    own = [p for p in policy.parameters() if p.requires_grad]
    assert plain.parts["gradients"] == sum(4 * p.numel() for p in own)
    assert plain.parts["optimiser"] == sum(8 * p.numel() for p in own) == state_bytes(own, TrainConfig())
    recipe.train.memory.checkpointing = True
    assert cost.predict(recipe).parts["activations"] < 0.6 * plain.parts["activations"]


def test_frozen_matrices_in_bfloat16(policies):
    plain, small = copy.deepcopy(policies["smolvla"]), copy.deepcopy(policies["smolvla"])
    for policy in (plain, small):
        optim.choose_trained(policy, [r"vlm\."], [])
    train = TrainConfig(precision="bf16")
    halve_frozen(small, train)
    types = {p.dtype for p in small.parameters() if p.requires_grad}
    assert types == {torch.float32}
    assert {p.dtype for p in small.parameters() if p.ndim > 1 and not p.requires_grad} == {torch.bfloat16}
    (expected, before), (found, after) = gradients(plain, precision=True), gradients(small, precision=True)
    assert found == pytest.approx(expected, rel=0.02) and after.keys() == before.keys()
    with pytest.raises(BurnishError, match="frozen_dtype is bf16 with train.precision no"):
        halve_frozen(small, TrainConfig())


def test_merging_adapters_onto_bfloat16_rounds_nothing(policies):
    policy, recipe = copy.deepcopy(policies["smolvla"]), RecipeConfig()
    recipe.train.peft.method, recipe.train.precision, recipe.train.memory.frozen_dtype = "lora", "bf16", "bf16"
    prepare(policy, recipe, [])
    layer = next(iter(optim.adapter_layers(policy).values()))
    down, up = (factor["default"].weight.detach() for factor in (layer.lora_A, layer.lora_B))
    before = layer.base_layer.weight.detach()
    up.fill_(0.01)
    place, expected = before.data_ptr(), before.float() + layer.scaling["default"] * up @ down
    with optim.merged(policy):
        torch.testing.assert_close(layer.base_layer.weight.detach(), expected)
    assert layer.base_layer.weight.data_ptr() == place and layer.base_layer.weight.dtype == torch.bfloat16


def optimiser(weights: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    config = TrainConfig(lr=0.01)
    config.memory.optimizer = "adamw8bit"
    return optim.adamw(weights, config)


def steps(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        draws = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=draws)
        optimizer.step()


def test_8_bit_adamw_resumes_bit_for_bit(tmp_path):
    start = {"large": torch.randn(64, 128), "odd": torch.randn(65, 65), "bias": torch.randn(128)}
    whole = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    steps(whole, optimiser(whole), 0, 6)
    first = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    steps(first, one := optimiser(first), 0, 3)
    stored = optim.optimizer_tensors(one, first)
    assert stored["large/exp_avg.codes"].dtype == torch.uint8 and stored["odd/exp_avg"].dtype == torch.float32
    checkpoint._save_tensors(stored, tmp_path / "state.safetensors")
    second = {name: nn.Parameter(value.detach().clone()) for name, value in first.items()}
    other = optimiser(second)
    optim.load_optimizer_tensors(other, second, checkpoint._read_tensors(tmp_path / "state.safetensors"))
    steps(second, other, 3, 6)
    assert all(torch.equal(second[name], whole[name]) for name in start)
    count = sum(t.numel() * t.element_size() for name, t in stored.items() if "large" in name and "step" not in name)
    assert count == state_bytes([whole["large"]], TrainConfig(memory=MemoryConfig(optimizer="adamw8bit")))


def test_8_bit_adamw_is_near_adamw():
    start = {"large": torch.randn(64, 128)}
    small = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    plain = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    steps(small, optimiser(small), 0, 5)
    steps(plain, optim.adamw(plain, TrainConfig(lr=0.01)), 0, 5)
    moved, error = (plain["large"] - start["large"]).norm(), (small["large"] - plain["large"]).norm()
    assert error < 0.05 * moved


def test_damaged_8_bit_state_is_refused():
    weights = {"large": nn.Parameter(torch.randn(64, 128))}
    steps(weights, one := optimiser(weights), 0, 1)
    stored = optim.optimizer_tensors(one, weights)
    for key, value in (("large/exp_avg.qmap", torch.zeros(3)), ("large/exp_avg.scale", torch.zeros(0))):
        with pytest.raises(BurnishError, match="the 8-bit state of 'large' is damaged"):
            optim.load_optimizer_tensors(optimiser(weights), weights, {**stored, key: value})


def test_published_sizes_need_no_files(monkeypatch, tmp_path):
    """SmolVLA-450M, of which nothing is on this machine; and nothing as large is made."""
    monkeypatch.chdir(tmp_path)
    with cost.predicting(load_recipe("real/smolvla_full"), gpu=True) as prediction:
        numbers = sum(p.numel() for p in prediction.policy.parameters())
        assert 4.4e8 < numbers < 5.1e8 and 4 * numbers < prediction.counted.now < 4.1 * numbers
        assert "2 cameras" in prediction.assumed[0] and not list(Path().iterdir())


def test_batches_in_pieces_train_the_same(dataset, tmp_path, monkeypatch):
    """Micro-batches hold the very frames of the batch, and their gradients are averaged: the weights come out alike."""
    fake.register(monkeypatch.setattr)
    monkeypatch.setattr(fake.FakePolicy, "draw", lambda self, size, generator: Draws(
        torch.zeros(size, 4, 3), torch.full((size,), 0.5)))  # fmt: skip
    more = ["--train.batch_size=6", "--train.steps=3", "--data.augment=false", "--train.self_check=false"]
    weights = {}
    for count in (1, 3):
        recipe = cost.in_pieces(fake.recipe(dataset, tmp_path / str(count), *more), count)
        assert recipe.train.batch_size * recipe.train.grad_accumulation == 6
        with monkeypatch.context() as patch:
            patch.setattr(nn.Dropout, "forward", lambda self, x: x)
            done = train(recipe, progress=False)
        weights[count] = load_file(done.policy / "model.safetensors")
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[3][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_run_fits_itself_and_goes_on_in_the_same_pieces(dataset, tmp_path, monkeypatch):
    fake.register(monkeypatch.setattr)
    monkeypatch.setattr(cost, "pieces", lambda recipe, limit, gpu: 5 if limit == 2e9 else None)
    more = ["--train.steps=4", "--train.memory.fit_gb=2"]
    train(fake.recipe(dataset, tmp_path / "run", *more, "--train.max_minutes=0.0001"), progress=False)
    stored = load_recipe(tmp_path / "run" / "recipe.yaml").train
    assert (stored.batch_size, stored.grad_accumulation) == (1, 5)
    assert train(fake.recipe(dataset, tmp_path / "run", *more), progress=False).steps == 4
    with pytest.raises(BurnishError, match="fit_gb is 1, and even a step of single samples"):
        train(fake.recipe(dataset, tmp_path / "other", "--train.memory.fit_gb=1"), progress=False)


def test_pieces_are_as_few_as_fit(monkeypatch):
    sizes = {8: 10, 4: 6, 2: 4, 1: 3}
    made = SimpleNamespace(cost=lambda size: SimpleNamespace(peak=sizes[size]))
    monkeypatch.setattr(cost, "predicting", lambda *_: nullcontext(made))
    recipe = RecipeConfig(train=TrainConfig(batch_size=8))
    assert [cost.pieces(recipe, limit, True) for limit in (10, 9, 5, 3, 2)] == [1, 2, 4, 8, None]


def test_advice_is_of_overrides_and_ends_where_it_fits(monkeypatch):
    taken = {"bf16": 1, "checkpointing": 2, "adamw8bit": 4}

    def predict(recipe, gpu):
        memory = recipe.train.memory
        on = [recipe.train.precision, "checkpointing" if memory.checkpointing else "", memory.optimizer]
        return cost.Cost({"weights": 10 - sum(taken.get(word, 0) for word in on)}, 1, 1, recipe.train.batch_size)

    monkeypatch.setattr(cost, "predict", predict)
    for limit, count in ((9, 1), (7, 2), (3, 3)):
        ways = list(cost.advise(RecipeConfig(), limit, True))
        assert len(ways) == count and ways[-1][1].peak <= limit
    train = load_recipe(None, ways[-1][0]).train
    assert (train.precision, train.memory.checkpointing, train.memory.optimizer) == ("bf16", True, "adamw8bit")
    monkeypatch.setattr(cost, "pieces", lambda *_: 8)
    *_, (words, _), (more, _) = cost.advise(RecipeConfig(), 1, True)
    assert words[-2:] == ["--train.batch_size=4", "--train.grad_accumulation=8"]
    assert more[-1] == "--train.peft.method=lora" and load_recipe(None, more)


def test_method_cost_on_the_command_line(tiny_smolvla, capsys):
    words = ["method", "cost", "real/smolvla_full", f"--policy.path={tiny_smolvla}", "--data.root=absent"]
    assert main([*words, "--gpu", "24"]) == 0
    out = capsys.readouterr().out
    assert "no data set at absent" in out and "weights" in out and "peak" in out and "of 24" in out
    assert main([*words, "--json", "--train.batch_size=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gb"] == pytest.approx(sum(found["parts"].values())) and found["ways"] == []
    assert main(["method", "cost", "real/smolvla_full", "--policy.path=absent", "--policy.type=nothing"]) == 2
    assert "policy type 'nothing'" in capsys.readouterr().err


def test_a_method_that_reads_the_moments_wants_them_whole(tiny_smolvla):
    recipe = RecipeConfig(objectives=[{"name": "isolate", "method": "self_anchor"}])
    recipe.policy.path, recipe.data.root, recipe.train.memory.optimizer = str(tiny_smolvla), "absent", "adamw8bit"
    with pytest.raises(BurnishError, match="is adamw8bit with Isolate, which reads the moments"):
        cost.predict(recipe)
    recipe.train.memory.optimizer = "adamw"
    assert cost.predict(recipe).parts["method"] > 0


def test_pairs_keep_their_number_where_a_batch_is_taken_in_pieces(tiny_smolvla, monkeypatch):
    recipe = RecipeConfig(objectives=[{"name": "prefer", "pairs": "absent", "batch_size": 6}])
    recipe.policy.path, recipe.data.root, recipe.train.batch_size = str(tiny_smolvla), "absent", 8
    asked = []
    with cost.predicting(recipe) as prediction:
        monkeypatch.setattr(prediction, "_step", lambda samples: (asked.append(samples), (0, 0))[1])
        prediction.cost(8)
        prediction.cost(2)
    assert asked == [8 + 6, 2 + 6]


def test_a_teacher_of_few_steps_is_counted(tiny_smolvla):
    recipe = RecipeConfig(objectives=[{"name": "few_steps"}])
    recipe.policy.path, recipe.data.root = str(tiny_smolvla), "absent"
    taught, recipe.objectives = cost.predict(recipe), []
    parts = taught.parts
    assert parts["method"] == parts["gradients"] and parts["activations"] > cost.predict(recipe).parts["activations"]
