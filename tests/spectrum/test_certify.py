"""No pair of inputs of a network, and no Jacobian, is steeper than its certificate says."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.steepness import jacobian_norm, steepest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import snparam
from snparam import certify
from snparam.spectrum import linear_norms

# Drawn networks

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.Hardswish, nn.Softplus)


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class Concatenating(nn.Module):
    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(body(x) for body in self.bodies)], 1)


def batch_norm(channels: int, generator: torch.Generator) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.copy_(torch.rand(channels, generator=generator) + 0.2)
    return norm


@st.composite
def networks(draw: Any) -> nn.Module:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    channels, size, parts = 2, 6, []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("residual", "concatenating", "strided", "pooled", "widened")))
        mode = draw(st.sampled_from(("zeros", "circular", "reflect", "replicate")))
        groups = draw(st.sampled_from((1, channels)))
        same = nn.Conv2d(channels, channels, 3, padding=1, padding_mode=mode, groups=groups)
        activation = draw(st.sampled_from(ACTIVATIONS))()
        if kind == "residual":
            parts.append(Residual(nn.Sequential(same, batch_norm(channels, generator), activation)))
        elif kind == "concatenating" and channels < 8:
            parts.append(Concatenating(same, nn.Sequential(nn.AvgPool2d(3, 1, 1), activation)))
            channels *= 3
        elif kind == "strided" and size > 2:
            parts += [nn.Conv2d(channels, 3, 3, stride=2, padding=1), activation]
            channels, size = 3, (size + 1) // 2
        elif kind == "pooled" and size > 2:
            parts += [same, activation, nn.MaxPool2d(3, 2, 1)]
            size = (size + 1) // 2
        else:
            parts += [nn.ConvTranspose2d(channels, 2, 2, stride=2), activation, nn.AvgPool2d(2)]
            channels = 2
    parts += [nn.AdaptiveAvgPool2d(draw(st.integers(1, 2))), nn.Flatten()]
    model = nn.Sequential(*parts, nn.LazyLinear(3)).double()
    model(torch.zeros(1, 2, 6, 6, dtype=torch.float64))
    positive = draw(st.booleans())  # singular vectors are then nearly aligned, and bounds tight
    for weight in model.parameters():
        values = torch.rand(weight.shape, generator=generator)
        weight.data.copy_(values if positive else weight.data.sign() * values)
    return model.eval()


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.integers(0, 10**6))
def test_no_inputs_are_steeper_than_the_certificate(model: nn.Module, seed: int) -> None:
    shape = (1, 2, 6, 6)
    certificate = certify(model, torch.zeros(shape, dtype=torch.float64))
    found = steepest(model, shape, steps=8, scales=(0.3, 3.0), seed=seed)
    assert found <= certificate.bound * (1 + 1e-9)


# Exactness


def vector(size: int, seed: int, positive: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    v = v.abs() if positive else v
    return v / v.norm()


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999), st.sampled_from((1e-3, 1, 50)))
def test_it_is_exact_for_one_linear_layer(m: int, n: int, seed: int, scale: float) -> None:
    layer = nn.Linear(n, m).double()
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).double()
    layer.weight.data.copy_(weight * scale)
    exact = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    bound = certify(layer, torch.zeros(2, n, dtype=torch.float64)).bound
    assert exact <= bound <= exact * (1 + 1e-6)


@settings(max_examples=20)
@given(st.lists(st.integers(2, 8), min_size=3, max_size=6), st.integers(0, 999))
def test_it_is_exact_for_a_chain_of_aligned_layers(sizes: list[int], seed: int) -> None:
    """Each layer's left vector, positive so that ReLU keeps it, is the next one's right vector."""
    layers: list[nn.Module] = []
    exact = 1.0
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        u, v = vector(m, seed + i + 1, True), vector(n, seed + i, True)
        sigma = 0.5 + i
        remainder = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).double()
        remainder -= torch.outer(u, u @ remainder)
        remainder -= torch.outer(remainder @ v, v)
        remainder *= 0.9 * sigma / max(1e-9, float(torch.linalg.matrix_norm(remainder, 2)))
        layer = nn.Linear(n, m, bias=False).double()
        layer.weight.data.copy_(sigma * torch.outer(u, v) + remainder)
        layers += [layer, nn.ReLU()]
        exact *= sigma
    x = vector(sizes[0], seed, True).unsqueeze(0)
    model = nn.Sequential(*layers)
    assert math.isclose(jacobian_norm(model, x), exact, rel_tol=1e-9)
    assert math.isclose(certify(model, x).bound, exact, rel_tol=1e-6)


def explicit_norm(function: Any, shape: tuple[int, ...]) -> float:
    identity = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    columns = (function(identity) - function(zero)).detach().flatten(1)
    return float(torch.linalg.matrix_norm(columns, 2))


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_a_convolution_with_its_padding_and_batch_norm_is_one_exact_map(mode: str) -> None:
    norm = batch_norm(5, torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(3, 5, 3, 2, padding=1, padding_mode=mode), norm).double().eval()
    bound = certify(model, torch.zeros(2, 3, 6, 5, dtype=torch.float64)).bound
    exact = explicit_norm(model, (3, 6, 5))
    assert exact <= bound <= exact * (1 + 1e-6)


def test_a_network_of_several_inputs_and_outputs_is_bounded_jointly() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
            return {"sum": x + y, "x": 3 * x}

    inputs = {"x": torch.zeros(2, 3), "y": torch.zeros(2, 3)}
    bound = certify(Two(), inputs).bound
    exact = float(torch.linalg.matrix_norm(torch.tensor([[1.0, 1.0], [3.0, 0.0]]).double(), 2))
    assert exact <= bound <= math.sqrt(4 + 9) * (1 + 1e-9)


# What the graph contains besides


class InPlace(nn.Module):
    """What is written into a view changes what it is a view of."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0].mul_(7)
        y.view(-1)[1:].add_(x.flatten()[:-1])
        return y


