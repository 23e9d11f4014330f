"""Options that no decoder may take, and numbers that no decoder can read: one clear line, never a hang."""

import math

import pytest
import torch
from toy import ToyModel

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.policies.discrete.tokenizers import Bins
from burnish.sampling.token_model import Prompt, make_decoder
from workshop.tiny import make_tiny

CAUSAL = {"block": 1, "shift": True}
MODELS = {"autoregressive": CAUSAL, "fast_dllm": {}, "pipelined": {}, "together": {}, "sequential": {}, "auto": {}}
MORE = {"d2f": {}, "confidence": {"block": 56}, "dd_vla": {"block": 56}, "one_pass": {"block": 56}}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [
    {"legal": []}, {"legal": [-1]}, {"legal": [99]}, {"legal": 5}, {"threshold": -5}, {"threshold": None},
    {"threshold": "abc"}, {"threshold": math.nan}, {"add": None}, {"min_unmasked": "bogus"}, {"cache": "nope"},
    {"block": -7}, {"width": 1.5}, {"steps": 2.5}, {"preset": [1]},
], ids=str)  # fmt: skip
def test_options_that_cannot_be(name, options):
    if name == "auto" and "block" in options:
        return  # its own affair
    with pytest.raises(BurnishError):
        make_decoder(name, ToyModel(**MODELS[name]), **options)


@pytest.mark.parametrize("name", MODELS | MORE)
def test_numbers_that_are_none_end_a_decode(name):
    model = ToyModel(**(MODELS | MORE)[name])
    prompt = model.prompts(2)
    decode = make_decoder(name, model)
    expected = decode(prompt).ids
    broken = Prompt(prompt.states.clone(), prompt.valid)
    broken.states[1] = math.nan
    with pytest.raises(BurnishError, match="not finite"):
        make_decoder(name, model)(broken)
    assert torch.equal(decode(prompt).ids, expected)


@pytest.mark.parametrize("name", MODELS | MORE)
def test_a_decoder_serves_with_and_without_inference_mode(name):
    """LeRobot's evaluation calls inside it; nothing outside may write into tensors that were made there."""
    model = ToyModel(**(MODELS | MORE)[name])
    decode, prompt = make_decoder(name, model), model.prompts(2)
    with torch.inference_mode():
        expected = decode(prompt).ids
    assert torch.equal(decode(prompt).ids, expected)
    with torch.inference_mode():
        assert torch.equal(decode(prompt).ids, expected)


def test_fast_dllm_follows_its_schedule():
    """Three passes for each of the eight blocks, however sure the model is."""
    model = ToyModel()
    assert make_decoder("fast_dllm", model, min_unmasked="cosine", steps=3)(model.prompts(1)).passes == 24


def test_one_pass_needs_no_more_than_mask():
    model = ToyModel(block=56, prompt_sees_actions=True)
    assert make_decoder("one_pass", model)(model.prompts(1)).passes == 1


@pytest.mark.parametrize("overrides", [
    {"block_size": -7, "training": "parallel"}, {"prompt_sees_actions": True, "block_size": 7},
    {"prompt_sees_actions": True, "training": "autoregressive"},
])  # fmt: skip
def test_attention_that_cannot_be(tmp_path, overrides):
    with pytest.raises((BurnishError, ValueError), match="block_size|prompt_sees_actions"):
        make_tiny("burnish_discrete", tmp_path / "p", overrides=overrides)


def test_quantile_bins_of_an_action_that_often_has_one_value():
    """99.5 % zeros: nearly all edges are 0, and 0 must come back as 0."""
    bins = Bins(2, 1, 16)
    rare = {"min": -1.0, "q01": 0.0, "q10": 0.0, "q50": 0.0, "q90": 0.0, "q99": 0.0, "max": 1.0}
    mostly = {"min": -1.0, "q01": -1.0, "q10": -0.5, "q50": 0.0, "q90": 0.0, "q99": 1.0, "max": 1.0}
    bins.fit_quantiles({k: [rare[k], mostly[k]] for k in rare}, ("min", "max"))
    there = torch.tensor([[[0.0, 0.0]], [[-1.0, -1.0]], [[1.0, 1.0]]])
    back = bins.decode(bins.encode(there))
    assert back[0].abs().max() == 0 and (back[1] < 0).all() and (back[2] > 0).all()


@pytest.mark.parametrize("line", [
    ["--count", "0"], ["--repeats", "0"], ["--option", "threshold=["], ["--option", "threshold="],
    ["--decoder", "together", "--option", "preset=paper"],
], ids=" ".join)  # fmt: skip
def test_commands_with_odd_arguments(tmp_path, line, capsys):
    folder = make_tiny("burnish_discrete", tmp_path / "p", overrides={"block_size": 7})
    assert main(["policy", "decode", str(folder), *line]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_streamed_prefix_is_the_prefix(tmp_path):
    policy = load_policy(make_tiny("burnish_discrete", tmp_path / "p", overrides={"block_size": 7, "bins": 4}))
    draws = torch.Generator().manual_seed(0)
    size, state = policy.image_size, policy.config.robot_state_feature.shape[0]
    batch = {f"observation.images.{c}": torch.rand(1, 3, size, size, generator=draws) for c in policy.cameras}
    batch |= {"observation.state": torch.randn(1, state, generator=draws), "task": ["lift"]}
    prefix, told = 0.3 * torch.randn(1, 2, policy.action_dim, generator=draws), []
    chunk = policy.act(batch, prefix=prefix, stream=lambda steps, actions: told.append((steps, actions))).actions
    assert told and told[-1][0] == policy.chunk_size
    for steps, actions in told:
        assert torch.equal(actions, chunk[:, :steps]) and torch.equal(actions[:, :2], prefix)
