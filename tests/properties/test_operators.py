"""What the norm of a reshaped weight says of the convolution's operator, and what it does not."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import snparam

MODES = ["zeros", "circular", "reflect", "replicate"]


def operator(conv: nn.Module, size: tuple[int, ...]) -> Tensor:
    """Its matrix in float64, column by column, on inputs of a size."""
    channels = conv.in_channels
    entries = channels * math.prod(size)
    impulses = torch.eye(entries, dtype=torch.float64).view(entries, channels, *size)
    with torch.no_grad():
        return conv(impulses).reshape(entries, -1).T


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def reads(mode: str, size: int) -> int:
    """How often the entry that is read most often is: one axis, kernel 3, padding 1, stride 1."""
    places = {
        "zeros": lambda i: [i] if 0 <= i < size else [],
        "circular": lambda i: [i % size],
        "reflect": lambda i: [abs(i) if i < size else 2 * (size - 1) - i],
        "replicate": lambda i: [min(max(i, 0), size - 1)],
    }[mode]
    read = [j for start, tap in product(range(size), range(3)) for j in places(start + tap - 1)]
    return max(read.count(j) for j in range(size))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_an_operator_is_larger_than_its_matrix_by_at_most_the_root_of_the_reads(
    mode: str, size: int
) -> None:
    """README: up to √r, where r is how often an entry of the input is read."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        conv = nn.Conv1d(2, 3, 3, padding=1, padding_mode=mode, bias=False).double()
        conv.weight.data.copy_(torch.randn(3, 2, 3, generator=generator, dtype=torch.float64))
        bound = math.sqrt(reads(mode, size)) * norm(conv.weight.detach().reshape(3, 6))
        assert norm(operator(conv, (size,))) <= bound * (1 + 1e-12)
    assert reads(mode, size) <= 3 or mode in ("reflect", "replicate")


def test_reflect_padding_exceeds_the_root_of_the_kernels_size() -> None:
    """README: 2.83 on three points, and √3 times the norm of the matrix is 2.45."""
    conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", bias=False).double()
    conv.weight.data.copy_(torch.tensor([[[1.0, 0.0, 1.0]]]))
    assert norm(operator(conv, (3,))) == pytest.approx(2.83, abs=5e-3)
    assert math.sqrt(3) * norm(conv.weight.detach().reshape(1, 3)) == pytest.approx(2.45, abs=5e-3)


def test_a_depthwise_convolution_is_left_below_one_and_blocks_hold_each_channel() -> None:
    """README: σ of the matrix is that of no channel; it is √32 times that of 32 that are alike."""
    conv = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False).double()
    nn.init.dirac_(conv.weight, groups=32)
    assert norm(operator(conv, (6, 6))) == pytest.approx(1)
    snparam.register_sn(conv)
    assert norm(operator(conv.eval(), (6, 6))) == pytest.approx(1 / math.sqrt(32))
    snparam.remove_sn(conv, bake=False)
    snparam.register_sn(conv, blocks="auto")
    assert norm(operator(conv.eval(), (6, 6))) == pytest.approx(1)


def test_blocks_scale_a_dead_channel_up_and_a_soft_bound_leaves_it() -> None:
    conv = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    conv.weight.data[1] *= 1e-8 / conv.weight.data[1].norm()
    snparam.register_sn(conv, blocks="auto")
    assert float(conv.weight[1].detach().norm()) == pytest.approx(1)
    snparam.remove_sn(conv, bake=False)
    dead = conv.weight.detach()[1].clone()
    snparam.register_sn(conv, blocks="auto", soft=True)
    assert torch.equal(conv.weight[1], dead)
