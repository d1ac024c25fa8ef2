"""Other tensors for one call, and parametrizations that torch moves: as with torch's own."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize, stateless

import snparam
from snparam.testing import assert_same_function

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def ours(network):
    return snparam.convert_model(network)


def torchs(network):
    for i in (0, 2):
        torch_parametrizations.spectral_norm(network[i])
    return network


def deprecated(*args, **kwargs):
    with pytest.warns(FutureWarning, match="deprecated"):
        return stateless.functional_call(*args, **kwargs)


@pytest.mark.parametrize("convert", [ours, torchs])
@pytest.mark.parametrize("call", [torch.func.functional_call, deprecated])
def test_a_call_with_other_tensors_is_a_call_of_a_network_that_has_them(convert, call):
    model, other = convert(network()).eval(), convert(network()).eval()
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.3)
    before = copy.deepcopy(model.state_dict())
    given = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    torch.testing.assert_close(call(model, given, (X,)), other(X))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # some of them: the rest is the network's own
    original = {"0.parametrizations.weight.original": given["0.parametrizations.weight.original"]}
    expected = copy.deepcopy(model)
    expected[0].parametrizations.weight.original.data.copy_(*original.values())
    torch.testing.assert_close(call(model, original, (X,)), expected(X))


@pytest.mark.parametrize("convert", [ours, torchs])
def test_within_a_call_the_state_dict_is_that_of_the_tensors_given(convert):
    class Records(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = convert(network())

        def forward(self, x):
            self.seen = self.layer.state_dict()
            return self.layer(x)

    model = Records().eval()
    key = "layer.0.parametrizations.weight.original"
    torch.func.functional_call(model, {key: torch.ones(6, 4)}, (X,))
    assert torch.equal(model.seen[key.removeprefix("layer.")], torch.ones(6, 4))


# transfer_parametrizations_and_params


def transferred(convert):
    """A network under `convert` and an ordinary one that torch has given its parametrizations."""
    source, target = convert(network()).eval(), network().eval()
    for i in (0, 2):
        nn.init.normal_(target[i].weight)
        parametrize.transfer_parametrizations_and_params(source[i], target[i])
        target[i].bias.data.copy_(source[i].bias)
    return source, target


@pytest.mark.parametrize("convert", [ours, torchs])
def test_the_source_of_a_transfer_stays_what_it_is(convert):
    before = convert(network()).eval()(X)
    source, target = transferred(convert)
    assert torch.equal(source(X), before)
    assert torch.equal(target(X), before)


@pytest.mark.parametrize("spelling", ["plain", "snparam", "torch", "torch-hook", "biggan"])
def test_what_was_transferred_is_written_in_every_spelling(spelling):
    source, target = transferred(ours)
    state, expected = (snparam.state_dict_for(model, spelling) for model in (target, source))
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_what_was_transferred_is_restored():
    source, target = transferred(ours)
    restored = snparam.restore_model(copy.deepcopy(target))
    assert_same_function(restored, source, X)


def moved_by_torch(source, target):
    parametrize.transfer_parametrizations_and_params(source, target)


def registered_by_torch(source, target):
    parametrize.register_parametrization(target, "weight", source.parametrizations.weight[0])


@pytest.mark.parametrize("move", [moved_by_torch, registered_by_torch])
def test_a_module_that_outlives_the_first_is_normalised_in_training(move):
    """Nothing else tells that its weight has changed: fused optimizers count no writes."""

    def train(layer, steps):
        optimizer = torch.optim.Adam(layer.parameters(), 0.3, fused=True)
        for _ in range(steps):
            layer(torch.randn(8, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    source = snparam.register_sn(nn.Linear(16, 16), update="step")
    train(source, 5)
    target = nn.Linear(16, 16)
    move(source, target)
    del source
    gc.collect()
    train(target, 20)
    norm = torch.linalg.matrix_norm(target.eval().weight.detach(), 2)
    assert float(norm) == pytest.approx(1, abs=0.1)
    used = target.train().weight.detach()
    assert float(torch.linalg.matrix_norm(used, 2)) == pytest.approx(1, abs=0.1)
