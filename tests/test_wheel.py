"""What a wheel holds, and that recipes run from it by name, from any folder, without a word written into it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import burnish

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the checkout."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    for name in ("src", "bench", "workshop"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "burnish.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(root)], cwd=source, check=True, capture_output=True)
    (built,) = root.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)  # noqa: S202  made above
    return target


def content(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_is_whole_and_holds_nothing_else(wheel, installed):
    assert burnish.__version__ in wheel.name
    names = content(installed)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "burnish", "lerobot_policy_burnish", "lerobot_policy_burnish.egg"
    }  # fmt: skip
    here = ROOT / "src" / "burnish"
    wanted = {f"burnish/{name}" for name in content(here) if "__pycache__" not in name}
    assert wanted <= names and "lerobot_policy_burnish.egg-info/PKG-INFO" in names
    for name in ("recipes/tabletop/quickstart.yaml", "recipes/isolate/facts.jsonl", "assets/small/model.safetensors",
                 "report/style.css", "py.typed"):  # fmt: skip
        assert f"burnish/{name}" in names


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--config", "tabletop/quickstart", "--data.root=absent"], "no data set at absent"),
        (["run", "recipes/prefer/sft.yaml", "--train.steps=0"], "train.steps is 0"),
        (["run", "isolate/answers", "--seeds", "x"], "the seeds 'x'"),
        (["run", "tabletop/quickstrat"], "tabletop/quickstart"),
        (["report", "results"], "no README.md in"),
    ],
)
def test_recipes_are_found_from_any_folder(installed, tmp_path, argv, words):
    before = content(installed)
    env = os.environ | {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "burnish.cli.main", *argv]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr
    assert content(installed) == before
