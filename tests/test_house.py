"""Rules of the house that no reviewer has to remember."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "burnish"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 500

# Imports go down or stay on a floor, never up.
FLOORS = {
    "core": 0, "policies": 1, "data": 1, "envs": 1, "methods": 2, "train": 3, "evaluate": 3, "runtime": 3, "report": 4,
}  # fmt: skip
# The seat of a method belongs to the methods' floor although it lies beside the loop.
EXCEPTIONS = {"train.objective": 2}
# LIBERO's samplers draw from numpy's global generator; it is seeded for them and put back.
ALLOWED = {("envs.libero", "np.random.seed")}
TOP = 5  # the command line, the pipeline, benches: they may use everything


def module_of(file: Path) -> str:
    """src/burnish/data/loader.py as "data.loader"; the package itself as ""."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int:
    room, last = module.partition(".")[0], module.rpartition(".")[2]
    if last == "cli" or last.endswith("_cli"):
        return TOP
    return EXCEPTIONS.get(module, FLOORS.get(room, TOP))


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, module below burnish) of every import, also inside functions; those for type checkers left out."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "burnish":
            base = node.module.removeprefix("burnish").lstrip(".")
            for alias in node.names:
                if alias.name == "__version__":
                    continue
                inside = f"{base}.{alias.name}".lstrip(".")
                is_module = (SOURCE / inside.replace(".", "/")).with_suffix(".py").exists()
                found.append((node.lineno, inside if is_module or not base else base))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("burnish.")]
            found += [(node.lineno, name.removeprefix("burnish.")) for name in names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_of(file) or "burnish")
def test_imports_go_down(file):
    here = floor(module_of(file))
    wrong = [f"line {line} imports {name}" for line, name in imports(ast.parse(file.read_text())) if floor(name) > here]
    assert not wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_of(file) or "burnish")
def test_forbidden_constructs(file):
    wrong = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any(name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib") for name in names):
                wrong.append((node.lineno, "pickle"))
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            wrong.append((node.lineno, "bare except"))
        elif isinstance(node, ast.ExceptHandler) and ast.unparse(node.type) == "Exception":
            wrong.append((node.lineno, "broad except"))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "np.random.seed", "random.seed"):
            if (module_of(file), ast.unparse(node)) not in ALLOWED:
                wrong.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Call) and skips_wrapper(node.func):
            wrong.append((node.lineno, f"{ast.unparse(node.func)} skips the wrapper that synchronises gradients"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load" and not forbids_pickle(node):
            wrong.append((node.lineno, "np.load without allow_pickle=False"))
    assert not wrong


def skips_wrapper(function: ast.expr) -> bool:
    """x.module(...) and x.module.<verb>(...): a forward that DistributedDataParallel does not see."""
    if not isinstance(function, ast.Attribute):
        return False
    if function.attr == "module":
        return True
    verbs = {"forward", "loss", "score", "act", "language", "answer"}
    return isinstance(function.value, ast.Attribute) and function.value.attr == "module" and function.attr in verbs


def forbids_pickle(call: ast.Call) -> bool:
    return any(word.arg == "allow_pickle" and ast.unparse(word.value) == "False" for word in call.keywords)


@pytest.mark.parametrize("folder", ["src", "tests", "scripts"])
def test_no_file_is_too_long(folder):
    lengths = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert {str(file): length for file, length in lengths.items() if length > MAX_LINES} == {}


def test_no_absolute_paths_in_source():
    pattern = re.compile(r"""["'](/home/|/root/|/Users/|/mnt/|/data/)""")
    assert [str(file) for file in FILES if pattern.search(file.read_text())] == []


def test_constraints_hold_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[a-z0-9][a-z0-9._-]*==[A-Za-z0-9.!+_-]+", line) for line in lines)
    assert any(line.startswith("lerobot==") for line in lines) and not (ROOT / "uv.lock").exists()


def test_the_rules_themselves_bite():
    tree = ast.parse("def f():\n    from burnish.train.loop import train\n    import burnish.report.page\n")
    assert [floor(name) for _, name in imports(tree)] == [3, 4]
    assert skips_wrapper(ast.parse("policy.module(batch)").body[0].value.func)
    assert skips_wrapper(ast.parse("wrapped.module.loss(batch)").body[0].value.func)
    assert not skips_wrapper(ast.parse("run.module.trained()").body[0].value.func)
