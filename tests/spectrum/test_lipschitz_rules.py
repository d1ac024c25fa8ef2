"""Each rule of `certify` by itself: no pair of inputs, and no Jacobian, is steeper than it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers.steepness import steepest
from torch import Tensor, nn

from snparam import certify
from snparam.spectrum.lipschitz_rules import SLOPES

# torch's own, of padding="same" with even kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

Function = Callable[[Tensor], Tensor]

VECTORS, IMAGES, SEQUENCES, VOLUMES = (3, 5), (2, 4, 5, 6), (2, 4, 7), (1, 2, 3, 4, 3)
BOUNDED = torch.sigmoid


def constant(*shape: int, seed: int = 1) -> Tensor:
    """Numbers that a graph may compute: nothing random."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * 12.9898 + seed).sin().view(shape)


FACTORS, WEIGHT = constant(5), constant(6, 5)
KERNEL, GROUPED = constant(3, 4, 3, 3), constant(6, 2, 3, 2)
VARIANCES = constant(4).abs() + 0.1
MASK = torch.tensor([True, False, True, False, False])
INDEX = torch.tensor([0, 0, 0, 2, 1])

# Where the ascent finds the constant, to a tenth.
SHARP: dict[str, tuple[Function, tuple[int, ...]]] = {
    # one number
    "relu": (torch.relu, VECTORS),
    "relu6": (F.relu6, VECTORS),
    "tanh": (torch.tanh, VECTORS),
    "sigmoid": (torch.sigmoid, VECTORS),
    "hardsigmoid": (F.hardsigmoid, VECTORS),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 2.0), VECTORS),
    "softplus": (lambda x: F.softplus(x, 2.0), VECTORS),
    "logsigmoid": (F.logsigmoid, VECTORS),
    "softshrink": (F.softshrink, VECTORS),
    "tanhshrink": (F.tanhshrink, VECTORS),
    "elu": (lambda x: F.elu(x, 2.5), VECTORS),
    "celu": (lambda x: F.celu(x, 2.5), VECTORS),
    "leaky_relu": (lambda x: F.leaky_relu(x, -3.0), VECTORS),
    "prelu": (lambda x: F.prelu(x, constant(5)), VECTORS),
    "rrelu": (lambda x: F.rrelu(x, 0.2, 0.6), VECTORS),
    "gelu": (F.gelu, VECTORS),
    "tanh-gelu": (lambda x: F.gelu(x, approximate="tanh"), VECTORS),
    "silu": (F.silu, VECTORS),
    "mish": (F.mish, VECTORS),
    "abs": (torch.abs, VECTORS),
    "clamp": (lambda x: x.clamp(-1, 2), VECTORS),
    "sin": (torch.sin, VECTORS),
    "cos": (torch.cos, VECTORS),
    "atan": (torch.atan, VECTORS),
    "erf": (torch.erf, VECTORS),
    "threshold": (lambda x: F.threshold(x, 0.5, 0.5), VECTORS),
    # one number, written out
    "written silu": (lambda x: x * torch.sigmoid(x), VECTORS),
    "quick-gelu": (lambda x: x * torch.sigmoid(1.702 * x), VECTORS),
    "written mish": (lambda x: x * torch.tanh(F.softplus(x)), VECTORS),
    # vectors
    "softmax": (lambda x: x.softmax(-1), (1, 2)),
    "log_softmax": (lambda x: x.log_softmax(0), VECTORS),
    "logsumexp": (lambda x: x.logsumexp(1), VECTORS),
    "amax": (lambda x: x.amax(1), VECTORS),
    "max": (lambda x: x.max(0).values, VECTORS),
    "median": (lambda x: x.median(1).values, VECTORS),
    "sort": (lambda x: x.sort(1).values, VECTORS),
    "topk": (lambda x: x.topk(2).values, VECTORS),
    "2-norm": (lambda x: x.norm(dim=1), VECTORS),
    "1-norm": (lambda x: torch.linalg.vector_norm(x, 1), VECTORS),
    "max-norm": (lambda x: torch.linalg.vector_norm(x, math.inf, dim=0), VECTORS),
    "mean": (lambda x: x.mean((2, 3)), IMAGES),
    "sum": (lambda x: x.sum(1), VECTORS),
    "std": (lambda x: x.std(1), VECTORS),
    "cumsum": (lambda x: x.cumsum(1), VECTORS),
    "normalize": (lambda x: F.normalize(x, dim=1, eps=0.7), VECTORS),
    # several
    "add": (lambda x: x + x.flip(0).flip(0), VECTORS),
    "subtract": (lambda x: torch.sub(x, -x, alpha=3), VECTORS),
    "rsub": (lambda x: 2.5 - x, VECTORS),
    "broadcast sum": (lambda x: constant(4, 3, 5) + x, VECTORS),
    "cat": (lambda x: torch.cat([2 * x, constant(1, 5), x]), VECTORS),
    "stack": (lambda x: torch.stack([x, x, -x]), VECTORS),
    "where": (lambda x: torch.where(MASK, x, 0.5), VECTORS),
    "masked_fill": (lambda x: (3 * x).masked_fill(MASK, 0.5), VECTORS),
    "times": (lambda x: x * FACTORS, VECTORS),
    "divided": (lambda x: x / FACTORS, VECTORS),
    "broadcast times": (lambda x: x.unsqueeze(-1) * constant(4), VECTORS),
    # copies
    "expand": (lambda x: x.expand(4, 3, 5), VECTORS),
    "repeat": (lambda x: x.repeat(2, 3), VECTORS),
    "index": (lambda x: x[:, INDEX], VECTORS),
    "index_select": (lambda x: x.index_select(1, INDEX), VECTORS),
    "gather": (lambda x: x.gather(1, INDEX.expand(3, 5)), VECTORS),
    "unfold": (lambda x: x.unfold(1, 3, 1), VECTORS),
    "im2col": (lambda x: F.unfold(x, 2, padding=1, stride=(1, 3)), IMAGES),
    "reflect": (lambda x: F.pad(x, (2, 1, 1, 3), "reflect"), IMAGES),
    "replicate": (lambda x: F.pad(x, (2, 1, 1, 3), "replicate"), IMAGES),
    "circular": (lambda x: F.pad(x, (2, 1, 1, 3), "circular"), IMAGES),
    "zeros": (lambda x: F.pad(x, (2, 1, -1, 3)), IMAGES),
    # linear maps
    "linear": (lambda x: F.linear(x, WEIGHT, constant(6)), VECTORS),
    "matmul": (lambda x: x @ WEIGHT.T, VECTORS),
    "matrix from the left": (lambda x: constant(2, 3) @ x, VECTORS),
    "vector": (lambda x: x @ FACTORS, VECTORS),
    "stack of matrices": (lambda x: torch.bmm(x, constant(2, 7, 3)), SEQUENCES),
    "addcmul": (lambda x: torch.addcmul(FACTORS, FACTORS, x, value=-0.5), VECTORS),
    "addmm": (lambda x: torch.addmm(constant(6), x, WEIGHT.T, alpha=2), VECTORS),
    "scaled linear": (lambda x: F.linear(x, WEIGHT) * constant(6), VECTORS),
    "conv1d": (lambda x: F.conv1d(x, constant(3, 4, 3), stride=2, padding=1), SEQUENCES),
    "conv2d": (lambda x: F.conv2d(x, KERNEL, constant(3), padding=1), IMAGES),
    "conv2d same": (lambda x: F.conv2d(x, constant(3, 4, 2, 3), padding="same"), IMAGES),
    "conv2d strided": (lambda x: F.conv2d(x, KERNEL, stride=2, dilation=(1, 2)), IMAGES),
    "conv2d grouped": (lambda x: F.conv2d(x, GROUPED, groups=2, padding=1), IMAGES),
    "conv3d": (lambda x: F.conv3d(x, constant(3, 2, 2, 2, 2)), VOLUMES),
    "conv2d circular": (
        lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), KERNEL),
        IMAGES,
    ),
    "conv2d padded": (lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1), value=2.0), KERNEL), IMAGES),
    "transposed": (
        lambda x: F.conv_transpose2d(
            x, constant(4, 3, 3, 2), stride=2, padding=1, output_padding=1, groups=2
        ),
        IMAGES,
    ),
    "scaled transposed": (
        lambda x: F.conv_transpose2d(x, constant(4, 3, 3, 2), groups=2) * constant(6, 1, 1, seed=3),
        IMAGES,
    ),
    "batch norm": (
        lambda x: F.batch_norm(x, constant(4), VARIANCES, constant(4), constant(4)),
        IMAGES,
    ),
    "convolution and batch norm": (
        lambda x: F.batch_norm(
            F.conv2d(x, constant(4, 4, 3, 3)), constant(4), VARIANCES, constant(4), constant(4)
        ),
        IMAGES,
    ),
    "linear map and batch norm": (
        lambda x: F.batch_norm(F.linear(x, WEIGHT), constant(6), constant(6).abs() + 0.1),
        VECTORS,
    ),
    "instance norm by running statistics": (
        lambda x: F.instance_norm(x, constant(4), VARIANCES, use_input_stats=False),
        IMAGES,
    ),
    "zeros of its shape": (lambda x: x + torch.zeros_like(x) + x.new_ones(4, 1, 1), IMAGES),
    # pooling
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 3, 2, 1), SEQUENCES),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGES),
    "avg_pool2d ceil": (lambda x: F.avg_pool2d(x, (2, 3), (2, 1), ceil_mode=True), IMAGES),
    "avg_pool2d divisor": (lambda x: F.avg_pool2d(x, 2, 1, divisor_override=3), IMAGES),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), IMAGES),
    "nearest": (lambda x: F.interpolate(x, scale_factor=(2.0, 1.5)), IMAGES),
    "bilinear": (lambda x: F.interpolate(x, (9, 7), mode="bilinear"), IMAGES),
    "bilinear corners": (
        lambda x: F.interpolate(x, (9, 3), mode="bilinear", align_corners=True),
        IMAGES,
    ),
    "antialiased": (lambda x: F.interpolate(x, (3, 4), mode="bilinear", antialias=True), IMAGES),
    "bicubic": (lambda x: F.interpolate(x, (7, 9), mode="bicubic"), IMAGES),
    "linear 1d": (lambda x: F.interpolate(x, 10, mode="linear"), SEQUENCES),
    "trilinear": (lambda x: F.interpolate(x, (4, 3, 5), mode="trilinear"), VOLUMES),
    # places
    "reshape": (lambda x: x.reshape(5, 3), VECTORS),
    "permute": (lambda x: x.permute(0, 2, 3, 1).contiguous(), IMAGES),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGES),
    "roll": (lambda x: x.roll(2, 1), VECTORS),
    "slice": (lambda x: x[:, 1:4], VECTORS),
    "chunk": (lambda x: x.chunk(2, 1)[0], VECTORS),
}
# Where the constant is not attained by this function, or not found.
BOUNDS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 3, 2, 1), SEQUENCES),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGES),
    "max_pool2d dilated": (lambda x: F.max_pool2d(x, 2, 1, dilation=2, ceil_mode=True), IMAGES),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2, 1), VOLUMES),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (3, 4)), IMAGES),
    "layer_norm": (lambda x: F.layer_norm(x, (5,), FACTORS, FACTORS, 0.3), VECTORS),
    "group_norm": (lambda x: F.group_norm(x, 2, constant(4), constant(4), 0.3), IMAGES),
    "instance_norm": (lambda x: F.instance_norm(x, eps=0.3), IMAGES),
    "rms_norm": (lambda x: F.rms_norm(x, (5,), FACTORS, 0.3), VECTORS),
    "gates": (lambda x: BOUNDED(x) * torch.tanh(2 * x.flip(1)), VECTORS),
    "broadcast gates": (
        lambda x: x.clamp(-2, 3) * torch.sigmoid(x.mean((2, 3), keepdim=True)),
        IMAGES,
    ),
    "gate behind a norm": (
        lambda x: F.layer_norm(x, (5,), FACTORS, FACTORS, 0.5) * torch.softmax(x, 1),
        VECTORS,
    ),
    "glu": (lambda x: F.glu(x.clamp(-3, 2)), (3, 4)),
    "square": (lambda x: torch.square(torch.sin(x)), VECTORS),
    "cube": (lambda x: x.clamp(-2, 1) ** 3, VECTORS),
    "exp": (lambda x: x.clamp(-2, 1).exp(), VECTORS),
    "relu of three": (lambda x: F.relu(x) * 2 + torch.tanh(x) - x / 3, VECTORS),
    "product of stacks": (lambda x: x[:, 0] @ constant(2, 7, 3), SEQUENCES),
    "softsign": (F.softsign, VECTORS),
    "selu": (F.selu, VECTORS),
    "hardswish": (F.hardswish, VECTORS),
    "written hardswish": (lambda x: x * F.hardsigmoid(x), VECTORS),
    "another hardswish": (lambda x: x * (F.relu6(x + 3) / 6), VECTORS),
    "a third hardswish": (lambda x: x * F.relu6(x + 3) / 6, VECTORS),
    "maximum": (lambda x: torch.maximum(x[0], x[1]), VECTORS),
    "scatter": (lambda x: torch.slice_scatter(x, 2 * x[:, :2], 1, 0, 2), VECTORS),
    "softmax of more": (lambda x: x.softmax(-1), VECTORS),
}
CASES = {**SHARP, **BOUNDS}


