"""README's code runs as it stands, and its commands are those that CI executes."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands(line: str) -> list[list[str]]:
    return [shlex.split(part, comments=True) for part in line.split("&&")]


def ci_steps() -> list[list[str]]:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = re.findall(r"^step (.+)$", script, flags=re.MULTILINE)
    return [[word for word in shlex.split(line) if word != "--quiet"] for line in lines]


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_block_runs(index, tmp_path, monkeypatch):
    """Each in a namespace and a directory of its own; tests that a block defines run too."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / f"readme_{index}.py"  # a real file: Hypothesis reads its tests' source
    script.write_text(blocks("python")[index], encoding="utf-8")
    namespace = runpy.run_path(str(script))
    for name, value in namespace.items():
        if name.startswith("test_"):
            value()


def test_there_are_blocks_and_one_defines_a_property_test():
    assert len(blocks("python")) >= 4
    assert any("@given" in block and "def test_" in block for block in blocks("python"))


def test_the_two_commands_are_on_the_first_screen():
    first_screen = "\n".join(README.splitlines()[:45])
    shown = [
        command
        for block in re.findall(r"```bash\n(.*?)```", first_screen, re.DOTALL)
        for line in block.splitlines()
        for command in commands(line)
    ]
    assert ["python", "-m", "snparam", "demo"] in shown
    assert ["pytest", "-n", "2"] in shown
    assert "snparam.convert_model(model)" in first_screen


def test_ci_installs_and_tests_with_the_readmes_commands():
    (line,) = [line for block in blocks("bash") for line in block.splitlines() if "pytest" in line]
    for command in commands(line):
        assert command in ci_steps()


def test_every_install_from_the_tree_is_pinned():
    installs = [
        command
        for block in blocks("bash")
        for line in block.splitlines()
        for command in commands(line)
        if command[:2] == ["pip", "install"] and "-e" in command
    ]
    assert len(installs) >= 2
    for command in installs + [step for step in ci_steps() if step[:2] == ["pip", "install"]]:
        assert command[2:4] == ["-c", "constraints.txt"]


def test_links_into_the_tree_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
