"""The spellings in which a checkpoint may hold a normalised weight, read as snparam's own.

For a tensor `weight` of a module, one state under four spellings and none under the plain one:

    snparam     parametrizations.weight.original, .0.u (b, k, m), .0.sv (b, k), .0.gain (b,)
    torch       parametrizations.weight.original, .0._u (m,), .0._v (n,)
    torch-hook  weight_orig, weight_u (m,), weight_v (n,)
    biggan      weight, u0 (1, m), sv0 (1,), u1, sv1, ...
    plain       weight

A pre-hook of `load_state_dict` renames what it finds and estimates what is not there. It reports
nothing that torch would report by itself: what it does not understand it leaves in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from snparam.estimators.completion import completed
from snparam.layers.torch_reading import fitting_axis, left_vector, torch_axis, torch_sigma
from snparam.matrices import linalg
from snparam.matrices.sharded import is_sharded
from snparam.matrices.stacks import compute_dtype, is_finite, stack_of
from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import norms_of
from snparam.parametrization.spectral_norm import SpectralNorm

# While tied weights are loaded with `assign=True`, one owner after the other: the Parameter that
# the first of them had, and the one that it has got.
_assigned: WeakKeyDictionary[SpectralNorm, tuple[ReferenceType[Tensor], ReferenceType[Tensor]]]
_assigned = WeakKeyDictionary()


def accept_spellings(owner: nn.Module) -> None:
    """Let `load_state_dict` of a module accept every spelling of its normalised weights."""
    if not any(_is_ours(hook) for hook in owner._load_state_dict_pre_hooks.values()):
        # The public name of this is younger than the oldest torch supported.
        owner._register_load_state_dict_pre_hook(_respell, with_module=True)  # type: ignore[no-untyped-call]


def forget_spellings(owner: nn.Module) -> None:
    """Undo `accept_spellings`."""
    hooks = owner._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
        del hooks[key]


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", None) is _respell


def _respell(
    owner: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    for name, norm in list(norms_of(owner)):
        lists: Any = owner.parametrizations
        # Under a second parametrization a plain weight is not what the original is.
        if len(lists[name]) == 1 and "original" in _tensors_of(lists[name]):
            _Arrival(owner, name, norm, state_dict, prefix, errors, assign).take_in()


class _State(NamedTuple):
    """What a checkpoint has of u (b, j, m) and sv (b, i), and whether it has any of it.

    `sigma` tells what the network that wrote it divides a weight by, where that is not ours.
    """

    u: Tensor | None = None
    sv: Tensor | None = None
    known: bool = False
    sigma: Callable[[Tensor], Tensor] | None = None


@dataclass
class _Arrival:
    """One weight of one module, as a state dict brings it."""

    owner: nn.Module
    name: str
    norm: SpectralNorm
    state_dict: dict[str, Any]
    prefix: str
    errors: list[str]
    assign: bool
    faults: int = field(default=0)

    def take_in(self) -> None:
        """Respell in place; estimate what is missing, if the weight is there."""
        self._drop_echo()
        plain = self._rename_weight()
        state = self._rename_state()
        if self.original not in self.state_dict:
            return
        weight = self.state_dict[self.original]
        if not _fits(weight, self._list.original):
            self.faults += 1
        gain = self.state_dict.get(self._own("gain"))
        if gain is not None and not _has_shape(gain, self.norm.sv.shape[:1]):
            self.faults += 1
        if self.faults:
            self._hold_back()
        elif not self._keep_tied(weight):
            self._complete(weight, state, normalised=state.known or not plain)

    # Keys

    @property
    def _list(self) -> Any:
        lists: Any = self.owner.parametrizations
        return lists[self.name]

    @property
    def original(self) -> str:
        """The key of the weight in snparam's spelling."""
        return f"{self.prefix}parametrizations.{self.name}.original"

    def _own(self, tensor: str) -> str:
        return f"{self.prefix}parametrizations.{self.name}.0.{tensor}"

    def _foreign(self, local: str) -> str | None:
        """The key of a tensor beside the owner's own, if the state dict has it and it is none."""
        owner, key = self.owner, self.prefix + local
        lists: Any = owner.parametrizations
        taken = (*owner._parameters, *owner._buffers, *owner._modules, *lists)
        is_taken = local in taken and local != self.name
        return key if key in self.state_dict and not is_taken else None

    def _drop_echo(self) -> None:
        """Where another spelling has come too, drop the tensors that are the model's own.

        `torch.distributed.checkpoint.state_dict` fills up with them what it is given, and so do
        people, by `{**model.state_dict(), **others}`.
        """
        here, own = self._list.original, self.state_dict.get(self.original)
        other = self._foreign(f"{self.name}_orig") or self._foreign(self.name)
        if other is not None and not is_sharded(here) and _is_same(own, here):
            del self.state_dict[self.original]
            for tensor, value in self.norm.state_dict(keep_vars=True).items():
                if _is_same(self.state_dict.get(self._own(tensor)), value):
                    del self.state_dict[self._own(tensor)]

    def _rename_weight(self) -> bool:
        """Give the weight its own key; whether it had the plain one."""
        if self.original in self.state_dict:
            return False
        hooked, plain = self._foreign(f"{self.name}_orig"), self._foreign(self.name)
        if hooked is not None:
            self.state_dict[self.original] = self.state_dict.pop(hooked)
            # torch before 1.0 saved the normalised weight as well, and no v.
            if plain is not None and self._foreign(f"{self.name}_u") and not self._hooked_v:
                del self.state_dict[plain]
            return False
        if plain is not None:
            self.state_dict[self.original] = self.state_dict.pop(plain)
            return True
        return False

    @property
    def _hooked_v(self) -> str | None:
        return self._foreign(f"{self.name}_v")

    # State

    def _rename_state(self) -> _State:
        """Give u and sv their own keys and shapes; a tensor of a wrong shape keeps its own."""
        if self._own("u") in self.state_dict or self._own("sv") in self.state_dict:
            return self._own_state()
        torch_u, torch_v = self._own("_u"), self._own("_v")
        if torch_u in self.state_dict or torch_v in self.state_dict:
            return self._torch_state(torch_u, torch_v)
        hook_u, hook_v = self._foreign(f"{self.name}_u"), self._hooked_v
        if hook_u is not None:
            return self._torch_state(hook_u, hook_v or "")
        if self.name == "weight" and self._foreign("u0") is not None:
            return self._biggan_state()
        return _State()

    def _own_state(self) -> _State:
        """Of any number of singular values."""
        blocks, rows, _ = self.norm.view.matrices
        u, sv = (self.state_dict.get(self._own(tensor)) for tensor in ("u", "sv"))
        if u is not None and not _has_shape(u, (blocks, None, rows)):
            self.faults += 1
        if sv is not None and not _has_shape(sv, (blocks, None)):
            self.faults += 1
        return _State(u, sv, known=True)

    def _torch_state(self, u_key: str, v_key: str) -> _State:
        u, v = self.state_dict.pop(u_key, None), self.state_dict.pop(v_key, None)
        view, axis = self.norm.view, torch_axis(self.owner)
        fitting = fitting_axis(view.shape, axis, u, v)
        if fitting is None:
            self.faults += 1
            self._report_vectors(u, v, v_key)
            return _State(known=True)
        found = left_vector(view, fitting, u, v)
        if found is not None and self.original not in self.state_dict:
            self.state_dict[self._own("u")] = found
        sigma = partial(torch_sigma, axis=fitting, u=u, v=v)
        return _State(found, known=True, sigma=sigma)

    def _report_vectors(self, u: Any, v: Any, v_key: str) -> None:
        """Leave a u of a wrong shape to torch; report v, which no tensor here corresponds to."""
        shape, axis = self.norm.view.shape, torch_axis(self.owner)
        if u is not None and fitting_axis(shape, axis, u, None) is None:
            self.state_dict[self._own("u")] = u
            return
        length = prod(shape) // (shape[axis] if u is None else len(u))
        self.errors.append(
            f"size mismatch for {v_key}: copying a param with shape {getattr(v, 'shape', None)} "
            f"from checkpoint, the shape in current model is {torch.Size([length])}."
        )

    def _biggan_state(self) -> _State:
        blocks, rows, _ = self.norm.view.matrices
        us: list[Any] = []
        svs: list[Any] = []
        while (key := self._foreign(f"u{len(us)}")) is not None:
            us.append(self.state_dict.pop(key))
            sv_key = self._foreign(f"sv{len(us) - 1}")
            if sv_key is not None:
                svs.append(self.state_dict.pop(sv_key))
        wrong = [u for u in us if not _has_shape(u, (1, blocks * rows))]
        wrong_sv = [sv for sv in svs if not (isinstance(sv, Tensor) and sv.numel() == 1)]
        for tensor, faulty in (("u", wrong), ("sv", wrong_sv)):
            if faulty:
                self.faults += 1
                self.state_dict[self._own(tensor)] = faulty[0]
        if wrong or wrong_sv:
            return _State(known=True)
        if blocks > 1:
            sigma = partial(torch_sigma, axis=torch_axis(self.owner), u=us[0].flatten(), v=None)
            return _State(known=True, sigma=sigma)
        u = torch.cat(us).unsqueeze(0)
        sv = torch.cat([sv.reshape(1) for sv in svs]).unsqueeze(0) if len(svs) == len(us) else None
        if self.original not in self.state_dict:
            self.state_dict[self._own("u")] = u
        return _State(u, sv, known=True)

    # Values

    def _hold_back(self) -> None:
        """Load nothing of this weight: a weight and its state go together.

        What is of a wrong shape stays in the state dict, for torch to report.
        """
        current = {self.original: self._list.original}
        for tensor in self.norm.state_dict(keep_vars=True):
            current[self._own(tensor)] = getattr(self.norm, tensor)
        for key, tensor in current.items():
            if _fits(self.state_dict.get(key, tensor), tensor):
                self.state_dict[key] = tensor

    def _keep_tied(self, weight: Tensor) -> bool:
        """With `assign=True`, leave weights that are tied one Parameter; whether this one is.

        torch makes a Parameter of its own for every key. Where the checkpoint has other values for
        the second, they part, and so do their states.
        """
        original = self._list.original
        differentiable = weight.is_floating_point() or weight.is_complex()
        if not (self.assign and isinstance(original, nn.Parameter) and differentiable):
            return False
        before, after = (one() for one in _assigned.get(self.norm, (_nothing, _nothing)))
        if before is original and after is not None:
            if after.dtype == weight.dtype and torch.equal(after.to(weight.device), weight):
                self.state_dict[self.original] = after
                for tensor in self.norm.state_dict(keep_vars=True):
                    self.state_dict[self._own(tensor)] = getattr(self.norm, tensor)
                return True
            self.norm = self._list[0] = copy.deepcopy(self.norm)
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=original.requires_grad)
            self.state_dict[self.original] = weight
        _assigned[self.norm] = (ref(original), ref(weight))
        return False

    @torch.no_grad()
    def _complete(self, weight: Tensor, state: _State, normalised: bool) -> None:
        """Put all of the state beside a weight, estimated where the checkpoint has none."""
        k = self.norm.u.shape[1]
        if state.u is not None and not _has_direction(state.u):
            state = state._replace(u=None, sv=None)
        gain = self._own("gain")
        lacks_gain = self.norm.settings.gain is not None and gain not in self.state_dict
        if all(x is not None and x.shape[1] == k for x in (state.u, state.sv)) and not lacks_gain:
            self._put(weight, state.u, state.sv)
            return
        stack = stack_of(self._as_loaded(weight), self.norm.view)
        if not is_finite(stack):
            self.errors.append(
                f'SpectralNorm on "{self.prefix}{self.name}" {tuple(weight.shape)}: the weight in '
                "the checkpoint has NaN or inf, and its singular values cannot be estimated; "
                "repair the checkpoint."
            )
            self._hold_back()
            return
        given = None if state.u is None else state.u.to(weight.device)
        u, sv = completed(stack, given, state.sv, k)
        self._put(weight, u, sv)
        if lacks_gain:
            # A normalised network computes with W / σ, by its own σ, an ordinary one with W.
            sigma = linalg.power_step(stack, u.to(stack.dtype))[2][:, 0]
            start = torch.where(sigma == 0, 1.0, sigma)
            if normalised:
                other = None if is_sharded(weight) else state.sigma
                start = start / other(self._as_loaded(weight)) if other else torch.ones_like(start)
            self.state_dict[gain] = start.to(linalg.real_dtype(weight.dtype))

    def _as_loaded(self, weight: Tensor) -> Tensor:
        """The weight in the dtype, and on the device, that it will have in the model."""
        original = self._list.original
        if self.assign or original.is_meta:
            return weight.detach()
        return weight.detach().to(original.device, original.dtype)

    def _put(self, weight: Tensor, u: Tensor | None, sv: Tensor | None) -> None:
        """Write u and sv under their own keys, in the dtypes that a registration gives them."""
        dtype = compute_dtype(weight.dtype)
        for key, value, kind in (("u", u, dtype), ("sv", sv, linalg.real_dtype(dtype))):
            if value is not self.state_dict.get(self._own(key)):
                assert value is not None
                self.state_dict[self._own(key)] = value.to(weight.device, kind)


