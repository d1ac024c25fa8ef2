"""What conversion promises for every network, checked against plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import snparam
from snparam import SpectralNorm


@dataclass(frozen=True)
class Architecture:
    """A network that somebody else wrote, in a tiny configuration with random weights.

    Attributes:
        name: what the test is called.
        build: makes it; the seed is set before.
        outputs: runs a forward and returns what it computes; in training mode a loss comes of it.
        share: what share of the parameters of two or more dimensions is to be normalised, at least.
        left: for weights that are left alone, by name (a suffix), a part of the reason.
        idle: weights that this forward does not read, by name (a suffix).
        gains: the kinds of gain that are tried.
    """

    name: str
    build: Callable[[], nn.Module]
    outputs: Callable[[nn.Module], Any]
    share: float = 1.0
    left: Mapping[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    gains: tuple[str, ...] = ("learned", "fixed")

    def make(self, seed: int) -> nn.Module:
        """The network, with the weights that belong to a seed."""
        torch.manual_seed(seed)
        return self.build()

    def __str__(self) -> str:
        return self.name


def check(architecture: Architecture) -> snparam.ConversionPlan:
    """All of the contract; each part takes a model of its own where it would disturb the others."""
    model = architecture.make(0)
    kind, plan = type(model), check_plan(architecture, model)
    before = computed(architecture, model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    convert(model)
    check_normalised(model)
    check_scale_is_forgotten(architecture, model)
    check_state_dict(architecture, model)
    check_training(architecture, copy.deepcopy(model))
    snparam.restore_model(model, bake=False)
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert type(model) is kind
    assert_same(computed(architecture, model), before)
    check_gains(architecture, model, before)
    check_bake(architecture, model)
    return plan


def convert(model: nn.Module, **options: Any) -> None:
    snparam.convert_model(model, progress=False, **options)


def check_plan(architecture: Architecture, model: nn.Module) -> snparam.ConversionPlan:
    """Every matrix is accounted for, and left alone for the reason that is expected."""
    plan = snparam.plan_conversion(model, progress=False)
    rows = {row.weight: row for row in plan}
    matrices = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2}
    unseen = {id(p) for p in matrices.values()} - {row.record.key for row in plan}
    assert not unseen, [name for name, p in matrices.items() if id(p) in unseen]
    for row in plan:
        assert row.decision in ("convert", "skip")
        assert row.decision == "convert" or row.reason, row.weight
    for suffix, reason in architecture.left.items():
        found = [row for name, row in rows.items() if name.endswith(suffix)]
        assert found, f"no weight ends in {suffix}"
        for row in found:
            assert row.decision == "skip", row.weight
            assert reason in row.reason, row.reason
    entries = {row.record.key: matrix for row in plan if (matrix := _size(row.shape))}
    done = {row.record.key for row in plan if row.decision == "convert"}
    share = sum(entries[key] for key in done) / sum(entries.values())
    assert abs(share - plan.share) < 1e-12
    assert share >= architecture.share - 1e-3, str(plan)
    assert f"{share:.1%} of" in str(plan).splitlines()[-1]
    return plan


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel()) if shape else 0


def norms_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, SpectralNorm]]:
    for name, module in model.named_modules():
        lists = module._modules.get("parametrizations")
        if isinstance(lists, nn.ModuleDict):
            for tensor, parts in lists.items():
                if isinstance(parts[0], SpectralNorm):  # type: ignore[index]
                    full = f"{name}.{tensor}" if name else tensor
                    yield full, module, tensor, parts[0]  # type: ignore[index]


@torch.no_grad()
def check_normalised(model: nn.Module) -> None:
    """Every matrix of every weight in use has norm 1, by a decomposition in float64."""
    model.eval()
    for name, module, tensor, norm in norms_in(model):
        used = getattr(module, tensor).double()
        original = module.parametrizations[tensor].original  # type: ignore[index, union-attr]
        stacks = norm.view.to_matrices(used), norm.view.to_matrices(original.double())
        for matrix, behind in zip(*stacks, strict=True):
            if not behind.any():
                assert not matrix.any(), name
                continue
            small = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
            sigma = torch.linalg.eigvalsh(small)[-1].sqrt()  # in float64 exact enough, and faster
            assert abs(sigma - 1) < 1e-2, f"{name}: {sigma:.4f}"


def computed(architecture: Architecture, model: nn.Module) -> list[Tensor]:
    """What the network computes in eval mode, with the same random numbers every time."""
    model.eval()
    torch.manual_seed(5)
    with torch.no_grad():
        return tensors(architecture.outputs(model))


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a forward returned, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in tensors(value)]
    return []


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    """Equal up to rounding: with the very same weights a BLAS rounds by where they lie."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 * float(x.abs().max()))


@torch.no_grad()
def check_scale_is_forgotten(architecture: Architecture, model: nn.Module) -> None:
    """Every original times eight, a power of two, moves no output: W / σ is what is used."""
    before = computed(architecture, model)
    originals = {
        id(p): p
        for _, module, tensor, _ in norms_in(model)
        for p in [module.parametrizations[tensor].original]  # type: ignore[index, union-attr]
    }
    for original in originals.values():
        original.mul_(8)
    try:
        for x, y in zip(before, computed(architecture, model), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(x.abs().max()) + 1e-8)
    finally:
        for original in originals.values():
            original.div_(8)


