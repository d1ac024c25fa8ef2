"""The Hypothesis strategy for small networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from snparam.testing.inputs import Network
from snparam.testing.strategies import LAYER_SPECTRA, Draw, check_choice, make_layer


def networks(
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    spectra: Sequence[str] = LAYER_SPECTRA,
    max_layers: int = 4,
    max_side: int = 6,
) -> st.SearchStrategy[Network]:
    """Return a strategy for small networks on vectors, images (1 to 3 dimensions) and sequences.

    In some a layer is used twice, or the last layer shares its weight with the embedding.
    `example_inputs(network)` makes the inputs of `network(*inputs)`.

    Args:
        dtypes: dtypes to choose from, one for each network. Default: float32.
        spectra: spectra of the weights to choose from; `"initial"` is the layer's own
            initialisation. Default: all.
        max_layers: largest number of layers with weights, at least 2; each use counts.
        max_side: largest number of features, channels or embeddings.

    Raises:
        ValueError: if `max_layers` is less than 2, or for an unknown spectrum.
    """
    check_choice("spectra", spectra, LAYER_SPECTRA)
    if max_layers < 2:
        raise ValueError(f"networks: max_layers={max_layers}: expected at least 2")
    return _networks(dtypes, spectra, max_layers, max_side)


@st.composite
def _networks(
    draw: Draw,
    dtypes: Sequence[torch.dtype],
    spectra: Sequence[str],
    max_layers: int,
    max_side: int,
) -> Network:
    dtype = draw(st.sampled_from(dtypes))
    sizes = st.integers(1, max_side)

    def make(kind: type[nn.Module], **arguments: Any) -> nn.Module:
        return make_layer(draw, kind, arguments, dtype, spectra)

    family = draw(st.sampled_from((_on_vectors, _on_images, _on_sequences)))
    return Network(family(draw, make, sizes, max_layers - 1))


# The families of networks. Each takes `make(type, **arguments)`, which makes a layer, and
# `max_inner`, the largest number of layers before the last. Later draws depend on earlier ones as
# little as possible, because Hypothesis shrinks an example by deleting draws: here those of one
# layer, together with the draw of `_draws_another` that asks for it.


def _draws_another(draw: Draw) -> bool:
    return bool(draw(st.integers(0, 3)))


def _on_vectors(
    draw: Draw, make: Callable[..., nn.Module], sizes: st.SearchStrategy[int], max_inner: int
) -> list[nn.Module]:
    width = draw(sizes)
    chain: list[nn.Module] = []
    if draw(st.booleans()):
        chain.append(make(nn.EmbeddingBag, num_embeddings=draw(sizes), embedding_dim=width))
    cells = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    while not chain or (_draws_another(draw) and len(chain) < max_inner):
        kind = draw(st.sampled_from((nn.Linear, nn.Bilinear, *cells, "again")))
        if kind == "again":
            repeated = chain[-1:] if _keeps_width(chain) else []
            chain.extend(repeated or [make(nn.Linear, in_features=width, out_features=width)])
            continue
        new_width = draw(sizes)
        if kind is nn.Linear:
            chain.append(make(kind, in_features=width, out_features=new_width))
        elif kind is nn.Bilinear:
            chain.append(make(kind, in1_features=width, in2_features=width, out_features=new_width))
        else:
            chain.append(make(kind, input_size=width, hidden_size=new_width))
        width = new_width
    return [*chain, make(nn.Linear, in_features=width, out_features=draw(sizes))]


def _keeps_width(chain: list[nn.Module]) -> bool:
    last = chain[-1] if chain else None
    return isinstance(last, nn.Linear) and last.in_features == last.out_features


def _on_images(
    draw: Draw, make: Callable[..., nn.Module], sizes: st.SearchStrategy[int], max_inner: int
) -> list[nn.Module]:
    kinds = draw(
        st.sampled_from(
            (
                (nn.Conv2d, nn.ConvTranspose2d),
                (nn.Conv1d, nn.ConvTranspose1d),
                (nn.Conv3d, nn.ConvTranspose3d),
            )
        )
    )
    channels = draw(sizes)
    chain: list[nn.Module] = []
    while not chain or (_draws_another(draw) and len(chain) < max_inner):
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        new_channels = groups * -(-draw(sizes) // groups)
        kind = draw(st.sampled_from(kinds))
        # With an odd kernel and this padding the image keeps its size.
        radius = draw(st.integers(0, 1))
        chain.append(
            make(
                kind,
                in_channels=channels,
                out_channels=new_channels,
                kernel_size=2 * radius + 1,
                padding=radius,
                groups=groups,
            )
        )
        channels = new_channels
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    dimensions = len(chain[0].kernel_size)  # type: ignore[arg-type]
    chain += [pool[dimensions - 1](1), nn.Flatten()]
    return [*chain, make(nn.Linear, in_features=channels, out_features=draw(sizes))]


# None ends the network. One draw decides on both the type and the end, because Hypothesis deletes
# at most five draws at once.
_ON_SEQUENCES = (None, None, nn.Linear, nn.MultiheadAttention, nn.RNN, nn.LSTM, nn.GRU)


def _on_sequences(
    draw: Draw, make: Callable[..., nn.Module], sizes: st.SearchStrategy[int], max_inner: int
) -> list[nn.Module]:
    width, vocabulary, tied = draw(sizes), draw(sizes), draw(st.booleans())
    embedding = make(nn.Embedding, num_embeddings=vocabulary, embedding_dim=width)
    chain = [embedding]
    while (kind := draw(st.sampled_from(_ON_SEQUENCES))) is not None and len(chain) < max_inner:
        if kind is nn.MultiheadAttention:
            chain.append(make(kind, embed_dim=width, num_heads=1, batch_first=True))
            continue
        new_width = draw(sizes)
        if kind is nn.Linear:
            chain.append(make(kind, in_features=width, out_features=new_width))
            width = new_width
        else:
            both_directions = draw(st.booleans())
            chain.append(
                make(
                    kind,
                    input_size=width,
                    hidden_size=new_width,
                    batch_first=True,
                    bidirectional=both_directions,
                )
            )
            width = 2 * new_width if both_directions else new_width
    head = make(nn.Linear, in_features=width, out_features=vocabulary)
    if tied and head.weight.shape == embedding.weight.shape:
        head.weight = embedding.weight
    return [*chain, head]
