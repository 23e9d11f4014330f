"""Fixtures of the tests of weights."""

import pytest
from weight_files import FolderMaker


@pytest.fixture
def make(tmp_path) -> FolderMaker:
    return FolderMaker(tmp_path)


@pytest.fixture
def family(make):
    """Folders base, tuned, control in float32; `make.values` has their numbers."""
    return make("base", 0), make("tuned", 1, of="base"), make("control", 2, of="base")
