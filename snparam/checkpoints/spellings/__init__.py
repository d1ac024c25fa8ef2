"""The spellings, one file each, which reads and writes it and registers itself.

One state of a tensor `weight` under four spellings, and none under the plain one:

    plain       weight
    snparam     parametrizations.weight.original, .0.u (b, k, m), .0.sv (b, k), .0.gain (b,)
    torch       parametrizations.weight.original, .0._u (m,), .0._v (n,)
    torch-hook  weight_orig, weight_u (m,), weight_v (n,)
    biggan      weight, u0 (1, m), sv0 (1,), u1, sv1, ...
"""

# In the order in which they are asked: ours before torch's, whose weight has the same key.
from snparam.checkpoints.spellings import plain  # isort: skip
from snparam.checkpoints.spellings import ours, torch, torch_hook, biggan  # isort: skip

__all__ = ["biggan", "ours", "plain", "torch", "torch_hook"]
