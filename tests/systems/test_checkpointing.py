"""Activation checkpointing: gradients of the unchecked run, and one move per forward."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers.same import assert_same_gradients_and_states
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.utils.checkpoint import checkpoint

import snparam


class Network(nn.Module):
    """Uses one layer twice in a region; `mode` is use_reentrant, or None without checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Conv1d(1, 4, 3)
        self.double()
        self.mode: bool | None = None

    def body(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.a(x).tanh())).relu()
        out: Tensor = self.c(x[:, None]).tanh()
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is None:
            return self.body(x)
        out: Tensor = checkpoint(self.body, x, use_reentrant=self.mode)
        return out


def pair(mode: bool, **options: object) -> list[Network]:
    """A network without and one with checkpointing, from the same cold start, which moves far."""
    networks = []
    for use in (None, mode):
        network = Network()
        network.mode = use
        torch.manual_seed(1)
        networks.append(snparam.convert_model(network, init="random", **options))  # type: ignore[arg-type]
    return networks


def inputs(count: int) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(4, 8, dtype=torch.float64, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("num_svs", [1, 3])
@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("forwards", [1, 3])
def test_gradients_equal_the_unchecked_runs(
    mode: bool, num_svs: int, update: str, forwards: int
) -> None:
    networks = pair(mode, num_svs=num_svs, update=update)
    for network in networks:
        terms = [w * network(x).square().sum() for w, x in enumerate(inputs(forwards), start=-1)]
        torch.stack(terms).sum().backward()
    assert_same_gradients_and_states(*networks)


@pytest.mark.parametrize("mode", [True, False])
def test_backward_in_another_order_than_the_forwards(mode: bool) -> None:
    networks = pair(mode)
    for network in networks:
        losses = [network(x).square().sum() for x in inputs(3)]
        for index in (1, 0, 2):
            losses[index].backward()
    assert_same_gradients_and_states(*networks)


def test_two_backward_passes_of_one_region() -> None:
    networks = pair(mode=False)
    for network in networks:
        first, second = (network(x).square().sum() for x in inputs(2))
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
    assert_same_gradients_and_states(*networks)


class Nested(Network):
    """A region in a region in a region; `modes` are theirs, outermost first."""

    modes: tuple[bool | None, ...] = (None, None, None)

    def region(self, level: int, x: Tensor) -> Tensor:
        if level == len(self.modes):
            return self.b(self.a(x).tanh()).tanh()
        for _ in range(2):  # two regions in each, with the same weights
            x = self.checkpointed(level, self.a(x))
        return x

    def checkpointed(self, level: int, x: Tensor) -> Tensor:
        if self.modes[level] is None:
            return self.region(level + 1, x)
        out: Tensor = checkpoint(self.region, level + 1, x, use_reentrant=self.modes[level])
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.region(0, x)[:, None]).tanh()
        return out


# torch's, of an inner region while the outer one runs without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("modes", list(itertools.product([True, False], repeat=3)), ids=str)
def test_regions_nest(modes: tuple[bool | None, ...]) -> None:
    networks = []
    for use in ((None, None, None), modes):
        network = Nested()
        network.modes = use
        torch.manual_seed(1)
        networks.append(snparam.convert_model(network, init="random"))
    for network in networks:
        losses = [network(x).square().sum() for x in inputs(3)]
        losses[1].backward()
        (losses[0] - 2 * losses[2]).backward()
    assert_same_gradients_and_states(*networks)


class Blocks(nn.Module):
    """Blocks in blocks, each a region of torch's composable checkpointing if it is asked for."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        outer = nn.Sequential(nn.Linear(6, 6), inner, nn.Tanh(), nn.Linear(6, 6))
        self.whole = nn.Sequential(outer, nn.Tanh(), nn.Linear(6, 3))
        snparam.convert_model(self, init="random")
        for module in (inner, outer, self.whole) if checkpointed else ():
            composable_checkpoint(module)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.whole(x)
        return out


def test_composable_regions_nest() -> None:
    networks = [Blocks(checkpointed) for checkpointed in (False, True)]
    for network in networks:
        losses = [network(x).square().sum() for x in torch.linspace(-1, 1, 72).reshape(3, 4, 6)]
        losses[1].backward()
        (losses[0] - 2 * losses[2]).backward()
    assert_same_gradients_and_states(*networks)


@pytest.mark.parametrize("mode", [True, False])
def test_several_steps_with_an_optimizer(mode: bool) -> None:
    networks = pair(mode)
    for network in networks:
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        for x in inputs(5):
            (network(x).square().mean() - network(x * 2).mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert_same_gradients_and_states(*networks)


def test_a_copy_after_forward_and_backward() -> None:
    network = pair(mode=False)[1]
    network(inputs(1)[0]).sum().backward()
    clone = copy.deepcopy(network)
    x = inputs(1)[0]
    torch.testing.assert_close(clone(x), network(x))
