"""σ at the map: a layer computes what it does with the weight in use, and so do its derivatives.

The independent answer is the plain layer with W · γ/d(σ) as its weight, σ = uᵀ W v, with u and v
constants that the step of `reference.py` has found. Which form a layer uses is seen from its
output: the ordinary one ends in the operation that the plain layer ends in.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from helpers import reference
from helpers.holder import norm_of, original_of
from helpers.parametrized import drawing_from
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import snparam
from snparam.estimators.estimate import ESTIMATORS, Estimate, Estimator, register_estimator
from snparam.parametrization import linear_maps

WIDE = {"dtype": torch.float64}


@dataclass(frozen=True)
class Case:
    """A layer, and the shape of an input of it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def layer(self, **options: Any) -> nn.Module:
        """The layer, normalised, with a u that is far from converged."""
        with drawing_from(0):
            layer = self.make()
            return snparam.register_sn(layer, **{"init": "random", **self.options, **options})

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()


def linear(*args: int, **kwargs: Any) -> Callable[[], nn.Module]:
    return partial(nn.Linear, *args, **WIDE, **kwargs)


def conv(dims: int, *args: int, channels_last: bool = False, **kwargs: Any) -> Any:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    def make() -> nn.Module:
        layer = kind(*args, **WIDE, **kwargs)
        if channels_last:
            layer = layer.to(memory_format=LAST[dims])
        return layer

    return make


LAST: dict[int, Any] = {2: torch.channels_last, 3: torch.channels_last_3d}

