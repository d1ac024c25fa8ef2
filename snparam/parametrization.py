"""SpectralNorm: the state of the power iteration, and when a read of the weight moves it."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import linalg
from .options import Settings
from .views import View


class SpectralNorm(nn.Module):
    """The parametrization W → W / σ(W) of one weight, with σ by power iteration.

    Attributes:
        u: buffer, (b, k, m): estimates of the top k left singular vectors of each block, as rows.
        sv: buffer, (b, k): estimates of the singular values. For looking at; no arithmetic
            of a forward uses it.
        view: how the weight is read as a stack of matrices (b, m, n).
        settings: the options it was registered with.

    A training forward takes `num_itrs` steps from `u` and stores u and sv in place. A forward in
    eval mode takes one step from `u` and stores nothing. Arithmetic is in float32 at least, with
    autocast off; the result has the weight's dtype.

    Source: Miyato et al. 2018 for k = 1; Brock, Donahue and Simonyan 2019 for the top k.
    """

    u: Tensor
    sv: Tensor

    def __init__(self, view: View, settings: Settings, u: Tensor, sv: Tensor, name: str) -> None:
        """Take over a state; use `register_sn` or `convert_model` to make one.

        Args:
            view: how the weight is read.
            settings: validated options.
            u: (b, k, m).
            sv: (b, k), real.
            name: what to call the weight in errors.
        """
        super().__init__()
        self.view = view
        self.settings = settings
        self.name = name
        self.register_buffer("u", u)
        self.register_buffer("sv", sv)
        self._reset()

    def _reset(self) -> None:
        """What belongs to running forwards, and is neither copied nor saved."""
        self._frames: dict[int, list[_Frame]] = {}
        self._shared: _Frame | None = None
        self._sharing = 0
        self._frozen = 0
        self._last_v: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy the state, not what belongs to a running forward."""
        state = self.__dict__.copy()
        for name in ("_frames", "_shared", "_sharing", "_frozen", "_last_v"):
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
        frame = self._frame()
        if frame is None:
            return self._normalise(weight, moves=self._may_move())
        # A tensor made without a graph cannot stand in for one with a graph, nor the reverse.
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if mode not in frame.values:
            moves = self._may_move() and not frame.values
            frame.values[mode] = self._normalise(weight, moves, again=bool(frame.values))
        return frame.values[mode]

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
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"SpectralNorm on {self.name} {self.view.shape}: assigned a tensor with NaN or inf"
            )
        self.refresh(value)
        return value

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Converge u and sv to the singular vectors and values of a weight, in place."""
        u, sv = linalg.converged(self.view.to_matrices(weight), self.u.shape[1])
        self.u.copy_(u)
        self.sv.copy_(sv)
        self._last_v = None

    # When the state moves

    def enter(self, *, own: bool) -> None:
        """Begin a forward of the layer itself (`own`) or of the module around it."""
        frames = self._frames.setdefault(_thread(), [])
        frame = _Frame()
        if own and frames and not frames[-1].handed_on:
            # What the surrounding forward read before this call (a dtype, usually) was this
            # forward's weight: one forward, one move.
            frame.values = frames[-1].values
            frames[-1].handed_on = True
        frames.append(frame)

    def leave(self) -> None:
        """End what the last `enter` of this thread began."""
        thread = _thread()
        frames = self._frames.get(thread)
        if frames:
            frames.pop()
            if not frames:
                del self._frames[thread]

    def freeze(self, on: bool) -> None:
        """Begin or end a stretch in which no read moves the state; stretches nest."""
        self._frozen += 1 if on else -1

    def share(self, on: bool) -> None:
        """Begin or end a stretch in which all reads, in all threads, share one; stretches nest."""
        self._sharing += 1 if on else -1
        if not self._sharing:
            self._shared = None
        elif self._shared is None:
            self._shared = _Frame()

    def _frame(self) -> _Frame | None:
        if self._shared is not None:
            return self._shared
        frames = self._frames.get(_thread())
        return frames[-1] if frames else None

    def _may_move(self) -> bool:
        return self.training and not self._frozen and not _in_backward()

    # The weight itself

    def _normalise(self, weight: Tensor, moves: bool, again: bool = False) -> Tensor:
        """W / σ. `again`: with the estimate of the last training forward, to the bit."""
        matrices = self.view.to_matrices(weight)
        with torch.no_grad(), _without_autocast(weight):
            u, v, sv = self._step(matrices, moves, again)
        with _without_autocast(weight):
            divisor, slope = _divisor(sv[:, 0])
            out = linalg.divide(matrices, divisor, slope, u[:, 0], v[:, 0])
        return self.view.from_matrices(out, weight)

    def _step(self, matrices: Tensor, moves: bool, again: bool) -> tuple[Tensor, Tensor, Tensor]:
        eps = self.settings.eps
        matrices = matrices.to(compute_dtype(matrices.dtype))
        repeat = self.training and not self._frozen and not moves and (again or _in_backward())
        if repeat and self._last_v is not None and self._last_v.device == matrices.device:
            return linalg.finish_step(matrices, self._last_v, eps)
        u = self.u.to(matrices.dtype)
        u, v, sv = linalg.power_step(matrices, u, eps)
        if moves:
            for _ in range(self.settings.num_itrs - 1):
                u, v, sv = linalg.power_step(matrices, u, eps)
            self.u.copy_(u)
            self.sv.copy_(sv)
            if not torch.compiler.is_compiling() and not v.is_inference():
                self._last_v = v
        return u, v, sv

    def extra_repr(self) -> str:
        """Options and shape, for printing."""
        blocks, rows, columns = self.view.matrices
        return (
            f"num_svs={self.u.shape[1]}, num_itrs={self.settings.num_itrs}, "
            f"matrices=({blocks}, {rows}, {columns})"
        )


class _Frame:
    """One forward: the weights it has read, and whether a layer's own forward took them over."""

    __slots__ = ("handed_on", "values")

    def __init__(self) -> None:
        self.values: dict[tuple[bool, bool], Tensor] = {}
        self.handed_on = False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for a weight of the given dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _divisor(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """d(σ) and dd/dσ, (b,) each: σ itself, and 1 for a zero matrix, which stays as it is.

    A zero-initialised layer thus passes its gradient on unscaled and can learn its way out.
    """
    zero = sigma == 0
    return torch.where(zero, 1.0, sigma), torch.where(zero, 0.0, 1.0).to(sigma.dtype)


def _thread() -> int:
    # Inside a compiled graph there is one thread, and asking for its number would break the graph.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _in_backward() -> bool:
    """Whether autograd is running a backward pass: activation checkpointing recomputes there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
