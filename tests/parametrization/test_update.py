"""Updates once per optimizer step: what forwards use, when the state moves, who is warned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import snparam
from snparam.estimators.power import power_step

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "fused adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
}


class Network(nn.Module):
    """Two layers of one shape, which are updated together, and others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.a = nn.Linear(36, 36)
        self.b = nn.Linear(36, 36)
        self.attention = nn.MultiheadAttention(36, 4)
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.conv(x).flatten(1)).relu())
        x, _ = self.attention(x, x, x)
        out: Tensor = self.head(x)
        return out


def batch(seed: int) -> Tensor:
    return torch.randn(5, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def states(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(("u", "sv"))}


@pytest.mark.parametrize("options", [{}, {"num_svs": 3, "num_itrs": 2}, {"blocks": 2}], ids=str)
def test_update_is_num_itrs_plain_steps_of_each_weight(options: dict[str, Any]) -> None:
    model = Network()
    snparam.convert_model(model, update="step", exclude="head", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            norm = module[0]
            u, matrices = norm.u, norm.view.to_matrices(module.original.detach())
            for _ in range(norm.settings.num_itrs):
                u, _, sv = power_step(matrices, u)[:3]
            expected[f"{name}.0.u"], expected[f"{name}.0.sv"] = u, sv
    snparam.update(model)
    found = states(model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].to(value.dtype))


CROWDS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: nn.Linear(7, 3),
    "tall": lambda: nn.Linear(3, 7),
    "convolution": lambda: nn.Conv2d(2, 4, 3),
    "channels last": lambda: nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 3),
}


@pytest.mark.parametrize("options", [{}, {"num_itrs": 3}, {"gain": "learned"}], ids=str)
@pytest.mark.parametrize("make", CROWDS.values(), ids=CROWDS)
def test_a_crowd_of_layers_is_updated_as_each_of_them_alone(
    make: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    crowd = nn.ModuleList(make().double() for _ in range(12))
    snparam.convert_model(crowd, update="step", **options)
    with torch.no_grad():
        for layer in crowd:
            layer.parametrizations.weight.original.mul_(torch.rand(()) + 0.5).add_(0.1)
        crowd[3].parametrizations.weight.original.zero_()
        crowd[5].parametrizations.weight.original.fill_(torch.nan)
    alone = copy.deepcopy(crowd)
    for _ in range(2):
        snparam.update(crowd)
        for layer in alone:
            snparam.update(layer)
        for at, pair in enumerate(zip(crowd, alone, strict=True)):
            norms = [layer.parametrizations.weight[0] for layer in pair]
            for name in ("u", "sv", "v")[: 2 if at == 5 else 3]:  # of NaN there is no v
                torch.testing.assert_close(
                    *(getattr(norm, name) for norm in norms), rtol=1e-12, atol=1e-14, equal_nan=True
                )
            upstream = torch.randn_like(pair[0].parametrizations.weight.original)
            gradients = []
            for layer in pair:
                leaf, weight = layer.parametrizations.weight.original, layer.weight
                gradients += torch.autograd.grad(weight, leaf, upstream)
            torch.testing.assert_close(*(layer.weight for layer in pair), equal_nan=True)
            torch.testing.assert_close(*gradients, equal_nan=True)
            assert torch.isfinite(norms[0].u).all()
            assert at == 5 or torch.isfinite(gradients[0]).all()
            with torch.no_grad():
                for layer in pair:
                    layer.parametrizations.weight.original.add_(0.05)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_forwards_between_updates_are_pure_and_weights_stay_normalised(make: Make) -> None:
    model = snparam.convert_model(Network(), update="step", num_itrs=2)
    optimizer = make(list(model.parameters()))
    snparam.update(model)  # as the first step does
    for step in range(8):
        before = states(model)
        first = model(batch(step))
        assert torch.equal(model(batch(step)), first)
        (first.square().mean() + model(batch(step + 100)).mean()).backward()
        after = states(model)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        optimizer.step()
        optimizer.zero_grad()
        assert any(not torch.equal(states(model)[n], v) for n, v in before.items())
    # One update ago the weights were these; the exact norm of what training uses, not eval.
    for module in model.modules():
        for name in getattr(module, "parametrizations", {}):
            used = getattr(module, name).detach().flatten(1).double()
            assert abs(float(torch.linalg.matrix_norm(used, 2)) - 1) < 0.05


def test_gradient_accumulation_equals_one_large_batch() -> None:
    whole, parts = (snparam.convert_model(Network().double(), update="step") for _ in range(2))
    x = torch.cat([batch(1), batch(2)]).double()
    for model, batches in ((whole, [x]), (parts, x.split(1))):
        for piece in batches:
            # Attention is over the batch here, so only what comes before it may be split.
            model.a(model.conv(piece).flatten(1)).square().sum().backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_loading_a_state_dict_refreshes() -> None:
    trained = snparam.convert_model(Network(), update="step")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter))
    for _ in range(300):  # v is not saved: it follows from a converged u alone
        snparam.update(trained)
    model = snparam.convert_model(Network(), update="step")
    model(batch(0))
    model.load_state_dict(trained.state_dict())
    torch.testing.assert_close(model(batch(0)), trained(batch(0)))
    snparam.verify(model, tolerance=1e-2)


def test_assigning_a_weight_refreshes() -> None:
    layer = snparam.register_sn(nn.Linear(6, 5), update="step")
    layer(torch.ones(1, 6))
    layer.weight = torch.randn(5, 6) * 9
    norm = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-3, atol=0)


def test_copies_and_moves_keep_the_state() -> None:
    model = snparam.convert_model(Network(), update="step")
    expected = model(batch(0))
    torch.testing.assert_close(copy.deepcopy(model)(batch(0)), expected)
    torch.testing.assert_close(model.double()(batch(0).double()), expected.double())


def test_eval_follows_the_weight_without_an_update() -> None:
    # As for averaged weights, which nothing updates.
    layer = snparam.register_sn(nn.Linear(6, 5), update="step").eval()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(7)
    norm = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-4, atol=0)


def test_a_network_without_such_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Network.*update='step'"):
        snparam.update(snparam.convert_model(Network()))
