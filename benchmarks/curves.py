"""The second view, a picture: cost against layer size, num_svs and number of layers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from . import models, peers
from .cases import OURS, TORCH, Setup, _reader, _repeat, _step
from .timing import interleaved

Points = dict[str, list[tuple[float, float]]]


def by_size(setup: Setup) -> Points:
    """Read and backward of an n x n weight; seconds against n."""
    sizes = [8, 16] if setup.quick else [32, 64, 128, 256, 512, 1024, 2048, 4096]
    points: Points = {OURS: [], TORCH: [], "torch hook": []}
    for size in sizes:
        source = models.layer((size, size)).to(setup.device)
        grad = torch.randn(size, size, device=setup.device)
        runs = {
            OURS: _reader(peers.ours()(source), grad),
            TORCH: _reader(peers.torch_parametrization(source), grad),
        }
        hooked = peers.torch_hook(source)
        original = hooked.weight_orig

        def read_hook(module: nn.Module = hooked, weight: nn.Parameter = original) -> None:
            weight.grad = None
            next(iter(module._forward_pre_hooks.values()))(module, ())
            module.weight.backward(grad)  # noqa: B023

        runs["torch hook"] = read_hook
        times = interleaved(runs, setup.rounds, setup.device, _repeat(size * size))
        for name in points:
            points[name].append((size, times.median(name)))
    return points


def by_values(setup: Setup) -> Points:
    """Read and backward of a 2048 x 512 weight; seconds against num_svs."""
    shape = (12, 20) if setup.quick else (2048, 512)
    points: Points = {OURS: [], "sequential": []}
    for count in (1, 2) if setup.quick else (1, 2, 4, 8, 16, 32):
        source = models.layer(shape).to(setup.device)
        grad = torch.randn(shape, device=setup.device)
        runs = {
            OURS: _reader(peers.ours(count)(source), grad),
            "sequential": _reader(peers.sequential(count)(source), grad),
        }
        times = interleaved(runs, setup.rounds, setup.device)
        for name in points:
            points[name].append((count, times.median(name)))
    return points


def by_layers(setup: Setup) -> Points:
    """Added time of a training step of a stack of 64 x 64 layers; seconds against depth."""
    points: Points = {OURS: [], f"{OURS}, update='step'": [], TORCH: []}
    x = torch.randn(8, 64, device=setup.device)
    for depth in (1, 2) if setup.quick else (1, 2, 4, 8, 16, 32, 64):
        source = nn.Sequential(*[nn.Linear(64, 64) for _ in range(depth)]).to(setup.device)
        runs = {
            "plain": _step(peers.plain(source), x, 1, False),
            OURS: _step(peers.ours()(source), x, 1, False),
            f"{OURS}, update='step'": _step(peers.ours(update="step")(source), x, 1, True),
            TORCH: _step(peers.torch_parametrization(source), x, 1, False),
        }
        times = interleaved(runs, setup.rounds, setup.device)
        for name in points:
            points[name].append((depth, max(times.median(name) - times.median("plain"), 1e-9)))
    return points


def draw(setup: Setup, path: Path) -> None:
    """Draw the three curves side by side, relative to snparam at the first point of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = [
        ("one layer, n x n", "n", by_size(setup)),
        ("one layer, several singular values", "num_svs", by_values(setup)),
        ("training step, 64 x 64 layers", "layers", by_layers(setup)),
    ]
    for panel, (title, along, points) in zip(panels, titles, strict=True):
        unit = points[OURS][0][1]
        for name, curve in points.items():
            xs, ys = zip(*curve, strict=True)
            panel.plot(xs, [y / unit for y in ys], marker="o", label=name)
        panel.set(title=title, xlabel=along, xscale="log", yscale="log")
        panel.set_xscale("log", base=2)
        panel.set_ylabel("cost (snparam's at the left = 1)")
        panel.grid(visible=True, alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=110)
