"""Anchors: what goes in, what is refused, and that they survive a file (U3, U4, U8)."""

import json

import numpy as np
import pytest
import torch
from fake import make_questions

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.methods.inputs import forward, question_batches, token_groups
from burnish.methods.isolate import anchor as distances
from burnish.methods.isolate.anchor import Anchor, Provenance, build
from burnish.policies import load_policy
from burnish.policies.vqa import PROMPT


@pytest.fixture(scope="module")
def policy(tiny_smolvla):
    return load_policy(tiny_smolvla).float()


def about(policy, **more):
    return Provenance("abc", policy.num_layers, 0, "fake", 0, template=PROMPT, **more)


def numpy_rows(policy, questions, layer, group, answers):
    """The same states one question at a time (no padding), picked by hand from the layout of a sequence."""
    rows = []
    with torch.no_grad():
        for batch in question_batches(questions, 40, 1, 0, "cpu"):
            captured, is_answer = forward(policy, batch, [layer])
            image = captured.layout["image"][0].numpy()
            keep = image if group == "image" else ~image if answers else ~image & ~is_answer[0].numpy()
            rows.append(captured.hidden[layer][0].double().numpy()[keep])
    return np.concatenate(rows)


@pytest.mark.parametrize(("group", "answers"), [("image", False), ("text", False), ("text", True)])
def test_statistics_equal_numpy_over_single_questions(policy, questions, group, answers):
    policy.eval()
    anchor = build(policy, question_batches(questions, 40, 8, 0, "cpu"), about(policy, answers=answers))
    expected = numpy_rows(policy, questions, 1, group, answers)
    moments = anchor.moments[1, group]
    assert anchor.about.samples == 40 and anchor.about.width == 48 and int(moments.count) == len(expected)
    np.testing.assert_allclose(moments.mean.numpy(), expected.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.variance.numpy(), expected.var(0), rtol=1e-3, atol=1e-6)


def test_zero_on_its_own_data_and_the_robot_is_further_than_fresh_questions(policy, questions, tmp_path):
    """U3: the penalty vanishes on the anchor's own set only; other pictures of the same kind come next, then others."""
    policy.eval()
    (whole,) = question_batches(questions, 40, 40, 0, "cpu")
    anchor = build(policy, [whole], about(policy, tokens="pooled"))
    fresh = list(question_batches(make_questions(tmp_path / "fresh", 40, seed=9), 40, 40, 0, "cpu"))

    def distance(batch):
        captured, answers = forward(policy, batch, range(policy.num_layers))
        mask = token_groups(captured, "pooled", answers)["tokens"]
        each = [
            distances.w2_diagonal(h[mask].double(), m.mean, m.variance)
            for (layer, _), m in anchor.moments.items()
            for h in [captured.hidden[layer]]
        ]
        return float(sum(each))

    robot = {
        **{f"observation.images.{c}": torch.zeros(4, 3, 32, 32) for c in policy.cameras}, "task": ["open"] * 4,
        "observation.state": torch.zeros(4, 7), "action": torch.zeros(4, 8, 7),
    }  # fmt: skip
    own, other = distance(whole), distance(fresh[0])
    assert own < 1e-6 < other < distance(robot)


def test_robot_rows_leave_out_state_and_padding(policy):
    batch = {
        **{f"observation.images.{c}": torch.rand(2, 3, 32, 32) for c in policy.cameras},
        "task": ["open", "put the green ball on the plate"], "observation.state": torch.zeros(2, 7),
        "action": torch.zeros(2, 8, 7),
    }  # fmt: skip
    with torch.no_grad():
        captured, _ = forward(policy, batch, [0])
    apart, pooled = token_groups(captured, "apart"), token_groups(captured, "pooled")["tokens"]
    assert torch.equal(apart["image"] | apart["text"], pooled) and not (pooled & captured.layout["state"]).any()
    assert pooled.sum(1)[0] < pooled.sum(1)[1]


def test_file_round_trip_and_refusals(policy, questions, tmp_path):
    """U8, and issue line: another backbone, another width or layer count are one clear line."""
    anchor = build(policy, question_batches(questions, 8, 8, 0, "cpu"), about(policy))
    anchor.save(tmp_path / "a.safetensors")
    loaded = Anchor.load(tmp_path / "a.safetensors")
    assert loaded.about == anchor.about and loaded.moments.keys() == anchor.moments.keys()
    for key, moments in anchor.moments.items():
        assert torch.equal(loaded.moments[key].mean, moments.mean)
        assert torch.equal(loaded.moments[key].spread, moments.spread)
    loaded.check("a", "abc", policy.num_layers, 48)
    for wrong, words in [(("abc", 5, 48), "layers"), (("abc", 4, 64), "channels"), (("xyz", 4, 48), "other weights")]:
        with pytest.raises(BurnishError, match=words):
            loaded.check("a", *wrong)
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    for name in ("b", "c"):
        with pytest.raises(BurnishError, match="anchor"):
            Anchor.load(tmp_path / f"{name}.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_an_earlier_file_is_refused_as_its_states_were_of_another_reading(policy, questions, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    anchor = build(policy, question_batches(questions, 8, 8, 0, "cpu"), about(policy))
    anchor.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["about"] = json.dumps({**json.loads(metadata["about"]), "format": 1})
    save_file(tensors, tmp_path / "b.safetensors", metadata=metadata)
    with pytest.raises(BurnishError, match="format 1; expected 2, built through the policy.s own prefix"):
        Anchor.load(tmp_path / "b.safetensors")


def test_empty_question_folder(policy, questions, tmp_path):
    empty = make_questions(tmp_path / "empty", 1)
    (empty / "questions.jsonl").write_text("")
    with pytest.raises(BurnishError, match="question"):
        build(policy, question_batches(empty, 8, 8, 0, "cpu"), about(policy))


def test_command(tiny_smolvla, questions, tmp_path, capsys):
    out = tmp_path / "anchor.safetensors"
    command = ["method", "isolate", "anchor", str(tiny_smolvla), str(questions), "-o", str(out), "--samples=16"]
    assert main([*command, "--batch-size=8", "--device=cpu"]) == 0
    assert "4 layers of 48 channels, 16 questions" in capsys.readouterr().out
    assert len(Anchor.load(out).moments) == 8
    assert main(["method", "isolate", "anchor", str(tiny_smolvla), str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "question folder" in error and len(error.strip().splitlines()) == 1
    assert json.loads((questions / "meta.json").read_text())["camera"] == "front"
