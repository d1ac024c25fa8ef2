"""Weights at the edge: each works with finite numbers, or is refused by name with what to do."""

import copy
import math

import pytest
import torch
from helpers.holder import Holder, exact, held, norm_of, original_of, used
from helpers.reference import Matrix, rows_first
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import snparam
from snparam.testing import weights
from snparam.testing.tensors import DTYPES, FORMATS, SPECTRA, weight_with

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def upstream_for(weight, seed=0):
    """A gradient whose share of the weight's, G / σ, can be represented whatever σ is."""
    info = torch.finfo(weight.dtype)
    sigma = float(exact(weight)[0])
    size = min(1.0, 1e-3 * info.max * sigma) if sigma > 0 else 1.0
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if weight.is_complex() else torch.float64
    noise = torch.randn(weight.shape, generator=generator, dtype=wide)
    return (size * noise / noise.abs().max()).to(weight.dtype)


@settings(max_examples=300)
@given(
    weight=weights(),
    num_svs=st.integers(1, 3),
    num_itrs=st.integers(1, 2),
    training=st.booleans(),
    eps=st.sampled_from((0.0, 1e-12)),
)
def test_every_weight_gives_finite_output_gradient_and_state(
    weight, num_svs, num_itrs, training, eps
):
    num_svs = min(num_svs, *weight.flatten(1).shape)
    holder = held(weight, num_svs, num_itrs, eps=eps).train(training)
    norm, original = norm_of(holder), original_of(holder)
    upstream = upstream_for(weight)
    for _ in range(2):
        output = holder()
        assert output.dtype == weight.dtype
        assert output.shape == weight.shape
        # With the classic floor, a weight of σ below it is divided by less and less.
        if eps == 0:
            assert torch.isfinite(output).all()
            (gradient,) = torch.autograd.grad(output, original, upstream)
            assert torch.isfinite(gradient).all()
            assert gradient.dtype == weight.dtype
        assert torch.isfinite(norm.u).all()
        assert torch.isfinite(norm.sv).all()
        assert (torch.linalg.vector_norm(norm.u, dim=-1) <= 1 + 1e-5).all()
    if not weight.any():
        assert not output.any()
        torch.testing.assert_close(gradient if eps == 0 else upstream, upstream)


@settings(max_examples=200)
@given(
    weight=weights(dtypes=FLOATS, scales=(1.0, 1e-3, 1e3)),
    seed=st.integers(0, 99),
    training=st.booleans(),
)
def test_the_gradient_is_that_of_the_definition_in_float64(weight, seed, training):
    """(G − ⟨G, W/σ⟩ u vᵀ) / σ, in every dtype and memory format, to that dtype's rounding."""
    holder = held(weight).train(training)
    norm = norm_of(holder)
    u = weight_with("gaussian", tuple(norm.u[0].shape), seed=seed, dtype=norm.u.dtype)
    norm.u[0].copy_(u)
    wide = weight.to(torch.float64, copy=True).requires_grad_()
    # A u that W hardly reaches has a direction that is rounding, in any precision.
    assume(weight.any())
    assume((u.double() @ rows_first(wide)).norm() >= 0.1 * exact(weight)[0])
    upstream = upstream_for(weight)
    state = Matrix(u.double(), norm.sv[0].double(), eps=0.0)
    right_output = state.normalised(rows_first(wide), training).reshape(weight.shape)
    (right,) = torch.autograd.grad(right_output, wide, upstream.double())
    output = holder()
    (found,) = torch.autograd.grad(output, original_of(holder), upstream)
    right_output = right_output.detach()
    length = float(right_output.norm())
    sigma = float(weight.double().norm()) / length
    # Both are rounded once to the weight's dtype. The gradient is a difference of terms of the size
    # of G / σ̂ and ‖W / σ̂‖ times that, computed in float32 at least.
    computed = 1e-10 if weight.dtype == torch.float64 else 2e-5
    info = torch.finfo(weight.dtype)
    size = float(upstream.double().norm()) / sigma * (1 + length)
    allowed = computed * size + info.eps * right.abs() + info.tiny
    assert ((found.double() - right).abs() <= allowed).all()
    allowed = computed * length + info.eps * right_output.abs() + info.tiny
    assert ((output.double() - right_output).abs() <= allowed).all()


# The list, one by one, with exact answers


