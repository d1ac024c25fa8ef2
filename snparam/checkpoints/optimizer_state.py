"""The state dict of an optimizer, translated between an ordinary network and the converted one.

An optimizer's state dict numbers parameters by their place in `model.parameters()`. In a converted
network a layer's weight comes after its bias, and there may be gains, so that the numbers of one
network are wrong for the other: torch loads them, and the first step fails, or trains one parameter
with the moments of another of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from snparam.parametrization.arguments import check_model
from snparam.parametrization.baking import check_alone
from snparam.parametrization.find import norms_of
from snparam.parametrization.gains import gain_parameters
from snparam.parametrization.order import in_order, recorded_order


def optimizer_state_dict_for(
    model: nn.Module,
    optimizer: Optimizer,
    spelling: Literal["plain", "snparam"],
    state_dict: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return an optimizer's state dict, numbered for the ordinary network or for the converted one.

    After a conversion, what an optimizer of the ordinary network had saved:

        saved = snparam.optimizer_state_dict_for(model, optimizer, "snparam", saved)
        optimizer.load_state_dict(saved)

    Back, for an optimizer of the ordinary network:

        saved = snparam.optimizer_state_dict_for(model, optimizer, "plain")

    The optimizer's state for a weight is that of its original, so that it belongs with
    `plain_state_dict(model, bake=False)` and `restore_model(model, bake=False)`. An ordinary
    network has no gains: `"plain"` leaves their state out, and `"snparam"` lets it start anew.

    Both optimizers must have been given the same parameters in the same groups, in the order of
    their networks or with their names (`model.named_parameters()`, torch 2.6 and later). A group of
    gains alone, as `parameter_groups` makes it, has no counterpart.

    Args:
        model: the converted network.
        optimizer: the optimizer that trains the converted network.
        spelling: the numbers to return: `"plain"`, those of the ordinary network, or `"snparam"`,
            those of `optimizer` itself.
        state_dict: for `"snparam"`, the state dict of the ordinary network's optimizer; for
            `"plain"`, one of `optimizer`, None (the default) for `optimizer.state_dict()`.

    Returns:
        A state dict for `load_state_dict`, which shares its tensors with the one it is made from.

    Raises:
        ValueError: for an unknown spelling, if a group has other parameters in one optimizer than
            in the other, if the optimizer trains parameters that the model does not have (FSDP1's,
            which are flat), if it keeps one state for all of them (LBFGS), or if a weight carries
            another parametrization as well.
        TypeError: without a state dict for `"snparam"`, or if `model` is no module.
    """
    check_model(model, "optimizer_state_dict_for")
    if spelling not in ("plain", "snparam"):
        raise ValueError(f"spelling={spelling!r}: expected 'plain' or 'snparam'")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer_state_dict_for: LBFGS keeps one state for all parameters, in their order; "
            "begin with a new one"
        )
    converted = optimizer.state_dict()
    groups = _match_groups(_plain_names(model), optimizer, converted, gain_parameters(model))
    if spelling == "plain":
        return _to_plain(groups, converted if state_dict is None else state_dict)
    if state_dict is None:
        raise TypeError(
            "optimizer_state_dict_for: pass the state dict of the ordinary network's optimizer as "
            "state_dict="
        )
    return _to_converted(groups, converted, state_dict)


# A group of the optimizer: its index in `param_groups`, and the numbers of its parameters by the
# names that the ordinary network gives them, in the order of that network.
_Group = tuple[int, dict[str, int]]


def _match_groups(
    names: dict[int, str],
    optimizer: Optimizer,
    converted: dict[str, Any],
    gains: list[nn.Parameter],
) -> list[_Group]:
    """Return the groups that an optimizer of the ordinary network has too, without the gains."""
    gain_ids = {id(gain) for gain in gains}
    positions = {name: index for index, name in enumerate(names.values())}
    groups = []
    for index, (group, saved) in enumerate(
        zip(optimizer.param_groups, converted["param_groups"], strict=True)
    ):
        numbers = {}
        for parameter, number in zip(group["params"], saved["params"], strict=True):
            if id(parameter) in gain_ids:
                continue
            if id(parameter) not in names:
                raise ValueError(
                    f"optimizer_state_dict_for: parameter {number} {tuple(parameter.shape)} of the "
                    f"{type(optimizer).__name__} is none of the model's; pass the model that it "
                    "trains, and not one whose parameters were flattened or replaced since"
                )
            numbers[names[id(parameter)]] = number
        if numbers or not group["params"]:
            sorted_numbers = sorted(numbers.items(), key=lambda item: positions[item[0]])
            groups.append((index, dict(sorted_numbers)))
    return groups


