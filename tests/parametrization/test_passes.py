"""Passes between two updates with `update="step"`, which share one normalised weight.

Nothing of it may be seen, by gradients least of all. The weights here are large enough for it.
"""

import pytest
import torch
from helpers.holder import original_of
from test_memory import COLUMNS, X, close, layer_with
from torch import nn

import snparam


@pytest.fixture
def stepped():
    return layer_with(update="step")


def test_passes_between_updates_share_the_weight_and_add_up(stepped):
    first, second = stepped.weight, stepped.weight
    assert first.data_ptr() == second.data_ptr()
    assert first.grad_fn is not second.grad_fn
    passes = [X * scale for scale in (1.0, 0.5, 2.0)]
    for x in passes:
        stepped(x).square().sum().backward()
    found = original_of(stepped).grad.clone()
    original_of(stepped).grad = None
    stepped(torch.cat(passes)).square().sum().backward()
    close(found, original_of(stepped).grad)


def test_gradients_of_later_passes_do_not_wait_for_one_another():
    """Else those of all weights would be held at once, as those of a plain network are not."""
    model = nn.Sequential(
        snparam.register_sn(nn.Linear(COLUMNS, COLUMNS), update="step"),
        snparam.register_sn(nn.Linear(COLUMNS, COLUMNS), update="step"),
    )
    done = []
    for number, layer in enumerate(model):
        original_of(layer).register_post_accumulate_grad_hook(
            lambda _, number=number: done.append(f"weight {number}")
        )
    for _ in range(3):
        done.clear()
        hidden = model[0](X)
        hidden.register_hook(lambda _: done.append("hidden"))
        model[1](hidden).square().sum().backward()
        assert done == ["weight 1", "hidden", "weight 0"]


def changes(layer):
    original = original_of(layer)
    optimizer = torch.optim.SGD([original], lr=0.1)

    def step():
        original.grad = torch.ones_like(original)
        optimizer.step()

    def load():
        layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()})

    def in_place():
        with torch.no_grad():
            original.add_(0.1)

    def past_the_version():
        original.data.add_(0.1)

    def elsewhere():
        original.data = original.data + 0.1

    def assigned():
        layer.weight = original.detach() + 0.1

    return {
        "optimizer": step, "load": load, "in place": in_place, "data": past_the_version,
        "elsewhere": elsewhere, "assigned": assigned, "update": lambda: snparam.update(layer),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:SpectralNorm on:UserWarning")
@pytest.mark.parametrize("change", changes(layer_with()))
def test_a_change_of_the_weight_ends_what_passes_share(stepped, change):
    first = stepped.weight
    changes(stepped)[change]()
    second = stepped.weight
    assert second.data_ptr() != first.data_ptr()
    original = original_of(stepped).detach()
    # Divided by one number: the last σ that was computed.
    ratio = original / second.detach()
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


WRITES = {
    "detached": lambda w: w.detach().zero_(),
    "data": lambda w: w.data.clamp_(-1e-3, 1e-3),  # as a critic's weights are clipped
    "numpy": lambda w: w.detach().numpy().fill(0),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_shared_weight_that_is_written_to_is_made_anew(stepped, how):
    right = stepped.weight.detach().clone()
    WRITES[how](stepped.weight)
    assert torch.equal(stepped.weight, right)


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen weight", "eval"])
def test_passes_of_another_kind_have_a_weight_of_their_own(stepped, how):
    first = stepped.weight
    if how == "no_grad":
        with torch.no_grad():
            other = stepped.weight
    elif how == "inference_mode":
        with torch.inference_mode():
            other = stepped.weight
    elif how == "eval":
        other = stepped.eval().weight
        stepped.train()
    else:
        original_of(stepped).requires_grad_(False)
        other = stepped.weight
        original_of(stepped).requires_grad_(True)
    assert other.data_ptr() != first.data_ptr()
    assert other.requires_grad == (how == "eval")
    close(other, first)
    stepped(X).sum().backward()
    assert original_of(stepped).grad is not None


def test_second_derivatives_through_shared_passes(stepped):
    """Twice a gradient penalty: each pass frees its own graph and not that of the weight."""
    found = []
    for _ in range(2):
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(stepped(x).square().sum(), x, create_graph=True)
        (grad,) = torch.autograd.grad(slope.square().sum(), original_of(stepped))
        found.append(grad)
    assert torch.equal(*found)
