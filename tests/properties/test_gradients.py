"""Derivatives of the normalised weight: of any order, forward and backward, and under torch.func.

u and v are constants to autograd by definition, so that σ is the linear function Re uᴴ W v of the
weight. Finite differences know nothing of that definition: a layer's own forward would step u and v
along with the weight. `fixed` therefore builds the function of the definition, W / Re(uᴴ W v) with
given u and v, from the division that layers use; its value follows W, as finite differences need.
"""

import pytest
import torch
from helpers.holder import held, norm_of, original_of
from helpers.reference import Layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import snparam
from snparam.constraints.division import Divisor, divide
from snparam.matrices.views import Layout
from snparam.testing import example_inputs, layers, weights
from snparam.testing.tensors import weight_with

# torch's own: about what it does itself at the first use of forward mode, and about `Bilinear`.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

# Shape, layout, blocks: every kind of view.
VIEWS = {
    "linear": ((3, 4), Layout(), 1),
    "row": ((1, 5), Layout(), 1),
    "column": ((4, 1), Layout(), 1),
    "gates": ((4, 3), Layout(), 2),
    "convolution": ((3, 2, 1, 2), Layout(), 1),
    "grouped convolution": ((4, 1, 2, 2), Layout(), 2),
    "transposed convolution": ((2, 3, 2), Layout("transposed_conv"), 1),
    "grouped transposed convolution": ((4, 2, 2), Layout("transposed_conv", groups=2), 1),
    "blocks of a transposed convolution": ((4, 2, 2), Layout("transposed_conv", groups=2), 2),
    "input first": ((3, 4), Layout("columns"), 1),
    "experts": ((2, 3, 2), Layout("bare"), 2),
}


def fixed(name, dtype, memory="contiguous", plain=False):
    """The normalised weight as a function of the weight, with u and v fixed; and a weight."""
    shape, layout, blocks = VIEWS[name]
    view = layout.view(shape, blocks)
    weight = weight_with("gaussian", shape, seed=len(name), scale=2.0, dtype=dtype, memory=memory)
    # Not the singular vectors, where derivatives of σ by u and v vanish and would not be missed.
    u, v = (
        nn.functional.normalize(weight_with("gaussian", (blocks, n), seed=n, dtype=dtype))
        for n in view.matrices[1:]
    )

    def sigma(W):
        return torch.einsum("bi,bij,bj->b", u.conj(), view.to_matrices(W), v).real

    # σ has to be positive: turn u.
    u = u * torch.sgn(sigma(weight)).unsqueeze(-1)

    def normalised(W):
        divisor = sigma(W.detach())
        divisor = divisor.reshape(()) if blocks == 1 else divisor
        return divide(W, Divisor(divisor), u, v, view, plain=plain)

    return normalised, weight.requires_grad_()


@pytest.mark.parametrize("memory", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", VIEWS)
def test_first_and_second_derivatives(name, dtype, memory):
    normalised, weight = fixed(name, dtype, memory)
    assert gradcheck(normalised, weight, check_batched_grad=True)
    assert gradgradcheck(normalised, weight)


@pytest.mark.parametrize("name", VIEWS)
def test_first_and_second_derivatives_by_plain_operations(name):
    normalised, weight = fixed(name, torch.float64, plain=True)
    assert gradcheck(normalised, weight, check_batched_grad=True)
    assert gradgradcheck(normalised, weight)


@pytest.mark.parametrize("slope", [1.0, 0.4])
@pytest.mark.parametrize("name", ["linear", "gates"])
def test_derivatives_with_a_gain_and_another_slope(name, slope):
    """γ W / d with d = 0.3 + slope · σ, by W and by γ."""
    shape, layout, blocks = VIEWS[name]
    view = layout.view(shape, blocks)
    weight = weight_with("gaussian", shape, dtype=torch.float64).requires_grad_()
    u, v = (
        nn.functional.normalize(weight_with("gaussian", (blocks, n), dtype=torch.float64))
        for n in view.matrices[1:]
    )

    def normalised(W, gain):
        sigma = torch.einsum("bi,bij,bj->b", u, view.to_matrices(W.detach()), v)
        divisor = 0.3 + slope * (sigma.reshape(()) if blocks == 1 else sigma)
        return divide(W, Divisor(divisor, slope, gain), u, v, view)

    gain = torch.linspace(0.5, 2.0, blocks).double().requires_grad_()
    assert gradcheck(normalised, (weight, gain), check_batched_grad=True)
    assert gradgradcheck(normalised, (weight, gain))
    assert gradcheck(normalised, (weight, gain), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", VIEWS)
def test_forward_mode_derivatives(name, dtype):
    normalised, weight = fixed(name, dtype)
    assert gradcheck(normalised, weight, check_forward_ad=True, check_backward_ad=False)
    assert gradgradcheck(
        normalised,
        weight,
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
    )


@settings(max_examples=60)
@given(
    weight=weights(dtypes=(torch.float64,), scales=(1.0,), spectra=("gaussian", "decaying", "row")),
    num_svs=st.integers(1, 2),
    training=st.booleans(),
)
def test_second_derivatives_of_a_layer_equal_the_references(weight, num_svs, training):
    """A gradient penalty: the derivative of the squared norm of a derivative."""
    num_svs = min(num_svs, *weight.flatten(1).shape)
    holder = held(weight, num_svs).train(training)
    reference = Layer(original_of(holder), norm_of(holder).u)
    generator = torch.Generator().manual_seed(7)
    target = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)

    def penalty(used, original):
        (slope,) = torch.autograd.grad(
            (torch.tanh(used) * target).sum(), original, create_graph=True
        )
        (second,) = torch.autograd.grad(slope.square().sum(), original)
        return slope.detach(), second

    mine = penalty(holder(), original_of(holder))
    right = penalty(reference.normalised(training), reference.weight)
    # Sums of terms of this size: the differences in them may cancel.
    size = (target.norm() + weight.norm()) / norm_of(holder).sv[0, 0]
    for order, (a, b) in enumerate(zip(mine, right, strict=True), 1):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(size**order * (1 + size)))


