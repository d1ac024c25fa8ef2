"""A generator and a discriminator as in BigGAN: class-conditional batch norm and attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snparam

from .contract import Architecture, check

CLASSES = torch.tensor([0, 2, 1, 2])
NOISE = torch.linspace(-2, 2, 4 * 6).sin().reshape(4, 6)
IMAGES = torch.linspace(-9, 9, 4 * 3 * 8 * 8).cos().reshape(4, 3, 8, 8)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias are linear in the class and the noise (ccbn)."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.gain = nn.Linear(condition, channels, bias=False)
        self.bias = nn.Linear(condition, channels, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain, bias = (1 + self.gain(y))[:, :, None, None], self.bias(y)[:, :, None, None]
        out: Tensor = self.norm(x) * gain + bias
        return out


class SelfAttention(nn.Module):
    """With its gate γ, as in SAGAN."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.phi = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.g = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.o = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(x).flatten(2)
        phi, g = F.max_pool2d(self.phi(x), 2).flatten(2), F.max_pool2d(self.g(x), 2).flatten(2)
        beta = torch.softmax(theta.transpose(1, 2) @ phi, -1)
        o = self.o((g @ beta.transpose(1, 2)).unflatten(2, x.shape[2:]))
        return self.gamma * o + x


class GeneratorBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.bn1 = ConditionalBatchNorm(inputs, condition)
        self.bn2 = ConditionalBatchNorm(outputs, condition)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_sc = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2)
        h = self.conv2(F.relu(self.bn2(self.conv1(h), y)))
        out: Tensor = h + self.conv_sc(F.interpolate(x, scale_factor=2))
        return out


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(3, 4)
        self.linear = nn.Linear(6, 8 * 2 * 2)
        self.blocks = nn.ModuleList([GeneratorBlock(8, 8, 10), GeneratorBlock(8, 4, 10)])
        self.attention = SelfAttention(8)
        self.output = nn.Sequential(
            nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh()
        )

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        y = torch.cat([self.shared(classes), z], 1)
        h = self.blocks[0](self.linear(z).unflatten(1, (8, 2, 2)), y)
        out: Tensor = self.output(self.blocks[1](self.attention(h), y))
        return out


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv_sc = nn.Conv2d(3, 8, 1)
        self.attention = SelfAttention(8)
        self.linear = nn.Linear(8, 1)
        self.embed = nn.Embedding(3, 8)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        h = F.avg_pool2d(self.conv2(F.relu(self.conv1(x))), 2) + self.conv_sc(F.avg_pool2d(x, 2))
        h = F.relu(self.attention(h)).sum((2, 3))
        out: Tensor = self.linear(h) + (self.embed(classes) * h).sum(1, keepdim=True)
        return out


ARCHITECTURES = [
    Architecture("generator", Generator, lambda m: m(NOISE, CLASSES)),
    Architecture("discriminator", Discriminator, lambda m: m(IMAGES, CLASSES)),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_contract(architecture: Architecture) -> None:
    check(architecture)


def test_the_generators_preset_leaves_its_embedding_alone_as_biggan_does() -> None:
    plan = snparam.plan_conversion(Generator(), preset="gan-generator")
    assert [row.weight for row in plan if row.decision == "skip"] == ["shared.weight"]
    assert not [
        row
        for row in snparam.plan_conversion(Discriminator(), preset="gan-discriminator")
        if row.decision != "convert"
    ]


def test_a_step_of_each_against_the_other_is_finite() -> None:
    """Through both, with the penalty on the discriminator's gradient that R1 is."""
    torch.manual_seed(0)
    generator, discriminator = Generator(), Discriminator()
    snparam.convert_model(generator, preset="gan-generator")
    snparam.convert_model(discriminator, preset="gan-discriminator")
    fake = generator(NOISE, CLASSES)
    real = IMAGES.clone().requires_grad_()
    scores = discriminator(real, CLASSES)
    (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    loss = F.relu(1 - scores).mean() + F.relu(1 + discriminator(fake, CLASSES)).mean()
    (loss + slope.square().sum()).backward()
    for model in (generator, discriminator):
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
