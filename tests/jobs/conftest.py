"""For tests of commands: one of them in this process, where starting another would prove nothing more."""

import sys

import pytest
from commands import Ended


@pytest.fixture
def here(tmp_path, capsys, monkeypatch):
    """Call a command's function as if the command were typed in `tmp_path`; it has ended."""
    from orchestrator.command import run_command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def call(function, *arguments):
        monkeypatch.setattr("sys.argv", [f"{function.__name__}.py", *map(str, arguments)])
        code = run_command(function)
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    return call