# torch.func


def functional(layer):
    """A layer as a function of its parameters and an input; and the parameters."""
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}

    def call(parameters, *inputs):
        output = torch.func.functional_call(layer, parameters, inputs)
        return output[0] if isinstance(output, tuple) else output

    return call, parameters


KINDS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.RNNCell,
    nn.LSTMCell,
)
CONVERTED = layers(types=KINDS, dtypes=(torch.float64,), max_side=4)


def assert_same_tree(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(layer=CONVERTED, blocks=st.sampled_from((None, "auto")))
def test_func_grad_equals_backward(layer, blocks):
    snparam.register_sn(layer, blocks=blocks).eval()
    call, parameters = functional(layer)
    inputs = example_inputs(layer)

    def loss(parameters):
        return torch.tanh(call(parameters, *inputs)).sum()

    found = torch.func.grad(loss)(parameters)
    tracked = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    loss(tracked).backward()
    right = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in tracked.items()}
    assert_same_tree(found, right)


@settings(max_examples=60)
@given(layer=CONVERTED, blocks=st.sampled_from((None, "auto")))
def test_func_jvp_is_the_transpose_of_vjp(layer, blocks):
    snparam.register_sn(layer, blocks=blocks).eval()
    call, parameters = functional(layer)
    inputs = example_inputs(layer)
    generator = torch.Generator().manual_seed(3)

    def like(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    tangents = {name: like(p) for name, p in parameters.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        output, forward = torch.func.jvp(lambda p: call(p, *inputs), (parameters,), (tangents,))
        _, transposed = torch.func.vjp(lambda p: call(p, *inputs), parameters)
        cotangent = like(output)
        (backward,) = transposed(cotangent)
    left = (forward * cotangent).sum()
    right = sum((tangents[name] * backward[name]).sum() for name in parameters)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(
    layer=layers(types=KINDS[:4], dtypes=(torch.float64,), max_side=4),
    blocks=st.sampled_from((None, "auto")),
)
def test_vmap_of_grad_gives_the_gradient_of_each_sample(layer, blocks):
    snparam.register_sn(layer, blocks=blocks).eval()
    call, parameters = functional(layer)
    inputs = example_inputs(layer, batch=3)

    def loss(parameters, *sample):
        return torch.tanh(call(parameters, *(x.unsqueeze(0) for x in sample))).sum()

    in_dims = (None, *(0 for _ in inputs))
    together = torch.func.vmap(torch.func.grad(loss), in_dims=in_dims)(parameters, *inputs)
    alone = [torch.func.grad(loss)(parameters, *(x[i] for x in inputs)) for i in range(3)]
    assert_same_tree(together, {n: torch.stack([g[n] for g in alone]) for n in parameters})


@settings(max_examples=40)
@given(
    layer=layers(types=KINDS[:4], dtypes=(torch.float64,), max_side=4),
    blocks=st.sampled_from((None, "auto")),
    num_svs=st.integers(1, 2),
)
def test_vmap_over_an_ensemble_of_weights_equals_the_loop(layer, blocks, num_svs):
    views = [snparam.register_sn(layer, blocks=blocks).parametrizations.weight[0].view.matrices]
    snparam.remove_sn(layer, bake=False)
    snparam.register_sn(layer, min(num_svs, *views[0][1:]), blocks=blocks).eval()
    call, parameters = functional(layer)
    inputs = example_inputs(layer)
    members = [
        {name: p + 0.1 * index * torch.cos(p) for name, p in parameters.items()}
        for index in range(3)
    ]
    stacked = {name: torch.stack([m[name] for m in members]) for name in parameters}
    in_dims = (0, *(None for _ in inputs))
    together = torch.func.vmap(call, in_dims=in_dims)(stacked, *inputs)
    torch.testing.assert_close(
        together, torch.stack([call(m, *inputs) for m in members]), rtol=1e-9, atol=1e-9
    )


def test_func_transforms_work_while_a_model_trains_frozen():
    """The state cannot move inside a transform; `frozen` keeps a training model's still."""
    layer = snparam.register_sn(nn.Linear(4, 3).double(), 2)
    call, parameters = functional(layer)
    x = torch.randn(5, 4, dtype=torch.float64)
    u = norm_of(layer).u.clone()
    with snparam.frozen(layer):
        jacobian = torch.func.jacrev(call)(parameters, x)["parametrizations.weight.original"]
        forward = torch.func.jacfwd(call)(parameters, x)["parametrizations.weight.original"]
    torch.testing.assert_close(jacobian, forward)
    assert torch.equal(norm_of(layer).u, u)


def test_functional_call_takes_the_state_as_it_takes_parameters():
    """In training mode, with u and sv passed in, the moved state is in what was passed."""
    layer = snparam.register_sn(nn.Linear(4, 3), init="random")
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    x = torch.randn(5, 4)
    output = torch.func.functional_call(layer, state, (x,))
    assert not torch.equal(
        state["parametrizations.weight.0.u"], before["parametrizations.weight.0.u"]
    )
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(output, layer(x))
    assert torch.equal(norm_of(layer).u, state["parametrizations.weight.0.u"])
