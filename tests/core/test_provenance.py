"""The commit that a result names is that of burnish's own checkout; a hash covers all that decides an action."""

import shutil
import subprocess
from pathlib import Path

import pytest

from burnish.core import provenance


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository of something else, with burnish's file in an environment that it ignores."""

    def git(*words: str) -> None:
        given = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com", *words]
        subprocess.run(given, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    git("add", "-A")
    git("commit", "-qm", "start")
    (tmp_path / ".venv").mkdir()
    shutil.copy(provenance.__file__, tmp_path / ".venv/provenance.py")
    shutil.copy(provenance.__file__, tmp_path / "provenance.py")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/one.json").write_text("{}")
    git("add", "provenance.py", "results")
    git("commit", "-qm", "burnish")
    return tmp_path


def commit_of(monkeypatch, file: Path) -> str:
    monkeypatch.setattr(provenance, "__file__", str(file))
    return provenance.commit.__wrapped__()


def test_an_installed_package_has_no_commit(repository, monkeypatch):
    assert commit_of(monkeypatch, repository / ".venv/provenance.py") == ""


def test_a_checkout_has_one_and_says_when_files_differ(repository, monkeypatch):
    head = commit_of(monkeypatch, repository / "provenance.py")
    assert len(head) == 40
    (repository / "results/one.json").write_text("a run before this one wrote it")
    assert commit_of(monkeypatch, repository / "provenance.py") == head
    (repository / "provenance.py").write_text("changed")
    assert commit_of(monkeypatch, repository / "provenance.py") == head + "+"


@pytest.mark.parametrize("name", ["dataset_statistics.json", "fast/tokenizer.json", "model.safetensors", "config.json"])
def test_a_folder_with_other_statistics_or_tokens_is_another_policy(tmp_path, name):
    (tmp_path / "fast").mkdir()
    (tmp_path / "config.json").write_text("{}")
    before = provenance.weights_hash(tmp_path)
    (tmp_path / name).write_text('{"a": 1}')
    assert provenance.weights_hash(tmp_path) != before
