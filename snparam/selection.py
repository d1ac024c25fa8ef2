"""Which modules of a network the user means: types, patterns of qualified names, a predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

Selector: TypeAlias = str | type[nn.Module]
Selectors: TypeAlias = Selector | Iterable[Selector] | None
Filter: TypeAlias = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Selection:
    """Which weights to convert, with the reason for each that is not.

    A selector picks the modules it names and everything inside them. A name selector is a pattern
    of whole path segments from the root of the model: `*` stands for anything within one segment,
    `**` for any number of segments. It may also name a single weight.
    """

    include: tuple[Selector, ...] | None
    exclude: tuple[Selector, ...]
    filter_fn: Filter | None

    @classmethod
    def of(
        cls, include: Selectors, exclude: Selectors, filter_fn: Filter | None, model: nn.Module
    ) -> Selection:
        """Check the selectors against a model.

        Raises:
            TypeError: for a selector that is neither a string nor a module type.
            ValueError: for a selector that matches nothing in the model.
        """
        selection = cls(
            None if include is None else _as_tuple("include", include),
            _as_tuple("exclude", exclude),
            filter_fn,
        )
        if filter_fn is not None and not callable(filter_fn):
            raise TypeError(f"filter_fn={filter_fn!r}: expected a function (module, name) -> bool")
        modules = dict(model.named_modules())
        for option in ("include", "exclude"):
            for selector in getattr(selection, option) or ():
                if not _matches_any(selector, modules):
                    raise ValueError(_no_match(option, selector, modules))
        return selection

    def reason_against(
        self, path: Sequence[tuple[str, nn.Module]], module: nn.Module, name: str, tensor: str
    ) -> str | None:
        """Why the weight `tensor` of `module` is not selected, or None if it is.

        Args:
            path: qualified names and modules from the root to the module, both included.
            module: the module whose weight it is.
            name: the module's qualified name.
            tensor: the tensor's name.
        """
        inside = [*path, (f"{name}.{tensor}" if name else tensor, None)]
        for selector in self.exclude:
            if _selects(selector, inside):
                return f"excluded by {_show(selector)}"
        if self.include is not None and not any(_selects(s, inside) for s in self.include):
            return "not included"
        if self.filter_fn is not None and not self.filter_fn(module, name):
            return "filter_fn says no"
        return None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of path segments matches a whole qualified name."""
    return _match_segments(pattern.split("."), name.split(".") if name else [])


def _match_segments(patterns: list[str], segments: list[str]) -> bool:
    if not patterns:
        return not segments
    if patterns[0] == "**":
        return any(_match_segments(patterns[1:], segments[i:]) for i in range(len(segments) + 1))
    return (
        bool(segments)
        and fnmatchcase(segments[0], patterns[0])
        and _match_segments(patterns[1:], segments[1:])
    )


def _selects(selector: Selector, inside: Sequence[tuple[str, nn.Module | None]]) -> bool:
    if isinstance(selector, str):
        return any(matches(selector, name) for name, _ in inside)
    return any(isinstance(module, selector) for _, module in inside)


def _matches_any(selector: Selector, modules: dict[str, nn.Module]) -> bool:
    if not isinstance(selector, str):
        return any(isinstance(module, selector) for module in modules.values())
    return any(
        matches(selector, name)
        or any(
            matches(selector, f"{name}.{tensor}" if name else tensor)
            for tensor in [*module._parameters, *module._buffers, *_parametrized(module)]
        )
        for name, module in modules.items()
    )


def _parametrized(module: nn.Module) -> Iterable[str]:
    lists = module._modules.get("parametrizations")
    return list(lists) if isinstance(lists, nn.ModuleDict) else ()


def _no_match(option: str, selector: Selector, modules: dict[str, nn.Module]) -> str:
    if isinstance(selector, str):
        seen = [name for name in modules if name and "parametrizations" not in name.split(".")]
        kind, hint = "module or weight", " ('**.name' matches at any depth)"
    else:
        seen = sorted(
            {type_before_parametrizations(module).__name__ for module in modules.values()}
        )
        kind, hint = "module of that type", ""
    shown = ", ".join(seen[:8]) + (", ..." if len(seen) > 8 else "")
    return f"{option}={_show(selector)} matches no {kind}{hint}; the model has {shown}"


def _as_tuple(option: str, selectors: Selectors) -> tuple[Selector, ...]:
    if selectors is None:
        return ()
    given: tuple[Any, ...] = (selectors,)
    if isinstance(selectors, Iterable) and not isinstance(selectors, str | type):
        given = tuple(selectors)
    for selector in given:
        is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        if not isinstance(selector, str) and not is_type:
            raise TypeError(
                f"{option}={selector!r}: expected module types and name patterns, one or several"
            )
    return given


def _show(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else selector.__name__
