"""What names and sentences of files could do to a terminal, a line, or a file that is written later."""

import json
import shutil

import dataset_fakes as fakes
import pytest
from dataset_fakes import INFO, TASK_TABLE, edit_json, edit_table

EVIL = "a\x1b[2J\x1b]0;owned\x07\nburnish: all is well\r\x9b1m"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return fakes.write_v3(tmp_path_factory.mktemp("terminal") / "set")


@pytest.fixture
def root(good, tmp_path, monkeypatch):
    from fake import register

    register(monkeypatch.setattr)
    return shutil.copytree(good, tmp_path / "set")


def clean(text: str) -> None:
    assert not [letter for letter in text if letter != "\n" and not letter.isprintable()], repr(text)


def test_sentences_are_text(root, accepted, refused, tmp_path):
    edit_table(root / TASK_TABLE, lambda one: one["task"].__setitem__(0, EVIL))
    edit_table(root / fakes.EPISODES, lambda one: one.update(tasks=[[EVIL], [fakes.TASKS[1]], [EVIL]]))
    clean(accepted(["data", "inspect", root]))
    edit_table(root / TASK_TABLE, lambda one: one["task"].reverse())
    clean(refused(["train", f"--data.root={root}", "--policy.path=fake", f"--output={tmp_path / 'run'}"]))


PLACES = {
    "a feature": lambda one: one["features"].update({EVIL: one["features"]["action"]}),
    "a dimension": lambda one: one["features"]["action"].update(names=[EVIL, "b", "c"], shape=[-1]),
    "a version": lambda one: one.update(codebase_version=EVIL),
    "a pattern": lambda one: one.update(data_path=EVIL),
    "a rate": lambda one: one.update(fps=EVIL),
    "a type": lambda one: one["features"]["action"].update(dtype=EVIL),
}


@pytest.mark.parametrize("name", PLACES)
def test_errors_are_one_line(name, root, refused):
    edit_json(root / INFO, PLACES[name])
    clean(refused(["data", "inspect", root]) if name not in ("a type",) else "")
    clean(refused(["train", f"--data.root={root}", "--policy.path=fake"]))


@pytest.mark.parametrize("text", [
    f"{json.dumps(EVIL)}: 1", f"train: {{{json.dumps(EVIL)}: 1}}", f"name: {json.dumps(EVIL)}",
    f"train: {{precision: {json.dumps(EVIL)}}}", f"objectives: [{{name: {json.dumps(EVIL)}}}]",
    f"objectives: [{{name: probe, {json.dumps(EVIL)}: 1}}]",
    "objectives: [{name: probe, weight: 2020-01-01}]", "objectives: [{name: probe, weight: !!binary YQ==}]",
    "policy: {overrides: {x: 2020-01-01}}", "policy: {overrides: {x: !!set {a, b}}}",
    "data: {columns: {action: !!set {a}}}",
    'name: "\\ud800"', 'name: "\\U0000D800"', "train: {trackers: [2020-01-01]}",
    "objectives: [{name: probe, weight: !!timestamp 2001-12-14t21:59:43.10-05:00}]", "2020-01-01: x",
    "policy: {overrides: !!omap [a: 1]}", "policy: {overrides: {? !!binary YQ== : 1}}",
])  # fmt: skip
def test_values_of_recipes(text, root, tmp_path, refused):
    (tmp_path / "r.yaml").write_text(text)
    words = [f"--output={tmp_path / 'run'}", *([] if "columns" in text else [f"--data.root={root}"])]
    clean(refused(["train", "--config", tmp_path / "r.yaml", "--policy.path=fake", "--train.steps=1", *words]))
    assert not (tmp_path / "run").exists()


def test_tensor_names(tmp_path, refused):
    import numpy as np
    from safetensors.numpy import save_file

    for name, value in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({f"model.{EVIL}.weight": np.full((2, 2), value, np.float32)}, tmp_path / name / "model.safetensors")
    clean(refused(["weights", "extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "delta"], "printed"))


@pytest.mark.parametrize("content", ['{"type": "\\ud800"}', '{"\\udc00": 1}', '{"type": "smolvla", "x": ["\\ud83d"]}'])
def test_half_characters_of_a_policy(content, tmp_path, refused):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "model.safetensors").write_bytes(b"")
    clean(refused(["policy", "profile", tmp_path], "half a character"))


def test_half_characters_of_questions(tmp_path, refused):
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "question": "\\ud800?", "answer": "a"}\n')
    clean(refused(["data", "questions", "--from", tmp_path / "pairs.jsonl", "--root", tmp_path / "q"], "half a char"))
    assert not (tmp_path / "q").exists()


def test_whole_characters_pass(tmp_path):
    from burnish.core.reading import parse_json

    assert parse_json('{"a": "\\ud83d\\ude00 \\\\ud800"}', "x") == {"a": "\U0001f600 \\ud800"}
