"""Fixtures of the capability tests."""

import pytest
from capability_files import Maker


@pytest.fixture
def make(tmp_path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture
def family(make):
    """Folders base, tuned, control in float32; `make.values` has their numbers."""
    return make("base", 0), make("tuned", 1, of="base"), make("control", 2, of="base")
