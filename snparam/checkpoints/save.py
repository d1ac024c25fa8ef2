"""Saving: the state dict of a converted network in other spellings of the same weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from snparam.checkpoints.spellings.plain import Plain
from snparam.parametrization.arguments import check_flag, check_model
from snparam.parametrization.baking import check_alone
from snparam.parametrization.extensions import SPELLINGS, Spelled
from snparam.parametrization.find import NormalisedWeight, normalised_weights
from snparam.parametrization.order import in_order, recorded_order


def plain_state_dict(model: nn.Module, bake: bool = True) -> dict[str, Any]:
    """Return the state dict of the ordinary network: its keys, in its order.

    It is for `from_pretrained`, safetensors, and everything else that knows nothing of snparam, and
    equals `restore_model(model, bake).state_dict()`, without changing the model.

    Args:
        model: a network with SpectralNorm on some of its weights, or on none.
        bake: True (the default) for the normalised weights, to the bit those that eval mode uses;
            False for the originals.

    Returns:
        Tensors by key. Baked weights are new tensors; all others share memory with the model, as in
        `model.state_dict()`. Weights that modules share are one tensor under several keys.

    Raises:
        ValueError: if a weight carries another parametrization as well; with `bake`, also if a
            normalised weight is shared with a module that uses it as it is.
        TypeError: if `model` is no module, or `bake` is neither True nor False.
    """
    check_model(model, "plain_state_dict")
    check_flag("bake", bake)
    return _respell(model, Plain(bake).writer(model))


def state_dict_for(model: nn.Module, spelling: str) -> dict[str, Any]:
    """Return the state dict that the same network has under another implementation.

    That implementation loads it strictly, and in eval mode computes what this network computes.

    Args:
        model: a network with SpectralNorm on some of its weights.
        spelling: name of a registered spelling. `"torch"`:
            `torch.nn.utils.parametrizations.spectral_norm` on the same weights.
            `"torch-hook"`: the deprecated `torch.nn.utils.spectral_norm`. For both, with their
            default `dim`, one singular vector is written, ahead by the step that eval takes here.
            `"biggan"`: the layers of Brock, Donahue and Simonyan 2019 (`u0`, `sv0`, ...).
            `"plain"`: the result of `plain_state_dict(model)`; `"snparam"`: that of
            `model.state_dict()`.

    Returns:
        Tensors by key. Originals and ordinary tensors share memory with the model, as in
        `model.state_dict()`.

    Raises:
        ValueError: for an unknown spelling, or if a weight cannot be expressed in it: several
            blocks, `sigma="upper"`, `coeff`, `soft`, `gain`, another constraint than W / σ, another
            reading of the weight, another parametrization on it; for BigGAN, a weight not named
            `weight`.
        TypeError: if `model` is no module.
    """
    check_model(model, "state_dict_for")
    registered = {known.name: known for known in SPELLINGS}
    if spelling not in registered:
        raise ValueError(
            f"spelling={spelling!r}: expected one of {', '.join(map(repr, registered))}"
        )
    return _respell(model, registered[spelling].writer(model))


def _respell(model: nn.Module, write: Callable[[NormalisedWeight], Spelled]) -> dict[str, Any]:
    """Return the state dict of a model, with the entries of each normalised weight replaced.

    It is made from `model.state_dict()`, so that it has the entries that modules add by hooks.
    """
    source = model.state_dict()
    owners: dict[str, list[NormalisedWeight]] = {}
    for weight in normalised_weights(model, every_name=True):
        check_alone(weight.owner, weight.tensor_name)
        if f"{weight.prefix}parametrizations.{weight.tensor_name}.0.u" in source:
            owners.setdefault(weight.prefix, []).append(weight)
    spelled = {prefix: [(w, write(w)) for w in weights] for prefix, weights in owners.items()}
    result: dict[str, Any] = OrderedDict()
    owners_written: set[str] = set()
    for key, value in source.items():
        for prefix in _prefixes(key):
            if prefix in spelled and prefix not in owners_written:
                owners_written.add(prefix)
                result.update(_owner_entries(prefix, spelled[prefix], source))
        inner = _inner_entries(key, spelled)
        if inner is None:
            result.setdefault(key, value)
        else:
            result.update(inner)
    result._metadata = _metadata(source, spelled)  # type: ignore[attr-defined]
    return result


# The weights of each owner with the entries that replace theirs, by the prefix of the owner's keys.
_SpelledWeights = dict[str, list[tuple[NormalisedWeight, Spelled]]]


def _inner_entries(key: str, spelled: _SpelledWeights) -> dict[str, Tensor] | None:
    """Return the entries that replace a key below a weight's parametrizations; else None."""
    for prefix in _prefixes(key):
        for weight, entries in spelled.get(prefix, ()):
            inner_prefix = f"{prefix}parametrizations.{weight.tensor_name}."
            if key.startswith(inner_prefix):
                return {inner_prefix + name: tensor for name, tensor in entries.inner.items()}
    return None


def _owner_entries(
    prefix: str, spelled: list[tuple[NormalisedWeight, Spelled]], source: dict[str, Any]
) -> dict[str, Any]:
    """Return an owner's parameters and buffers by key, in the order of the ordinary module."""
    owner = spelled[0][0].owner
    order = recorded_order(spelled[0][0].parametrization_list)
    parameters = {n: source[prefix + n] for n in owner._parameters if prefix + n in source}
    buffers = {n: source[prefix + n] for n in owner._buffers if prefix + n in source}
    for _, spelled_weight in spelled:
        parameters |= spelled_weight.parameters
        buffers |= spelled_weight.buffers
    entries = {}
    for tensors in (parameters, buffers):
        for name in in_order(tensors, order):
            entries[prefix + name] = tensors[name]
    return entries


def _metadata(source: dict[str, Any], spelled: _SpelledWeights) -> dict[str, Any]:
    """Return the `_metadata` of a state dict, for the modules that the spelling writes."""
    metadata = OrderedDict(getattr(source, "_metadata", {}))
    for prefix, weights in spelled.items():
        for weight, spelled_weight in weights:
            path = f"{prefix}parametrizations"
            if not spelled_weight.inner:
                for module in (f"{path}.{weight.tensor_name}.0", f"{path}.{weight.tensor_name}"):
                    metadata.pop(module, None)
                if not any(key.startswith(f"{path}.") for key in metadata):
                    metadata.pop(path, None)
            owner_metadata = dict(metadata.get(prefix[:-1], {}))
            for name, additions in spelled_weight.metadata.items():
                owner_metadata[name] = {**owner_metadata.get(name, {}), **additions}
            metadata[prefix[:-1]] = owner_metadata
    return metadata


def _prefixes(key: str) -> Iterator[str]:
    """Yield the prefixes of the modules around a key, outermost first."""
    yield ""
    for i, letter in enumerate(key):
        if letter == ".":
            yield key[: i + 1]
