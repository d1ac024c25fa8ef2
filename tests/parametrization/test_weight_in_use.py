"""The weight that SpectralNorm computes: dtypes, zeros, assigned weights, memory formats."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.holder import Holder, exact, held, norm_of, original_of, used
from helpers.states import randomise, states
from hypothesis import given
from torch import nn

import snparam
from snparam import SpectralNorm
from snparam.testing import layers
from snparam.testing.tensors import weight_with

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


# Dtypes


LOW = {torch.float16: "half", torch.bfloat16: "bfloat16"}


@pytest.mark.parametrize("num_svs", [1, 2])
@pytest.mark.parametrize("dtype", LOW)
def test_a_model_moved_to_half_precision_stays_normalised(dtype, num_svs):
    torch.manual_seed(0)
    layer = snparam.register_sn(nn.Linear(12, 10), num_svs)
    getattr(layer, LOW[dtype])()
    x = torch.randn(3, 12, dtype=dtype)
    for _ in range(5):
        output = layer(x)
    assert output.dtype == dtype
    assert layer.weight.dtype == dtype
    output.float().sum().backward()
    assert original_of(layer).grad.dtype == dtype
    assert torch.isfinite(original_of(layer).grad).all()
    weight = original_of(layer).detach().double()
    right = weight / exact(weight)[0]
    eps = torch.finfo(dtype).eps
    assert ((used(layer).double() - right).abs() <= right.abs() * (1e-3 + eps)).all()


def test_a_model_moved_to_float64_computes_in_float64():
    layer = snparam.register_sn(nn.Linear(12, 10)).double()
    for _ in range(300):
        layer(torch.ones(1, 12, dtype=torch.float64))
    assert norm_of(layer).u.dtype == torch.float64
    sigma = float(exact(used(layer))[0])
    assert abs(sigma - 1) <= 1e-9


def test_sv_and_u_follow_moves_and_keep_their_values():
    layer = snparam.register_sn(nn.Linear(12, 10), 3)
    sv = norm_of(layer).sv.clone()
    layer.bfloat16().float()
    torch.testing.assert_close(norm_of(layer).sv, sv, rtol=2**-8, atol=0)
    layer(torch.ones(1, 12))
    sigma = float(exact(original_of(layer))[0])
    assert float(norm_of(layer).sv[0, 0]) == pytest.approx(sigma, rel=64 * 2**-23)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("num_svs", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_neither_the_weight_nor_the_state(training, num_svs, blocks):
    torch.manual_seed(0)
    layer = snparam.register_sn(nn.Linear(12, 10), num_svs, blocks=blocks).train(training)
    randomise(layer)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.weight
        low = layer(x)
        assert torch.is_autocast_enabled("cpu")
    assert low.dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    assert torch.equal(weight, twin.weight)
    high = twin(x)
    assert torch.equal(norm_of(layer).u, norm_of(twin).u)
    assert torch.equal(norm_of(layer).sv, norm_of(twin).sv)
    torch.testing.assert_close(low.float(), high, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    assert original_of(layer).grad.dtype == torch.float32


def test_autocast_around_backward_changes_no_gradient():
    layer = snparam.register_sn(nn.Linear(12, 10))
    upstream = torch.randn(10, 12)
    with snparam.frozen(layer):
        (right,) = torch.autograd.grad(layer.weight, original_of(layer), upstream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            weight = layer.weight
            (found,) = torch.autograd.grad(weight, original_of(layer), upstream)
            weight = layer.weight
            (again,) = torch.autograd.grad(weight, original_of(layer), upstream, create_graph=True)
    assert torch.equal(found, right)
    torch.testing.assert_close(again, right)


# Zero


@pytest.mark.parametrize("options", [{}, {"num_svs": 2}, {"blocks": 2}, {"eps": 1e-12}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_zero_weight_stays_zero_and_passes_its_gradient_on(training, options):
    holder = held(torch.zeros(4, 3), **options).train(training)
    upstream = torch.arange(12.0).reshape(4, 3)
    for _ in range(3):
        weight = holder()
        assert not weight.any()
        (gradient,) = torch.autograd.grad(weight, original_of(holder), upstream)
        torch.testing.assert_close(gradient, upstream)
    assert torch.isfinite(norm_of(holder).u).all()
    assert not norm_of(holder).sv.any()


@pytest.mark.parametrize("options", [{}, {"num_svs": 2}, {"blocks": 2}, {"num_itrs": 2}], ids=str)
@pytest.mark.parametrize("forwards", [0, 1, 3])
@pytest.mark.parametrize(
    "learned",
    ["rows that sum to zero", "columns that sum to zero", "one row", "one column", "dense"],
)
def test_a_weight_that_starts_at_zero_is_normalised_once_it_learns(learned, forwards, options):
    """What it learns is often orthogonal to sums or to single units: after a LayerNorm the rows of
    a gradient sum to zero, below a softmax its columns do, and dead units give none. The estimate
    must not start from there: a σ̂ at rounding level would blow the weight up."""
    torch.manual_seed(forwards)
    holder = held(torch.zeros(8, 6), **options)
    for _ in range(forwards):
        holder()
    weight = torch.randn(8, 6) @ torch.diag(torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1, 0.1]))
    if learned == "rows that sum to zero":
        weight -= weight.mean(1, keepdim=True)
    elif learned == "columns that sum to zero":
        weight -= weight.mean(0, keepdim=True)
    elif learned == "one row":
        weight = F.pad(weight[:1], (0, 0, 2, 5)) + F.pad(weight[:1], (0, 0, 6, 1))
    elif learned == "one column":
        weight = F.pad(weight[:, :1], (3, 2))
    with torch.no_grad():
        original_of(holder).copy_(1e-3 * weight)
    first = float(torch.linalg.matrix_norm(holder().detach(), 2))
    assert 0.99 <= first <= 30.0
    for _ in range(60):
        holder()
    blocks = used(holder).chunk(options.get("blocks", 1))
    assert all(float(exact(block)[0]) == pytest.approx(1.0, abs=1e-3) for block in blocks)


# Assigning


@given(layer=layers(dtypes=(torch.float64,)))
def test_assigning_a_weight_stores_it_and_converges_anew(layer):
    snparam.register_sn(layer)
    for name, norm, original in states(layer):
        owner, _, tensor = name.rpartition(".")
        owner = layer.get_submodule(owner)
        value = weight_with(
            "gaussian", tuple(original.shape), seed=9, scale=5.0, dtype=torch.float64
        )
        address = norm.u.data_ptr()
        setattr(owner, tensor, value)
        assert owner.parametrizations[tensor].original is original
        assert torch.equal(original, value)
        assert norm.u.data_ptr() == address
        norm.eval()
        stack = norm.view.to_matrices(getattr(owner, tensor).detach())
        assert float(exact(stack[0])[0]) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.ones(3, 4), ValueError, r"a tensor of shape \(3, 4\); assign .* \(4, 3\)"),
        (torch.full((4, 3), math.nan), ValueError, "a tensor with NaN or inf"),
        (torch.full((4, 3), math.inf), ValueError, "a tensor with NaN or inf"),
        (torch.eye(4, 3).double(), ValueError, "a tensor of torch.float64; .* torch.float32"),
        (3, TypeError, r"an int; assign a tensor of shape \(4, 3\)"),
        (None, TypeError, r"None; assign a tensor of shape \(4, 3\)"),
        ([[1.0] * 3] * 4, TypeError, "a list; assign"),
        (torch.ones(4, 3).numpy(), TypeError, "an? ndarray; assign"),
    ],
    ids=["shape", "NaN", "inf", "dtype", "int", "None", "list", "ndarray"],
)
@pytest.mark.parametrize("update", ["forward", "step"])
def test_what_cannot_be_assigned_is_refused_and_changes_nothing(value, error, words, update):
    layer = snparam.register_sn(nn.Linear(3, 4), update=update)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(error, match=rf"SpectralNorm on 'weight' of Linear \(4, 3\): .*{words}"):
        layer.weight = value
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


# Memory


@pytest.mark.parametrize("options", [{}, {"update": "step"}, {"num_svs": 2}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_change_of_memory_format_changes_nothing_else(training, options):
    torch.manual_seed(0)
    conv = snparam.register_sn(nn.Conv2d(3, 4, (2, 3), dtype=torch.float64), **options)
    twin = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    for layer in (conv, twin):
        layer.train(training)
        layer(torch.ones(1, 3, 5, 5, dtype=torch.float64)).square().sum().backward()
    a, b = original_of(conv), original_of(twin)
    assert not b.is_contiguous()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(used(conv), used(twin), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm_of(conv).u, norm_of(twin).u)


@pytest.mark.parametrize("memory", ["channels_last", "transposed", "strided"])
def test_the_weight_in_use_lies_as_the_weight_does(memory):
    weight = weight_with("gaussian", (4, 3, 2, 2), memory=memory)
    holder = held(weight)
    if memory == "strided":
        assert holder().is_contiguous()
    else:
        assert holder().stride() == weight.stride()


def test_the_class_is_public_and_documented():
    assert isinstance(norm_of(held(torch.ones(2, 2))), SpectralNorm)
    assert isinstance(held(torch.ones(2, 2)), Holder)


def test_a_sparse_gradient_of_the_weight_in_use_is_refused_as_the_documentation_says():
    layer = snparam.register_sn(nn.Embedding(6, 3))
    output = F.embedding(torch.tensor([1, 2]), layer.weight, sparse=True)
    with pytest.raises(RuntimeError, match="sparse"):
        output.sum().backward()
    assert original_of(layer).grad is None
