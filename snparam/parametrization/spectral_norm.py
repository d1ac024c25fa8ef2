"""SpectralNorm: the parametrization of one weight, its state, and what moves it.

What holds, and what the rest of the package relies on:

- **The state** is the buffers u (b, k, m) and sv (b, k), and with `update="step"` v (b, k, n),
  which is not saved: it follows from u and the weight. All are written in place, never replaced, so
  that `DistributedDataParallel` and compiled graphs see them.
- **What moves it.** With `update="forward"` the first read in a training forward of the layer. With
  `update="step"` a hook on every optimizer (see `update`); and, until such a hook has reached the
  weight or `update(model)` was called, or where others have changed the weight, the first read in a
  training forward too. Reads in eval mode, under `frozen`, and in a backward pass never move it.
- **What is saved for backward** is the original weight and copies of u, v and σ, never a buffer,
  the weight in use, or a scaled copy. So the state may move, and the weight in use be written to,
  between a forward and its backward; the original may not.
- **What is kept between forwards** is what the last update found, with `update="step"`, for as long
  as the buffers are as it left them (their `Fingerprint` matches). In one forward of the layer all
  reads of one kind share a tensor.
- **What a recomputation repeats** (activation checkpointing) is the estimate that the forward used,
  by the same operations, so that it saves as many tensors; see `activation_checkpointing`.
- **A copy** has the state and none of what belongs to running forwards; it trusts no hook until one
  has reached it. **A move** to another device or dtype keeps the state up to rounding. **A load**
  leaves u and sv as they were loaded: the next training forward divides by that sv, and moves
  nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from itertools import count
from threading import get_ident
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch.compiler import is_compiling

from snparam.constraints.constraint import CONSTRAINTS
from snparam.constraints.division import without_autocast
from snparam.constraints.gain import gain_in
from snparam.estimators.estimate import ESTIMATORS, Estimate
from snparam.estimators.power import right_vectors
from snparam.matrices import torch_private
from snparam.matrices.products import left_product, real_dtype
from snparam.matrices.sharded import gathered, is_sharded
from snparam.matrices.stacks import compute_dtype, is_finite, stack_of
from snparam.matrices.views import View
from snparam.parametrization.activation_checkpointing import (
    in_backward,
    keep,
    kept,
    refuse_in_region,
    region_around_compilation,
    saved_by,
    unseen,
)
from snparam.parametrization.fingerprint import Fingerprint, version_of
from snparam.parametrization.options import Settings

# Attributes that belong to running forwards and running training: neither copied nor saved.
_TRANSIENT = (
    "_readings",
    "_traced_readings",
    "_shared",
    "_sharing",
    "_frozen",
    "_last",
    "_trusted",
    "_loaded",
    "_known",
    "_current",
    "_homes",
    "moved_at",
    "number",
)

# Of states, in the order in which they were made, which is the same on all ranks.
_numbers = count()

# All states with `update="step"` that there are, copies included, for the hooks of `update`.
STEPWISE: WeakSet[SpectralNorm] = WeakSet()


class Reading:
    """What one forward has read of one weight.

    Attributes:
        estimate: what it was normalised by, once the state has moved or something was repeated.
        values: the weight in use, by what tells one kind of read from another, with the weight that
            it was made of.
        at_map: whether it is used at the linear map, and not for the weight.
        regions: the checkpointed regions that have kept the estimate.
    """

    __slots__ = ("at_map", "estimate", "regions", "values")

    def __init__(self) -> None:
        self.estimate: Estimate | None = None
        self.at_map = False
        self.values: dict[object, tuple[Tensor, Tensor]] = {}
        self.regions: list[Any] = []


class SpectralNorm(nn.Module):
    """The parametrization W → W / σ(W) of one weight, or what another constraint makes of it.

    A training forward takes `num_itrs` steps from `u` and stores u and sv in place. A forward in
    eval mode takes one step from `u` and stores nothing. Arithmetic is in float32 at least, with
    autocast off; the result has the weight's dtype. The options it was registered with are
    attributes that can be read and not set: `num_svs`, `num_itrs`, `blocks`, and so on.

    Attributes:
        u: buffer, (b, k, m): estimates of the top k left singular vectors of each block, as rows.
        v: buffer, (b, k, n), with `update="step"` only, not saved: the right singular vectors.
        sv: buffer, (b, k): estimates of the singular values. For looking at.
        gain: γ, (b,), with `gain="learned"` (a Parameter) or `"fixed"` (a buffer) only.
        view: how the weight is read as a stack of matrices (b, m, n).
        settings: the options it was registered with.
        name: what errors call the weight.

    Source: Miyato et al. 2018 for k = 1; Brock, Donahue and Simonyan 2019 for the top k.
    """

    u: Tensor
    v: Tensor
    sv: Tensor
    gain: Tensor

    def __init__(self, view: View, settings: Settings, u: Tensor, sv: Tensor, name: str) -> None:
        """Take over a state; `register_sn` and `convert_model` make one.

        Args:
            view: how the weight is read.
            settings: validated options.
            u: (b, k, m), where to start.
            sv: (b, k), the singular values that belong to it.
            name: what errors call the weight.
        """
        super().__init__()
        self.view = view
        self.settings = settings
        self.name = name
        self._estimator = ESTIMATORS[settings.sigma]
        self._constraint = CONSTRAINTS[settings.constraint_name]
        self.register_buffer("u", u)
        self.register_buffer("sv", sv)
        if settings.update == "step":
            v = u.new_zeros(*u.shape[:2], view.matrices[2])
            self.register_buffer("v", v, persistent=False)
        sigma = torch.where(sv[:, 0] > 0, sv[:, 0], 1.0)
        for parameter, (start, learned) in self._constraint.parameters(sigma, settings).items():
            if learned:
                self.register_parameter(parameter, nn.Parameter(start.clone()))
            else:
                self.register_buffer(parameter, start.clone())
        self._parameter_names = tuple(self._constraint.parameters(sigma, settings))
        self._begin()

    def _begin(self) -> None:
        """Begin without any running forward, and with no reason to trust a hook."""
        self._readings: dict[int, Reading] = {}
        self._traced_readings: list[Reading] = []
        self._shared: Reading | None = None
        self._sharing = 0
        self._frozen = 0
        self._last: Estimate | None = None
        self._trusted = False
        self._loaded = False
        # By how the weight is sharded: FSDP2 has one that it shards and one that it has gathered.
        self._known: dict[object, Fingerprint] = {}
        self._current: tuple[Fingerprint, tuple[int, ...], Estimate] | None = None
        # Weakly, or a model that nobody refers to would wait for the garbage collector.
        self._homes: list[tuple[ReferenceType[nn.Module], str]] = []
        self.moved_at = -1
        self.number = next(_numbers)
        if self.settings.update == "step":
            STEPWISE.add(self)

    # Copies and moves

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNorm:
        """Copy the state, and not what belongs to running forwards and running training."""
        new: SpectralNorm = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        new._begin()
        owners = [(home(), name) for home, name in self._homes]
        new._homes = [(ref(memo[id(o)]), name) for o, name in owners if id(o) in memo]
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has too."""
        return {key: value for key, value in self.__dict__.items() if key not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copied state."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()

    def _apply(self, *args: Any, **kwargs: Any) -> SpectralNorm:
        """Move to another device or dtype; a gain stays as it is where the dtype cannot hold it."""
        before = {name: getattr(self, name).detach() for name in self._parameter_names}
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._current = self._last = None
        for name, value in before.items():
            now = getattr(self, name)
            if value.dtype != now.dtype and not now.is_meta:
                now.data = gain_in(now.dtype, value.to(now.device))
        return self

    # Where it is

    def at(self, owner: nn.Module, name: str) -> None:
        """Note that this is on the tensor `name` of a module; a shared state is on several."""
        if not any(home() is owner and tensor == name for home, tensor in self._homes):
            self._homes.append((ref(owner), name))

    def left(self, owner: nn.Module, name: str) -> None:
        """Note that this was taken off a tensor."""
        self._homes = [
            (home, tensor)
            for home, tensor in self._homes
            if not (home() is owner and tensor == name)
        ]

    def originals(self) -> list[Tensor]:
        """Return the Parameters that this is on now, which wrappers may have replaced since."""
        found = []
        for home, name in self._homes:
            owner = home()
            lists: Any = None if owner is None else owner._modules.get("parametrizations")
            parametrizations = None if lists is None else lists._modules.get(name)
            if parametrizations is not None and self in parametrizations._modules.values():
                original = getattr(parametrizations, "original", None)
                if original is not None:
                    found.append(original)
        return found

    # Reading the weight

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight in use, of the shape and dtype of `weight`.

        Within one forward of the layer the first read makes it and later ones of its kind share it.
        """
        if is_compiling():
            return self._read_traced(weight)
        reading = self._shared or self._readings.get(get_ident())
        if reading is None:
            return self._normalised(weight, Reading())
        is_shared = reading is self._shared
        kind = (
            is_grad_enabled(),
            saved_by() if is_grad_enabled() else is_inference_mode_enabled(),
            self.training,
            is_sharded(weight) if is_shared else version_of(weight),
        )
        made_of, value = reading.values.get(kind, (None, None))
        if value is None or not (is_shared or made_of is weight):
            value = self._normalised(weight, reading)
            reading.values[kind] = weight, value
        return value

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return what to store when a value is assigned to the weight: the value.

        The state converges to it. A Parameter is no value that somebody assigns, but the weight of
        a module that torch registers this on as well; the state stays that of its own weight.

        Raises:
            ValueError: if the value has another shape or dtype, or is not finite.
        """
        if isinstance(value, nn.Parameter):
            return value
        shape, theirs = self.view.shape, tuple(value.shape)
        what = f"SpectralNorm on {self.name} {shape}: assigned a tensor"
        if theirs != shape:
            raise ValueError(f"{what} of shape {theirs}; assign one of shape {shape}")
        if not is_finite(stack_of(value, self.view)):
            raise ValueError(f"{what} with NaN or inf")
        self.refresh(value)
        return value

    def estimate(self, weight: Tensor, reading: Reading | None = None) -> Estimate:
        """Return what a read now normalises a weight by, moving the state if that is due.

        Args:
            weight: the original.
            reading: what the forward that reads has read so far; None is a forward of its own.
        """
        reading = reading or Reading()
        if reading.estimate is not None:
            # For a region that has begun since.
            keep(self, reading.estimate, reading.at_map, reading.regions)
            return reading.estimate
        if not self.training:
            return self._unstored(weight)
        if in_backward():
            found, reading.at_map = kept(self, self._last, reading.at_map, reading.regions)
            if found is None:
                found = self._unstored(weight)
        else:
            with _normal_tensors(weight):
                found = self._found(weight)
            keep(self, found, reading.at_map, reading.regions)
        reading.estimate = found
        return found

    def _normalised(self, weight: Tensor, reading: Reading) -> Tensor:
        with without_autocast(weight), unseen(), _constant_shapes():
            return self._applied(weight, self.estimate(weight, reading))

    def _applied(self, weight: Tensor, estimate: Estimate) -> Tensor:
        # In eval mode by torch's own operations: TorchScript saves no autograd Function.
        return self._constraint.apply(
            weight, estimate, self.parameters_of_constraint, self.settings, self.view,
            plain=not self.training,
        )  # fmt: skip

    @property
    def parameters_of_constraint(self) -> dict[str, Tensor]:
        """The tensors that the constraint keeps beside the state, by name."""
        return {name: getattr(self, name) for name in self._parameter_names}

    # What is found, and stored

    @torch.no_grad()
    def _unstored(self, weight: Tensor) -> Estimate:
        """Return what one step finds, and store nothing: it makes u all that eval depends on."""
        stack = stack_of(weight.detach(), self.view)
        return self._estimator.read(stack, self.u.to(stack.dtype), self.settings.eps)

    @torch.no_grad()
    def _found(self, weight: Tensor) -> Estimate:
        """Return what a training forward divides by, moving the state if that is due."""
        stepwise = self.settings.update == "step"
        if stepwise and self._is_up_to_date(weight):
            found = self._stored(weight)
        elif self._frozen:
            found = self._unstored(weight)
        else:
            found = self.move(weight)
            if stepwise:
                self.know(weight, found)
        self._last = found
        return found

    def _is_up_to_date(self, weight: Tensor) -> bool:
        """Return whether the stored state is what a training forward divides by, with no step."""
        if not (self._trusted or self._loaded):
            return False
        self._loaded = self._loaded and bool(self._frozen)
        known = self._known.get(_placement(weight))
        if known is None and self._known:
            # Seen for the first time beside another, as FSDP2's gathered weight is.
            self._know_weight(weight)
            return True
        return known is not None and known.matches(weight)

    def _know_weight(self, weight: Tensor) -> None:
        # What is passed in, and no Parameter, belongs to one call.
        if isinstance(weight, nn.Parameter):
            self._known[_placement(weight)] = Fingerprint(weight)

    @torch.no_grad()
    def move(self, weight: Tensor) -> Estimate:
        """Take `num_itrs` steps on a weight, and store what they find."""
        stack, settings = stack_of(weight.detach(), self.view), self.settings
        us = [self.u.to(stack.dtype)]
        (found,) = self._estimator.move([stack], us, settings.num_itrs, settings.eps)
        for name in self._estimator.buffers:
            self._buffers[name].copy_(getattr(found, name))  # type: ignore[union-attr]
        if settings.update == "step":
            self.v.copy_(found.v)
        return found

    def know(self, weight: Tensor, found: Estimate) -> None:
        """Note that the buffers are now what was found for a weight as it is now."""
        self._loaded = False
        self._known.clear()
        self._know_weight(weight)
        self._keep_current(weight, found)

    def trust(self, clock: int) -> None:
        """Rely on optimizers' hooks from now on: one has reached the weight, at this time."""
        self._trusted = True
        self.moved_at = clock

    def knows(self, weight: Tensor) -> bool:
        """Return whether the state was last moved for a weight as it is now."""
        known = self._known.get(_placement(weight))
        return known is not None and known.matches(weight)

    def stored(self) -> tuple[Tensor, ...]:
        """Return the buffers u, v and sv, with `update="step"`."""
        buffers: Any = self._buffers
        return buffers["u"], buffers["v"], buffers["sv"]

    def _stored(self, weight: Tensor) -> Estimate:
        """Return what is in the buffers, without a step, in tensors that no update writes to."""
        order = self.view.order_for(weight)
        current = self._current
        if current is not None and current[1] == order and current[0].matches(*self.stored()):
            return current[2]
        # New, loaded or moved; or written to by others, who then mean it to be used.
        u, v, sv = (x.to(compute_dtype(x.dtype), copy=True) for x in self.stored())
        if current is not None and current[1] != order:  # of v, which lies as the weight did
            stack = stack_of(weight.detach(), self.view)
            v = right_vectors(left_product(stack, u.to(stack.dtype)), self.settings.eps)
        found = Estimate.of(u, v, sv)
        self._keep_current(weight, found)
        return found

    def _keep_current(self, weight: Tensor, found: Estimate) -> None:
        transformed = torch_private.functorch_is_active() or is_inference_mode_enabled()
        if self.settings.update == "step" and not transformed:
            order = self.view.order_for(weight)
            self._current = Fingerprint(*self.stored()), order, found

    # In a compiled graph

    def _read_traced(self, weight: Tensor) -> Tensor:
        """Return the weight in use, in a graph that is being compiled.

        What is computed twice the compiler finds by itself; it matters only where a read moves the
        state which forward it belongs to.
        """
        readings = self._traced_readings
        reading = self._shared or (readings[-1] if readings else None)
        if reading is not None and is_grad_enabled() in reading.values:
            return reading.values[is_grad_enabled()][1]
        with without_autocast(weight):
            if reading is not None and reading.estimate is not None:
                estimate = reading.estimate
            else:
                estimate = self._found_traced(weight)
            if torch.is_grad_enabled():
                estimate = _held(estimate)
            value = self._applied(weight, estimate)
        if reading is not None:
            reading.estimate = estimate
            reading.values[is_grad_enabled()] = weight, value
        return value

    def _found_traced(self, weight: Tensor) -> Estimate:
        if self.moves_traced():
            return self.move(weight)
        if not (self.training and self._is_pure_traced()):
            return self._unstored(weight)
        if self._loaded and not self._frozen and region_around_compilation() is None:
            self._loaded = False
        # The graph takes the buffers as its inputs, in place, whatever they hold.
        with torch.no_grad():
            return Estimate.of(self.u.clone(), self.v.clone(), self.sv.clone())

    def _is_pure_traced(self) -> bool:
        """Return whether training forwards in a graph take no step; the graph guards on that."""
        return self.settings.update == "step" and (self._trusted or self._loaded)

    def moves_traced(self) -> bool:
        """Return whether a forward in a graph that is being compiled moves the state.

        A region that is checkpointed is recomputed, and moves none; with `update="step"` its
        forwards take a step that is not stored, until an optimizer has reached the weight.

        Raises:
            RuntimeError: if it would have to, in a checkpointed region.
        """
        if not self.training or self._frozen or self._is_pure_traced():
            return False
        if self.settings.update == "step":
            return region_around_compilation() is None
        refuse_in_region(self.name, self.view.shape)
        return True

    def reading(self) -> Reading:
        """Return what the running forward of the layer in this thread has read."""
        return self._readings[get_ident()]

    def enter(self, thread: int) -> Reading | None:
        """Begin a forward of the layer in a thread, and return the one around it."""
        around = self._readings.get(thread)
        self._readings[thread] = Reading()
        return around

    def leave(self, thread: int, around: Reading | None) -> None:
        """End what `enter` began."""
        if around is None:
            self._readings.pop(thread, None)
        else:
            self._readings[thread] = around

    def enter_traced(self) -> None:
        """Begin a forward of the layer in a graph that is being compiled."""
        self._traced_readings.append(Reading())

    def leave_traced(self) -> None:
        """End what `enter_traced` began; tensors held where a graph ends would be its outputs."""
        reading = self._traced_readings.pop()
        reading.values.clear()
        reading.estimate = None

    # What others ask of it

    def freeze(self, on: bool) -> None:
        """Begin or end a stretch in which no read moves the state; stretches nest."""
        self._frozen += 1 if on else -1

    def share(self, on: bool) -> None:
        """Begin or end a stretch in which all reads, in all threads, are one; stretches nest."""
        self._sharing += 1 if on else -1
        if not self._sharing:
            self._shared = None
        elif self._shared is None:
            self._shared = Reading()

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Converge the state to the singular vectors and values of a weight, in place."""
        u, _ = self._estimator.start(stack_of(weight.detach(), self.view), self.u.shape[1])
        self.u.copy_(u)
        self._last = None
        found = self.move(weight)
        if self.settings.update == "step":
            self.know(weight, found)

    @torch.no_grad()
    def loaded(self, weight: Tensor) -> None:
        """Take u, sv and the weight as they are now: they came from elsewhere, together."""
        self._current = self._last = None
        self._known.clear()
        self._trusted = False
        if self.settings.update == "step":
            self._loaded = True
            stack = stack_of(weight.detach(), self.view)
            v = right_vectors(left_product(stack, self.u.to(stack.dtype)), self.settings.eps)
            self._keep_v(v)
            self._know_weight(weight)

    def _keep_v(self, v: Tensor) -> None:
        if self.v.dtype == self.u.dtype and self.v.device == self.u.device:
            self.v.copy_(v)
        else:  # loading with assign=True may have replaced u by one of another kind
            self.v = v.to(self.u.device, self.u.dtype)

    @torch.no_grad()
    def start_parameters(self, weight: Tensor) -> None:
        """Start a gain at the σ that the next forward finds, so that γ W / σ is W."""
        for name in self._parameter_names:
            parameter, sigma = getattr(self, name), self.sigma_of(weight)
            start, _ = self._constraint.parameters(sigma, self.settings)[name]
            # Of the weight's dtype, as wrappers that flatten parameters ask for, if σ fits into it.
            parameter.data = gain_in(real_dtype(weight.dtype), start)
            parameter.requires_grad_(isinstance(parameter, nn.Parameter) and weight.requires_grad)

    @torch.no_grad()
    def sigma_of(self, weight: Tensor) -> Tensor:
        """Return the σ₁ (b,) that a forward in eval mode divides by; nothing is stored."""
        return self._unstored(weight).sigma.reshape(-1).to(self.sv.dtype)

    def promised_norm(self, sigma: Tensor) -> Tensor:
        """Return the norm (b,) that a weight with the given σ (b,) has in use."""
        parameters = {
            name: gathered(parameter) for name, parameter in self.parameters_of_constraint.items()
        }
        return self._constraint.norm(sigma, parameters, self.settings)

    def extra_repr(self) -> str:
        """Return options and shape, for printing."""
        default = Settings()
        given = [
            f"{field.name}={getattr(self.settings, field.name)!r}"
            for field in fields(Settings)
            if field.name not in ("num_svs", "num_itrs")
            and getattr(self.settings, field.name) != getattr(default, field.name)
        ]
        tracked = [f"num_svs={self.u.shape[1]}", f"num_itrs={self.settings.num_itrs}"]
        return ", ".join([*tracked, *given, f"matrices={tuple(self.view.matrices)}"])


def _placement(weight: Any) -> object:
    """Return how a weight is sharded over ranks, or None."""
    return str(weight.placements) if is_sharded(weight) else None


def _normal_tensors(weight: Tensor) -> AbstractContextManager[object]:
    """Return a context that makes tensors, in inference mode too, which later reads can use."""
    if is_inference_mode_enabled() and not weight.is_inference():
        return torch.inference_mode(False)
    return nullcontext()


@contextmanager
def _tracing_constant_shapes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def _constant_shapes() -> AbstractContextManager[object]:
    """Return a context in which TorchScript does not warn that shapes of a weight decide."""
    if torch_private.tracing_state() is None:
        return nullcontext()
    return _tracing_constant_shapes()


def _option(name: str) -> property:
    def read(self: SpectralNorm) -> Any:
        return self.u.shape[1] if name == "num_svs" else getattr(self.settings, name)

    def refuse(self: SpectralNorm, value: object) -> None:
        raise AttributeError(
            f"SpectralNorm on {self.name} {self.view.shape}: {name}={value!r} cannot be set once "
            "registered; call remove_sn, and register with it"
        )

    return property(read, refuse, doc=f"The option `{name}` that it was registered with.")


for _field in fields(Settings):
    if _field.name != "gain":  # which is γ itself
        setattr(SpectralNorm, _field.name, _option(_field.name))


def _held(estimate: Estimate) -> Estimate:
    """Return the first vectors and σ₁ of an estimate, kept by a compiler for the backward pass.

    A compiler recomputes what is cheap rather than keep it, here a step, in the backward pass: from
    the buffer, which by then has moved on (github.com/pytorch/pytorch/pull/197039). Concatenations
    it always keeps.
    """
    u, v, sigma = estimate.u[:, 0], estimate.v[:, 0], estimate.sigma
    both = torch.cat([u, v, sigma.reshape(-1, 1).to(u.dtype)], 1)
    rows = u.shape[1]
    u, v, kept_sigma = both[:, None, :rows], both[:, None, rows:-1], both[:, -1].real
    return Estimate(u, v, estimate.sv, kept_sigma.reshape(sigma.shape))
