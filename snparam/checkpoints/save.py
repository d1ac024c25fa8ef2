"""Going back: the state dict of a converted network in other spellings of the same weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from snparam.layers.torch_reading import relation, torch_axis, torch_vectors
from snparam.parametrization.attachment import read_as_eval
from snparam.parametrization.baking import check_alone, check_shared
from snparam.parametrization.find import norms_of
from snparam.parametrization.spectral_norm import SpectralNorm

_WEIGHT = "weight"


@dataclass(frozen=True)
class Placed:
    """A normalised weight, and the prefix of its owner's keys in a state dict.

    A module that is in the network twice has its keys twice, and is placed twice.
    """

    prefix: str
    owner: nn.Module
    tensor: str
    norm: SpectralNorm

    @property
    def original(self) -> Tensor:
        """The original Parameter (or buffer)."""
        lists: Any = self.owner.parametrizations
        original: Tensor = lists[self.tensor].original
        return original

    @property
    def key(self) -> str:
        """The key that the weight has in the state dict of the ordinary network."""
        return self.prefix + self.tensor

    @property
    def describe(self) -> str:
        """What to call it in errors."""
        return f"'{self.key}' {tuple(self.norm.view.shape)}"


@dataclass(frozen=True)
class Local:
    """What replaces the keys of one weight in its owner's part of a state dict.

    Attributes:
        parameters: local names and tensors among the owner's parameters.
        buffers: the same, among its buffers.
        inner: the same, below `parametrizations.<tensor>.`.
        metadata: what torch notes for the owner beside them.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    inner: dict[str, Tensor]
    metadata: dict[str, Any]


def plain_state_dict(model: nn.Module, bake: bool = True) -> dict[str, Any]:
    """The state dict that the ordinary network has: its keys, in its order.

    For `from_pretrained`, safetensors, and everything else that knows nothing of snparam. It is
    what `restore_model(model, bake).state_dict()` would give, without changing the model.

    Args:
        model: a network with SpectralNorm on some of its weights, or without.
        bake: True (the default): the normalised weights, to the bit those that eval mode uses.
            False: the original ones.

    Returns:
        Tensors by key; those that are not baked share memory with the model, as in
        `model.state_dict()`. Weights that modules share are one tensor under several keys.

    Raises:
        ValueError: if a weight carries another parametrization as well; with `bake`, also if a
            normalised weight is shared with a module that uses it as it is.
    """
    if bake:
        check_shared(model)
    baked: dict[tuple[int, int], Tensor] = {}

    def plain(placed: Placed) -> Local:
        value = placed.original.detach()
        if bake:
            key = (id(placed.original), id(placed.norm))
            if key not in baked:
                baked[key] = read_as_eval(placed.owner, placed.tensor).detach()
            value = baked[key]
        return _beside_others(placed, value)

    return _respelled(model, plain)


def state_dict_for(
    model: nn.Module, spelling: Literal["torch", "torch-hook", "biggan"]
) -> dict[str, Any]:
    """The state dict that the same network has under another implementation.

    It loads there strictly, and computes there, in eval mode, what this network computes.

    Args:
        model: a network with SpectralNorm on some of its weights.
        spelling: `"torch"`: `torch.nn.utils.parametrizations.spectral_norm` on the same weights.
            `"torch-hook"`: the deprecated `torch.nn.utils.spectral_norm`. Both with their default
            `dim`; they keep one singular value, and `u` is ahead by the step that eval takes.
            `"biggan"`: the layers of Brock, Donahue and Simonyan 2019 (`u0`, `sv0`, ...).

    Returns:
        Tensors by key. Parameters share memory with the model, as in `model.state_dict()`.

    Raises:
        ValueError: for an unknown spelling, or if a weight cannot be expressed in it: several
            blocks, `coeff`, `soft`, `gain`, another reading of the weight, another
            parametrization on it; for BigGAN, a weight not named `weight`.
    """
    spellings: dict[str, Callable[[Placed], Local]] = {
        "torch": _as_parametrization,
        "torch-hook": _as_hook,
        "biggan": _as_biggan,
    }
    if spelling not in spellings:
        raise ValueError(
            f"spelling={spelling!r}: expected one of {', '.join(map(repr, spellings))}"
        )

    def other(placed: Placed) -> Local:
        _check_expressible(placed, spelling)
        return spellings[spelling](placed)

    return _respelled(model, other)


# One weight


def _beside_others(
    placed: Placed, value: Tensor, buffers: dict[str, Tensor] | None = None
) -> Local:
    """A weight under its own name, where it was before it was parametrized."""
    name, buffers = placed.tensor, buffers or {}
    if isinstance(placed.original, nn.Parameter):
        return Local({name: value}, buffers, {}, {})
    lists: Any = placed.owner.parametrizations
    if "original" in lists[name]._non_persistent_buffers_set:
        return Local({}, buffers, {}, {})
    return Local({}, {name: value, **buffers}, {}, {})


def _as_parametrization(placed: Placed) -> Local:
    u, v = _vectors(placed, "torch's spectral_norm")
    return Local({}, {}, {"original": placed.original.detach(), "0._u": u, "0._v": v}, {})


def _as_hook(placed: Placed) -> Local:
    if placed.original.is_complex():
        raise _inexpressible(placed, "torch's deprecated hook", "it is complex")
    u, v = _vectors(placed, "torch's deprecated hook")
    name = placed.tensor
    return Local(
        {f"{name}_orig": placed.original.detach()},
        {f"{name}_u": u, f"{name}_v": v},
        {},
        {"spectral_norm": {f"{name}.version": 1}},
    )


