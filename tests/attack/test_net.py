"""The last net: a fault of ours in one line, with its traceback only where it is asked for."""

import errno

import pytest

from burnish.cli import main as cli


@pytest.fixture
def failing(monkeypatch):
    def fail_with(error):
        def command() -> None:
            """Fail.

            Example:
                burnish compare
            """
            raise error

        monkeypatch.setitem(cli.COMMANDS.commands, "compare", command)

    return fail_with


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("two\nlines"), RuntimeError(), IndexError(), AssertionError()]
)
def test_a_fault_of_ours(failing, capsys, error):
    failing(error)
    assert cli.main(["compare"]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "internal error in cli." in said and type(error).__name__ in said
    assert cli.main(["compare", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error, word", [
    (OSError(errno.ENOSPC, "No space left on device", "x"), "no room left while writing x"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), "may not write x, or not read it"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "too long for a path"),
    (MemoryError(), "not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"), "not enough memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "not enough memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
    (RuntimeError("No space left on device (os error 28)"), None),
])  # fmt: skip
def test_a_fault_of_the_machine(failing, capsys, error, word):
    failing(error)
    assert cli.main(["compare"]) == (2 if word else 3)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and (word or "internal error") in said


def test_a_reader_who_left(failing, monkeypatch, capfd):
    failing(BrokenPipeError())
    with capfd.disabled():
        pass
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    assert cli.main(["compare"]) == 141
    assert capfd.readouterr().err == ""
