"""Matrices with chosen singular values, and functions of singular values by full decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_values(
    values: Sequence[float],
    rows: int,
    columns: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A matrix with these singular values, zeros besides, and drawn singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=dtype))[0]
        for n in (rows, columns)
    )
    out: Tensor = (left * torch.tensor(values, dtype=torch.float64)) @ right.mH
    return out


def changed(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """U f(Σ) Vᴴ by a full decomposition, whatever its gradient."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u * function(s)) @ vh
