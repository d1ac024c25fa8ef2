"""The layer table: how it is looked up, and how users add to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import snparam
from snparam import Layout, register_layer_type
from snparam.layers import table as layers


@pytest.fixture(autouse=True)
def _only_its_own_rows() -> Iterator[None]:
    before = list(layers.USER_ROWS)
    yield
    layers.USER_ROWS[:] = before


class Dense(nn.Module):
    """Stores its kernel input-first."""

    def __init__(self, inputs: int = 5, outputs: int = 3) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


class Derived(Dense):
    pass


class Experts(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(*shape))


def row(model: nn.Module, **options: Any) -> Any:
    (found,) = snparam.plan_conversion(model, **options)
    return found


def sigmas(model: nn.Module, name: str) -> list[float]:
    """σ of each matrix of (matrices, ...) in use, by numpy-like reading of the last two axes."""
    weight = getattr(model, name).detach().double()
    return [float(torch.linalg.svdvals(matrix)[0]) for matrix in weight]


def test_unknown_types_are_left_alone_and_a_registration_changes_that() -> None:
    model = Dense()
    assert row(model).decision == "skip"
    assert row(model).reason == "Dense is not in the layer table"
    assert "register_layer_type" in str(snparam.plan_conversion(model)).splitlines()[-2]
    assert register_layer_type(Dense, {"kernel": "columns"}) is Dense
    assert row(model).decision == "convert"
    assert row(model).matrices == (1, 3, 5)
    assert "register_layer_type" not in str(snparam.plan_conversion(model))
    snparam.convert_model(model)
    assert model.parametrizations.kernel[0].u.shape == (1, 1, 3)
    assert float(torch.linalg.matrix_norm(model.kernel.detach(), 2)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 16), (16, 1, 1), (1, 16), (1, 1)])
def test_a_vector_of_an_unknown_type_is_called_one_whatever_its_dimensions(shape: Any) -> None:
    """Class tokens, scales of each channel."""
    assert row(Experts(*shape)).reason == "a single vector, and no matrix"
    assert row(nn.Linear(16, 1)).decision == "convert"  # where it multiplies, it is a matrix


def test_it_decorates_a_class() -> None:
    @register_layer_type(weights={"kernel": "columns"})
    class Own(Dense):
        pass

    assert isinstance(Own, type)
    assert row(Own()).matrices == (1, 3, 5)
    assert row(Dense()).decision == "skip"


def test_subclasses_and_injected_classes_count_and_the_nearest_class_wins() -> None:
    register_layer_type(Dense, {"kernel": "columns"})
    assert row(Derived()).matrices == (1, 3, 5)
    register_layer_type(Derived, {"kernel": "rows"})
    assert row(Derived()).matrices == (1, 5, 3)
    assert row(Dense()).matrices == (1, 3, 5)
    model = Dense()
    model.scale = nn.Parameter(torch.ones(2, 2))
    parametrize.register_parametrization(model, "scale", nn.Identity())
    assert type(model) is not Dense
    rows = {r.tensor: r for r in snparam.plan_conversion(model)}
    assert rows["kernel"].matrices == (1, 3, 5)
    assert rows["scale"].decision == "skip"


def test_by_qualified_name_without_the_class() -> None:
    register_layer_type(f"{__name__}.Den*", {"kernel": "columns"})
    assert row(Dense()).matrices == (1, 3, 5)
    assert row(Derived()).matrices == (1, 3, 5)
    register_layer_type(f"{__name__}.Dense", {"kernel": "rows"})  # the last one counts
    assert row(Dense()).matrices == (1, 5, 3)


def test_types_of_torch_can_be_read_otherwise() -> None:
    register_layer_type(nn.Linear, {"weight": Layout("rows", natural=2)})
    assert row(nn.Linear(3, 4), blocks="auto").matrices == (2, 2, 3)


@pytest.mark.parametrize(
    ("layout", "shape", "matrices"),
    [("stack", (4, 6, 5), (4, 6, 5)), ("stack_columns", (4, 5, 6), (4, 6, 5))],
)
def test_a_stack_is_as_many_matrices_as_it_is_long_whatever_blocks_are(
    layout: str, shape: tuple[int, ...], matrices: tuple[int, int, int]
) -> None:
    register_layer_type(Experts, {"kernels": layout})
    model = Experts(*shape)
    for blocks in (None, 1, 4, "auto"):
        assert row(model, blocks=blocks).matrices == matrices
    assert row(model, blocks=8).matrices == (8, 3, 5)
    skipped = row(model, blocks=3)
    assert (skipped.decision, skipped.reason) == (
        "skip",
        "a stack of 4 matrices does not split into blocks=3 equal blocks",
    )
    snparam.convert_model(model)
    assert sigmas(model, "kernels") == pytest.approx([1] * 4, abs=1e-3)


def test_a_stack_of_stacks_of_rows_is_split_by_auto() -> None:
    register_layer_type(Experts, {"kernels": lambda m: Layout("stack", natural=2)})
    model = Experts(3, 8, 5)
    assert row(model, blocks="auto").matrices == (6, 4, 5)
    snparam.convert_model(model, blocks="auto")
    used = model.kernels.detach().reshape(6, 4, 5).double()
    for matrix in used:
        assert float(torch.linalg.svdvals(matrix)[0]) == pytest.approx(1, abs=1e-3)


def test_a_matrix_is_no_stack() -> None:
    register_layer_type(Experts, {"kernels": "stack"})
    assert row(Experts(4, 6)).reason == "a stack of matrices has three dimensions or more, not 2"


def test_skip_leaves_alone_with_its_reason_and_register_sn_says_it() -> None:
    register_layer_type(Dense, {"kernel": "rows"}, skip="its forward throws the scale away")
    assert (row(Dense()).decision, row(Dense()).reason) == (
        "skip",
        "its forward throws the scale away",
    )
    with pytest.raises(ValueError, match="throws the scale away"):
        snparam.register_sn(Dense())


def test_inside_speaks_for_the_modules_within() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 6)
            self.down = nn.ModuleDict({"first": nn.Linear(4, 2)})

    register_layer_type(Adapted, inside={"base.*": Layout("rows", natural=3), "*": "an adapter"})
    rows = {r.weight: r for r in snparam.plan_conversion(nn.Sequential(Adapted()), blocks="auto")}
    assert rows["0.base.weight"].matrices == (3, 2, 4)
    assert rows["0.down.first.weight"].reason == "an adapter"
    register_layer_type(Adapted, inside={"base.*": None, "*": "an adapter"})
    rows = {r.weight: r for r in snparam.plan_conversion(nn.Sequential(Adapted()), blocks="auto")}
    assert rows["0.base.weight"].matrices == (1, 6, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((Dense,), ValueError, "pass weights="),
        ((Dense, {"kernel": "column"}), ValueError, "did you mean 'columns'"),
        ((Dense, {"kernel": 3}), TypeError, r"weights\['kernel'\]=3"),
        ((Dense, {}), TypeError, "weights={}"),
        ((Dense, {1: "rows"}), TypeError, "has 1"),
        ((Dense, "kernel"), TypeError, "weights='kernel'"),
        ((int, {"kernel": "rows"}), TypeError, "expected a module type"),
        ((Dense(), {"kernel": "rows"}), TypeError, "expected a module type"),
        ((nn.Module, {"kernel": "rows"}), ValueError, "every module"),
        (("Dense", {"kernel": "rows"}), ValueError, "qualified name"),
    ],
    ids=str,
)
def test_mistakes_are_errors_that_name_them(
    arguments: tuple[Any, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        register_layer_type(*arguments)
    assert not layers.USER_ROWS


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"skip": ""}, ValueError, "skip=''"),
        ({"skip": True}, ValueError, "skip=True"),
        ({"inside": {"a": ""}}, ValueError, "expected a reason"),
        ({"inside": {"a": 3}}, TypeError, r"inside\['a'\]=3"),
    ],
    ids=str,
)
def test_mistakes_in_options_are_errors(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        register_layer_type(Dense, {"kernel": "rows"}, **options)
    assert not layers.USER_ROWS


def test_a_function_that_gives_no_layout_is_named() -> None:
    register_layer_type(Dense, {"kernel": lambda module: "rows"})
    with pytest.raises(TypeError, match=r"test_layertypes.Dense gave 'rows'"):
        snparam.plan_conversion(Dense())


@pytest.mark.parametrize("kind", ["row", "", "transposed"])
def test_layouts_know_their_kinds(kind: str) -> None:
    with pytest.raises(ValueError, match="expected one of rows, columns"):
        Layout(kind)
