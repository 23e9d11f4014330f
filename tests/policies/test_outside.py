"""A policy and a decoder of a package from outside, by one entry point each; a policy without a language model."""

import json
import re
import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature

from burnish.core import registry
from burnish.core.errors import BurnishError
from burnish.core.types import Draws
from burnish.policies import folder as folders
from burnish.policies import load_policy
from burnish.policies.base import CAPABILITIES, lacks, require
from burnish.policies.load import POLICIES
from burnish.policies.pipelines import new_processors
from burnish.sampling.token_model import DECODERS, make_decoder
from workshop.tiny import default_statistics, make_tiny

PAGE = Path(__file__).parents[2] / "docs/add_a_policy.md"
ACT = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "class Act" in block)
DECODER = """
from burnish.sampling.blocks import BlockDecoder
from burnish.sampling.plan import make_plan


def halves(model, **options):
    return BlockDecoder(model, make_plan({"block": model.length, "share": 2, "min_unmasked": "ceil"}, options))
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """As if a package with these two entry points were installed."""
    (tmp_path / "outside_act.py").write_text(ACT)
    (tmp_path / "outside_decoder.py").write_text(DECODER)
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("act", "outside_act:Act", "burnish.policies"),
        EntryPoint("halves", "outside_decoder:halves", "burnish.decoders"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    yield
    for registered, name in ((POLICIES, "act"), (DECODERS, "halves")):
        registered._entries.pop(name, None)
    for name in ("outside_act", "outside_decoder"):
        sys.modules.pop(name, None)


@pytest.fixture
def act(installed, tmp_path):
    """A tiny ACT policy, loaded from a folder as LeRobot writes it."""
    features = {
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        "observation.state": PolicyFeature(FeatureType.STATE, (5,)),
        "action": PolicyFeature(FeatureType.ACTION, (4,)),
    }
    raw = {
        "type": "act", "chunk_size": 6, "n_action_steps": 6, "use_vae": False, "dim_model": 32, "n_heads": 2,
        "dim_feedforward": 32, "n_encoder_layers": 1, "n_decoder_layers": 1, "pretrained_backbone_weights": None,
    }  # fmt: skip
    config = folders.decode_config(raw, "the test", features, "cpu")
    policy = POLICIES.get("act")(folders.build(config, 0), *new_processors(config, default_statistics(5, 4)))
    policy.save(tmp_path / "policy")
    return load_policy(tmp_path / "policy")


def test_a_policy_of_another_package_loads_trains_and_acts(act):
    batch = {
        "observation.images.top": torch.rand(2, 3, 32, 32), "observation.state": torch.randn(2, 5),
        "action": torch.randn(2, 6, 4), "action_is_pad": torch.zeros(2, 6, dtype=torch.bool), "task": ["open", "push"],
    }  # fmt: skip
    assert "act" in POLICIES and list(POLICIES).count("act") == 1
    assert act.name == "act" and act.cameras == ("top",) and act.normalization("ACTION") == "MEAN_STD"
    act.loss(batch).total.backward()
    assert act.act(batch).actions.shape == (2, 6, 4)


def test_a_policy_without_a_language_model_says_so(act):
    assert not any(act.supports(name) for name in CAPABILITIES) and not list(act.backbone_parameters())
    draws = Draws(torch.zeros(1, 1), torch.ones(1))
    asked = {
        "language": lambda: act.language({}), "answer": lambda: act.answer({}), "capture": lambda: act.capture([0]),
        "score": lambda: act.score({}, torch.zeros(1), draws), "velocity": lambda: act.velocity({}, draws, draws),
        "token_model": act.token_model, "watch_tokens": act.watch_tokens,
    }  # fmt: skip
    for verb, ask in asked.items():
        with pytest.raises(BurnishError, match=f"{verb}: a policy of type act has no "):
            ask()
    with pytest.raises(
        BurnishError, match="distill: a policy of type act has no masked tokens; expected a burnish_discrete"
    ):
        require(act, "masked_diffusion", "distill")
    assert "has no capability 'gripper'" in str(lacks(act, "gripper", "mine"))


def test_a_decoder_of_another_package_runs_by_name_in_a_config(installed, tmp_path):
    folder = make_tiny("burnish_discrete", tmp_path / "p", overrides={"decoder": "halves", "decoder_options": {
        "threshold": 1.01}})  # fmt: skip
    policy = load_policy(folder)
    assert policy.decoder == ("halves", {"threshold": 1.01}) and "halves" in list(DECODERS)
    batch = {"observation.images.top": torch.rand(1, 3, 32, 32), "observation.state": torch.randn(1, 7), "task": ["a"]}
    assert policy.act(batch).actions.shape == (1, 8, 7)
    model = policy.token_model()
    decoded = make_decoder("halves", model, threshold=1.01)(model.embed(batch))
    assert decoded.passes == 6, "56 tokens, half of them in each pass, the odd one included"


def test_a_folder_with_the_old_name_of_a_field_loads(tmp_path, caplog):
    """Policies stored before have open_prompt where prompt_sees_actions is now."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    from burnish.core import renames

    folder = make_tiny("burnish_discrete", tmp_path / "p", overrides={"prompt_sees_actions": True})
    stored = json.loads((folder / "config.json").read_text())
    assert stored.pop("prompt_sees_actions") is True and stored.pop("open_prompt") is None
    (folder / "config.json").write_text(json.dumps({**stored, "open_prompt": True}))
    renames._told.clear()
    policy = load_policy(folder)
    assert policy.token_model().prompt_sees_actions and policy.decoder[0] == "confidence"
    assert "open_prompt is now called prompt_sees_actions" in caplog.text
    changed = load_policy(folder, overrides={"prompt_sees_actions": False, "block_size": 7})
    assert not changed.token_model().prompt_sees_actions
    assert load_policy(tmp_path / "p", overrides={"open_prompt": False}).decoder[0] == "confidence"
    config = PreTrainedConfig.from_pretrained(folder)
    assert config.prompt_sees_actions is True and config.open_prompt is None
    assert get_policy_class("burnish_discrete").from_pretrained(folder).config.prompt_sees_actions is True
    policy.save(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["prompt_sees_actions"] is True
    renames._told.clear()
    caplog.clear()
    load_policy(shutil.move(tmp_path / "again", tmp_path / "moved"))
    assert "open_prompt" not in caplog.text
