"""The steepest slope of a function that a search finds: a lower bound of its Lipschitz constant."""

from collections.abc import Callable

import torch
from torch import Tensor


def steepest(
    function: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    steps: int = 10,
    scales: tuple[float, ...] = (0.05, 2.0),
    seed: int = 0,
) -> float:
    """The largest ‖f(x + d) − f(x)‖ / ‖d‖, or norm of a Jacobian, that ascent finds in float64."""
    generator = torch.Generator().manual_seed(seed)
    found = 0.0
    for scale in scales:
        x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for size in (1.0, 1e-4):  # inputs far from each other, and neighbours
            d = torch.randn(shape, generator=generator, dtype=torch.float64) * size
            x, ratio = _ascend(function, x, d, steps)
            found = max(found, ratio)
        found = max(found, jacobian_norm(function, x))
    return found


def _ascend(
    function: Callable[[Tensor], Tensor], x: Tensor, d: Tensor, steps: int
) -> tuple[Tensor, float]:
    size = d.norm()
    x, d = x.clone().requires_grad_(), (d / size).requires_grad_()
    optimizer = torch.optim.Adam([x, d], lr=0.1)
    best, where = 0.0, x.detach().clone()
    for _ in range(steps):
        step = size * d / d.norm()
        ratio = (function(x + step) - function(x)).flatten().norm() / size
        if ratio.item() > best:
            best, where = ratio.item(), x.detach().clone()
        if not ratio.requires_grad:
            break
        optimizer.zero_grad()
        (-(ratio + 1e-30).log()).backward()
        for p in (x, d):
            if p.grad is not None:
                p.grad.nan_to_num_()
        optimizer.step()
    return where, best


def jacobian_norm(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """σ of the Jacobian at x."""
    jacobian = torch.autograd.functional.jacobian(
        lambda x: function(x).flatten(), x, vectorize=True
    )
    matrix = jacobian.detach().reshape(len(jacobian), -1).nan_to_num()
    return float(torch.linalg.matrix_norm(matrix, 2))
