"""Rows for the layers of other libraries, a file each, which registers its rows.

None of the libraries is imported: a class is recognised by where it says it is defined. A row is
here because the library's code says so; what reads a weight by `F.linear` alone, or derives from
torch's own layers, needs none.
"""

from snparam.layers.libraries import (  # noqa: F401 - each registers its rows
    diffusers,
    peft,
    timm,
    torchvision,
    transformers,
)
