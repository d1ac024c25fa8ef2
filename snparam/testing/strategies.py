"""The Hypothesis strategies for single tensors and single layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from snparam.layers.table import layouts_of
from snparam.testing.tensors import DTYPES, FORMATS, SPECTRA, weight_with

Draw: TypeAlias = Any  # hypothesis's DrawFn, whose type hides that of what it draws
Shapes: TypeAlias = st.SearchStrategy[tuple[int, ...]] | Sequence[tuple[int, ...]] | None

# Largest singular values close to both ends of each dtype's range: at the lower end squares
# underflow and entries are subnormal, at the upper end squares and sums overflow.
_EXTREMES: Mapping[torch.dtype, tuple[float, float]] = {torch.float16: (1e-6, 1e4)}
_WIDE_EXTREMES = (1e-38, 1e30)

# Spectra of a layer's weights; the first is the layer's own initialisation.
LAYER_SPECTRA = ("initial", *SPECTRA)
# Largest singular values of a layer's weights whose spectrum is not the initial one: far enough
# from 1 that normalising changes the function, and close enough that a network's output is of order
# one.
_LAYER_SCALES = (3.0, 0.3)


def weights(
    *,
    shapes: Shapes = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    spectra: Sequence[str] = SPECTRA,
    scales: Sequence[float] | None = None,
    formats: Sequence[str] = FORMATS,
    max_side: int = 8,
) -> st.SearchStrategy[Tensor]:
    """Return a strategy for tensors whose spectra break power iterations.

    Examples shrink towards the first of each choice, the smallest shape and seed 0.

    Args:
        shapes: a strategy for shapes, or shapes to choose from. None (the default): two to five
            dimensions, the first two up to `max_side` and the others up to 3, so that an example
            costs microseconds; 1 × n and n × 1 come often.
        dtypes: dtypes to choose from. Default: float32, float64, bfloat16, float16, complex64.
        spectra: spectra to choose from; see `snparam.testing.tensors.weight_with`. Default: all.
        scales: largest singular values to choose from. None (the default): 1, 1e-3, 1e3 and the
            ends of the dtype's range, 1e-38 and 1e30 (float16: 1e-6 and 1e4).
        formats: memory formats to choose from: `"contiguous"`, `"channels_last"` (only meaningful
            for 4 and 5 dimensions), `"transposed"`, `"strided"`. Default: all.
        max_side: largest number of rows, and of columns or input channels.

    Raises:
        ValueError: for an unknown spectrum or format, with those that are known.
    """
    check_choice("spectra", spectra, SPECTRA)
    check_choice("formats", formats, FORMATS)
    return _weights(_shapes(shapes, max_side), dtypes, spectra, scales, formats)


@st.composite
def _weights(
    draw: Draw,
    shapes: st.SearchStrategy[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    spectra: Sequence[str],
    scales: Sequence[float] | None,
    formats: Sequence[str],
) -> Tensor:
    dtype = draw(st.sampled_from(dtypes))
    if scales is None:
        scales = (1.0, 1e-3, 1e3, *_EXTREMES.get(dtype, _WIDE_EXTREMES))
    return weight_with(
        draw(st.sampled_from(spectra)),
        draw(shapes),
        seed=draw(_seeds()),
        scale=draw(st.sampled_from(scales)),
        dtype=dtype,
        memory=draw(st.sampled_from(formats)),
    )


def layers(
    *,
    types: Sequence[type[nn.Module]] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    spectra: Sequence[str] = LAYER_SPECTRA,
    max_side: int = 6,
) -> st.SearchStrategy[nn.Module]:
    """Return a strategy for layers of torch's eligible types, in all forms of their weights.

    The forms are groups, biases, several recurrent layers, both directions, `proj_size`, attention
    with one projection weight and with three, and channels_last convolutions. `example_inputs`
    makes inputs for a layer.

    Args:
        types: layer types to choose from. None (the default): all of torch's eligible types.
        dtypes: dtypes to choose from. Default: float32, which every layer computes in on every
            device.
        spectra: spectra of the weights to choose from; `"initial"` is the layer's own
            initialisation. Default: all.
        max_side: largest number of features, channels or embeddings (of features a head, in
            attention; rounded up to a multiple of the groups, in convolutions).

    Raises:
        ValueError: for a type that is not eligible, with those that are, or an unknown spectrum.
    """
    check_choice("spectra", spectra, LAYER_SPECTRA)
    chosen = list(_LAYERS) if types is None else list(types)
    for kind in chosen:
        if kind not in _LAYERS:
            known = ", ".join(known.__name__ for known in _LAYERS)
            raise ValueError(f"layers: {kind.__name__} is not one of {known}")
    return _layers(chosen, dtypes, spectra, max_side)


@st.composite
def _layers(
    draw: Draw,
    types: Sequence[type[nn.Module]],
    dtypes: Sequence[torch.dtype],
    spectra: Sequence[str],
    max_side: int,
) -> nn.Module:
    kind = draw(st.sampled_from(types))
    dtype = draw(st.sampled_from(dtypes))
    arguments = _LAYERS[kind](draw, st.integers(1, max_side))
    return make_layer(draw, kind, arguments, dtype, spectra)


def make_layer(
    draw: Draw,
    kind: type[nn.Module],
    arguments: Mapping[str, Any],
    dtype: torch.dtype,
    spectra: Sequence[str],
) -> nn.Module:
    """Make a layer whose weights have a drawn spectrum.

    Its other parameters are as it initialises them.

    Args:
        draw: Hypothesis's function that draws from a strategy.
        kind: type of the layer.
        arguments: keyword arguments of the type.
        dtype: dtype of the parameters.
        spectra: spectra to choose from, see `layers`.
    """
    seed = draw(_seeds())
    with _default_generator(seed):
        layer = kind(**arguments).to(dtype)
    if kind in (nn.Conv2d, nn.ConvTranspose2d) and draw(st.booleans()):
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    spectrum = draw(st.sampled_from(spectra))
    if spectrum == "initial":
        return layer
    scale = draw(st.sampled_from(_LAYER_SCALES))
    with torch.no_grad():
        for index, name in enumerate(layouts_of(layer)):
            tensor = layer.get_parameter(name)
            options = {"seed": seed + index, "scale": scale, "dtype": dtype}
            tensor.copy_(weight_with(spectrum, tensor.shape, **options))
    return layer


def _linear(draw: Draw, sizes: st.SearchStrategy[int]) -> dict[str, Any]:
    return {"in_features": draw(sizes), "out_features": draw(sizes), "bias": draw(st.booleans())}


def _bilinear(draw: Draw, sizes: st.SearchStrategy[int]) -> dict[str, Any]:
    names = ("in1_features", "in2_features", "out_features")
    return {name: draw(sizes) for name in names}


def _convolution(dimensions: int) -> Callable[[Draw, st.SearchStrategy[int]], dict[str, Any]]:
    def arguments(draw: Draw, sizes: st.SearchStrategy[int]) -> dict[str, Any]:
        groups = draw(st.integers(1, 3))
        return {
            "in_channels": groups * -(-draw(sizes) // groups),
            "out_channels": groups * -(-draw(sizes) // groups),
            "kernel_size": tuple(draw(st.integers(1, 3)) for _ in range(dimensions)),
            "dilation": draw(st.integers(1, 2)),
            "groups": groups,
            "bias": draw(st.booleans()),
        }

    return arguments


def _embedding(draw: Draw, sizes: st.SearchStrategy[int]) -> dict[str, Any]:
    return {"num_embeddings": draw(sizes), "embedding_dim": draw(sizes)}


def _attention(draw: Draw, sizes: st.SearchStrategy[int]) -> dict[str, Any]:
    heads = draw(st.integers(1, 2))
    arguments = {
        "embed_dim": heads * draw(sizes),
        "num_heads": heads,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if draw(st.booleans()):  # kdim and vdim give three projection weights, even if the sizes agree
        arguments |= {"kdim": draw(sizes), "vdim": draw(sizes)}
    return arguments


def _recurrent(draw: Draw, sizes: st.SearchStrategy[int]) -> dict[str, Any]:
    return {
        "input_size": draw(sizes),
        "hidden_size": draw(sizes),
        "num_layers": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }


def _lstm(draw: Draw, sizes: st.SearchStrategy[int]) -> dict[str, Any]:
    arguments = _recurrent(draw, sizes)
    if arguments["hidden_size"] > 1:
        arguments["proj_size"] = draw(st.integers(0, arguments["hidden_size"] - 1))
    return arguments


def _cell(draw: Draw, sizes: st.SearchStrategy[int]) -> dict[str, Any]:
    return {"input_size": draw(sizes), "hidden_size": draw(sizes), "bias": draw(st.booleans())}


_LAYERS: Mapping[type[nn.Module], Callable[[Draw, st.SearchStrategy[int]], dict[str, Any]]] = {
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.Conv1d: _convolution(1),
    nn.Conv2d: _convolution(2),
    nn.Conv3d: _convolution(3),
    nn.ConvTranspose1d: _convolution(1),
    nn.ConvTranspose2d: _convolution(2),
    nn.ConvTranspose3d: _convolution(3),
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    nn.MultiheadAttention: _attention,
    nn.RNN: _recurrent,
    nn.LSTM: _lstm,
    nn.GRU: _recurrent,
    nn.RNNCell: _cell,
    nn.LSTMCell: _cell,
    nn.GRUCell: _cell,
}


def check_choice(option: str, names: Sequence[str], choices: Sequence[str]) -> None:
    """Check that every name a caller chose is a known one.

    Raises:
        ValueError: naming the option, the first unknown name, and the known ones.
    """
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise ValueError(f"{option}: {unknown[0]!r} is not one of {', '.join(choices)}")


def _seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def _shapes(shapes: Shapes, max_side: int) -> st.SearchStrategy[tuple[int, ...]]:
    if shapes is None:
        sides, kernel = st.integers(1, max_side), st.lists(st.integers(1, 3), max_size=3)
        return st.tuples(sides, sides, kernel).map(lambda t: (t[0], t[1], *t[2]))
    if isinstance(shapes, st.SearchStrategy):
        return shapes
    return st.sampled_from(shapes)


@contextlib.contextmanager
def _default_generator(seed: int) -> Iterator[None]:
    """Seed torch's default generator, from which layers initialise themselves.

    Its state is put back afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
