"""The cases of the benchmark: the work that is measured, its peers, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import snparam
from benchmarks import drift, memory, models, peers, work
from benchmarks.rows import Row, Setup
from snparam.estimators.power import power_step
from snparam.matrices.products import left_product, right_product

from .peers import OURS, PLAIN, SEQUENTIAL, TORCH
from .timing import Spread

AGAINST_TORCH = "torch's parametrization"
AGAINST_SEQUENTIAL = "sequential Gram-Schmidt"
AGAINST_ADDED = "added by torch's"

# The matrix products of a power step on k vectors, without the orthonormalisation.
PRODUCTS = "its two products alone"

Shape = tuple[int, ...]

# Shapes of the weight of one layer, and how many times as fast as torch's snparam is to be. In the
# first four, memory traffic is the cost; in the small ones, the number of operations.
LAYERS: dict[Shape, float] = {
    (256, 256, 3, 3): 2.5,
    (512, 512, 3, 3): 2.5,
    (4096, 1024): 2.5,
    (50257, 768): 2.5,
    (64, 64): 1.3,
    (192, 192): 1.5,
}

# Shapes of the matrices whose largest singular values are tracked, and how many of these.
MATRICES = [(4096, 1024), (2048, 512)]
COUNT = 8

# Targets for the time that snparam adds to a training step, over the time that torch's adds.
ADDED = {
    "ResNet-18": 1 / 3,
    "ResNet-50": 1 / 3,
    "ViT, 6 x 384": 0.4,
    "GPT-2 blocks, 4 x 768": 1 / 3,
}
ADDED_STEPWISE = 1 / 5
PASSES = 4


def layers_of(setup: Setup) -> dict[Shape, float]:
    """Return the shapes of layers' weights that a run measures, with their targets."""
    return {(16, 16, 3, 3): 2.5, (8, 8): 1.3} if setup.quick else LAYERS


def matrices_of(setup: Setup) -> list[Shape]:
    """Return the shapes of matrices that a run measures with several singular values."""
    return [(12, 20)] if setup.quick else list(MATRICES)


def networks_of(setup: Setup) -> dict[str, models.Network]:
    """Return the networks that a run measures, by name."""
    return models.TINY if setup.quick else models.NETWORKS


def by(shape: Shape) -> str:
    """Return a shape as the table writes it, such as `256x256x3x3`."""
    return "x".join(map(str, shape))


def single_layers(setup: Setup) -> Iterator[Row]:
    """Yield the rows of reading the weight of one layer and going backward from it."""
    for shape, reach in layers_of(setup).items():
        source = models.layer(shape).to(setup.device)
        grad = torch.randn(shape, device=setup.device)
        times = setup.times(
            {
                OURS: work.read_and_backward(peers.ours()(source), grad),
                TORCH: work.read_and_backward(peers.torch_parametrization(source), grad),
            }
        )
        ratio = times.ratio(TORCH, OURS)
        case = f"read + backward, {by(shape)}"
        yield Row(case, AGAINST_TORCH, ratio, reach, True, times.medians())


def many_values(setup: Setup) -> Iterator[Row]:
    """Yield the rows of one power step that tracks several singular values."""
    for shape in matrices_of(setup):
        source = models.layer(shape).to(setup.device)
        difference = peers.check_same_numbers(
            peers.ours(COUNT)(source), peers.sequential(COUNT)(source)
        )
        note = f"same numbers: sv to {difference.sv:.0e}, u to {difference.u:.0e}"
        (matrix,) = work.matrices_of([source])
        times = setup.times(iterations(matrix, COUNT))
        case, medians = f"iteration, num_svs={COUNT}, {by(shape)}", times.medians()
        yield Row(case, PRODUCTS, times.ratio(PRODUCTS, OURS), 0.85, True, medians)
        ratio = times.ratio(SEQUENTIAL, OURS)
        yield Row(case, AGAINST_SEQUENTIAL, ratio, None, True, medians, "seconds", note)


