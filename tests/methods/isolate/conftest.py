"""More questions than the shared folder has: anchors are taken from them."""

import pytest


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    from fake import make_questions

    return make_questions(tmp_path_factory.mktemp("questions") / "fake", count=40)
