"""The rows of other libraries' layers in the layer table, one file for each library.

None of the libraries is imported: a class is recognised by its qualified name. Each row follows the
library's code; a class that derives from one of torch's own layers needs none.
"""

from snparam.layers.libraries import (  # noqa: F401 - each registers its rows
    diffusers,
    peft,
    timm,
    torchvision,
    transformers,
)