class Regions(nn.Module):
    """Regions that have graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = 2 * x
        with torch.autocast("cpu", enabled=False):
            return y * self.scale.exp().log() + torch.zeros_like(x) + torch.ones(3).double()


class RegionInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = 2 * x
            y[0] += 3 * x[1]
        return y + x


@pytest.mark.parametrize(
    "model", [InPlace(), Regions(), RegionInPlace()], ids=lambda model: type(model).__name__
)
@pytest.mark.parametrize("grad", [True, False])
def test_in_place_operations_and_regions_are_followed(model: nn.Module, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        bound = certify(model, torch.zeros(2, 3, dtype=torch.float64)).bound
    exact = explicit_norm(lambda xs: torch.stack([model(x) for x in xs]), (2, 3))
    assert exact <= bound <= 3 * exact


def test_a_constant_network_has_the_bound_zero() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data.zero_()
    certificate = certify(layer, torch.zeros(1, 3))
    assert certificate.bound == 0
    assert certificate.log10_bound == -math.inf
    assert certificate.radius(torch.tensor([1.0, 2.0])) == math.inf


def test_bounds_above_the_range_of_floats_are_logarithms() -> None:
    layers = [nn.Linear(1, 1, bias=False) for _ in range(16)]
    for layer in layers:
        layer.weight.data.fill_(1e20)
    certificate = certify(nn.Sequential(*layers), torch.zeros(1, 1))
    assert math.isclose(certificate.log10_bound, 320, rel_tol=1e-8)  # σ is certified to 1e-9
    assert certificate.bound == math.inf
    assert not certificate.without_constant
    assert "320.0" in str(certificate)
    assert math.isclose(
        certify(nn.Sequential(*layers[:15]), torch.zeros(1, 1)).bound, 1e300, rel_tol=1e-6
    )


def test_a_chain_of_maps_is_as_deep_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each norm waits until it is asked for, and then not for all the maps before it."""
    # Certifying hundreds of norms would take seconds.
    monkeypatch.setattr(linear_norms, "certified_norm", lambda stack: stack[:, 0, 0])
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.01)
    model = nn.Sequential(*[layer] * 400)
    assert math.isclose(certify(model, torch.zeros(1, 1)).bound, 1.01**400, rel_tol=1e-4)


# The model


def test_modes_states_and_weights_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(), nn.Linear(4, 2)))
    snparam.convert_model(model)
    model.train()
    model[1][0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    bound = certify(model, torch.zeros(3, 4)).bound
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert math.isclose(bound, 1, rel_tol=1e-3)  # of eval mode, where dropout does nothing


def test_it_certifies_the_weights_that_eval_mode_uses() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    snparam.convert_model(model, coeff=0.7)
    x = torch.zeros(1, 2, 6, 6)
    converted = certify(model, x)
    snparam.restore_model(model)
    assert math.isclose(converted.log_bound, certify(model, x).log_bound, abs_tol=1e-6)


# What has no constant


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x, x, x, need_weights=False)[0]


class Where(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.1 * x - 1)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x).sigmoid()


class Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