SHAPES = [(1, 1), (1, 6), (6, 1), (4, 5), (5, 4), (3, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_spectrum_in_every_dtype_is_normalised(dtype, spectrum, shape):
    for memory in FORMATS:
        weight = weight_with(spectrum, shape, seed=2, scale=3.0, dtype=dtype, memory=memory)
        found = used(held(weight))
        sigma = exact(weight)[0]
        wide = torch.complex128 if dtype.is_complex else torch.float64
        right = weight.to(wide) / (sigma if sigma > 0 else 1.0)
        allowed = right.abs() * (1e-3 + torch.finfo(dtype).eps)
        assert ((found.to(wide) - right).abs() <= allowed).all()
        assert found.dtype == dtype


@pytest.mark.parametrize("num_svs", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e30])
def test_tiny_and_huge_weights_are_normalised_and_differentiated(scale, dtype, num_svs):
    """All-equal entries, where everything is known: W/σ is 1/√(mn), its gradient G − mean(G)."""
    rows, columns = 4, 3
    weight = torch.full((rows, columns), 1.0, dtype=dtype) * scale
    holder = held(weight, num_svs)
    even = (rows * columns) ** -0.5
    eps = torch.finfo(dtype).eps
    for _ in range(3):
        output = holder()
        # A weight of 1e-38 is subnormal: its own rounding, before anything is computed.
        assert (output - even).abs().max() <= 2 * even * (eps + 1e-6)
    upstream = upstream_for(weight)
    (gradient,) = torch.autograd.grad(output, original_of(holder), upstream)
    assert torch.isfinite(gradient).all()
    G = upstream.to(torch.promote_types(dtype, torch.float64))
    along = (G.conj() * even).sum().real * even
    right = (G - along) * even / float(weight.abs()[0, 0])
    atol = float(right.abs().max()) * (4 * eps + (1e-2 if scale < 1e-37 else 1e-5))
    torch.testing.assert_close(gradient.to(G.dtype), right, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")  # torch's own
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(5, 4), (3, 5)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
        (lambda: nn.Conv1d(4, 6, 3).requires_grad_(False), (2, 4, 5)),
    ],
)
def test_layers_compute_in_their_own_dtype(make, shape, dtype):
    torch.manual_seed(0)
    layer = snparam.register_sn(make().to(dtype), 2)
    frozen = not original_of(layer).requires_grad
    x = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    x = x.to(dtype).requires_grad_()
    for _ in range(2):
        output = layer(x)
    assert output.dtype == dtype
    output.abs().sum().backward()
    assert torch.isfinite(torch.view_as_real(x.grad) if dtype.is_complex else x.grad).all()
    gradient = original_of(layer).grad
    assert gradient is None if frozen else bool(torch.isfinite(gradient).all())


def test_a_frozen_weight_is_normalised_moves_its_state_and_has_no_graph():
    holder = Holder(weight_with("gaussian", (4, 5))).requires_grad_(False)
    snparam.register_sn(holder, name="weight", init="random")
    u = norm_of(holder).u.clone()
    assert not holder().requires_grad
    assert not torch.equal(norm_of(holder).u, u)
    original_of(holder).requires_grad_(True)
    assert holder().requires_grad


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)])
def test_one_row_or_column_is_divided_by_its_length(shape):
    weight = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape) * -1
    torch.testing.assert_close(used(held(weight)), weight / weight.norm())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_breaks_in_training_is_not_hidden_and_can_be_repaired(bad):
    """NaN in the weight shows in the output; the state survives it."""
    for num_svs in (1, 2):
        holder = held(weight_with("gaussian", (4, 5)), num_svs)
        good = original_of(holder).detach().clone()
        with torch.no_grad():
            original_of(holder)[1, 2] = bad
        try:
            assert not torch.isfinite(holder()).all()
        except RuntimeError:  # a QR decomposition of NaN may be refused
            assert num_svs > 1
        with torch.no_grad():
            original_of(holder).copy_(good)
        for _ in range(30):
            holder()
        assert float(exact(used(holder))[0]) == pytest.approx(1.0, abs=1e-3), num_svs


# Refused


