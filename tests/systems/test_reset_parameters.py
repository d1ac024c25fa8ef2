"""`reset_parameters` of a converted module does what it does to an ordinary one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import snparam

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(6, 5),
    "Bilinear": lambda: nn.Bilinear(3, 4, 5),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "Embedding": lambda: nn.Embedding(7, 4, padding_idx=2),
    "LSTM": lambda: nn.LSTM(4, 3, num_layers=2, proj_size=2),
    "GRUCell": lambda: nn.GRUCell(4, 3),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "MultiheadAttention, three projections": lambda: nn.MultiheadAttention(4, 2, kdim=3),
}


def reset(module: Any) -> None:
    torch.manual_seed(1)
    method = getattr(module, "reset_parameters", None) or module._reset_parameters
    method()


def originals(module: nn.Module) -> dict[str, Tensor]:
    return snparam.plain_state_dict(module, bake=False)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"update": "step"}, {"blocks": "auto"}, {"gain": "learned"}, {"gain": "fixed"}],
    ids=str,
)
def test_originals_are_those_of_an_ordinary_module_and_states_belong_to_them(
    kind: str, options: dict[str, Any]
) -> None:
    plain = LAYERS[kind]()
    module = snparam.register_sn(copy.deepcopy(plain), **options)
    before = [(name, id(parameter)) for name, parameter in module.named_parameters()]
    keys = list(module.state_dict())
    reset(plain)
    reset(module)
    for name, value in originals(module).items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert [(name, id(parameter)) for name, parameter in module.named_parameters()] == before
    assert list(module.state_dict()) == keys
    snparam.verify(module, tolerance=1e-3)
    if "gain" in options:  # which keep what the originals compute
        for name, value in snparam.plain_state_dict(module).items():
            torch.testing.assert_close(value, plain.state_dict()[name])


class Own(nn.Linear):
    """Initialises by every way of writing that there is."""

    way = "in place"

    def reset_parameters(self, scale: float = 2.0) -> None:
        super().reset_parameters()
        value = scale * torch.eye(*self.weight.shape)
        if self.way == "in place":
            nn.init.eye_(self.weight).data.mul_(scale)
        elif self.way == "data":
            self.weight.data = value
        elif self.way == "a Parameter":
            self.weight = nn.Parameter(value)
        elif self.way == "raise":
            raise RuntimeError("on the way")


@pytest.mark.parametrize("way", ["in place", "data", "a Parameter"])
def test_every_way_of_writing_reaches_the_original(way: str) -> None:
    module = Own(6, 5)
    module.way = way
    snparam.register_sn(module)
    cls = type(module)
    original = module.parametrizations.weight.original
    module.reset_parameters(scale=3.0)
    assert type(module) is cls
    assert module.parametrizations.weight.original is original
    assert torch.equal(original.detach(), 3.0 * torch.eye(5, 6))
    torch.testing.assert_close(module.weight, torch.eye(5, 6))


def test_an_error_on_the_way_leaves_the_module_normalised() -> None:
    module = snparam.register_sn(Own(6, 5))
    module.way = "raise"
    cls = type(module)
    with pytest.raises(RuntimeError, match="on the way"):
        module.reset_parameters()
    assert type(module) is cls
    assert isinstance(module.parametrizations.weight[0], snparam.SpectralNorm)


def test_a_copy_is_reset_by_itself() -> None:
    module = snparam.register_sn(nn.Linear(6, 5))
    twin = copy.deepcopy(module)
    before = module.parametrizations.weight.original.clone()
    reset(twin)
    assert torch.equal(module.parametrizations.weight.original, before)
    snparam.verify(twin, tolerance=1e-3)


def test_a_network_that_was_emptied_is_initialised_again() -> None:
    """As large ones are built: on the meta device, and then layer by layer where they run."""
    model = snparam.convert_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    model.to("meta").to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    snparam.verify(model, tolerance=1e-3)


@pytest.mark.parametrize("by", ["snparam", "torch"])
def test_nothing_is_left_once_it_is_removed(by: str) -> None:
    module = snparam.register_sn(nn.Linear(6, 5))
    if by == "torch":
        parametrize.remove_parametrizations(module, "weight")
    else:
        snparam.remove_sn(module)
    assert type(module) is nn.Linear
    assert "reset_parameters" not in vars(module)
    assert nn.Linear.reset_parameters.__module__ == nn.Linear.__module__


def test_a_module_whose_norm_torch_has_removed_beside_another_is_reset_as_before() -> None:
    module = snparam.register_sn(nn.Linear(6, 5))
    parametrize.register_parametrization(module, "bias", nn.Identity())
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    plain = nn.Linear(6, 5)
    reset(plain)
    reset(module)
    assert torch.equal(module.weight, plain.weight)
