"""The library against the classic layer, written sequentially: same u, values, output, gradient.

What is compared, and to what. A Gram-Schmidt row whose remainder is small, a row whose singular
value is at rounding level, and a row inside a cluster of singular values are ill-conditioned: two
correct implementations differ there by much more than one rounding, and the sequential one differs
from itself when its operations are reordered. A fixed tolerance would either fail there or have to
be loosened everywhere. So the tolerance is fixed (2e-5 in float32, 1e-10 in float64) and the
conditioning is measured, on the reference alone: it is run once more with every weight and u
perturbed by a known relative amount, and whatever that moves so far that ROUNDINGS roundings would
move it by more than the tolerance is noise in the reference too. There the library has to be finite
and of norm at most one. Everything else has to agree. How much is compared is not left to chance:
`test_every_row_of_a_well_conditioned_weight` requires all of it.

In float32 the two are compared step by step, each time from the library's own weight and u, because
the iteration amplifies what one rounding of an earlier step leaves, as it should: it is a power
method. In float64 whole training runs are compared, each side with its own weight and state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import EPS, Layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from snparam import SpectralNorm, register_sn
from snparam.testing.tensors import weight_with

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
# How many roundings of its inputs a backward stable computation of this length may amount to.
ROUNDINGS = 32
KINDS = ("linear", "conv", "transposed conv", "embedding")


@dataclass(frozen=True)
class Case:
    kind: str
    outputs: int  # per group
    inputs: int  # per group
    groups: int
    blocks: str | None
    num_svs: int
    num_itrs: int
    eps: float
    spectrum: str
    scale: float
    seed: int
    steps: int

    def layer(self, dtype: torch.dtype) -> nn.Module:
        o, i, g = self.outputs, self.inputs, self.groups
        if self.kind == "linear":
            layer = nn.Linear(i, o, bias=False)
        elif self.kind == "conv":
            layer = nn.Conv2d(g * i, g * o, (2, 3), groups=g, bias=False)
        elif self.kind == "transposed conv":
            layer = nn.ConvTranspose2d(g * i, g * o, (2, 3), groups=g, bias=False)
        else:
            layer = nn.Embedding(o, i)
        with torch.no_grad():
            weight = weight_with(
                self.spectrum, layer.weight.shape, seed=self.seed, scale=self.scale, dtype=dtype
            )
        layer.weight = nn.Parameter(weight)
        return layer

    def operation(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What the layer computes with its input and a weight."""
        if self.kind == "linear":
            return F.linear
        if self.kind == "conv":
            return lambda x, w: F.conv2d(x, w, groups=self.groups)
        if self.kind == "transposed conv":
            return lambda x, w: F.conv_transpose2d(x, w, groups=self.groups)
        return F.embedding

    def inputs_of(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        if self.kind == "embedding":
            return torch.randint(self.outputs, (3,), generator=generator)
        shape = (3, self.inputs) if self.kind == "linear" else (2, self.groups * self.inputs, 3, 4)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def reference(self, weight: Tensor, u: Tensor) -> Layer:
        return Layer(
            weight,
            u,
            num_itrs=self.num_itrs,
            eps=EPS,
            transposed=self.kind == "transposed conv",
            groups=self.groups,
        )


@st.composite
def cases(draw, max_steps, spectra=("gaussian", "decaying", "clustered", "repeated", "deficient")):
    kind = draw(st.sampled_from(KINDS))
    groups = draw(st.integers(1, 3)) if "conv" in kind else 1
    blocks = draw(st.sampled_from((None, "auto"))) if "conv" in kind else None
    outputs, inputs = draw(st.integers(1, 18)), draw(st.integers(1, 18))
    rows = outputs * (1 if blocks else groups)
    columns = inputs * (6 if "conv" in kind else 1)
    return Case(
        kind=kind,
        outputs=outputs,
        inputs=inputs,
        groups=groups,
        blocks=blocks,
        num_svs=draw(st.integers(1, min(16, rows, columns))),
        num_itrs=draw(st.integers(1, 4)),
        eps=draw(st.sampled_from((0.0, EPS))),
        spectrum=draw(st.sampled_from(spectra)),
        scale=draw(st.sampled_from((1.0, 0.05, 20.0))),
        seed=draw(st.integers(0, 2**31 - 1)),
        steps=draw(st.integers(1, max_steps)),
    )


@dataclass
class Seen:
    """What one forward and backward showed, and the size of the terms each thing is a sum of."""

    u: Tensor
    sv: Tensor
    output: Tensor
    output_size: float
    gradient: Tensor
    gradient_size: float
    evaluated: Tensor


def loss_of(output: Tensor) -> Tensor:
    pattern = torch.arange(output.numel(), dtype=output.dtype).sin().reshape(output.shape)
    return (torch.tanh(output) * pattern).sum()


def run_library(layer: nn.Module, norm: SpectralNorm, x: Tensor) -> Seen:
    original = layer.parametrizations.weight.original
    original.grad = None
    output = layer(x)
    loss_of(output).backward()
    u, sv = norm.u.clone(), norm.sv.clone()
    layer.eval()
    with torch.no_grad():
        evaluated = layer(x)
    layer.train()
    assert torch.equal(norm.u, u)
    assert torch.equal(norm.sv, sv)
    return Seen(u, sv, output.detach(), 0.0, original.grad.clone(), 0.0, evaluated)


def run_reference(case: Case, reference: Layer, x: Tensor) -> Seen:
    operation = case.operation()
    reference.weight.grad = None
    used = reference.normalised(training=True)
    used.retain_grad()
    output = operation(x, used)
    loss_of(output).backward()
    with torch.no_grad():
        evaluated = operation(x, reference.normalised(training=False))
        magnitude = x if case.kind == "embedding" else x.abs()
        output_size = float(operation(magnitude, used.abs()).norm())
        # The gradient is a difference, (G − ⟨G, W/σ⟩ u vᵀ) / σ, which may cancel altogether (for a
        # matrix of rank one it is zero): the size that counts is that of G / σ.
        smallest = float(reference.sv[:, 0].min())
        gradient_size = float(used.grad.norm()) / smallest
    return Seen(
        reference.u.clone(),
        reference.sv.clone(),
        output.detach(),
        output_size,
        reference.weight.grad.clone(),
        gradient_size,
        evaluated,
    )


def distances(seen: Seen, right: Seen) -> dict[str, Tensor]:
    """Relative differences: of each row of u, each singular value, the outputs, the gradient."""
    wide = torch.float64
    return {
        "u": (seen.u.to(wide) - right.u.to(wide)).norm(dim=-1),
        "sv": (seen.sv.to(wide) - right.sv.to(wide)).abs() / right.sv.to(wide).abs(),
        "output": (seen.output.to(wide) - right.output.to(wide)).norm() / right.output_size,
        "evaluated": (seen.evaluated.to(wide) - right.evaluated.to(wide)).norm()
        / right.output_size,
        "gradient": (seen.gradient.to(wide) - right.gradient.to(wide)).norm() / right.gradient_size,
    }


def perturbed(x: Tensor, amount: float, seed: int) -> Tensor:
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return x * (1 + amount * (2 * noise - 1))


class Comparison:
    """Holds one step after another of a run against the reference.

    `amount` is the relative size of the perturbations; without one everything is compared.
    """

    def __init__(self, dtype: torch.dtype, amount: float | None = None) -> None:
        self.tolerance, self.unit = TOLERANCE[dtype], torch.finfo(dtype).eps
        self.amount = amount
        self.noise: dict[str, Tensor] = {}

    def measure(self, right: Seen, moved: list[dict[str, Tensor]]) -> None:
        """What the reference says about its own noise.

        The noise of a run never falls again: a row that was noise once has lost its history.
        """
        assert self.amount is not None
        level = ROUNDINGS * self.unit * right.sv[:, :1] / right.sv.abs().cummin(-1).values
        for what in moved[0]:
            each = torch.stack([m[what] for m in moved]).amax(0) * ROUNDINGS * self.unit
            noise = each / self.amount
            if what in ("u", "sv"):
                noise = torch.maximum(noise, level)
            # Not torch.maximum: NaN has to count as noise, now and later.
            before = self.noise.get(what, torch.zeros_like(noise))
            self.noise[what] = torch.where(noise > before, noise, before) + 0 * noise

    def check(self, seen: Seen, right: Seen) -> None:
        for what, distance in distances(seen, right).items():
            noise = self.noise.get(what, torch.zeros_like(distance))
            too_far = (noise <= self.tolerance) & ~(distance <= self.tolerance)
            assert not too_far.any(), f"{what} is off by {distance} where the noise is {noise}"
        for what in (seen.u, seen.sv, seen.output, seen.gradient, seen.evaluated):
            assert torch.isfinite(what).all()
        assert (seen.u.norm(dim=-1) <= 1 + ROUNDINGS * self.unit).all()


def start(case: Case, dtype: torch.dtype) -> tuple[nn.Module, SpectralNorm, torch.Generator]:
    """The layer, registered, its u random, of random lengths."""
    generator = torch.Generator().manual_seed(case.seed)
    layer = case.layer(dtype)
    register_sn(layer, case.num_svs, case.num_itrs, blocks=case.blocks, eps=case.eps)
    norm = layer.parametrizations.weight[0]
    u = torch.randn(norm.u.shape, generator=generator, dtype=torch.float64)
    norm.u.copy_(u)
    return layer, norm, generator


def whole_run(case: Case, amount: float | None = 1e-12) -> None:
    """A training run in float64, each side with its own weight and u."""
    layer, norm, generator = start(case, torch.float64)
    weight = layer.parametrizations.weight.original
    comparison = Comparison(torch.float64, amount)
    reference = case.reference(weight, norm.u)
    others = [
        case.reference(perturbed(weight.detach(), amount, s), perturbed(norm.u, amount, s))
        for s in ((1, 2) if amount else ())
    ]
    rate = 0.05 * case.scale**2
    sgd = torch.optim.SGD([weight], lr=rate)
    for step in range(case.steps):
        x = case.inputs_of(torch.float64, generator)
        seen = run_library(layer, norm, x)
        right = run_reference(case, reference, x)
        if others:
            moved = [distances(run_reference(case, other, x), right) for other in others]
            comparison.measure(right, moved)
        comparison.check(seen, right)
        sgd.step()
        with torch.no_grad():
            for each in (reference, *others):
                each.weight -= rate * each.weight.grad
            for s, other in enumerate(others):
                other.weight.copy_(perturbed(other.weight, amount, 10 * step + s))


def step_by_step(case: Case, amount: float | None = 1e-7) -> None:
    """A training run in float32, each step held against float64 from the same weight and u."""
    layer, norm, generator = start(case, torch.float32)
    weight = layer.parametrizations.weight.original
    sgd = torch.optim.SGD([weight], lr=0.05 * case.scale**2)
    for step in range(case.steps):
        x = case.inputs_of(torch.float32, generator)
        wide = x if case.kind == "embedding" else x.double()
        W, u = weight.detach().double(), norm.u.double()
        comparison = Comparison(torch.float32, amount)
        right = run_reference(case, case.reference(W, u), wide)
        if amount:
            moved = []
            for s in (2 * step, 2 * step + 1):
                other = case.reference(perturbed(W, amount, s), perturbed(u, amount, s))
                moved.append(distances(run_reference(case, other, wide), right))
            comparison.measure(right, moved)
        comparison.check(run_library(layer, norm, x), right)
        sgd.step()


@settings(max_examples=100)
@given(cases(max_steps=20))
def test_float64_over_whole_training_runs(case):
    whole_run(case)


@settings(max_examples=100)
@given(cases(max_steps=6))
def test_float32_step_by_step(case):
    step_by_step(case)


@pytest.mark.parametrize("num_svs", range(1, 17))
def test_every_row_of_a_well_conditioned_weight(num_svs):
    """Nothing is left out as noise where nothing is: each k, all layers, both dtypes."""
    case = Case(
        kind=KINDS[num_svs % 4],
        outputs=24,
        inputs=20,
        groups=1,
        blocks=None,
        num_svs=num_svs,
        num_itrs=1 + num_svs % 3,
        eps=EPS,
        spectrum="flat",
        scale=1.0,
        seed=num_svs,
        steps=8,
    )
    whole_run(case, amount=None)
    step_by_step(case, amount=None)
