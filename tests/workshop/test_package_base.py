"""A base is packaged into a checkout, whole or not at all, and never into an installed package."""

import json
from pathlib import Path

import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from workshop import package_base as packaging
from workshop.__main__ import COMMANDS, main


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "src/burnish/assets").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    return root


def test_it_is_the_policy_in_half_precision_with_its_facts(checkout, tiny_smolvla):
    folder = packaging.package_base(tiny_smolvla, "mine", {"success": 0.5}, checkout)
    assert folder == checkout / "src/burnish/assets/mine"
    assert json.loads((folder / "base.json").read_text()) == {"success": 0.5}
    assert str(checkout) not in (folder / "config.json").read_text()
    given, packaged = load_policy(tiny_smolvla).state_dict(), load_policy(folder).state_dict()
    assert given.keys() == packaged.keys()
    for name, tensor in packaged.items():
        torch.testing.assert_close(tensor.float(), given[name].half().float(), atol=0, rtol=0)


def test_one_that_is_too_large_leaves_the_earlier_one(checkout, tiny_smolvla, monkeypatch):
    folder = packaging.package_base(tiny_smolvla, "mine", {"first": True}, checkout)
    monkeypatch.setattr(packaging, "LIMIT_MB", 0.01)
    with pytest.raises(BurnishError, match="MB in half precision; expected at most 0.01 MB"):
        packaging.package_base(tiny_smolvla, "mine", {"first": False}, checkout)
    assert json.loads((folder / "base.json").read_text()) == {"first": True}
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_outside_a_checkout_it_is_refused(tmp_path, tiny_smolvla):
    with pytest.raises(BurnishError, match="is no checkout of burnish"):
        packaging.package_base(tiny_smolvla, "mine", checkout=tmp_path)
    assert Path(__file__).parents[2] == packaging.CHECKOUT


def test_a_name_is_a_name(checkout, tiny_smolvla):
    with pytest.raises(BurnishError, match=r"name '\.\./mine'"):
        packaging.package_base(tiny_smolvla, "../mine", checkout=checkout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0 and f"python -m workshop {name} " in capsys.readouterr().out


def test_a_refusal_is_one_line(capsys):
    assert main(["teacher", "nowhere.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("workshop teacher: ") and said.count("\n") == 1
