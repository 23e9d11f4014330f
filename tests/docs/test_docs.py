"""README and docs tell the truth: their commands parse, their Python runs, their files exist."""

import argparse
import ast
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import draccus
import pytest
import torch
import yaml

import bench
import burnish
from bench import gpu
from burnish.cli.main import COMMANDS, find, main, present_names
from burnish.cli.parser import CommandParser, Group, read_help
from burnish.core.config import RecipeConfig
from burnish.core.recipe import find_recipe, is_study, load_recipe
from burnish.experiments.study import load_study, variant_recipe
from burnish.train.setup import make_objectives
from workshop.__main__ import COMMANDS as WORKSHOP
from workshop.pretrain import PretrainConfig
from workshop.scene_train import read_scene_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- test: (?P<mark>\w+) -->\n)?(?P<pad> *)```(?P<kind>\w+)\n(?P<body>.*?)^(?P=pad)```$", re.M | re.S
)


def blocks(kind: str) -> list[tuple[str, str, str]]:
    """(page, mark, body) of every fenced block of that kind."""
    return [
        (page.name, found["mark"] or "", dedent(found["body"]))
        for page in PAGES
        for found in FENCE.finditer(page.read_text())
        if found["kind"] == kind
    ]


def commands(body: str) -> list[list[str]]:
    """The words of each command; leading NAME=value settings and what follows a > are cut off."""
    lines = body.replace("\\\n", " ").splitlines()
    split = [shlex.split(line.partition(" > ")[0], comments=True) for line in lines]
    return [words[next(i for i, word in enumerate(words) if "=" not in word) :] for words in split if words]


ALL_COMMANDS = [(page, words) for page, _, body in blocks("bash") for words in commands(body)]


@pytest.mark.parametrize(
    ("page", "words"), ALL_COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_commands_exist(page, words):
    check_command(words)
    for word in words:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), f"{word} is not in the repository"


def check_command(words: list[str]) -> None:
    if words[0] == "burnish":
        assert present_names(words[1:]) == (words[1:], False), "an old name"
        check_burnish(words[1:])
    elif words[:2] == ["python", "-c"]:
        ast.parse(words[2])
    elif words[:2] == ["python", "-m"]:
        check_outside(words[2:])
    elif words[0] == "python" and words[1].startswith("examples/"):
        flags = [word for word in words[2:] if word.startswith("--")]
        assert all(f'"{flag}"' in (ROOT / words[1]).read_text() for flag in flags)
    elif words[:2] == ["python", "bench/gpu.py"]:
        gpu.make_parser().parse_args(words[2:])
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    else:
        others = (".", "accelerate", "torchrun", "ray", "hf", "pip", "curl", "sed")
        assert words[0] in (*others, "lerobot-eval", "lerobot-train", "lerobot-rollout")


def check_burnish(argv: list[str]) -> None:
    """The command exists under its present name and takes these arguments; its recipe exists, its overrides too."""
    if argv == ["--help"]:
        return
    name, command, words = find(argv)
    made = CommandParser(name, command, words)
    given, overrides = made.parser.parse_known_args(words)
    if not made.rest or made.rest.arg.fields is not RecipeConfig:
        known = fields(made.rest.arg.fields) if made.rest else []
        assert {word.split("=")[0] for word in overrides} <= {f"--{one.name}" for one in known}
        return
    # Raises on a key that no recipe has; what a shell fills in is not there to be read.
    load_recipe(None, [word for word in overrides if "$(" not in word])
    recipe = getattr(given, "recipe", None) or getattr(given, "config", None)
    if recipe and not recipe.startswith(("path/", "my")):
        find_recipe(recipe)


def examples(group: Group = COMMANDS) -> Iterator[str]:
    """The commands that `--help` shows as examples."""
    for found in group.commands.values():
        if isinstance(found, Group):
            yield from examples(found)
        else:
            lines = read_help(found).examples.replace("\\\n", " ").splitlines()
            yield from (re.split(r"  +", line.strip())[0] for line in lines if line.strip())  # a remark follows blanks


@pytest.mark.parametrize("line", examples())
def test_examples_of_help_parse(line):
    (words,) = commands(line)
    check_command(words)


def check_outside(words: list[str]) -> None:
    """`python -m bench NAME`, `python -m workshop NAME`, or a program of LeRobot's."""
    parser = argparse.ArgumentParser()
    if words[0] == "bench":
        bench.add_arguments(parser)
        parser.parse_args(words[1:])
        return
    if words[0].startswith("lerobot."):  # which imports packages that may be missing
        folder = Path(importlib.util.find_spec("lerobot").origin).parents[1]
        program = folder.joinpath(*words[0].split(".")).with_suffix(".py")
        source = program.read_text() + program.with_name("configs.py").read_text()
        assert all(re.search(rf"^    {word[2:].split('=')[0].split('.')[0]}: ", source, re.M) for word in words[1:])
        return
    assert words[0] == "workshop"
    importlib.import_module(WORKSHOP[words[1]][0]).add_arguments(parser)
    _, overrides = parser.parse_known_args(words[2:])
    assert not overrides or words[1] == "pretrain"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: str(path.name))
