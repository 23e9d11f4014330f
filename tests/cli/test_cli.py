"""The command line: every command explains itself, quickly, and says one line when something is wrong."""

import inspect
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest

from burnish.cli.main import COMMANDS, OLD, OUTSIDE, find, main, present_names
from burnish.cli.parser import Arg, CommandParser, Group
from burnish.core.errors import BurnishError

ROOT = Path(__file__).parents[2]
FIRST = ["start", "doctor", "trial"]
"""What a newcomer gives, and whoever stands at a robot, before the nine verbs."""
NINE = ["data", "train", "eval", "compare", "run", "weights", "policy", "method", "report"]
LAST = ["completion"]
"""Of the shell's."""


def leaves(group: Group = COMMANDS, name: str = "") -> Iterator[str]:
    """The full name of every command."""
    for word, command in group.commands.items():
        full = f"{name} {word}".strip()
        yield from leaves(command, full) if isinstance(command, Group) else [full]


def shown(argv, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", leaves())
def test_help_exits_0_and_shows_an_example(command, capsys):
    text = shown([*command.split(), "--help"], capsys)
    example = text[text.lower().rindex("example") :]
    assert f"burnish {command} " in example


def test_every_argument_is_explained():
    unexplained = []
    for name in leaves():
        _, command, _ = find(name.split())
        parameters = CommandParser(name, command).parameters.values()
        unexplained += [f"{name}: {p.name}" for p in parameters if not p.meaning and not p.rest]
    assert unexplained == []


def test_top_help_lists_what_comes_first_and_exactly_nine_verbs(capsys):
    text = shown(["--help"], capsys)
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "]
    assert listed == FIRST + NINE + LAST == list(COMMANDS.commands)


def test_version(capsys):
    import burnish

    assert shown(["--version"], capsys).strip() == burnish.__version__


@pytest.mark.parametrize(
    "argv",
    [
        [], ["no-such-command"], ["data"], ["data", "no-such"], ["data", "inspect"], ["eval", "x"],
        ["compare", "a", "b", "--zzz"], ["data", "demos", "tabletop:lift", "many", "x"],
        ["data", "pairs", "p", "e", "--root", "r", "--ties", "no"],
    ],
)  # fmt: skip
def test_wrong_usage_exits_2(argv):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("data inspect", ["absent"]),
        ("report page", ["absent"]),
        ("run", ["absent.yaml"]),
        ("train", ["--config", "absent.yaml"]),
        ("compare", ["absent", "absent"]),
        ("method align cache", ["absent.yaml"]),
    ],
)
def test_user_errors_are_one_line(name, argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*name.split(), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith(f"burnish {name}: ") and "absent" in captured.err
    assert not list(tmp_path.iterdir())


def test_an_interruption_exits_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("burnish.evaluate.compare.compare", interrupted)
    monkeypatch.setattr("burnish.cli.parser.CommandParser.call", interrupted)
    assert main(["compare", "a", "b"]) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("old", OLD)
def test_old_names_mean_the_new_command_and_say_so_in_one_line(old, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = OLD[old].partition(" --")[0]
    with pytest.raises(SystemExit) as exit_:
        main([*old.split(), "--help"])
    captured = capsys.readouterr()
    assert exit_.value.code == 0 and captured.out.startswith(f"usage: burnish {new} ")
    assert captured.err.count("\n") == 1 and f"burnish {old} is now called burnish {new};" in captured.err


def test_old_arguments_keep_their_meaning(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr("burnish.data.demos.make_demos", lambda *given, **named: calls.append((given, named)))
    flags = ["--env", "tabletop:lift", "--episodes=2", "--root", "x", "--cameras", "front,wrist", "--workers", "1"]
    assert main(["demos", *flags]) == 0
    assert main(["data", "demos", "tabletop:lift", "2", "x", "--cameras", "front,wrist", "--workers", "1"]) == 0
    assert calls[0] == calls[1] and calls[0][0] == ("tabletop:lift", 2, Path("x"))
    assert calls[0][1]["cameras"] == ["front", "wrist"]


def test_a_run_folder_after_report_is_a_page(capsys, tmp_path):
    assert main(["report", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "burnish report page RUN_FOLDER" in lines[0] and lines[1].startswith("burnish report page: nothing to")


def test_what_is_outside_the_package_runs_in_a_checkout_only(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for old, new in OUTSIDE.items():
        assert main([*old.split(), "--help"]) == 2
        first, second = capsys.readouterr().err.splitlines()
        assert f"python -m {new}" in first and "no part of the package" in second
    monkeypatch.chdir(ROOT)
    assert main(["tower", "--help"]) == 0


def test_run_tells_recipes_and_studies_apart(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "tabletop/quickstart", "--variants", "a"]) == 2
    assert "no study" in capsys.readouterr().err
    assert main(["run", "isolate/answers", "--arms", "nobody"]) == 2
    assert "some of naive" in capsys.readouterr().err
    assert main(["run", "isolate/answers", "--fresh"]) == 2
    assert "--fresh" in capsys.readouterr().err and not list(tmp_path.iterdir())


# A command and the function of the library that it calls; names that differ, and what the command line leaves out.
LIBRARY = [
    ("data demos", "burnish.data.demos:make_demos", {}),
    ("data questions", "burnish.data.questions:make_questions", {}),
    ("data pairs", "burnish.evaluate.pairs:collect", {}),
    ("data inspect", "burnish.data.inspect:inspect_dataset", {"dataset": "root"}),
    ("start", "burnish.experiments.start:propose", {}),
    ("eval", "burnish.evaluate.rollout:evaluate", {}),
    ("eval", "burnish.evaluate.offline:evaluate_offline", {}),
    ("compare", "burnish.evaluate.compare:compare", {"first": "a", "second": "b", "a": "", "b": ""}),
    ("weights extract", "burnish.weights.extract:extract", {}),
    (
        "weights merge",
        "burnish.weights.merge:merge",
        {"delta": "deltas", "option": "options", "module": "modules"},
    ),
    ("weights control", "burnish.weights.control:control", {}),
    ("weights inspect", "burnish.weights.inspect:inspect", {"other": "others"}),
    ("weights verify", "burnish.weights.verify:verify", {}),
    ("policy profile", "burnish.runtime.profile:profile_policy", {"policy": "path", "set_": "overrides"}),
    (
        "policy decode",
        "burnish.runtime.decoders:compare_decoders",
        {
            "decoder": "decoders",
            "option": "options",
        },
    ),
    ("policy verify decode", "burnish.runtime.verify:verify_decode", {"option": "options"}),
    ("policy verify score", "burnish.methods.prefer.verify:verify_score", {}),
    ("report page", "burnish.report.page:write_report", {}),
    ("report intervals", "burnish.experiments.plots:write_intervals", {"output": "out"}),
    ("report pareto", "burnish.experiments.plots:write_pareto", {"output": "out"}),
    ("report results", "burnish.experiments.pages:update_pages", {}),
]
NOT_ON_THE_COMMAND_LINE = {"progress", "make"}
OTHER_SOURCE = {
    ("data pairs", "policy"),
    ("data pairs", "env"),
    ("eval", "env"),
    ("eval", "data"),
    *(("data questions", k) for k in ("env", "scenes", "root")),
}
"""What may be left out where a flag names files to import."""
AS_TEXT = {("eval", "delay"), ("eval", "cache")}
"""What is text on the command line and an object in the library."""


def choices(parameters) -> dict[str, tuple]:
    """The values that parameters declared as Literal may have."""
    hints = {key: value.annotation for key, value in parameters.items()}
    return {key: get_args(hint) for key, hint in hints.items() if get_origin(hint) is Literal}


@pytest.mark.parametrize(("name", "target", "renamed"), LIBRARY)
def test_a_command_has_the_signature_of_the_library(name, target, renamed):
    """What has one name has one default and one kind of type, and nothing of the library is out of reach."""
    _, command, _ = find(name.split())
    module, _, function = target.partition(":")
    library = inspect.signature(getattr(import_module(module), function)).parameters
    ours = {renamed.get(key, key): value for key, value in inspect.signature(command).parameters.items()}
    assert library.keys() - NOT_ON_THE_COMMAND_LINE <= ours.keys()
    assert choices(library).items() <= choices(ours).items()
    empty = inspect.Parameter.empty
    for key in (key for key in library.keys() & ours.keys() if (name, key) not in AS_TEXT):
        one, other = ours[key], library[key]
        if empty in (one.default, other.default):
            required = one.default is other.default is empty
            assert required or (name, key) in OTHER_SOURCE, key
        else:
            assert (one.default or None) == (other.default or None), key
        if one.default is empty or isinstance(one.default, int | float) and one.default:
            assert type(one.default) is type(other.default), key


def example(
    env: str, count: int, *rest: str, size: Annotated[int, Arg(least=1, old=("--old-size",))] = 96,
    draws: Annotated[list[int], Arg(several=True)] = (1, 4), name: list[str] = (), video: bool = True,
    deep: bool = False, kind: Literal["a", "b"] = "a", out: Annotated[Path | None, Arg(short="-o")] = None,
) -> int:  # fmt: skip
    """Do it."""
    return SEEN.append((env, count, rest, size, draws, name, video, deep, kind, out)) or 7


SEEN: list[tuple] = []


def call(*words: str) -> tuple:
    assert CommandParser("burnish example", example, words).call(words) == 7
    return SEEN.pop()


def test_a_signature_is_a_parser():
    assert call("e", "3") == ("e", 3, (), 96, [1, 4], [], True, False, "a", None)
    assert call("--env", "e", "--count=3") == call("e", "3")
    assert call("e", "--count", "3", "--deep", "--no-video")[6:8] == (False, True)
    assert call("e", "3", "--size", "2")[3] == call("e", "3", "--old-size", "2")[3] == 2
    assert call("e", "3", "--draws", "5", "6")[4] == [5, 6]
    assert call("e", "3", "--name", "x", "--name", "y")[5] == ["x", "y"]
    assert call("e", "3", "-o", "x", "--kind", "b")[8:] == ("b", Path("x"))
    assert call("e", "3", "--train.steps=4", "--train.lr", "1")[2] == ("--train.steps=4", "--train.lr", "1")
    with pytest.raises(BurnishError, match="--size is 0; expected at least 1"):
        call("e", "3", "--size", "0")
    for wrong in (["e"], ["e", "x"], ["e", "3", "--kind", "c"]):
        with pytest.raises(SystemExit):
            call(*wrong)


def test_present_names_leave_new_ones_alone():
    for name in leaves():
        assert present_names(name.split()) == (name.split(), False)


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
    """`from burnish import train` gives a package, whatever was imported before; it has to be callable.

    Nothing heavy comes with it: a script's simulators, processes of their own, import that script again.
    """
    code = """
import sys
import burnish.evaluate.stats
from burnish import BurnishError, evaluate, load_recipe, train
assert "torch" not in sys.modules
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
from burnish.cli.main import find
from burnish.cli.parser import CommandParser
for name in sys.argv[1:]:
    _, command, _ = find(name.split())
    CommandParser(name, command)
    heavy = {"torch", "lerobot", "mujoco", "transformers", "matplotlib", "scipy", "numpy"} & set(sys.modules)
    assert not heavy, f"the parser of {name} imports {heavy}"
"""
    subprocess.run([sys.executable, "-c", code, *leaves()], check=True)


def test_a_reader_who_leaves_ends_the_command_without_a_word(tmp_path):
    (tmp_path / "r").write_text('{"task": "t", "seed": 0, "success": true}\n')
    command = f"{sys.executable} -m burnish.cli.main compare {tmp_path}/r {tmp_path}/r; echo $? >{tmp_path}/status"
    done = subprocess.run(["sh", "-c", f"( {command} ) | true"], capture_output=True, text=True)
    assert done.stderr == "" and int((tmp_path / "status").read_text()) in (0, 141)


@pytest.mark.parametrize("flag", ["--async=guided", "--carry=2", "--clip=3", "--schedule=linear", "--jacobian=vjp"])
@pytest.mark.parametrize("what", [["small", "--data", "nowhere"], ["expert", "tabletop:lift"]], ids=["data", "expert"])
def test_flags_of_a_late_policy_are_refused_where_nobody_reads_them(what, flag, tmp_path, capsys):
    assert main(["eval", *what, "--output", str(tmp_path / "out"), flag]) == 2
    assert f"{flag.partition('=')[0]} with {'--data' if '--data' in what else 'expert'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
