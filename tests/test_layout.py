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

# From the shell down to the mathematics: a file imports only from files further down.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["demo"],
    ["__init__"],
    ["testing", "plotting"],
    ["training"],
    ["spectrum"],
    ["conversion"],
    ["saving", "tying"],
    ["checkpoints"],
    ["registration", "plan"],
    ["pretrained", "pickling", "adapters"],
    ["candidates", "selection"],
    ["presets"],
    ["layertypes"],
    ["spellings", "layers", "baking"],
    ["thirdparty", "takeover", "completion", "scopes"],
    ["parametrization"],
    ["watching", "forwards", "recomputation", "constraint", "options", "classes", "reading"],
    ["derived"],
    ["cpu_division", "stacks"],
    ["memory", "written"],
    ["cpu", "holders"],
    ["division"],
    ["sharded"],
    ["convergence"],
    ["linalg", "rows"],
    ["views", "tables", "undoing", "frames"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
EXTRAS = {"plotting", "demo", "cli", "testing"}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
            found.append((node.module or "", top))
        elif isinstance(node, ast.ImportFrom) and node.level == len(
            path.relative_to(PACKAGE).parts
        ):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(f"snparam.{name}", top) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    here = module_of(path)
    assert here in LEVEL, f"{here} has no place in the order of the package"
    for name, _ in imports(path):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if package == "snparam" and target and target != here and target in LEVEL:
            assert LEVEL[target] > LEVEL[here], f"{here} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_torch_is_needed_outside_the_extras_own_files(path: Path) -> None:
    if module_of(path) in EXTRAS:
        return
    allowed = {*sys.stdlib_module_names, "torch", "typing_extensions", "snparam"}
    outside = {name.split(".")[0] for name, top in imports(path) if top} - allowed
    assert not outside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 420
    assert ast.get_docstring(ast.parse(text))


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
