"""The rows of the table: what is measured, against what, and what is to be reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import snparam
from benchmarks import bare, memory, models, peers, work
from benchmarks.rows import Row, Setup
from snparam.matrices import linalg

from .bare import BARE, LEAST
from .peers import HOOK, OURS, PLAIN, SEQUENTIAL, TORCH
from .timing import Spread, Times, interleaved

AGAINST_TORCH = "torch's parametrization"
AGAINST_HOOK = "torch's hook"
AGAINST_SEQUENTIAL = "sequential Gram-Schmidt"
AGAINST_ADDED = "added by torch's"

# What a block iteration multiplies by BLAS, without the orthonormalisation.
PRODUCTS = "its two products alone"

Shape = tuple[int, ...]

# Weights of one layer: of wide networks, where memory traffic is the cost, and of small ones, where
# the number of operations is.
LARGE: list[Shape] = [(256, 256, 3, 3), (512, 512, 3, 3), (4096, 1024), (50257, 768)]
SMALL: list[Shape] = [(64, 64), (192, 192)]

# Matrices to find several singular values of, and how many.
MATRICES = [(512, 4608), (2048, 512), (4096, 1024)]
COUNTS = [4, 8, 16]


def single_layers(setup: Setup) -> Iterator[Row]:
    """Weight read and backward of one layer."""
    large, small = LARGE, SMALL
    if setup.quick:
        large, small = [(16, 16, 3, 3)], [(8, 8)]
    for shape in large + small:
        source = models.layer(shape).to(setup.device)
        grad = torch.randn(shape, device=setup.device)
        runs = {
            OURS: work.read_and_backward(peers.ours()(source), grad),
            TORCH: work.read_and_backward(peers.torch_parametrization(source), grad),
            HOOK: work.read_and_backward(peers.torch_hook(source), grad),
            BARE: bare.read_and_backward(source, grad),
            LEAST: work.read_and_backward(bare.least(source, in_place=False), grad),
        }
        times = interleaved(runs, setup.rounds, setup.device)
        case = f"read + backward, {_by(shape)}"
        reach = 1.5 if shape in small else 3.0
        medians = times.medians()
        yield Row(case, AGAINST_TORCH, times.ratio(TORCH, OURS), reach, True, medians)
        yield Row(case, AGAINST_HOOK, times.ratio(HOOK, OURS), None, True, medians)
        for floor in (BARE, LEAST):
            ratio = times.ratio(TORCH, floor)
            yield Row(_of(case, floor), AGAINST_TORCH, ratio, None, True, medians)


def many_values(setup: Setup) -> Iterator[Row]:
    """One iteration with several singular values; at 8, also the whole read and backward."""
    for shape in [(12, 20)] if setup.quick else MATRICES:
        for count in COUNTS:
            if count > min(shape):
                continue
            source = models.layer(shape).to(setup.device)
            block, vectors = peers.ours(count)(source), peers.sequential(count)(source)
            difference = peers.check_same_numbers(block, vectors)
            note = f"same numbers: sv to {difference.sv:.0e}, u to {difference.u:.0e}"
            (matrix,) = work.matrices_of([source])
            times = interleaved(_iterations(matrix, count), setup.rounds, setup.device)
            ratio = times.ratio(SEQUENTIAL, OURS)
            reach = 5.0 if count == 8 else None
            case = f"iteration, num_svs={count}, {_by(shape)}"
            yield Row(
                case, AGAINST_SEQUENTIAL, ratio, reach, True, times.medians(), "seconds", note
            )
            floor, medians = times.ratio(SEQUENTIAL, PRODUCTS), times.medians()
            yield Row(_of(case, PRODUCTS), AGAINST_SEQUENTIAL, floor, None, True, medians)
            if count == 8:
                grad = torch.randn(shape, device=setup.device)
                runs = {
                    OURS: work.read_and_backward(block, grad),
                    SEQUENTIAL: work.read_and_backward(vectors, grad),
                }
                times = interleaved(runs, setup.rounds, setup.device)
                ratio = times.ratio(SEQUENTIAL, OURS)
                case = f"read + backward, num_svs={count}, {_by(shape)}"
                yield Row(case, AGAINST_SEQUENTIAL, ratio, None, True, times.medians())


def _iterations(matrix: Tensor, count: int) -> dict[str, work.Work]:
    """New u, v and singular values of a matrix, as a block and vector by vector."""
    start = torch.randn(count, matrix.shape[0], device=matrix.device)
    right = torch.randn(1, count, matrix.shape[1], device=matrix.device)

    def block() -> None:
        linalg.power_step(matrix[None], start[None])

    def vectors() -> None:
        us, vs = peers.Sequential.step(matrix, list(start))
        for u, v in zip(us, vs, strict=True):
            u @ matrix @ v

    def products() -> None:
        linalg.left_product(matrix[None], start[None])
        linalg.right_product(matrix[None], right)

    return {OURS: block, SEQUENTIAL: vectors, PRODUCTS: products}


def training_steps(setup: Setup) -> Iterator[Row]:
    """Whole training steps: time added over the unconverted model, against torch's."""
    for name, (make, shape) in _networks(setup).items():
        source, x = make().to(setup.device), torch.randn(shape, device=setup.device)
        runs = {
            PLAIN: work.training_step(peers.plain(source), x),
            OURS: work.training_step(peers.ours()(source), x),
            TORCH: work.training_step(peers.torch_parametrization(source), x),
            BARE: work.training_step(bare.in_training(source), x),
            LEAST: work.training_step(bare.least(source), x),
        }
        times = interleaved(runs, setup.rounds, setup.device)
        yield from _added(f"training step, {name}", times, 1 / 3)


