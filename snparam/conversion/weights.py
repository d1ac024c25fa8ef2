"""The weights of a model: where each is, how it is read, and why it cannot be normalised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snparam.constraints.constraint import CONSTRAINTS
from snparam.conversion.input_sizes import NOT_CALLED, NOT_CALLED_REMEDY, Sizes, largest_view
from snparam.conversion.wrappers import FLAT, flattens, wrapper_problem
from snparam.estimators.completion import complete_state
from snparam.estimators.estimate import ESTIMATORS
from snparam.layers.convolutions import geometry_of, is_convolution
from snparam.layers.table import (
    Path,
    is_lookup,
    is_packed,
    layer_type,
    layouts_of,
    note_on,
    obstacle_in,
)
from snparam.layers.tensors import QUANTISE_LAST, Problem, is_lazy, reading_problem, tensor_problem
from snparam.layers.torch_norms import (
    TorchSpectralNorm,
    hook_tensors,
    hook_using,
    parametrizations_on,
    torch_spectral_norm_on,
)
from snparam.matrices.orthonormalisation import orthonormal_rows
from snparam.matrices.products import real_dtype
from snparam.matrices.sharded import is_sharded
from snparam.matrices.stacks import OPERATOR_OF_SHARDS, compute_dtype, is_finite, stack_of
from snparam.matrices.views import Layout, WeightView
from snparam.parametrization.find import is_normalised, norm_on, qualified_name
from snparam.parametrization.options import Settings
from snparam.parametrization.spectral_norm import SpectralNorm

_REGISTERED = Problem("it is registered already", "remove_sn first to change its options")


@dataclass(frozen=True)
class Weight:
    """A tensor of two or more dimensions in a model, as one set of options would normalise it.

    Attributes:
        path: qualified names and modules from the root of the model to the owner, both included.
        tensor_name: name of the tensor in its owner.
        tensor: the tensor before normalisation (the original, where it is normalised already), or
            None where it cannot be reached (a quantised module packs it, a hook computes it).
        settings: the options.
        layout: which of its axes count the rows, or None where the layer table does not know it.
        view: how it is read as a stack of matrices, or None where it cannot be.
        problem: why SpectralNorm cannot be registered on it, its values not considered, or None.
        norm: the SpectralNorm that it is under already, or None.
        spectral: torch's spectral norm on it, or None.
        label: what to call it in errors.
    """

    path: Path
    tensor_name: str
    tensor: Tensor | None
    settings: Settings
    layout: Layout | None
    view: WeightView | None
    problem: Problem | None
    norm: SpectralNorm | None
    spectral: TorchSpectralNorm | None
    label: str

    @property
    def module_name(self) -> str:
        """Qualified name of the owner, "" for the model itself."""
        return self.path[-1][0]

    @property
    def owner(self) -> nn.Module:
        """The module that has the tensor."""
        return self.path[-1][1]

    @property
    def name(self) -> str:
        """Qualified name of the weight."""
        return qualified_name(self.module_name, self.tensor_name)

    @property
    def key(self) -> int:
        """Identity of the tensor, which tied weights share, or of the owner without a tensor."""
        return id(self.owner if self.tensor is None else self.tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, () where it has none yet or cannot be reached."""
        return () if self.tensor is None or is_lazy(self.tensor) else tuple(self.tensor.shape)

    @property
    def available(self) -> int:
        """Number of singular values of each of its matrices, min(m, n)."""
        assert self.view is not None
        return min(self.view.matrices[1:])

    def reads_as(self, view: WeightView) -> bool:
        """Return whether the options read the weight as the matrices of the given view."""
        try:
            return (
                self.layout is not None
                and self.layout.view(self.shape, self.settings.blocks) == view
            )
        except ValueError:
            return False

    def check(self) -> None:
        """Raise if SpectralNorm cannot be registered on the weight; its values are not considered.

        Raises:
            ValueError: if the problem is of that kind, or `num_svs` exceeds min(rows, columns).
            TypeError: if the problem is of that kind.
        """
        problem = self.problem
        if problem is None and self.settings.num_svs > self.available:
            problem = Problem(
                f"num_svs={self.settings.num_svs} exceeds min(rows, columns)={self.available}",
                f"pass num_svs <= {self.available}",
            )
        if problem is not None:
            raise problem.error(self.message(problem))

    def message(self, problem: Problem) -> str:
        """Return the error text of a problem: the weight with its shape, the reason, the remedy."""
        shape = f" {self.shape}" if self.shape else ""
        return f"SpectralNorm on {self.label}{shape}: {problem.reason}; {problem.remedy}."

    @torch.no_grad()
    def estimate(self) -> tuple[Tensor, Tensor]:
        """Return converged u (b, k, m) and sv (b, k) of the weight, in the dtypes of the state.

        A weight under torch's spectral norm keeps torch's u as its first vector, where torch reads
        the weight as the same matrix.

        Raises:
            ValueError: if the tensor has NaN or inf.
        """
        assert self.view is not None
        assert self.tensor is not None
        tensor = self.tensor.detach()
        stack = stack_of(tensor, self.view)
        if not is_finite(stack):
            problem = Problem("it has NaN or inf", "repair or re-initialise it first")
            raise ValueError(self.message(problem))
        count = min(self.settings.num_svs, self.available)
        torch_u = None if self.spectral is None else self.spectral.left_vector(self.view)
        u, sv = complete_state(stack, torch_u, None, count)
        dtype = compute_dtype(tensor.dtype)
        return u.to(dtype), sv.to(real_dtype(dtype))

    def new_norm(self, estimate: tuple[Tensor, Tensor] | None = None) -> SpectralNorm:
        """Return a SpectralNorm for the weight, not yet registered.

        With `init="random"`, u starts at random, and the estimate only shows that the values are
        finite; but a weight under torch's spectral norm always starts from the estimate.

        Args:
            estimate: u (b, k, m) and sv (b, k) from `estimate()`, computed if not given.
        """
        u, sv = self.estimate() if estimate is None else estimate
        # Tensors made in inference mode could not be updated by training later.
        with torch.inference_mode(False), torch.no_grad():
            return self._new_norm(u.clone(), sv.clone())

    def _new_norm(self, u: Tensor, sv: Tensor) -> SpectralNorm:
        assert self.view is not None
        assert self.tensor is not None
        if self.settings.init == "random" and self.spectral is None:
            u = orthonormal_rows(torch.randn_like(u))
            sv = torch.ones_like(sv)
        norm = SpectralNorm(self.view, self.settings, u, sv, self.label)
        norm.start_parameters(self.tensor)
        if self.spectral is not None and norm.has_gain:
            # γ starts at σ of the weight that torch's spectral norm gives, so that the layer's
            # function stays the same. That is 1 up to torch's error, if torch's matrix is the
            # view's.
            norm.gain.data.div_(self.spectral.sigma())
        return norm