def iterations(matrix: Tensor, count: int) -> dict[str, work.Work]:
    """Return three ways to compute a power step on a matrix (m, n), or a part of it.

    They are snparam's step on a block of `count` vectors, the sequential step vector by vector, and
    the two products of the block alone.
    """
    start = torch.randn(count, matrix.shape[0], device=matrix.device)
    right = torch.randn(1, count, matrix.shape[1], device=matrix.device)

    def block() -> None:
        power_step(matrix[None], start[None])

    def vectors() -> None:
        us, vs = peers.Sequential.step(matrix, list(start))
        for u, v in zip(us, vs, strict=True):
            u @ matrix @ v

    def products() -> None:
        left_product(matrix[None], start[None])
        right_product(matrix[None], right)

    return {OURS: block, SEQUENTIAL: vectors, PRODUCTS: products}


def training_steps(setup: Setup) -> Iterator[Row]:
    """Yield the rows of whole training steps.

    Each is the time that snparam adds to the unconverted model over the time that torch's adds.
    """
    for name, (make, shape) in networks_of(setup).items():
        source, x = make().to(setup.device), torch.randn(shape, device=setup.device)
        times = setup.times(
            {
                PLAIN: work.training_step(peers.plain(source), x),
                OURS: work.training_step(peers.ours()(source), x),
                TORCH: work.training_step(peers.torch_parametrization(source), x),
            }
        )
        ratio, reach = times.ratio_of_added(OURS, TORCH, PLAIN), ADDED.get(name, 1 / 3)
        yield Row(f"training step, {name}", AGAINST_ADDED, ratio, reach, False, times.medians())


def accumulated_steps(setup: Setup) -> Iterator[Row]:
    """Yield the rows of training steps with `update="step"` and several passes per update."""
    for name, (make, shape) in networks_of(setup).items():
        source, x = make().to(setup.device), torch.randn(shape, device=setup.device)
        stepwise = peers.ours(update="step")(source)
        times = setup.times(
            {
                PLAIN: work.training_step(peers.plain(source), x, PASSES),
                OURS: work.training_step(stepwise, x, PASSES),
                TORCH: work.training_step(peers.torch_parametrization(source), x, PASSES),
            },
            fewer=2,
            warm_up=1,
        )
        case, ratio = (
            f"update='step', {PASSES} passes, {name}",
            times.ratio_of_added(OURS, TORCH, PLAIN),
        )
        yield Row(case, AGAINST_ADDED, ratio, ADDED_STEPWISE, False, times.medians())


def inference(setup: Setup) -> Iterator[Row]:
    """Yield the rows of inference with cached weights and with a restored network."""
    name, (make, shape) = _residual(setup)
    source, x = make().to(setup.device).eval(), torch.randn(shape, device=setup.device)
    cached = peers.ours()(source)
    baked = snparam.restore_model(peers.ours()(source))
    runs = {
        PLAIN: work.inference(peers.plain(source), x),
        "baked": work.inference(baked, x),
        "cached": work.inference(cached, x),
    }
    with torch.no_grad(), snparam.cached(cached):
        times = setup.times(runs)
    for who, reach in (("baked", 1.02), ("cached", 1.03)):
        ratio = times.ratio(who, PLAIN)
        yield Row(f"eval, {who}, {name}", "unconverted", ratio, reach, False, times.medians())


def peak_memory(setup: Setup) -> Iterator[Row]:
    """Yield the rows of memory.

    They are the peak of reading a weight and going backward from it, the peak of a training step,
    and what a network holds after one.
    """
    yield _memory_of_a_weight(setup)
    name, (make, shape) = list(networks_of(setup).items())[-1]
    source, x = make().to(setup.device), torch.randn(shape, device=setup.device)
    yield _memory_of_a_step(setup, name, source, x)
    yield from _memory_that_stays(setup, name, source, x)


def _memory_of_a_weight(setup: Setup) -> Row:
    size = 64 if setup.quick else 4096
    source = models.layer((size, size)).to(setup.device)
    grad = torch.randn(size, size, device=setup.device)
    peaks = {}
    for name, convert in ((OURS, peers.ours()), (TORCH, peers.torch_parametrization)):
        run = work.read_and_backward(convert(source), grad)
        run()
        peaks[name] = float(memory.peak_extra(run, setup.device))
    ratio = peaks[OURS] / peaks[TORCH]
    bytes_ = size * size * grad.element_size()
    sizes = {name: peak / bytes_ for name, peak in peaks.items()}
    note = f"{sizes[OURS]:.1f} against {sizes[TORCH]:.1f} times the weight, its gradient included"
    case, spread = f"peak extra memory, {size}x{size}", Spread(ratio, ratio, ratio)
    return Row(case, AGAINST_TORCH, spread, None, False, peaks, "bytes", note)


