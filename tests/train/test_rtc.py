"""Training with delays through a recipe: what is written, and who refuses it."""

import fake
import pytest

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.train.loop import train
from workshop.tiny import make_tiny


def test_trained_folder_remembers_its_delay(dataset, tiny_smolvla, tmp_path):
    recipe = fake.recipe(dataset, tmp_path / "run", f"--policy.path={tiny_smolvla}", "--policy.type=smolvla",
                         "--train.steps=1", "--train.rtc_training_max_delay=3")  # fmt: skip
    found = train(recipe, progress=False)
    assert load_policy(found.policy).rtc_training_max_delay == 3
    recipe.policy.path, recipe.output = str(found.policy), str(tmp_path / "plain")
    recipe.train.rtc_training_max_delay = 0
    assert (
        load_policy(train(recipe, progress=False).policy).rtc_training_max_delay == 0
    )  # trained on without: forgotten


def test_statistics_of_the_policy_it_starts_from(dataset, tmp_path):
    folder, name = tmp_path / "p", "policy_preprocessor_step_5_normalizer_processor.safetensors"
    make_tiny("smolvla", folder, cameras=("top", "wrist"), state_dim=4, action_dim=3)
    recipe = fake.recipe(dataset, tmp_path / "own", f"--policy.path={folder}", "--train.steps=1")
    assert (train(recipe, progress=False).policy / name).read_bytes() != (folder / name).read_bytes()
    recipe.output, recipe.data.statistics = str(tmp_path / "as_it_came"), "policy"
    assert (train(recipe, progress=False).policy / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(("most", "said"), [(8, "8 with chunks of 8 steps"), (-1, "at least 0")])
def test_refused_delays(dataset, tiny_smolvla, tmp_path, most, said):
    with pytest.raises(BurnishError, match=said):
        train(fake.recipe(dataset, tmp_path / "run", f"--policy.path={tiny_smolvla}",
                          f"--train.rtc_training_max_delay={most}"), progress=False)  # fmt: skip


def test_only_policies_that_can_go_on_from_a_chunk(dataset, tmp_path, monkeypatch):
    fake.register(monkeypatch.setattr)
    with pytest.raises(BurnishError, match="no way to go on from an old chunk"):
        train(fake.recipe(dataset, tmp_path / "run", "--train.rtc_training_max_delay=2"), progress=False)
