"""Whether a tensor can be registered, how it is read, and the state it starts with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snparam.estimators.completion import completed
from snparam.layers.table import Weight
from snparam.layers.torch_norms import Spectral, kind_on, spectral_on
from snparam.matrices import linalg
from snparam.matrices.sharded import is_fully_sharded
from snparam.matrices.stacks import Estimate, compute_dtype, is_finite, stack_of
from snparam.matrices.views import View
from snparam.parametrization.find import norm_on
from snparam.parametrization.options import Settings
from snparam.parametrization.spectral_norm import SpectralNorm

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


@dataclass(frozen=True)
class Problem:
    """Why a tensor cannot be registered, and what would help."""

    what: str
    remedy: str
    error: type[Exception] = ValueError


FULLY_SHARDED = Problem(
    "fully_shard has it in hand already", "convert_model first, then fully_shard"
)


@dataclass(frozen=True)
class Candidate:
    """A tensor that may be registered: where it is, how to read it, what stands against it.

    Attributes:
        weight: the tensor's place in the layer table's terms.
        settings: the options.
        label: what to call it in errors.
        view: how it is read, or None where it cannot be.
        problem: what stands against registering it, without looking at its values, or None.
        spectral: torch's spectral norm on it, to be taken over, or None.
    """

    weight: Weight
    settings: Settings
    label: str
    view: View | None
    problem: Problem | None
    spectral: Spectral | None = None

    @classmethod
    def of(cls, weight: Weight, settings: Settings, label: str, replace: bool = False) -> Candidate:
        """Look at a tensor's type, shape and dtype, not yet at its values.

        With `replace`, torch's spectral norm on it is no obstacle.
        """
        spectral = spectral_on(weight.owner, weight.tensor_name)
        problem = _under_spectral(spectral) if spectral and not replace else _obstacle(weight)
        view = None
        if problem is None:
            try:
                view = weight.layout.view(_tensor(weight).shape, settings.blocks)
            except ValueError as error:
                problem = Problem(str(error), "choose blocks that divide the rows")
        return cls(weight, settings, label, view, problem, spectral)

    @property
    def tensor(self) -> Tensor:
        """The tensor itself, not normalised."""
        return _tensor(self.weight)

    @property
    def available(self) -> int:
        """How many singular values each matrix has."""
        assert self.view is not None
        return min(self.view.matrices[1:])

    def check(self) -> None:
        """Raise what stands against registering, values excepted."""
        problem = self.problem
        if problem is None and self.settings.num_svs > self.available:
            problem = Problem(
                f"num_svs={self.settings.num_svs} exceeds min(rows, columns)={self.available}",
                f"pass num_svs <= {self.available}",
            )
        if problem is not None:
            raise problem.error(self.message(problem))

    def message(self, problem: Problem) -> str:
        """An error's text: where, what shape, what is wrong, what to do."""
        tensor = _find(self.weight)
        shape = "" if tensor is None or is_lazy(tensor) else f" {tuple(tensor.shape)}"
        return f"SpectralNorm on {self.label}{shape}: {problem.what}; {problem.remedy}."

    @torch.no_grad()
    def estimate(self) -> tuple[Tensor, Tensor]:
        """Converged u (b, k, m) and sv (b, k) of the tensor, in the dtypes they are kept in.

        What is taken over keeps its u.

        Raises:
            ValueError: if the tensor has NaN or inf.
        """
        assert self.view is not None
        tensor = self.tensor.detach()
        stack = stack_of(tensor, self.view)
        if not is_finite(stack):
            problem = Problem("it has NaN or inf", "repair or re-initialise it first")
            raise ValueError(self.message(problem))
        count = min(self.settings.num_svs, self.available)
        given = None if self.spectral is None else self.spectral.left_vector(self.view)
        u, sv = completed(stack, given, None, count)
        dtype = compute_dtype(tensor.dtype)
        return u.to(dtype), sv.to(linalg.real_dtype(dtype))

    def make(self, estimate: tuple[Tensor, Tensor] | None = None) -> SpectralNorm:
        """The parametrization, from a converged estimate (computed here where not given).

        With `init="random"` the estimate is only the check that the values are finite.
        """
        u, sv = self.estimate() if estimate is None else estimate
        # Outside of inference mode, or training could not update the buffers later.
        with torch.inference_mode(False), torch.no_grad():
            return self._make(u.clone(), sv.clone())

    def _make(self, u: Tensor, sv: Tensor) -> SpectralNorm:
        assert self.view is not None
        if self.settings.init == "random" and self.spectral is None:
            u = linalg.orthonormal_rows(torch.randn_like(u))
            sv = torch.ones_like(sv)
        v = u.new_zeros(*u.shape[:2], self.view.matrices[2])
        norm = SpectralNorm(self.view, self.settings, Estimate(u, v, sv), self.label)
        norm.derive(self.tensor)
        norm.start_gain(self.tensor)
        if self.spectral is not None and self.settings.gain is not None:
            # The norm that the weight in use has had so far: 1, but for torch's estimate, and for
            # matrices other than torch's.
            norm.gain.data.div_(self.spectral.sigma())
        return norm