def refused(error, *words):
    return pytest.raises(error, match="(?s)" + ".*".join(words))


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (2, 0, 3)])
def test_a_weight_without_entries_is_refused(shape):
    holder = Holder(torch.zeros(shape))
    name = rf"'weight' of Holder \({', '.join(map(str, shape))}\)"
    with refused(ValueError, name, "no entries", "leave this layer out"):
        snparam.register_sn(holder, name="weight")
    linear = nn.Linear(3, 1)
    linear.weight = nn.Parameter(torch.zeros(0, 3))
    with pytest.warns(UserWarning, match="no entries"):
        snparam.convert_model(nn.Sequential(linear))


REFUSALS = {
    "meta": (
        lambda: nn.Linear(3, 4, device="meta"),
        ValueError,
        [r"'weight' of Linear \(4, 3\)", "meta device", "load its values first"],
    ),
    "lazy": (
        lambda: nn.LazyLinear(4),
        ValueError,
        ["'weight' of LazyLinear", "uninitialised", "run one forward first"],
    ),
    "one dimension": (
        lambda: Holder(torch.ones(4)),
        ValueError,
        [r"'weight' of Holder \(4,\)", "1 dimension", "two or more dimensions"],
    ),
    "NaN": (
        lambda: Holder(torch.full((4, 3), math.nan)),
        ValueError,
        [r"'weight' of Holder \(4, 3\)", "NaN or inf", "repair"],
    ),
    "inf": (
        lambda: Holder(torch.full((4, 3), math.inf)),
        ValueError,
        [r"'weight' of Holder \(4, 3\)", "NaN or inf", "repair"],
    ),
    "sparse": (
        lambda: Holder(torch.eye(3).to_sparse()),
        TypeError,
        [r"'weight' of Holder \(3, 3\)", "layout", "dense"],
    ),
    "too many": (
        lambda: Holder(torch.ones(4, 3)),
        ValueError,
        [r"'weight' of Holder \(4, 3\)", "num_svs=4", "rows, columns.=3", "num_svs <= 3"],
        {"num_svs": 4},
    ),
    "blocks": (
        lambda: Holder(torch.ones(4, 3)),
        ValueError,
        [r"'weight' of Holder \(4, 3\)", "4 rows.*blocks=3", "divide the rows"],
        {"blocks": 3},
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_by_name_and_left_alone(case):
    make, error, words, *options = REFUSALS[case]
    module = make()
    before, hooks = dict(module.named_parameters()), len(module._forward_pre_hooks)
    with refused(error, *words):
        snparam.register_sn(module, name="weight", **(options[0] if options else {}))
    assert dict(module.named_parameters()).keys() == before.keys()
    assert all(p is before[n] for n, p in module.named_parameters())
    assert type(module) is type(make())
    assert len(module._forward_pre_hooks) == hooks


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_tensors_without_singular_values_are_refused(dtype):
    module = nn.Module()
    module.register_buffer("table", torch.ones(3, 4).to(dtype))
    with refused(TypeError, r"'table' of Module \(3, 4\)", str(dtype), "float64.*complex64"):
        snparam.register_sn(module, name="table")


def test_a_buffer_of_floats_can_be_registered():
    module = nn.Module()
    module.register_buffer("table", weight_with("gaussian", (3, 4), scale=5.0))
    snparam.register_sn(module, name="table")
    assert float(exact(used(module, "table"))[0]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_convert_model_names_every_weight_that_is_not_finite_and_changes_nothing(bad):
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Conv1d(2, 3, 1)), nn.Linear(4, 3))
    model[1][0].weight.data[0] = bad
    model[2].weight.data[0] = bad
    before = copy.deepcopy(model).state_dict()
    with pytest.raises(ValueError, match=r"1\.0\.weight") as caught:
        snparam.convert_model(model)
    assert "(3, 2, 1)" in str(caught.value)
    assert "2.weight" in str(caught.value)
    assert "0.weight'" in str(caught.value)
    assert list(model.state_dict()) == list(before)
    assert type(model[0]) is nn.Linear


def test_convert_model_skips_what_register_sn_refuses_and_says_why():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, device="meta"), nn.LazyLinear(3))
    plan = snparam.plan_conversion(model, 3)
    reasons = {row.weight: (row.decision, row.reason) for row in plan}
    assert reasons["0.weight"][0] == "convert"
    assert reasons["1.weight"][0] == "skip"
    assert "meta" in reasons["1.weight"][1]
    assert reasons["2.weight"][0] == "skip"
    assert "uninitialised" in reasons["2.weight"][1]
    snparam.convert_model(model, 3)
    assert list(snparam.singular_values(model)) == ["0.weight"]
