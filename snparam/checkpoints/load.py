"""Loading: `load_state_dict` of a normalised module accepts every registered spelling.

Entries in one of the registered spellings (see `spellings/`) are renamed to snparam's own keys, and
the parts of the state that are missing are estimated. Entries that no spelling can read stay where
they are, so that torch reports them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.__future__ import get_swap_module_params_on_conversion

from snparam.checkpoints.shapes import fits, has_shape
from snparam.estimators.completion import complete_state
from snparam.estimators.power import power_step
from snparam.matrices.products import real_dtype
from snparam.matrices.sharded import is_sharded
from snparam.matrices.stacks import compute_dtype, is_finite, stack_of
from snparam.parametrization.classes import unwrap, wrap
from snparam.parametrization.extensions import (
    SPELLINGS,
    Misfit,
    State,
    System,
    register_system,
)
from snparam.parametrization.find import NormalisedWeight, norms_of
from snparam.parametrization.spectral_norm import SpectralNorm

# While tied weights are loaded with `assign=True`, one owner after the other: for the state that
# they share, the Parameter that the first of them had, and the one that it got.
_assigned: WeakKeyDictionary[SpectralNorm, tuple[ReferenceType[Tensor], ReferenceType[Tensor]]]
_assigned = WeakKeyDictionary()

_LOAD = "_load_from_state_dict"


def accept_spellings(owner: nn.Module) -> None:
    """Let `load_state_dict` of a module, whose class is its own, accept every spelling."""
    wrap(type(owner), _LOAD, _load)


def forget_spellings(owner: nn.Module) -> None:
    """Undo `accept_spellings`."""
    unwrap(type(owner), _LOAD, _load)


def _load(
    load: Callable[..., None],
    owner: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load a module's direct tensors, and then respell its weights, which its children load.

    In this order, hooks and classes that rename keys of older versions have done so before.
    """
    load(
        owner,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    )
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    given_keys = set(state_dict)
    for name, norm in list(norms_of(owner)):
        weight = NormalisedWeight(prefix[:-1], owner, name, norm)
        # With a second parametrization, the weight of a plain checkpoint is not the original.
        parametrizations = weight.parametrization_list
        if len(parametrizations) == 1 and "original" in _tensor_names(parametrizations):
            _WeightLoading(weight, state_dict, error_msgs, assign).run()
    removed_keys = given_keys.difference(state_dict)
    if removed_keys:  # torch has reported those that belong to no child of the owner
        unexpected_keys[:] = [key for key in unexpected_keys if key not in removed_keys]


