"""The networks that are measured: usual shapes, random weights, no dependency but torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Network(NamedTuple):
    """A network to measure: the function that makes it, and the shape of its input."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


class Residual(nn.Module):
    """A residual block, basic (two 3×3 convolutions) or bottleneck (1×1, 3×3, 1×1).

    Source: He et al. 2016, with the stride in the first 3×3 convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * 4 if bottleneck else width
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        if not bottleneck:
            sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        self.convs = nn.ModuleList(
            [nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(o) for _, o, _, _ in sizes])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / stride, ...)."""
        y, last = x, len(self.convs) - 1
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if number < last:
                y = F.relu(y)
        return F.relu(y + self.shortcut(x))


def resnet(depths: tuple[int, ...], bottleneck: bool) -> nn.Module:
    """Return a residual network with 1000 classes; `depths` are the numbers of blocks per stage."""
    parts: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for stage, depth in enumerate(depths):
        for block in range(depth):
            width = 64 * 2**stage
            parts.append(Residual(inputs, width, 2 if stage and not block else 1, bottleneck))
            inputs = width * 4 if bottleneck else width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class Block(nn.Module):
    """A pre-norm transformer block of plain linear layers."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape."""
        b, t, width = x.shape
        qkv = self.qkv(self.first(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return out


class Vit(nn.Module):
    """A small vision transformer: 6 blocks of width 384, patches of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 384, 8, 8)
        self.blocks = nn.Sequential(*[Block(384, 6, causal=False) for _ in range(6)])
        self.head = nn.Linear(384, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 3, height, width) to (batch, 1000)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.blocks(x).mean(1))
        return out


def gpt2_blocks() -> nn.Module:
    """Return four transformer blocks of GPT-2's width, without embeddings and head."""
    return nn.Sequential(*[Block(768, 12, causal=True) for _ in range(4)])


def stack(depth: int, width: int = 64) -> nn.Module:
    """Return a chain of small layers, where the number of operations costs, not the arithmetic."""
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])


NETWORKS: dict[str, Network] = {
    "ResNet-18": Network(lambda: resnet((2, 2, 2, 2), bottleneck=False), (8, 3, 64, 64)),
    "ResNet-50": Network(lambda: resnet((3, 4, 6, 3), bottleneck=True), (8, 3, 64, 64)),
    "ViT, 6 x 384": Network(Vit, (4, 3, 64, 64)),
    "GPT-2 blocks, 4 x 768": Network(gpt2_blocks, (2, 64, 768)),
}


def tiny() -> nn.Module:
    """Return the network of a quick run."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))


TINY: dict[str, Network] = {"tiny": Network(tiny, (2, 3, 8, 8))}


def layer(shape: tuple[int, ...]) -> nn.Module:
    """Return a Linear or, for four dimensions, a Conv2d whose weight has the given shape."""
    kind = nn.Linear(1, 1, bias=False) if len(shape) == 2 else nn.Conv2d(1, 1, 1, bias=False)
    kind.weight = nn.Parameter(torch.randn(shape) * 0.02)
    return kind
