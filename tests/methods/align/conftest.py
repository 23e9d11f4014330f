"""The example teacher of the docs page, a student small enough for milliseconds, and tiny data."""

import importlib
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
ROOT = HERE.parents[3]
for folder in (HERE.parent, HERE.parents[2] / "train"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def edges_source():
    """The example of docs/methods/align.md, as a reader would save it."""
    page = (ROOT / "docs/methods/align.md").read_text()
    return re.search(r"<!-- test: teacher -->\n```python\n(.*?)^```$", page, re.M | re.S)[1]


@pytest.fixture(scope="session")
def edges(tmp_path_factory):
    """The name of the example teacher, importable; returns the folder it lies in."""
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
