"""Tightness against cost: how near each estimate and bound comes to the norm, and in what time.

Tightness is an estimate or a bound divided by the true norm, below 1 for an estimate from below and
never below 1 for a bound. Cost is time divided by that of one Gram product in float64 of the same
weight, reshaped to a matrix, in the same rounds: what anything that decomposes has to take first.

Estimators start cold, from random vectors, as a state does with `init="random"`. In training they
start from where the last step has left them, which is nearer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import published_bounds, report
from benchmarks.rows import Setup
from benchmarks.weights import QUICK, Sizes, all_weights
from snparam.conversion.tables import aligned_table
from snparam.estimators.certified import certified_norm
from snparam.estimators.convergence import converged, exact_sigma
from snparam.estimators.convolution_bounds import convolution_bounds
from snparam.estimators.estimate import ESTIMATORS
from snparam.estimators.exact import Exact
from snparam.layers.convolutions import geometry_of
from snparam.matrices.convolutions import ConvolutionStack, ConvolutionView

from .timing import MOST_REPEATS, SHORTEST_SAMPLE, Spread

ESTIMATE, EXACT, BOUND, NONE = "estimate", "exact", "bound", "no promise"
GRAM = "Gram product"

# Steps of the estimators, and vectors that Rayleigh-Ritz iterates with.
STEPS = (1, 10)
VECTORS = 4

# Points along each axis at which the symbol is decomposed to find its supremum. That is at most
# 1 / cos(π/48)² = 1.0043 times the largest of them; the refinement around it leaves rounding.
GRID = 48


@dataclass(frozen=True)
class Method:
    """A way to find a norm.

    Attributes:
        family: what the method is, the same for all its settings.
        setting: how far it goes, or "".
        norm_of: of which map its number is the norm, or is meant to be.
        kind: whether it is an estimate from below, exact, a bound, or none of these.
        run: function that returns the number.
    """

    family: str
    setting: str
    norm_of: str
    kind: str
    run: Callable[[], float]

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.family, self.setting) if part)


@dataclass(frozen=True)
class Point:
    """What one method gave for one weight, and what that cost.

    Attributes:
        weights: the kind of weight.
        shape: the shape of the weight.
        norm_of: which norm the number is compared with.
        family: the method.
        setting: how far it goes, or "".
        kind: whether it is an estimate, exact, a bound, or none of these.
        tightness: the number over the true norm.
        cost: time over that of a Gram product in the same round.
        seconds: median time.
    """

    weights: str
    shape: tuple[int, ...]
    norm_of: str
    family: str
    setting: str
    kind: str
    tightness: float
    cost: Spread
    seconds: float

    @property
    def method(self) -> str:
        return ", ".join(part for part in (self.family, self.setting) if part)


def points(setup: Setup) -> Iterator[Point]:
    """Yield the points of each kind of weight, for its matrix and for its convolution."""
    sizes = QUICK if setup.quick else Sizes()
    for name, make in all_weights(sizes).items():
        matrix, kernel = (weight.to(setup.device) for weight in make())
        norms = {"matrix": _matrix_norm(matrix)}
        yield from _measured(setup, name, matrix, norms, matrix_methods(matrix))
        size = (5, 5) if setup.quick else (12, 12)
        norms = {_at(size): _norm_at(kernel, size), EVERY_SIZE: supremum(kernel)}
        yield from _measured(setup, name, kernel, norms, convolution_methods(kernel, size))


EVERY_SIZE = "convolution, every size"


def _at(size: Sequence[int]) -> str:
    return "convolution, " + "x".join(map(str, size))


def _measured(
    setup: Setup,
    weights: str,
    weight: Tensor,
    norms: Mapping[str, float],
    methods: Sequence[Method],
) -> Iterator[Point]:
    """Yield the point of each method, all timed in the same rounds as the Gram product."""
    runs: dict[str, Callable[[], object]] = {method.name: method.run for method in methods}
    runs[GRAM] = _gram_product(weight)
    counts = {name: _repeats(run) for name, run in runs.items()}
    works = {name: _repeated(run, counts[name]) for name, run in runs.items()}
    times = setup.times(works, fewer=8, warm_up=0)
    for method in methods:
        per_call = counts[GRAM] / counts[method.name]
        ratio = times.ratio(method.name, GRAM)
        yield Point(
            weights,
            tuple(weight.shape),
            method.norm_of,
            method.family,
            method.setting,
            method.kind,
            method.run() / norms[method.norm_of],
            Spread(*(value * per_call for value in ratio)),
            times.median(method.name) / counts[method.name],
        )


def _repeats(run: Callable[[], object]) -> int:
    """Return how many calls last as long as a sample has to, after a first one to warm up.

    Contenders take from microseconds to seconds. Each is repeated as often as it needs by itself,
    and not all of them as often as the shortest.
    """
    run()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return min(MOST_REPEATS, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9)))


def _repeated(run: Callable[[], object], count: int) -> Callable[[], object]:
    def run_repeatedly() -> None:
        for _ in range(count):
            run()

    return run_repeatedly


def _gram_product(weight: Tensor) -> Callable[[], object]:
    """Return work that multiplies the weight as a matrix by its transpose, in float64.

    It ends in a number, as all contenders do, for which a device has to be waited for.
    """
    matrix = weight.flatten(1)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T

    def run() -> float:
        wide = tall.double()
        return float((wide.T @ wide)[0, 0])

    return run


def matrix_methods(matrix: Tensor) -> list[Method]:
    """Return the ways to find the norm of a matrix (m, n)."""
    stack = matrix[None]

    def method(family: str, setting: str, kind: str, run: Callable[[], Any]) -> Method:
        return Method(family, setting, "matrix", kind, lambda: float(run()))

    found = [
        method(f'sigma="{sigma}"', _steps(steps), ESTIMATE, _estimated(stack, sigma, count, steps))
        for sigma, count in (("power", 1), ("rayleigh-ritz", VECTORS))
        for steps in STEPS
    ]
    start = torch.zeros(1, 1, len(matrix), device=matrix.device)
    found += [
        method("start of a conversion", "", ESTIMATE, lambda: converged(stack, 1)[1]),
        method('sigma="exact"', "", EXACT, lambda: Exact().read(stack, start, 0.0).sv),
        method("float64 svdvals", "", EXACT, lambda: torch.linalg.svdvals(matrix.double())[0]),
        method("certified bound", "", BOUND, lambda: certified_norm(stack)),
    ]
    found += [
        method(
            "Gram iteration (Delattre 2023)",
            _steps(steps),
            BOUND,
            lambda steps=steps: published_bounds.gram_iteration(matrix, steps),
        )
        for steps in (2, 5, 10)
    ]
    return found


def _steps(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def _estimated(stack: Any, sigma: str, count: int, steps: int) -> Callable[[], Tensor]:
    """Return a function that takes steps of an estimator from a random u."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, count, stack.shape[1], generator=generator)
    u = torch.linalg.qr(u.mT)[0].mT.contiguous().to(stack.device)
    return lambda: ESTIMATORS[sigma].move([stack], [u], steps, 0.0)[0].sv[0, 0]


