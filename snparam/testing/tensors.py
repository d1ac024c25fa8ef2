"""Tensors with a chosen spectrum, made from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The simplest come first, because Hypothesis shrinks towards the front.
SPECTRA = (
    "gaussian",
    "flat",
    "decaying",
    "clustered",
    "repeated",
    "deficient",
    "equal",
    "row",
    "zero",
)
FORMATS = ("contiguous", "channels_last", "transposed", "strided")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def weight_with(
    spectrum: str,
    shape: Sequence[int],
    *,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    memory: str = "contiguous",
) -> Tensor:
    """Return a tensor whose matrix, with dimension 0 as rows, has a chosen spectrum.

    Args:
        spectrum: the singular values before they are scaled, or the entries, with
            p = min(rows, columns):
            `"gaussian"`: independent Gaussian entries;
            `"flat"`: all p singular values equal;
            `"decaying"`: geometric, from 1 with ratio 0.7;
            `"clustered"`: half of them between 1 and 0.999, the others 0.1;
            `"repeated"`: half of them 1, the others 0.5;
            `"deficient"`: half of them between 1 and 0.5, the others 0 (rank 1 for p = 1);
            `"equal"`: all entries equal;
            `"row"`: Gaussian, with one row a thousand times larger;
            `"zero"`: zero.
        shape: two dimensions or more.
        seed: seed of the singular vectors and of the entries.
        scale: the largest singular value, up to the rounding of `dtype`.
        dtype: floating or complex.
        memory: `"contiguous"`, `"channels_last"` (in 4 or 5 dimensions; contiguous in others),
            `"transposed"` (dimensions in reverse order in memory) or `"strided"` (with gaps).

    Raises:
        ValueError: for an unknown `spectrum` or `memory`.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    wide = torch.complex128 if dtype.is_complex else torch.float64
    generator = torch.Generator().manual_seed(seed)
    matrix = _matrix(spectrum, rows, columns, generator, wide)
    if matrix.numel():
        norm = float(torch.linalg.matrix_norm(matrix, 2))
        matrix = matrix * (scale / norm if norm > 0 else 0.0)
    return in_memory(matrix.to(dtype).reshape(tuple(shape)), memory)


def in_memory(tensor: Tensor, memory: str) -> Tensor:
    """Return a tensor of the same values in a memory format that `weight_with` names.

    Raises:
        ValueError: for an unknown format.
    """
    if memory == "channels_last":
        if tensor.ndim == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        if tensor.ndim == 5:
            return tensor.contiguous(memory_format=torch.channels_last_3d)
        return tensor.contiguous()
    if memory == "transposed":
        order = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)
    if memory == "strided":
        gaps = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
        gaps[..., ::2] = tensor
        return gaps[..., ::2]
    if memory == "contiguous":
        return tensor.contiguous()
    raise ValueError(f"memory={memory!r}: expected one of {', '.join(FORMATS)}")


def _matrix(
    spectrum: str, rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    matrix: Tensor

    def gaussian(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    if spectrum == "gaussian":
        return gaussian(rows, columns)
    if spectrum == "zero":
        return torch.zeros(rows, columns, dtype=dtype)
    if spectrum == "equal":
        return torch.ones(rows, columns, dtype=dtype)
    if spectrum == "row":
        matrix = gaussian(rows, columns)
        matrix[rows // 2] *= 1e3
        return matrix
    values = _values(spectrum, min(rows, columns))
    left = torch.linalg.qr(gaussian(rows, len(values)))[0]
    right = torch.linalg.qr(gaussian(columns, len(values)))[0]
    matrix = (left * values) @ right.mH
    return matrix


def _values(spectrum: str, count: int) -> Tensor:
    """Return `count` singular values of a spectrum, largest first."""
    values = torch.ones(count, dtype=torch.float64)
    top = (count + 1) // 2
    if spectrum == "flat":
        return values
    if spectrum == "decaying":
        return values.fill_(0.7).cumprod(0) / 0.7
    if spectrum == "clustered":
        values[:top] -= 1e-3 * torch.arange(top) / max(top, 1)
        values[top:] = 0.1
        return values
    if spectrum == "repeated":
        values[top:] = 0.5
        return values
    if spectrum == "deficient":
        values[:top] = torch.linspace(1.0, 0.5, top, dtype=torch.float64)
        values[top:] = 0.0
        return values
    raise ValueError(f"spectrum={spectrum!r}: expected one of {', '.join(SPECTRA)}")
