"""Spectral penalties: a function of the weights' singular values, to be added to a loss.

Holding the norms of the weights is one way to use them; adding a function of them to the loss is
another, which leaves every weight an ordinary one:

    (λ/2) Σ σ²        Yoshida and Miyato 2017, "Spectral norm regularization"
    λ Σ (σᵏ − 1)²     Lewandowski et al. 2025, "Learning continually by spectral regularization"

dσᵢ/dW = uᵢ vᵢᴴ, so that a penalty costs a step of the iteration and a rank-k update of the
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from snparam.constraints.division import without_autocast
from snparam.conversion.plan import CONVERT, REFUSE, plan_of
from snparam.conversion.selection import Filter, Selection, Selectors
from snparam.conversion.weights import Weight, weights_in
from snparam.estimators.convergence import converged
from snparam.estimators.estimate import ESTIMATORS, Estimate
from snparam.matrices.stacks import stack_of
from snparam.matrices.views import WeightView
from snparam.parametrization.arguments import check_model
from snparam.parametrization.find import norm_on
from snparam.parametrization.options import Settings, settings_from

PenaltyFunction = Callable[[Tensor], Tensor]

# The estimator of weights that are not normalised. With one vector it is the classic step.
_ESTIMATOR = "rayleigh-ritz"


def half_square(sv: Tensor) -> Tensor:
    """Return σ₁² / 2, summed over blocks (Yoshida and Miyato 2017), for sv (b, k)."""
    return sv[:, 0].square().sum() / 2


class SpectralPenalty:
    """The sum over a network's weights of a function of their singular values, differentiable.

    It is called without arguments in each training step:

        penalty = SpectralPenalty(model, lambda sv: (sv[:, 0] - 1).square().sum())
        loss = task_loss + 0.01 * penalty()

    Which weights are meant is decided at the first call, as `convert_model` decides it; tied
    weights count once. The singular vectors of weights that are not normalised are kept in this
    object, and nothing is kept in the model. They start converged at the first call,
    deterministically, and each further call takes `num_itrs` steps. A weight under SpectralNorm
    counts with its original: one step is taken from its own u, and moves nothing.

    The gradient is Σ ∂f/∂σᵢ uᵢ vᵢᴴ: exact for converged vectors, wherever f is a symmetric function
    of the values that are equal. The vectors are constants to autograd, as in the classic layer; a
    second derivative is that of f alone.

    Not saved with the model: after a restart it starts converged again.
    """

    def __init__(
        self,
        model: nn.Module,
        function: PenaltyFunction | None = None,
        *,
        num_svs: int = 1,
        num_itrs: int = 1,
        blocks: Any = None,
        include: Selectors = None,
        exclude: Selectors = None,
        filter_fn: Filter | None = None,
    ) -> None:
        """Make the penalty; nothing is computed before the first call.

        Args:
            model: the network, converted, in parts, or not at all. Nothing in it is changed.
            function: from the singular values (b, k) of a weight, one row for each block, largest
                first, to a number. None (the default): σ₁² / 2, summed over blocks.
            num_svs: how many of the largest singular values the function gets, or all that a weight
                has, if these are fewer. A weight under SpectralNorm gives those that it tracks.
            num_itrs: steps of the iteration in each call.
            blocks: how many matrices a weight is read as, as for `convert_model`.
            include: which weights to penalise, as for `convert_model`.
            exclude: which weights to leave out, as for `convert_model`.
            filter_fn: which weights to penalise, by code, as for `convert_model`.

        Raises:
            ValueError: if an option is out of range, or a pattern or type matches nothing.
            TypeError: if `model` is no module, or an option is of a wrong type.
        """
        check_model(model, "SpectralPenalty")
        self.function = _checked_function(function, "SpectralPenalty")
        self._model = model
        self._settings = settings_from(num_svs, num_itrs, {"blocks": blocks})
        self._selection = Selection.from_arguments(include, exclude, filter_fn, model, None)
        self._weights: list[_PenalisedWeight] | None = None

    def __call__(self) -> Tensor:
        """Return the penalty, a tensor of no dimensions, on the device of the first weight.

        Raises:
            ValueError: if the model has no weight to penalise, or one has NaN or inf at the first
                call; or if the function does not return a number.
        """
        if self._weights is None:
            self._weights = _weights_to_penalise(self._model, self._settings, self._selection)
        return _penalty(self._weights, self.function, self._settings)


def spectral_penalty(
    model: nn.Module, function: PenaltyFunction | None = None, *, num_svs: int = 1
) -> Tensor:
    """Return the sum of a function of the singular values of a network's weights, differentiable.

    This is `SpectralPenalty` for all weights, as one call for each training step: its vectors are
    kept from call to call, beside the model and as long as that lives, and never in it.

    Args:
        model: the network, converted, in parts, or not at all. Nothing in it is changed.
        function: from the singular values (b, k) of a weight, one row for each block, largest
            first, to a number. None (the default): σ₁² / 2, summed over blocks.
        num_svs: how many of the largest singular values the function gets.

    Returns:
        a tensor of no dimensions, on the device of the first weight.

    Raises:
        ValueError: if the model has no weight to penalise, or one has NaN or inf at the first call;
            or if the function does not return a number.
        TypeError: if `model` is no module, or an option is of a wrong type.

    Source: Yoshida and Miyato 2017; Lewandowski et al. 2025.
    """
    check_model(model, "spectral_penalty")
    function = _checked_function(function, "spectral_penalty")
    settings = settings_from(num_svs, 1, {})
    kept = _kept.setdefault(model, {})
    if num_svs not in kept:
        selection = Selection.from_arguments(None, None, None, model, None)
        kept[num_svs] = _weights_to_penalise(model, settings, selection)
    return _penalty(kept[num_svs], function, settings)


def _checked_function(function: PenaltyFunction | None, name: str) -> PenaltyFunction:
    """Return the function, or the default for None.

    Raises:
        TypeError: if it is no function.
    """
    if function is not None and not callable(function):
        raise TypeError(
            f"{name}: function={function!r}: expected a function of singular values; multiply "
            "what it returns by a weight of your own"
        )
    return half_square if function is None else function


@dataclass
class _PenalisedWeight:
    """A weight of a model that is penalised, with the vectors that are kept for it.

    Attributes:
        name: qualified name.
        owner: the module that has it, weakly, so that keeping this keeps no model alive.
        tensor_name: name of the tensor in its owner.
        view: how it is read as a stack of matrices.
        source: the tensor whose vectors are kept, weakly; None at first.
        u: (b, k, m), or None.
    """

    name: str
    owner: ReferenceType[nn.Module]
    tensor_name: str
    view: WeightView
    source: ReferenceType[Tensor] | None = None
    u: Tensor | None = None

    @classmethod
    def of(cls, weight: Weight) -> _PenalisedWeight:
        """Return the record of a weight that can be read as matrices."""
        assert weight.view is not None
        return cls(weight.name, ref(weight.owner), weight.tensor_name, weight.view)

    def estimate(self, settings: Settings) -> tuple[Tensor, WeightView, Estimate]:
        """Return the tensor behind the weight, how it is read now, and its singular triplets."""
        owner: Any = self.owner()
        norm = None if owner is None else norm_on(owner, self.tensor_name)
        if norm is not None:
            original: Tensor = owner.parametrizations[self.tensor_name].original
            return original, norm.view, norm.unstored_triplets(original)
        tensor: Tensor | None = getattr(owner, self.tensor_name, None)
        if tensor is None or tuple(tensor.shape) != self.view.shape:
            raise ValueError(
                f"the weight '{self.name}' {self.view.shape} that is penalised was removed or has "
                "another shape; make a new SpectralPenalty"
            )
        stack = stack_of(tensor.detach(), self.view)
        if self.u is None or self.source is None or self.source() is not tensor:
            count = min(settings.num_svs, *self.view.matrices[1:])
            self.u = converged(stack, count)[0]
            self.source = ref(tensor)
        u = self.u.to(stack.device, stack.dtype)
        estimator = ESTIMATORS[_ESTIMATOR]
        (estimate,) = estimator.move([stack], [u], settings.num_itrs, settings.eps)
        self.u = estimate.u
        return tensor, self.view, estimate


# The weights of each model that `spectral_penalty` was called with, by `num_svs`, with the vectors
# that it keeps for them.
_kept: WeakKeyDictionary[nn.Module, dict[int, list[_PenalisedWeight]]] = WeakKeyDictionary()


def _weights_to_penalise(
    model: nn.Module, settings: Settings, selection: Selection
) -> list[_PenalisedWeight]:
    """Return the selected weights of a model, converted or not; of tied ones, the first."""
    by_tensor: dict[int, _PenalisedWeight] = {}
    for weight in _selected_weights(model, settings, selection):
        by_tensor.setdefault(weight.key, _PenalisedWeight.of(weight))
    if not by_tensor:
        raise ValueError(
            f"{type(model).__name__} has no weight to penalise; plan_conversion(model) says for "
            "each of its parameters why not"
        )
    return list(by_tensor.values())


def _selected_weights(
    model: nn.Module, settings: Settings, selection: Selection
) -> Iterator[Weight]:
    weights = list(weights_in(model, settings, ignore_wrappers=True))
    for row in plan_of(weights, selection, {}):
        weight = row.record
        if row.decision == REFUSE:
            raise ValueError(row.reason)
        if row.decision == CONVERT:
            yield weight
        elif weight.norm is not None and weight.view is not None:
            names = (weight.path, weight.owner, weight.module_name, weight.tensor_name)
            if selection.reason_against(*names) is None:
                yield weight


def _penalty(
    weights: list[_PenalisedWeight], function: PenaltyFunction, settings: Settings
) -> Tensor:
    """Return the sum of a function of the singular values of weights."""
    total: Tensor | None = None
    for weight in weights:
        with torch.no_grad():
            tensor, view, estimate = weight.estimate(settings)
        with without_autocast(tensor):
            sv: Tensor = _SingularValues.apply(tensor, *estimate[:3], view)  # type: ignore[no-untyped-call]
            value: Any = function(sv)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(
                    f"spectral penalty of '{weight.name}': the function returned {value!r} for "
                    f"singular values {tuple(sv.shape)}; expected a tensor with one number"
                )
            number = value.reshape(())
            total = number if total is None else total + number.to(total.device)
    assert total is not None
    return total


class _SingularValues(torch.autograd.Function):
    """The singular values sv (b, k) as functions of the weight, with the vectors constant.

    The values come from the step that found them. The gradient is Σ ∂f/∂σᵢ uᵢ vᵢᴴ.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, u: Tensor, v: Tensor, sv: Tensor, view: WeightView
    ) -> Tensor:
        ctx.save_for_backward(u, v)
        # The values of the weight are not needed, which may change before the backward.
        ctx.view, ctx.like = view, weight.detach()
        return sv.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (u, v), like = ctx.saved_tensors, ctx.like
        weighted = gradient.unsqueeze(-1) * u
        stack = stack_of(like, ctx.view)
        if not isinstance(stack, Tensor):
            parts = [stack.outer(weighted[:, i], v[:, i]) for i in range(u.shape[1])]
            return sum(parts[1:], start=parts[0]).to(like.dtype), None, None, None, None
        matrices = weighted.mT @ v.conj()
        out = ctx.view.entries.from_matrices(matrices, like=like).to(like.dtype)
        return out, None, None, None, None
