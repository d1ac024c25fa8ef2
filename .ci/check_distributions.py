"""Check that the wheel and the source distribution in a directory have the files of the tree."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Folders that the tests and builds from source need besides the package.
BESIDE = ["tests", "benchmarks", "docs", "examples", ".ci"]
SINGLE = ["README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "pyproject.toml"]


def files(*directories: str) -> set[str]:
    """Return the paths, from the root of the tree, of all files in some of its directories."""
    found = (path for directory in directories for path in (ROOT / directory).rglob("*"))
    return {
        path.relative_to(ROOT).as_posix()
        for path in found
        if path.is_file() and not any(part.endswith("cache__") for part in path.parts)
    }


def only(directory: Path, pattern: str) -> Path:
    """Return the only file in a directory that matches a pattern.

    Raises:
        ValueError: if none or several match.
    """
    (found,) = directory.glob(pattern)
    return found


def main(directory: Path) -> str | None:
    """Return which files the distributions lack or have in excess, in words, or None."""
    package = files("snparam")
    if "snparam/py.typed" not in package:
        return "the tree has no snparam/py.typed"
    with zipfile.ZipFile(only(directory, "*.whl")) as wheel:
        built = {path for path in wheel.namelist() if ".dist-info/" not in path}
    with tarfile.open(only(directory, "*.tar.gz")) as source:
        sources = {path.partition("/")[2] for path in source.getnames()}
    problems = {
        "the wheel lacks": package - built,
        "the wheel has beside the package": built - package,
        "the source distribution lacks": package.union(files(*BESIDE), SINGLE) - sources,
    }
    lines = [f"{what} {', '.join(sorted(paths))}" for what, paths in problems.items() if paths]
    return "\n".join(lines) or None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
