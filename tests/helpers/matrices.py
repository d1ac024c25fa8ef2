"""Stacks of one matrix, drawn, and what they are compared by."""

import torch

from snparam.testing import weights

FLOATS = (torch.float32, torch.float64)
WIDE = (*FLOATS, torch.complex64, torch.complex128)


def matrices(**options):
    """Stacks of one matrix."""
    return weights(**{"dtypes": WIDE, **options}).map(lambda w: w.flatten(1).unsqueeze(0))


def rounding(x):
    return 64 * torch.finfo(x.dtype).eps


def gram(rows):
    return rows @ rows.mH
