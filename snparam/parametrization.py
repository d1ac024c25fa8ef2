"""SpectralNorm: the state of the power iteration, and when a read of the weight moves it."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import linalg
from .constraint import Constraint
from .division import Division, divide, divide_eagerly, reads_numbers, without_autocast
from .forwards import Forwards, Reading
from .options import Settings
from .recomputation import held, in_backward, keep, kept, saved_by, unseen
from .sharded import ShardedStack, is_sharded
from .views import View
from .watching import watch

_VECTOR_DTYPES = (torch.float32, torch.float64)

# Attributes that belong to running forwards and running training.
_TRANSIENT = ("forwards", "_frozen", "_current", "_behind")


class SpectralNorm(nn.Module):
    """The parametrization W → W / σ(W) of one weight, with σ by power iteration.

    Attributes:
        u: buffer, (b, k, m): estimates of the top k left singular vectors of each block, as rows.
        v: buffer, (b, k, n), with `update="step"` only, not saved: the right singular vectors.
        sv: buffer, (b, k): estimates of the singular values. For looking at; no arithmetic
            of a forward uses it.
        gain: γ, (b,), with `gain="learned"` (a Parameter) or `"fixed"` (a buffer) only.
        view: how the weight is read as a stack of matrices (b, m, n).
        settings: the options it was registered with.
        forwards: the running forwards that may read the weight.

    A training forward takes `num_itrs` steps from `u` and stores u and sv in place. A forward in
    eval mode takes one step from `u` and stores nothing. Arithmetic is in float32 at least, with
    autocast off; the result has the weight's dtype.

    Source: Miyato et al. 2018 for k = 1; Brock, Donahue and Simonyan 2019 for the top k.
    """

    u: Tensor
    v: Tensor
    sv: Tensor
    gain: Tensor

    def __init__(self, view: View, settings: Settings, found: Estimate, name: str) -> None:
        """Take over a state; use `register_sn` or `convert_model` to make one.

        Args:
            view: how the weight is read.
            settings: validated options.
            found: the state to start with.
            name: what to call the weight in errors.
        """
        super().__init__()
        self.view = view
        self.settings = settings
        self.name = name
        self.register_buffer("u", found.u)
        self.register_buffer("sv", found.sv)
        if settings.update == "step":
            # What training forwards use; not saved, because it follows from u and the weight.
            self.register_buffer("v", found.v, persistent=False)
        if settings.gain == "learned":
            self.gain = nn.Parameter(found.sv[:, 0].clone())
        elif settings.gain == "fixed":
            self.register_buffer("gain", found.sv[:, 0].clone())
        self.constraint = Constraint(settings.coeff, settings.soft)
        self._order: tuple[int, ...] | None = None
        self._warned = False
        self._single = found.u.shape[:2] == (1, 1) and settings.eps == 0
        self._reset()

    def _reset(self) -> None:
        """What belongs to running forwards, and is neither copied nor saved."""
        self.forwards = Forwards()
        self._frozen = 0
        self._current: Estimate | None = None
        self._behind = False
        self.weight_id: int | None = None
        if self.settings.update == "step":
            watch(self)

    def __getstate__(self) -> dict[str, Any]:
        """Copy the state, not what belongs to a running forward."""
        state = self.__dict__.copy()
        for name in _TRANSIENT:
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copied state."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    # Reading the weight

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight, of the shape and dtype of `weight`.

        Within one forward of the layer the first read computes it and later ones share it.
        """
        reading = self.forwards.current()
        if reading is None:
            return self._normalise(weight, Reading())
        mode = (torch.is_grad_enabled(), _in_inference_mode(), saved_by())
        if mode not in reading.values:
            reading.values[mode] = self._normalise(weight, reading)
        return reading.values[mode]

    def right_inverse(self, value: Tensor) -> Tensor:
        """What to store when a value is assigned to the weight: the value, with a fresh estimate.

        Raises:
            ValueError: if the value has another shape or dtype, or is not finite.
        """
        if tuple(value.shape) != self.view.shape:
            raise ValueError(
                f"SpectralNorm on {self.name} {self.view.shape}: assigned a tensor of shape "
                f"{tuple(value.shape)}; assign one of shape {self.view.shape}"
            )
        if not is_finite(stack_of(value, self.view)):
            raise ValueError(
                f"SpectralNorm on {self.name} {self.view.shape}: assigned a tensor with NaN or inf"
            )
        self.refresh(value)
        return value

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Converge the state to the singular vectors and values of a weight, in place."""
        u, _ = linalg.converged(stack_of(weight, self.view), self.u.shape[1])
        self.u.copy_(u)
        self.derive(weight)
        self.sv.copy_(self._step_from_u(weight).sv)

    @torch.no_grad()
    def derive(self, weight: Tensor) -> None:
        """Bring what follows from u up to date, after u or the weight came from elsewhere."""
        self.forwards.last_v = self._current = None
        self._behind = False
        if self.settings.update == "step":
            # u stays what it is, so that a state that was loaded is the state that is saved.
            found = self._step_from_u(weight)
            self._order = self.view.order_for(weight)
            self.v.copy_(found.v)
            self.sv.copy_(found.sv)

    @torch.no_grad()
    def start_gain(self, weight: Tensor) -> None:
        """Set γ to σ as the next forward will find it, so that γ W / σ is W; to 1 where σ is 0."""
        if self.settings.gain is not None:
            sigma = self.estimate(weight)
            sigma = torch.where(sigma == 0, 1.0, sigma)
            # Of the weight's dtype, as wrappers that flatten parameters ask for.
            self.gain.data = sigma.to(linalg.real_dtype(weight.dtype))
            self.gain.requires_grad_(isinstance(self.gain, nn.Parameter) and weight.requires_grad)

    @torch.no_grad()
    def estimate(self, weight: Tensor) -> Tensor:
        """The σ (b,) that a forward in eval mode divides by; nothing is stored."""
        return self._step_from_u(weight).sv[:, 0]

    def _step_from_u(self, weight: Tensor) -> Estimate:
        matrices = stack_of(weight.detach(), self.view)
        return Estimate(*linalg.power_step(matrices, self.u.to(matrices.dtype), self.settings.eps))

    # When the state moves

    def freeze(self, on: bool) -> None:
        """Begin or end a stretch in which no read moves the state; stretches nest."""
        self._frozen += 1 if on else -1

    @property
    def moves(self) -> bool:
        """Whether a forward now moves the state."""
        return self.training and self.settings.update == "forward" and not self._frozen

    def store(self, estimate: Estimate, weight: Tensor) -> None:
        """Take over what `update` computed for the weight as it is now."""
        self.weight_id = id(weight)
        self._order = self.view.order_for(weight)
        for buffer, found in zip(self._stored(), estimate, strict=True):
            buffer.copy_(found)
        self._current = estimate
        self._behind = False

    def expect_update(self) -> None:
        """Note that an optimizer is about to change the weight."""
        if self._behind:  # since the step before: nobody updates
            self._warn_behind()
        self._behind = True

    def _warn_behind(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"SpectralNorm on {self.name} {self.view.shape}: the weight has changed since its "
                "singular values were last updated, and update='step' leaves that to you; call "
                "update_after_step(optimizer, model) once, or update(model) after each step.",
                UserWarning,
                stacklevel=2,
            )

    # The weight itself

    def _normalise(self, weight: Tensor, reading: Reading) -> Tensor:
        """W / σ, moving the state if this is the first read of a training forward."""
        by_numbers = self._single and weight.dtype in _VECTOR_DTYPES and reads_numbers(weight)
        settings = self.settings
        with without_autocast(weight), unseen():
            if settings.update == "step" and self.training:
                u, v, sigma = self._current_step(weight, by_numbers)
            else:
                repeated = reading.v
                moves = False
                if repeated is not None:
                    keep(self, repeated)  # for a region that has begun since the first read
                elif self.training and not self._frozen:
                    moves = not in_backward()
                    if not moves:
                        repeated = kept(self, self.forwards.last_v)
                # Detached, so that nothing is recorded: u and v are constants to autograd.
                step = self._vector_step if by_numbers else self._stack_step
                u, v, found, sigma = step(weight.detach(), moves, repeated)
                reading.v = found if repeated is None else repeated
            if torch.compiler.is_compiling() and torch.is_grad_enabled():
                u, v, sigma = held(u, v, cast(Tensor, sigma))
            divisor, slope = self.constraint.divisor(sigma)
            by = Division(divisor, slope, u, v, self.view)
            gain = None if settings.gain is None else self.gain
            return (divide_eagerly if by_numbers else divide)(weight, by, gain)

    def _current_step(
        self, weight: Tensor, by_numbers: bool
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """u (b, m), v (b, n) and σ of the last update, without a product."""
        if torch.compiler.is_compiling():
            # A compiled graph takes the buffers as its inputs, in place, whatever they hold.
            return self.u[:, 0], self.v[:, 0], self.sv[:, 0]
        self.weight_id = id(weight)
        if self._behind:
            self._warn_behind()
        if self.view.order_for(weight) != self._order:  # of v, which lies as the weight did
            self.derive(weight)
        current = self._current
        if current is None or current.u.device != weight.device:  # new, copied, loaded or moved
            current = Estimate(*(x.to(compute_dtype(x.dtype), copy=True) for x in self._stored()))
            self._current = None if current.u.is_inference() else current
        sigma = float(current.sv[0, 0]) if by_numbers else current.sv[:, 0]
        return current.u[:, 0], current.v[:, 0], sigma

    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.v, self.sv

    def _vector_step(
        self, weight: Tensor, moves: bool, repeated: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """The u (m,), v (n,), v again and σ of one matrix on a CPU; see `_stack_step`."""
        matrix = self.view.to_matrix(weight)
        if repeated is not None:
            u, v, sigma = linalg.finish_vector_step(matrix, repeated.view(-1))
            return u, v, v, sigma
        # Straight from the dict, past a lookup that takes as long as a small product.
        buffers = self._buffers
        stored, sv = cast(Tensor, buffers["u"]).view(-1), cast(Tensor, buffers["sv"])
        u, v, sigma = linalg.vector_step(matrix, stored.to(weight.dtype))
        if moves:
            for _ in range(self.settings.num_itrs - 1):
                u, v, sigma = linalg.vector_step(matrix, u)
            stored.copy_(u)
            sv.fill_(sigma)
            self._keep(v)
        return u, v, v, sigma

    def _stack_step(
        self, weight: Tensor, moves: bool, repeated: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """The u (b, m) and v (b, n) of σ (b,), and all of v (b, k, n), by one step from u.

        With `moves`, by `num_itrs` steps, stored in place. With `repeated`, the v of an earlier
        read, from that, so that the numbers are those of that read to the bit.
        """
        eps = self.settings.eps
        matrices = stack_of(weight, self.view)
        if repeated is not None:
            v = repeated.view(*self.u.shape[:2], -1)
            u, v, sv = linalg.finish_step(matrices, v, eps)
        else:
            u, v, sv = linalg.power_step(matrices, self.u.to(matrices.dtype), eps)
        if moves:
            for _ in range(self.settings.num_itrs - 1):
                u, v, sv = linalg.power_step(matrices, u, eps)
            self.u.copy_(u)
            self.sv.copy_(sv)
            self._keep(v)
        return u[:, 0], v[:, 0], v, sv[:, 0]

    def _keep(self, v: Tensor) -> None:
        """Keep what a recomputation of this forward, in a backward pass, has to start from."""
        if not torch.compiler.is_compiling() and not v.is_inference():
            self.forwards.last_v = v
            keep(self, v)

    def extra_repr(self) -> str:
        """Options and shape, for printing."""
        blocks, rows, columns = self.view.matrices
        return (
            f"num_svs={self.u.shape[1]}, num_itrs={self.settings.num_itrs}, "
            f"matrices=({blocks}, {rows}, {columns})"
        )


class Estimate(NamedTuple):
    """What a step finds: u (b, k, m), v (b, k, n) and sv (b, k)."""

    u: Tensor
    v: Tensor
    sv: Tensor


def stack_of(
    weight: Tensor, view: View, at_least: torch.dtype = torch.float32
) -> Tensor | ShardedStack:
    """A weight as a stack of matrices, in the dtype of the arithmetic."""
    dtype = torch.promote_types(weight.dtype, at_least)
    if is_sharded(weight):
        return ShardedStack(weight, view, dtype)  # type: ignore[arg-type]
    return view.to_matrices(weight).to(dtype)


def is_finite(stack: Tensor | ShardedStack) -> bool:
    """Whether a stack has neither NaN nor inf."""
    if isinstance(stack, ShardedStack):
        return math.isfinite(stack.largest())
    return bool(torch.isfinite(stack).all())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for a weight of the given dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _in_inference_mode() -> bool:
    # Compilers cannot trace the question, and compile for each mode apart.
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
