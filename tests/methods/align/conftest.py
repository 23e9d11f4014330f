"""The example teacher of the docs page, a student small enough for milliseconds, and tiny data."""

import importlib
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
for folder in (HERE.parent, HERE.parents[2] / "train"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def edges(tmp_path_factory):
    """The name of the example teacher, importable; returns the folder it lies in."""
    from align_student import edges_source

    folder = tmp_path_factory.mktemp("edges")
    (folder / "edges.py").write_text(edges_source())
    sys.path.insert(0, str(folder))
    importlib.import_module("edges")
    yield folder
    sys.path.remove(str(folder))
    del sys.modules["edges"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    from fake import make_dataset

    return make_dataset(tmp_path_factory.mktemp("align") / "fake")