def weight_at(
    path: Path,
    tensor_name: str,
    layout: Layout,
    settings: Settings,
    *,
    obstacle: str | None = None,
    take_over: bool = False,
    ignore_wrappers: bool = False,
    label: str | None = None,
    sizes: Sizes | None = None,
) -> Weight:
    """Return the record of a weight whose layout is known.

    Its type, shape and dtype are checked, its values are not.

    Args:
        path: qualified names and modules from the root to the owner, both included.
        tensor_name: name of the tensor in its owner.
        layout: which of its axes count the rows.
        settings: the options.
        obstacle: why the weight cannot be normalised, by the layer table, or None.
        take_over: whether torch's spectral norm on it is to be taken over, and so no problem.
        ignore_wrappers: whether it is no problem that a wrapper has the weight in hand, as where it
            is only to be read.
        label: what to call it in errors; its qualified name, if not given.
        sizes: the sizes of the inputs of each convolution, by its identity, or None where they are
            not known; used with `norm="operator"` alone.
    """
    owner = path[-1][1]
    if not is_convolution(owner):
        settings = replace(settings, norm="matrix")  # all other weights are matrices as ever
    tensor = _tensor_named(owner, tensor_name)
    norm = norm_on(owner, tensor_name)
    spectral = torch_spectral_norm_on(owner, tensor_name)
    view, problem = None, None
    if norm is not None:
        view, problem = norm.view, _REGISTERED
    elif spectral is not None and not take_over:
        problem = _torch_norm_problem(spectral)
    else:
        problem = _registration_problem(
            path, tensor_name, tensor, settings, obstacle, ignore_wrappers
        )
        if problem is None:
            assert tensor is not None
            reading = _reading(owner, tensor, layout, settings, sizes)
            if isinstance(reading, Problem):
                problem = reading
            else:
                view, problem = reading, reading_problem(tensor, reading)
    label = label or f"'{qualified_name(path[-1][0], tensor_name)}'"
    return Weight(path, tensor_name, tensor, settings, layout, view, problem, norm, spectral, label)


