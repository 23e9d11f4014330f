"""The three policies, and batches in environment units."""

import pytest
import torch

from burnish.policies import load_policy

KINDS = ("smolvla", "pi0", "pi05")
TASKS = ["pick up the red cube", "open", "put the green ball on the plate and then open the drawer"]


@pytest.fixture(params=KINDS)
def folder(request):
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def policy(folder):
    return load_policy(folder)


@pytest.fixture
def batch():
    """Three samples with instructions of different lengths; the last two steps of the last one are padding."""
    g = torch.Generator().manual_seed(7)
    pad = torch.zeros(3, 8, dtype=torch.bool)
    pad[2, 6:] = True
    return {
        "observation.images.top": torch.rand(3, 3, 32, 32, generator=g),
        "observation.images.wrist": torch.rand(3, 3, 32, 32, generator=g),
        "observation.state": torch.randn(3, 7, generator=g),
        "action": torch.randn(3, 8, 7, generator=g),
        "action_is_pad": pad,
        "task": list(TASKS),
    }


@pytest.fixture
def questions(batch):
    return {
        "observation.images.top": batch["observation.images.top"],
        "question": ["what colour is the cube?", "how many?", "is the ball left of the green bowl?"],
        "answer": ["red", "12", "yes"],
    }


@pytest.fixture
def fast_folder(tmp_path):
    """Files of a FAST tokenizer."""
    from workshop.tiny import build_fast

    return build_fast(tmp_path / "fast", 600)