def is_lazy(tensor: Tensor) -> bool:
    """Whether a tensor has no shape yet."""
    return nn.parameter.is_lazy(tensor)


def _under_spectral(spectral: Spectral) -> Problem:
    kind = "torch's deprecated spectral_norm" if spectral.hook else "torch's spectral_norm"
    return Problem(f"it is under {kind} already", "convert_model with replace=True takes that over")


def _obstacle(weight: Weight) -> Problem | None:
    name = weight.tensor_name
    if parametrize.is_parametrized(weight.owner, name) and not spectral_on(weight.owner, name):
        if norm_on(weight.owner, name):
            return Problem("it is registered already", "remove_sn first to change its options")
        kinds = kind_on(weight.owner, name)
        return Problem(f"it is parametrized already, by {kinds}", "remove that parametrization")
    tensor = _find(weight)
    if tensor is None:
        return Problem(
            "it is no parameter or buffer (a quantised module, or one with a weight hook)",
            "remove the hook, or convert before quantising",
            TypeError,
        )
    if is_lazy(tensor):
        return Problem("it is uninitialised (a lazy module)", "run one forward first")
    if is_fully_sharded(tensor, [weight.owner]):
        return FULLY_SHARDED
    if weight.obstacle is not None:
        return Problem(weight.obstacle, "change that, or leave this layer out")
    return _tensor_obstacle(tensor)


def _tensor_obstacle(tensor: Tensor) -> Problem | None:
    if tensor.is_quantized:
        return Problem("it is quantised", "convert before quantising", TypeError)
    if tensor.layout != torch.strided:
        return Problem(f"its layout is {tensor.layout}", "make it dense", TypeError)
    if tensor.dtype not in _DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        return Problem(f"its dtype is {tensor.dtype}", f"one of {kinds} is needed", TypeError)
    if tensor.ndim < 2:
        return Problem(
            f"it has {tensor.ndim} dimension(s), and singular values belong to matrices",
            "register on a tensor of two or more dimensions",
        )
    if tensor.numel() == 0:
        return Problem("it has no entries", "leave this layer out")
    if tensor.is_meta:
        return Problem("it is on the meta device, without values", "load its values first")
    return None


def _find(weight: Weight) -> Tensor | None:
    owner, name = weight.owner, weight.tensor_name
    tensor: Tensor | None = owner._parameters.get(name)
    tensor = owner._buffers.get(name) if tensor is None else tensor
    if tensor is None and (spectral := spectral_on(owner, name)) is not None:
        return spectral.original
    return tensor


def _tensor(weight: Weight) -> Tensor:
    tensor = _find(weight)
    assert tensor is not None
    return tensor
