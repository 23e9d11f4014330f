"""Every script and notebook under examples/ runs, with tiny settings that a user could give too."""

import json
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

from burnish import make_demos
from burnish.experiments.pipeline import Outcome

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "finetune": ["--steps", "2"],
    "align": ["--steps", "2"],
    "isolate": ["--steps", "1", "--scenes", "2"],
    "merge": ["--steps", "2"],
    "fast_sampler": ["--calls", "1"],
}
NOTEBOOKS = {
    "is_b_better": {"TRIALS": "3"},
    "look_at_your_data": {},
    "what_changed": {"STEPS": "1", "SCENES": "2"},
}


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    """A few demonstrations with depth, which all of them share."""
    root = tmp_path_factory.mktemp("examples") / "lift"
    make_demos("tabletop:lift", 4, root, geometry=True, workers=1, progress=False)
    return root


def test_all_are_listed_and_short():
    files = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert files == {f"{name}.py" for name in SCRIPTS} | {f"{name}.ipynb" for name in NOTEBOOKS}
    page = (FOLDER.parent / "docs/examples.md").read_text()
    assert all(f"`examples/{name}`" in page and f"<!-- made: example {name} -->" in page for name in files)
    assert max(len((FOLDER / f"{name}.py").read_text().splitlines()) for name in SCRIPTS) <= 60


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name, demos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = ["--output", "out"] if name != "fast_sampler" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--data", str(demos), *SCRIPTS[name], *output])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.count("\n") >= 3


def test_with_a_robots_own_data_the_base_is_left_out(demos, tmp_path, monkeypatch, capsys):
    """As `run_recipe` leaves it out where it has other cameras or actions."""
    done = Outcome(tmp_path, tmp_path / "report.html", offline={"offline": "as good as this"})
    monkeypatch.setattr("burnish.experiments.pipeline.run_recipe", lambda recipe: done)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--data", str(demos)])
    runpy.run_path(str(FOLDER / "finetune.py"), run_name="__main__")
    assert "offline: as good as this\n\neverything on one page" in capsys.readouterr().out


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, demos, tmp_path, monkeypatch, capsys):
    """Its cells one after the other in one namespace; it is kept without outputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib.rcParams, "backend", "agg", raising=False)
    for key, value in {"DATA": str(demos), "OUTPUT": "out", **NOTEBOOKS[name]}.items():
        monkeypatch.setenv(key, value)
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert notebook["nbformat"] == 4 and notebook["cells"][0]["cell_type"] == "markdown"
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"{name} cell {number}", "exec"), names)
    pyplot.close("all")
    assert capsys.readouterr().out.count("\n") >= 3
