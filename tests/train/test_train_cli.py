import fake
import pytest
import yaml

from burnish.cli.main import main
from burnish.core.recipe import load_recipe, recipe_to_dict
from burnish.data.dataset import open_dataset
from burnish.policies import load_policy
from burnish.train.setup import dataset_features


@pytest.fixture
def recipe_file(dataset, tmp_path, monkeypatch):
    fake.register(monkeypatch.setattr)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(fake.recipe(dataset, tmp_path / "run"))))
    return path


def test_train_prints_where_things_are(recipe_file, tmp_path, capsys):
    assert main(["train", "--config", str(recipe_file), "--train.steps=3", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "run/policy") in out and "steps: 3" in out
    assert main(["train", "--config", str(recipe_file), "--train.steps", "4", "--quiet", "--fresh"]) == 0
    assert "steps: 4" in capsys.readouterr().out


def test_a_policy_gets_cameras_in_the_order_that_the_recipe_names(tiny_smolvla, tmp_path):
    root = fake.make_dataset(tmp_path / "data", cameras=("top", "side", "wrist"), action_dim=7)
    for named, expected in ((["wrist", "top"], ["wrist", "top"]), ([], ["top", "side", "wrist"])):
        recipe = load_recipe(None, [f"--data.root={root}", f"--data.cameras=[{', '.join(named)}]"])
        features, _ = dataset_features(recipe)
        policy = load_policy(tiny_smolvla, features=features, dataset_stats=open_dataset(root).stats)
        assert list(policy.cameras) == expected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--train.stepz=3"], "unknown key 'train.stepz'"),
        (["--data.root=nowhere"], "no data set at nowhere"),
        (["--data.cameras=[side]"], "data.cameras names 'side'"),
        (["--train.freeze=[vision]"], "'vision' matches no parameter"),
        (["--train.precision=fp16"], "there is no GPU"),
        (["--train.trackers=[trackio]"], "tracker 'trackio' is not installed"),
        (["--train.trackers=[nothing]"], "nothing"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(recipe_file, tmp_path, capsys, more, words):
    assert main(["train", "--config", str(recipe_file), "--quiet", *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("burnish train:")]
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "run").exists()
