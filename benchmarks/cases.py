"""The rows of the table: what is measured, against what, and what is to be reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import snparam
from snparam import linalg

from . import memory, models, peers
from .timing import interleaved

OURS, TORCH = "snparam", "torch"


@dataclass(frozen=True)
class Setup:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        rounds: interleaved rounds per row.
        quick: tiny shapes, to see that it runs.
    """

    device: str
    rounds: int
    quick: bool


@dataclass(frozen=True)
class Row:
    """A measured ratio, with its quartiles.

    Attributes:
        case: what was measured.
        against: what the ratio compares with.
        ratio: the median over rounds.
        low, high: its quartiles.
        reach: what is to be reached.
        faster: whether the ratio is to be at least `reach` (else at most).
        seconds: medians, by contender.
    """

    case: str
    against: str
    ratio: float
    low: float
    high: float
    reach: float
    faster: bool
    seconds: dict[str, float]

    @property
    def met(self) -> bool:
        return self.ratio >= self.reach if self.faster else self.ratio <= self.reach


def _reader(module: nn.Module, grad: torch.Tensor) -> Callable[[], None]:
    """Read the weight and go backward, as a layer's forward and backward do."""
    parameter = next(module.parameters())

    def run() -> None:
        parameter.grad = None
        module.weight.backward(grad)

    return run


