"""What the tests of several methods share."""

import pytest


@pytest.fixture
def few_held(monkeypatch):
    """The anchor of `isolate` is held against 6 samples in place of 64, which are most of what a short run does."""
    from burnish.methods.isolate import protected

    monkeypatch.setattr(protected, "GAP_SAMPLES", 6)
