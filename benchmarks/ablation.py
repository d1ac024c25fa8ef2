"""The ablation of snparam's speed-ups: the time of each case with a speed-up on and off.

A speed-up that earns nothing in any row is to be deleted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import snparam
from benchmarks import models, peers, work
from benchmarks.cases import (
    COUNT,
    PASSES,
    Shape,
    by,
    iterations,
    layers_of,
    matrices_of,
    networks_of,
)
from benchmarks.rows import Row, Setup
from snparam.constraints import division
from snparam.estimators import convergence
from snparam.matrices import products
from snparam.matrices.orthonormalisation import reads_freely
from snparam.parametrization import update
from snparam.parametrization.linear_maps import can_use_linear_map

from .peers import OURS

ON, OFF = "on", "off"

# A threshold above the size of any tensor, so that what depends on it never happens.
_NEVER = 1 << 62

# What turns a speed-up off or on: modules, names of their attributes, and the values to set.
Values = list[tuple[Any, str, Any]]

# Cases, each with its name and a function that makes its work, called once for on, once for off.
Cases = Iterator[tuple[str, Callable[[], work.Work]]]


@dataclass(frozen=True)
class SpeedUp:
    """A speed-up of snparam and the cases that should show what it earns.

    Attributes:
        name: what the speed-up does.
        off: function that returns the values which turn it off.
        cases: function that yields the cases of a setup.
        fewer: factor by which cases with long work have fewer rounds.
        cpu_only: whether it does nothing on other devices.
    """

    name: str
    off: Callable[[], Values]
    cases: Callable[[Setup], Cases]
    fewer: int = 1
    cpu_only: bool = False


def rows(setup: Setup) -> Iterator[Row]:
    """Yield a row per speed-up and case: the time without the speed-up over the time with it."""
    for speed_up in SPEED_UPS:
        if speed_up.cpu_only and setup.device != "cpu":
            continue
        off = speed_up.off()
        on = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in off]
        for case, make in speed_up.cases(setup):
            runs = {ON: under(on, make()), OFF: under(off, make())}
            times = setup.times(runs, speed_up.fewer, warm_up=2)
            ratio, medians = times.ratio(OFF, ON), times.medians()
            yield Row(f"{speed_up.name}: {case}", "without it", ratio, None, True, medians)


def under(values: Values, run: work.Work) -> work.Work:
    """Return work that sets values, runs, and puts the earlier values back.

    Setting costs the same whatever the values are, so that on and off compare.
    """

    def under_values() -> None:
        before = [getattr(module, attribute) for module, attribute, _ in values]
        for module, attribute, value in values:
            setattr(module, attribute, value)
        try:
            run()
        finally:
            for (module, attribute, _), value in zip(values, before, strict=True):
                setattr(module, attribute, value)

    return under_values


def _wherever_imported(function: Any) -> Values:
    """Return values that replace a predicate by one that is always False.

    Each module of snparam that has imported the predicate has a name of it to replace.
    """
    return [
        (module, name, lambda *_: False)
        for key, module in sorted(sys.modules.items())
        if key.startswith("snparam.")
        for name, value in vars(module).items()
        if value is function
    ]


def _reads(setup: Setup) -> Cases:
    for shape in layers_of(setup):
        yield f"read + backward, {by(shape)}", partial(_read, setup, shape)


def _reads_and_rotations(setup: Setup) -> Cases:
    yield from _reads(setup)
    for shape in matrices_of(setup):
        case = f"iteration, sigma='rayleigh-ritz', num_svs={COUNT}, {by(shape)}"
        yield case, partial(_rotation, setup, shape)


def _reads_of_blocks(setup: Setup) -> Cases:
    yield from _reads(setup)
    for shape in matrices_of(setup):
        case = f"read + backward, blocks=4, {by(shape)}"
        yield case, partial(_read, setup, shape, blocks=4)


def _iterations(setup: Setup) -> Cases:
    for shape in matrices_of(setup):
        yield f"iteration, num_svs={COUNT}, {by(shape)}", partial(_iteration, setup, shape)


def _training_steps(setup: Setup) -> Cases:
    for name, (make, shape) in networks_of(setup).items():
        step = partial(_training_step, setup, make(), shape, 1)
        yield f"training step, {name}", step


def _updates(setup: Setup) -> Cases:
    """Yield the cases of training steps with `update="step"`, and of the update alone.

    The networks have weights that are small enough for their states to be moved together.
    """
    name = "tiny" if setup.quick else "ResNet-50"
    make, shape = networks_of(setup)[name]
    depth, width = (2, 8) if setup.quick else (32, 64)
    small = models.stack(depth, width)
    for who, network, inputs in [(name, make(), shape), (f"{depth} x {width}", small, (8, width))]:
        step = partial(_training_step, setup, network, inputs, PASSES, update="step")
        yield f"update='step', {PASSES} passes, {who}", step
        yield f"update(model), {who}", partial(_update, setup, network)


def _conversion(setup: Setup) -> Cases:
    name = "tiny" if setup.quick else "ResNet-50"
    source = networks_of(setup)[name].make().to(setup.device)
    yield f"converting {name}", partial(work.conversion, source)


def _read(setup: Setup, shape: Shape, **options: Any) -> work.Work:
    layer = peers.ours(**options)(models.layer(shape).to(setup.device))
    return work.read_and_backward(layer, torch.randn(shape, device=setup.device))


def _iteration(setup: Setup, shape: Shape) -> work.Work:
    (matrix,) = work.matrices_of([models.layer(shape).to(setup.device)])
    return iterations(matrix, COUNT)[OURS]


def _rotation(setup: Setup, shape: Shape) -> work.Work:
    (matrix,) = work.matrices_of([models.layer(shape).to(setup.device)])
    return work.move(matrix, "rayleigh-ritz", COUNT)


def _training_step(
    setup: Setup, network: nn.Module, shape: Shape, passes: int, **options: Any
) -> work.Work:
    model = peers.ours(**options)(network.to(setup.device))
    return work.training_step(model, torch.randn(shape, device=setup.device), passes)


def _update(setup: Setup, network: nn.Module) -> work.Work:
    return partial(snparam.update, peers.ours(update="step")(network.to(setup.device)))


SPEED_UPS = [
    SpeedUp("σ at the linear map", lambda: _wherever_imported(can_use_linear_map), _training_steps),
    SpeedUp(
        "numbers read on a CPU",
        lambda: _wherever_imported(reads_freely),
        _reads_and_rotations,
        cpu_only=True,
    ),
    SpeedUp(
        "blocks multiplied one by one",
        lambda: [(division, "_FEW_BLOCKS", 0)],
        _reads_of_blocks,
        cpu_only=True,
    ),
    SpeedUp("small products without views", lambda: [(products, "_MAX_SMALL_ENTRIES", 0)], _reads),
    SpeedUp("W Vᵀ for many vectors", lambda: [(products, "_MANY_PRODUCTS", _NEVER)], _iterations),
    SpeedUp(
        "U W parted among threads",
        lambda: [(products, "_MIN_BANDED_ENTRIES", _NEVER)],
        _iterations,
        cpu_only=True,
    ),
    SpeedUp(
        "small states moved together",
        lambda: [(update, "_STACKED_ENTRIES", {}), (update, "_OTHER_STACKED_ENTRIES", 0)],
        _updates,
        fewer=2,
    ),
    SpeedUp(
        "block Lanczos at conversion",
        lambda: [(convergence, "_FULL_DECOMPOSITION", _NEVER)],
        _conversion,
        fewer=8,
    ),
]