def convolution_methods(kernel: Tensor, size: tuple[int, ...]) -> list[Method]:
    """Return the ways to find the norm of a convolution with zeros as padding.

    Args:
        kernel: (o, i, k, k).
        size: the spatial size of the input at which the norm at one size is found.
    """
    layer = _layer(kernel)
    geometry = geometry_of(layer)
    assert geometry is not None
    stack = ConvolutionStack(kernel, ConvolutionView(tuple(kernel.shape), geometry, size))
    reshaped = kernel.flatten(1)[None]

    def at_size(family: str, setting: str, kind: str, run: Callable[[], Any]) -> Method:
        return Method(family, setting, _at(size), kind, lambda: float(run()))

    def for_every(family: str, setting: str, kind: str, run: Callable[[], Any]) -> Method:
        return Method(family, setting, EVERY_SIZE, kind, lambda: float(run()))

    def bound(size: tuple[int, ...] | None, tightness: float) -> Callable[[], float]:
        return lambda: convolution_bounds(kernel, geometry, size, tightness).upper

    found = [for_every("σ of the reshaped weight", "", NONE, lambda: exact_sigma(reshaped)[0])]
    found += [
        at_size('norm="operator", power', _steps(steps), ESTIMATE, run)
        for steps in STEPS
        for run in [_estimated(stack, "power", 1, steps)]
    ]
    found += [
        at_size('norm="operator", start', "", ESTIMATE, lambda: converged(stack, 1)[1]),
        at_size("certified bound at the size", "", BOUND, bound(size, 1.05)),
    ]
    found += [
        for_every("certified bound", f"tightness {tightness}", BOUND, bound(None, tightness))
        for tightness in (1.05, 1.01)
    ]
    found.append(
        for_every(
            "four reshapings (Singla, Feizi 2021)",
            "",
            BOUND,
            lambda: published_bounds.four_reshapings(kernel),
        )
    )
    found += [
        for_every(
            "Gram iteration on frequencies (Delattre 2023)",
            f"{grid}x{grid}, {_steps(steps)}",
            BOUND,
            lambda grid=grid, steps=steps: published_bounds.gram_iteration_on_frequencies(
                kernel, steps, grid
            ),
        )
        for grid, steps in ((16, 5), (32, 6))
    ]
    found += [
        for_every(
            "Gram iteration on kernels (Delattre 2024)",
            _steps(steps),
            BOUND,
            lambda steps=steps: published_bounds.gram_iteration_on_kernels(kernel, steps),
        )
        for steps in (1, 2, 3)
    ]
    return found + [
        for_every(name, "", kind, run) for name, (kind, run) in installed_peers(layer).items()
    ]


