"""Nothing is added to a folder that is whole as it is: a policy, a data set, questions, a task vector, an adapter."""

import json
import os
import shutil

import pytest
import yaml

WHOLE = {
    "policy": ["config.json", "model.safetensors"], "shards": ["config.json", "model.safetensors.index.json"],
    "adapter": ["adapter_config.json"], "data set": ["meta/info.json"], "questions": ["questions.jsonl", "images.npy"],
    "vector": ["delta.json"],
}  # fmt: skip
COMMANDS = {
    "train": ["train", "--output=X"], "run": ["run", "recipe.yaml", "--output=X"],
    "eval": ["eval", "expert", "tabletop:reach", "--episodes", "1", "--output", "X"],
    "demos": ["data", "demos", "tabletop:reach", "1", "X"],
    "questions": ["data", "questions", "tabletop:reach", "1", "X"],
    "import": ["data", "questions", "--from", "pairs.jsonl", "--root", "X"],
    "pairs": ["data", "pairs", "small", "tabletop:reach", "--root", "X"],
    "html": ["data", "inspect", "set", "--html", "X"], "page": ["report", "page", "run", "--out", "X"],
    "page figure": ["report", "page", "run", "--figure", "X"], "pareto": ["report", "pareto", "r.json", "-o", "X"],
    "profile": ["policy", "profile", "small", "--output", "X"],
    "decode": ["policy", "decode", "small", "--output", "X"],
    "decode figure": ["policy", "decode", "small", "--figure", "X"],
    "score": ["policy", "verify", "score", "small", "set", "--output", "X"],
    "anchor": ["method", "isolate", "anchor", "small", "questions", "-o", "X"],
    "select": ["method", "align", "select", "recipe.yaml", "--figure", "X"],
    "inspection": ["weights", "inspect", "delta", "--output", "X"],
    "result": ["run", "recipe.yaml", "--result", "X"], "trial": ["trial", "a", "b", "--output", "X"],
    "two pages": ["report", "page", "run", "run", "--out", "X"],
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "question": "q", "answer": "a"}\n')
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"root": "set"}, "output": "out"}))

    def make(kind):
        for name in WHOLE[kind]:
            (tmp_path / "whole" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "whole" / name).write_text("{}")

    return make


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_into_one(place, tmp_path, refused, untouched, command):
    place("policy")
    check, before = untouched(tmp_path), sorted(map(str, tmp_path.rglob("*")))
    for below in ("whole/new", "whole/a/b/new"):
        refused([word.replace("X", below) for word in COMMANDS[command]], "would lie in a policy")
    check()
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("kind", WHOLE)
def test_nothing_goes_into_any(place, tmp_path, refused, kind):
    place(kind)
    for command in ("eval", "pareto"):
        refused([word.replace("X", "whole/new") for word in COMMANDS[command]], "would lie in")


def test_by_links_and_from_inside(place, tmp_path, refused, monkeypatch):
    place("data set")
    (tmp_path / "link").symlink_to("whole")
    refused([word.replace("X", "link/new") for word in COMMANDS["eval"]], "would lie in a data set")
    monkeypatch.chdir(tmp_path / "whole")
    refused([word.replace("X", "new") for word in COMMANDS["eval"]], "would lie in a data set")
    assert os.listdir(tmp_path / "whole") == ["meta"]


def test_merge_and_extract(tmp_path, refused):
    import numpy as np
    from safetensors.numpy import save_file

    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({}))
        save_file({"model.vlm.weight": np.ones((2, 2), np.float32)}, tmp_path / name / "model.safetensors")
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    refused(["weights", "merge", base, "--tuned", tuned, "-o", base / "merged"], "would lie in a policy")
    refused(["weights", "extract", base, tuned, "-o", tuned / "delta"], "would lie in a policy")
    assert sorted(os.listdir(base)) == sorted(os.listdir(tuned)) == ["config.json", "model.safetensors"]


def test_a_run_beside_its_policy_is_fine(dataset, tmp_path, monkeypatch, accepted):
    """runs/x holds runs/x/policy, and runs/x/eval goes beside it; a cache may be hidden in a data set."""
    import fake

    from burnish.core.outputs import require_outside

    fake.register(monkeypatch.setattr)
    root = shutil.copytree(dataset, tmp_path / "set")
    words = [f"--data.root={root}", "--policy.path=fake", "--train.steps=1", f"--output={tmp_path / 'x'}"]
    accepted(["train", *words, "--quiet"])
    require_outside(tmp_path / "x/eval/tuned")
    require_outside(root / ".teachers/vggt")
