"""The shell passes on what it was asked, and its exit status says what happened."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from snparam.commands import cli, demo


def result_of(*passed: bool) -> demo.Result:
    checks = tuple(demo.Check(f"claim {i}", f"measured {i}", ok) for i, ok in enumerate(passed))
    return demo.Result(checks, accuracy=0.875, test_images=8, pictures=(Path("a.png"),))


def test_the_module_runs_and_knows_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "snparam", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"snparam {importlib.metadata.version('snparam')}"


@pytest.mark.parametrize(
    ("passed", "status"), [((True, True), 0), ((True, False), 1), ((False,), 1)]
)
def test_a_failed_check_is_the_exit_status(monkeypatch, capsys, passed, status):
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: result_of(*passed))
    assert cli.main(["demo"]) == status
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == passed.count(False)
    for i in range(len(passed)):
        assert f"claim {i}: measured {i}" in printed
    assert "87.5% of 8 images" in printed
    assert "a.png" in printed


def test_options_reach_the_demo(monkeypatch):
    calls = []

    def run(out, **options):
        calls.append((out, options))
        return result_of(True)

    monkeypatch.setattr(demo, "run", run)
    cli.main(["demo"])
    cli.main(["demo", "--epochs", "3", "--out", "pictures", "--seed", "5", "--quiet"])
    defaults, given = calls
    assert defaults[0] == Path("snparam-demo")
    assert defaults[1]["quiet"] is False
    assert given == (Path("pictures"), {"epochs": 3, "seed": 5, "quiet": True})


@pytest.mark.parametrize(
    "error",
    [ImportError("the demo needs x: pip install 'snparam[demo]'"), PermissionError("no write")],
)
def test_what_cannot_run_is_one_line_on_stderr(monkeypatch, capsys, error):
    def run(*args, **kwargs):
        raise error

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"snparam: {error}\n"
    assert captured.out == ""


def test_without_a_command_the_help_has_the_commands(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert "usage: python -m snparam" in printed
    assert re.search(r"^ +demo +convert, train", printed, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments", [["train"], ["demo", "--epochs", "0"], ["demo", "--epochs", "many"]]
)
def test_wrong_arguments_show_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: python -m snparam" in capsys.readouterr().err