def _as_biggan(placed: Placed) -> Local:
    what = "BigGAN's layer"
    if placed.tensor != _WEIGHT:
        raise _inexpressible(placed, what, f"its one weight is called {_WEIGHT!r}")
    if placed.original.is_complex():
        raise _inexpressible(placed, what, "it is complex")
    if relation(placed.norm.view, torch_axis(placed.owner)) != "same":
        raise _inexpressible(placed, what, "it reads other rows")
    weight, norm = placed.original, placed.norm
    buffers = {}
    for i in range(norm.u.shape[1]):
        # Copies, because safetensors takes no tensors that share memory.
        buffers[f"u{i}"] = norm.u[:, i].to(weight.dtype, copy=True)
        buffers[f"sv{i}"] = norm.sv[:, i].to(weight.dtype, copy=True)
    return _beside_others(placed, weight.detach(), buffers)


def _vectors(placed: Placed, what: str) -> tuple[Tensor, Tensor]:
    axis = torch_axis(placed.owner)
    found = torch_vectors(placed.original, placed.norm.view, axis, placed.norm.u)
    if found is None:
        raise _inexpressible(placed, what, f"torch takes axis {axis} as rows, another matrix")
    return found


def _check_expressible(placed: Placed, spelling: str) -> None:
    settings, blocks = placed.norm.settings, placed.norm.view.matrices[0]
    what = f"spelling {spelling!r}"
    if blocks > 1:
        raise _inexpressible(placed, what, f"it has blocks={blocks} with a σ each, not one")
    if settings.gain is not None:
        raise _inexpressible(placed, what, f"gain={settings.gain!r} gives it another norm than 1")
    if settings.soft or settings.coeff != 1:
        given = f"coeff={settings.coeff:g}, soft={settings.soft}"
        raise _inexpressible(placed, what, f"{given} gives it another norm than 1")


def _inexpressible(placed: Placed, what: str, why: str) -> ValueError:
    return ValueError(
        f"SpectralNorm on {placed.describe} cannot be expressed as {what}: {why}; use "
        "plain_state_dict(model), which has the normalised weights themselves."
    )


# The whole state dict


def _respelled(model: nn.Module, spell: Callable[[Placed], Local]) -> dict[str, Any]:
    """The state dict of a model, with the keys of each normalised weight replaced.

    It is made from `model.state_dict()`, so that what modules add to theirs by hooks is in it.
    """
    source = model.state_dict()
    owners: dict[str, list[Placed]] = {}
    for placed in _placed(model):
        check_alone(placed.owner, placed.tensor)
        if f"{placed.prefix}parametrizations.{placed.tensor}.0.u" in source:
            owners.setdefault(placed.prefix, []).append(placed)
    spelled = {prefix: [(p, spell(p)) for p in all_of] for prefix, all_of in owners.items()}
    result: dict[str, Any] = OrderedDict()
    opened: set[str] = set()
    for key, value in source.items():
        for prefix in _prefixes(key):
            if prefix in spelled and prefix not in opened:
                opened.add(prefix)
                result.update(_own_part(prefix, spelled[prefix], source))
        inside = _inside(key, spelled)
        if inside is None:
            result.setdefault(key, value)
        else:
            result.update(inside)
    result._metadata = _metadata(source, spelled)  # type: ignore[attr-defined]
    return result


def _inside(key: str, spelled: dict[str, list[tuple[Placed, Local]]]) -> dict[str, Tensor] | None:
    """What stands for a key below the parametrizations of a normalised weight, if it is one."""
    for prefix in _prefixes(key):
        for placed, local in spelled.get(prefix, ()):
            inside = f"{prefix}parametrizations.{placed.tensor}."
            if key.startswith(inside):
                return {inside + name: tensor for name, tensor in local.inner.items()}
    return None


def _own_part(
    prefix: str, spelled: list[tuple[Placed, Local]], source: dict[str, Any]
) -> dict[str, Any]:
    """The keys of an owner's parameters and buffers, in the order of the ordinary module."""
    owner = spelled[0][0].owner
    lists: Any = owner.parametrizations
    order = lists[spelled[0][0].tensor]._snparam_order
    parameters = {n: source[prefix + n] for n in owner._parameters if prefix + n in source}
    buffers = {n: source[prefix + n] for n in owner._buffers if prefix + n in source}
    for _, local in spelled:
        parameters |= local.parameters
        buffers |= local.buffers
    found = {}
    for tensors in (parameters, buffers):
        for name in sorted(tensors, key=lambda n: order.index(n) if n in order else len(order)):
            found[prefix + name] = tensors[name]
    return found


def _metadata(
    source: dict[str, Any], spelled: dict[str, list[tuple[Placed, Local]]]
) -> dict[str, Any]:
    metadata = OrderedDict(getattr(source, "_metadata", {}))
    for prefix, weights in spelled.items():
        for placed, local in weights:
            path = f"{prefix}parametrizations"
            if not local.inner:
                for module in (f"{path}.{placed.tensor}.0", f"{path}.{placed.tensor}"):
                    metadata.pop(module, None)
                if not any(key.startswith(f"{path}.") for key in metadata):
                    metadata.pop(path, None)
            here = dict(metadata.get(prefix[:-1], {}))
            for name, noted in local.metadata.items():
                here[name] = {**here.get(name, {}), **noted}
            metadata[prefix[:-1]] = here
    return metadata


def _prefixes(key: str) -> Iterator[str]:
    """The prefixes of the modules around a key, outermost first."""
    yield ""
    for i, letter in enumerate(key):
        if letter == ".":
            yield key[: i + 1]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):
        yield (f"{name}." if name else ""), module


def _placed(model: nn.Module) -> Iterator[Placed]:
    for prefix, module in _modules(model):
        for tensor, norm in norms_of(module):
            yield Placed(prefix, module, tensor, norm)
