"""SpectralNorm on the weights of one module: registering it and removing it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn
from typing_extensions import Never, Unpack

from snparam.conversion.arguments import check_count_is_no_name, check_passed_by_keyword
from snparam.conversion.input_sizes import Sizes
from snparam.conversion.weights import Weight, weight_at
from snparam.layers.convolutions import is_convolution
from snparam.layers.table import (
    Path,
    is_packed,
    layout_named,
    layouts_of,
    obstacle_in,
    packed_message,
)
from snparam.layers.tensors import is_lazy
from snparam.layers.torch_norms import hook_using
from snparam.matrices.views import Layout, WeightView
from snparam.parametrization.arguments import check_flag, check_model
from snparam.parametrization.attachment import attach, detach, read_as_eval
from snparam.parametrization.baking import check_alone
from snparam.parametrization.find import norm_on, norms_of
from snparam.parametrization.options import Options, Settings, documents_options, settings_from
from snparam.parametrization.spectral_norm import SpectralNorm
from snparam.parametrization.undoing import all_or_nothing

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


@documents_options
def register_sn(
    module: _ModuleT,
    num_svs: int = 1,
    num_itrs: int = 1,
    *,
    name: str | None = None,
    input_size: int | Sequence[int] | None = None,
    **options: Unpack[Options],
) -> _ModuleT:
    """Hold the spectral norm of a module's weights at 1, by a parametrization.

    Each weight W is used as W / σ(W), where σ, the largest singular value of W read as a matrix, is
    estimated by power iteration: `num_itrs` steps per training forward, one unstored step per eval
    forward. The state, `u` (b, k, m) and `sv` (b, k), is in buffers of
    `module.parametrizations[name][0]`; the trained Parameter is the same object as before, now
    `module.parametrizations[name].original`. Dividing by σ changes what the module computes.

    `module.weight` is then computed at each read, so that what `nn.init` or `.data` write to it in
    place is lost; `module.weight = tensor` and `module.reset_parameters()` reach the original.

    `num_svs` may not exceed the number of singular values of a weight, because it is given for this
    one layer; `convert_model`, where it is given for layers of all sizes, tracks at most what each
    weight has.

    Args:
        module: the module to change, in place.
        name: which tensor, such as `"weight"` or `"out_proj.weight"`. None (the default) registers
            on every weight that the layer table lists for this type of module.
        input_size: with `norm="operator"`, the lengths of the inputs of a convolution, without
            batch and channels, such as `(32, 32)`; a number for one axis.
        {options}

    Returns:
        The module.

    Raises:
        ValueError: if the module has no tensor of that name or no eligible one, if a tensor is
            registered or parametrized already, is uninitialised, on the meta device, empty, of one
            dimension, or has NaN or inf, if it does not split into `blocks`, if `num_svs` exceeds
            min(rows, columns), if an option is out of range, or, with `norm="operator"`, if
            `input_size` is missing or cannot be convolved, or the forward is not torch's own.
        TypeError: if a tensor is quantised, sparse, of a dtype without singular values, or of a
            type that cannot be computed with as a matrix; for an unknown option or one of a wrong
            type, or a `module` that is no module.
        Either way nothing has been changed.

    Source: Miyato et al. 2018, "Spectral normalization for generative adversarial networks";
    for several singular values, Brock, Donahue and Simonyan 2019 (BigGAN).
    """
    check_model(module, "register_sn")
    check_count_is_no_name(num_svs)
    settings = settings_from(num_svs, num_itrs, options)
    layouts = layouts_of(module) if name is None else {name: layout_named(module, name)}
    if not layouts:
        raise _no_weight_error(module)
    sizes = _sizes(module, layouts, settings, input_size)
    weights = [
        _weight_of(module, path, layout, settings, sizes) for path, layout in layouts.items()
    ]
    for weight in weights:
        weight.check()
    norms: dict[tuple[int, WeightView | None], SpectralNorm] = {}
    for weight in weights:
        key = (weight.key, weight.view)  # tied tensors share their state
        if key not in norms:
            norms[key] = weight.new_norm()
    with all_or_nothing(module.modules()):
        for weight in weights:
            attach(weight.owner, weight.tensor_name, norms[weight.key, weight.view])
    return module


def remove_sn(
    module: _ModuleT, *misplaced: Never, name: str | None = None, bake: bool = True
) -> _ModuleT:
    """Remove SpectralNorm from a module's weights, which leaves an ordinary module.

    Args:
        module: a module that `register_sn` or `convert_model` changed; changed back in place.
        misplaced: nothing may be passed here; a name and a flag are passed by keyword.
        name: which tensor; None (the default) for all normalised weights of this module.
        bake: True (the default) leaves the normalised weight, equal to the bit to the one that eval
            mode uses. False leaves the original parameter, to the bit.

    Returns:
        The module, with the same Parameter objects, of its original class.

    Raises:
        ValueError: if the tensor (with `name=None`, every tensor of the module) is without
            SpectralNorm, or if another parametrization is on the same tensor; nothing has been
            changed.
        TypeError: if `module` is no module, `bake` is neither True nor False, or one of the options
            is passed by position.
    """
    check_model(module, "remove_sn")
    check_passed_by_keyword(misplaced)
    check_flag("bake", bake)
    if name is None:
        registered = [tensor for tensor, _ in norms_of(module)]
        names = dict.fromkeys([*layouts_of(module), *registered])
    else:
        layout_named(module, name)  # raises where there is no such tensor
        names = dict.fromkeys([name])
    tensors = [_owner_and_name(module, path) for path in names]
    normalised = [(owner, tensor) for owner, tensor in tensors if norm_on(owner, tensor)]
    if not normalised:
        missing = "no weight" if name is None else f"{name!r} not"
        raise ValueError(
            f"{type(module).__name__} has {missing} registered with SpectralNorm; "
            "for a whole network use restore_model"
        )
    for owner, tensor in normalised:
        check_alone(owner, tensor)
    baked = [read_as_eval(owner, tensor) if bake else None for owner, tensor in normalised]
    with all_or_nothing(module.modules()):
        for (owner, tensor), value in zip(normalised, baked, strict=True):
            detach(owner, tensor, value)
    return module


def _owner_and_name(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has the tensor `name` of `module`, and the tensor's name in it."""
    inner, _, tensor_name = name.rpartition(".")
    return module.get_submodule(inner), tensor_name


