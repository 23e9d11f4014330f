"""The command line: every command explains itself, quickly, and says one line when something is wrong."""

import os
import resource
import subprocess
import sys

import pytest

from burnish.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_exits_0_and_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    example = text[text.lower().rindex("example") :]
    assert f"burnish {command}" in example or "accelerate launch" in example


def test_top_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in text.split()] == []


@pytest.mark.parametrize(
    "argv", [[], ["no-such-command"], ["inspect"], ["eval", "--env"], ["compare", "a", "b", "--zzz"]]
)
def test_wrong_usage_exits_2(argv):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", "absent"],
        ["report", "absent"],
        ["run", "absent.yaml"],
        ["train", "--config", "absent.yaml"],
        ["compare", "absent", "absent"],
    ],
)
def test_user_errors_are_one_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.count("\n") == 1 and captured.err.startswith(f"burnish {argv[0]}: ") and "absent" in captured.err
    )
    assert not list(tmp_path.iterdir())


def cpu_seconds(*argv: str) -> float:
    """User and system time of a child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL, env={**os.environ})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_import_and_help_are_quick():
    # CPU time, so that a busy machine does not fail the test. Anything heavy costs several seconds at once.
    assert cpu_seconds("-c", "import burnish") < 1.0
    assert cpu_seconds("-m", "burnish.cli.main", "--help") < 2.0


def test_names_of_packages_are_the_functions_too():
    """`from burnish import train` gives a package, whatever was imported before; it has to be callable."""
    code = """
import burnish.evaluate.stats
from burnish import BurnishError, evaluate, load_recipe, train
import burnish.train.loop as loop
assert callable(train) and callable(evaluate) and train.loop is loop
recipe = load_recipe(None, ["--output=absent"])
try:
    train(recipe)
except BurnishError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1


def test_parsers_import_nothing_heavy():
    code = """
import sys
from burnish.cli.main import COMMANDS, build_parser
for command in COMMANDS:
    build_parser(command)
    heavy = {"torch", "lerobot", "mujoco", "transformers", "matplotlib", "scipy"} & set(sys.modules)
    assert not heavy, f"the parser of {command} imports {heavy}"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
