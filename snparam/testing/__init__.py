"""For property-based tests of your own networks: strategies and assertions.

Strategies (Hypothesis, extra `testing`): `weights`, `layers`, `networks`. Assertions and
`example_inputs`, which need torch alone: `assert_spectral_norm`, `assert_converted`,
`assert_same_function`.

    from hypothesis import given
    import snparam
    from snparam.testing import assert_spectral_norm, networks

    @given(networks())
    def test_every_network_is_normalised(network):
        snparam.convert_model(network)
        assert_spectral_norm(network, at_most=1.0)

Everything that is drawn depends on Hypothesis alone: torch's global random state is neither read
nor moved, so that a failing example is found again and shrinks.
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
    """The strategies, at their first use: the assertions work without Hypothesis."""
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