def _added(case: str, times: Times, reach: float) -> Iterator[Row]:
    """Time added to a step, against torch's; and what the operations alone add."""
    for who in (OURS, BARE, LEAST):
        ratio = times.ratio_of_added(who, TORCH, PLAIN)
        if who == OURS:
            yield Row(case, AGAINST_ADDED, ratio, reach, False, times.medians())
        else:
            yield Row(_of(case, who), AGAINST_ADDED, ratio, None, False, times.medians())


def _of(case: str, floor: str) -> str:
    return f"{case}, {floor}"


def accumulated_steps(setup: Setup, passes: int = 4) -> Iterator[Row]:
    """The same with updates once per optimizer step and several passes for each."""
    for name, (make, shape) in _networks(setup).items():
        source, x = make().to(setup.device), torch.randn(shape, device=setup.device)
        stepwise = peers.ours(update="step")(source)
        runs = {
            PLAIN: work.training_step(peers.plain(source), x, passes),
            OURS: work.training_step(stepwise, x, passes, update_after_step=True),
            TORCH: work.training_step(peers.torch_parametrization(source), x, passes),
            BARE: work.training_step(bare.in_training(source, passes, stepwise=True), x, passes),
            LEAST: work.training_step(bare.least(source, passes, stepwise=True), x, passes),
        }
        times = interleaved(runs, setup.fewer(2), setup.device, warm_up=1)
        yield from _added(f"update='step', {passes} passes, {name}", times, 1 / 5)


