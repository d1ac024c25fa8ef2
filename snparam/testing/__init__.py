"""Strategies and assertions for property-based tests of users' own networks.

The strategies `weights`, `layers` and `networks` need Hypothesis (extra `testing`). The assertions
`assert_spectral_norm`, `assert_converted` and `assert_same_function`, and `example_inputs`, need
torch alone.

    from hypothesis import given
    import snparam
    from snparam.testing import assert_spectral_norm, networks

    @given(networks())
    def test_every_network_is_normalised(network):
        snparam.convert_model(network)
        assert_spectral_norm(network, at_most=1.0)

Everything that the strategies draw depends on Hypothesis alone: torch's global random state does
not enter, and is left as it was, so that Hypothesis can replay and shrink a failing example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snparam.testing.assertions import assert_converted, assert_same_function, assert_spectral_norm
from snparam.testing.inputs import Network, example_inputs

if TYPE_CHECKING:
    from snparam.testing.network_strategies import networks
    from snparam.testing.strategies import layers, weights

__all__ = [
    "Network",
    "assert_converted",
    "assert_same_function",
    "assert_spectral_norm",
    "example_inputs",
    "layers",
    "networks",
    "weights",
]


def __getattr__(name: str) -> Any:
    """Import a strategy at its first use, so that the assertions work without Hypothesis."""
    if name not in ("layers", "networks", "weights"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import hypothesis  # noqa: F401
    except ImportError:
        raise ImportError(
            f"snparam.testing.{name} needs Hypothesis: pip install 'snparam[testing]'"
        ) from None
    from snparam.testing import network_strategies, strategies

    return getattr(network_strategies if name == "networks" else strategies, name)
