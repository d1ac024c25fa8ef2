"""Which tensors of which layers are weights, and their views. Knows types, changes no module."""

from snparam.layers import libraries, torch  # noqa: F401 - each registers its rows