def _sizes(
    module: nn.Module,
    names: Iterable[str],
    settings: Settings,
    input_size: int | Sequence[int] | None,
) -> Sizes | None:
    """Return the size of the inputs of each convolution that has one of the tensors.

    Raises:
        ValueError: if a size is given, and no norm depends on it.
        TypeError: if it is neither a number nor a sequence of numbers.
    """
    if input_size is None:
        return None
    owners = [_owner_and_name(module, name)[0] for name in names]
    if settings.norm != "operator" or not any(map(is_convolution, owners)):
        raise ValueError(
            f"register_sn: input_size={input_size!r} on {type(module).__name__} with "
            f"norm={settings.norm!r}: no norm depends on it; it is for convolutions with "
            "norm='operator'"
        )
    size = (input_size,) if isinstance(input_size, int) else tuple(input_size)
    if any(isinstance(length, bool) or not isinstance(length, int) for length in size):
        raise TypeError(f"register_sn: input_size={input_size!r}: expected one int for each axis")
    return {id(owner): [size] for owner in owners}


def _weight_of(
    module: nn.Module, name: str, layout: Layout, settings: Settings, sizes: Sizes | None
) -> Weight:
    inner, _, tensor_name = name.rpartition(".")
    path: Path = (("", module),)
    if inner:
        path = (*path, (inner, module.get_submodule(inner)))
    return weight_at(
        path,
        tensor_name,
        layout,
        settings,
        obstacle=obstacle_in(module) if name in layouts_of(module) else None,
        label=f"'{name}' of {type(module).__name__}",
        sizes=sizes,
    )


def _no_weight_error(module: nn.Module) -> Exception:
    kind = type(module).__name__
    if is_packed(module):
        return TypeError(packed_message(module))
    for name in module._parameters:
        hook = hook_using(module, name)
        if hook is not None:
            return ValueError(f"{kind} is under {hook}; remove that first")
    names = [n for n, p in module.named_parameters(recurse=False) if not is_lazy(p) and p.ndim >= 2]
    if names:
        return ValueError(f"{kind} is not in the layer table; pass name=, one of {names}")
    if next(module.parameters(), None) is not None and next(module.children(), None) is not None:
        return ValueError(f"{kind} has no weight of its own; for layers inside use convert_model")
    return ValueError(f"{kind} has no weight of two or more dimensions")
