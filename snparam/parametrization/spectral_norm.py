"""SpectralNorm: the parametrization of one weight, its state, and what moves it.

These invariants hold, and the rest of the package relies on them:

- **The state** is the buffers u (b, k, m) and sv (b, k), and with `update="step"` v (b, k, n),
  which is not saved because it follows from u and the weight. When the state moves, all are written
  in place and never replaced, so that `DistributedDataParallel` and compiled graphs see them.
- **What moves the state.** With `update="forward"`, the first read in a training forward of the
  layer moves it. With `update="step"`, a hook on every optimizer does (see `update`); the first
  read in a training forward moves it too, until such a hook has reached the weight or
  `update(model)` was called, and where others have changed the weight. Reads in eval mode, under
  `frozen`, and in a backward pass never move it.
- **What is saved for backward** is the original weight and copies of u, v and σ, never a buffer,
  the weight in use, or a scaled copy. So between a forward and its backward the state may move, and
  the weight in use may be written to; the original may not.
- **What is kept between forwards**, with `update="step"`, is the estimate of the last update, for
  as long as the buffers are as it left them (their `Fingerprint` matches). Within one forward of
  the layer all reads of one kind (see `SpectralNorm.forward`) share a tensor.
- **What a recomputation repeats** (activation checkpointing) is the estimate that the forward used,
  by the same operations, so that it saves as many tensors; see `activation_checkpointing`.
- **A copy** has the state and nothing that belongs to running forwards; it trusts no hook until one
  has reached it. **A move** to another device or dtype keeps the state up to rounding. **A load**
  leaves u and sv as they were loaded; with `update="step"` the next training forward divides by
  that sv, and moves nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from itertools import count
from threading import get_ident
from types import MappingProxyType
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch.compiler import is_compiling

from snparam.constraints.constraint import CONSTRAINTS
from snparam.constraints.division import is_autocast_on, without_autocast
from snparam.constraints.gain import gain_in
from snparam.estimators.estimate import ESTIMATORS, Estimate
from snparam.estimators.power import right_vectors
from snparam.matrices import torch_private
from snparam.matrices.products import Stack, left_product, real_dtype
from snparam.matrices.sharded import full_vector, is_sharded
from snparam.matrices.stacks import compute_dtype, is_finite, stack_of
from snparam.matrices.views import WeightView
from snparam.parametrization.activation_checkpointing import (
    in_backward,
    keep_estimate,
    refuse_in_region,
    region_around_compilation,
    repeated_estimate,
    saved_tensors_hook,
    without_selective_checkpointing,
)
from snparam.parametrization.fingerprint import Fingerprint, version_of
from snparam.parametrization.options import Settings

# Attributes that belong to running forwards and running training: neither copied nor saved.
_TRANSIENT = (
    "_readings",
    "_traced_readings",
    "_shared_reading",
    "_cached_depth",
    "_frozen_depth",
    "_last_estimate",
    "_trusted",
    "_loaded",
    "_fingerprints",
    "_kept_estimate",
    "_certificate",
    "_owners",
    "moved_at",
    "number",
)

_NO_PARAMETERS: Mapping[str, Tensor] = MappingProxyType({})

# Numbers states in the order in which they are made. That order is the same on all ranks, which
# have to move the states of sharded weights in one order.
_numbers = count()

# Every state with `update="step"` that is alive, copies included, and every state that keeps a
# certificate now, for the hooks of `update`, which move the former and end the latter.
STEPWISE: WeakSet[SpectralNorm] = WeakSet()
CERTIFIED: WeakSet[SpectralNorm] = WeakSet()


class Reading:
    """The reads of one weight in one forward of its layer, which share one estimate.

    Attributes:
        estimate: the estimate that the forward uses; None before its first read, and in eval mode.
        values: for each kind of read (see `SpectralNorm.forward`), the original and the weight in
            use that was computed from it.
        at_map: whether the forward applies σ at the linear map instead of computing the weight in
            use.
        regions: the checkpointed regions that have kept the estimate.
        source: the weight that a certified estimate is of; None for other estimates.
    """

    __slots__ = ("at_map", "estimate", "regions", "source", "values")

    def __init__(self) -> None:
        self.estimate: Estimate | None = None
        self.source: Fingerprint | None = None
        self.at_map = False
        self.values: dict[object, tuple[Tensor, Tensor]] = {}
        self.regions: list[Any] = []


class SpectralNorm(nn.Module):
    """The parametrization W → W / σ(W) of one weight, or another constraint on its σ.

    A training forward takes `num_itrs` steps from `u` and stores u and sv in place; with
    `update="step"` an optimizer's step does so instead. A forward in eval mode takes one step from
    `u` and stores nothing. Arithmetic is in float32 at least, with autocast off; the result has the
    weight's dtype. The options of the registration are attributes that can be read and not set:
    `num_svs`, `num_itrs`, `blocks`, and so on.

    Attributes:
        u: buffer, (b, k, m): estimates of the top k left singular vectors of each block, as rows.
        v: buffer, (b, k, n), with `update="step"` only, not saved: the right singular vectors.
        sv: buffer, (b, k): estimates of the singular values. With `update="forward"` no forward
            reads them; with `update="step"` training forwards divide by the first.
        gain: γ, (b,), with `gain="learned"` (a Parameter) or `"fixed"` (a buffer) only.
        view: how the weight is read as a stack of matrices (b, m, n).
        settings: the options of the registration.
        name: the name of the weight in errors.

    Source: Miyato et al. 2018 for k = 1; Brock, Donahue and Simonyan 2019 for the top k.
    """

    u: Tensor
    v: Tensor
    sv: Tensor
    gain: Tensor

    def __init__(
        self, view: WeightView, settings: Settings, u: Tensor, sv: Tensor, name: str
    ) -> None:
        """Make the parametrization with a given state; users call `register_sn` or `convert_model`.

        Args:
            view: how the weight is read as a stack of matrices (b, m, n).
            settings: validated options.
            u: (b, k, m), the left singular vectors to start from.
            sv: (b, k), the singular values that belong to them.
            name: the name of the weight in errors.
        """
        super().__init__()
        self.view = view
        self.settings = settings
        self.name = name
        self._estimator = ESTIMATORS[settings.sigma]
        self._constraint = CONSTRAINTS[settings.constraint_name]
        self._constraint_options = settings.for_matrices(view.matrices)
        self._certifies = self._estimator.side == "above"
        self.register_buffer("u", u)
        self.register_buffer("sv", sv)
        if settings.update == "step":
            v = u.new_zeros(*u.shape[:2], view.matrices[2])
            self.register_buffer("v", v, persistent=False)
        sigma = torch.where(sv[:, 0] > 0, sv[:, 0], 1.0)
        kept = self._constraint.parameters(sigma, self._constraint_options)
        for parameter, (start, learned) in kept.items():
            if learned:
                self.register_parameter(parameter, nn.Parameter(start.clone()))
            else:
                self.register_buffer(parameter, start.clone())
        self._parameter_names = tuple(kept)
        self._reset_transient()

    def _reset_transient(self) -> None:
        """Reset the transient attributes: no forward is running, and no hook is trusted."""
        self._readings: dict[int, Reading] = {}
        self._traced_readings: list[Reading] = []
        self._shared_reading: Reading | None = None
        self._cached_depth = 0
        self._frozen_depth = 0
        self._last_estimate: Estimate | None = None
        self._trusted = False
        self._loaded = False
        # By `_placement`, because FSDP2 has a sharded and a gathered tensor for one weight.
        self._fingerprints: dict[object, Fingerprint] = {}
        self._kept_estimate: tuple[Fingerprint, tuple[int, ...], Estimate] | None = None
        self._certificate: tuple[Fingerprint, Estimate] | None = None
        # Weak references, or a model that is no longer used would wait for the garbage collector.
        self._owners: list[tuple[ReferenceType[nn.Module], str]] = []
        self.moved_at = -1
        self.number = next(_numbers)
        if self.settings.update == "step":
            STEPWISE.add(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but no option: those of the registration are read-only."""
        if (name == "settings" and name in self.__dict__) or (
            name == "gain" and not isinstance(value, Tensor)
        ):
            raise AttributeError(_read_only_message(self, name, value))
        super().__setattr__(name, value)

    # Copies and moves

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNorm:
        """Return a copy of the state, with the transient attributes reset.

        It is on the copies of the modules that this one is on, as far as they are copied with it.
        """
        new: SpectralNorm = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        new._reset_transient()
        owners = [(reference(), name) for reference, name in self._owners]
        new._owners = [(new._reference(memo[id(o)]), name) for o, name in owners if id(o) in memo]
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that a copy takes along."""
        return {key: value for key, value in self.__dict__.items() if key not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore copied attributes, and reset the transient ones."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset_transient()

    def _apply(self, *args: Any, **kwargs: Any) -> SpectralNorm:
        """Move to another device or dtype; a gain keeps its dtype if the new one cannot hold it."""
        parameters = {name: getattr(self, name).detach() for name in self._parameter_names}
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._kept_estimate = self._last_estimate = self._certificate = None
        if self._certifies:
            self._trusted = False  # the bound in sv was rounded, and a compiled graph would use it
        for name, value in parameters.items():
            moved = getattr(self, name)
            if value.dtype != moved.dtype and not moved.is_meta:
                moved.data = gain_in(moved.dtype, value.to(moved.device))
        return self

    # The weights that it is on

    def add_owner(self, owner: nn.Module, name: str) -> None:
        """Note that this is on the tensor `name` of a module; tied weights share one state."""
        if not any(
            reference() is owner and tensor_name == name for reference, tensor_name in self._owners
        ):
            self._owners.append((self._reference(owner), name))

    def _reference(self, owner: nn.Module) -> ReferenceType[nn.Module]:
        """Return a weak reference to a module; once the module is gone, no hook is trusted.

        The hooks of `update` find the weight by its module, and torch may have moved this
        parametrization to another one.
        """
        state = ref(self)

        def distrust(_: object) -> None:
            norm = state()
            if norm is not None:
                norm._trusted = False

        return ref(owner, distrust)

    def remove_owner(self, owner: nn.Module, name: str) -> None:
        """Note that this was taken off the tensor `name` of a module."""
        self._owners = [
            (reference, tensor_name)
            for reference, tensor_name in self._owners
            if not (reference() is owner and tensor_name == name)
        ]

    def originals(self) -> list[Tensor]:
        """Return the Parameters that this is on now, which wrappers may have replaced since."""
        originals = []
        for reference, name in self._owners:
            owner = reference()
            lists: Any = None if owner is None else owner._modules.get("parametrizations")
            parametrizations = None if lists is None else lists._modules.get(name)
            if parametrizations is not None and self in parametrizations._modules.values():
                original = getattr(parametrizations, "original", None)
                if original is not None:
                    originals.append(original)
        return originals

    # Reading the weight

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight in use, of the shape and dtype of `weight`.

        Within one forward of the layer, the first read of each kind computes it, and later reads of
        that kind share it. Reads are of one kind if they agree in grad mode (and saved-tensors
        hooks, or inference mode), in training mode, and in the version of the weight.

        Args:
            weight: the original, of the view's shape.

        Raises:
            ValueError: if the weight is sharded, and the constraint takes no shards; nothing has
                been changed.
        """
        if not self._constraint.takes_shards and is_sharded(weight):
            raise ValueError(
                f"SpectralNorm on {self.name} {self.view.shape}: {self._constraint.name!r} needs "
                "the whole weight, and it is read as a shard; read it in a forward of the module "
                "that fully_shard wraps, or pass coeff= or soft=True instead"
            )
        if is_compiling():
            return self._read_traced(weight)
        reading = self._shared_reading or self._readings.get(get_ident())
        if reading is None:
            return self._compute_weight(weight, None)
        is_shared = reading is self._shared_reading
        kind = (
            is_grad_enabled(),
            saved_tensors_hook() if is_grad_enabled() else is_inference_mode_enabled(),
            self.training,
            is_sharded(weight) if is_shared else version_of(weight),
        )
        source, value = reading.values.get(kind, (None, None))
        if value is None or not (is_shared or source is weight):
            value = self._compute_weight(weight, reading)
            reading.values[kind] = weight, value
        return value

    def right_inverse(self, value: Any) -> Tensor:
        """Converge the state to a value that is assigned to the weight, and return it to be stored.

        torch passes a Parameter where it registers this parametrization on another module's weight
        as well; the state then stays that of its first weight.

        Args:
            value: of the weight's shape and dtype, finite.

        Raises:
            TypeError: if the value is no tensor.
            ValueError: if it has another shape or dtype, or is not finite.
        """
        if isinstance(value, nn.Parameter):
            return value
        assigned = f"SpectralNorm on {self.name} {self.view.shape}: assigned"
        expected = f"assign a tensor of shape {self.view.shape}"
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            article = "an" if kind[0].lower() in "aeiou" else "a"
            given = "None" if value is None else f"{article} {kind}"
            raise TypeError(f"{assigned} {given}; {expected}")
        if tuple(value.shape) != self.view.shape:
            raise ValueError(f"{assigned} a tensor of shape {tuple(value.shape)}; {expected}")
        dtypes = {original.dtype for original in self.originals()}
        if dtypes and value.dtype not in dtypes:
            (dtype, *_) = dtypes
            raise ValueError(
                f"{assigned} a tensor of {value.dtype}; assign one of {dtype}, or convert the "
                f"module by module.to({value.dtype}) first"
            )
        if not is_finite(stack_of(value, self.view)):
            raise ValueError(f"{assigned} a tensor with NaN or inf; assign a finite one")
        self.refresh(value)
        return value

    def estimate(self, weight: Tensor, reading: Reading | None = None) -> Estimate:
        """Return the estimate by which a read now normalises a weight, moving the state if due.

        Args:
            weight: the original.
            reading: the reads of the running forward of the layer; None for a read outside of one,
                which counts as a separate forward.
        """
        if not self.training:
            return self._unstored_estimate(weight)
        reading = reading or Reading()
        estimate = reading.estimate
        if reading.source is not None and not reading.source.matches(weight):
            estimate = None  # the weight was written to, or is another, of which it is no bound
        if estimate is None and in_backward():
            estimate, reading.at_map = repeated_estimate(
                self, self._last_estimate, reading.at_map, reading.regions
            )
            if estimate is None:
                estimate = self._unstored_estimate(weight)
        else:
            if estimate is None:
                estimate = self._training_estimate(weight)
            # Also for an estimate of before: a checkpointed region may have begun since then.
            keep_estimate(self, estimate, reading.at_map, reading.regions)
        reading.estimate = estimate
        reading.source = Fingerprint(weight) if self._certifies else None
        return estimate

    def _compute_weight(self, weight: Tensor, reading: Reading | None) -> Tensor:
        if not (
            is_autocast_on(weight)
            or torch_private.dispatch_mode_count()
            or torch_private.tracing_state() is not None
        ):
            return self._apply_constraint(weight, self.estimate(weight, reading))
        with without_autocast(weight), without_selective_checkpointing(), _constant_shapes():
            return self._apply_constraint(weight, self.estimate(weight, reading))

    def _apply_constraint(self, weight: Tensor, estimate: Estimate) -> Tensor:
        # In eval mode by torch's own operations alone, because TorchScript saves no Function.
        return self._constraint.apply(
            weight, estimate, self.parameters_of_constraint, self._constraint_options, self.view,
            plain=not self.training,
        )  # fmt: skip

    @property
    def parameters_of_constraint(self) -> Mapping[str, Tensor]:
        """The tensors that the constraint keeps beside the state (a gain's γ), by name."""
        names = self._parameter_names
        return {name: getattr(self, name) for name in names} if names else _NO_PARAMETERS

    @property
    def has_gain(self) -> bool:
        """Whether its constraint has a γ, which `constraint="gain"` alone asks for too."""
        return "gain" in self._parameter_names

    # Finding estimates, and storing them

    @torch.no_grad()
    def _unstored_estimate(self, weight: Tensor) -> Estimate:
        """Return the estimate of one step, and store nothing: eval then depends on u alone."""
        if self._certifies:
            return self._eval_certificate(weight)
        if self._constraint.uses_all_triplets:
            return self.unstored_triplets(weight)
        stack = stack_of(weight.detach(), self.view)
        return self._estimator.read(stack, self.u.to(stack.dtype), self.settings.eps)

    @torch.no_grad()
    def unstored_triplets(self, weight: Tensor) -> Estimate:
        """Return the estimate of one step, of all tracked triplets, and store nothing."""
        stack = stack_of(weight.detach(), self.view)
        us = [self.u.to(stack.dtype)]
        (estimate,) = self._estimator.move([stack], us, 1, self.settings.eps)
        return estimate

    def _eval_certificate(self, weight: Tensor) -> Estimate:
        """Return a certified estimate; in eval mode the last one, if the weight is unchanged."""
        kept = None if self.training else self._certificate
        if kept is not None and kept[0].matches(weight):
            return kept[1]
        # In inference mode too: a certificate costs too much to be made for one read.
        with torch.inference_mode(False), torch.no_grad():
            source = weight.detach()
            stack = stack_of(source.clone() if weight.is_inference() else source, self.view)
            estimate = self._estimator.read(stack, self.u.to(stack.dtype), self.settings.eps)
            estimate = self.certify(weight, stack, estimate)
        is_lasting = isinstance(weight, nn.Parameter) and not weight.is_inference()
        if is_lasting and not self.training and not torch_private.functorch_is_active():
            self._certificate = Fingerprint(weight), estimate
            CERTIFIED.add(self)
        return estimate

    def certify(self, weight: Tensor, stack: Tensor | Stack, estimate: Estimate) -> Estimate:
        """Return the certified form of an estimate of a weight, for estimators that have one."""
        # Fused optimizers write to a weight without counting it: what was certified before a move
        # does not hold after it.
        self._certificate = None
        options = self._constraint_options
        return self._estimator.certify(
            estimate, stack, weight.dtype, float(options.coeff), options.soft
        )

    def _training_estimate(self, weight: Tensor) -> Estimate:
        """Return the estimate that a training forward uses, moving the state if that is due."""
        if is_inference_mode_enabled() and not weight.is_inference():
            with torch.inference_mode(False):  # autograd may use what is made here later
                return self._training_estimate(weight)
        stepwise = self.settings.update == "step"
        if stepwise and self._is_up_to_date(weight) and self._is_certified():
            estimate = self._stored_estimate(weight)
        elif self._frozen_depth:
            estimate = self._unstored_estimate(weight)
        else:
            estimate = self.move(weight)
            if stepwise:
                self.note_estimate(weight, estimate)
        self.__dict__["_last_estimate"] = estimate  # a module's own way to set it takes longer
        return estimate

    def _is_up_to_date(self, weight: Tensor) -> bool:
        """Return whether a training forward is to divide by the stored state, without a step.

        A loaded state is up to date for one training forward, the one that calls this; forwards
        under `frozen` do not count. A trusted one is as long as the hooks find the weight: torch
        can move this parametrization to modules that nobody has announced.
        """
        if self._trusted and not any(original is weight for original in self.originals()):
            self._trusted = False
        if not (self._trusted or self._loaded):
            return False
        self._loaded = self._loaded and bool(self._frozen_depth)
        fingerprint = self._fingerprints.get(_placement(weight))
        if fingerprint is None and self._fingerprints:
            # Seen for the first time beside a known one, as FSDP2's gathered weight is: no change.
            self._note_weight(weight)
            return True
        return fingerprint is not None and fingerprint.matches(weight)

    def _is_certified(self) -> bool:
        """Return whether the state needs no certificate, or is as its last one left it.

        A loaded σ, and one that others have written, is a number that nobody has certified.
        """
        kept = self._kept_estimate
        return not self._certifies or (kept is not None and kept[0].matches(*self.state_buffers()))

    def _note_weight(self, weight: Tensor) -> None:
        # A tensor that is no Parameter was passed in (by functional_call, say), for one call.
        if isinstance(weight, nn.Parameter):
            self._fingerprints[_placement(weight)] = Fingerprint(weight)

    @torch.no_grad()
    def move(self, weight: Tensor) -> Estimate:
        """Move the state by `num_itrs` steps on a weight, and return the estimate."""
        stack, settings = stack_of(weight.detach(), self.view), self.settings
        buffers: Any = self._buffers
        u = buffers["u"]
        us = [u if u.dtype == stack.dtype else u.to(stack.dtype)]
        (estimate,) = self._estimator.move([stack], us, settings.num_itrs, settings.eps)
        if self._certifies:
            estimate = self.certify(weight, stack, estimate)
        for name in self._estimator.buffers:
            buffers[name].copy_(getattr(estimate, name))
        if settings.update == "step":
            buffers["v"].copy_(estimate.v)
        return estimate

    def note_estimate(self, weight: Tensor, estimate: Estimate) -> None:
        """Note that the buffers hold the estimate of a weight as it is now."""
        self._loaded = False
        self._fingerprints.clear()
        self._note_weight(weight)
        self._keep_estimate(weight, estimate)

    @property
    def needs_whole_weight(self) -> bool:
        """Whether one rank has to have all of a weight: to convolve with it, or to certify it."""
        return self._certifies or not self.view.is_dense

    @property
    def watches_optimizers(self) -> bool:
        """Whether the steps of optimizers concern the state: they move it, or end a certificate."""
        return self.settings.update == "step" or self._certifies

    def end_certificate(self) -> None:
        """Note that an optimizer may have written to the weight, which fused ones do uncounted."""
        self._certificate = None

    def is_up_to_date_since(self, time: int, weight: Tensor) -> bool:
        """Return whether the state was moved since a time, and has to follow no write after that.

        A write that torch does not count would go unseen; a certificate takes no such risk.
        """
        return not self._certifies and self.moved_at > time and self.is_current_for(weight)

    def trust_hooks(self, time: int) -> None:
        """Rely on the hooks of `update` from now on: they have moved the state, at this time."""
        self._trusted = True
        self.moved_at = time

    def is_current_for(self, weight: Tensor) -> bool:
        """Return whether the weight is unchanged since the state was last moved for it."""
        fingerprint = self._fingerprints.get(_placement(weight))
        return fingerprint is not None and fingerprint.matches(weight)

    def state_buffers(self) -> tuple[Tensor, ...]:
        """Return the buffers u, v and sv; with `update="step"` only, as v is missing otherwise."""
        buffers: Any = self._buffers
        return buffers["u"], buffers["v"], buffers["sv"]

    def _stored_estimate(self, weight: Tensor) -> Estimate:
        """Return the estimate in the buffers, without a step, as copies that no update changes."""
        order = self.view.order_for(weight)
        kept = self._kept_estimate
        if kept is not None and kept[1] == order and kept[0].matches(*self.state_buffers()):
            return kept[2]
        # The buffers are new, loaded or moved, or were written to by others, to be used.
        with torch.no_grad():
            u, v, sv = (x.to(compute_dtype(x.dtype), copy=True) for x in self.state_buffers())
            if kept is not None and kept[1] != order:  # v has the former order of columns
                stack = stack_of(weight.detach(), self.view)
                v = right_vectors(left_product(stack, u.to(stack.dtype)), self.settings.eps)
            estimate = Estimate.from_vectors(u, v, sv)
        self._keep_estimate(weight, estimate)
        return estimate

    def _keep_estimate(self, weight: Tensor, estimate: Estimate) -> None:
        transformed = torch_private.functorch_is_active() or is_inference_mode_enabled()
        if self.settings.update == "step" and not transformed:
            order = self.view.order_for(weight)
            self._kept_estimate = Fingerprint(*self.state_buffers()), order, estimate

    # In a compiled graph

    def _read_traced(self, weight: Tensor) -> Tensor:
        """Return the weight in use, in a graph that is being compiled.

        The compiler itself merges operations that are repeated. Which forward of the layer a read
        belongs to matters only where it moves the state.
        """
        readings = self._traced_readings
        reading = self._shared_reading or (readings[-1] if readings else None)
        if reading is not None and is_grad_enabled() in reading.values:
            return reading.values[is_grad_enabled()][1]
        with without_autocast(weight):
            if reading is not None and reading.estimate is not None:
                estimate = reading.estimate
            else:
                estimate = self._traced_estimate(weight)
            if torch.is_grad_enabled():
                estimate = _saved_for_backward(estimate, self._constraint.uses_all_triplets)
            value = self._apply_constraint(weight, estimate)
        if reading is not None:
            reading.estimate = estimate
            reading.values[is_grad_enabled()] = weight, value
        return value

    def _traced_estimate(self, weight: Tensor) -> Estimate:
        if self._certifies:
            if not (self.settings.update == "step" and self._trusted):
                raise RuntimeError(
                    f"SpectralNorm on {self.name} {self.view.shape}: a compiled graph cannot "
                    f"certify, as sigma={self.settings.sigma!r} needs; register with update='step' "
                    "and call snparam.update(model) before the first compiled forward, or compile "
                    "the network that restore_model leaves"
                )
            return self._buffered_estimate()
        if self.moves_traced():
            return self.move(weight)
        if not (self.training and self._is_pure_traced()):
            return self._unstored_estimate(weight)
        if self._loaded and not self._frozen_depth and region_around_compilation() is None:
            self._loaded = False
        return self._buffered_estimate()

    def _buffered_estimate(self) -> Estimate:
        # The buffers are inputs of the graph, which uses what they hold whenever it runs.
        with torch.no_grad():
            return Estimate.from_vectors(self.u.clone(), self.v.clone(), self.sv.clone())

    def _is_pure_traced(self) -> bool:
        """Return whether training forwards in a graph take no step; the graph guards on that."""
        return self.settings.update == "step" and (self._trusted or self._loaded)

    def moves_traced(self) -> bool:
        """Return whether a forward in a graph that is being compiled moves the state.

        In a checkpointed region, whose recomputation would move it again, it does not: with
        `update="step"` forwards there take a step that is not stored, until an optimizer has
        reached the weight.

        Raises:
            RuntimeError: in a checkpointed region, if `update="forward"` would move the state.
        """
        if not self.training or self._frozen_depth or self._is_pure_traced():
            return False
        if self.settings.update == "step":
            return region_around_compilation() is None
        refuse_in_region(self.name, self.view.shape)
        return True

    def reading(self) -> Reading:
        """Return the reads of the forward of the layer that runs in this thread."""
        return self._readings[get_ident()]

    def enter_forward(self, thread: int) -> Reading | None:
        """Begin a forward of the layer in a thread; return the reads of the one around it."""
        outer = self._readings.get(thread)
        self._readings[thread] = Reading()
        return outer

    def leave_forward(self, thread: int, outer: Reading | None) -> None:
        """End the forward that `enter_forward` began, which returned `outer`."""
        if outer is None:
            self._readings.pop(thread, None)
        else:
            self._readings[thread] = outer

    def enter_traced_forward(self) -> None:
        """Begin a forward of the layer in a graph that is being compiled."""
        self._traced_readings.append(Reading())

    def leave_traced_forward(self) -> None:
        """End the forward that `enter_traced_forward` began, and let go of its tensors.

        Tensors that are still held where a graph ends would become outputs of it.
        """
        reading = self._traced_readings.pop()
        reading.values.clear()
        reading.estimate = None

    # What the rest of the package calls

    def enter_frozen(self) -> None:
        """Begin a period in which no read moves the state; periods nest."""
        self._frozen_depth += 1

    def leave_frozen(self) -> None:
        """End a period that `enter_frozen` began."""
        self._frozen_depth -= 1

    def enter_cached(self) -> None:
        """Begin a period in which all reads, in all threads, share one weight; periods nest."""
        self._cached_depth += 1
        if self._shared_reading is None:
            self._shared_reading = Reading()

    def leave_cached(self) -> None:
        """End a period that `enter_cached` began."""
        self._cached_depth -= 1
        if not self._cached_depth:
            self._shared_reading = None

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Converge the state to the singular vectors and values of a weight, in place."""
        u, _ = self._estimator.start(stack_of(weight.detach(), self.view), self.u.shape[1])
        self.u.copy_(u)
        self._last_estimate = None
        estimate = self.move(weight)
        if self.settings.update == "step":
            self.note_estimate(weight, estimate)

    def read_as(self, view: WeightView, weight: Tensor) -> None:
        """Read the weight by another view from now on, and converge the state to it.

        Args:
            view: how the weight is read; where its matrices have fewer singular values than are
                tracked, all of them are tracked.
            weight: the original, of the shape of the view.
        """
        blocks, rows, columns = view.matrices
        count = min(self.u.shape[1], rows, columns)
        self.view = view
        self.u = self.u.new_zeros(blocks, count, rows)
        self.sv = self.sv.new_zeros(blocks, count)
        if "v" in self._buffers:
            self.v = self.v.new_zeros(blocks, count, columns)
        self._kept_estimate = None
        self.refresh(weight)

    @property
    def input_size(self) -> tuple[int, ...] | None:
        """Lengths of the inputs for which σ is the norm of the convolution; None for a matrix."""
        return self.view.input_size

    @torch.no_grad()
    def note_loaded(self, weight: Tensor) -> None:
        """Take u and sv for the state of the weight, as a load has left all three."""
        self._kept_estimate = self._last_estimate = self._certificate = None
        self._fingerprints.clear()
        self._trusted = False
        if self.settings.update == "step":
            # Another estimator may have written the state: its values are no bounds, nor exact.
            self._loaded = self._estimator.side == "below"
            stack = stack_of(weight.detach(), self.view)
            v = right_vectors(left_product(stack, self.u.to(stack.dtype)), self.settings.eps)
            self._write_v(v)
            self._note_weight(weight)

    def _write_v(self, v: Tensor) -> None:
        if self.v.dtype == self.u.dtype and self.v.device == self.u.device:
            self.v.copy_(v)
        else:  # loading with assign=True may have given u another device or dtype
            self.v = v.to(self.u.device, self.u.dtype)

    @torch.no_grad()
    def start_parameters(self, weight: Tensor) -> None:
        """Start a gain at the σ that the next eval forward divides by, so that γ W / σ is W."""
        for name in self._parameter_names:
            parameter, sigma = getattr(self, name), self.sigma_of(weight)
            start, _ = self._constraint.parameters(sigma, self._constraint_options)[name]
            # In the weight's dtype, if σ fits into it: wrappers that flatten parameters want one.
            parameter.data = gain_in(real_dtype(weight.dtype), start)
            parameter.requires_grad_(isinstance(parameter, nn.Parameter) and weight.requires_grad)

    @torch.no_grad()
    def sigma_of(self, weight: Tensor) -> Tensor:
        """Return the σ₁ (b,) that a forward in eval mode divides by; nothing is stored."""
        return self._unstored_estimate(weight).sigma.reshape(-1).to(self.sv.dtype)

    @torch.no_grad()
    def estimated_norm(self, weight: Tensor) -> Tensor:
        """Return the σ₁ (b,) that eval mode estimates: of a zero matrix 0, and NaN as it is."""
        return self._unstored_estimate(weight).sv[:, 0].to(self.sv.dtype)

    def promised_norm(self, sigma: Tensor) -> Tensor:
        """Return the norm (b,) that the constraint promises the weight in use, given its σ (b,)."""
        parameters = {
            name: full_vector(parameter)
            for name, parameter in self.parameters_of_constraint.items()
        }
        return self._constraint.norm(sigma, parameters, self._constraint_options)

    def extra_repr(self) -> str:
        """Return the options and the shape (b, m, n) of the matrices, for printing."""
        default = Settings()
        options = [
            f"{field.name}={getattr(self.settings, field.name)!r}"
            for field in fields(Settings)
            if field.name not in ("num_svs", "num_itrs")
            and getattr(self.settings, field.name) != getattr(default, field.name)
        ]
        if self.view.input_size is not None:
            options.append(f"input_size={self.view.input_size}")
        tracked = [f"num_svs={self.u.shape[1]}", f"num_itrs={self.settings.num_itrs}"]
        return ", ".join([*tracked, *options, f"matrices={tuple(self.view.matrices)}"])


def _placement(weight: Any) -> object:
    """Return how a weight is sharded over ranks, or None."""
    return str(weight.placements) if is_sharded(weight) else None


@contextmanager
def _tracing_constant_shapes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def _constant_shapes() -> AbstractContextManager[object]:
    """Return a context in which tracing does not warn of branches on the shape of a weight."""
    if torch_private.tracing_state() is None:
        return nullcontext()
    return _tracing_constant_shapes()


def _read_only_message(norm: SpectralNorm, name: str, value: object) -> str:
    return (
        f"SpectralNorm on {norm.name} {norm.view.shape}: {name}={value!r} cannot be set once "
        "registered; call remove_sn, and register with it"
    )


def _option(name: str) -> property:
    """Return a property that reads an option from the settings and refuses to set it."""

    def read(self: SpectralNorm) -> Any:
        return self.u.shape[1] if name == "num_svs" else getattr(self.settings, name)

    def refuse(self: SpectralNorm, value: object) -> None:
        raise AttributeError(_read_only_message(self, name, value))

    return property(read, refuse, doc=f"The option `{name}` that it was registered with.")


for _field in fields(Settings):
    if _field.name != "gain":  # the attribute `gain` is γ itself
        setattr(SpectralNorm, _field.name, _option(_field.name))


def _saved_for_backward(estimate: Estimate, every: bool) -> Estimate:
    """Return an estimate such that a compiler saves its vectors and values for backward.

    A compiler prefers to recompute cheap operations in the backward pass, here a step, from the
    buffer, which by then has moved on (github.com/pytorch/pytorch/pull/197039). The results of
    concatenations it always saves.

    Args:
        estimate: an estimate.
        every: whether all of its triplets are needed, or the first alone.
    """
    k = estimate.u.shape[1] if every else 1
    u, v, sv = (part[:, :k] for part in estimate[:3])
    sigma = estimate.sigma.reshape(-1, 1, 1).expand(-1, k, 1)
    saved = torch.cat([u, v, sv.unsqueeze(-1).to(u.dtype), sigma.to(u.dtype)], 2)
    rows = u.shape[2]
    values = saved[..., -2:].real
    return Estimate(
        saved[..., :rows],
        saved[..., rows:-2],
        values[..., 0],
        values[:, 0, 1].reshape(estimate.sigma.shape),
    )
