"""A package from outside brings one of everything that plugs in: it is found by name, and it runs.

`sample_package` is not installed; its folder on the path, with the entry points beside it, is all that an installation
would add. The processes that simulators run in get the same path.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SAMPLE = Path(__file__).parent / "sample_package"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLE))


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    from burnish.data.demos import make_demos

    sys.path.insert(0, str(SAMPLE))
    try:
        root = tmp_path_factory.mktemp("sample") / "demos"
        make_demos("sample_point:go", 4, root, image_size=32, workers=1)
    finally:
        sys.path.remove(str(SAMPLE))
    return root


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory, demonstrations):
    """A folder of type sample_linear with random weights, as LeRobot writes it."""
    sys.path.insert(0, str(SAMPLE))
    try:
        from lerobot.configs.types import FeatureType
        from lerobot.policies.factory import make_policy_config
        from lerobot.utils.feature_utils import dataset_to_policy_features
        from sample_package.policy import Linear

        from burnish.data.dataset import open_dataset
        from burnish.policies.pipelines import new_processors

        meta = open_dataset(demonstrations)
        features = dataset_to_policy_features(meta.features)
        config = make_policy_config("sample_linear", device="cpu")
        config.output_features = {k: f for k, f in features.items() if f.type is FeatureType.ACTION}
        config.input_features = {k: f for k, f in features.items() if f.type is not FeatureType.ACTION}
        folder = tmp_path_factory.mktemp("sample") / "policy"
        Linear(Linear.build(config, 0), *new_processors(config, meta.stats)).save(folder)
    finally:
        sys.path.remove(str(SAMPLE))
    return folder


def test_environment(demonstrations):
    from burnish import expand
    from burnish.evaluate.rollout import evaluate_expert

    assert expand("sample_point") == ["sample_point:go"]
    found = evaluate_expert("sample_point:go", episodes=3, output=demonstrations.parent / "eval", workers=1)
    assert found.overall.successes == 3


def test_policy_and_objective_train_and_act(demonstrations, policy_folder, tmp_path):
    from burnish import evaluate, load_policy, load_recipe, train

    assert not load_policy(policy_folder).supports("language")
    recipe = load_recipe(None, [
        f"--policy.path={policy_folder}", f"--data.root={demonstrations}", f"--output={tmp_path / 'run'}",
        "--train.steps=3", "--train.batch_size=4", "--data.augment=false",
        "--objectives=[{name: sample_decay, weight: 0.01}]",
    ])  # fmt: skip
    result = train(recipe, progress=False)
    assert result.final["loss_sample_decay"] > 0
    found = evaluate(str(result.policy), "sample_point:go", episodes=2, output=tmp_path / "eval", workers=1)
    assert found.overall.n == 2


def test_a_policy_without_language_says_so(policy_folder):
    from burnish import load_policy
    from burnish.core.errors import BurnishError

    with pytest.raises(BurnishError, match="sample_linear"):
        load_policy(policy_folder).language({})


def test_teacher():
    from burnish.teachers.base import Views, make_teacher, run_teacher

    teacher = make_teacher({"name": "sample_colour"}, (2, 2))
    views = Views(torch.ones(1, 1, 3, 8, 8), torch.ones(1, 1, dtype=torch.bool), ("top",))
    assert torch.equal(run_teacher(teacher, views, [0])[0], torch.ones(1, 1, 2, 2, 3))


def test_sampler():
    from burnish.sampling.solvers import make_solver

    found = make_solver("sample_ahead:2")(lambda x, t: torch.full_like(x, t), torch.ones(1, 1, 1))
    assert found.item() == 1 - (0.875 + 0.375) / 2


def test_decoder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "sampling"))
    from toy import ToyModel

    from burnish.sampling.token_model import make_decoder

    model = ToyModel(block=56)
    decoder = make_decoder("sample_argmax", model)
    reference = make_decoder("one_pass", model)
    prompt = model.prompts(2)
    assert torch.equal(decoder(prompt).ids, reference(prompt).ids)


def test_merge_operator(tmp_path):
    from safetensors.numpy import load_file, save_file

    from burnish.weights.merge import merge

    base, tuned = np.zeros(4, np.float32), np.ones(4, np.float32)
    for name, tensor in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    merge(tmp_path / "base", output=tmp_path / "merged", tuned=[(tmp_path / "tuned", 1.0)], operator="sample_half")
    assert np.array_equal(load_file(tmp_path / "merged" / "model.safetensors")["w"], np.full(4, 0.5, np.float32))


@pytest.mark.parametrize("name", ["os:system", "shutil:rmtree"])
def test_what_a_folder_names_is_never_imported(name):
    """Types and decoders stand in a policy's config.json; only recipes may name a class by its path."""
    from burnish.core.errors import BurnishError
    from burnish.policies.load import POLICIES
    from burnish.sampling.token_model import DECODERS
    from burnish.weights.operators import OPERATORS

    for registry in (POLICIES, DECODERS, OPERATORS):
        assert name not in registry
        with pytest.raises(BurnishError, match=f"unknown .* '{name}'"):
            registry.get(name)


def test_a_broken_entry_point_is_one_line(tmp_path, monkeypatch):
    from burnish.core.errors import BurnishError
    from burnish.methods.objective import OBJECTIVES

    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[burnish.objectives]\nbroken = no_such_module:X\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BurnishError, match="objective 'broken' of broken cannot be imported"):
        OBJECTIVES.get("broken")


def test_unknown_names_list_what_there_is():
    from burnish.core.errors import BurnishError
    from burnish.methods.objective import OBJECTIVES

    with pytest.raises(BurnishError, match="align, capability, distill, few_steps, isolate, prefer, .*sample_decay"):
        OBJECTIVES.get("nonsense")