def test_recipes_hold(path):
    """Every recipe says in its header which command runs it; its fields exist and its methods take their options."""
    text = path.read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("burnish " in line or "python -m workshop " in line for line in header)
    for line in header:
        if line.startswith(("#   burnish ", "#   python -m ")):
            check_command(shlex.split(line.lstrip("# ")))
    if "vision_steps" in yaml.safe_load(text):  # of the workshop's pretrain
        draccus.decode(PretrainConfig, yaml.safe_load(text))
        return
    if "scenes" in yaml.safe_load(text):  # of the workshop's teacher
        read_scene_recipe(path)
        return
    assert not {"arms", "before"} & yaml.safe_load(text).keys()
    if is_study(yaml.safe_load(text)):
        study, base = load_study(path)
        recipes = [variant_recipe(study, base, variant, study.seeds[0]) for variant in study.variants]
        for line in [*study.setup, *study.measures.values()]:
            for hole, value in (("{seed}", "0"), ("{out}", "runs"), ("{run}", "runs/a"), ("{file}", "a.json")):
                line = line.replace(hole, value)
            words = shlex.split(line)
            check_command(words if words[0] == "python" else ["burnish", *words])
    else:
        recipes = [load_recipe(path)]
    for recipe in recipes:
        make_objectives(recipe)


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS.commands if f"`burnish {name}`" not in readme] == []
    # What a results table says was run is history; elsewhere only present names stand.
    generated = re.compile(r"<!-- (results|claims):.*?<!-- /\1 -->", re.S)
    told = [generated.sub("", page.read_text()) for page in PAGES]
    named = {name for text in told for name in re.findall(r"`burnish (\w+)", text)}
    assert named - {"demos", "study"} <= set(COMMANDS.commands)  # the README names two old ones as such


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(("page", "mark", "body"), blocks("python"))
def test_python_calls_fit_the_library(page, mark, body):
    """Every public function that a block imports exists and takes the arguments that it is given."""
    tree = ast.parse(body)
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "burnish":
            module = burnish if node.module == "burnish" else importlib.import_module(node.module)
            imported |= {alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and inspect.isroutine(imported.get(node.func.id))
        ):
            keywords = {word.arg: None for word in node.keywords}
            inspect.signature(imported[node.func.id]).bind(*node.args, **keywords)


ELSEWHERE = ("served", "openpi", "recorded")
"""Marks of blocks that need a server: tests/runtime/test_serve_docs.py runs them."""


@pytest.mark.parametrize(
    ("page", "mark", "body"),
    [block for block in blocks("python") if "__main__" not in block[2] and block[1] not in ELSEWHERE],
)
def test_short_python_blocks_run(page, mark, body):
    exec(compile(body, page, "exec"), {"__name__": page})


def test_recipe_in_the_readme_holds():
    """The overrides in Python code are checked like those on a command line."""
    for _, _, body in blocks("python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_recipe":
                load_recipe(None, ast.literal_eval(node.args[1]))


def test_marked_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for _, mark, body in blocks("bash"):
        if mark == "run":
            for words in commands(body):
                assert main(words[1:]) == 0, " ".join(words)
                ran += 1
    assert ran >= 2 and (tmp_path / "inspect.html").stat().st_size > 10_000


@pytest.fixture
def l2sp(tmp_path, monkeypatch):
    """The example method, as a reader would save it."""
    (body,) = [body for _, mark, body in blocks("python") if mark == "l2sp"]
    (tmp_path / "l2sp.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "l2sp", raising=False)
    assert len(body.splitlines()) <= 35
    return importlib.import_module("l2sp").L2SP


def test_example_method_is_right(l2sp):
    """Gradient of weight / 2 |w - w0|^2 is weight (w - w0), and the distance is the norm of the step taken."""
    layer = torch.nn.Linear(3, 2)
    policy = SimpleNamespace(backbone_parameters=lambda: iter(layer.named_parameters()))
    run, method = SimpleNamespace(policy=policy), l2sp(weight=0.5)
    method.setup(run)
    with torch.no_grad():
        layer.weight += 2.0
        layer.bias -= 1.0
    (term,) = method.loss(run, {}, None).values()
    term.backward()
    assert term.item() == pytest.approx(0.25 * (6 * 4.0 + 2 * 1.0))
    torch.testing.assert_close(layer.weight.grad, torch.full((2, 3), 1.0))
    torch.testing.assert_close(layer.bias.grad, torch.full((2,), -0.5))
    assert method.metrics()["l2sp_distance"] == pytest.approx(26**0.5)


def test_example_method_trains(l2sp, tmp_path, monkeypatch):
    """Through the real loop: the stronger the pull, the closer the backbone stays."""
    fake = load_fake()
    monkeypatch.setattr("burnish.policies.load_policy", fake.load_fake)
    base = fake.FakePolicy()
    base.save(tmp_path / "base")
    data = fake.make_dataset(tmp_path / "data")
    distances = []
    for weight in (0.0, 100.0):
        overrides = [
            f"--policy.path={tmp_path / 'base'}", f"--data.root={data}", f"--output={tmp_path / str(weight)}",
            "--train.steps=5", "--train.batch_size=4", "--train.warmup_steps=0", "--train.lr=0.01",
            "--train.log_every=1", f"--objectives=[{{name: 'l2sp:L2SP', weight: {weight}}}]",
        ]  # fmt: skip
        result = burnish.train(load_recipe(None, overrides), progress=False)
        assert "loss_l2sp" in result.final
        distances.append(result.final["l2sp_distance"])
    assert 0 < distances[1] < distances[0]


def load_fake():
    """tests/train/fake.py, wherever pytest was started."""
    spec = importlib.util.spec_from_file_location("docs_fake", ROOT / "tests/train/fake.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
