"""The shape of the package: imports run downwards, files are small, torch is all it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import snparam

PACKAGE = Path(snparam.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the shell down to the mathematics: what is in a folder imports only from it and from those
# further down.
FOLDERS = [
    "commands",
    "spectrum",
    "testing",
    "conversion",
    "systems",
    "checkpoints",
    "parametrization",
    "layers",
    "constraints",
    "estimators",
    "matrices",
]
LEVEL = {name: level for level, name in enumerate(FOLDERS)}
# What may import more than torch where it is loaded.
EXTRAS = {"commands", "testing", "spectrum"}


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Names imported by a file, and whether where it is loaded rather than in a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            found.append((module, top))
            if module == "snparam":
                found += [(f"snparam.{alias.name}", top) for alias in node.names]
    return found


INSIDE = [path for path in FILES if path.parent != PACKAGE]


def test_every_folder_has_its_place() -> None:
    assert {folder_of(path) for path in INSIDE} == set(FOLDERS)
    assert {path.name for path in FILES if path.parent == PACKAGE} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", INSIDE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    here = folder_of(path)
    for name, _ in imports(path):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if package == "snparam" and target in LEVEL:
            assert LEVEL[target] >= LEVEL[here], f"{here} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_torch_is_needed_outside_the_extras_own_files(path: Path) -> None:
    if folder_of(path) in EXTRAS:
        return
    allowed = {*sys.stdlib_module_names, "torch", "typing_extensions", "snparam"}
    outside = {name.split(".")[0] for name, top in imports(path) if top} - allowed
    assert not outside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_public_names_are_the_ones_listed_and_documented() -> None:
    assert len(set(snparam.__all__)) == len(snparam.__all__)
    for name in snparam.__all__:
        assert getattr(snparam, name).__doc__, name


def test_importing_loads_no_third_party_library() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import snparam;"
        "new = {n.split('.')[0] for n in set(sys.modules) - before};"
        "print(sorted(new & {'transformers', 'diffusers', 'timm', 'peft', 'torchvision', 'tqdm',"
        " 'matplotlib', 'hypothesis', 'sklearn', 'rich', 'pytest', 'safetensors'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
