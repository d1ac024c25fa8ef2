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
from snparam.layers.table import USER_ROWS


@pytest.fixture(autouse=True)
def _only_its_own_rows() -> Iterator[None]:
    yield
    USER_ROWS.clear()


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
    call = str(snparam.plan_conversion(model)).splitlines()[-2].strip()
    assert call == f'snparam.register_layer_type("{__name__}.Dense", {{"kernel": "rows"}})'
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
    assert not USER_ROWS


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
    assert not USER_ROWS


def test_a_function_that_gives_no_layout_is_named() -> None:
    register_layer_type(Dense, {"kernel": lambda module: "rows"})
    with pytest.raises(TypeError, match=r"test_layertypes.Dense gave 'rows'"):
        snparam.plan_conversion(Dense())


@pytest.mark.parametrize("kind", ["row", "", "transposed"])
def test_layouts_know_their_kinds(kind: str) -> None:
    with pytest.raises(ValueError, match="expected one of rows, columns"):
        Layout(kind)


# Names that a class does not have


class Annotated(nn.Module):
    kernel: nn.Parameter

    def reset(self) -> None:
        pass


class Registered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("kernel", nn.Parameter(torch.randn(5, 3)))


class Counted(nn.Module):
    def __init__(self, count: int = 2) -> None:
        super().__init__()
        for i in range(count):
            setattr(self, f"kernel{i}", nn.Parameter(torch.randn(5, 3)))


class Built(nn.Module):
    """Its tensor is made by a method that its __init__ calls."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def build(self) -> None:
        self.kernel = nn.Parameter(torch.randn(5, 3))


@pytest.mark.parametrize("kind", [Dense, Derived, Annotated, Registered, Counted, Built])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_tensor_that_a_class_does_not_have_is_refused_with_the_nearest(
    kind: type[nn.Module], by_name: bool
) -> None:
    given: Any = f"{kind.__module__}.{kind.__qualname__}" if by_name else kind
    message = rf"'kernle' \(did you mean 'kernel'\?\).*{kind.__name__}"
    with pytest.raises(ValueError, match=message):
        register_layer_type(given, {"kernle": "rows"})
    assert not USER_ROWS
    register_layer_type(given, {"kernel0" if kind is Counted else "kernel": "columns"})
    assert len(USER_ROWS) == 1


class WithMask(nn.Module):
    """Its tensors have constant names, whatever they are set by."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("mask", torch.ones(5), persistent=False)
        setattr(self, "scale", nn.Parameter(torch.ones(5)))  # noqa: B010 - as people write it


@pytest.mark.parametrize("name", ["kernels", "kernel_", "weight", "foo"])
@pytest.mark.parametrize("kind", [WithMask, Registered])
def test_constant_names_are_all_that_there_are(kind: type[nn.Module], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name!r}.*{kind.__name__}"):
        register_layer_type(kind, {name: "rows"})
    assert not USER_ROWS


def test_a_wrong_name_is_refused_by_the_decorator_too() -> None:
    with pytest.raises(ValueError, match="kernle"):

        @register_layer_type(weights={"kernle": "columns"})
        class Own(Dense):
            pass


@pytest.mark.parametrize("name", ["ker*", "k[ae]rnel", "?ernel", "inner.kernal"])
def test_globs_and_dotted_names_are_not_looked_for(name: str) -> None:
    register_layer_type(Dense, {name: "columns"})


def test_a_class_that_is_not_loaded_yet_may_have_any_tensor() -> None:
    register_layer_type("library.layers.Dense", {"anything": "rows"})


# What a registration keeps


def test_a_registration_does_not_keep_a_class_alive() -> None:
    """As one that a notebook defines anew."""
    import gc
    import weakref

    def define() -> Any:
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.kernel = nn.Parameter(torch.randn(5, 3))

        register_layer_type(Own, {"kernel": "columns"})
        assert row(snparam.convert_model(Own())).reason == "already normalised"
        return weakref.ref(Own)

    gone = define()
    gc.collect()
    assert gone() is None
    assert not USER_ROWS


def test_the_last_registration_counts_by_type_or_by_name() -> None:
    name = f"{Dense.__module__}.Den*"
    for kinds in ([Dense, name], [name, Dense]):
        USER_ROWS.clear()
        register_layer_type(kinds[0], {"kernel": "rows"})
        register_layer_type(kinds[1], {"kernel": "columns"})
        assert row(Dense(5, 3)).matrices == (1, 3, 5)


# Tensors of a module inside


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 3))


class Attention(nn.Module):
    """Reads the kernel of a module inside itself."""

    def __init__(self) -> None:
        super().__init__()
        self.out = Projection()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.out.kernel


def test_a_tensor_that_a_module_reads_of_one_inside_is_in_plans_as_in_registrations() -> None:
    register_layer_type(Attention, {"out.kernel": "columns"})
    model = nn.Sequential(Attention(), Projection())
    inside, alone = snparam.plan_conversion(model)
    assert (inside.weight, inside.decision) == ("0.out.kernel", "convert")
    assert inside.matrices == (1, 3, 5)
    assert alone.reason == "Projection is not in the layer table"
    snparam.convert_model(model)
    registered = snparam.register_sn(Attention())
    for attention in (model[0], registered):
        assert attention.out.parametrizations.kernel[0].view.matrices == (1, 3, 5)


def test_the_obstacle_of_the_module_around_counts() -> None:
    register_layer_type(Attention, {"out.kernel": "columns"}, skip="it is special")
    register_layer_type(Projection, {"kernel": "columns"})
    assert row(Attention()).reason == "it is special"
    assert row(Projection()).decision == "convert"
