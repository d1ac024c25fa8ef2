"""Two networks that were trained alike in different ways, compared."""

from torch import nn
from torch.testing import assert_close


def assert_same_gradients_and_states(
    a: nn.Module, b: nn.Module, rtol: float = 1e-12, atol: float = 1e-14
) -> None:
    """Gradients to 1e-9, and buffers to what is given."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: n + m)
    for p, q in zip(a.buffers(), b.buffers(), strict=True):
        assert_close(p, q, rtol=rtol, atol=atol)
