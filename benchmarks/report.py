"""Printing, recording and drawing what was measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import snparam
from snparam.tables import aligned

from .cases import Row, Setup

COMMAND = "python -m benchmarks --record"


def table(rows: Sequence[Row]) -> str:
    """An aligned table of ratios; bare times are in the JSON only."""
    header = ["case", "against", "ratio", "quartiles", "reach", ""]
    lines = [
        [
            row.case,
            row.against,
            f"{row.ratio:.2f}",
            f"{row.low:.2f} to {row.high:.2f}",
            (">= " if row.faster else "<= ") + f"{row.reach:.2f}",
            "met" if row.met else "short",
        ]
        for row in rows
    ]
    return aligned(header, lines)


def machine(setup: Setup) -> dict[str, str]:
    """What it ran on: kind of machine and versions, no names."""
    found = {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "snparam": snparam.__version__,
        "rounds": str(setup.rounds),
    }
    if setup.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    return found


def record(rows: Sequence[Row], setup: Setup, folder: Path) -> Path:
    """Write the table and the numbers behind it, one pair of files for each kind of machine."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "cuda" if setup.device == "cuda" else f"cpu-{torch.get_num_threads()}-threads"
    path = folder / f"{kind}.md"
    about = "\n".join(f"- {key}: {value}" for key, value in machine(setup).items())
    path.write_text(
        f"# {kind}\n\nMade by `{COMMAND}`. Ratios of times in the same rounds: medians over "
        "rounds, with quartiles.\nRows of added time are ratios of differences from the "
        f"unconverted model.\n\n{about}\n\n```text\n{table(rows)}\n```\n",
        encoding="utf-8",
    )
    data = {"machine": machine(setup), "rows": [asdict(row) for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} logical cores" if names else platform.processor()