def inference(setup: Setup) -> Iterator[Row]:
    """Eval and training after restoring, and eval with cached weights."""
    for name, (make, shape) in _networks(setup).items():
        source, x = make().to(setup.device).eval(), torch.randn(shape, device=setup.device)
        cached = peers.ours()(source)
        baked = snparam.restore_model(peers.ours()(source))
        runs = {
            PLAIN: work.inference(peers.plain(source), x),
            "baked": work.inference(baked, x),
            "cached": work.inference(cached, x),
        }
        with torch.no_grad(), snparam.cached(cached):
            times = interleaved(runs, setup.rounds, setup.device)
        for who, reach in (("baked", 1.02), ("cached", 1.03)):
            ratio = times.ratio(who, PLAIN)
            yield Row(f"eval, {who}, {name}", "unconverted", ratio, reach, False, times.medians())
    name, (make, shape) = next(iter(_networks(setup).items()))
    source, x = make().to(setup.device), torch.randn(shape, device=setup.device)
    runs = {
        PLAIN: work.training_step(peers.plain(source), x),
        "restored": work.training_step(snparam.restore_model(peers.ours()(source)), x),
    }
    times = interleaved(runs, setup.rounds, setup.device)
    ratio = times.ratio("restored", PLAIN)
    yield Row(f"training after restore, {name}", "unconverted", ratio, 1.02, False, times.medians())


def peak_memory(setup: Setup) -> Iterator[Row]:
    """Peak extra memory of a weight read and backward, with what is kept for the next."""
    size = 64 if setup.quick else 4096
    source = models.layer((size, size)).to(setup.device)
    grad = torch.randn(size, size, device=setup.device)
    peaks = {}
    for name, convert in ((OURS, peers.ours()), (TORCH, peers.torch_parametrization)):
        work.read_and_backward(convert(source), grad)()
        run = work.read_and_backward(convert(source), grad)
        peaks[name] = float(memory.peak_extra(run, setup.device))
    ratio = peaks[OURS] / peaks[TORCH]
    bytes_ = size * size * grad.element_size()
    sizes = {name: peak / bytes_ for name, peak in peaks.items()}
    note = f"{sizes[OURS]:.1f} against {sizes[TORCH]:.1f} times the weight, its gradient included"
    yield Row(
        f"peak extra memory, {size}x{size}",
        AGAINST_TORCH,
        Spread(ratio, ratio, ratio),
        0.6,
        False,
        peaks,
        "bytes",
        note,
    )


def conversion(setup: Setup) -> Iterator[Row]:
    """Converting a network (and taking it back), against one float64 svdvals of each layer."""
    name = "tiny" if setup.quick else "ResNet-50"
    source = _networks(setup)[name].make().to(setup.device)
    matrices = list(work.matrices_of(peers.layers(source)))
    worst = _worst_sigma(snparam.plan_conversion(source, progress=False), matrices)

    def convert() -> None:
        snparam.restore_model(snparam.convert_model(source, progress=False), bake=False)

    def decompose() -> None:
        for matrix in matrices:
            torch.linalg.svdvals(matrix.double())

    runs = {OURS: convert, "svdvals": decompose}
    times = interleaved(runs, setup.fewer(8), setup.device, warm_up=1)
    ratio = times.ratio("svdvals", OURS)
    note = f"σ within {worst:.0e} of svdvals"
    yield Row(
        f"converting {name}",
        "float64 svdvals of each",
        ratio,
        4.0,
        True,
        times.medians(),
        "seconds",
        note,
    )


def _worst_sigma(plan: snparam.ConversionPlan, matrices: list[Tensor]) -> float:
    """The largest relative error of the σ that registration finds.

    Raises:
        AssertionError: if it is above 1e-3, or another number of layers is converted.
    """
    found = [row.sigma or 0.0 for row in plan.to_convert]
    exact = [float(torch.linalg.svdvals(matrix.double())[0]) for matrix in matrices]
    worst = max(abs(a / b - 1) for a, b in zip(found, exact, strict=True))
    if not worst <= 1e-3:
        raise AssertionError(f"registration is off by {worst:.1e}, expected at most 1e-3")
    return worst


def _networks(setup: Setup) -> dict[str, models.Network]:
    return models.TINY if setup.quick else models.NETWORKS


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))


CASES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "layers": single_layers,
    "values": many_values,
    "training": training_steps,
    "step": accumulated_steps,
    "eval": inference,
    "memory": peak_memory,
    "conversion": conversion,
}
