"""The command line `python -m snparam`, which parses, calls and prints, and computes nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from snparam import __version__
from snparam.commands import demo

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m snparam`` with the given arguments and return its exit status.

    Args:
        argv: the arguments; those of the process where not given.

    Returns:
        0 if the demo ran and its checks passed, or if there was no command, and the help was
        printed; 1 if a check failed; 2 if the demo could not run (an extra is missing, or the
        output directory cannot be written).

    Raises:
        SystemExit: with status 2 for wrong arguments, 0 after ``--help`` and ``--version``.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return _demo(arguments)
    except (ImportError, OSError) as error:
        print(f"snparam: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m snparam",
        description="Spectral normalisation of any PyTorch network, as a parametrization.",
    )
    parser.add_argument("--version", action="version", version=f"snparam {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    command = commands.add_parser(
        "demo",
        help="convert, train, check and restore a vision transformer on real images",
        description=(
            "Builds a small vision transformer from transformers with random weights, converts it, "
            "trains it on scikit-learn's digits, restores it, and checks every claim it prints. "
            "Needs no network. Exits with 1 if a check fails."
        ),
    )
    command.add_argument(
        "--epochs",
        type=_positive_int,
        default=20,
        metavar="N",
        help="passes over the training images (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("snparam-demo"),
        metavar="DIR",
        help="where the two pictures go (default: ./%(default)s)",
    )
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the split, the weights and the order of the images (default: %(default)s)",
    )
    command.add_argument(
        "--quiet",
        action="store_true",
        help="no tables and no progress bar; only the checks and the files",
    )
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    result = demo.run(
        arguments.out, epochs=arguments.epochs, seed=arguments.seed, quiet=arguments.quiet
    )
    print("\nChecks")
    for check in result.checks:
        print(f"  {'ok    ' if check.passed else 'FAILED'}  {check.claim}: {check.measured}")
    print(f"\nTest accuracy: {result.accuracy:.1%} of {result.test_images} images")
    for picture in result.pictures:
        print(f"Wrote {picture}")
    return 0 if all(check.passed for check in result.checks) else 1


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number
