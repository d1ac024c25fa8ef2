"""`python -m benchmarks`: measure, print the table, and, if asked, record it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import report
from .cases import CASES, Setup

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Ratios of snparam's cost to its peers', measured in the same run.",
    )
    parser.add_argument("--only", choices=CASES, nargs="+", help="some of the cases")
    parser.add_argument("--rounds", type=int, default=41, help="interleaved rounds (default 41)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where --record writes")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda times with events; this command has not been run on a CUDA device yet",
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    setup = Setup(options.device, options.rounds, options.quick)
    rows = []
    for name in options.only or CASES:
        for row in CASES[name](setup):
            rows.append(row)
            print(f"{row.case}: {row.ratio:.2f}", flush=True)
    print()
    print("\n".join(f"{key}: {value}" for key, value in report.machine(setup).items()))
    print()
    print(report.table(rows))
    if options.record:
        from . import curves

        path = report.record(rows, setup, options.results)
        curves.draw(setup, path.with_suffix(".png"))
        print(f"\nrecorded in {path.name}, {path.stem}.json and {path.stem}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
