"""Small networks of eligible layers, and valid inputs for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A chain of layers with tanh between them, as `networks` draws it.

    Behind the first layer, attention is called as self-attention and `Bilinear` with the same input
    twice. Of a tuple that a layer returns, the first element is passed on. A layer may occur more
    than once.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output of the last layer, for inputs such as `example_inputs` makes."""
        x = _call(self.layers[0], inputs)
        for layer in self.layers[1:]:
            x = _call(layer, (torch.tanh(x),))
        return x


def example_inputs(module: nn.Module, batch: int = 2, seed: int = 0) -> tuple[Any, ...]:
    """Return valid positional arguments for a layer of an eligible type, or for a `Network`.

    Embeddings get indices (batch, 3), all other layers Gaussian tensors in the dtype and on the
    device of the module's first floating or complex parameter.

    Args:
        module: a layer of one of the types that `layers` draws, converted or not, or a `Network`.
        batch: size of the batch dimension.
        seed: seed of the generator; torch's global random state is neither read nor moved.

    Raises:
        TypeError: for a module of another type.
    """
    generator = torch.Generator().manual_seed(seed)
    first = module.layers[0] if isinstance(module, Network) else module
    like = next((p for p in module.parameters() if p.is_floating_point() or p.is_complex()), None)
    dtype, device = (torch.float32, None) if like is None else (like.dtype, like.device)

    def real(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype).to(device)

    if isinstance(first, nn.Embedding | nn.EmbeddingBag):
        indices = torch.randint(first.num_embeddings, (batch, 3), generator=generator)
        return (indices.to(device),)
    return _real_inputs(first, batch, real)


def _real_inputs(layer: nn.Module, batch: int, real: Any) -> tuple[Any, ...]:
    if isinstance(layer, nn.Linear):
        return (real(batch, layer.in_features),)
    if isinstance(layer, nn.Bilinear):
        return real(batch, layer.in1_features), real(batch, layer.in2_features)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        reach = zip(layer.kernel_size, layer.dilation, strict=True)
        return (real(batch, layer.in_channels, *((k - 1) * d + 2 for k, d in reach)),)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return (real(batch, layer.in_channels, *(2 for _ in layer.kernel_size)),)
    if isinstance(layer, nn.MultiheadAttention):
        size = (batch, 3) if layer.batch_first else (3, batch)
        kdim, vdim = layer.kdim or layer.embed_dim, layer.vdim or layer.embed_dim
        return real(*size, layer.embed_dim), real(*size, kdim), real(*size, vdim)
    if isinstance(layer, nn.RNNBase):
        size = (batch, 3) if layer.batch_first else (3, batch)
        return (real(*size, layer.input_size),)
    if isinstance(layer, nn.RNNCellBase):
        return (real(batch, layer.input_size),)
    raise TypeError(
        f"example_inputs: {type(layer).__name__} is not an eligible layer type; make its inputs "
        "yourself"
    )


def _call(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    if isinstance(layer, nn.Bilinear) and len(inputs) == 1:
        inputs *= 2
    if isinstance(layer, nn.MultiheadAttention) and len(inputs) == 1:
        inputs *= 3
    output = layer(*inputs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
