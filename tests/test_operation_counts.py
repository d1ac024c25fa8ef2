"""What a weight costs in operations, which are what a small layer takes on an accelerator.

Counted by a dispatch mode over `layer.weight.backward(g)` of a Linear(64, 64) in training, float32,
`g` contiguous and `.grad` None, leaving out views. torch's own spectral_norm takes 22.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.holder import original_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import snparam

SIZE = 64


# A view whose schema does not say so, and a question about dtypes.
NO_OPERATIONS = {"_unsafe_view", "promote_types"}


class Counting(TorchDispatchMode):
    """Counts operations by name: all but those whose schema says that they return a view."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_OPERATIONS:
            self.operations[name] += 1
        return out


def operations(layer: nn.Module) -> Counter[str]:
    """Of one read of the weight and its backward pass, as they are after the first."""
    g = torch.randn(SIZE, SIZE)
    for _ in range(2):
        for parameter in layer.parameters():
            parameter.grad = None
        with Counting() as mode:
            weight: Any = layer.weight
            weight.backward(g)
    return mode.operations


def linear(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return snparam.register_sn(nn.Linear(SIZE, SIZE), **options)


def trusted() -> nn.Module:
    """With update="step", once a step of an optimizer has reached the weight."""
    layer = linear(update="step")
    layer(torch.randn(2, SIZE)).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    return layer


def test_torchs_own_takes_22() -> None:
    """What the others are compared with; another number says that torch, or the count, changed."""
    found = operations(parametrizations.spectral_norm(nn.Linear(SIZE, SIZE)))
    assert sum(found.values()) == 22, found


def test_update_forward_takes_at_most_16() -> None:
    found = operations(linear())
    assert sum(found.values()) <= 16, found


def test_update_step_takes_at_most_5_once_it_is_trusted() -> None:
    found = operations(trusted())
    assert sum(found.values()) <= 5, found


PRODUCTS = {"mv", "mm", "bmm", "addmv", "addmm", "addbmm", "baddbmm"}


def test_update_step_takes_no_product_in_reads_once_it_is_trusted() -> None:
    layer = trusted()
    with Counting() as mode:
        layer.weight  # noqa: B018
    assert not PRODUCTS & set(mode.operations), mode.operations


@pytest.mark.parametrize("options", [{}, {"update": "step"}], ids=str)
def test_what_is_counted_is_right(options: dict[str, Any]) -> None:
    """The gradient that these operations make, and that they keep u for a zero matrix."""
    layer = linear(**options)
    if options:
        snparam.update(layer)
    g = torch.randn(SIZE, SIZE)
    for _ in range(200):
        layer(torch.randn(2, SIZE))
    layer.weight.backward(g)  # type: ignore[union-attr, operator]
    leaf: Tensor = original_of(layer).detach().clone().double().requires_grad_()
    (leaf / torch.linalg.matrix_norm(leaf, 2)).backward(g.double())
    torch.testing.assert_close(original_of(layer).grad.double(), leaf.grad, rtol=1e-3, atol=1e-2)
    norm: Any = layer.parametrizations.weight[0]  # type: ignore[index, union-attr]
    u = norm.u.clone()
    with torch.no_grad():
        original_of(layer).zero_()
        if options:
            snparam.update(layer)
    layer.weight  # noqa: B018
    assert torch.equal(norm.u, u)