WITHOUT = {
    "attention": (Attention(), "attention"),
    "where": (Where(), "jumps"),
    "gate": (Gate(), "squeeze-and-excitation"),
    "round": (Calls(torch.round), "jumps"),
    "hardshrink": (Calls(F.hardshrink), "jumps"),
    "threshold": (Calls(lambda x: F.threshold(x, 0.5, 0.0)), "jumps"),
    "batch statistics": (nn.BatchNorm1d(3, track_running_stats=False), "statistics"),
    "argmax": (Calls(lambda x: x.argmax(-1)), "jumps"),
    "lookup": (Calls(lambda x: torch.ones(9, 2)[x.argmax(-1)]), "jumps"),
    "noise": (Calls(lambda x: x + torch.randn_like(x)), "random"),
    "dropout": (Calls(lambda x: F.dropout(x, 0.5, True)), "random"),
    "square root": (Calls(lambda x: x.abs().sqrt()), "unbounded"),
    "quotient": (Calls(lambda x: x / x.norm()), "divides by a value"),
    # Not `F.normalize`: each column is divided by the norm of a row.
    "other norms": (
        Calls(lambda x: (y := x[0, :, :3]) / y.norm(dim=1).clamp_min(0.1)),
        "divides by a value",
    ),
    "product": (Calls(lambda x: x @ x.mT), "both depend"),
    "inverse": (Calls(lambda x: torch.linalg.pinv(x)), "no rule"),
    "no eps": (Calls(lambda x: F.layer_norm(x, (4,), eps=0.0)), "eps=0"),
    "nan": (Calls(lambda x: F.linear(x, torch.full((2, 4), torch.nan))), "NaN"),
    "nan slope": (Calls(lambda x: F.prelu(x, torch.tensor([torch.nan]))), "not finite"),
    "growing": (Calls(lambda x: torch.ops.aten.elu(x, 1.0, 1.0, -1.0)), "negative input_scale"),
    "overflow": (Calls(lambda x: (torch.tanh(x) * 1e200).pow(3)), "range of floats"),
    "deviation": (Calls(lambda x: torch.native_layer_norm(x, (4,), None, None, 1.0)[2]), "first"),
    "batch offset": (
        Calls(lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), None, x.mean((0, 2)))),
        "its bias depends",
    ),
} | {
    # Off the real axis these have poles, and grow without bound.
    f"complex {name}": (
        Calls(lambda x, name=name: torch.view_as_real(getattr(torch, name)(_complex(x)))),
        "complex",
    )
    for name in ("tanh", "sin", "sigmoid", "atan", "asinh")
}


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (2, 2)))


LARGER = {
    "x - 5 tanh(x)": (lambda x: torch.sub(x, torch.tanh(x), alpha=5), 4.0),
    "copies of x / ‖x‖": (lambda x: x / x.norm().clamp_min(0.1).expand(4, 2, 3, 4), 20.0),
    "x · 2i": (lambda x: torch.view_as_real(_complex(x) * 2j), 2.0),
}


@pytest.mark.parametrize("name", LARGER)
def test_what_only_resembles_a_pattern_is_bounded_as_what_it_is(name: str) -> None:
    function, slope = LARGER[name]
    assert certify(Calls(function), torch.zeros(2, 3, 4)).bound >= slope * (1 - 1e-6)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_constant_is_named_with_its_place_and_reason(name: str) -> None:
    model = nn.ModuleDict({"first": nn.Identity(), "inner": WITHOUT[name][0]})
    model.forward = lambda x: model["inner"](model["first"](x))  # type: ignore[method-assign]
    certificate = certify(model, torch.zeros(2, 3, 4))
    assert certificate.bound == certificate.log10_bound == math.inf
    reasons = certificate.without_constant
    assert reasons
    assert any(WITHOUT[name][1] in row.reason for row in reasons)
    assert all(row.name.startswith("inner") for row in reasons if row.operation != "output")
    assert reasons[0].reason in str(certificate)
    assert certificate.radius(torch.tensor([1.0, 3.0])) == 0


def test_what_a_weight_of_zero_takes_away_does_not_count() -> None:
    """As the last batch norm of a residual branch does at the start of training."""
    zero = nn.Linear(4, 4)
    zero.weight.data.zero_()
    certificate = certify(Residual(nn.Sequential(Gate(), zero)), torch.zeros(2, 4))
    assert math.isclose(certificate.bound, 1, rel_tol=1e-9)
    assert [row.name for row in certificate.without_constant] == ["body.0"]
    assert "multiplied by zero" in str(certificate)


def test_every_gate_is_named() -> None:
    model = nn.Sequential(Gate(), nn.ReLU(), Gate())
    reasons = certify(model, torch.zeros(2, 4)).without_constant
    assert [row.name for row in reasons] == ["0", "2"]


