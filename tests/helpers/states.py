"""The states of a network, and where the plain loop leads them.

The independent answer is the sequential step of `reference.py`, taken once for each step that
should have been taken, on the u from before.
"""

import torch
import torch.nn.functional as F
from torch import nn

from helpers import reference
from snparam.testing.tensors import weight_with


def states(model):
    """(name, SpectralNorm, original) of every normalised weight."""
    for name, module in model.named_modules():
        if hasattr(module, "parametrizations"):
            for tensor, chain in module.parametrizations.items():
                yield f"{name}.{tensor}", chain[0], chain.original


def randomise(model):
    """Every u far from converged, so that each step moves it visibly."""
    for index, (_, norm, _) in enumerate(states(model)):
        rows = weight_with("gaussian", tuple(norm.u.shape), seed=index, dtype=norm.u.dtype)
        norm.u.copy_(rows)
    return model


def all_u(model):
    return {name: norm.u.clone() for name, norm, _ in states(model)}


def stepped(norm, original, u, steps):
    """u after some steps of the plain loop, block by block."""
    blocks = []
    for matrix, one in zip(norm.view.to_matrices(original.detach()), u, strict=True):
        for _ in range(steps):
            one, _, _ = reference.step(matrix, one)
        blocks.append(one)
    return torch.stack(blocks)


def assert_moved(model, before, steps):
    """Each u is where `steps` steps from `before` lead; `steps` a number, or one for each name."""
    for name, norm, original in states(model):
        count = steps if isinstance(steps, int) else steps[name]
        right = stepped(norm, original, before[name], count)
        torch.testing.assert_close(
            norm.u, right, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n} {m}"
        )


FULL_RANK = ("initial", "gaussian", "decaying")


class Parent(nn.Module):
    """Reads its children's weights itself, several times, in every way that models do."""

    def __init__(self, calls_child):
        super().__init__()
        self.proj = nn.Linear(4, 4, dtype=torch.float64)
        self.other = nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64)])
        self.calls_child = calls_child

    def forward(self, x):
        x = x.to(self.proj.weight.dtype)
        x = F.linear(x, self.proj.weight) + F.linear(x, self.proj.weight[:4])
        x = F.linear(x, self.other[0].weight)
        return self.proj(x) if self.calls_child else x