LINEAR = {
    "one vector": Case(linear(5, 4), (5,)),
    "few vectors": Case(linear(5, 4), (2, 5)),  # the output is smallest
    "few vectors, wide output": Case(linear(3, 9), (2, 3)),  # the input is smallest
    "many vectors": Case(linear(5, 4), (40, 5)),  # the weight is smallest
    "three dimensions": Case(linear(5, 4), (2, 3, 5)),
    "no bias": Case(linear(5, 4, bias=False), (6, 5)),
    "no bias, one vector": Case(linear(5, 4, bias=False), (5,)),
    "one output": Case(linear(5, 1), (3, 5)),
    "one input": Case(linear(1, 5), (3, 1)),
}
CONV = {
    "1d": Case(conv(1, 3, 4, 3), (2, 3, 8)),
    "1d, strided": Case(conv(1, 3, 4, 3, stride=2, padding=2, dilation=2), (2, 3, 9)),
    "1d, weight smallest": Case(conv(1, 2, 2, 2), (4, 2, 30)),
    "1d, input smallest": Case(conv(1, 2, 30, 1), (1, 2, 1)),
    "1d, output smallest": Case(conv(1, 30, 1, 5), (1, 30, 6)),
    "2d": Case(conv(2, 3, 4, 3, padding=1), (2, 3, 5, 6)),
    "2d, no bias": Case(conv(2, 3, 4, 3, bias=False), (2, 3, 5, 6)),
    "2d, uneven": Case(
        conv(2, 4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 4, 7, 6)
    ),
    "2d, groups": Case(conv(2, 4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "2d, depthwise": Case(conv(2, 4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "2d, weight smallest": Case(conv(2, 2, 2, 1), (2, 2, 9, 9)),
    "2d, input smallest": Case(conv(2, 2, 40, 3, padding=1), (1, 2, 3, 3)),
    "2d, output smallest": Case(conv(2, 20, 2, 3), (1, 20, 3, 3)),
    "2d, output smallest, no bias": Case(conv(2, 20, 2, 3, bias=False), (1, 20, 3, 3)),
    "2d, channels_last weight": Case(conv(2, 3, 4, 3, channels_last=True), (2, 3, 5, 6)),
    "3d": Case(conv(3, 2, 3, 2), (2, 2, 3, 4, 3)),
    "3d, groups": Case(conv(3, 2, 4, 2, groups=2, stride=2), (1, 2, 4, 4, 4)),
    "3d, channels_last weight": Case(conv(3, 2, 3, 2, channels_last=True), (2, 2, 3, 4, 3)),
}
CASES = {**{f"linear, {name}": case for name, case in LINEAR.items()}, **CONV}
# One of each kind, for what does not depend on where σ is put.
FEW_NAMES = ("linear, three dimensions", "1d", "2d, groups", "3d, groups")
FEW = [CASES[name] for name in FEW_NAMES]

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "coeff": {"coeff": 2.5},
    "soft, above": {"soft": True, "coeff": 0.01},
    "soft, below": {"soft": True, "coeff": 100.0},
    "learned gain": {"gain": "learned"},
    "fixed gain": {"gain": "fixed"},
    "two vectors": {"num_svs": 2, "num_itrs": 2},
    "turned": {"num_svs": 2, "sigma": "rayleigh-ritz"},
}

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
few = pytest.mark.parametrize("case", FEW, ids=FEW_NAMES)


def vectors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """u and v that the next training forward of a layer divides by, from the classic loop."""
    norm, matrix = norm_of(layer), reference.rows_first(original_of(layer).detach()).double()
    u = norm.u[0].double()
    for _ in range(norm.num_itrs):
        u, v, _ = reference.step(matrix, u)
    if norm.sigma == "rayleigh-ritz":
        left, _, right = torch.linalg.svd(u @ matrix @ v.T)
        u, v = left.T @ u, right @ v
    return u[0], v[0]


class Composed:
    """The plain layer, with the weight that a normalised layer is to use in its next forward."""

    def __init__(self, case: Case, layer: nn.Module) -> None:
        self.plain, self.u_v, self.norm = case.make(), vectors(layer), norm_of(layer)
        self.plain.to(original_of(layer).dtype)
        leaves = {name: p.detach().clone() for name, p in layer.named_parameters()}
        self.leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        if self.norm.settings.gain == "fixed":
            self.leaves[GAIN] = self.norm.gain.clone()

    def weight(self) -> Tensor:
        weight, settings = self.leaves[ORIGINAL], self.norm.settings
        u, v = (one.to(weight.dtype) for one in self.u_v)
        sigma = u @ reference.rows_first(weight) @ v
        divisor = (sigma / settings.coeff).clamp_min(1.0) if settings.soft else sigma
        factor = 1.0 if settings.soft else settings.coeff
        return weight * (self.leaves.get(GAIN, factor) / divisor)

    def __call__(self, x: Tensor) -> Tensor:
        given = {"weight": self.weight()}
        if "bias" in self.leaves:
            given["bias"] = self.leaves["bias"]
        out: Tensor = functional_call(self.plain, given, (x,))
        return out

    def inputs(self, layer: nn.Module) -> list[Tensor]:
        return [self.leaves[name] for name, _ in layer.named_parameters()]


ORIGINAL = "parametrizations.weight.original"
GAIN = "parametrizations.weight.0.gain"


def upstream(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return drawn.to(out.dtype)


def is_at_the_map(out: Tensor, plain: Tensor) -> bool:
    """Whether an output does not end in what the plain layer's ends in."""
    assert out.grad_fn is not None
    assert plain.grad_fn is not None
    return out.grad_fn.name() != plain.grad_fn.name()


def assert_same_as_composed(
    case: Case,
    layer: nn.Module,
    x: Tensor,
    *,
    at_the_map: bool = True,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **tolerance: float,
) -> None:
    """The value of a forward, and all gradients, are those of the composition."""
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-11}
    composed, y = Composed(case, layer), x.detach().clone().requires_grad_(x.requires_grad)
    with around():
        out = layer(x)
    with around():
        expected = composed(y)
    assert is_at_the_map(out, expected) == at_the_map
    assert_close(out, expected, **tolerance)
    wanted = [x] if x.requires_grad else []
    mine = [*wanted, *layer.parameters()]
    theirs = [*([y] if x.requires_grad else []), *composed.inputs(layer)]
    kept = [index for index, one in enumerate(mine) if one.requires_grad]
    grad = upstream(expected)
    found = torch.autograd.grad(out, [mine[i] for i in kept], grad)
    right = torch.autograd.grad(expected, [theirs[i] for i in kept], grad)
    for got, one in zip(found, right, strict=True):
        assert_close(got, one, **tolerance)


def has_as_many(case: Case, options: dict[str, Any]) -> bool:
    """Whether a layer has as many singular values as are to be tracked."""
    return options.get("num_svs", 1) <= min(case.make().weight.flatten(1).shape)


# Values and gradients


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@cases
def test_values_and_gradients_are_those_of_the_composition(
    case: Case, options: dict[str, Any]
) -> None:
    if has_as_many(case, options):
        assert_same_as_composed(case, case.layer(**options), case.input())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@cases
def test_without_reading_numbers_they_are_too(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where reading one would wait for the device."""
    monkeypatch.setattr(linear_maps, "reads_freely", lambda _: False)
    if has_as_many(case, options):
        assert_same_as_composed(case, case.layer(**options), case.input())


@pytest.mark.parametrize("gamma", [0.0, -1.7, 1e-320, 3.0])
@pytest.mark.parametrize("gain", ["learned", "fixed"])
@few
def test_any_gain(case: Case, gain: str, gamma: float) -> None:
    layer = case.layer(gain=gain)
    with torch.no_grad():
        norm_of(layer).gain.fill_(gamma)
    assert_same_as_composed(case, layer, case.input())


@pytest.mark.parametrize("options", [{}, {"gain": "learned"}], ids=str)
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "x weight", "weight bias", "x bias"])
@few
def test_what_asks_for_no_gradient_gets_none(
    case: Case, frozen: str, options: dict[str, Any]
) -> None:
    layer, x = case.layer(**options), case.input()
    x.requires_grad_("x" not in frozen)
    original_of(layer).requires_grad_("weight" not in frozen)
    layer.bias.requires_grad_("bias" not in frozen)
    assert_same_as_composed(case, layer, x)
    layer(x).sum().backward()
    assert (x.grad is None) == ("x" in frozen)
    assert (original_of(layer).grad is None) == ("weight" in frozen)
    assert (layer.bias.grad is None) == ("bias" in frozen)


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same numbers with other strides."""
    found = {
        "every second": x.detach().repeat_interleave(2, -1)[..., ::2],
        "expanded": x.detach()[..., :1].expand(x.shape),
        "transposed": x.detach().transpose(0, -1).contiguous().transpose(0, -1),
    }
    if x.ndim in (4, 5):
        found["channels_last"] = x.detach().contiguous(memory_format=LAST[x.ndim - 2])
    return {name: each.requires_grad_() for name, each in found.items()}


@pytest.mark.parametrize("strides", ["every second", "transposed", "channels_last", "expanded"])
@cases
def test_strides_of_the_input_do_not_matter(case: Case, strides: str) -> None:
    x = strided(case.input()).get(strides)
    if x is not None:
        assert_same_as_composed(case, case.layer(), x)


@cases
def test_strides_of_the_upstream_gradient_do_not_matter(case: Case) -> None:
    layer, x = case.layer(), case.input()
    composed, y = Composed(case, layer), x.detach().clone().requires_grad_()
    mine, theirs = [x, *layer.parameters()], [y, *composed.inputs(layer)]
    found = torch.autograd.grad(layer(x).sum(), mine)  # expanded
    right = torch.autograd.grad(composed(y).sum(), theirs)
    for got, one in zip(found, right, strict=True):
        assert_close(got, one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("update", ["forward", "step"])
@few
def test_gradients_accumulate_over_several_forwards(case: Case, update: str) -> None:
    layer = case.layer(update=update)
    if update == "step":
        snparam.refresh(layer)
        snparam.update(layer)
    total: dict[str, Tensor] = {}
    for scale in (1.0, -0.3, 2.0):
        x = case.input().detach() * scale
        composed = Composed(case, layer)
        layer(x).square().sum().backward()
        composed(x).square().sum().backward()
        for name, leaf in composed.leaves.items():
            assert leaf.grad is not None
            total[name] = total.get(name, torch.zeros_like(leaf)) + leaf.grad
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, total[name], rtol=1e-7, atol=1e-9)


# Derivatives of every order


class Held(Estimator):
    """Vectors that depend on no weight: W / uᵀWv is then a function of W to take differences of."""

    name, side = "held", "below"

    def start(self, stack: Any, k: int) -> tuple[Tensor, Tensor]:
        left, values, _ = torch.linalg.svd(stack + 0.3, full_matrices=False)
        return left.mT[:, :k].contiguous(), values[:, :k]

    def _held(self, stack: Any, u: Tensor) -> Estimate:
        v = torch.linspace(0.5, 1.5, stack.shape[2], dtype=u.dtype).expand(1, 1, -1)
        v = v / v.norm() * torch.sign((u[:, :1] @ stack @ v.mT).sum())
        return Estimate.from_vectors(u[:, :1].clone(), v, (u[:, :1] @ stack @ v.mT).reshape(1, 1))

    def move(self, stacks: Any, us: Any, steps: int, eps: float) -> list[Estimate]:
        return [self._held(stack, u) for stack, u in zip(stacks, us, strict=True)]

    def read(self, stack: Any, u: Tensor, eps: float) -> Estimate:
        return self._held(stack, u)


@pytest.fixture
def held() -> Iterator[str]:
    register_estimator(Held())
    yield Held.name
    del ESTIMATORS[Held.name]


SMALL = {
    "linear": Case(linear(3, 2), (2, 3)),
    "linear, one vector": Case(linear(3, 2, bias=False), (3,)),
    "conv1d": Case(conv(1, 2, 3, 2), (2, 2, 3)),
    "conv2d, groups": Case(conv(2, 2, 2, 2, groups=2, padding=1), (1, 2, 2, 2)),
    "conv2d, no bias": Case(conv(2, 2, 2, 2, bias=False, stride=2), (1, 2, 3, 3)),
    "conv3d": Case(conv(3, 1, 2, 2), (1, 1, 2, 3, 2)),
}
ORDERS = {name: OPTIONS[name] for name in ("default", "coeff", "soft, above", "learned gain")}


@pytest.mark.parametrize("options", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_first_and_second_derivatives_are_those_of_finite_differences(
    case: Case, options: dict[str, Any], held: str
) -> None:
    layer, x = case.layer(init="converged", sigma=held, **options), case.input()
    inputs = (x, *layer.parameters())
    plain = case.make()(x)
    assert is_at_the_map(layer(x), plain)

    def function(*_: Tensor) -> Tensor:  # differences are taken of the layer's own parameters
        out: Tensor = layer(x)
        return out

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("options", ORDERS.values(), ids=ORDERS)
@few
def test_a_penalty_on_gradients_has_the_compositions_gradient(
    case: Case, options: dict[str, Any]
) -> None:
    layer, x = case.layer(**options), case.input()
    composed, y = Composed(case, layer), x.detach().clone().requires_grad_()

    def penalty(out: Tensor, inputs: list[Tensor]) -> Tensor:
        first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs, create_graph=True)
        return sum((g.pow(2).sum() for g in (*first, *second)), start=torch.zeros((), **WIDE))

    mine, theirs = [x, *layer.parameters()], [y, *composed.inputs(layer)]
    penalty(layer(x), mine).backward()
    penalty(composed(y), theirs).backward()
    for got, one in zip(mine, theirs, strict=True):
        assert_close(got.grad, one.grad, rtol=1e-8, atol=1e-8)


@few
def test_a_graph_that_is_retained_gives_the_same_twice(case: Case) -> None:
    layer, x = case.layer(gain="learned"), case.input()
    inputs, out = [x, *layer.parameters()], layer(x)
    grad = upstream(out)
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    copies = [each.clone() for each in first]
    second = torch.autograd.grad(out, inputs, grad)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, copies))  # nothing was written to what was handed out
    assert torch.equal(grad, upstream(out))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("options", [{}, {"gain": "learned"}], ids=str)
@few
def test_a_batch_of_gradients_is_each_by_itself(case: Case, options: dict[str, Any]) -> None:
    layer, x = case.layer(**options), case.input()
    inputs, out = [x, *layer.parameters()], layer(x)
    batch = torch.stack([upstream(out), -2 * upstream(out).flip(0), torch.zeros_like(out)])
    found = torch.autograd.grad(out, inputs, batch, is_grads_batched=True, retain_graph=True)
    for index, grad in enumerate(batch):
        right = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        for got, one in zip(found, right, strict=True):
            assert_close(got[index], one, rtol=1e-9, atol=1e-11)


# What may follow, and what is kept


@pytest.mark.parametrize(
    "act",
    [
        lambda y: y.relu_(),
        lambda y: y.mul_(3.0),
        lambda y: nn.functional.leaky_relu_(y, 0.2),
        lambda y: y.flatten().zero_(),
    ],
    ids=["relu_", "mul_", "leaky_relu_", "zero_ of a view"],
)
@cases
def test_an_activation_in_place_may_follow(case: Case, act: Callable[[Tensor], Tensor]) -> None:
    layer, x = case.layer(), case.input()
    composed, y = Composed(case, layer), x.detach().clone().requires_grad_()
    grad = upstream(case.make()(y))
    out, right = layer(x), composed(y) + 0
    act(out), act(right)
    assert_close(out, right, rtol=1e-9, atol=1e-11)
    found = torch.autograd.grad(out, [x, *layer.parameters()], grad)
    expected = torch.autograd.grad(right, [y, *composed.inputs(layer)], grad)
    for got, one in zip(found, expected, strict=True):
        assert_close(got, one, rtol=1e-9, atol=1e-11)


@cases
def test_the_output_is_no_view_and_shares_nothing(case: Case) -> None:
    layer, x = case.layer(), case.input()
    out = layer(x)
    assert not out._is_view()
    assert out.untyped_storage().nbytes() == out.nbytes
    others = [x, *layer.parameters(), *layer.buffers()]
    assert all(out.data_ptr() != other.data_ptr() for other in others)


@cases
def test_gradients_share_no_memory(case: Case) -> None:
    layer, x = case.layer(), case.input()
    out = layer(x)
    grad = upstream(out)
    tensors = [grad, x, *layer.parameters(), *layer.buffers()]
    tensors += torch.autograd.grad(out, [x, *layer.parameters()], grad)
    assert len({each.untyped_storage().data_ptr() for each in tensors}) == len(tensors)


@pytest.mark.parametrize("change", ["x", "weight"])
@few
def test_a_write_to_what_is_saved_is_noticed(case: Case, change: str) -> None:
    layer, x = case.layer(), case.input()
    out = layer(x)
    with torch.no_grad():
        (x if change == "x" else original_of(layer)).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def saved(run: Callable[[], Tensor]) -> tuple[Counter[int], int]:
    """Bytes of each tensor that autograd saves, of those that are no vectors; and of vectors."""
    large: Counter[int] = Counter()
    vectors = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal vectors
        if sum(size > 1 for size in tensor.shape) > 1:
            large[tensor.nbytes] += 1
        else:
            vectors += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return large, vectors


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "case",
    [
        Case(linear(32, 24), (40, 32)),
        Case(linear(32, 24, bias=False), (2, 20, 32)),
        Case(conv(1, 8, 16, 3), (2, 8, 30)),
        Case(conv(2, 8, 16, 3, groups=2), (2, 8, 9, 9)),
        Case(conv(3, 4, 8, 3), (2, 4, 5, 5, 5)),
    ],
    ids=lambda case: "x".join(map(str, case.shape)),
)
def test_what_is_saved_is_what_the_plain_layer_saves_and_vectors(
    case: Case, options: dict[str, Any]
) -> None:
    layer, plain, x = case.layer(**options), case.make(), case.input()
    mine, vectors = saved(lambda: layer(x))
    theirs, _ = saved(lambda: plain(x))
    assert mine == theirs
    rows, *rest = original_of(layer).shape
    bias, numbers = rows, 3
    assert vectors <= (rows + torch.Size(rest).numel() + bias + numbers) * 8


# Checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("update", ["forward", "step"])
@few
def test_a_recomputation_divides_by_what_its_forward_did(
    case: Case, update: str, reentrant: bool
) -> None:
    """Three forwards before the backward: the state has moved on by then."""
    layers = [case.layer(update=update), case.layer(update=update)]
    xs = [case.input().detach() * scale for scale in (1.0, 0.5, -2.0)]
    for each in xs:
        each.requires_grad_()
    composed = [Composed(case, layers[0])]
    losses = [
        [layers[0](x).sin().sum() for x in xs],
        [checkpoint(lambda x: layers[1](x).sin(), x, use_reentrant=reentrant).sum() for x in xs],
    ]
    found = []
    for layer, (first, second, third) in zip(layers, losses, strict=True):
        inputs = [*layer.parameters()]
        for loss in (second, first - third):
            loss.backward()
        found.append([p.grad for p in inputs])
    for got, right in zip(*reversed(found), strict=True):
        assert_close(got, right, rtol=1e-9, atol=1e-11)
    assert_close(norm_of(layers[1]).u, norm_of(layers[0]).u)
    # And the first of them is what the composition gives.
    fresh = case.layer(update=update)
    out = checkpoint(fresh, xs[0], use_reentrant=reentrant)
    fresh(xs[1])
    out.sin().sum().backward()
    composed[0](xs[0].detach()).sin().sum().backward()
    for p, leaf in zip(fresh.parameters(), composed[0].inputs(fresh), strict=True):
        assert_close(p.grad, leaf.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("first", ["map", "weight"])
@few
def test_a_recomputation_uses_the_form_of_its_forward(case: Case, first: str) -> None:
    """A hook that comes, or goes, in between changes the form: other tensors would be saved."""
    layer, x = case.layer(), case.input()
    composed = Composed(case, layer)

    def hook(*_: object) -> None: ...

    handle = None if first == "map" else layer.parametrizations.weight.register_forward_hook(hook)
    out = checkpoint(layer, x, use_reentrant=False)
    if handle is None:
        layer.parametrizations.weight.register_forward_hook(hook)
    else:
        handle.remove()
    layer(x)  # the state moves on
    grad = upstream(out)
    found = torch.autograd.grad(out, [*layer.parameters()], grad)
    right = torch.autograd.grad(composed(x), composed.inputs(layer), grad)
    for got, one in zip(found, right, strict=True):
        assert_close(got, one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
@few
def test_a_region_may_read_the_weight_too(case: Case, reentrant: bool) -> None:
    """With and without a graph, before and after the layer's forward."""
    layers = [case.layer(update="step"), case.layer(update="step")]
    for layer in layers:
        snparam.update(layer)
    x = case.input()

    def region(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = layer.weight.sum()
        out = layer(x).sin() * scale
        return out.sum() + layer.weight.square().sum() * layer(x).cos().sum()

    region(layers[0], x).backward()
    out = checkpoint(region, layers[1], x, use_reentrant=reentrant)
    snparam.update(layers[1])
    out.backward()
    for p, q in zip(layers[1].parameters(), layers[0].parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


SAVED_PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.mv.default,
    torch.ops.aten.bmm.default,
]


@few
def test_selective_checkpointing_saves_products(case: Case) -> None:
    layer, x = case.layer(), case.input()
    composed, y = Composed(case, layer), x.detach().clone().requires_grad_()

    def policy(_: object, op: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in SAVED_PRODUCTS:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint(
        lambda x: layer(x.sin()).sin(),
        x,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )
    layer(x)  # the state moves on
    right = composed(y.sin()).sin()
    assert_close(out, right, rtol=1e-9, atol=1e-11)
    found = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad(right.sum(), [y, *composed.inputs(layer)])
    for got, one in zip(found, expected, strict=True):
        assert_close(got, one, rtol=1e-9, atol=1e-11)


# Numbers at the ends of what a dtype holds


def at_scale(case: Case, scale: float, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A layer of which σ is about `scale`, with a state that has converged."""
    layer = case.make()
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(weight * (scale / torch.linalg.matrix_norm(weight.flatten(1), 2)))
    layer = snparam.register_sn(layer.to(dtype), **options)
    if options.get("update") == "step":
        snparam.update(layer)
    return layer


def exactly(case: Case, layer: nn.Module) -> tuple[nn.Module, Tensor]:
    """The plain layer in float64 with W / σ(W), and σ(W), by an exact decomposition."""
    plain = case.make()
    weight = original_of(layer).detach().double()
    sigma = torch.linalg.matrix_norm(weight.flatten(1), 2)
    plain.weight = nn.Parameter(weight / sigma)
    if plain.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().double())
    return plain, sigma


STATES: dict[str, dict[str, Any]] = {
    "default": {},
    "two vectors": {"num_svs": 2},
    "turned": {"num_svs": 2, "sigma": "rayleigh-ritz"},
    "step": {"update": "step"},
}
PLACES = {
    name: CASES[name]
    for name in CASES
    if "smallest" in name or name in ("linear, few vectors", "linear, many vectors", "3d")
}


@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
@pytest.mark.parametrize("scale", [1e-41, 1e-39, 1e-37, 1e-30, 1e30, 3e37, 1e38])
@pytest.mark.parametrize("case", PLACES.values(), ids=PLACES)
def test_sigma_at_either_end_of_float32(case: Case, scale: float, options: dict[str, Any]) -> None:
    """1/σ may be no number of float32, and W / σ still is one."""
    if not has_as_many(case, options):
        return
    layer = at_scale(case, scale, torch.float32, **options)
    plain, sigma = exactly(case, layer)
    x = case.input(torch.float32)
    y = x.detach().double().requires_grad_()
    out, right = layer(x), plain(y)
    assert is_at_the_map(out, case.make().float()(x))
    close = {"rtol": 1e-3, "atol": 1e-3 if scale < 1e-40 else 1e-5}  # of the weight 1e-41 itself
    assert_close(out.double(), right, **close)
    grad = upstream(out)
    found, into = torch.autograd.grad(out, [x, original_of(layer)], grad)
    expected, into_used = torch.autograd.grad(right, [y, plain.weight], grad.double())
    assert_close(found.double(), expected, **close)
    if 1e-37 < scale < 1e37:  # or gradients, about 1/σ, are none themselves
        used, into_used = plain.weight.detach().flatten(1), into_used.flatten(1)
        left, _, turned = torch.linalg.svd(used, full_matrices=False)
        inner = (into_used * used).sum()
        wanted = into_used - inner * torch.outer(left[:, 0], turned[0])
        got = into.double().flatten(1) * sigma
        assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gain", [None, "learned"])
@few
def test_float16_at_a_large_sigma_is_finite_and_right(case: Case, gain: Any) -> None:
    """1/σ times a gradient is small for float16, and σ times an entry is large."""
    layer = at_scale(case, 6000.0, torch.float16, gain=gain)
    if gain is not None:
        with torch.no_grad():
            norm_of(layer).gain.fill_(1.0)
    plain, _ = exactly(case, layer)
    x = case.input(torch.float16)
    y = x.detach().double().requires_grad_()
    out, right = layer(x), plain(y)
    assert not is_at_the_map(out, case.make().half()(x))
    assert_close(out.double(), right, rtol=1e-2, atol=1e-2)
    (out * upstream(out)).sum().backward()
    (right * upstream(right)).sum().backward()
    assert x.grad is not None
    assert_close(x.grad.double(), y.grad, rtol=1e-2, atol=2e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@few
def test_a_broken_weight_is_used_as_it_is(case: Case, value: float) -> None:
    layer, x = case.layer(init="converged"), case.input()
    before = norm_of(layer).u.clone()
    with torch.no_grad():
        original_of(layer).view(-1)[0] = value
    weight = original_of(layer).detach()
    expected = functional_call(case.make(), {"weight": weight, "bias": layer.bias}, (x,))
    assert_close(layer(x), expected, equal_nan=True)
    assert torch.equal(norm_of(layer).u, before)


@few
def test_a_zero_weight_gives_the_bias_and_learns(case: Case) -> None:
    layer, x = case.make(), case.input()
    nn.init.zeros_(layer.weight)
    plain = copy.deepcopy(layer)
    layer = snparam.register_sn(layer)
    out, right = layer(x), plain(x)
    assert torch.equal(out, right)
    grad = upstream(out)
    (found,) = torch.autograd.grad(out, original_of(layer), grad)
    (expected,) = torch.autograd.grad(right, plain.weight, grad)
    assert_close(found, expected)


# Where the ordinary read is used


class Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a TorchFunction mode": Functions,
    "a TorchDispatch mode": Operations,
    "cached": parametrize.cached,
    "forward-mode AD": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@few
def test_in_a_context_the_weight_in_use_is_made(
    case: Case, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    layer = case.layer()
    assert_same_as_composed(case, layer, case.input(), at_the_map=False, around=around)
    assert_same_as_composed(case, layer, case.input())  # and after it no more


@few
def test_within_snparams_cache_all_reads_share_a_weight(case: Case) -> None:
    layer = case.layer()
    with snparam.cached(layer):
        assert_same_as_composed(case, layer, case.input(), at_the_map=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@few
def test_under_autocast_the_weight_in_use_is_made(case: Case, dtype: torch.dtype) -> None:
    layer, plain = case.layer().float(), case.make().float()
    x, (u, v) = case.input(torch.float32), vectors(case.layer().float())
    weight = original_of(layer).detach()
    sigma = u.float() @ reference.rows_first(weight) @ v.float()
    plain.weight, plain.bias = nn.Parameter(weight / sigma), layer.bias
    with torch.autocast("cpu", dtype):
        out, right = layer(x), plain(x)
    assert not is_at_the_map(out, right)
    assert out.dtype == right.dtype == dtype
    # The same products in the same dtype: beside it float32's rounding of the weight alone.
    assert_close(out, right, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("on", ["the list", "the SpectralNorm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@few
def test_hooks_on_the_parametrization_see_the_weight(case: Case, kind: str, on: str) -> None:
    layer, calls = case.layer(), []
    hooked = layer.parametrizations.weight if on == "the list" else norm_of(layer)
    handle = getattr(hooked, kind)(lambda *_: calls.append(1))
    assert_same_as_composed(case, layer, case.input(), at_the_map=False)
    assert calls
    handle.remove()
    assert_same_as_composed(case, layer, case.input())


@few
def test_a_hook_on_the_list_changes_what_is_computed(case: Case) -> None:
    layer, x = case.layer(), case.input()
    layer.parametrizations.weight.register_forward_hook(lambda *_: torch.zeros_like(_[-1]))
    out = layer(x)
    shape = [1] * (out.ndim - 2) if isinstance(layer, nn.modules.conv._ConvNd) else []
    assert torch.equal(out, layer.bias.view(-1, *shape).expand_as(out))


@few
def test_global_module_hooks_see_the_list(case: Case) -> None:
    layer, seen = case.layer(), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        assert_same_as_composed(case, layer, case.input(), at_the_map=False)
    finally:
        handle.remove()
    assert "SpectralNorm" in seen


@few
def test_hooks_on_the_layer_keep_it_at_the_map(case: Case) -> None:
    layer, calls = case.layer(), []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("backward"))
    layer(case.input()).sum().backward()
    assert calls == ["forward", "backward"]


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@few
def test_another_parametrization_is_applied(case: Case) -> None:
    layer, x = case.layer(init="converged"), case.input()
    plain = case.make()
    plain.weight = nn.Parameter(snparam.weight_in_use(layer) / 2)
    plain.bias = layer.bias
    parametrize.register_parametrization(layer, "weight", Halved(), unsafe=True)
    assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


@few
def test_a_forward_of_the_instance_is_called(case: Case) -> None:
    layer, x = case.layer(), case.input()
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    plain = Composed(case, layer)
    assert_close(layer(x), 2 * plain(x), rtol=1e-9, atol=1e-11)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x + 1, weight, bias)


class Named(nn.Linear):
    """Nothing of its own."""


OWN = {
    "forward": Case(partial(Doubled, 5, 4, **WIDE), (3, 5)),
    "_conv_forward": Case(partial(Shifted, 3, 4, 3, **WIDE), (2, 3, 8)),
}
OTHERS = {
    "reflect": Case(conv(2, 3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "circular": Case(conv(1, 3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5)),
    "same": Case(conv(2, 3, 4, 3, padding="same"), (2, 3, 5, 5)),
    "valid": Case(conv(1, 3, 4, 3, padding="valid"), (2, 3, 5)),
    "unbatched": Case(conv(2, 3, 4, 3), (3, 5, 5)),
    "unbatched 1d": Case(conv(1, 3, 4, 3, bias=False), (3, 5)),
    "empty batch": Case(conv(2, 3, 4, 3), (0, 3, 5, 5)),
    "no vectors": Case(linear(5, 4), (0, 5)),
    "no vectors in one dimension": Case(linear(5, 4), (2, 0, 5)),
}


@pytest.mark.parametrize("case", {**OWN, **OTHERS}.values(), ids={**OWN, **OTHERS})
def test_what_is_no_plain_linear_map_is_computed_with_the_weight(case: Case) -> None:
    assert_same_as_composed(case, case.layer(), case.input(), at_the_map=False)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "bias", 0.5)


def with_bias_beside(layer: nn.Module) -> None:
    del layer.bias
    layer.__dict__["bias"] = torch.ones(4, **WIDE)


def with_buffer_for_bias(layer: nn.Module) -> None:
    del layer.bias
    layer.register_buffer("bias", torch.ones(4, **WIDE))


def with_numbers(layer: Any) -> None:
    layer.stride, layer.padding, layer.dilation = 2, (1,), [1, 1]


LATER: dict[str, tuple[Case, Callable[[Any], None]]] = {
    "pruned bias": (LINEAR["few vectors"], pruned),
    "bias beside": (LINEAR["few vectors"], with_bias_beside),
    "buffer for bias": (LINEAR["few vectors"], with_buffer_for_bias),
    "geometry of numbers": (CONV["2d"], with_numbers),
}


@pytest.mark.parametrize(("case", "change"), LATER.values(), ids=LATER)
def test_what_is_changed_after_registration_is_what_is_computed_with(
    case: Case, change: Callable[[Any], None]
) -> None:
    layer, other, x = case.layer(), case.layer(), case.input()
    change(layer)
    change(other)
    with torch.no_grad():  # which makes the weight in use
        expected = other(x)
    assert_close(layer(x), expected, rtol=1e-9, atol=1e-11)


def test_a_subclass_that_changes_nothing_is_at_the_map() -> None:
    case = Case(partial(Named, 5, 4, **WIDE), (3, 5))
    assert_same_as_composed(case, case.layer(), case.input())


@few
def test_with_a_sigma_per_block_the_weight_is_made(case: Case) -> None:
    layer, x = case.layer(blocks=2), case.input()
    plain = case.make()
    parts = torch.stack(reference.rows_first(original_of(layer).detach()).chunk(2))
    snparam.refresh(layer)
    used = torch.cat(list(parts / torch.linalg.matrix_norm(parts, 2)[:, None, None]))
    plain.weight = nn.Parameter(used.reshape(plain.weight.shape))
    plain.bias = layer.bias
    out, right = layer(x), plain(x)
    assert not is_at_the_map(out, right)
    assert_close(out, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, x: (layer.bfloat16(), x.bfloat16()),
        lambda layer, x: (layer, nn.Parameter(x)),
        lambda layer, x: (layer.eval(), x),
    ],
    ids=["bfloat16", "an input that is a Parameter", "eval"],
)
@few
def test_other_tensors_are_computed_with_the_weight(case: Case, change: Any) -> None:
    layer, x = change(case.layer(), case.input().detach())
    assert not is_at_the_map(layer(x), case.make().to(x.dtype)(x))


@few
def test_without_gradients_the_weight_is_made_and_is_the_same(case: Case) -> None:
    layers, x = [case.layer(), case.layer()], case.input()
    with torch.no_grad():
        out = layers[0](x)
    assert_close(out, layers[1](x).detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(norm_of(layers[0]).u, norm_of(layers[1]).u)


@few
def test_an_input_of_another_dtype_is_refused_as_the_plain_layer_refuses_it(case: Case) -> None:
    layer, x = case.layer(), case.input(torch.float32)
    with pytest.raises(RuntimeError) as plain:
        case.make()(x)
    with pytest.raises(RuntimeError) as normalised:
        layer(x)
    assert str(normalised.value) == str(plain.value)


# torch's, of its own rules for forward-mode derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev", "jvp"])
@few
def test_torch_func_gives_what_the_plain_layer_gives(case: Case, transform: str) -> None:
    layer, x = case.layer(), case.input().detach()
    composed = Composed(case, layer)

    def run(function: Callable[[Tensor], Tensor]) -> Tensor:
        if transform == "vmap":
            return torch.func.vmap(function)(torch.stack([x, 2 * x]))
        if transform == "jvp":
            return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
        if transform == "jacrev":
            return torch.func.jacrev(function)(x)
        return torch.func.grad(lambda x: function(x).sin().sum())(x)

    with snparam.frozen(layer):
        assert_close(run(layer), run(composed), rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@few
def test_tracers_see_torchs_own_operations(case: Case) -> None:
    """Not what σ at the map is made of, which nothing could differentiate or save."""
    layer, x = case.layer(), case.input().detach()
    composed = Composed(case, layer)
    with snparam.frozen(layer):
        graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        compiled = torch.compile(layer, backend="aot_eager")
        for found in (graph, traced, compiled):
            assert_close(found(x), composed(x), rtol=1e-9, atol=1e-11)