def weights_in(
    model: nn.Module,
    settings: Settings,
    take_over: bool = False,
    ignore_wrappers: bool = False,
    sizes: Sizes | None = None,
) -> Iterator[Weight]:
    """Yield the record of every tensor of two or more dimensions in a model, in the model's order.

    A Parameter in several modules has a record for each. Tensors without a shape yet (lazy modules)
    and packed ones (quantised modules) have records too.

    Args:
        model: the model.
        settings: the options.
        take_over: whether torch's spectral norm on a weight is to be taken over, and so no problem.
        ignore_wrappers: whether it is no problem that a wrapper has a weight in hand.
        sizes: as in `weight_at`.
    """
    layouts_by_module: dict[int, Mapping[str, tuple[Layout, str | None]]] = {}
    for path in _unique_paths((("", model),), set()):
        module = path[-1][1]
        obstacle = obstacle_in(module)
        layouts_by_module[id(module)] = {
            name: (layout, obstacle) for name, layout in layouts_of(module).items()
        }
        layouts = dict(layouts_by_module[id(module)])
        if len(path) > 1:  # weights of this module that its parent's row lists
            child_prefix = path[-1][0].rpartition(".")[2] + "."
            for name, entry in layouts_by_module[id(path[-2][1])].items():
                if name.startswith(child_prefix):
                    layouts[name.removeprefix(child_prefix)] = entry
        if is_packed(module):
            packed_problem = Problem("quantised: its weight is packed", QUANTISE_LAST)
            yield _unlisted_weight(path, "weight", None, settings, packed_problem)
        if flattens(module) and not is_normalised(module):
            flat_problem = wrapper_problem([module], None, settings)
            assert flat_problem is not None
            yield _unlisted_weight(path, FLAT, module._parameters.get(FLAT), settings, flat_problem)
        for tensor_name, tensor in _named_originals(module):
            if not is_lazy(tensor) and tensor.ndim < 2:
                continue
            if is_lazy(tensor) and tensor_name not in layouts and _is_listed(module):
                continue  # such as a bias, which will have one dimension
            note = note_on(path, tensor_name)
            layout, weight_obstacle = layouts.get(tensor_name, (None, None))
            layout = note if isinstance(note, Layout) else layout
            if isinstance(note, str):
                problem = Problem(note, "leave it out")
                yield _unlisted_weight(path, tensor_name, tensor, settings, problem)
            elif layout is None:
                problem = _table_problem(module, tensor_name, tensor)
                yield _unlisted_weight(path, tensor_name, tensor, settings, problem)
            else:
                yield weight_at(
                    path,
                    tensor_name,
                    layout,
                    settings,
                    obstacle=weight_obstacle,
                    take_over=take_over,
                    ignore_wrappers=ignore_wrappers,
                    sizes=sizes,
                )


def _is_listed(module: nn.Module) -> bool:
    """Return whether the layer table knows all weights of a module, as it does of torch's own."""
    kind = parametrize.type_before_parametrizations(module)
    return layer_type(module) is not None or kind.__module__.startswith("torch.nn.")


def _unlisted_weight(
    path: Path, tensor_name: str, tensor: Tensor | None, settings: Settings, problem: Problem
) -> Weight:
    """Return the record of a tensor that the layer table does not read as matrices."""
    label, norm = f"'{qualified_name(path[-1][0], tensor_name)}'", norm_on(path[-1][1], tensor_name)
    view = None if norm is None else norm.view
    return Weight(path, tensor_name, tensor, settings, None, view, problem, norm, None, label)


def _reading(
    owner: nn.Module, tensor: Tensor, layout: Layout, settings: Settings, sizes: Sizes | None
) -> WeightView | Problem:
    """Return how a tensor is read as matrices with the given options, or why it cannot be."""
    if settings.norm == "matrix":
        try:
            return layout.view(tensor.shape, settings.blocks)
        except ValueError as error:
            return Problem(str(error), "choose blocks that divide the rows")
    geometry = geometry_of(owner)
    if geometry is None:
        reason = "its forward is not torch's own, so that the map it computes is not known"
        return Problem(reason, "leave it out, or pass norm='matrix'")
    if is_sharded(tensor):
        return Problem(*OPERATOR_OF_SHARDS, refuses=True)
    if sizes is None:
        return Problem(
            "norm='operator' needs the size of its inputs",
            "pass example_inputs= to convert_model, or input_size= to register_sn",
            refuses=True,
        )
    if id(owner) not in sizes:
        return Problem(NOT_CALLED, NOT_CALLED_REMEDY, refuses=True)
    recorded = sizes[id(owner)]
    if isinstance(recorded, Problem):
        return recorded
    try:
        return largest_view(tensor, geometry, recorded)
    except ValueError as error:
        return Problem(str(error), "pass the size of an input that the layer takes", refuses=True)


# Why a tensor cannot be normalised


