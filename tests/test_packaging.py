"""What the distribution promises: torch alone at run time, its types, and pins that were met."""

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    return [Requirement(text) for text in importlib.metadata.requires("snparam") or []]


def test_torch_is_the_only_runtime_dependency():
    assert [r.name for r in requirements() if r.marker is None] == ["torch"]


def test_the_core_works_where_no_extra_is_installed(tmp_path):
    code = """
import sys, warnings
for name in ("hypothesis", "matplotlib", "numpy", "rich", "scipy", "sklearn", "tqdm",
             "transformers", "safetensors"):
    sys.modules[name] = None  # import raises ImportError
warnings.simplefilter("ignore")  # torch's own, about numpy
import torch, snparam
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Conv2d(4, 4, 3))
print(snparam.plan_conversion(model))
snparam.convert_model(model)
print(snparam.verify(model))
snparam.restore_model(model)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_ships_its_types():
    assert (importlib.resources.files("snparam") / "py.typed").is_file()


def test_every_direct_dependency_is_pinned_to_a_version_its_range_allows():
    direct = [r for r in requirements() if r.name != "snparam"]
    assert len(direct) > 8
    for requirement in direct:
        assert requirement.name in pins()
        assert requirement.specifier.contains(pins()[requirement.name]), requirement


def test_the_changelog_has_a_section_for_this_version_or_for_what_is_unreleased():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert headings[0] in ("Unreleased", importlib.metadata.version("snparam"))


def test_the_floor_of_torch_is_the_lowest_release_that_passed():
    """`.ci/versions` prints the rows of the table."""
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    passed = [Version(torch) for _, torch, result in rows[2:] if result.startswith("passed")]
    (torch,) = (r for r in requirements() if r.name == "torch" and r.marker is None)
    assert str(torch.specifier) == f">={min(passed).major}.{min(passed).minor}"
    assert max(passed) >= Version(pins()["torch"])
