"""Converting what is under torch's own normalisations already."""

import copy

import pytest
import torch
from helpers.holder import exact, norm_of, original_of
from helpers.spelled import foreign, inputs_of, same_output, single_layers, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils import weight_norm as torch_weight_norm

import snparam
from snparam.conversion import convert as conversion
from snparam.layers import torch_reading as reading
from snparam.layers.torch_norms import torch_spectral_norm_on
from snparam.matrices.views import Layout

KINDS = ("torch", "torch-hook")


def their_u(layer):
    return torch_spectral_norm_on(layer, "weight").u


@given(
    layer=single_layers(),
    kind=st.sampled_from(KINDS),
    num_svs=st.integers(1, 3),
    init=st.sampled_from(["converged", "random"]),
)
def test_a_layer_is_taken_over_with_its_parameter_its_state_and_its_function(
    layer, kind, num_svs, init
):
    model = trained(foreign(layer, kind))
    before = copy.deepcopy(model.state_dict())
    u, parameters = their_u(model).clone(), [id(p) for p in model.parameters()]
    with torch.no_grad():
        model.eval()
        twin = foreign(layer, kind)
        twin.load_state_dict(before)
        model.train()
    assert snparam.convert_model(model, num_svs, init=init, progress=False) is model
    assert sorted(parameters) == sorted(id(p) for p in model.parameters())
    assert torch_spectral_norm_on(model, "weight") is None
    assert torch.equal(norm_of(model).u[0, 0], u)
    top = exact(
        layer.weight.movedim(1, 0) if isinstance(layer, nn.ConvTranspose1d) else layer.weight
    )
    k = norm_of(model).u.shape[1]
    torch.testing.assert_close(norm_of(model).sv[0].double(), top[:k], rtol=1e-3, atol=1e-4)
    same_output(model, twin, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_torchs_is_left_behind(kind):
    layer = nn.Linear(4, 3)
    cls, attributes = type(layer), set(vars(layer))
    model = foreign(layer, kind)
    snparam.restore_model(snparam.convert_model(model), bake=False)
    assert type(model) is cls
    assert set(vars(model)) == attributes
    assert not any(value for name, value in vars(model).items() if name.endswith("_hooks"))
    assert set(model.state_dict()) == {"weight", "bias"}
    assert torch.equal(model.weight, layer.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_built_before_still_trains_the_weight(kind):
    model = foreign(nn.Linear(4, 3), kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snparam.convert_model(model)
    before = original_of(model).detach().clone()
    model(torch.ones(1, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(original_of(model), before)


def test_a_dim_of_the_users_own_is_respected():
    """Square, so that only the axis tells which vector is which."""
    layer = nn.Linear(5, 5)
    model = torch_parametrizations.spectral_norm(copy.deepcopy(layer), dim=1)
    for _ in range(300):
        model(torch.ones(1, 5))
    v = torch_spectral_norm_on(model, "weight").v.clone()
    snparam.convert_model(model)
    assert torch.equal(norm_of(model).u[0, 0], v)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_says_so_and_changes_nothing(kind):
    model = nn.Sequential(foreign(nn.Linear(4, 3), kind), nn.Linear(3, 2))
    before, hooks = list(model.state_dict()), list(model[0]._forward_pre_hooks)
    rows = snparam.plan_conversion(model, progress=False)
    assert [(row.weight, row.decision, row.reason) for row in rows] == [
        ("0.weight", "convert", "takes over torch's spectral norm"),
        ("1.weight", "convert", ""),
    ]
    assert rows.share == 1
    assert list(model.state_dict()) == before
    assert list(model[0]._forward_pre_hooks) == hooks
    assert [row.shape for row in rows] == [(3, 4), (2, 3)]


@pytest.mark.parametrize(
    ("kind", "what"), [("torch", "torch's spectral_norm"), ("torch-hook", "deprecated")]
)
def test_without_replace_it_is_skipped_with_the_reason(kind, what):
    model = nn.Sequential(foreign(nn.Linear(4, 3), kind), nn.Linear(3, 2))
    keys = list(model[0].state_dict())
    row = snparam.plan_conversion(model, replace=False, progress=False)[0]
    assert (row.weight, row.decision) == ("0.weight", "skip")
    assert what in row.reason
    snparam.convert_model(model, replace=False)
    assert list(model[0].state_dict()) == keys
    with pytest.raises(ValueError, match=r"'weight' of \w*Linear.*\(3, 4\).*replace=True"):
        snparam.register_sn(model[0], name="weight")


def test_excluded_weights_keep_torchs():
    model = nn.Sequential(foreign(nn.Linear(4, 3), "torch"), nn.Linear(3, 2))
    snparam.convert_model(model, exclude="0")
    assert torch_spectral_norm_on(model[0], "weight") is not None


def others():
    return {
        "parametrized weight_norm": torch_parametrizations.weight_norm(nn.Linear(4, 3)),
        "orthogonal": torch_parametrizations.orthogonal(nn.Linear(4, 3)),
        "spectral and more": parametrize.register_parametrization(
            torch_parametrizations.spectral_norm(nn.Linear(4, 3)), "weight", nn.Identity()
        ),
    }


WHY = {
    "parametrized weight_norm": ["a part of torch's weight_norm", "torch's weight_norm"],
    "orthogonal": ["torch's orthogonal"],
    "spectral and more": ["torch's spectral norm, Identity"],
}


@pytest.mark.parametrize("kind", WHY)
def test_other_parametrizations_are_skipped_with_their_reason(kind):
    model = nn.Sequential(others()[kind], nn.Linear(3, 2))
    keys = list(model[0].state_dict())
    rows = snparam.plan_conversion(model, progress=False)
    assert [row.decision for row in rows] == ["skip"] * len(WHY[kind]) + ["convert"]
    for row, why in zip(rows, WHY[kind], strict=False):
        assert why in row.reason
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert rows.share == 6 / matrices
    snparam.convert_model(model)
    assert list(model[0].state_dict()) == keys


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_deprecated_weight_norm_is_skipped_with_its_reason():
    model = nn.Sequential(torch_weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    rows = snparam.plan_conversion(model, progress=False)
    assert [row.weight for row in rows] == ["0.weight_g", "0.weight_v", "1.weight"]
    assert all("torch's weight_norm" in row.reason for row in rows[:2])
    keys = list(model[0].state_dict())
    snparam.convert_model(model)
    assert list(model[0].state_dict()) == keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forwards", [0, 1, 300])
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (nn.Linear(4, 6), {}),
        (nn.Linear(4, 6), {"blocks": 3}),
        (nn.Linear(4, 6), {"update": "step", "num_svs": 2}),
        (nn.Linear(4, 6), {"constraint": "gain", "gain": None}),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), {}),
        (nn.Linear(4, 6, dtype=torch.bfloat16), {}),
    ],
    ids=str,
)
def test_a_gain_keeps_the_function_that_was_normalised(kind, forwards, layer, options):
    """Whether torch's estimate has converged or not, and whatever it takes for the matrix."""
    model = trained(foreign(layer, kind), forwards)
    inputs = inputs_of(layer)
    before = model.eval()(inputs)
    snparam.convert_model(model, **{"gain": "learned", "progress": False, **options})
    close = 2e-2 if layer.weight.dtype == torch.bfloat16 else 1e-5
    # Of the largest output: before torch's σ has converged, weights and outputs are of any size.
    size = float(before.detach().abs().max())
    torch.testing.assert_close(model.eval()(inputs), before, rtol=close, atol=close * size)
    if forwards == 300 and not options and isinstance(layer, nn.Linear):
        assert norm_of(model).gain.item() == pytest.approx(1, rel=close)


@pytest.mark.parametrize("kind", KINDS)
def test_into_several_blocks_the_state_is_estimated(kind):
    model = foreign(nn.Linear(4, 6), kind)
    fresh = snparam.register_sn(nn.Linear(4, 6), blocks=2)
    fresh.load_state_dict(
        {"weight": torch_spectral_norm_on(model, "weight").original, "bias": model.bias}
    )
    snparam.convert_model(model, blocks=2)
    assert torch.equal(norm_of(model).u, norm_of(fresh).u)


def test_a_recurrent_layer_under_the_hook_is_taken_over():
    lstm = torch_hook(nn.LSTM(3, 5), "weight_hh_l0")
    parameter = lstm.weight_hh_l0_orig
    snparam.convert_model(lstm)
    assert original_of(lstm, "weight_hh_l0") is parameter
    output = lstm.eval()(torch.randn(2, 3))[0]
    snparam.restore_model(lstm)
    assert lstm.weight_hh_l0 is parameter
    torch.testing.assert_close(lstm(torch.zeros(2, 3))[0].shape, output.shape)


def test_tied_weights_under_torchs_are_one_state():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(foreign(first, "torch-hook"), second)
    model[0].weight_orig = second.weight
    snparam.convert_model(model)
    assert norm_of(model[0]) is norm_of(model[1])
    assert original_of(model[0]) is original_of(model[1]) is second.parametrizations.weight.original


def test_a_copy_made_before_keeps_torchs():
    model = foreign(nn.Linear(4, 3), "torch")
    twin = copy.deepcopy(model)
    snparam.convert_model(model)
    assert torch_spectral_norm_on(twin, "weight") is not None
    assert twin(torch.ones(1, 4)).shape == (1, 3)
    twin.load_state_dict(foreign(nn.Linear(4, 3), "torch").state_dict())


def everything_of(model):
    """All that a failed conversion could have changed, with identities."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (id(module), type(module), list(vars(module)))
        for attribute, value in vars(module).items():
            if isinstance(value, dict):
                found[name, attribute] = (id(value), [(k, id(v)) for k, v in value.items()])
    return found


STEPS = [*(("attach", at) for at in range(4)), *(("remove_torch_norm", at) for at in range(3))]


@pytest.mark.parametrize(("step", "at"), STEPS)
def test_a_failure_on_the_way_leaves_the_model_as_it_was(step, at, monkeypatch):
    model = nn.Sequential(
        foreign(nn.Linear(4, 4), "torch"),
        nn.Linear(4, 4),
        foreign(nn.Linear(4, 4), "torch-hook"),
        torch_parametrizations.spectral_norm(
            torch_parametrizations.orthogonal(nn.LSTMCell(4, 4), "weight_hh"), "weight_ih"
        ),
    )
    handle = model[2].register_forward_pre_hook(lambda *_: None)
    before, state = everything_of(model), copy.deepcopy(model.state_dict())
    real, calls = getattr(conversion, step), []

    def failing(*args):
        calls.append(args)
        if len(calls) > at:
            raise RuntimeError("on the way")
        return real(*args)

    monkeypatch.setattr(conversion, step, failing)
    with pytest.raises(RuntimeError, match="on the way"):
        snparam.convert_model(model)
    assert everything_of(model) == before
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)
    handle.remove()
    assert len(model[2]._forward_pre_hooks) == 1
    monkeypatch.undo()
    remove_spectral_norm(model[2])
    snparam.convert_model(model)
    assert sum(1 for _ in snparam.singular_values(model)) == 4


# How torch reads a weight


@pytest.mark.parametrize(
    ("layout", "shape", "blocks", "axis", "expected"),
    [
        (Layout("rows"), (3, 4), 1, 0, "same"),
        (Layout("rows"), (3, 4), 1, 1, "transposed"),
        (Layout("columns"), (3, 4), 1, 0, "transposed"),
        (Layout("columns"), (3, 4), 1, 1, "same"),
        (Layout("rows"), (3, 4, 2), 1, 0, "same"),
        (Layout("rows"), (3, 4, 2), 1, 1, None),
        (Layout("rows"), (3, 4, 1), 1, 1, "transposed"),
        (Layout("transposed_conv"), (3, 4, 2), 1, 1, "same"),
        (Layout("transposed_conv"), (3, 4, 2), 1, 0, None),
        (Layout("transposed_conv", groups=3), (3, 4, 2), 1, 1, None),
        (Layout("rows"), (4, 4), 2, 0, None),
        (Layout("bare"), (3, 4, 2), 1, 0, "same"),
        (Layout("bare"), (3, 4, 2), 3, 0, None),
    ],
)
def test_the_relation_of_two_readings(layout, shape, blocks, axis, expected):
    view = layout.view(shape, blocks)
    assert reading.matrix_relation(view, axis) == expected
    weight = torch.randn(shape)
    theirs = weight.movedim(axis, 0).flatten(1)
    ours = view.to_matrices(weight)
    assert (ours.shape[0] == 1 and torch.equal(ours[0], theirs)) == (expected == "same")
    if expected == "transposed":
        assert torch.equal(ours[0], theirs.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(4, 3), (3, 3)])
def test_a_weight_stored_input_first_changes_u_and_v(shape, dtype):
    weight = torch.randn(shape, dtype=dtype)
    view = Layout("columns").view(shape)
    matrix = view.to_matrices(weight)[0]
    torch.testing.assert_close(matrix, weight.T)
    u, sv, vh = torch.linalg.svd(weight)
    found = reading.left_vector(view, 0, u[:, 0], vh[0].conj())
    # W v = σ u with the roles changed: |u* Wᵀ| = σ, and its other side is unit.
    torch.testing.assert_close(torch.linalg.vector_norm(found[0, 0].conj() @ matrix), sv[0])
    theirs = reading.torch_vectors(weight, view, 0, found)
    torch.testing.assert_close(torch.vdot(theirs[0], weight @ theirs[1]), sv[0].to(dtype))
    assert theirs[0].shape == (shape[0],)
