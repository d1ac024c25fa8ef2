"""The selection of weights to convert, by types, name patterns, a predicate and a preset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from snparam.conversion.presets import Leaves, preset_named
from snparam.layers.torch_norms import hook_tensors

Selector: TypeAlias = str | type[nn.Module]
Selectors: TypeAlias = Selector | Iterable[Selector] | None
Filter: TypeAlias = Callable[[nn.Module, str], bool]

# Qualified names and modules from the root of a model to one of its modules, both included.
Path: TypeAlias = tuple[tuple[str, nn.Module], ...]


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
        left_by_preset: predicate of a path, True where the preset leaves out the weights of the
            last module, or None.
    """

    include: tuple[Selector, ...] | None
    exclude: tuple[Selector, ...]
    filter_fn: Filter | None
    paths: Mapping[int, Sequence[Path]]
    preset: str | None = None
    left_by_preset: Leaves | None = None

    @classmethod
    def of(
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
                cannot be called, or a preset that is no string.
            ValueError: for a selector that matches nothing in the model, an unknown preset, or
                `preset="keep-head"` where no head is recognised.
        """
        selection = cls(
            None if include is None else _as_tuple("include", include),
            _as_tuple("exclude", exclude),
            filter_fn,
            _paths_by_module(model),
            preset,
            None if preset is None else preset_named(preset).rule(model),
        )
        if filter_fn is not None and not callable(filter_fn):
            raise TypeError(f"filter_fn={filter_fn!r}: expected a function (module, name) -> bool")
        modules = [path[-1] for paths in selection.paths.values() for path in paths]
        for option in ("include", "exclude"):
            for selector in getattr(selection, option) or ():
                if not _matches_any(selector, modules):
                    raise ValueError(_no_match(option, selector, modules))
        return selection

    def reason_against(
        self, path: Sequence[tuple[str, nn.Module]], module: nn.Module, name: str, tensor: str
    ) -> str | None:
        """Return why the weight `tensor` of `module` is not selected, or None if it is.

        Args:
            path: qualified names and modules from the root to the module, both included.
            module: the module whose weight it is.
            name: the module's qualified name.
            tensor: the tensor's name.
        """
        ways = self.paths[id(module)]
        inside: list[tuple[str, nn.Module | None]] = [place for way in ways for place in way]
        inside += [(_join(way[-1][0], tensor), None) for way in ways]
        for selector in self.exclude:
            if _selects(selector, inside):
                return f"excluded by {_show(selector)}"
        if self.include is not None and not any(_selects(s, inside) for s in self.include):
            return "not included"
        if self.filter_fn is not None and not self.filter_fn(module, name):
            return "filter_fn says no"
        if self.left_by_preset is not None and self.left_by_preset(path):
            return f"left out by preset {self.preset!r}"
        return None


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


def _selects(selector: Selector, inside: Sequence[tuple[str, nn.Module | None]]) -> bool:
    if isinstance(selector, str):
        return any(matches(selector, name) for name, _ in inside)
    return any(isinstance(module, selector) for _, module in inside)


def _matches_any(selector: Selector, modules: Sequence[tuple[str, nn.Module]]) -> bool:
    if not isinstance(selector, str):
        return any(isinstance(module, selector) for _, module in modules)
    return any(
        matches(selector, name)
        or any(
            matches(selector, _join(name, tensor))
            for tensor in [
                *module._parameters,
                *module._buffers,
                *_parametrized(module),
                *hook_tensors(module),
            ]
        )
        for name, module in modules
    )


def _paths_by_module(model: nn.Module) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    for path in _paths((("", model),)):
        found.setdefault(id(path[-1][1]), []).append(path)
    return found


def _paths(path: Path) -> Iterator[Path]:
    """Yield every path that begins with the given one, itself included.

    A module in several places has several paths. Parts of parametrizations have none.
    """
    yield path
    name, module = path[-1]
    for child_name, child in module._modules.items():
        inner = child_name == "parametrizations" and is_parametrized(module)
        if child is not None and not inner and all(child is not above for _, above in path):
            yield from _paths((*path, (_join(name, child_name), child)))


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _parametrized(module: nn.Module) -> Iterable[str]:
    return list(module.parametrizations) if is_parametrized(module) else ()  # type: ignore[arg-type]


def _no_match(option: str, selector: Selector, modules: Sequence[tuple[str, nn.Module]]) -> str:
    if isinstance(selector, str):
        seen = [name for name, _ in modules if name]
        kind, hint = "module or weight", " ('**.name' matches at any depth)"
    else:
        seen = sorted({type_before_parametrizations(module).__name__ for _, module in modules})
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
