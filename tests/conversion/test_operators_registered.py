"""norm="operator": the weight is divided by the norm of the convolution itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers.convolutions import exact_norm, ignores_same, layers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import snparam
from snparam.testing import assert_spectral_norm

pytestmark = ignores_same


def drawn_weight(layer: Any, seed: int = 0) -> Any:
    """The layer, with a weight from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
    return layer


def norm_of(layer: Any) -> Any:
    return layer.parametrizations.weight[0]


@settings(max_examples=150)
@given(drawn=layers(torch.float32), update=st.sampled_from(["forward", "step"]))
def test_every_drawn_convolution_has_norm_one_right_after_registration(
    drawn: Any, update: Any
) -> None:
    layer, size = drawn
    before = exact_norm(layer, size)
    snparam.register_sn(layer, norm="operator", input_size=size, update=update)
    for mode in (False, True):
        after = exact_norm(layer.train(mode), size)
        assert after == pytest.approx(1 if before else 0, rel=1e-3)
    assert norm_of(layer).input_size == size
    assert float(norm_of(layer).sv[0, 0]) == pytest.approx(before, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_ones_with_zeros_around_have_the_norm_of_two_tridiagonal_matrices(n: int) -> None:
    """The operator is their Kronecker product, and each has eigenvalues 1 + 2 cos(jπ / (n + 1))."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    layer.weight.data.fill_(1.0)
    snparam.register_sn(layer, norm="operator", input_size=(n, n))
    expected = (1 + 2 * math.cos(math.pi / (n + 1))) ** 2
    assert float(norm_of(layer).sv) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(layer.weight, torch.full((1, 1, 3, 3), 1 / expected))


@settings(max_examples=40)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    seed=st.integers(0, 99),
)
def test_circular_padding_gives_the_largest_norm_of_a_frequency(
    channels: Any, size: Any, seed: int
) -> None:
    """The Fourier transform makes one (out, in) matrix of each frequency (Sedghi et al. 2019)."""
    layer = nn.Conv2d(*channels, 3, padding=1, padding_mode="circular", bias=False)
    drawn_weight(layer, seed)
    symbol = torch.fft.fft2(layer.weight.detach().double(), s=size).permute(2, 3, 0, 1)
    expected = float(torch.linalg.matrix_norm(symbol, 2).max())
    snparam.register_sn(layer, norm="operator", input_size=size)
    assert float(norm_of(layer).sv) == pytest.approx(expected, rel=1e-3)


def test_verify_compares_with_the_convolution_and_says_how() -> None:
    small, large = (drawn_weight(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2))
    model = nn.Sequential(small, nn.Flatten(), nn.Linear(4 * 36, 2))
    snparam.convert_model(model, norm="operator", example_inputs=torch.zeros(1, 4, 6, 6))
    rows = {row.weight: row for row in snparam.verify(model, tolerance=1e-3)}
    assert rows["0.weight"].matrices == (1, 144, 144)
    assert rows["0.weight"].exact == pytest.approx(exact_norm_in_use(small, (6, 6)), rel=1e-5)
    assert rows["0.weight"].method == rows["2.weight"].method == "decomposition"
    assert rows["2.weight"].matrices == (1, 2, 144)
    snparam.register_sn(large, norm="operator", input_size=(24, 24))
    (row,) = snparam.verify(large, tolerance=1e-3)
    assert row.method == "Lanczos"
    assert "Lanczos" in str(snparam.verify(large))
    # At a larger size the norm is larger, by little: zeros around matter less.
    symbol = torch.fft.fft2(large.weight.detach().double(), s=(96, 96)).permute(2, 3, 0, 1)
    supremum = float(torch.linalg.matrix_norm(symbol, 2).max())
    assert exact_norm_in_use(large, (12, 12)) < row.exact < supremum * 1.01


def exact_norm_in_use(layer: Any, size: tuple[int, ...]) -> float:
    """The norm of what the layer computes, without its bias."""
    used = copy.deepcopy(layer)
    snparam.remove_sn(used)
    used.bias = None
    return exact_norm(used, size)


def test_a_conversion_records_the_sizes_and_moves_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.drop = nn.Dropout(0.5)
            self.up = nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1)
            self.head = nn.Linear(2, 5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in self.modules())
            self.calls += 1
            x = self.drop(self.norm(self.stem(x))) + torch.rand(())
            return self.head(self.up(x).mean((2, 3))) * scale

    model = Net()
    model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    inputs = {"x": torch.randn(2, 3, 9, 13), "scale": 2.0}
    random_state = torch.random.get_rng_state()
    plan = snparam.plan_conversion(model, norm="operator", example_inputs=inputs)
    rows = {row.weight: row for row in plan}
    assert rows["stem.weight"].matrices == (1, 4 * 5 * 7, 3 * 9 * 13)
    assert rows["up.weight"].matrices == (1, 2 * 10 * 14, 4 * 5 * 7)
    assert rows["head.weight"].matrices == (1, 5, 2)
    assert "9 x 13" in rows["stem.weight"].reason
    snparam.convert_model(model, norm="operator", example_inputs=inputs)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert {name: model.get_submodule(name).training for name in modes} == modes
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in snparam.plain_state_dict(model, bake=False).items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert norm_of(model.stem).input_size == (9, 13)
    assert norm_of(model.head).norm == "matrix"
    assert exact_norm_in_use(model.stem, (9, 13)) == pytest.approx(1, rel=1e-3)
    assert exact_norm_in_use(model.up, (5, 7)) == pytest.approx(1, rel=1e-3)


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    class Failing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            self[1].running_mean = torch.ones(2)  # type: ignore[union-attr, assignment]
            raise KeyError("x")

    model = Failing(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2).eval())
    buffers = dict(model.named_buffers())
    with pytest.raises(KeyError):
        snparam.convert_model(model, norm="operator", example_inputs=torch.zeros(1, 1, 8))
    assert [module.training for module in model.modules()] == [True, True, False]
    assert not any(module._forward_hooks for module in model.modules())
    assert {name: id(b) for name, b in model.named_buffers()} == {
        name: id(b) for name, b in buffers.items()
    }


def test_of_a_layer_called_at_several_sizes_the_largest_norm_is_recorded() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = drawn_weight(nn.Conv2d(2, 2, 3, padding=1, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            sizes = [self.conv(x[..., :n, :n]) for n in (3, 8, 5)]
            return sum(y.sum() for y in sizes)  # type: ignore[return-value]

    model = Pyramid()
    norms = {n: exact_norm(model.conv, (n, n)) for n in (3, 5, 8)}
    snparam.convert_model(model, norm="operator", example_inputs=torch.zeros(1, 2, 8, 8))
    assert norm_of(model.conv).input_size == (8, 8)
    assert float(norm_of(model.conv).sv) == pytest.approx(max(norms.values()), rel=1e-3)


def test_sizes_are_recorded_again() -> None:
    model = nn.Sequential(drawn_weight(nn.Conv1d(1, 2, 3, padding=1)), nn.ReLU(), nn.Flatten())
    original = exact_norm_in_use(snparam.register_sn(copy.deepcopy(model[0]), gain="fixed"), (20,))
    snparam.convert_model(
        model, norm="operator", example_inputs=torch.zeros(1, 1, 5), update="step", num_svs=2
    )
    snparam.update(model)
    snparam.record_input_sizes(model, [torch.zeros(3, 1, 20)])
    norm = norm_of(model[0])
    assert norm.input_size == (20,)
    assert norm.u.shape == (1, 2, 40)
    assert float(norm.sv[0, 0]) == pytest.approx(original, rel=1e-3)
    for mode in (True, False):
        model.train(mode)
        model(torch.zeros(1, 1, 20))
    assert snparam.verify(model, tolerance=1e-3)


def test_a_shared_state_is_recorded_at_all_sizes_of_its_layers() -> None:
    """Weights of ones have larger norms on longer inputs."""
    model: Any = nn.Sequential(*(nn.Conv1d(1, 1, 3, padding=1, bias=False) for _ in range(2)))
    model[1].weight = model[0].weight
    model[0].weight.data.fill_(1.0)
    snparam.convert_model(model, norm="operator", example_inputs=torch.zeros(1, 1, 8))
    for pool in (nn.MaxPool1d(2), nn.Upsample(scale_factor=2)):
        changed = nn.Sequential(model[0], pool, model[1])
        snparam.record_input_sizes(changed, torch.zeros(1, 1, 8))
        expected = max(8, int(changed[:2](torch.zeros(1, 1, 8)).shape[-1]))
        assert norm_of(model[0]).input_size == (expected,)


def test_recording_again_needs_something_to_record() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3))
    with pytest.raises(ValueError, match="no weight registered with norm='operator'"):
        snparam.record_input_sizes(snparam.convert_model(model), torch.zeros(1, 1, 9))
    snparam.restore_model(model)
    snparam.convert_model(model, norm="operator", example_inputs=torch.zeros(1, 1, 9))
    states = copy.deepcopy(model.state_dict())
    short = copy.deepcopy(model)
    short.forward = lambda x: short[0](x)
    with pytest.raises(ValueError, match=r"'1.weight' \(1, 1, 3\): its layer was not called"):
        snparam.record_input_sizes(short, torch.zeros(1, 1, 20))
    for name, value in short.state_dict().items():
        torch.testing.assert_close(value, states[name], rtol=0, atol=0)


class OwnForward(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + input


def test_what_cannot_be_registered_says_why_and_what_to_do() -> None:
    conv: Any = nn.Conv1d(2, 4, 3)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (conv, {}, ValueError, r"'weight' of Conv1d \(4, 2, 3\).*size of its inputs.*input_size="),
        (conv, {"input_size": (8, 8)}, ValueError, "expected 1 numbers"),
        (conv, {"input_size": 2}, ValueError, r"output would have the size \(0,\)"),
        (conv, {"input_size": (8.0,)}, TypeError, "one int for each axis"),
        (conv, {"input_size": 8, "blocks": 2}, ValueError, "leave out blocks"),
        (conv, {"input_size": 8, "coeff": "mup"}, ValueError, "pass a number"),
        (conv, {"input_size": 8, "clip": 1.0}, ValueError, "constraint that divides by σ"),
        (conv, {"input_size": 8, "norm": "matrix"}, ValueError, "no norm depends on it"),
        (conv, {"input_size": 8, "norm": "frobenius"}, ValueError, "'matrix' or 'operator'"),
        (nn.Linear(3, 3), {"input_size": 8}, ValueError, "it is for convolutions"),
        (OwnForward(1, 1, 3), {"input_size": 8}, ValueError, "its forward is not torch's own"),
    ]
    for layer, options, error, message in cases:
        kind = type(layer)
        with pytest.raises(error, match=message):
            snparam.register_sn(layer, **{"norm": "operator", **options})
        assert type(layer) is kind
    snparam.register_sn(conv, norm="operator", input_size=8)
    assert norm_of(conv).input_size == (8,)


def test_what_cannot_be_converted_says_why_and_what_to_do() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3))
    model.unused = nn.Conv1d(1, 1, 3)
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    inputs = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match=r"'0.weight'.*needs the size.*example_inputs="):
        snparam.convert_model(model, norm="operator")
    with pytest.raises(ValueError, match=r"'unused.weight' \(1, 1, 3\): its layer was not called"):
        snparam.convert_model(model, norm="operator", example_inputs=inputs)
    assert [row.decision for row in snparam.plan_conversion(
        model, norm="operator", example_inputs=inputs
    )] == ["convert", "convert", "refuse"]  # fmt: skip
    with pytest.raises(ValueError, match="example_inputs with norm='matrix'"):
        snparam.convert_model(model, example_inputs=inputs)
    with pytest.raises(TypeError, match="not int"):
        snparam.convert_model(model, norm="operator", example_inputs=3)
    with pytest.raises(ValueError, match="uninitialised"):
        snparam.convert_model(
            nn.Sequential(nn.LazyConv1d(1, 3)), norm="operator", example_inputs=inputs
        )
    assert type(model[0]) is nn.Conv1d
    snparam.convert_model(model, norm="operator", example_inputs=inputs, exclude="unused")
    assert type(model.unused) is nn.Conv1d
    with pytest.raises(ValueError, match=r"norm='operator' \(asked for: norm='matrix'\)"):
        snparam.convert_model(model, exclude="unused")


def test_a_forward_of_ones_own_is_left_alone_with_the_reason() -> None:
    model = nn.Sequential(OwnForward(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3))
    plan = snparam.plan_conversion(model, norm="operator", example_inputs=torch.zeros(1, 1, 8))
    assert [row.decision for row in plan] == ["skip", "convert"]
    assert "not torch's own" in plan[0].reason


def test_an_output_size_of_its_own_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(1, 1, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[18])

    with pytest.raises(ValueError, match=r"'up.weight' \(1, 1, 3\): .*\(18,\).*\(17,\).*set"):
        snparam.convert_model(Net(), norm="operator", example_inputs=torch.zeros(1, 1, 8))
    plan = snparam.plan_conversion(
        Net(), norm="operator", example_inputs=torch.zeros(1, 1, 8), exclude="up"
    )
    assert [row.decision for row in plan] == ["skip"]


def test_a_shared_convolution_is_converted_where_all_read_the_same_operator() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1))
    model[1].weight = model[0].weight
    snparam.convert_model(model, norm="operator", example_inputs=torch.zeros(1, 1, 8))
    assert norm_of(model[0]) is norm_of(model[1])
    other = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, padding=2))
    other[1].weight = other[0].weight
    plan = snparam.plan_conversion(other, norm="operator", example_inputs=torch.zeros(1, 1, 8))
    assert [row.decision for row in plan] == ["skip", "skip"]


def test_torchs_own_is_taken_over_with_the_same_parameter() -> None:
    layer = parametrizations.spectral_norm(nn.Conv1d(2, 3, 3))
    original = layer.parametrizations.weight.original
    model = nn.Sequential(layer)
    snparam.convert_model(model, norm="operator", example_inputs=torch.zeros(1, 2, 8))
    assert model[0].parametrizations.weight.original is original
    assert snparam.verify(model, tolerance=1e-3)


@pytest.mark.parametrize("bake", [True, False])
def test_an_ordinary_layer_is_left_behind(bake: bool) -> None:
    layer = drawn_weight(nn.Conv2d(2, 3, 3, padding=1))
    before = layer.weight.detach().clone()
    snparam.register_sn(layer, norm="operator", input_size=(5, 5))
    used = snparam.weight_in_use(layer)
    snparam.remove_sn(layer, bake=bake)
    assert type(layer) is nn.Conv2d
    assert torch.equal(layer.weight, used if bake else before)


@pytest.mark.parametrize(
    "options", [{"coeff": 2.0}, {"coeff": 0.5, "soft": True}, {"gain": "learned"}], ids=str
)
def test_every_division_holds_what_it_promises(options: dict[str, Any]) -> None:
    layer = drawn_weight(nn.Conv2d(2, 3, 3, padding=1, bias=False))
    before = exact_norm(layer, (6, 6))
    snparam.register_sn(layer, norm="operator", input_size=(6, 6), **options)
    expected = before if "gain" in options else options["coeff"]
    assert exact_norm(layer, (6, 6)) == pytest.approx(expected, rel=1e-3)
    assert snparam.verify(layer, tolerance=1e-3)


def test_the_assertion_for_users_tests_checks_the_convolution() -> None:
    """The matrix of this one has the norm √3, and the convolution nearly 3."""
    layer = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    layer.weight.data.fill_(1.0)
    snparam.register_sn(layer, norm="operator", input_size=100)
    assert_spectral_norm(layer)
    with pytest.raises(
        AssertionError, match=r"(?s)above 0\.9 .*weight Conv1d \(1, 1, 3\): (1|0\.99)"
    ):
        assert_spectral_norm(layer, at_most=0.9)


def test_a_plan_and_a_layer_show_what_is_bounded() -> None:
    layer = snparam.register_sn(nn.Conv1d(1, 2, 3), norm="operator", input_size=10)
    assert "norm='operator'" in repr(layer)
    assert "input_size=(10,)" in repr(layer)
    assert "input_size" not in repr(snparam.register_sn(nn.Conv1d(1, 2, 3)))
