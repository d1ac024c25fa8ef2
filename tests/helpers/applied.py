"""What a forward of a linear layer divides by, seen from its output alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers import reference
from helpers.holder import norm_of, original_of


def square(size: int = 6, seed: int = 0, **kind: object) -> nn.Linear:
    """A linear layer of which the identity makes its weight; its singular values are 3, 2, 1.5, …

    They lie apart, so that what each step finds is well determined, and so near one another that
    each step from anywhere moves u visibly.
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    values = 3.0 / (1 + 0.5 * torch.arange(size, dtype=torch.float64))
    layer = nn.Linear(size, size, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(left * values @ right)
    return layer


def applied(layer: nn.Module) -> Tensor:
    """The weight that one forward of a layer without a bias uses, in whatever mode it is."""
    columns = original_of(layer).shape[1]
    weight: Tensor = layer(torch.eye(columns, dtype=original_of(layer).dtype)).mT
    return weight


def divisor(layer: nn.Module) -> float:
    """σ as one forward of a layer takes it, by the ratio of its weights."""
    used, original = applied(layer).detach(), original_of(layer).detach()
    ratio: Tensor = (original * used).sum() / (used * used).sum()
    torch.testing.assert_close(used * ratio, original)  # it is a multiple
    return float(ratio)


def plain_sigma(layer: nn.Module, u: Tensor, steps: int) -> tuple[float, Tensor]:
    """σ and u (1, k, m) after some steps of the plain loop from u (1, k, m)."""
    (matrix,) = norm_of(layer).view.to_matrices(original_of(layer).detach())
    (one,) = u
    for _ in range(steps):
        one, _, values = reference.step(matrix, one)
    return float(values[0]), one.unsqueeze(0)


def exact_norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))