def _repeat(entries: int) -> int:
    return max(1, min(50, 400_000 // entries))


def single_layers(setup: Setup) -> Iterator[Row]:
    """Weight read and backward of one layer."""
    large = [(256, 256, 3, 3), (512, 512, 3, 3), (4096, 1024), (50257, 768)]
    small = [(64, 64), (192, 192)]
    if setup.quick:
        large, small = [(16, 16, 3, 3)], [(8, 8)]
    convert = {OURS: peers.ours(), TORCH: peers.torch_parametrization, "hook": peers.torch_hook}
    for shape in large + small:
        source = models.layer(shape).to(setup.device)
        grad = torch.randn(shape, device=setup.device)
        runs = {}
        for name in (OURS, TORCH):
            runs[name] = _reader(convert[name](source), grad)
        times = interleaved(runs, setup.rounds, setup.device, _repeat(grad.numel()))
        ratio = times.ratio(lambda t: t[TORCH], lambda t: t[OURS])
        label = "x".join(map(str, shape))
        seconds = {name: times.median(name) for name in runs}
        reach = 1.5 if shape in small else 3.0
        yield Row(f"read + backward, {label}", "torch", *ratio, reach, True, seconds)


def many_values(setup: Setup) -> Iterator[Row]:
    """One iteration with several singular values, against the sequential one."""
    shapes = [(512, 4608), (2048, 512), (4096, 1024)]
    for shape in [(12, 20)] if setup.quick else shapes:
        for count in (4, 8, 16):
            if count > min(shape):
                continue
            source = models.layer(shape).to(setup.device)
            check_same_numbers(peers.ours(count)(source), peers.sequential(count)(source))
            matrix = source.weight.detach()
            start = torch.randn(count, shape[0], device=setup.device)

            def vectors(matrix: torch.Tensor = matrix, start: torch.Tensor = start) -> None:
                us, vs = peers.Sequential.step(matrix, list(start))
                for u, v in zip(us, vs, strict=True):
                    u @ matrix @ v  # the singular values, as that layer computes them

            def block(matrix: torch.Tensor = matrix, start: torch.Tensor = start) -> None:
                linalg.power_step(matrix[None], start[None])

            runs = {OURS: block, "sequential": vectors}
            times = interleaved(runs, setup.rounds, setup.device)
            ratio = times.ratio(lambda t: t["sequential"], lambda t: t[OURS])
            reach = 5.0 if count == 8 else 1.0
            label = f"num_svs={count}, {shape[0]}x{shape[1]}"
            seconds = {name: times.median(name) for name in runs}
            yield Row(label, "sequential Gram-Schmidt", *ratio, reach, True, seconds)


def check_same_numbers(block: nn.Module, vectors: nn.Module) -> None:
    """Both iterations from the same u give the same singular values; each then has its own."""
    ours: Any = block.parametrizations.weight[0]  # type: ignore[union-attr, index]
    other: Any = vectors.parametrizations.weight[0]  # type: ignore[union-attr, index]
    ours.u.copy_(other.u[None])
    block.weight, vectors.weight  # noqa: B018
    torch.testing.assert_close(ours.sv[0], other.sv, rtol=1e-4, atol=0)


def _step(model: nn.Module, x: torch.Tensor, passes: int, stepwise: bool) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    if stepwise:
        snparam.update_after_step(optimizer, model)

    def run() -> None:
        for _ in range(passes):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _networks(setup: Setup) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    return models.TINY if setup.quick else models.NETWORKS


def training_steps(setup: Setup, passes: int = 1) -> Iterator[Row]:
    """Whole training steps: time added over the unconverted model, against torch's."""
    for name, (make, shape) in _networks(setup).items():
        source, x = make().to(setup.device), torch.randn(shape, device=setup.device)
        stepwise = passes > 1
        options = {"update": "step"} if stepwise else {}
        runs = {
            "plain": _step(peers.plain(source), x, passes, False),
            OURS: _step(peers.ours(**options)(source), x, passes, stepwise),
            TORCH: _step(peers.torch_parametrization(source), x, passes, False),
        }
        times = interleaved(runs, max(5, setup.rounds // (2 * passes)), setup.device)
        # Of the medians, because the difference of two steps of one round is mostly noise.
        added = {who: times.median(who) - times.median("plain") for who in (OURS, TORCH)}
        ratio = added[OURS] / added[TORCH]
        unit = added[TORCH]
        spread = times.ratio(lambda t: t[OURS] - t["plain"], lambda _, unit=unit: unit)
        seconds = {who: times.median(who) for who in runs}
        how = f"update='step', {passes} passes" if stepwise else "training step"
        reach = 1 / 5 if stepwise else 1 / 3
        yield Row(
            f"{how}, {name}", "added by torch", ratio, spread[1], spread[2], reach, False, seconds
        )


def accumulated_steps(setup: Setup) -> Iterator[Row]:
    """The same with updates once per optimizer step and four forward-backward passes."""
    yield from training_steps(setup, passes=4)


def inference(setup: Setup) -> Iterator[Row]:
    """Eval, and training after restoring, against the unconverted model."""
    name, (make, shape) = next(iter(_networks(setup).items()))
    source, x = make().to(setup.device).eval(), torch.randn(shape, device=setup.device)
    converted = peers.ours()(source).eval()
    baked = snparam.restore_model(peers.ours()(source)).eval()
    plain = peers.plain(source).eval()
    with torch.no_grad(), snparam.cached(converted):
        runs = {
            "plain": lambda: plain(x),
            "baked": lambda: baked(x),
            "cached": lambda: converted(x),
        }
        times = interleaved(runs, setup.rounds, setup.device)
    seconds = {who: times.median(who) for who in runs}
    for who, reach in (("baked", 1.02), ("cached", 1.03)):
        ratio = times.ratio(lambda t, who=who: t[who], lambda t: t["plain"])
        yield Row(f"eval, {who}, {name}", "unconverted", *ratio, reach, False, seconds)
    source.train()
    runs = {
        "plain": _step(peers.plain(source), x, 1, False),
        "restored": _step(snparam.restore_model(peers.ours()(source)), x, 1, False),
    }
    times = interleaved(runs, setup.rounds, setup.device)
    ratio = times.ratio(lambda t: t["restored"], lambda t: t["plain"])
    seconds = {who: times.median(who) for who in runs}
    yield Row(f"training after restore, {name}", "unconverted", *ratio, 1.02, False, seconds)


def peak_memory(setup: Setup) -> Iterator[Row]:
    """Peak extra memory of one weight read and backward."""
    size = 64 if setup.quick else 4096
    source = models.layer((size, size)).to(setup.device)
    grad = torch.randn(size, size, device=setup.device)
    peaks = {
        name: float(memory.peak_extra(_reader(convert(source), grad), setup.device))
        for name, convert in ((OURS, peers.ours()), (TORCH, peers.torch_parametrization))
    }
    ratio = peaks[OURS] / peaks[TORCH]
    yield Row(f"peak extra memory, {size}x{size}", "torch", ratio, ratio, ratio, 0.6, False, peaks)


def conversion(setup: Setup) -> Iterator[Row]:
    """Converting a network, against one float64 svdvals for each layer."""
    name = "tiny" if setup.quick else "ResNet-50"
    make, _ = _networks(setup)[name]
    source = make().to(setup.device)
    weights = [layer.weight.detach().flatten(1) for layer in peers.layers(source)]
    snparam.verify(snparam.convert_model(peers.plain(source), progress=False), tolerance=1e-3)

    def convert() -> None:
        snparam.restore_model(snparam.convert_model(source, progress=False), bake=False)

    def svdvals() -> None:
        for weight in weights:
            torch.linalg.svdvals(weight.double())

    runs = {OURS: convert, "svdvals": svdvals}
    times = interleaved(runs, max(3, setup.rounds // 10), setup.device)
    ratio = times.ratio(lambda t: t["svdvals"], lambda t: t[OURS])
    seconds = {who: times.median(who) for who in runs}
    yield Row(f"converting {name}", "float64 svdvals of each", *ratio, 4.0, True, seconds)


CASES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "layers": single_layers,
    "values": many_values,
    "training": training_steps,
    "step": accumulated_steps,
    "eval": inference,
    "memory": peak_memory,
    "conversion": conversion,
}
