"""The command `python -m benchmarks`, which measures, prints the table, and records it if asked."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import ablation, picture, report, tightness
from benchmarks.rows import Row, Setup

from .cases import CASES

RESULTS = Path(__file__).parent / "results"
ROUNDS = 41

# What the names of recorded files end in, for what is measured instead of the cases.
ABLATION, TIGHTNESS = "-ablation", "-tightness"

# Seconds after which a row begins no further round. On an accelerator most rows take milliseconds,
# but the few that wait for its decompositions would alone take the eight minutes that the whole
# command, with the tests for accelerators, is to fit into.
MOST_SECONDS = {"cuda": 8.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, 0 whether or not targets are reached."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    _check(options, parser)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    setup = Setup(
        options.device,
        options.rounds or (1 if options.quick else ROUNDS),
        options.quick,
        MOST_SECONDS.get(options.device, math.inf),
    )
    if options.tightness:
        return _measure_tightness(options, setup)
    rows = []
    for measure in [ablation.rows] if options.ablate else _chosen(options):
        for row in measure(setup):
            rows.append(row)
            print(report.line(row), flush=True)
    print()
    print("\n".join(f"{key}: {value}" for key, value in report.machine(setup).items()))
    print()
    print(report.on_and_off(rows) if options.ablate else report.table(rows))
    if report.notes(rows):
        print()
        print(report.notes(rows))
    command = _command(options)
    data = report.as_data(rows, setup, command)
    name = report.kind(setup) + (ABLATION if options.ablate else "")
    written: list[Path] = []
    if options.record:
        written += [options.results / f"{name}.md", options.results / f"{name}.json"]
        report.write_markdown(written[0], rows, setup, command, options.ablate)
        report.write_json(written[1], data)
    _finish(options, data, written)
    return 0


def _measure_tightness(options: argparse.Namespace, setup: Setup) -> int:
    """Measure, print and perhaps record tightness against cost, and return the exit status."""
    found = []
    for point in tightness.points(setup):
        found.append(point)
        print(tightness.line(point), flush=True)
    print()
    print("\n".join(f"{key}: {value}" for key, value in report.machine(setup).items()))
    for text in (tightness.table(found), tightness.notes(found)):
        print()
        print(text)
    command = _command(options)
    data = tightness.as_data(found, setup, command)
    written: list[Path] = []
    if options.record:
        stem = options.results / f"{report.kind(setup)}{TIGHTNESS}"
        written += [stem.with_name(stem.name + suffix) for suffix in (".md", ".json", ".png")]
        tightness.write_markdown(written[0], found, setup, command)
        report.write_json(written[1], data)
        picture.draw(found).savefig(written[2], dpi=110)
    _finish(options, data, written)
    return 0


def _finish(options: argparse.Namespace, data: Any, written: list[Path]) -> None:
    """Write the numbers to the file of `--json`, if there is one, and say what was written."""
    if options.json:
        report.write_json(options.json, data)
        written.append(options.json)
    for path in written:
        print(f"wrote {path}")


def _chosen(options: argparse.Namespace) -> list[Callable[[Setup], Iterator[Row]]]:
    return [CASES[name] for name in options.only or CASES]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(
            "Ratios of snparam's cost to that of torch's spectral norm, of BigGAN's "
            "vector-by-vector iteration and of the unconverted model, measured in the same run "
            "with interleaved rounds. To be run on a machine that does nothing else."
        ),
    )
    parser.add_argument("--only", choices=CASES, nargs="+", metavar="CASE", help=_cases())
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="instead, measure each of snparam's speed-ups on and off",
    )
    parser.add_argument(
        "--tightness",
        action="store_true",
        help=(
            "instead, measure how near each estimate and bound comes to the norm, and in what "
            "time (needs scikit-learn; with --record matplotlib)"
        ),
    )
    parser.add_argument(
        "--rounds",
        type=_positive_int,
        metavar="N",
        help=f"interleaved rounds (default {ROUNDS}; long work takes a half to an eighth of them)",
    )
    parser.add_argument(
        "--threads", type=_positive_int, metavar="N", help="threads of torch (default: its own)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=_devices())
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes and one round, to see that it runs"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers there")
    parser.add_argument(
        "--record", action="store_true", help="write table and numbers to --results"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="where --record writes (default: benchmarks/results)",
    )
    return parser


def _devices() -> str:
    """Return the help of `--device`, with the machines that results are recorded for."""
    recorded = sorted(
        path.stem
        for path in RESULTS.glob("*.json")
        if not path.stem.endswith((ABLATION, TIGHTNESS))
    )
    found = ", ".join(recorded) or "none"
    unseen = "" if any(name.startswith("cuda") for name in recorded) else "; on no CUDA device yet"
    return f"cuda times with events; results exist for {found}{unseen}"


def _cases() -> str:
    return "some of the cases: " + ", ".join(CASES)


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options that cannot be carried out, before minutes of measuring."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if options.ablate and options.only:
        parser.error("--ablate measures speed-ups, each in its own cases; leave out --only")
    if options.tightness and (options.only or options.ablate):
        parser.error("--tightness measures weights of its own; leave out --only and --ablate")
    needed = {"sklearn": options.tightness, "matplotlib": options.tightness and options.record}
    for module, is_needed in needed.items():
        if is_needed and find_spec(module) is None:
            parser.error(f"--tightness needs {module}, which the extra 'demo' installs")
    if options.record and options.only:
        parser.error("--record writes the whole table; leave out --only, or use --json")
    if options.record and options.quick and options.results == RESULTS:
        parser.error("--record with --quick would overwrite results; give --results another folder")


def _command(options: argparse.Namespace) -> str:
    """Return the command as it was given, without its paths."""
    parts = ["python -m benchmarks"]
    parts += ["--only " + " ".join(options.only)] if options.only else []
    parts += ["--ablate"] if options.ablate else []
    parts += ["--tightness"] if options.tightness else []
    parts += [f"--rounds {options.rounds}"] if options.rounds else []
    parts += [f"--threads {options.threads}"] if options.threads else []
    parts += [f"--device {options.device}"] if options.device != "cpu" else []
    parts += ["--quick"] if options.quick else []
    parts += ["--record"] if options.record else []
    return " ".join(parts)


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
