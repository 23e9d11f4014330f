"""The example teacher of the docs page, a student small enough for milliseconds, and tiny data."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # align_student.py


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
