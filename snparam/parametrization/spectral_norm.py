"""SpectralNorm: the state of the power iteration, and when a read of the weight moves it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch.compiler import is_compiling

from snparam.constraints import cpu, cpu_division
from snparam.constraints.constraint import Constraint, gain_in
from snparam.constraints.derived import Derived
from snparam.constraints.division import Division, divide, filled, without_autocast
from snparam.constraints.written import Written, may_be_kept
from snparam.estimators import convergence
from snparam.matrices import linalg
from snparam.matrices.sharded import is_sharded
from snparam.matrices.stacks import (
    Estimate,
    compute_dtype,
    is_finite,
    stack_of,
    step_from_v,
    steps_from_u,
)
from snparam.matrices.views import View
from snparam.parametrization.forwards import Forwards, Reading
from snparam.parametrization.options import Settings
from snparam.parametrization.recomputation import (
    held,
    in_backward,
    keep,
    kept,
    refuse_in_region,
    saved_by,
    unseen,
)
from snparam.parametrization.watching import Watch

_NO_READING = Reading()

# Attributes that belong to running forwards and running training.
_TRANSIENT = ("forwards", "derived", "watch", "_frozen")


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
        derived: what is kept for speed.

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
        self._pure = settings.update == "step"
        self._classic = self.constraint == Constraint()
        self._single = found.u.shape[:2] == (1, 1) and settings.eps == 0
        self._reset()

    def _reset(self) -> None:
        """What belongs to running forwards, and is neither copied nor saved."""
        self.forwards = Forwards()
        self._frozen = 0
        self.derived = Derived()
        self.watch = Watch(f"{self.name} {self.view.shape}", self.derived.passes)
        if self.settings.update == "step":
            self.watch.begin()

    def _apply(self, *args: Any, **kwargs: Any) -> SpectralNorm:
        """What `.to()` and its like do."""
        self.derived.forget()
        self.watch.forget()
        gain = None if self.settings.gain is None else self.gain.detach()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if gain is not None and gain.dtype != self.gain.dtype and not self.gain.is_meta:
            self.gain.data = gain_in(self.gain.dtype, gain.to(self.gain.device))
        return self

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
        return self.read(weight)

    def read(self, weight: Tensor, owner: nn.Module | None = None) -> Tensor:
        """`forward`, for the layer that the weight is read from, where that is known."""
        mode: object
        shared = self.forwards.shared
        traced = is_compiling()
        if shared and not traced and not is_grad_enabled() and type(weight) is nn.Parameter:
            value = shared.values.get(is_inference_mode_enabled())
            if value is not None:
                return value
        if traced:
            reading = self.forwards.current_traced()
            mode = is_grad_enabled()
        elif self._pure and self.training and shared is None:
            # Which forward it is does not matter to what moves nothing.
            return self._normalise(weight, _NO_READING)
        else:
            reading = self.forwards.current(self, owner)
            # Never alike for one with a graph, None or a hook, and one without, True or False.
            mode = saved_by() if is_grad_enabled() else is_inference_mode_enabled()
        # FSDP2 gathers it for the layer's own forward, not for those around.
        if type(weight) is not nn.Parameter and is_sharded(weight):
            mode = (mode, "sharded")
        reading = Reading() if reading is None else reading
        value = reading.values.get(mode)
        if value is None:
            if traced:
                with without_autocast(weight):
                    value = self._by_stacks(weight, reading, traced=True)
            else:
                value = self._normalise(weight, reading, seen=mode is not None)
            reading.values[mode] = value
        return value

    def right_inverse(self, value: Tensor) -> Tensor:
        """What to store when a value is assigned to the weight: the value, with a fresh estimate.

        Raises:
            ValueError: if the value has another shape or dtype, or is not finite.
        """
        shape, theirs = self.view.shape, tuple(value.shape)
        what = f"SpectralNorm on {self.name} {shape}: assigned a tensor"
        if theirs != shape:
            raise ValueError(f"{what} of shape {theirs}; assign one of shape {shape}")
        if not is_finite(stack_of(value, self.view)):
            raise ValueError(f"{what} with NaN or inf")
        self.refresh(value)
        return value

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Converge the state to the singular vectors and values of a weight, in place."""
        u, _ = convergence.converged(stack_of(weight, self.view), self.u.shape[1])
        self.u.copy_(u)
        self.derive(weight)
        self.sv.copy_(self._step_from_u(weight).sv)

    @torch.no_grad()
    def derive(self, weight: Tensor) -> None:
        """Bring what follows from u up to date, after u or the weight came from elsewhere."""
        self.forwards.last_v = None
        self.derived.forget()
        if self.settings.update == "step":
            self.watch.know(weight)
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
            # Of the weight's dtype, as wrappers that flatten parameters ask for, if σ fits into it.
            self.gain.data = gain_in(linalg.real_dtype(weight.dtype), sigma.where(sigma != 0, 1.0))
            self.gain.requires_grad_(isinstance(self.gain, nn.Parameter) and weight.requires_grad)

    @torch.no_grad()
    def estimate(self, weight: Tensor) -> Tensor:
        """The σ (b,) that a forward in eval mode divides by; nothing is stored."""
        if self.is_one_number(weight):
            step = self._step_by_numbers(cpu.Matrix(weight, self.view), weight, moves=False)
            return weight.new_tensor([step.sigma], requires_grad=False)
        return self._stack_step(weight.detach(), moves=False, repeated=None).sv[:, 0]

    def _step_from_u(self, weight: Tensor) -> Estimate:
        return steps_from_u(weight.detach(), self.view, self.u, 1, self.settings.eps)

    # When the state moves

    def freeze(self, on: bool) -> None:
        """Begin or end a stretch in which no read moves the state; stretches nest."""
        self._frozen += 1 if on else -1

    @property
    def moves(self) -> bool:
        """Whether a forward now moves the state."""
        return self.training and self.settings.update == "forward" and not self._frozen

    def note_update(self, weight: Tensor, found: Estimate | cpu.Step) -> None:
        """Note that the buffers are now what was found for the weight as it is now."""
        order = self.view.order_for(weight)
        if order != self._order:  # a Module takes as long to set it as a small layer's update takes
            self._order = order
        self.watch.know(weight)
        derived = self.derived
        derived.forget_update()
        if isinstance(found, Estimate):
            derived.current = Written(self.stored()), found
        else:
            derived.numbers = Written(self.stored()), self._numbers(found)

    def is_one_number(self, weight: Tensor) -> bool:
        """Whether there is one σ, which can be read at no cost."""
        return self._single and cpu.is_here(weight)

    def update_by_numbers(self, weight: Tensor) -> None:
        """Update the buffers from the weight, where `is_one_number`."""
        of = self.derived.matrix_of(weight, self.view)
        step = self._step_by_numbers(of, weight, moves=True)
        if math.isfinite(step.sigma):
            v: Any = self._buffers["v"]
            torch.div(step.x, step.length, out=v.view(-1))
        self.note_update(weight, step)

    # The weight itself

    def _normalise(self, weight: Tensor, reading: Reading, seen: bool = True) -> Tensor:
        """W / σ, moving the state if this is the first read of a training forward.

        Args:
            weight: the original.
            reading: what the forward has read so far.
            seen: whether there may be checkpointed regions to keep something for.
        """
        of = self.derived.matrix
        if of is not None and of.is_ready(weight):
            return self._by_numbers(weight, of, reading, seen)
        with without_autocast(weight), unseen():
            if self.is_one_number(weight):
                of = self.derived.matrix_of(weight, self.view)
                return self._by_numbers(weight, of, reading, seen)
            return self._by_stacks(weight, reading, traced=False)

    def _by_numbers(self, weight: Tensor, of: cpu.Matrix, reading: Reading, seen: bool) -> Tensor:
        """One matrix on a CPU."""
        derived = self.derived
        gain = None if self.settings.gain is None else self.gain
        if self._pure and self.training:
            by = self._last_numbers(weight)
            return cpu_division.divide(weight, gain, by, of, derived.memory, derived.passes)
        moves, repeated = self._moves(reading, traced=False)
        if repeated is None:
            step = self._step_by_numbers(of, weight, moves)
            if moves and seen:
                self._keep(step.x)
            elif moves:  # it records a graph, and not in a region
                self.forwards.moved(step.x)
            reading.v = step.x
        else:
            step = cpu.finish_step(of, repeated.view(-1))
        return cpu_division.divide(weight, gain, self._numbers(step), of, derived.memory)

    def _step_by_numbers(self, of: cpu.Matrix, weight: Tensor, moves: bool) -> cpu.Step:
        """A step from u; with `moves`, `num_itrs` steps, stored in place."""
        u = self.derived.as_vector(self._buffers["u"])
        start = u if u.dtype == weight.dtype else u.to(weight.dtype)
        step = cpu.step(of, start)
        if moves:
            for _ in range(self.settings.num_itrs - 1):
                if 0 < step.sigma < math.inf:
                    start = step.t.div_(step.size)
                step = cpu.step(of, start)
            if 0 < step.sigma < math.inf:
                torch.div(step.t, step.size, out=u)
            # Straight from the dict, past a lookup that takes as long as a small product.
            sv: Any = self._buffers["sv"]
            sv.fill_(step.sigma)
        return step

    def _numbers(self, step: cpu.Step) -> Division:
        sigma, t, x, size, length = step
        divisor, slope = (sigma, 1.0) if self._classic else self.constraint.divisor_of(sigma)
        return Division(divisor, slope / (size * length), t, x, self.view)

    def _last_numbers(self, weight: Tensor) -> Division:
        """By what the last update has found."""
        ready = self.derived.numbers
        if ready is None or not ready[0].are(self.stored()):
            if ready is not None:
                self.watch.accept(weight)
            written, (u, v, sv) = self._current_step(weight)
            ready = written, self._numbers(cpu.Step(sv.item(), u.view(-1), v.view(-1), 1.0, 1.0))
            self.derived.numbers = ready if may_be_kept() else None
        self.watch.check(weight)
        return ready[1]

    def _by_stacks(self, weight: Tensor, reading: Reading, traced: bool) -> Tensor:
        """Any weight, anywhere."""
        if self._pure and self.training and not traced:
            return self._divided_by(self._last_division(weight), weight)
        if self._pure and self.training:
            # A compiled graph takes the buffers as its inputs, in place, whatever they hold.
            u, v, sigma = self.stored().first()
        else:
            moves, repeated = self._moves(reading, traced)
            # Detached, so that nothing is recorded: u and v are constants to autograd.
            found = self._stack_step(weight.detach(), moves, repeated)
            if moves and not traced:
                self._keep(found.v)
            reading.v = found.v if repeated is None else repeated
            u, v, sigma = found.first()
        if traced and torch.is_grad_enabled():
            u, v, sigma = held(u, v, sigma)
        return self._divided_by(self._division(u, v, sigma), weight)

    def _division(self, u: Tensor, v: Tensor, sigma: Tensor) -> Division:
        divisor, slope = self.constraint.divisor(sigma)
        return Division(divisor, slope, u, v, self.view)

    def _last_division(self, weight: Tensor) -> Division:
        """By what the last update has found."""
        _, found = self._current_step(weight)
        self.watch.check(weight)
        ready = self.derived.division
        if ready is None or ready[0] is not found:
            by = self._division(*found.first())
            ready = found, by._replace(filled=filled(by.divisor))
            self.derived.division = ready if may_be_kept() else None
        return ready[1]

    def _divided_by(self, by: Division, weight: Tensor) -> Tensor:
        return divide(weight, by, None if self.settings.gain is None else self.gain)

    def _moves(self, reading: Reading, traced: bool) -> tuple[bool, Tensor | None]:
        """Whether a read moves the state, and if not, the v that it repeats, if it repeats any."""
        repeated = reading.v
        if repeated is not None:
            if not traced:
                keep(self, repeated)  # for a region that has begun since the first read
        elif self.training and not self._frozen:
            if traced:
                refuse_in_region(self.name, self.view.shape)
                return True, None
            if not in_backward():
                return True, None
            repeated = kept(self, self.forwards.last_v)
        return False, repeated

    def _current_step(self, weight: Tensor) -> tuple[Written, Estimate]:
        """What the last update has found, without a product, and the buffers that it is in."""
        if self.view.order_for(weight) != self._order:  # of v, which lies as the weight did
            self.derive(weight)
        current = self.derived.current
        if current is None or not current[0].are(self.stored()):
            # New, loaded or moved; or written to, as the weight is too where networks are averaged.
            if current is not None:
                self.watch.accept(weight)
            found = Estimate(*(x.to(compute_dtype(x.dtype), copy=True) for x in self.stored()))
            current = Written(self.stored()), found
            self.derived.current = current if may_be_kept() else None
        return current

    def stored(self) -> Estimate:
        """The buffers, with `update="step"`."""
        buffers: Any = self._buffers
        return Estimate(buffers["u"], buffers["v"], buffers["sv"])

    def _stack_step(self, weight: Tensor, moves: bool, repeated: Tensor | None) -> Estimate:
        """What a read finds by steps from u; or, to the bit, by half a one from a `repeated` v.

        With `moves`, `num_itrs` steps, stored in place. Without, one, for σ₁ alone: the first
        vectors depend on no others, and what is not stored needs no others.
        """
        eps = self.settings.eps
        if repeated is not None:
            return step_from_v(weight, self.view, repeated, eps)
        if not moves:
            return steps_from_u(weight, self.view, self.u[:, :1], 1, eps)
        found = steps_from_u(weight, self.view, self.u, self.settings.num_itrs, eps)
        self.u.copy_(found.u)
        self.sv.copy_(found.sv)
        return found

    def _keep(self, v: Tensor) -> None:
        """Keep what a recomputation of this forward, in a backward pass, has to start from."""
        if not v.is_inference():
            self.forwards.moved(v)
            keep(self, v)

    def extra_repr(self) -> str:
        """Options and shape, for printing."""
        k, steps, matrices = self.u.shape[1], self.settings.num_itrs, tuple(self.view.matrices)
        return f"num_svs={k}, num_itrs={steps}, matrices={matrices}"
