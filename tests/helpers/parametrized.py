"""Layers of each kind under torch's spectral_norm or under snparam, and what they should compute.

The independent answer is the layer as it was before, given W / σ(W) with σ by an exact
decomposition, differentiated by autograd. It is the answer for a state that has converged: then u
and v are the singular vectors, and dσ/dW = u vᴴ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import snparam
from helpers.spelled import dominated

Way = Callable[[nn.Module, str], nn.Module]


def by_torch(module: nn.Module, name: str) -> nn.Module:
    return parametrizations.spectral_norm(module, name)


def by_forward(module: nn.Module, name: str) -> nn.Module:
    return snparam.register_sn(module, name=name)


def by_step(module: nn.Module, name: str) -> nn.Module:
    return snparam.register_sn(module, name=name, update="step")


WAYS: dict[str, Way] = {"torch": by_torch, "forward": by_forward, "step": by_step}


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
        make: makes the layer.
        name: the tensor that is normalised.
        inputs: makes inputs, given a dtype.
        axis: the dimension of the weight that counts the rows.
    """

    make: Callable[[], nn.Module]
    name: str
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    axis: int = 0


def drawn(*shape: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return lambda dtype: (x.to(dtype),)


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(5, 4), "weight", drawn(3, 5)),
    "conv": Kind(lambda: nn.Conv2d(2, 4, 3, padding=1), "weight", drawn(2, 2, 5, 5)),
    "transposed": Kind(lambda: nn.ConvTranspose2d(2, 4, 3), "weight", drawn(2, 2, 4, 4), axis=1),
    "embedding": Kind(
        lambda: nn.Embedding(6, 4), "weight", lambda _: (torch.tensor([[1, 2, 5], [0, 0, 3]]),)
    ),
    "attention": Kind(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        "in_proj_weight",
        lambda dtype: drawn(2, 3, 4)(dtype) * 3,  # queries, keys and values
    ),
    "lstm": Kind(lambda: nn.LSTM(5, 3), "weight_ih_l0", drawn(4, 2, 5)),
}


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let modules draw from a seed of their own, and put torch's generator back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def plain(kind: Kind, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A layer that is not normalised, whose weight has one dominant singular value, about 3."""
    with drawing_from(seed):
        layer = kind.make().to(dtype)
    tensor = getattr(layer, kind.name)
    tensor.data = dominated(tuple(tensor.shape), dtype, kind.axis, seed)
    return layer


def run(layer: nn.Module, kind: Kind, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the layer makes of the kind's inputs: of several outputs, the first."""
    out = layer(*kind.inputs(dtype))
    return out[0] if isinstance(out, tuple) else out


def converge(layer: nn.Module, kind: Kind, updates: bool = False) -> None:
    """Move the state until it is that of the weight: σ₂/σ₁ is about 0.2, so that 15 steps do.

    Args:
        updates: whether an optimizer has stepped, after which with `update="step"` forwards move
            nothing.
    """
    mode = layer.training
    layer.train()
    for _ in range(15):
        with torch.no_grad():
            run(layer, kind)
        if updates and is_stepwise(layer):
            snparam.update(layer)
    layer.train(mode)


def is_stepwise(layer: nn.Module) -> bool:
    norms = [each for each in layer.modules() if isinstance(each, snparam.SpectralNorm)]
    return any(each.settings.update == "step" for each in norms)


def built(way: Way, kind: Kind, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The layer of `plain`, normalised one way, with a state that has converged."""
    with drawing_from(seed):
        layer = way(plain(kind, dtype, seed), kind.name)
    converge(layer, kind)
    return layer


def list_of(layer: Any, kind: Kind) -> Any:
    return layer.parametrizations[kind.name]


def original_of(layer: nn.Module, kind: Kind) -> nn.Parameter:
    original: nn.Parameter = list_of(layer, kind).original
    return original


def matrix(weight: Tensor, kind: Kind) -> Tensor:
    return weight.movedim(kind.axis, 0).flatten(1)


def norm(weight: Tensor, kind: Kind) -> Tensor:
    """σ of the weight as a matrix, by an exact decomposition, differentiable."""
    return torch.linalg.matrix_norm(matrix(weight, kind), 2)


def normalised(weight: Tensor, kind: Kind) -> Tensor:
    return weight / norm(weight, kind)


def computed_with(weight: Tensor, kind: Kind, layer: nn.Module) -> Tensor:
    """What the plain layer computes with a weight, and with the other parameters of `layer`."""
    others = {n: p for n, p in layer.named_parameters() if not n.startswith("parametrizations.")}
    given = {**others, kind.name: weight}
    out = functional_call(plain(kind, weight.dtype), given, kind.inputs(weight.dtype))
    return out[0] if isinstance(out, tuple) else out


def assert_computes_with(
    layer: nn.Module, kind: Kind, weight_of: Callable[[Tensor], Tensor], **tolerance: float
) -> None:
    """The output of a layer, and the gradient of its original, are those of a given weight.

    Args:
        weight_of: the weight that should be in use, as a differentiable function of the original.
    """
    original = original_of(layer, kind)
    output = run(layer, kind, original.dtype)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    leaf = original.detach().clone().requires_grad_()
    right = computed_with(weight_of(leaf), kind, layer)
    tolerance = tolerance or {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(output, right, **tolerance)
    (found,) = torch.autograd.grad(output, original, upstream)
    (expected,) = torch.autograd.grad(right, leaf, upstream)
    torch.testing.assert_close(found, expected, **tolerance)


def assert_normalised(layer: nn.Module, kind: Kind) -> None:
    """The layer computes with W / σ(W), whatever was done to it, once its state has converged."""
    assert_computes_with(layer, kind, lambda weight: normalised(weight, kind))
    used = getattr(layer, kind.name)
    torch.testing.assert_close(used, normalised(original_of(layer, kind), kind))


def state(layer: nn.Module) -> dict[str, Tensor]:
    """The buffers, copied."""
    return {name: buffer.detach().clone() for name, buffer in layer.named_buffers()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