def _layer(kernel: Tensor) -> nn.Conv2d:
    """Return the convolution with a kernel of odd size, padded by zeros to keep the size."""
    outputs, inputs, *taps = kernel.shape
    layer = nn.Conv2d(inputs, outputs, taps, padding=[k // 2 for k in taps], bias=False)
    layer.weight = nn.Parameter(kernel, requires_grad=False)
    return layer


def installed_peers(layer: nn.Conv2d) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Return the numbers of the peers that are installed, by name; see `missing_peers`."""
    peers: dict[str, tuple[str, Callable[[], Any]]] = {}
    missing = missing_peers()
    if ORTHOGONIUM not in missing:
        from orthogonium.layers.conv.singular_values import get_conv_sv

        peers["orthogonium, get_conv_sv"] = (
            BOUND,
            lambda: get_conv_sv(layer, n_iter=3, return_stab_rank=False),
        )
    if TORCHLIP not in missing:
        from deel.torchlip.normalizers import spectral_normalization
        from deel.torchlip.utils.lconv_norm import compute_lconv_coef

        # What its convolutions divide by: σ of the reshaped weight, and a factor for the taps.
        factor = float(compute_lconv_coef(layer.kernel_size))
        columns = layer.weight[0].numel()
        u = torch.randn(1, columns, generator=torch.Generator().manual_seed(0))
        u = nn.functional.normalize(u).to(layer.weight.device)
        peers["deel-torchlip, spectral_normalization"] = (
            NONE,
            lambda: spectral_normalization(layer.weight.flatten(1), u)[2] / factor,
        )
    return peers


ORTHOGONIUM, TORCHLIP = "orthogonium", "deel-torchlip"
_PACKAGES = {ORTHOGONIUM: "orthogonium", TORCHLIP: "deel"}


def missing_peers() -> list[str]:
    """Return the names of the peers that are not installed here."""
    return [name for name, package in _PACKAGES.items() if find_spec(package) is None]


# The true norms


def _matrix_norm(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.double())[0])


def _norm_at(kernel: Tensor, size: tuple[int, ...]) -> float:
    """Return the norm of the convolution with zeros as padding at a size.

    The convolution is decomposed if it is small, and otherwise approached from below by Lanczos in
    float64, whose residual of 1e-8 leaves a relative error of the square of that over the gap.
    """
    geometry = geometry_of(_layer(kernel))
    assert geometry is not None
    view = ConvolutionView(tuple(kernel.shape), geometry, size)
    stack = ConvolutionStack(kernel.double(), view)
    if stack.is_small:
        return _matrix_norm(stack.to_dense()[0])
    return float(converged(stack, 1, tolerance=1e-8)[1])


def supremum(kernel: Tensor, grid: int = GRID) -> float:
    """Return the supremum over all frequencies of the norm of the symbol of a kernel (o, i, k, k).

    It is the norm of the convolution on inputs without end, and the limit of those at all sizes.
    The symbol is decomposed on a grid, and then on finer ones around each of the best five points.
    """
    kernel = kernel.double()
    axis = torch.arange(grid, dtype=torch.float64) * (2 * math.pi / grid)
    half = axis[: grid // 2 + 1]  # at −ω the symbol is conjugate
    frequencies = torch.cartesian_prod(half, axis)
    values = torch.cat([_symbol_norms(kernel, part) for part in torch.split(frequencies, 256)])
    best = 0.0
    for centre in frequencies[values.topk(5).indices.cpu()]:
        width, point = 2 * math.pi / grid, centre
        around = torch.cartesian_prod(*[torch.linspace(-1, 1, 5, dtype=torch.float64)] * 2)
        for _ in range(24):
            candidates = point + width * around
            norms = _symbol_norms(kernel, candidates)
            point, width = candidates[int(norms.argmax())], width / 2
            best = max(best, float(norms.max()))
    return best


def _symbol_norms(kernel: Tensor, frequencies: Tensor) -> Tensor:
    """Return the norms (f,) of the symbol at frequencies (f, 2)."""
    height, width = (torch.arange(k, dtype=torch.float64) for k in kernel.shape[2:])
    phases = frequencies[:, :1, None] * height[:, None] + frequencies[:, 1:, None] * width
    waves = torch.polar(torch.ones_like(phases), phases).to(kernel.device)
    symbols = torch.einsum("oihw,fhw->foi", kernel.to(waves.dtype), waves)
    return torch.linalg.svdvals(symbols)[:, 0]


# The report

_HEADER = ["weights", "norm of", "method", "is", "over the norm", "Gram products", "quartiles"]


def table(found: Sequence[Point]) -> str:
    """Return an aligned table of tightness and cost, and of the peers that are not installed."""
    cells = [_cells(point) for point in found]
    cells += [
        ["all", EVERY_SIZE, f"{name}: not installed", "", "", "", ""] for name in missing_peers()
    ]
    return aligned_table(_HEADER, cells)


def line(point: Point) -> str:
    """Return a point as one line of text."""
    weights, norm_of, method, kind, tightness, cost, quartiles = _cells(point)
    return f"{weights}, {norm_of}: {method} ({kind}): {tightness} in {cost} [{quartiles}]"


def _cells(point: Point) -> list[str]:
    cost = point.cost
    return [
        f"{point.weights}, {'x'.join(map(str, point.shape))}",
        point.norm_of,
        point.method,
        point.kind,
        ratio_text(point.tightness),
        f"{cost.median:.2g}",
        f"{cost.low:.2g} to {cost.high:.2g}",
    ]


def ratio_text(ratio: float) -> str:
    """Return a ratio as text, as a difference from 1 where that is small."""
    difference = ratio - 1
    if abs(difference) >= 0.01:
        return f"{ratio:.3f}"
    if abs(difference) < 1e-14:  # the rounding of the true norm itself
        return "1"
    return f"1 {'+' if difference > 0 else '-'} {abs(difference):.0e}"


def notes(found: Sequence[Point]) -> str:
    """Return what holds for all points of a kind."""
    lines = []
    for kind, limit in ((BOUND, min), (ESTIMATE, max)):
        own = [point for point in found if point.kind == kind]
        name = {min: "smallest", max: "largest"}[limit]
        for is_ours, whose in ((True, "snparam's"), (False, "others'")):
            part = [point.tightness for point in own if is_own(point) is is_ours]
            if part:
                lines.append(f"{name} of {whose} {kind}s over its norm: {ratio_text(limit(part))}")
    for norm_of in ("matrix", EVERY_SIZE):
        part = [p for p in found if p.norm_of == norm_of and p.family == "certified bound"]
        for setting in dict.fromkeys(p.setting for p in part):
            costs = [p.cost.median for p in part if p.setting == setting]
            name = ", ".join(filter(None, [f"certified bound, {norm_of}", setting]))
            lines.append(f"{name}: median of {statistics.median(costs):.2g} Gram products")
    return "\n".join(lines)


def is_own(point: Point) -> bool:
    """Return whether a method is snparam's, and not published by others."""
    return not point.family.startswith(
        ("four", "Gram iteration", ORTHOGONIUM, TORCHLIP, "float64 svdvals")
    )


def as_data(found: Sequence[Point], setup: Setup, command: str) -> dict[str, Any]:
    """Return everything that was measured, for JSON."""
    return {
        "command": command,
        "machine": report.machine(setup),
        "points": [asdict(point) | {"cost": point.cost._asdict()} for point in found],
        "not_installed": missing_peers(),
    }


def write_markdown(path: Path, found: Sequence[Point], setup: Setup, command: str) -> None:
    """Write the table to a file, above the picture `path` with the suffix .png."""
    report.write_page(
        path, setup, command, _ABOUT, table(found), notes(found), path.with_suffix(".png").name
    )


_ABOUT = """\
Each number over the norm that it is of, and its time over that of one Gram product of the same
weight in float64, in the same rounds: medians over rounds with their quartiles. Estimators start
from random vectors. The true norms are found in float64, by singular value decompositions of the
matrix and of the symbol of the convolution, and by Lanczos at a size. What is called a bound is one
in exact arithmetic; those of snparam hold with all rounding. σ of the reshaped weight is no bound
of the convolution's norm, on either side.\
"""
