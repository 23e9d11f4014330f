"""Commands on folders of every LeRobot type: eval, profile, extract, compare, and a new policy by its type."""

import importlib.util
import json

import fake
import pytest
import torch

from burnish.cli.main import main
from burnish.core.recipe import load_recipe
from burnish.envs.base import make_env
from burnish.policies import load_policy
from burnish.train.loop import train
from workshop.tiny import make_tiny

diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
KINDS = ["act", pytest.param("diffusion", marks=diffusers), "vqbet", "pi0_fast"]


@pytest.mark.parametrize("kind", KINDS)
def test_measure_profile_and_extract(kind, tmp_path, capsys):
    camera = make_env("tabletop:reach", 8).spec.cameras[0]
    places = [
        make_tiny(kind, tmp_path / name, cameras=[camera], state_dim=4, action_dim=4, image_size=64, seed=seed)
        for seed, name in enumerate(("base", "tuned"))
    ]
    for place in places:
        assert not main(["eval", str(place), "tabletop:reach", "--episodes", "2", "--max-steps", "6", "--workers", "1",
                         "--no-video", "--output", f"{place}-eval"])  # fmt: skip
    assert not main(["compare", *(f"{place}-eval" for place in places)])
    assert not main(["policy", "profile", str(places[0]), "--repeats", "1", "--warmup", "0", "--json"])
    out = capsys.readouterr().out
    figures = json.loads(out[out.rindex('{\n "policy"') :])
    assert figures["type"] == kind and figures["total"]["median"] > 0 and 0.9 < figures["stages_over_total"] <= 1.01
    assert not main(["weights", "extract", *map(str, places), "-o", str(tmp_path / "delta")])
    assert (tmp_path / "delta").is_dir()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fake.make_dataset(tmp_path_factory.mktemp("data") / "fake", cameras=("top",), action_dim=3)


def run(data, output, *more):
    recipe = load_recipe(None, [
        f"--data.root={data}", f"--output={output}", "--train.steps=3", "--train.batch_size=2", "--train.log_every=1",
        "--train.save_every=2", "--train.warmup_steps=0", "--train.lr=1e-3", "--data.workers=1", *more,
    ])  # fmt: skip
    return train(recipe, progress=False)


SMALL = (
    "{dim_model: 32, n_heads: 2, dim_feedforward: 32, n_encoder_layers: 2, n_vae_encoder_layers: 1, chunk_size: 8, "
    "n_action_steps: 4}"
)


def test_a_new_policy_by_its_type_alone(data, tmp_path, wide_resnet):
    made = run(data, tmp_path / "run", "--policy.type=act", f"--policy.overrides={SMALL}")
    policy = load_policy(made.policy)
    assert policy.cameras == ("top",) and policy.chunk_size == 8 and made.steps == 3
    rows = [json.loads(line) for line in made.metrics.read_text().splitlines()]
    assert {"loss_policy", "loss_policy_kld_loss"} <= rows[-1].keys(), rows[-1].keys()


def test_lora_on_act_leaves_out_what_is_not_called(data, tmp_path):
    base = make_tiny("act", tmp_path / "base", state_dim=4, action_dim=3)
    made = run(data, tmp_path / "run", f"--policy.path={base}", "--train.peft.method=lora", "--train.peft.rank=2")
    names = json.loads((made.output / "adapter/adapter_config.json").read_text())["target_modules"]
    assert any("linear1" in name for name in names) and not any("out_proj" in name for name in names)
    before, after = (load_policy(place).state_dict() for place in (base, made.policy))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("encoder.layers.0.linear1" in name for name in moved)
    assert not any(".self_attn." in name or "backbone" in name for name in moved)