def test_what_the_output_does_not_use_does_not_count() -> None:
    class Unused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.round(x)
            return x.to(torch.float32) * 2  # of whose dtype the graph makes sure

    certificate = certify(Unused(), torch.zeros(2))
    assert math.isclose(certificate.bound, 2, rel_tol=1e-9)
    assert not certificate.without_constant


# Rules of the user's own


class Halved(nn.Module):
    """x sigmoid(x) / 4 in a form that no rule knows, with the constant 0.275."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.special.expit(x) * torch.linalg.pinv(4 * torch.eye(1)) + x.trunc() * 0


@pytest.mark.parametrize("constant", [0.5, lambda module: 0.5 if isinstance(module, Halved) else 9])
def test_a_module_has_the_constant_that_the_user_gives(constant: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), Halved(), nn.ReLU(), Halved())
    model[0].weight.data.copy_(3 * torch.eye(3))
    assert certify(model, torch.zeros(2, 3)).bound == math.inf
    certificate = certify(model, torch.zeros(2, 3), rules={Halved: constant})
    assert math.isclose(certificate.bound, 0.75, rel_tol=1e-6)


@pytest.mark.parametrize("key", [torch.ops.aten.round, torch.ops.aten.round.default])
@pytest.mark.parametrize("constant", [3, lambda x: float(x.shape[-1])])
def test_an_operation_has_the_constant_that_the_user_gives(key: Any, constant: Any) -> None:
    model = Calls(lambda x: 2 * torch.round(x))
    certificate = certify(model, torch.zeros(2, 3), rules={key: constant})
    assert math.isclose(certificate.bound, 6, rel_tol=1e-9)


@pytest.mark.parametrize("constant", [-1.0, math.nan])
def test_a_constant_that_is_none_is_refused(constant: float) -> None:
    with pytest.raises(ValueError, match=r"aten\.relu.*expected a number"):
        certify(nn.ReLU(), torch.zeros(2), rules={torch.ops.aten.relu: constant})


# Bad input


def test_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"certify: expected an nn\.Module"):
        certify(torch.relu, torch.zeros(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", [None, (), {}, (3,), torch.tensor([1, 2])], ids=str)
def test_inputs_without_floating_point_tensors_are_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match="floating-point tensor"):
        certify(nn.Embedding(4, 3), inputs)


def test_a_model_that_export_does_not_take_is_refused_with_the_reason() -> None:
    class DataDependent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = DataDependent().train()
    with pytest.raises(
        RuntimeError, match=r"torch\.export does not take DataDependent: .*data-dep"
    ):
        certify(model, torch.zeros(2))
    assert model.training


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' \(3, 2\) is on the meta device"):
        certify(nn.Sequential(nn.Linear(2, 3, device="meta")), torch.zeros(1, 2))


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_radii_need_two_classes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(\.\.\., classes\)"):
        certify(nn.ReLU(), torch.zeros(2)).radius(torch.zeros(shape))


# A classifier


def test_no_attack_beats_the_certified_accuracy() -> None:
    """Three Gaussian clouds, a converted network that is trained on them, and PGD on the radii."""
    generator = torch.Generator().manual_seed(0)
    centres = 2.5 * torch.randn(3, 12, generator=generator)
    labels = torch.arange(300) % 3
    x = centres[labels] + torch.randn(300, 12, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model.append(nn.Linear(32, 3))
    snparam.convert_model(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(5 * model(x), labels).backward()
        optimizer.step()
    model.eval()
    with snparam.cached(model):
        certificate = certify(model, x[:1])
        logits = model(x).detach()
        right = logits.argmax(1) == labels
        radii = torch.where(right, certificate.radius(logits), 0.0)
        assert (radii > 0.5).float().mean() > 0.3
        for share in (0.999, 3.0):
            held = right & (attacked(model, x, labels, radii * share).argmax(1) == labels)
            if share < 1:
                assert torch.equal(held, right)
        assert held.sum() < right.sum()  # the attack is one: it succeeds further out


def attacked(model: nn.Module, x: Tensor, labels: Tensor, radii: Tensor) -> Tensor:
    """The logits after thirty steps up the margin, each within its radius."""
    d = torch.zeros_like(x).requires_grad_()
    for _ in range(30):
        logits = model(x + d)
        others = logits.masked_fill(F.one_hot(labels, 3).bool(), -torch.inf).amax(1)
        (gradient,) = torch.autograd.grad(
            (others - logits.gather(1, labels[:, None])[:, 0]).sum(), d
        )
        with torch.no_grad():
            d += F.normalize(gradient, dim=1) * radii[:, None].float() / 8
            d *= (radii.float() / d.norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None]
    return model(x + d).detach()
