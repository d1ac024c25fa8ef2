"""The spellings: each file reads and writes one, and registers itself.

These are the keys of a tensor `weight` and its state in each; the plain one writes no state:

    plain       weight
    snparam     parametrizations.weight.original, .0.u (b, k, m), .0.sv (b, k), .0.gain (b,)
    torch       parametrizations.weight.original, .0._u (m,), .0._v (n,)
    torch-hook  weight_orig, weight_u (m,), weight_v (n,)
    biggan      weight, u0 (1, m), sv0 (1,), u1, sv1, ...
"""

# They are asked in the order of these imports: ours before torch's, whose weight has the same key.
from snparam.checkpoints.spellings import plain  # isort: skip
from snparam.checkpoints.spellings import ours, torch, torch_hook, biggan  # isort: skip

__all__ = ["biggan", "ours", "plain", "torch", "torch_hook"]