def _registration_problem(
    path: Path,
    tensor_name: str,
    tensor: Tensor | None,
    settings: Settings,
    obstacle: str | None,
    ignore_wrappers: bool,
) -> Problem | None:
    owner = path[-1][1]
    if parametrize.is_parametrized(owner, tensor_name) and not torch_spectral_norm_on(
        owner, tensor_name
    ):
        names = parametrizations_on(owner, tensor_name)
        return Problem(f"it is parametrized already, by {names}", "remove that parametrization")
    if tensor is None:
        return Problem(
            "it is no parameter or buffer (a quantised module, or one with a weight hook)",
            f"remove the hook, or {QUANTISE_LAST}",
            TypeError,
        )
    if is_lazy(tensor):
        return Problem(
            "it is uninitialised (a lazy module)",
            "run one forward first, on an input of the right shape",
            is_early=True,
        )
    problem = wrapper_problem((module for _, module in path), tensor, settings)
    if problem is not None and not ignore_wrappers:
        return problem
    if obstacle is not None:
        return Problem(obstacle, "change that, or leave this layer out")
    if is_sharded(tensor) and ESTIMATORS[settings.sigma].side == "above":
        return Problem(
            "it is sharded, and a certificate needs the whole weight",
            "leave it unsharded, or pass another sigma",
            refuses=True,
        )
    return tensor_problem(tensor) or _constraint_problem(owner, tensor, settings)


def _constraint_problem(owner: nn.Module, tensor: Tensor, settings: Settings) -> Problem | None:
    """Return why the constraint of the options cannot hold a tensor, or None."""
    name = settings.constraint_name
    if is_sharded(tensor) and not CONSTRAINTS[name].takes_shards:
        return Problem(
            f"it is sharded, and {name!r} needs the whole weight",
            "convert_model first, then fully_shard; or pass coeff= or soft=True instead",
            refuses=True,
        )
    if settings.coeff == "mup" and is_lookup(owner):
        return Problem(
            "coeff='mup' is the norm of a matrix that multiplies, and an embedding looks rows up, "
            "whose lengths of their own should be √columns",
            "leave it out, or pass a number",
        )
    return None


def _torch_norm_problem(spectral: TorchSpectralNorm) -> Problem:
    kind = "torch's deprecated spectral_norm" if spectral.hook else "torch's spectral_norm"
    return Problem(f"it is under {kind} already", "convert_model with replace=True takes that over")


def _table_problem(module: nn.Module, tensor_name: str, tensor: Tensor) -> Problem:
    """Return why the layer table does not read a tensor as matrices."""
    hook = hook_using(module, tensor_name)
    if hook is not None:
        return Problem(f"under {hook}", "remove that first")
    if tensor_name.startswith("parametrizations."):
        kinds = parametrizations_on(module, tensor_name.split(".")[1])
        return Problem(f"a part of {kinds}", "remove that parametrization")
    if isinstance(module.__dict__.get("weight"), Tensor) and not layouts_of(module):
        return Problem(
            "its 'weight' is computed by a hook (weight_norm, or the old spectral_norm)",
            "remove that hook",
        )
    kind = parametrize.type_before_parametrizations(module).__name__
    row = layer_type(module)
    if row is not None and row.weights:
        return Problem(f"no weight of {kind} by the layer table", "leave it out")
    if not is_lazy(tensor) and max(tensor.shape) == tensor.numel():
        return Problem("a single vector, and no matrix", "leave it out")
    return Problem(
        f"{kind} is not in the layer table",
        "add its type with register_layer_type",
        unknown_type=True,
    )


# Where tensors are


def _tensor_named(owner: nn.Module, tensor_name: str) -> Tensor | None:
    """Return a parameter or buffer of a module by its name, or None.

    For a tensor that is computed from parameters, that is the largest of them.
    """
    tensor = dict(_named_originals(owner)).get(tensor_name)
    return owner._buffers.get(tensor_name) if tensor is None else tensor


def _named_originals(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module, not of its children, by name.

    Of the originals of a parametrized tensor, the largest has the tensor's name.
    """
    tensor_names = {f"{name}_orig": name for name in hook_tensors(module)}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield tensor_names.get(name, name), parameter
    if parametrize.is_parametrized(module):
        for name, parametrizations in module.parametrizations.items():  # type: ignore[union-attr, operator]
            originals = dict(parametrizations.named_parameters(recurse=False))
            largest = max(originals, key=lambda n: originals[n].numel(), default="")
            for original, parameter in originals.items():
                part_name = f"parametrizations.{name}.{original}"
                yield (name if original == largest else part_name), parameter


def _unique_paths(path: Path, visited: set[int]) -> Iterator[Path]:
    """Yield one path to each module inside the last module of a path, itself included.

    Args:
        path: the path to begin with.
        visited: identities of the modules that have had a path; filled here.
    """
    name, module = path[-1]
    if id(module) in visited:
        return
    visited.add(id(module))
    yield path
    for child_name, child in module.named_children():
        if not (child_name == "parametrizations" and parametrize.is_parametrized(module)):
            yield from _unique_paths((*path, (qualified_name(name, child_name), child)), visited)
