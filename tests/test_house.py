"""Rules of the house that neither ruff nor the import checker knows; see also `make lint`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "burnish"
TREES = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
MOST_LINES = {"file": 450, "function": 60, "method folder": 1300, "loop": 300, "package": 48_190}
LONG_FUNCTIONS = 2


def length(path: Path) -> int:
    return len(path.read_text().splitlines())


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def skips_wrapper(function: ast.expr) -> bool:
    """x.module(...) and x.module.<verb>(...): a forward that DistributedDataParallel does not see."""
    if not isinstance(function, ast.Attribute):
        return False
    if function.attr == "module":
        return True
    verbs = {"forward", "loss", "score", "act", "language", "answer"}
    return isinstance(function.value, ast.Attribute) and function.value.attr == "module" and function.attr in verbs


def allows_pickle(call: ast.Call) -> bool:
    forbidden = any(word.arg == "allow_pickle" and ast.unparse(word.value) == "False" for word in call.keywords)
    return ast.unparse(call.func) == "np.load" and not forbidden


def test_no_forward_skips_the_wrapper_and_no_array_is_unpickled():
    wrong = [
        f"{path}:{call.lineno} {ast.unparse(call.func)}"
        for path, tree in TREES.items()
        for call in calls(tree)
        if skips_wrapper(call.func) or allows_pickle(call)
    ]
    assert wrong == []


def test_sizes():
    files = [*TREES, *(p for folder in ("tests", "bench", "workshop") for p in (ROOT / folder).rglob("*.py"))]
    assert {str(path): length(path) for path in files if length(path) > MOST_LINES["file"]} == {}
    functions = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > MOST_LINES["function"]]
    assert len(long) <= LONG_FUNCTIONS, long
    folders = [path for path in (SOURCE / "methods").iterdir() if path.is_dir()]
    sums = {folder.name: sum(length(path) for path in folder.rglob("*.py")) for folder in folders}
    assert {name: lines for name, lines in sums.items() if lines > MOST_LINES["method folder"]} == {}
    assert length(SOURCE / "train" / "loop.py") <= MOST_LINES["loop"]
    assert sum(map(length, TREES)) <= MOST_LINES["package"]


def test_no_absolute_paths_in_source():
    pattern = re.compile(r"""["'](/home/|/root/|/Users/|/mnt/|/data/)""")
    assert [str(path) for path in TREES if pattern.search(path.read_text())] == []


def test_constraints_hold_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[a-z0-9][a-z0-9._-]*==[A-Za-z0-9.!+_-]+", line) for line in lines)
    assert any(line.startswith("lerobot==") for line in lines) and not (ROOT / "uv.lock").exists()


def test_the_rules_themselves_bite():
    def first(code: str) -> ast.Call:
        return next(calls(ast.parse(code)))

    assert skips_wrapper(first("policy.module(batch)").func) and skips_wrapper(first("wrapped.module.loss(b)").func)
    assert not skips_wrapper(first("run.module.trained()").func)
    assert allows_pickle(first("np.load(path)")) and not allows_pickle(first("np.load(path, allow_pickle=False)"))


def test_names_of_test_files_are_unique():
    """Two of one name in folders without a package cannot be collected together."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, after in zip(names, names[1:], strict=False) if name == after] == []
