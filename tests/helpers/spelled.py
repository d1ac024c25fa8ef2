"""Layers under each spelling, and what tells whether two of them mean the same."""

import copy

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import spectral_norm as torch_hook

import snparam
from helpers.classic import classic
from helpers.holder import norm_of, original_of
from snparam.testing import assert_same_function

SPELLINGS = ("snparam", "plain", "torch", "torch-hook", "biggan")
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2}


def dominated(shape, dtype=torch.float64, axis=0, seed=0):
    """A weight with σ₂/σ₁ about 0.2, so that fifteen steps of power iteration are converged."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[axis], torch.Size(shape).numel() // shape[axis]
    top = torch.outer(*(torch.randn(n, generator=generator) for n in (rows, columns)))
    rest = torch.randn(rows, columns, generator=generator)
    matrix = 3 * top / torch.linalg.matrix_norm(top, 2)
    matrix = matrix + 0.5 * rest / torch.linalg.matrix_norm(rest, 2)
    others = [size for d, size in enumerate(shape) if d != axis]
    return matrix.reshape(rows, *others).movedim(0, axis).contiguous().to(dtype)


KINDS = {
    "linear": lambda a, b: nn.Linear(b, a),
    "conv": lambda a, b: nn.Conv2d(b, a, 2, bias=False),
    "transposed": lambda a, b: nn.ConvTranspose1d(b, a, 3),
    "embedding": lambda a, b: nn.Embedding(a, b),
    "bilinear": lambda a, b: nn.Bilinear(2, b, a),
}


@st.composite
def single_layers(draw, kinds=tuple(KINDS), dtypes=(torch.float32, torch.float64)):
    kind, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(dtypes))
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    layer = KINDS[kind](rows, columns).to(dtype)
    axis = 1 if kind == "transposed" else 0
    shape = tuple(layer.weight.shape)
    layer.weight.data = dominated(shape, dtype, axis, draw(st.integers(0, 5)))
    return layer


def inputs_of(layer):
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)
    generator = torch.Generator().manual_seed(1)
    dtype = next(layer.parameters()).dtype
    if isinstance(layer, nn.Bilinear):
        sizes = (layer.in1_features, layer.in2_features)
        return [torch.randn(3, n, generator=generator).to(dtype) for n in sizes]
    sizes = {
        nn.Linear: lambda: (3, layer.in_features),
        nn.Conv2d: lambda: (2, layer.in_channels, 4, 5),
        nn.ConvTranspose1d: lambda: (2, layer.in_channels, 4),
    }
    (size,) = (make() for kind, make in sizes.items() if isinstance(layer, kind))
    return torch.randn(*size, generator=generator).to(dtype)


def foreign(layer, spelling, num_svs=1):
    """A copy of a layer under an implementation of its own."""
    layer = copy.deepcopy(layer)
    dtype = layer.weight.dtype
    if spelling == "torch":
        torch_parametrizations.spectral_norm(layer)
    elif spelling == "torch-hook":
        torch_hook(layer)
    elif spelling == "biggan":
        layer = classic(layer, num_svs)
    return layer.to(dtype)


def run(layer):
    inputs = inputs_of(layer)
    return layer(*inputs) if isinstance(inputs, list) else layer(inputs)


def trained(layer, forwards=15):
    with torch.no_grad():
        for _ in range(forwards):
            run(layer)
    return layer


def blank(layer, **options):
    """The same layer with other values, converted."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return snparam.convert_model(layer, progress=False, **options)


def spelled(model, spelling, bake=True):
    if spelling == "snparam":
        return model.state_dict()
    if spelling == "plain":
        return snparam.plain_state_dict(model, bake)
    return snparam.state_dict_for(model, spelling)


def same_output(a, b, layer):
    inputs = inputs_of(layer)
    inputs = tuple(inputs) if isinstance(inputs, list) else (inputs,)
    tolerance = CLOSE[layer.weight.dtype]
    assert_same_function(a, b, inputs, rtol=tolerance, atol=tolerance)


def assert_exact_state(model, k):
    """u and sv are those of the weight, by a decomposition in float64."""
    norm, weight = norm_of(model), original_of(model).detach()
    axis = 1 if isinstance(model, nn.ConvTranspose1d) else 0
    matrix = weight.movedim(axis, 0).flatten(1).double()
    sv = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(norm.sv[0].double(), sv[:k], rtol=1e-3, atol=1e-4)
    found = torch.linalg.vector_norm(norm.u[0].double() @ matrix, dim=1)
    torch.testing.assert_close(found, sv[:k], rtol=1e-3, atol=1e-3)
    gram = norm.u[0].double() @ norm.u[0].double().T
    torch.testing.assert_close(gram, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-3)


def matrix_shape(layer):
    axis = 1 if isinstance(layer, nn.ConvTranspose1d) else 0
    return layer.weight.shape[axis], layer.weight.numel() // layer.weight.shape[axis]


def tied():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    return model
