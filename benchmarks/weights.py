"""Four kinds of weights, whose spectra differ: Gaussian, heavy-tailed, of low rank, and trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RANK = 8


class Weights(NamedTuple):
    """A matrix and the kernel of a convolution, both float32.

    Attributes:
        matrix: (m, n).
        kernel: (out_channels, in_channels, 3, 3).
    """

    matrix: Tensor
    kernel: Tensor


class Sizes(NamedTuple):
    """The sizes of a network that is trained on images of 8 x 8, and thereby of all weights.

    Attributes:
        channels: channels of the convolution.
        features: rows of the matrix, which has 16 columns for each channel.
        steps: steps of the optimizer.
    """

    channels: int = 64
    features: int = 512
    steps: int = 60


QUICK = Sizes(channels=4, features=16, steps=2)


def gaussian(*shape: int) -> Tensor:
    """Return independent Gaussian entries, whose singular values lie close together."""
    return torch.randn(shape, generator=_generator()) / math.sqrt(math.prod(shape[1:]))


def heavy_tailed(*shape: int) -> Tensor:
    """Return entries of Student's t distribution with two degrees of freedom.

    Its variance is infinite: a few entries make the largest singular values, which lie far apart.
    """
    generator = _generator()
    chi_squared = torch.empty(shape).exponential_(generator=generator)
    return torch.randn(shape, generator=generator) / chi_squared.sqrt()


def low_rank(*shape: int) -> Tensor:
    """Return a weight whose reshaped matrix has the rank 8 and Gaussian factors."""
    generator = _generator()
    factors = [
        torch.randn(size, RANK, generator=generator) for size in (shape[0], math.prod(shape[1:]))
    ]
    return (factors[0] @ factors[1].T).reshape(shape)


@cache
def trained(sizes: Sizes) -> Weights:
    """Return weights of a small network after training on scikit-learn's digits.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        middle: Any = nn.Conv2d(sizes.channels, sizes.channels, 3, padding=1)
        hidden: Any = nn.Linear(sizes.channels * 16, sizes.features)
        network = nn.Sequential(
            nn.Conv2d(1, sizes.channels, 3, padding=1), nn.ReLU(),
            middle, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            hidden, nn.ReLU(), nn.Linear(sizes.features, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in range(sizes.steps):
            batch = torch.randint(len(images), (128,))
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return Weights(hidden.weight.detach(), middle.weight.detach())


def all_weights(sizes: Sizes) -> dict[str, Callable[[], Weights]]:
    """Return, by the name of each kind, a function that makes its weights, all of one shape."""
    matrix, kernel = (
        (sizes.features, sizes.channels * 16),
        (sizes.channels, sizes.channels, 3, 3),
    )

    def drawn(draw: Callable[..., Tensor]) -> Callable[[], Weights]:
        return lambda: Weights(draw(*matrix), draw(*kernel))

    return {
        "Gaussian": drawn(gaussian),
        "heavy-tailed": drawn(heavy_tailed),
        "low rank": drawn(low_rank),
        "trained": lambda: trained(sizes),
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