def _tensors_of(module: nn.Module) -> set[str]:
    return {*module._parameters, *module._buffers}


def _nothing() -> None:
    return None


def _has_shape(tensor: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether a tensor has a shape, whose None stands for any length but zero."""
    return (
        isinstance(tensor, Tensor)
        and tensor.ndim == len(shape)
        and all(
            size == want or (want is None and size > 0)
            for size, want in zip(tensor.shape, shape, strict=True)
        )
    )


def _is_same(tensor: Any, other: Tensor) -> bool:
    """Whether a tensor is another, in the same memory."""
    return (
        _fits(tensor, other)
        and not (tensor.is_meta or other.is_meta)
        and tensor.data_ptr() == other.data_ptr() != 0
    )


def _has_direction(u: Tensor) -> bool:
    """Whether the power iteration can go on from u (b, k, m)."""
    return u.is_meta or bool(u.isfinite().all() and (u[:, 0] != 0).any(-1).all())


def _fits(tensor: Any, other: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor) and tensor.shape == other.shape and tensor.layout == other.layout
    )


class _Spellings(System):
    def on_attach(self, owner: nn.Module) -> None:
        accept_spellings(owner)

    def on_detach(self, owner: nn.Module) -> None:
        forget_spellings(owner)


register_system(_Spellings())