class Each(nn.Module):
    """Every function of one input, each in a module of its own, so that its rows have its name."""

    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        self.names = list(functions)
        self.functions = nn.ModuleList(map(Applied, functions.values()))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [function(x) for function in self.functions]


class Applied(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * 1  # so that what only moves entries has a row too


@cache
def bounds(shape: tuple[int, ...]) -> dict[str, float]:
    """The bound of each function of inputs of a shape: one export for all of them."""
    model = Each({name: case[0] for name, case in CASES.items() if case[1] == shape})
    rows = certify(model, torch.zeros(shape, dtype=torch.float64)).rows
    last = {row.name: row for row in rows if not math.isnan(row.log10_bound)}
    return {
        name: 10 ** last[f"functions.{index}"].log10_bound for index, name in enumerate(model.names)
    }


@pytest.mark.parametrize("name", CASES)
def test_no_pair_of_inputs_is_steeper_than_the_rule_says(name: str) -> None:
    function, shape = CASES[name]
    bound = bounds(shape)[name]
    found = steepest(function, shape)
    assert found <= bound * (1 + 1e-6)
    assert found >= (0.9 if name in SHARP else 0.1) * bound


@pytest.mark.parametrize("name", sorted(SLOPES))
def test_slopes_are_the_largest_ones_rounded_up(name: str) -> None:
    x = torch.linspace(-12, 12, 480_001, dtype=torch.float64).requires_grad_()
    operation = getattr(torch.ops.aten, name)
    y = operation(x)
    y = y[0] if isinstance(y, tuple) else y
    (slopes,) = torch.autograd.grad(y.sum(), x)
    steepest = float(slopes.abs().max())
    known = SLOPES[name]
    # torch has 1/6 in float32 in the backward of the hard functions.
    assert steepest * (1 - 1e-7) <= known.steepest <= steepest * (1 + 1e-4)
    largest = float(y.detach().abs().max())
    assert largest <= known.magnitude
    assert not known.shrinks or (y.abs() <= x.abs() * (1 + 1e-12)).all()


# A product is bounded where both of its factors are: the largest entries of each are what counts.

HIGH = 3 * constant(3, 5)
LARGEST: dict[str, Function] = {
    "sigmoid": torch.sigmoid,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-4, 2),
    "clamp by tensors": lambda x: torch.clamp(x, torch.tensor(-2.0), torch.tensor(0.5)),
    "hardtanh": lambda x: F.hardtanh(x, -4, 2),
    "sum": lambda x: torch.sub(x.clamp(-1, 1), torch.sin(x), alpha=3) + HIGH,
    "difference": lambda x: 7 - x.clamp(-1, 1),
    "times": lambda x: x.clamp(-1, 1) * HIGH,
    "divided": lambda x: x.clamp(-1, 1) / FACTORS,
    "broadcast": lambda x: (4 * x[:1].clamp(-1, 1)).expand(3, 5),
    "broadcast times": lambda x: x[:1].clamp(-1, 1) * HIGH,
    "where": lambda x: torch.where(MASK, x.clamp(-1, 1), 6.0),
    "masked_fill": lambda x: x.clamp(-1, 1).masked_fill(MASK, -6),
    "cat": lambda x: torch.cat([x[:1].clamp(-1, 1), 5 * x[1:2].tanh(), 8 * x[2:].sin()]),
    "maximum": lambda x: torch.maximum(5 * torch.sin(x), x.clamp(-7, 1)),
    "relu": lambda x: F.relu(x.clamp(-1, 5)),
    "leaky_relu": lambda x: F.leaky_relu(x.clamp(-5, 1), -3.0),
    "prelu": lambda x: F.prelu(x.clamp(-5, 1), torch.tensor([-3.0]).double()),
    "gelu": lambda x: F.gelu(x.clamp(-1, 5)),
    "softmax": lambda x: (10 * x).softmax(1),
    "layer_norm": lambda x: F.layer_norm(x, (5,), FACTORS, 4 * FACTORS),
    "normalize": lambda x: F.normalize(x, eps=0.5),
    "mean": lambda x: (x.clamp(-5, -1).mean(1, keepdim=True)).expand(3, 5),
    "total": lambda x: (x.clamp(-5, -1).sum(1, keepdim=True)).expand(3, 5),
    "largest": lambda x: (x.clamp(-5, -1).max(1, keepdim=True).values).expand(3, 5),
    "max_pool": lambda x: F.max_pool1d(x.clamp(-5, -1), 3, 1, 1),
    "avg_pool": lambda x: F.avg_pool1d(x.clamp(-5, -1), 3, 1, 1),
    "adaptive": lambda x: F.adaptive_avg_pool1d(F.adaptive_max_pool1d(x.clamp(-5, -1), 4), 5),
    "cube": lambda x: x.clamp(-3, 1) ** 3,
    "exp": lambda x: x.clamp(-1, 3).exp(),
    "product": lambda x: x.clamp(-3, 1) * x.flip(1).clamp(-4, 1),
    "glu": lambda x: F.glu(torch.cat([x, x], 1).clamp(-1, 6)),
    "padded": lambda x: F.pad(x[:, 1:].clamp(-1, 1), (1, 0), value=5.0),
    "copied": lambda x: x.clamp(-1, 3).repeat(1, 2)[:, 2:7].flip(0),
    "scattered": lambda x: torch.slice_scatter(x.clamp(-1, 3), 5 * x[:, :2].tanh(), 1, 0, 2),
    "dropout": lambda x: F.dropout(x.clamp(-1, 3), 0.5, training=False),
}


class Gated(nn.Module):
    """f(x) · sin(1000 y) / 1000, whose slope in y is |f(x)| at y = 0."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x) * (torch.sin(1000 * y) * 0.001)


class EachGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.functions = nn.ModuleList(map(Gated, LARGEST.values()))

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        return [function(x, y) for function in self.functions]


@cache
def gated_bounds() -> dict[str, float]:
    zeros = torch.zeros(VECTORS, dtype=torch.float64)
    rows = certify(EachGated(), (zeros, zeros)).rows
    last = {row.name: 10**row.log10_bound for row in rows}
    return {name: last[f"functions.{index}"] for index, name in enumerate(LARGEST)}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_entry_of_a_factor_is_in_the_bound_of_a_product(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn((400, *VECTORS), generator=generator, dtype=torch.float64)
    x[:200] = x[:200].sign() * 20 * torch.rand((200, *VECTORS), generator=generator).double()
    largest = max(float(LARGEST[name](each).abs().max()) for each in x)
    assert largest <= gated_bounds()[name] <= 3 * largest + 0.3
