"""Bounds of norms by others, written from their papers, to compare with those of snparam.

All are bounds in exact arithmetic. None of the papers counts the rounding of its own computation,
and the weights are float32 here as there, so that a bound that has converged may lie below the norm
by that rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def four_reshapings(weight: Tensor) -> float:
    """Return √(kh kw) times the smallest norm of four reshapings of a kernel (o, i, kh, kw).

    It bounds the norm of the convolution at every size (Singla and Feizi 2021, "Fantastic four:
    differentiable bounds on singular values of convolution layers", theorem 1). For the symbol is
    each of the matrices below between blocks of phases, each of which has the norm 1 for every tap
    that it sums over. The paper takes power iterations, whose values lie below the norms; here they
    are exact, as the theorem asks.
    """
    outputs, inputs, height, width = weight.shape
    taps_of_outputs_and_inputs = [
        weight.permute(0, 2, 1, 3).reshape(outputs * height, inputs * width),
        weight.permute(0, 3, 1, 2).reshape(outputs * width, inputs * height),
        weight.reshape(outputs, inputs * height * width),
        weight.permute(0, 2, 3, 1).reshape(outputs * height * width, inputs),
    ]
    norms = [float(_norm(matrix)) for matrix in taps_of_outputs_and_inputs]
    return math.sqrt(height * width) * min(norms)


def gram_iteration(matrices: Tensor, steps: int) -> float:
    """Return a bound of the largest norm in a stack of matrices (..., m, n) by Gram iteration.

    With G₁ = W and G_{t+1} = G_tᴴ G_t, the norm is at most ‖G_t‖_F to the power 2^{1−t} (Delattre,
    Barthélemy, Araujo and Allauzen 2023, theorem 2), which approaches it as the power of a number
    that is at most √rank. Each G is divided by its Frobenius norm, whose logarithm is kept.
    """
    gram = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mH
    log = torch.zeros(gram.shape[:-2], dtype=torch.float64, device=gram.device)
    for _ in range(steps):
        gram, log = _divided(gram, log, (-2, -1))
        gram = gram.mH @ gram
        log = 2 * log
    log = log + torch.linalg.matrix_norm(gram).double().log()
    return math.exp(float(log.max()) / 2**steps)


def gram_iteration_on_frequencies(weight: Tensor, steps: int, grid: int) -> float:
    """Return a bound at every size by Gram iteration at the frequencies of a grid.

    Delattre et al. 2023 (algorithm 3) bound the convolution with circular padding at size n × n by
    its n² frequencies. A smaller grid of N points along each axis is enough up to the factor
    (1 − 2d/N)^{−1} for two axes, where d = (k − 1)/2 is the degree of the symbol in each (Pfister
    and Bresler 2019, "Bounding multivariate trigonometric polynomials"), which holds for every size
    and thus for zero padding as well.

    Args:
        weight: (o, i, k, k).
        steps: number of steps of the iteration.
        grid: N, at least k.
    """
    symbol = torch.fft.rfft2(weight, s=(grid, grid)).permute(2, 3, 0, 1)
    degree = (weight.shape[-1] - 1) / 2
    return gram_iteration(symbol, steps) / (1 - 2 * degree / grid)


def gram_iteration_on_kernels(weight: Tensor, steps: int) -> float:
    """Return a bound at every size for zero padding, by Gram iteration on the kernel itself.

    The kernel of A Aᴴ for a convolution A is the autocorrelation of its kernel, twice as long in
    each axis. After t of them, the norm is at most the largest sum of magnitudes that lead to one
    output channel, to the power 2^{−t} (Delattre, Barthélemy and Allauzen 2024, section IV).

    Args:
        weight: (o, i, k, k).
        steps: t, number of steps; each takes about 16 times as long as the one before.
    """
    kernel = weight if weight.shape[0] <= weight.shape[1] else weight.transpose(0, 1)
    log = torch.zeros((), dtype=torch.float64, device=weight.device)
    for _ in range(steps):
        kernel, log = _divided(kernel, log, (0, 1, 2, 3))
        kernel = F.conv2d(kernel, kernel, padding=[taps - 1 for taps in kernel.shape[2:]])
        log = 2 * log
    log = log + kernel.double().abs().sum((1, 2, 3)).max().log()
    return math.exp(float(log) / 2**steps)


def _divided(x: Tensor, log: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return x over its Frobenius norm along axes, and the logarithm of what it is divided by."""
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    return x / norm, log + norm.double().log().reshape(log.shape)


def _norm(matrix: Tensor) -> Tensor:
    """Return the norm of a matrix, from its smaller Gram matrix in float64."""
    matrix = matrix.double()
    gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
    return torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt()
