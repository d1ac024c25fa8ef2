"""Batches of matrices on which bounds go wrong, and their norms in more than double precision."""

import numpy as np
import torch
from torch import Tensor

KINDS = ("gaussian", "flat", "clustered", "low rank", "orthogonal", "one large row", "rank one")


def hostile(kind: str, count: int, rows: int, columns: int, seed: int) -> Tensor:
    """(count, rows, columns) in float64, of norms around 1."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    p = min(rows, columns)
    if kind == "gaussian":
        return gaussian(count, rows, columns) / max(rows, columns) ** 0.5
    if kind == "one large row":
        matrices = gaussian(count, rows, columns)
        matrices[:, rows // 2] *= 1e3
        return matrices / 1e3
    if kind == "rank one":
        return gaussian(count, rows, 1) @ gaussian(count, 1, columns) / p
    left, right = (torch.linalg.qr(gaussian(count, side, p))[0] for side in (rows, columns))
    values = {
        "flat": 1 - 1e-15 * torch.arange(p, dtype=torch.float64),
        "clustered": 1 - 1e-9 * torch.arange(p, dtype=torch.float64),
        "low rank": (torch.arange(p) < (p + 2) // 3).double(),
        "orthogonal": torch.ones(p, dtype=torch.float64),
    }[kind]
    return left * values @ right.mT


def norms_in_long_double(matrices: Tensor) -> np.ndarray:
    """The norm of each (b, m, n), from below: of 64 bits, where float64 has 53.

    The Rayleigh quotient of a right singular vector that two exact-ish steps have improved. No
    vector gives more than the norm, so that a bound which is below it is wrong.
    """
    right = torch.linalg.svd(matrices.double(), full_matrices=False)[2][:, :1].mT
    w = matrices.double().numpy().astype(np.longdouble)
    v = right.numpy().astype(np.longdouble)
    for _ in range(2):
        v = w.transpose(0, 2, 1) @ (w @ v)
        largest = np.abs(v).max(axis=1, keepdims=True)
        v = v / np.where(largest > 0, largest, 1)
        v = v / np.sqrt((v * v).sum(axis=1, keepdims=True) + (largest == 0))
    image = w @ v
    return np.sqrt((image * image).sum(axis=(1, 2)))