def _memory_of_a_step(setup: Setup, name: str, source: nn.Module, x: Tensor) -> Row:
    """Return the row of the peak memory that snparam adds to a training step, against torch's."""
    peaks = {}
    contenders = {PLAIN: peers.plain, OURS: peers.ours(), TORCH: peers.torch_parametrization}
    for who, convert in contenders.items():
        run = work.training_step(convert(source), x)
        run()
        peaks[who] = float(memory.peak_extra(run, setup.device))
    added = {who: peaks[who] - peaks[PLAIN] for who in (OURS, TORCH)}
    ratio = added[OURS] / added[TORCH] if added[TORCH] > 0 else float("nan")
    weights = _bytes(peers.layers(source))
    note = (
        f"{added[OURS] / weights:.2f} against {added[TORCH] / weights:.2f} times the weights added"
    )
    case, spread = f"peak memory of a training step, {name}", Spread(ratio, ratio, ratio)
    return Row(case, AGAINST_ADDED, spread, 1 / 3, False, peaks, "bytes", note)


def _memory_that_stays(setup: Setup, name: str, source: nn.Module, x: Tensor) -> Iterator[Row]:
    """Yield rows of the memory that a network holds after a training step, over its weights' size.

    That is the memory of the converted network less the memory of the unconverted one.
    """

    def after_a_step(convert: peers.Convert) -> float:
        def make() -> nn.Module:
            model = convert(source)
            work.training_step(model, x)()
            return model

        return float(memory.left_behind(make, setup.device))

    weights, plain = _bytes(peers.layers(source)), after_a_step(peers.plain)
    contenders = {
        OURS: peers.ours(init="converged"),
        "update='step'": peers.ours(init="converged", update="step"),
    }
    for who, convert in contenders.items():
        held = {PLAIN: plain, OURS: after_a_step(convert)}
        ratio = (held[OURS] - plain) / weights
        how = "" if who == OURS else f", {who}"
        case, spread = f"memory held after a step, {name}{how}", Spread(ratio, ratio, ratio)
        # The states take less than 1% of these weights; a copy of any weight takes more.
        yield Row(case, "the weights", spread, 0.01, False, held, "bytes")


def _bytes(layers: list[nn.Module]) -> int:
    return sum(matrix.numel() * matrix.element_size() for matrix in work.matrices_of(layers))


def conversion(setup: Setup) -> Iterator[Row]:
    """Yield the row of converting and restoring a network, against a float64 svdvals per layer."""
    name, (make, _) = _residual(setup)
    source = make().to(setup.device)
    matrices = list(work.matrices_of(peers.layers(source)))
    worst = _worst_sigma(snparam.plan_conversion(source, progress=False), matrices)

    def decompose() -> None:
        for matrix in matrices:
            torch.linalg.svdvals(matrix.double())

    runs = {OURS: work.conversion(source), "svdvals": decompose}
    times = setup.times(runs, fewer=8, warm_up=1)
    ratio, note = times.ratio("svdvals", OURS), f"σ within {worst:.0e} of svdvals"
    case, against = f"converting {name}", "float64 svdvals of each"
    yield Row(case, against, ratio, 4.0, True, times.medians(), "seconds", note)


def _worst_sigma(plan: snparam.ConversionPlan, matrices: list[Tensor]) -> float:
    """Return the largest relative error of the σ in a plan, against svdvals in float64.

    Raises:
        AssertionError: if the error is above 1e-3.
        ValueError: if the plan converts another number of weights than there are matrices.
    """
    found = [row.sigma or 0.0 for row in plan.to_convert]
    exact = [float(torch.linalg.svdvals(matrix.double().cpu())[0]) for matrix in matrices]
    worst = max(abs(a / b - 1) for a, b in zip(found, exact, strict=True))
    if not worst <= 1e-3:
        raise AssertionError(f"registration is off by {worst:.1e}, expected at most 1e-3")
    return worst


def _residual(setup: Setup) -> tuple[str, models.Network]:
    name = "tiny" if setup.quick else "ResNet-50"
    return name, networks_of(setup)[name]


CASES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "layers": single_layers,
    "values": many_values,
    "training": training_steps,
    "step": accumulated_steps,
    "eval": inference,
    "memory": peak_memory,
    "conversion": conversion,
    "drift": drift.rows,
}