def check_state_dict(architecture: Architecture, model: nn.Module) -> None:
    """Into another network, strictly, and it computes the same to the bit."""
    other = architecture.make(1)
    convert(other, init="random")
    other.load_state_dict(model.state_dict(), strict=True)
    for (name, value), (_, theirs) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(value, theirs), name
    assert_same(computed(architecture, model), computed(architecture, other))


def check_training(architecture: Architecture, model: nn.Module) -> None:
    """Forward and backward are finite, and the forward reads every normalised weight."""
    read: dict[str, list[Tensor]] = {}
    for name, module, tensor, norm in norms_in(model):
        original = module.parametrizations[tensor].original  # type: ignore[index, union-attr]
        if not original.any():
            torch.nn.init.normal_(original, std=0.02)  # zero until the first step of training
        norm.register_forward_hook(
            lambda _, __, used, name=name: read.setdefault(name, []).append(used)
        )
    model.train().requires_grad_()  # what is frozen too, so that each can be asked for its gradient
    torch.manual_seed(6)
    np.random.seed(6)  # noqa: NPY002 - what transformers drops whole layers by
    loss = sum(t.double().square().mean() for t in tensors(architecture.outputs(model)))
    assert isinstance(loss, Tensor)
    assert bool(loss.isfinite())
    for used in {id(used): used for reads in read.values() for used in reads}.values():
        if used.requires_grad:
            used.retain_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert bool(parameter.grad.isfinite().all()), name
    unread = {n for n, _, _, _ in norms_in(model)} - set(read)
    surplus = {name for name in unread if not name.endswith(architecture.idle or ("\0",))}
    assert not surplus
    # Euler: the loss does not change along a weight's own direction, if only W / σ(W) is read.
    checked = 0
    for name, module, tensor, norm in norms_in(model):
        original = module.parametrizations[tensor].original  # type: ignore[index, union-attr]
        if original.grad is not None and name not in unread:
            reads = [w for w in {id(w): w for w in read[name]}.values() if w.requires_grad]
            size = torch.zeros(norm.view.matrices[0], dtype=torch.float64)
            for used in reads:
                if used.grad is not None:
                    size += norm.view.to_matrices((used.grad * used).double().abs()).sum((1, 2))
            assert any(used.grad is not None for used in reads), name
            along = norm.view.to_matrices((original.grad * original).double()).sum((1, 2)).abs()
            assert bool((along <= 1e-4 * size + 1e-12).all()), name
            checked += bool(size.any())
    assert checked > 0


@torch.no_grad()
def check_gains(architecture: Architecture, model: nn.Module, before: list[Tensor]) -> None:
    """With a gain for every matrix the network computes what it did before its conversion."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for gain in architecture.gains:
        convert(model, gain=gain)
        assert_same(computed(architecture, model), before)
        check_gains_are_state(model, learned=gain == "learned")
        for norm in {norm for _, _, _, norm in norms_in(model)}:
            norm.gain.mul_(4)  # as training might, and without rounding
        check_restored_gains(model, state, bake=gain == "learned")
        model.load_state_dict(state)


def check_gains_are_state(model: nn.Module, learned: bool) -> None:
    """One γ for each matrix, a Parameter or a buffer, and loaded where it was saved."""
    state, other = model.state_dict(), copy.deepcopy(model)
    for (name, _, _, norm), (_, _, _, twin) in zip(norms_in(model), norms_in(other), strict=True):
        assert isinstance(norm.gain, nn.Parameter) == learned, name
        assert tuple(norm.gain.shape) == norm.view.matrices[:1], name
        twin.gain.fill_(7)
    other.load_state_dict(state, strict=True)
    for (name, _, tensor, norm), (_, _, _, twin) in zip(
        norms_in(model), norms_in(other), strict=True
    ):
        prefix = name.removesuffix(tensor)
        assert torch.equal(state[f"{prefix}parametrizations.{tensor}.0.gain"], norm.gain), name
        assert torch.equal(twin.gain, norm.gain), name


def check_restored_gains(model: nn.Module, state: Mapping[str, Tensor], bake: bool) -> None:
    """Where each gain is 4 σ: baked, a weight is four times what it was; else what it was."""
    names = [name for name, _, _, _ in norms_in(model)]
    snparam.restore_model(model, bake=bake)
    plain = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if bake:
            torch.testing.assert_close(plain[name], 4 * state[name], rtol=1e-5, atol=0)
        else:
            assert torch.equal(plain[name], state[name]), name


def check_bake(architecture: Architecture, model: nn.Module) -> None:
    """An ordinary network, with the weights and the function of eval mode, to the bit."""
    convert(model, init="random")
    used = {name: getattr(m, t).detach().clone() for name, m, t, _ in norms_in(model.eval())}
    before = computed(architecture, model)
    snparam.restore_model(model)
    plain = dict(model.named_parameters(remove_duplicate=False))
    for name, value in used.items():
        assert torch.equal(plain[name], value), name
    assert_same(computed(architecture, model), before)
