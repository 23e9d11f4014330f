"""Makes tests/train/fake.py importable, and one tiny data set and question folder for all tests of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    from fake import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data") / "fake")


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    from fake import make_questions

    return make_questions(tmp_path_factory.mktemp("questions") / "fake", count=40)
