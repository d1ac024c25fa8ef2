"""Methods in the class that torch makes for a parametrized module."""

import copy

import pytest
from torch import nn
from torch.nn.utils import parametrize

from snparam.parametrization.classes import give_own_class, unwrap, wrap


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(3, 3).weight.detach())

    def describe(self, word):
        """Say it."""
        return f"plain {word}"


def loudly(describe, module, word):
    return describe(module, word).upper()


def twice(describe, module, word):
    return f"{describe(module, word)}, {describe(module, word)}"


def parametrized():
    return parametrize.register_parametrization(Layer(), "weight", nn.Identity())


def test_a_method_is_wrapped_once_and_keeps_its_name_and_documentation():
    layer = parametrized()
    for _ in range(2):
        wrap(type(layer), "describe", twice)
    assert layer.describe("a") == "plain a, plain a"
    assert type(layer).describe.__name__ == "describe"
    assert type(layer).describe.__doc__ == "Say it."
    assert Layer().describe("a") == "plain a"


@pytest.mark.parametrize("first", [loudly, twice])
def test_wrapping_is_undone_in_any_order_and_not_where_it_was_not_done(first):
    layer = parametrized()
    (second,) = {loudly, twice} - {first}
    wrap(type(layer), "describe", loudly)
    wrap(type(layer), "describe", twice)
    unwrap(type(layer), "describe", first)
    assert layer.describe("a") == {loudly: "PLAIN A", twice: "plain a, plain a"}[second]
    unwrap(type(layer), "describe", first)
    unwrap(type(layer), "describe", second)
    assert layer.describe("a") == "plain a"
    assert "describe" not in vars(type(layer))
    unwrap(Layer, "describe", loudly)
    assert layer.describe("a") == "plain a"


def test_a_method_that_the_class_had_itself_comes_back():
    layer = parametrized()
    own = vars(type(layer))["__getstate__"]
    wrap(type(layer), "__getstate__", loudly)
    unwrap(type(layer), "__getstate__", loudly)
    assert vars(type(layer))["__getstate__"] is own


def test_a_class_of_its_own_is_changed_for_one_of_two_copies():
    layer = parametrized()
    wrap(type(layer), "describe", loudly)
    twin = copy.deepcopy(layer)
    give_own_class(twin)
    assert twin.describe("a") == "PLAIN A"
    unwrap(type(twin), "describe", loudly)
    assert (layer.describe("a"), twin.describe("a")) == ("PLAIN A", "plain a")
