"""The classic layer, written vector by vector from its mathematics; slow, and plainly right.

Brock, Donahue and Simonyan 2019 after Miyato et al. 2018. For a matrix W (m × n) and stored
u_1 … u_k, one step is, for i = 1 … k in order,

    v_i = normalize(Wᵀ u_i, less its projections on the new v_1 … v_{i−1}, one after another)
    u_i = normalize(W v_i, less its projections on the new u_1 … u_{i−1}, one after another)
    σ_i = u_iᵀ W v_i

with normalize(x) = x / max(‖x‖, eps). The weight in use is W / σ_1, and u and v are constants to
autograd. In training a forward takes `num_itrs` steps and stores the last u; in eval it takes one
and stores nothing.

Nothing here is vectorised or shared with the library. Complex numbers are not covered.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EPS = 1e-12


def normalize(x: np.ndarray, eps: float = EPS) -> np.ndarray:
    return x / max(np.sqrt(x @ x), x.dtype.type(eps))


def without_projections(x: np.ndarray, earlier: list[np.ndarray]) -> np.ndarray:
    for y in earlier:
        x = x - (x @ y) * y
    return x


def step(W: Tensor, u: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor, Tensor]:
    """New u (k, m), v (k, n) and singular values (k,) of a matrix; nothing is differentiated."""
    W, u = W.detach().numpy(), u.detach().numpy()  # numpy: many small operations, sooner done
    us: list[np.ndarray] = []
    vs: list[np.ndarray] = []
    values = []
    for i in range(len(u)):
        v_i = normalize(without_projections(W.T @ u[i], vs), eps)
        vs.append(v_i)
        u_i = normalize(without_projections(W @ v_i, us), eps)
        us.append(u_i)
        values.append(u_i @ W @ v_i)
    return tuple(torch.from_numpy(np.array(each)) for each in (us, vs, values))


@dataclass
class Matrix:
    """The state of one matrix: u (k, m) and sv (k,), moved by training forwards."""

    u: Tensor
    sv: Tensor
    num_itrs: int = 1
    eps: float = EPS

    def normalised(self, W: Tensor, training: bool) -> Tensor:
        """W / σ_1, differentiable, with u and v constant."""
        u = self.u
        for _ in range(self.num_itrs if training else 1):
            u, v, sv = step(W, u, self.eps)
        if training:
            self.u, self.sv = u, sv
        sigma = u[0] @ W @ v[0]
        return W / sigma


def rows_first(weight: Tensor) -> Tensor:
    """A weight as a matrix: dimension 0 as rows, all others as columns."""
    return torch.stack([row.reshape(-1) for row in weight])


def transposed_conv_rows(weight: Tensor, groups: int) -> Tensor:
    """(in, out / groups, *kernel) as a matrix, one row per output channel, group after group."""
    inputs = weight.shape[0] // groups
    return torch.stack(
        [
            weight[group * inputs : (group + 1) * inputs, output].reshape(-1)
            for group in range(groups)
            for output in range(weight.shape[1])
        ]
    )


def transposed_conv_weight(matrix: Tensor, like: Tensor, groups: int) -> Tensor:
    """What `transposed_conv_rows` reads, written back."""
    inputs, outputs = like.shape[0] // groups, like.shape[1]
    channels = []
    for group in range(groups):
        rows = [
            matrix[group * outputs + output].reshape(inputs, *like.shape[2:])
            for output in range(outputs)
        ]
        channels.append(torch.stack(rows, dim=1))
    return torch.cat(channels)


class Layer:
    """The weight of one layer under the classic normalisation.

    Args:
        weight: as the layer has it.
        u: (blocks, k, m), where each block starts.
        transposed: whether it is a transposed convolution's.
        groups: of a transposed convolution.

    Blocks are equal runs of the rows.
    """

    def __init__(
        self,
        weight: Tensor,
        u: Tensor,
        *,
        num_itrs: int = 1,
        eps: float = EPS,
        transposed: bool = False,
        groups: int = 1,
    ) -> None:
        self.weight = weight.detach().clone().requires_grad_()
        self.transposed, self.groups = transposed, groups
        self.blocks = [
            Matrix(one.clone(), torch.ones(one.shape[0], dtype=u.dtype), num_itrs, eps) for one in u
        ]

    @property
    def u(self) -> Tensor:
        return torch.stack([block.u for block in self.blocks])

    @property
    def sv(self) -> Tensor:
        return torch.stack([block.sv for block in self.blocks])

    def matrices(self, weight: Tensor) -> list[Tensor]:
        rows = transposed_conv_rows(weight, self.groups) if self.transposed else rows_first(weight)
        count = rows.shape[0] // len(self.blocks)
        return [rows[i * count : (i + 1) * count] for i in range(len(self.blocks))]

    def normalised(self, training: bool) -> Tensor:
        """The weight in use, of the weight's shape, differentiable by `self.weight`."""
        rows = torch.cat(
            [
                block.normalised(W, training)
                for block, W in zip(self.blocks, self.matrices(self.weight), strict=True)
            ]
        )
        if self.transposed:
            return transposed_conv_weight(rows, self.weight, self.groups)
        return rows.reshape(self.weight.shape)
