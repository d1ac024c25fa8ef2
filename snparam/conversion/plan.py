"""The plan of a conversion: where a model's weights are, and what is to become of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod

from torch import Tensor, nn
from torch.nn.utils import parametrize

from snparam.conversion.candidates import Candidate, is_lazy
from snparam.conversion.tables import aligned
from snparam.layers.table import Weight, is_packed, layer_type, note_on, weights_of
from snparam.layers.torch_norms import hook_behind, hooked, kind_on
from snparam.matrices.views import Layout
from snparam.parametrization.find import norms_of
from snparam.parametrization.options import Settings
from snparam.parametrization.spectral_norm import SpectralNorm

# What ends the reason for a type that users may know better.
_UNKNOWN = "is not in the layer table"

CONVERT, SKIP, REFUSE = "convert", "skip", "refuse"
ALREADY = "already normalised"


@dataclass(frozen=True)
class Site:
    """A place in the model where a tensor of two or more dimensions is used.

    Attributes:
        path: qualified names and modules from the root to the owner, both included.
        tensor: name of the tensor in its owner.
        key: identity of the tensor; tied weights have the same.
        shape: its shape, or () if it has none.
        candidate: for a tensor that the layer table knows.
        reason: for one that it does not know: why it is left out.
    """

    path: tuple[tuple[str, nn.Module], ...]
    tensor: str
    key: int
    shape: tuple[int, ...]
    candidate: Candidate | None
    reason: str = ""

    @property
    def name(self) -> str:
        """Qualified name of the owner."""
        return self.path[-1][0]

    @property
    def owner(self) -> nn.Module:
        """The module that has the tensor."""
        return self.path[-1][1]

    @property
    def weight_name(self) -> str:
        """Qualified name of the weight."""
        return f"{self.name}.{self.tensor}" if self.name else self.tensor


@dataclass(frozen=True)
class PlanRow:
    """What a conversion does with one weight.

    Attributes:
        name: qualified name of the module.
        tensor: name of the tensor in it.
        layer_type: name of the module's class.
        shape: shape of the weight, () where it has none.
        matrices: (b, m, n), how the weight is read, or None where it is not.
        sigma: the largest of the blocks' largest singular values now, or None.
        decision: `"convert"`, `"skip"` or `"refuse"` (the conversion raises).
        reason: why, in words; empty for an ordinary conversion.
        site: where the weight is.
        estimate: u and sv that the conversion will start from.
        shares: the state that it will share, with a weight that is converted already.
    """

    name: str
    tensor: str
    layer_type: str
    shape: tuple[int, ...]
    matrices: tuple[int, int, int] | None
    sigma: float | None
    decision: str
    reason: str
    site: Site = field(repr=False, compare=False)
    estimate: tuple[Tensor, Tensor] | None = field(repr=False, compare=False, default=None)
    shares: SpectralNorm | None = field(repr=False, compare=False, default=None)

    @property
    def weight(self) -> str:
        """Qualified name of the weight."""
        return self.site.weight_name


class ConversionPlan(list[PlanRow]):
    """The rows of a conversion, in the order of the model; `print` shows an aligned table."""

    @property
    def to_convert(self) -> list[PlanRow]:
        """The rows that will be converted."""
        return [row for row in self if row.decision == CONVERT]

    @property
    def share(self) -> float:
        """Share of the parameters of two or more dimensions that is normalised afterwards."""
        total = sum(_sizes(self).values())
        done = _sizes([r for r in self if r.decision == CONVERT or r.reason == ALREADY])
        return sum(done.values()) / total if total else 0.0

    def __str__(self) -> str:
        """An aligned table, closed by the share of the parameters that is normalised."""
        hint = "snparam.register_layer_type adds types to the layer table\n"
        unknown = any(row.reason.endswith(_UNKNOWN) for row in self)
        header = ["weight", "layer", "shape", "matrices", "σ now", "decision", "reason"]
        rows = [
            [
                row.weight,
                row.layer_type,
                " x ".join(map(str, row.shape)),
                "" if row.matrices is None else " x ".join(map(str, row.matrices)),
                "" if row.sigma is None else f"{row.sigma:.4g}",
                row.decision,
                row.reason,
            ]
            for row in self
        ]
        total = sum(_sizes(self).values())
        return (
            f"{aligned(header, rows)}\n{hint if unknown else ''}"
            f"{len(self.to_convert)} of {len(self)} weights to convert; then {self.share:.1%} of "
            f"the {total:,} parameters of two or more dimensions are normalised"
        )

    __repr__ = __str__


def _sizes(rows: Iterable[PlanRow]) -> dict[int, int]:
    """Number of entries of each different parameter."""
    return {row.site.key: prod(row.shape) if row.shape else 0 for row in rows}


def sites_of(model: nn.Module, settings: Settings, replace: bool = False) -> Iterator[Site]:
    """Every place in a model where a tensor of two or more dimensions is used, in its order.

    With `replace`, weights under torch's spectral norm are candidates.
    """
    for path in _paths(model):
        name, module = path[-1]
        prefix = f"{name}." if name else ""
        listed = {w.tensor_name: w for w in weights_of(module) if w.owner is module}
        if is_packed(module):
            yield Site(path, "weight", id(module), (), None, "quantised: its weight is packed")
        for tensor_name, tensor in _tensors(module):
            if not is_lazy(tensor) and tensor.ndim < 2:
                continue
            shape = () if is_lazy(tensor) else tuple(tensor.shape)
            weight = listed.get(tensor_name)
            note = note_on(path, tensor_name)
            if isinstance(note, str):
                yield Site(path, tensor_name, id(tensor), shape, None, note)
                continue
            if isinstance(note, Layout):
                obstacle = None if weight is None else weight.obstacle
                weight = Weight(module, tensor_name, note, obstacle)
            if weight is not None:
                label = f"'{prefix}{tensor_name}'"
                candidate = Candidate.of(weight, settings, label, replace)
                yield Site(path, tensor_name, id(tensor), shape, candidate)
            else:
                reason = _not_listed(module, tensor_name, shape)
                yield Site(path, tensor_name, id(tensor), shape, None, reason)


def _paths(model: nn.Module) -> Iterator[tuple[tuple[str, nn.Module], ...]]:
    """Every different module once, with the way to it from the root."""
    seen: set[int] = set()

    def walk(
        path: tuple[tuple[str, nn.Module], ...],
    ) -> Iterator[tuple[tuple[str, nn.Module], ...]]:
        name, module = path[-1]
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path
        for child_name, child in module.named_children():
            if not (child_name == "parametrizations" and parametrize.is_parametrized(module)):
                yield from walk((*path, (f"{name}.{child_name}" if name else child_name, child)))

    yield from walk((("", model),))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a module by name, those that are parametrized included.

    Of several that one tensor is computed from, the largest has the tensor's name.
    """
    computed = {f"{name}_orig": name for name in hooked(module)}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield computed.get(name, name), parameter
    if parametrize.is_parametrized(module):
        for name, parametrizations in module.parametrizations.items():  # type: ignore[union-attr, operator]
            originals = dict(parametrizations.named_parameters(recurse=False))
            largest = max(originals, key=lambda n: originals[n].numel(), default="")
            for original, parameter in originals.items():
                inside = f"parametrizations.{name}.{original}"
                yield (name if original == largest else inside), parameter


def carried_norms(model: nn.Module) -> dict[int, SpectralNorm]:
    """The states in a model, by the identity of the Parameter behind."""
    return {
        id(module.parametrizations[tensor].original): norm  # type: ignore[index, union-attr]
        for module in model.modules()
        for tensor, norm in norms_of(module)
    }


def _not_listed(module: nn.Module, tensor_name: str, shape: tuple[int, ...]) -> str:
    hook = hook_behind(module, tensor_name)
    if hook is not None:
        return f"under {hook}"
    if tensor_name.startswith("parametrizations."):
        return f"a part of {kind_on(module, tensor_name.split('.')[1])}"
    if isinstance(module.__dict__.get("weight"), Tensor) and weights_of(module) == []:
        return "its 'weight' is computed by a hook (weight_norm, or the old spectral_norm)"
    kind = parametrize.type_before_parametrizations(module).__name__
    row = layer_type(module)
    if row is not None and row.weights:
        return f"no weight of {kind} by the layer table"
    if shape and max(shape) == prod(shape):
        return "a single vector, and no matrix"
    return f"{kind} {_UNKNOWN}"
