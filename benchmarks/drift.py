"""Drift and cost of the estimators while a second singular value overtakes the first.

Drift is how far the norm of the weight in use is from 1. The classic step keeps its vectors in
order, so that it finds a singular value that overtakes the first late, or not at all, however many
it tracks. Rayleigh-Ritz rotates the vectors, and finds it at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import snparam
from benchmarks import models, work
from benchmarks.rows import Row, Setup

from .timing import Spread

ESTIMATED_BY = ("power", "rayleigh-ritz")
COUNTS = (1, 2, 4)
REACH = {("rayleigh-ritz", 2): 1e-3}


def rows(setup: Setup) -> Iterator[Row]:
    """Yield rows of each estimator's worst drift, and of its step's time over a classic step's."""
    steps, changing, shape = 100, (64, 48), (4096, 1024)
    if setup.quick:
        steps, changing, shape = 10, (16, 12), (20, 12)
    matrices = list(overtaking(*changing, steps, setup.device))
    (matrix,) = work.matrices_of([models.layer(shape).to(setup.device)])
    settings = [(sigma, count) for sigma in ESTIMATED_BY for count in COUNTS]
    runs = {_name(*each): work.move(matrix, *each) for each in settings}
    times, classic = setup.times(runs), _name("power", 1)
    for each in settings:
        name = _name(*each)
        worst = worst_drift(matrices, *each)
        medians = {name: times.median(name), classic: times.median(classic)}
        spread, reach = Spread(worst, worst, worst), REACH.get(each)
        case, size = f"worst drift in {steps} steps, {name}", f"{changing[0]}x{changing[1]}"
        yield Row(case, f"exact norm of {size}", spread, reach, False, medians)
        if name == classic:
            continue
        ratio = times.ratio(name, classic)
        case = f"time of a step, {name}, {shape[0]}x{shape[1]}"
        yield Row(case, f"the same, {classic}", ratio, None, False, medians)


def overtaking(rows: int, columns: int, steps: int, device: str) -> Iterator[Tensor]:
    """Yield matrices whose second singular value overtakes the first halfway.

    All have the same singular vectors. The first singular value is 1, the second grows from 0.8 to
    1.2, and the others are below 0.6.
    """
    generator = torch.Generator().manual_seed(0)
    draws = [
        torch.randn(size, columns, dtype=torch.float64, generator=generator)
        for size in (rows, columns)
    ]
    left, right = (torch.linalg.qr(draw)[0] for draw in draws)
    for step in range(steps):
        values = torch.linspace(0.6, 0.1, columns, dtype=torch.float64)
        values[0], values[1] = 1.0, 0.8 + 0.4 * step / (steps - 1)
        yield ((left * values) @ right.T).float().to(device)


def worst_drift(matrices: list[Tensor], sigma: str, num_svs: int) -> float:
    """Return the largest |σ − 1| of the weight in use, over one training forward per matrix.

    Args:
        matrices: values (m, n) that the original takes, one after another.
        sigma: name of the estimator.
        num_svs: how many singular values it tracks.
    """
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(matrices[0].clone())
    original = layer.weight
    snparam.register_sn(layer, num_svs=num_svs, sigma=sigma)
    worst = 0.0
    for matrix in matrices:
        with torch.no_grad():
            original.copy_(matrix)
        norm = torch.linalg.matrix_norm(layer.weight.detach().double().cpu(), 2)
        worst = max(worst, abs(float(norm) - 1))
    return worst


def _name(sigma: str, count: int) -> str:
    return f"sigma='{sigma}', num_svs={count}"
