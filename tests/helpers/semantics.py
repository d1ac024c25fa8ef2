"""The semantics of a normalised weight, written plainly: what each read uses, and what it moves.

A weight is a Parameter, u (b, k, m), sv (b, k), and what its next training forward may do:

    move    `num_itrs` plain steps from u, stored; σ is what the last of them finds
    share   nothing is stored; σ and v are what the last move has found
    load    nothing is stored; σ is the stored sv, v = normalize(Wᵀu)

With `update="forward"` it moves, always. With `update="step"` it moves until an optimizer's step
(or `update`) has reached the weight, which moves too, and shares from then on. A copy begins anew.
A weight that was changed is moved once by the next training forward. A state that was loaded
divides once by what was loaded. Where more than one of them would be right (after a change, whether
the state is trusted still), there is a choice, and any of them may be what is seen.

Eval reads, and frozen ones, take one step from u, for σ alone, and store nothing. A frozen one with
`update="step"` may share as well. A matrix that is zero keeps its u, and is used as it is.

Everything is in float64, by the sequential steps of `reference.py` and by autograd with u and v
constant; nothing is shared with the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from helpers import reference

MOVE, SHARE, LOAD = "move", "share", "load"
ANY = frozenset({MOVE, SHARE, LOAD})


@dataclass(frozen=True)
class Options:
    """Of a weight, as they are registered."""

    num_svs: int = 1
    num_itrs: int = 1
    blocks: int = 1
    update: str = "forward"
    coeff: float = 1.0
    soft: bool = False
    gain: str | None = None

    def divisor(self, sigma: Tensor) -> Tensor:
        """d(σ), and 1 for a zero matrix."""
        scaled = sigma / self.coeff
        if self.soft:
            return scaled.clamp(min=1.0)
        return torch.where(sigma == 0, 1.0, scaled)


@dataclass(frozen=True)
class State:
    """A weight and its state.

    Attributes:
        weight: as the layer has it, a leaf.
        u: (b, k, m).
        sv: (b, k).
        v: (b, n), which the last move has found, if there was one.
        gain: γ (b,), a leaf, or None.
        next: what the next training read may do.
        after: what the one after it may do, by what it did; by what `moved` says if it is not here.
    """

    weight: Tensor
    u: Tensor
    sv: Tensor
    options: Options
    transposed: bool = False
    v: Tensor | None = None
    gain: Tensor | None = None
    next: frozenset[str] = frozenset({MOVE})
    after: dict[str, frozenset[str]] = field(default_factory=dict)

    def matrices(self, weight: Tensor | None = None) -> list[Tensor]:
        """The blocks of a weight, (m, n) each."""
        weight = self.weight if weight is None else weight
        if self.transposed:
            rows = reference.transposed_conv_rows(weight, 1)
        else:
            rows = reference.rows_first(weight)
        return list(rows.chunk(self.options.blocks))

    def joined(self, blocks: list[Tensor]) -> Tensor:
        """A weight of its blocks."""
        rows = torch.cat(blocks)
        if self.transposed:
            return reference.transposed_conv_weight(rows, self.weight, 1)
        return rows.reshape(self.weight.shape)

    @property
    def has_open_gradient(self) -> bool:
        """Whether the gradient is not determined: that of max(1, σ/c) where σ is c, up to rounding,
        and that of c W/σ where W is zero, for a c that is not 1."""
        ratios = torch.stack([torch.linalg.matrix_norm(m.detach(), 2) for m in self.matrices()])
        ratios = ratios / self.options.coeff
        if self.options.soft:
            return bool(((ratios - 1).abs() < 1e-3).any())
        return self.options.coeff != 1 and bool((ratios == 0).any())

    # Reading

    def moved(self, steps: int | None = None) -> State:
        """Steps from u on the weight as it is, stored."""
        us, vs, svs = [], [], []
        for matrix, u in zip(self.matrices(), self.u, strict=True):
            found = plain_steps(matrix, u, self.options.num_itrs if steps is None else steps)
            for values, value in zip((us, vs, svs), found, strict=True):
                values.append(value)
        return replace(self, u=torch.stack(us), v=torch.stack(vs), sv=torch.stack(svs))

    def used(self, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        """γ W / d(σ) of each block, with σ of a given value and dσ = ⟨u vᵀ, dW⟩."""
        blocks = []
        for i, matrix in enumerate(self.matrices()):
            along = u[i] @ matrix @ v[i]
            d = self.options.divisor(sigma[i] + along - along.detach())
            block = matrix / d if self.gain is None else matrix * self.gain[i] / d
            blocks.append(block)
        return self.joined(blocks)

    def eval_read(self) -> Tensor:
        """By one step that is not stored."""
        found = self.moved(1)
        assert found.v is not None
        return self.used(found.u[:, 0], found.v, found.sv[:, 0])

    def stored_read(self) -> Tensor:
        """By what the last move has found, without a step."""
        v = self.unstored_v() if self.v is None else self.v
        return self.used(self.u[:, 0], v, self.sv[:, 0])

    def unstored_v(self) -> Tensor:
        """normalize(Wᵀu), (b, n)."""
        pairs = zip(self.matrices(), self.u, strict=True)
        return torch.stack(
            [torch.nn.functional.normalize(u[0] @ matrix.detach(), dim=0) for matrix, u in pairs]
        )

    def training_read(self, what: str) -> tuple[Tensor, State]:
        """The weight that a training read uses, and the state after it."""
        assert what in self.next
        later = self.after.get(what)
        if what == MOVE:
            moved = self.moved()
            assert moved.v is not None
            used = moved.used(moved.u[:, 0], moved.v, moved.sv[:, 0])
            return used, replace(moved, next=later or self.next, after={})
        if what == LOAD:
            used = self.used(self.u[:, 0], self.unstored_v(), self.sv[:, 0])
        else:
            used = self.stored_read()
        return used, replace(self, next=later or self.next, after={} if later else self.after)

    # What others do

    @property
    def is_stepwise(self) -> bool:
        return self.options.update == "step"

    def untrusted(self) -> State:
        """New, or a copy."""
        return replace(self, next=frozenset({MOVE}), after={}, v=None)

    def trusted(self) -> State:
        """An optimizer's step has reached the weight, or `update` was called."""
        return replace(self.moved(), next=frozenset({SHARE}), after={})

    def loaded(self) -> State:
        """Loaded in the library's own spelling."""
        if not self.is_stepwise:
            return self.untrusted()
        after = {LOAD: frozenset({MOVE})}
        return replace(self, next=frozenset({LOAD}), after=after, v=None)

    def changed(self) -> State:
        """Changed so that it can be seen: the next training read moves."""
        if not self.is_stepwise or self.next == {MOVE}:
            return replace(self, v=None)
        may_trust = SHARE in self.next or SHARE in self.after.get(MOVE, ())
        after = ANY if may_trust else frozenset({MOVE})
        return replace(self, next=frozenset({MOVE}), after={MOVE: after}, v=None)

    def changed_unseen(self) -> State:
        """Changed so that it cannot be seen, where the next training read moves all the same."""
        assert self.next == {MOVE}
        return replace(self, v=None)

    def unknown(self) -> State:
        """Cast, assigned, or loaded in others' spellings: what is stored is right, or is moved."""
        if not self.is_stepwise:
            return self.untrusted()
        return replace(self, next=ANY, after={LOAD: ANY, MOVE: ANY})

    def frozen_once(self) -> State:
        """After a frozen training read, which may have been the one that divides by a load."""
        if LOAD not in self.next:
            return self
        return replace(self, next=self.next | {MOVE})


