"""Scene questions: true answers, balance, the folder, and what a damaged one says."""

import json
from dataclasses import replace

import numpy as np
import pytest

from burnish.core.errors import BurnishError
from burnish.data.questions import KINDS, SceneFacts, ask, draw_scenes, make_questions, open_questions
from burnish.envs.base import make_env


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("questions") / "q"
    return make_questions("tabletop:lift,put_on", 24, root, image_size=48, seed=9, workers=1, progress=False)


FACTS = SceneFacts(
    objects={
        "red cube": {"colour": "red", "shape": "cube"},
        "blue ball": {"colour": "blue", "shape": "ball"},
        "pink cube": {"colour": "pink", "shape": "cube"},
    },
    image_points={"red cube": (0.205, 0.5), "blue ball": (0.5, 0.1), "pink cube": (0.9, 0.9)},
    hand_distance={"red cube": 0.1, "blue ball": 0.3, "pink cube": 0.2},
    instruction="lift the blue ball",
    source="blue ball",
    held=None,
)


def answers(seed=0):
    return {q: (kind, a) for kind, q, a in ask(FACTS, np.random.default_rng(seed), [("red", "ball"), ("red", "cube")])}


def test_answers_follow_from_the_facts():
    found = answers()
    assert found["where is the red cube?"] == ("where", "x 20 y 50")
    assert found["how many cubes are there?"] == ("count", "2")
    assert found["what colour is the ball?"] == ("colour", "blue")
    assert "what colour is the cube?" not in found  # there are two
    assert found["what is the gripper holding?"] == ("holding", "nothing")
    assert found["task: lift the blue ball. which object must move?"] == ("move", "blue ball")


def test_pairs_are_true_in_either_order():
    for seed in range(30):
        for question, (kind, answer) in answers(seed).items():
            if kind == "left_of":
                a, b = question.removeprefix("is the ").removesuffix("?").split(" left of the ")
                assert (answer == "yes") == (FACTS.image_points[a][0] < FACTS.image_points[b][0])
            if kind == "nearer":
                assert FACTS.hand_distance[answer] == min(
                    FACTS.hand_distance[n] for n in FACTS.objects if n in question
                )


def test_yes_and_no_are_balanced():
    said = [a for seed in range(300) for kind, a in answers(seed).values() if kind in ("exists", "left_of")]
    share = said.count("yes") / len(said)
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(len(said))  # four standard deviations


def test_folder(folder):
    questions = open_questions(folder)
    assert questions.images.shape == (24, 48, 48, 3) and questions.camera == "front"
    assert {r["kind"] for r in questions.entries} <= set(KINDS)
    assert all(questions.images[i].std() > 5 for i in range(24))


def test_same_arguments_give_the_same_questions(folder, tmp_path):
    again = make_questions("tabletop:lift,put_on", 24, tmp_path / "q", image_size=48, seed=9, workers=2, progress=False)
    assert (again / "questions.jsonl").read_text() == (folder / "questions.jsonl").read_text()
    np.testing.assert_array_equal(np.load(again / "images.npy"), np.load(folder / "images.npy"))


def test_fixed_initial_states_are_left_for_evaluation(tmp_path, monkeypatch):
    env, begun = make_env("tabletop:lift", 48), []
    monkeypatch.setattr(env, "spec", replace(env.spec, num_initial_states=4))
    monkeypatch.setattr(env, "reset", lambda state, reset=env.reset: (begun.append(state), reset(state)))
    monkeypatch.setattr("burnish.data.questions.make_env", lambda task, size: env)
    images = tmp_path / "images"
    images.touch()
    list(draw_scenes([(0, 3)], "tabletop:lift", 48, "front", 9, 0, (), images, 0))
    assert begun == [13, 14, 15]


def test_only_the_kinds_that_are_asked_for(folder, tmp_path):
    arguments = "tabletop:lift,put_on", 24, tmp_path / "q"
    options = {"image_size": 48, "seed": 9, "workers": 1, "progress": False}
    some = open_questions(make_questions(*arguments, kinds=["move", "left_of"], **options)).entries
    assert some == [e for e in open_questions(folder).entries if e["kind"] in ("move", "left_of")]
    with pytest.raises(BurnishError, match="holds other questions"):
        make_questions(*arguments, **options)
    with pytest.raises(BurnishError, match="questions of kind 'leftof'"):
        make_questions(*arguments, kinds=["leftof"], **options)


def test_another_request_for_a_full_folder_is_refused(folder):
    with pytest.raises(BurnishError, match="holds other questions"):
        make_questions("tabletop:lift,put_on", 25, folder, image_size=48, seed=9, progress=False)


def test_damaged_folders(folder, tmp_path):
    with pytest.raises(BurnishError, match="has no meta.json"):
        open_questions(tmp_path)
    for name in ("meta.json", "images.npy"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "questions.jsonl").write_text("")
    with pytest.raises(BurnishError, match="is empty"):
        open_questions(tmp_path)
    row = {"image": 99, "question": "q", "answer": "a", "kind": "count"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises(BurnishError, match="beyond the 24"):
        open_questions(tmp_path)
    (tmp_path / "questions.jsonl").write_text("{not json")
    with pytest.raises(BurnishError, match="questions.jsonl:1 is not JSON"):
        open_questions(tmp_path)
