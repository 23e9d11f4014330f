"""Makes known_flows.py and tests/train/fake.py importable."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve()
for folder in (HERE.parent, HERE.parents[2] / "train"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A LeRobotDataset of three short episodes. Do not write into it."""
    from fake import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data") / "fake")
