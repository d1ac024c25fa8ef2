"""The table of layer types and of how their weights are read. Knows types, changes no module."""

from snparam.layers import libraries, torch  # noqa: F401 - each registers its rows
