"""Retention on a hand-made policy that is right about some questions only."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.types import LanguageLoss
from burnish.evaluate.retention import compare_retention, retention
from burnish.evaluate.stats import mcnemar


@pytest.fixture
def folder(tmp_path):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    rows = [
        {"image": i % 5, "question": f"number {i % 5}?", "answer": str(i % 5), "kind": "odd" if i % 2 else "even"}
        for i in range(40)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "meta.json").write_text(json.dumps({"camera": "front"}))
    return tmp_path


class Reader(torch.nn.Linear):
    """Reads the number off the image, but does not know those above `knows`; longer answers have more tokens."""

    def __init__(self, knows: int):
        super().__init__(1, 1)
        self.knows = knows

    def answer(self, batch, max_new_tokens=8):
        values = (255 * batch["observation.images.front"][:, 0, 0, 0]).round().int().tolist()
        return [f" {v}." if v <= self.knows else "?" for v in values]

    def language(self, batch):
        assert not self.training
        mask = torch.tensor([[True, int(a) % 2 == 1] for a in batch["answer"]])
        per_token = torch.tensor([[float(a), 7.0] for a in batch["answer"]])
        return LanguageLoss(per_token, mask)


def test_accuracy_loss_and_kinds(folder):
    policy = Reader(knows=2).train()
    found = retention(policy, folder, limit=0, batch_size=7)
    assert policy.training
    assert (found.n, found.accuracy) == (40, 0.6) and found.interval.low < 0.6 < found.interval.high
    assert {k: r.n for k, r in found.by_kind.items()} == {"even": 20, "odd": 20}
    # 40 first tokens with mean 2, and a second one of loss 7 for the odd answers 1 and 3.
    assert found.loss == pytest.approx((40 * 2 + 16 * 7) / 56)
    assert retention(policy, folder, limit=0, batch_size=64) == found


def test_subset_is_always_the_same_and_pairs(folder):
    base, tuned = (retention(Reader(knows), folder, limit=20) for knows in (3, 1))
    assert base.n == 20 and retention(Reader(3), folder, limit=20, batch_size=3).correct == base.correct
    paired = compare_retention(base, tuned)
    lost = sum(base.correct) - sum(tuned.correct)
    assert (paired["forgotten"], paired["learned"]) == (lost, 0) and lost > 0
    assert paired["difference"] == pytest.approx(-lost / 20) and paired["p"] == pytest.approx(mcnemar(lost, 0))
    with pytest.raises(BurnishError, match="same questions"):
        compare_retention(base, SimpleNamespace(n=3))


def test_refusals(folder):
    (folder / "meta.json").write_text("{}")
    with pytest.raises(BurnishError, match="camera"):
        retention(Reader(1), folder)
    (folder / "meta.json").unlink()
    with pytest.raises(BurnishError, match="has no meta.json"):
        retention(Reader(1), folder)
