"""The selection of weights to convert, by types, name patterns, a predicate and a preset."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from snparam.conversion.presets import PathPredicate, preset_named
from snparam.layers.table import Path
from snparam.layers.torch_norms import hook_tensors
from snparam.parametrization.find import qualified_name

Selector: TypeAlias = str | type[nn.Module]
Selectors: TypeAlias = Selector | Iterable[Selector] | None
Filter: TypeAlias = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Selection:
    """The weights of one model that a conversion is to convert.

    A selector is a module type or a name pattern; it selects the modules that match and everything
    inside them. A pattern matches whole path segments from the root of the model: `*` stands for
    anything within one segment, `**` for any number of segments. It may also name a single weight.
    A module that is in several places of the model has several names, and each of them counts.

    Attributes:
        include: selectors of what to convert, or None for everything.
        exclude: selectors of what to leave alone.
        filter_fn: predicate of a module and its qualified name, True to convert, or None.
        paths: every path from the root to each module of the model, by the module's identity.
        preset: name of the preset, or None.
        preset_excludes: predicate of a path, True where the preset leaves out the weights of the
            last module, or None.
    """

    include: tuple[Selector, ...] | None
    exclude: tuple[Selector, ...]
    filter_fn: Filter | None
    paths: Mapping[int, Sequence[Path]]
    preset: str | None = None
    preset_excludes: PathPredicate | None = None

    @classmethod
    def from_arguments(
        cls,
        include: Selectors,
        exclude: Selectors,
        filter_fn: Filter | None,
        model: nn.Module,
        preset: str | None = None,
    ) -> Selection:
        """Return the selection that a caller's arguments describe, checked against a model.

        Raises:
            TypeError: for a selector that is neither a string nor a module type, a `filter_fn` that
                cannot be called with a module and a name, or a preset that is no string.
            ValueError: for a selector that matches nothing in the model, an unknown preset, or
                `preset="keep-head"` or `"sngp"` where no head is recognised.
        """
        selection = cls(
            None if include is None else _as_tuple("include", include),
            _as_tuple("exclude", exclude),
            filter_fn,
            _paths_by_module(model),
            preset,
            None if preset is None else preset_named(preset).rule(model),
        )
        _check_filter(filter_fn)
        modules = [path[-1] for paths in selection.paths.values() for path in paths]
        for option in ("include", "exclude"):
            for selector in getattr(selection, option) or ():
                if not _matches_any(selector, modules):
                    raise ValueError(_no_match(option, selector, modules))
        return selection

    def reason_against(self, path: Path, module: nn.Module, name: str, tensor: str) -> str | None:
        """Return why the weight `tensor` of `module` is not selected, or None if it is.

        Args:
            path: qualified names and modules from the root to the module, both included.
            module: the module whose weight it is.
            name: the module's qualified name.
            tensor: the tensor's name.
        """
        paths = self.paths[id(module)]
        enclosing: list[tuple[str, nn.Module | None]] = [
            place for module_path in paths for place in module_path
        ]
        enclosing += [(qualified_name(module_path[-1][0], tensor), None) for module_path in paths]
        for selector in self.exclude:
            if _selects(selector, enclosing):
                return f"excluded by {_selector_text(selector)}"
        if self.include is not None and not any(_selects(s, enclosing) for s in self.include):
            return "not included"
        if self.filter_fn is not None and not self.filter_fn(module, name):
            return "filter_fn says no"
        if self.preset_excludes is not None and self.preset_excludes(path):
            return f"left out by preset {self.preset!r}"
        return None


def _check_filter(filter_fn: Any) -> None:
    if filter_fn is None:
        return
    expected = f"filter_fn={filter_fn!r}: expected a function (module, qualified_name) -> bool"
    if not callable(filter_fn):
        raise TypeError(f"{expected}, not {type(filter_fn).__name__}")
    try:
        signature = inspect.signature(filter_fn)
    except ValueError:  # some functions that are written in C have none
        return
    try:
        signature.bind(None, "")
    except TypeError as error:
        raise TypeError(f"{expected}, not {signature} ({error})") from None


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern of path segments matches a whole qualified name."""
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


def _selects(selector: Selector, enclosing: Sequence[tuple[str, nn.Module | None]]) -> bool:
    if isinstance(selector, str):
        return any(matches(selector, name) for name, _ in enclosing)
    return any(isinstance(module, selector) for _, module in enclosing)


def _matches_any(selector: Selector, modules: Sequence[tuple[str, nn.Module]]) -> bool:
    if not isinstance(selector, str):
        return any(isinstance(module, selector) for _, module in modules)
    return any(
        matches(selector, name)
        or any(
            matches(selector, qualified_name(name, tensor))
            for tensor in [
                *module._parameters,
                *module._buffers,
                *_parametrized_tensors(module),
                *hook_tensors(module),
            ]
        )
        for name, module in modules
    )


def _paths_by_module(model: nn.Module) -> dict[int, list[Path]]:
    by_module: dict[int, list[Path]] = {}
    for path in _paths((("", model),)):
        by_module.setdefault(id(path[-1][1]), []).append(path)
    return by_module


def _paths(path: Path) -> Iterator[Path]:
    """Yield every path that begins with the given one, itself included.

    A module in several places has several paths. Parts of parametrizations have none.
    """
    yield path
    name, module = path[-1]
    for child_name, child in module._modules.items():
        inner = child_name == "parametrizations" and is_parametrized(module)
        if child is not None and not inner and all(child is not above for _, above in path):
            yield from _paths((*path, (qualified_name(name, child_name), child)))


def _parametrized_tensors(module: nn.Module) -> Iterable[str]:
    return list(module.parametrizations) if is_parametrized(module) else ()  # type: ignore[arg-type]


def _no_match(option: str, selector: Selector, modules: Sequence[tuple[str, nn.Module]]) -> str:
    if isinstance(selector, str):
        names = [name for name, _ in modules if name]
        kind, hint = "module or weight", " ('**.name' matches at any depth)"
    else:
        names = sorted({type_before_parametrizations(module).__name__ for _, module in modules})
        kind, hint = "module of that type", ""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{option}={_selector_text(selector)} matches no {kind}{hint}; the model has {shown}"


def _as_tuple(option: str, selectors: Selectors) -> tuple[Selector, ...]:
    if selectors is None:
        return ()
    as_tuple: tuple[Any, ...] = (selectors,)
    if isinstance(selectors, Iterable) and not isinstance(selectors, str | type):
        as_tuple = tuple(selectors)
    for selector in as_tuple:
        is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        if not isinstance(selector, str) and not is_type:
            raise TypeError(
                f"{option}={selector!r}: expected module types and name patterns, one or several"
            )
    return as_tuple


def _selector_text(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else selector.__name__
