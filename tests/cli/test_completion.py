"""Shell completion: what the command answers when a shell asks, through a real bash and without."""

import os
import shutil
import subprocess
import sys

import pytest

from burnish.cli.main import main

pytest.importorskip("argcomplete", reason="the package argcomplete is missing: make setup")
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def answered(line: str, tmp_path) -> list[str]:
    """What is offered at the end of a line."""
    out = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "fish", "COMP_LINE": line,
             "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}  # fmt: skip
    command = [sys.executable, "-X", "importtime", "-m", "burnish.cli.main"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **QUIET, **asked}, capture_output=True, text=True)
    heavy = [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "numpy", "lerobot")]
    assert done.returncode == 0 and not heavy, done.stderr
    return [word.split("\t")[0].strip() for word in out.read_text().split("\n")]


@pytest.mark.parametrize(
    ("line", "wanted", "unwanted"),
    [
        ("burnish da", {"data"}, {"train"}),
        ("burnish policy verify ", {"runtime", "decode", "score"}, {"serve"}),
        ("burnish run tabletop/qu", {"tabletop/quickstart"}, {"tabletop/replay"}),
        ("burnish run tabletop/quickstart --train.st", {"--train.steps"}, {"--train.seed"}),
        ("burnish eval small tabletop:lift --tier ", {"exact", "bf16"}, {"small"}),
    ],
)
def test_what_is_offered(line, wanted, unwanted, tmp_path):
    found = set(answered(line, tmp_path))
    assert wanted <= found and not unwanted & found


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_a_bash_that_has_read_the_lines_completes(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    lines = capsys.readouterr().out
    program = tmp_path / "burnish"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m burnish.cli.main "$@"\n')
    program.chmod(0o755)
    asking = f"""{lines}
COMP_LINE='burnish report in' COMP_POINT=17 COMP_TYPE=9 COMP_WORDS=(burnish report in) COMP_CWORD=2
_python_argcomplete burnish
echo "${{COMPREPLY[@]}}"
"""
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", asking], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["intervals"]


@pytest.mark.parametrize(("shell", "word"), [("zsh", "#compdef burnish"), ("fish", "complete --command burnish")])
def test_other_shells_get_lines_of_their_own(shell, word, capsys):
    assert main(["completion", shell]) == 0
    assert word in capsys.readouterr().out