def _to_plain(groups: list[_Group], converted: dict[str, Any]) -> dict[str, Any]:
    """Return the converted network's state dict with the numbers of the ordinary network."""
    state, param_groups = {}, []
    count = 0
    for index, numbers in groups:
        group = dict(converted["param_groups"][index])
        group["params"] = list(range(count, count + len(numbers)))
        if "param_names" in group:
            group["param_names"] = list(numbers)
        for number in numbers.values():
            if number in converted["state"]:
                state[count] = converted["state"][number]
            count += 1
        param_groups.append(group)
    return {**converted, "state": state, "param_groups": param_groups}


def _to_converted(
    groups: list[_Group], converted: dict[str, Any], plain: dict[str, Any]
) -> dict[str, Any]:
    """Return the ordinary network's state dict with the numbers of the converted network."""
    if len(plain["param_groups"]) != len(groups):
        raise ValueError(
            f"optimizer_state_dict_for: the state dict has {len(plain['param_groups'])} groups of "
            f"parameters, and the optimizer {len(groups)} with parameters of the ordinary network; "
            "build it with the same groups"
        )
    state, param_groups = {}, [dict(group) for group in converted["param_groups"]]
    for (index, numbers), plain_group in zip(groups, plain["param_groups"], strict=True):
        names = plain_group.get("param_names", list(numbers))
        if len(plain_group["params"]) != len(numbers) or set(names) != set(numbers):
            differing = next(iter(set(names) ^ set(numbers)), None)
            hint = ""
            if differing is not None:
                hint = f" (one of them has {differing!r}, and the other has not)"
            raise ValueError(
                f"optimizer_state_dict_for: group {index} has {len(plain_group['params'])} "
                f"parameters in the state dict and {len(numbers)}, without gains, in the "
                f"optimizer{hint}; "
                "build it with the same groups"
            )
        for name, number in zip(names, plain_group["params"], strict=True):
            if number in plain["state"]:
                state[numbers[name]] = plain["state"][number]
        own_entries = {
            key: converted["param_groups"][index].get(key) for key in ("params", "param_names")
        }
        param_groups[index] = {
            **plain_group,
            **{k: v for k, v in own_entries.items() if v is not None},
        }
    return {**plain, "state": state, "param_groups": param_groups}


def _plain_names(model: nn.Module) -> dict[int, str]:
    """Return the names of the ordinary network's parameters, by id, in that network's order."""
    names: dict[int, str] = {}
    for name, parameter in _plain_parameters(model, "", set()):
        names.setdefault(id(parameter), name)
    return names


def _plain_parameters(
    module: nn.Module, prefix: str, visited: set[int]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what `named_parameters` of the ordinary network yields.

    Args:
        module: the root, or a module inside it.
        prefix: the prefix of the module's parameters.
        visited: identities of the modules that have been yielded from; filled here.
    """
    if id(module) in visited:
        return
    visited.add(id(module))
    lists: Any = module._modules.get("parametrizations")
    tensors: dict[str, Any] = dict(module._parameters)
    normalised = [name for name, _ in norms_of(module)]
    for name in normalised:
        check_alone(module, name)
        tensors[name] = lists[name].original
    order = recorded_order(lists[normalised[0]]) if normalised else ()
    for name in in_order(tensors, order):
        if isinstance(tensors[name], nn.Parameter):
            yield prefix + name, tensors[name]
    for name, child in module._modules.items():
        if child is None:
            continue
        if child is not lists or not normalised:
            yield from _plain_parameters(child, f"{prefix}{name}.", visited)
            continue
        for tensor, parametrization_list in child._modules.items():
            if parametrization_list is not None and tensor not in normalised:
                yield from _plain_parameters(
                    parametrization_list, f"{prefix}{name}.{tensor}.", visited
                )