def plain_steps(matrix: Tensor, u: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """u (k, m), the first v (n,) and sv (k,) after some steps; a zero or broken matrix keeps u."""
    matrix = matrix.detach()
    k, n = len(u), matrix.shape[1]
    if not torch.isfinite(matrix).all():
        return u, torch.zeros(n, dtype=u.dtype), torch.full((k,), math.nan, dtype=u.dtype)
    if not matrix.any():
        return u, torch.zeros(n, dtype=u.dtype), torch.zeros(k, dtype=u.dtype)
    for _ in range(steps):
        u, v, sv = reference.step(matrix, u, eps=1e-300)
    return u, v[0], sv


class Choices:
    """One way through the choices of a run, and the ways that are left to be tried.

    `every` calls a run again and again, until all combinations of what it picks were tried.
    """

    def __init__(self, fixed: tuple[str, ...] = ()) -> None:
        self.fixed = fixed
        self.picked: list[str] = []
        self.left: list[tuple[str, ...]] = []

    def pick(self, options: frozenset[str]) -> str:
        place = len(self.picked)
        if place < len(self.fixed):
            self.picked.append(self.fixed[place])
        else:
            first, *others = sorted(options)
            self.left += [(*self.picked, other) for other in others]
            self.picked.append(first)
        return self.picked[-1]

    @classmethod
    def every(cls, run: Callable[[Choices], object]) -> Iterator[object]:
        ahead: list[tuple[str, ...]] = [()]
        while ahead:
            choices = cls(ahead.pop())
            yield run(choices)
            ahead += choices.left
