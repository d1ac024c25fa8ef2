"""The report of a run: its rows as a table, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import snparam
from benchmarks.rows import Row, Setup
from snparam.conversion.tables import aligned_table

_HEADER = ["case", "against", "reach", "ratio", "quartiles", ""]


def table(rows: Sequence[Row]) -> str:
    """Return an aligned table of ratios; bare times are in the JSON alone."""
    return aligned_table(_HEADER, [_cells(row) for row in rows])


def notes(rows: Sequence[Row]) -> str:
    """Return what the rows have checked besides, one line per check."""
    return "\n".join(f"{row.case}: {row.note}" for row in rows if row.note)


def on_and_off(rows: Sequence[Row]) -> str:
    """Return an aligned table of speed-ups: milliseconds with and without each, and their ratio."""
    lines = []
    for row in rows:
        on, off = (f"{row.medians[which] * 1e3:.3g} ms" for which in ("on", "off"))
        lines.append([row.case, on, off, *_cells(row)[3:5]])
    return aligned_table(["case", "on", "off", "off / on", "quartiles"], lines)


def line(row: Row) -> str:
    """Return a row as one line of text."""
    _, against, reach, ratio, quartiles, verdict = _cells(row)
    wanted = f"; {reach} wanted: {verdict}" if verdict else ""
    return f"{row.case}, against {against}: {ratio} [{quartiles}]{wanted}"


def _cells(row: Row) -> list[str]:
    sign = ">=" if row.faster else "<="
    return [
        row.case,
        row.against,
        "" if row.reach is None else f"{sign} {_number(row.reach)}",
        _number(row.ratio.median),
        f"{_number(row.ratio.low)} to {_number(row.ratio.high)}",
        row.verdict,
    ]


def _number(value: float) -> str:
    if math.isnan(value):
        return "?"
    if 0 < abs(value) < 0.01:
        return f"{value:.0e}"
    # Targets close to 1, such as 1.02, are percents over the peer.
    return f"{value:.3f}" if 0.9 < value < 1.1 else f"{value:.2f}"


def machine(setup: Setup) -> dict[str, str]:
    """Return the kind of machine and the versions of a run, without host names and paths."""
    found = {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "snparam": snparam.__version__,
        "rounds": str(setup.rounds),
    }
    if setup.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def kind(setup: Setup) -> str:
    """Return the stem of the files that hold the results of this kind of machine."""
    if setup.device == "cuda":
        return f"cuda-{_slug(torch.cuda.get_device_name())}"
    processor = _slug(_processor_name()) or "unknown"
    return f"cpu-{processor}-{torch.get_num_threads()}-threads"


def _slug(name: str) -> str:
    """Return a product's name as a part of a file name, without signs and generic words."""
    name = name.lower().replace("(r)", " ").replace("(tm)", " ")
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return "-".join(word for word in words if word not in ("cpu", "processor"))


def as_data(rows: Sequence[Row], setup: Setup, command: str) -> dict[str, Any]:
    """Return everything that was measured, with bare medians, for JSON."""
    return {
        "command": command,
        "machine": machine(setup),
        "rows": [
            {
                "case": row.case,
                "against": row.against,
                "ratio": _or_none(row.ratio.median),
                "quartiles": [_or_none(row.ratio.low), _or_none(row.ratio.high)],
                "reach": row.reach,
                "faster": row.faster,
                "verdict": row.verdict,
                "unit": row.unit,
                "medians": row.medians,
                "note": row.note,
            }
            for row in rows
        ],
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write what `as_data` returns to a file, whose folder is made where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_markdown(
    path: Path, rows: Sequence[Row], setup: Setup, command: str, ablated: bool = False
) -> None:
    """Write the table to a file, with the machine and the command that made it."""
    about = _ABOUT_SPEED_UPS if ablated else _ABOUT_RATIOS
    write_page(path, setup, command, about, table(rows), notes(rows))


def write_page(
    path: Path,
    setup: Setup,
    command: str,
    about: str,
    results: str,
    checked: str = "",
    picture: str = "",
) -> None:
    """Write results to a Markdown file, with the machine and the command that made them.

    Args:
        path: the file, beside the one with the suffix .json that has all numbers.
        setup: the settings of the run.
        command: the command as it was given.
        about: what the numbers are.
        results: an aligned table.
        checked: what was found besides, one line for each check.
        picture: name of a picture in the same folder.
    """
    kind_of_machine = "\n".join(f"- {key}: {value}" for key, value in machine(setup).items())
    parts = [
        f"# {path.stem}",
        f"Made by `{command}`.",
        f"{about} Medians of each are in\n[{path.stem}.json]({path.stem}.json).",
        kind_of_machine,
    ]
    parts += [f"![Tightness against cost]({picture})"] if picture else []
    parts.append(f"```text\n{results}\n```")
    parts += [f"Checked in the same run:\n\n```text\n{checked}\n```"] if checked else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


_ABOUT_RATIOS = """\
Ratios of costs in the same rounds, medians over rounds with their quartiles. `>=`: the other's time
by snparam's. `<=`: snparam's by the other's. Rows of added time or memory divide differences from
the unconverted model. Rows without a target are for looking.\
"""

_ABOUT_SPEED_UPS = """\
The time without each speed-up by the time with it, in the same rounds: medians over rounds with
their quartiles. A speed-up that earns nothing in any row is to be deleted.\
"""


def _processor() -> str:
    return f"{_processor_name()}, {os.cpu_count()} logical cores"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor()