@dataclass
class _WeightLoading:
    """The loading of one normalised weight from a state dict, which it changes in place.

    Attributes:
        weight: the weight in the model.
        state_dict: the state dict that is being loaded.
        errors: the messages that `load_state_dict` raises with, to which this one appends.
        assign: whether tensors of the state dict replace those of the model.
    """

    weight: NormalisedWeight
    state_dict: dict[str, Any]
    errors: list[str]
    assign: bool

    def run(self) -> None:
        """Respell the weight and its state; estimate what the state lacks, if there is a weight."""
        tensors = self._local_tensors()
        self._drop_own_tensors(tensors)
        key = self._rename_weight(tensors)
        state = self._read_state(tensors, key)
        if self.original_key not in self.state_dict:
            self._write_state_alone(state)
            return
        original: Any = self.state_dict[self.original_key]
        if (state is not None and state.misfits) or not self._shapes_match(original):
            self._keep_model_tensors()
        elif not self._keep_tied(original):
            was_normalised = state is not None or key != self.weight.tensor_name
            self._complete(original, state or State(), was_normalised)

    # Keys

    @property
    def original_key(self) -> str:
        """The key of the weight in snparam's spelling."""
        return f"{self.weight.prefix}{self._local_original_key}"

    @property
    def _local_original_key(self) -> str:
        return f"parametrizations.{self.weight.tensor_name}.original"

    def _state_key(self, tensor: str) -> str:
        return f"{self.weight.prefix}{self._local_state_key(tensor)}"

    def _local_state_key(self, tensor: str) -> str:
        return f"parametrizations.{self.weight.tensor_name}.0.{tensor}"

    def _local_tensors(self) -> dict[str, Any]:
        """Return the entries for the owner, by local key, without those of its other tensors."""
        owner, prefix, name = self.weight.owner, self.weight.prefix, self.weight.tensor_name
        lists: Any = owner.parametrizations
        others = {*owner._parameters, *owner._buffers, *owner._modules, *lists} - {name}
        inner_prefix = f"parametrizations.{name}."
        tensors = {}
        for key, value in self.state_dict.items():
            local = key[len(prefix) :]
            is_other = local.partition(".")[0] in others and not local.startswith(inner_prefix)
            if key.startswith(prefix) and not is_other:
                tensors[local] = value
        return tensors

    def _drop_own_tensors(self, tensors: dict[str, Any]) -> None:
        """Drop entries that are the model's own tensors, where another spelling is there as well.

        `torch.distributed.checkpoint.state_dict` adds the model's tensors to the state dict that it
        is given, and so do people, by `{**model.state_dict(), **others}`.
        """
        model_tensor, entry = self.weight.original, tensors.get(self._local_original_key)
        other_keys = {spelling.weight_key(self.weight.tensor_name) for spelling in SPELLINGS}
        other_keys.discard(self._local_original_key)
        if (
            is_sharded(model_tensor)
            or other_keys.isdisjoint(tensors)
            or not _shares_memory(entry, model_tensor)
        ):
            return
        own_tensors: dict[str, Tensor] = {self._local_original_key: model_tensor}
        for tensor, value in self.weight.norm.state_dict(keep_vars=True).items():
            own_tensors[self._local_state_key(tensor)] = value
        for key, own_tensor in own_tensors.items():
            if _shares_memory(tensors.get(key), own_tensor):
                del tensors[key], self.state_dict[self.weight.prefix + key]

    def _rename_weight(self, tensors: dict[str, Any]) -> str | None:
        """Move the weight to snparam's key; return the local key that it had, None without it."""
        name = self.weight.tensor_name
        keys = [spelling.weight_key(name) for spelling in SPELLINGS]
        # The plain key is tried last: checkpoints of torch's hook before 1.0 have the normalised
        # weight under it, beside the original.
        key = next((k for k in sorted(keys, key=name.__eq__) if k in tensors), None)
        if key is not None and key != self._local_original_key:
            self.state_dict[self.original_key] = self.state_dict.pop(self.weight.prefix + key)
        return key

    # State

    def _read_state(self, tensors: dict[str, Any], key: str | None) -> State | None:
        """Return the state, remove the entries it was read from, and report those that misfit."""
        if self._local_state_key("u") in tensors or self._local_state_key("sv") in tensors:
            key = self._local_original_key  # torch loads what is under snparam's keys
        name = self.weight.tensor_name
        for spelling in sorted(SPELLINGS, key=lambda s: s.weight_key(name) != key):
            state = spelling.read(self.weight, tensors)
            if state is not None:
                for key_read in state.keys:
                    self.state_dict.pop(self.weight.prefix + key_read, None)
                for misfit in state.misfits:
                    self._report(misfit)
                return state
        return None

    def _report(self, misfit: Misfit) -> None:
        """Report a misfit in torch's words, unless its key is there for torch to report.

        What is to be done about it is reported in any case.
        """
        if misfit.advice:
            self.errors.append(misfit.advice)
        key = self.weight.prefix + misfit.key
        if key in self.state_dict:
            return
        if isinstance(misfit.value, Tensor):
            self.errors.append(
                f"size mismatch for {key}: copying a param with shape {misfit.value.shape} "
                f"from checkpoint, the shape in current model is {torch.Size(misfit.expected)}."
            )
        else:
            self.errors.append(
                f'While copying the parameter named "{key}", expected torch.Tensor or Tensor-like '
                f"object from checkpoint but received {type(misfit.value)}"
            )

    def _write_state_alone(self, state: State | None) -> None:
        """Put a state under snparam's keys without its weight, which torch reports as missing."""
        for tensor in ("u", "sv"):
            value = None if state is None or state.misfits else getattr(state, tensor)
            if value is not None:
                self.state_dict[self._state_key(tensor)] = value

    # Values

    def _shapes_match(self, original: Any) -> bool:
        """Return whether the weight, and a gain if there is one, have the shapes of the model's."""
        gain = self.state_dict.get(self._state_key("gain"))
        blocks = self.weight.norm.sv.shape[:1]
        return fits(original, self.weight.original) and (gain is None or has_shape(gain, blocks))

    def _keep_model_tensors(self) -> None:
        """Leave weight and state of the model as they are, because the two belong together.

        All entries are replaced by the model's own tensors, except those of a wrong shape, which
        stay for torch to report.
        """
        current: dict[str, Tensor] = {self.original_key: self.weight.original}
        for tensor in self.weight.norm.state_dict(keep_vars=True):
            current[self._state_key(tensor)] = getattr(self.weight.norm, tensor)
        for key, value in current.items():
            if fits(self.state_dict.get(key, value), value):
                self.state_dict[key] = value

    def _keep_tied(self, weight: Tensor) -> bool:
        """Keep tied weights one Parameter with `assign=True`; return whether this weight is done.

        torch would make another Parameter for every key. Where the checkpoint has other values for
        the second of the tied weights, the two get a Parameter and a state each.
        """
        if get_swap_module_params_on_conversion():
            # torch keeps the Parameters and swaps their contents, which weak references prevent.
            _assigned.pop(self.weight.norm, None)
            return False
        original = self.weight.original
        is_differentiable = weight.is_floating_point() or weight.is_complex()
        if not (self.assign and isinstance(original, nn.Parameter) and is_differentiable):
            return False
        references = _assigned.get(self.weight.norm, (_no_tensor, _no_tensor))
        replaced, replacement = (reference() for reference in references)
        if replaced is original and replacement is not None:
            if replacement.dtype == weight.dtype and torch.equal(
                replacement.to(weight.device), weight
            ):
                self.state_dict[self.original_key] = replacement
                for tensor in self.weight.norm.state_dict(keep_vars=True):
                    self.state_dict[self._state_key(tensor)] = getattr(self.weight.norm, tensor)
                return True
            norm_copy = self.weight.parametrization_list[0] = copy.deepcopy(self.weight.norm)
            self.weight = replace(self.weight, norm=norm_copy)
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=original.requires_grad)
            self.state_dict[self.original_key] = weight
        _assigned[self.weight.norm] = (ref(original), ref(weight))
        return False

    @torch.no_grad()
    def _complete(self, weight: Tensor, state: State, was_normalised: bool) -> None:
        """Put a complete state beside a weight, and estimate what the checkpoint lacks.

        Args:
            weight: the original in the checkpoint.
            state: the state that the checkpoint has for it.
            was_normalised: whether the network that wrote the checkpoint normalises the weight.
        """
        k = self.weight.norm.u.shape[1]
        if state.u is not None and not _has_direction(state.u):
            state = replace(state, u=None, sv=None)
        gain_key = self._state_key("gain")
        lacks_gain = self.weight.norm.has_gain and gain_key not in self.state_dict
        if all(x is not None and x.shape[1] == k for x in (state.u, state.sv)) and not lacks_gain:
            self._write_state(weight, state.u, state.sv)
            return
        stack = stack_of(self._as_in_model(weight), self.weight.norm.view)
        if not is_finite(stack):
            self.errors.append(
                f'SpectralNorm on "{self.weight.name}" {tuple(weight.shape)}: the weight in '
                "the checkpoint has NaN or inf, and its singular values cannot be estimated; "
                "repair the checkpoint."
            )
            self._keep_model_tensors()
            return
        u_given = None if state.u is None else state.u.to(weight.device)
        u, sv = complete_state(stack, u_given, state.sv, k)
        self._write_state(weight, u, sv)
        if lacks_gain:
            # γ keeps the function of the network that wrote the checkpoint: it computed with W / σ,
            # by its own σ, if it was normalised, and with W if it was an ordinary one.
            sigma = power_step(stack, u.to(stack.dtype)).sv[:, 0]
            start = torch.where(sigma == 0, 1.0, sigma)
            if was_normalised:
                sigma_of = None if is_sharded(weight) else state.sigma
                start = (
                    start / sigma_of(self._as_in_model(weight))
                    if sigma_of
                    else torch.ones_like(start)
                )
            self.state_dict[gain_key] = start.to(real_dtype(weight.dtype))

    def _as_in_model(self, weight: Tensor) -> Tensor:
        """Return the weight in the dtype, and on the device, that it will have in the model."""
        original = self.weight.original
        if self.assign or original.is_meta:
            return weight.detach()
        return weight.detach().to(original.device, original.dtype)

    def _write_state(self, weight: Tensor, u: Tensor | None, sv: Tensor | None) -> None:
        """Write u and sv under snparam's keys, in the dtypes that a registration gives them."""
        dtype = compute_dtype(weight.dtype)
        for key, value, state_dtype in (("u", u, dtype), ("sv", sv, real_dtype(dtype))):
            if value is not self.state_dict.get(self._state_key(key)):
                assert value is not None
                self.state_dict[self._state_key(key)] = value.to(weight.device, state_dtype)


def _tensor_names(module: nn.Module) -> set[str]:
    return {*module._parameters, *module._buffers}


def _no_tensor() -> None:
    return None


def _shares_memory(tensor: Any, other: Tensor) -> bool:
    """Return whether a value is a tensor that fits another and is in the same memory."""
    return (
        fits(tensor, other)
        and not (tensor.is_meta or other.is_meta)
        and tensor.data_ptr() == other.data_ptr() != 0
    )


def _has_direction(u: Tensor) -> bool:
    """Return whether u (b, k, m) is finite, and the first vector of each block is not zero."""
    return u.is_meta or bool(u.isfinite().all() and (u[:, 0] != 0).any(-1).all())


class _Spellings(System):
    def on_attach(self, owner: nn.Module) -> None:
        accept_spellings(owner)

    def on_detach(self, owner: nn.Module) -> None:
        forget_spellings(owner)


register_system(_Spellings())
