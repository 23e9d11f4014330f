"""Every public name has an entry in the reference, and each entry says what it takes, gives and raises."""

import ast
import importlib
import inspect
import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import burnish
from burnish.methods.objective import OBJECTIVES, Objective

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/reference").glob("*.md"))
ENTRIES = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
OTHERS = re.compile(r"(?:those|as|errors as) of `\w+`|Args, errors: as of")
"""Says that further arguments are another function's."""
BLOCK = {"block"}
"""What every merge operator takes, see `burnish.weights.operators.Block`."""
SOURCES = {
    "align": "2602.17951", "isolate": "2604.16067", "capability": "2605.10903", "distill": "2603.25661",
    "few_steps": "2202.00512", "prefer": "2605.21854", "retrieve": "2605.21854",
}  # fmt: skip
"""The paper behind each method."""


def found(name: str):
    """The object that an entry names."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def test_nothing_is_listed_twice():
    assert len(ENTRIES) > 100 and sorted(set(ENTRIES)) == sorted(ENTRIES)


def test_what_users_import_is_listed():
    """What `burnish` offers, and every name that a page of docs imports."""
    listed = {name.rpartition(".")[2] for name in ENTRIES}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    blocks = [body for page in pages for body in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)]
    scripts = [path.read_text() for path in (ROOT / "examples").glob("*.py")]
    nodes = [node for text in [*blocks, *scripts] for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.ImportFrom) and node.module.startswith("burnish")]  # fmt: skip
    imported = {alias.name for node in nodes for alias in node.names if not alias.name.isupper()}
    assert sorted((imported | set(burnish.__all__)) - listed) == []


def test_every_method_has_its_options_and_its_source():
    text = (ROOT / "docs/reference/options.md").read_text()
    folders = {path.parent.name for path in (ROOT / "src/burnish/methods").glob("*/objective.py")}
    assert folders == SOURCES.keys()
    for name, paper in SOURCES.items():
        kind = OBJECTIVES.get(name)
        assert issubclass(kind, Objective) and f"::: {kind.__module__}.{kind.__name__}\n" in text
        assert paper in f"{importlib.import_module(kind.__module__).__doc__} {kind.__doc__}", name


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_says_what_there_is_to_say(name):
    entry = found(name)
    if inspect.isclass(entry):
        written = entry.__doc__ or ""
        assert written and not (is_dataclass(entry) and written.startswith(f"{entry.__name__}(")), "dataclass's own"
        own = [key for key in vars(entry) if not key.startswith("_") and
               (inspect.isroutine(getattr(entry, key)) or isinstance(vars(entry)[key], property))]  # fmt: skip
        assert [key for key in own if not (inspect.getdoc(getattr(entry, key)) or "")] == []
    elif callable(entry) or hasattr(entry, "apply"):
        check_function(getattr(entry, "apply", entry))  # a merge operator is wrapped


def check_function(function) -> None:
    """Its docstring names every argument, says that it raises where it does, and its result has a type."""
    text, signature = inspect.getdoc(function), inspect.signature(function)
    unnamed = [key for key in signature.parameters if not re.search(rf"\b{key}\b", text) and key not in BLOCK]
    assert unnamed == [] or OTHERS.search(text)
    assert signature.return_annotation is not inspect.Signature.empty
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    raised = [ast.unparse(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    assert "BurnishError" in text or not any(one.startswith("BurnishError(") for one in raised)
