"""What is derived from a state and its weight, and kept for speed alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snparam.constraints.cpu import Matrix
from snparam.constraints.division import Division
from snparam.constraints.memory import Memory, Passes
from snparam.constraints.written import Written
from snparam.matrices.stacks import Estimate
from snparam.matrices.views import View


class Derived:
    """Aliases, memory and numbers: neither copied nor saved, and computed anew when dropped.

    Attributes:
        current: what the last update has found, in tensors that no update writes to, after the
            buffers as they were then.
        division: the same, ready to divide by, after the estimate that it was made of.
        numbers: `current` for one matrix on a CPU, ready to divide by.
        matrix: the weight as a matrix.
        flat_u: the buffer u, and as a vector.
        memory: of the last normalised weight.
        passes: what passes between two updates share.
    """

    current: tuple[Written, Estimate] | None
    division: tuple[Estimate, Division] | None
    numbers: tuple[Written, Division] | None
    matrix: Matrix | None
    flat_u: tuple[Tensor, Tensor] | None

    def __init__(self) -> None:
        self.memory = Memory()
        self.passes = Passes()
        self.forget()

    def matrix_of(self, weight: Tensor, view: View) -> Matrix:
        """The weight as one matrix."""
        of = self.matrix
        if of is None or not of.is_of(weight):
            self.forget()
            of = Matrix(weight, view)
            if weight.is_leaf and not torch.is_inference_mode_enabled():
                self.matrix = of
        return of

    def as_vector(self, u: Any) -> Tensor:
        """The buffer u of one vector, (m,), where it is."""
        flat = self.flat_u
        if flat is None or flat[0] is not u or flat[1].data_ptr() != u.data_ptr():
            flat = self.flat_u = (u, u.view(-1))
        return flat[1]

    def forget(self) -> None:
        """Drop what follows from tensors that may have been replaced."""
        self.current = self.matrix = self.flat_u = None
        self.forget_update()

    def forget_update(self) -> None:
        """Drop what was made of the last update."""
        self.division = self.numbers = None
        self.passes.end()
