"""Checks of whether a tensor can be read as matrices, and the problems that they report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snparam.matrices.products import right_product
from snparam.matrices.sharded import is_sharded
from snparam.matrices.stacks import compute_dtype
from snparam.matrices.views import WeightView

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)

QUANTISE_LAST = "convert, train and restore_model before quantising"


@dataclass(frozen=True)
class Problem:
    """A reason why a tensor cannot be normalised, with its remedy.

    Attributes:
        reason: why, in words.
        remedy: what the user can do, in words.
        error: type of the exception that `register_sn` raises.
        refuses: whether a conversion refuses instead of skipping the weight, because calls were
            made in the wrong order, and a network with this weight left out is not what was meant.
        unknown_type: whether the reason is that the layer table does not know the module's type,
            which a user can add.
        is_early: whether the tensor only has no shape or no values yet, so that the row of the plan
            has the remedy too.
    """

    reason: str
    remedy: str
    error: type[Exception] = ValueError
    refuses: bool = False
    unknown_type: bool = False
    is_early: bool = False

    @property
    def plan_reason(self) -> str:
        """What the row of a plan says."""
        return f"{self.reason}; {self.remedy}" if self.is_early else self.reason


def is_lazy(tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter or buffer of a lazy module, without a shape yet."""
    return nn.parameter.is_lazy(tensor)


def tensor_problem(tensor: Tensor) -> Problem | None:
    """Return why a tensor has no singular values, by its dtype, layout and shape, or None."""
    if tensor.is_quantized:
        return Problem("it is quantised", QUANTISE_LAST, TypeError)
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
        return Problem(
            "it is on the meta device, without values",
            "materialise it by model.to_empty(device=...) and load its values first",
            is_early=True,
        )
    return None


def reading_problem(tensor: Tensor, view: WeightView) -> Problem | None:
    """Return why a tensor of another library's type cannot be computed with as a matrix, or None.

    The function tries it: quantised tensors of other libraries raise exceptions of any type, and
    the products of some types are tensors of that type again, which a state cannot keep.
    """
    if type(tensor) in (Tensor, nn.Parameter) or is_sharded(tensor):
        return None
    kind = type(tensor).__name__
    remedy = f"leave it out; of a network that is to be quantised, {QUANTISE_LAST}"
    try:
        stack = view.stack(tensor.detach(), compute_dtype(tensor.dtype))
        blocks, _, columns = stack.shape
        ones = torch.ones(blocks, 1, columns, dtype=stack.dtype, device=stack.device)
        product = right_product(stack, ones)
        results = (product, product.isfinite().all(), tensor.detach() / 2)
    except Exception as error:  # noqa: BLE001 - whatever another library's tensor raises
        error_text = str(error).strip().partition("\n")[0][:80]
        reason = f"a {kind} cannot be read as a matrix ({type(error).__name__}: {error_text})"
        return Problem(reason, remedy, TypeError)
    if any(type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ for x in results):
        return Problem(f"a {kind} computes in tensors of its own kind", remedy, TypeError)
    return None
