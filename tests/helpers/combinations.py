"""The cells of the table of combinations: options, layers, and what is independent of the library.

The values of each option are those that its type and the registries name, so that a new estimator,
constraint or option is in every cell without a change here.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

import snparam
from helpers.convolutions import explicit_matrix
from helpers.holder import norm_of, original_of
from helpers.spelled import dominated
from snparam.constraints.constraint import CONSTRAINTS
from snparam.estimators.estimate import ESTIMATORS
from snparam.parametrization.options import Options, Settings

Cell = dict[str, Any]

# Between the first and the second singular value of every matrix here, and a norm unlike 1.
NUMBER = 1.25
PARTS = 2  # of the rows, where several matrices are read
REGISTRIES = {"sigma": ESTIMATORS, "constraint": CONSTRAINTS}
# What says which matrices there are, and how their σ is found and when; the others say what is
# done with it.
STRUCTURE = ("norm", "sigma", "update", "blocks")
START = ("num_svs", "num_itrs", "init", "eps")


def values(option: str) -> list[Any]:
    """Values that an option takes, by its type, one number for all numbers, the default first."""

    def of(hint: Any) -> list[Any]:
        if get_origin(hint) in (Union, UnionType):
            return [value for part in get_args(hint) for value in of(part)]
        if get_origin(hint) is Literal:
            return list(get_args(hint))
        if hint is str:
            return list(REGISTRIES[option])
        return {bool: [False, True], float: [NUMBER], int: [PARTS], NoneType: [None]}[hint]

    default = getattr(Settings(), option)
    others = of(get_type_hints(Options)[option])
    return [default, *(value for value in others if value != default)]


def name_of(cell: Cell) -> str:
    """The name of a cell in the output of pytest."""
    return ",".join(f"{k}={v}" for k, v in cell.items()) or "defaults"


def _uses() -> Iterator[Cell]:
    yield {}
    options = [f.name for f in fields(Settings) if f.name not in (*STRUCTURE, *START)]
    changes = [(name, value) for name in options for value in values(name)[1:]]
    for name, value in changes:
        yield {name: value}
    for (name, value), (other, other_value) in itertools.combinations(changes, 2):
        if name != other:
            yield {name: value, other: other_value}


def changed(cell: Cell) -> Cell:
    """The options of a cell that are not at their defaults."""
    default = Settings()
    return {name: value for name, value in cell.items() if value != getattr(default, name)}


def is_accepted(cell: Cell) -> bool:
    """Whether the options go together, whatever the weight is."""
    try:
        Settings(**cell)
    except (TypeError, ValueError):
        return False
    return True


# What is done with σ: by one option, or by two.
USES = list(_uses())
STRUCTURES = [
    dict(zip(STRUCTURE, chosen, strict=True))
    for chosen in itertools.product(*(values(option) for option in STRUCTURE))
]


LAYERS: dict[str, Any] = {
    "Linear": lambda: nn.Linear(5, 6),
    "complex Linear": lambda: nn.Linear(4, 6, dtype=torch.complex64),
    "grouped Conv2d": lambda: nn.Conv2d(4, 6, 2, padding=1, groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(3, 4, 3, stride=2),
    "Embedding": lambda: nn.Embedding(6, 4),
}
SIZES = {"grouped Conv2d": (4, 3), "ConvTranspose1d": (4,)}


def layer_for(kind: str, seed: int = 0) -> Any:
    """A layer whose matrices have σ₁ far above all others."""
    layer = LAYERS[kind]()
    axis = 1 if kind == "ConvTranspose1d" else 0
    shape = tuple(layer.weight.shape)
    weight = dominated(shape, torch.float32, axis, seed).to(layer.weight.dtype)
    if weight.is_complex():  # factors of length 1 to rows and columns leave the singular values
        phases = torch.polar(torch.ones(10), torch.arange(10.0))
        weight = phases[:6, None] * weight * phases[6:]
    layer.weight = nn.Parameter(2 * weight)
    if getattr(layer, "bias", None) is not None:
        layer.bias = nn.Parameter(torch.ones_like(layer.bias))
    return layer


def inputs_for(kind: str) -> Tensor:
    """A batch of two that a layer takes."""
    layer = LAYERS[kind]()
    if kind == "Embedding":
        return torch.arange(6)
    generator = torch.Generator().manual_seed(3)
    channels = getattr(layer, "in_channels", None) or layer.in_features
    shape = (2, channels, *SIZES.get(kind, ()))
    return torch.randn(shape, generator=generator).to(layer.weight.dtype)


def register(layer: Any, kind: str, cell: Cell, **others: Any) -> Any:
    """Register a layer of a kind with the options of a cell."""
    size = {"input_size": SIZES[kind]} if cell["norm"] == "operator" and kind in SIZES else {}
    return snparam.register_sn(layer, **size, **cell, **others)


def exact_sigmas(kind: str, cell: Cell, weight: Tensor) -> Tensor:
    """σ of each matrix that a weight is read as, by decompositions in float64."""
    weight = weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float64))
    layer = LAYERS[kind]()
    if cell["norm"] == "operator" and kind in SIZES:
        layer.weight, layer.bias = nn.Parameter(wide), None
        matrices = [explicit_matrix(layer, SIZES[kind])]
    else:
        axis = 1 if kind == "ConvTranspose1d" else 0
        matrix = wide.movedim(axis, 0).flatten(1)
        parts = {None: 1, "auto": getattr(layer, "groups", 1)}.get(cell["blocks"], cell["blocks"])
        matrices = list(matrix.chunk(parts))
    return torch.stack([torch.linalg.matrix_norm(m, 2) for m in matrices])


KINDS = list(LAYERS)
# `constraint=` says by name what the other options say too.
IMPLIED = [use for use in USES if "constraint" not in use]
CELLS = [structure | use for structure in STRUCTURES for use in IMPLIED]
WORKING = [cell for cell in CELLS if is_accepted(cell)]
NEAR = 2e-3  # right after conversion, the norm of a convolution is within 1e-3


def kind_of(cell: Cell) -> str:
    """The kind of layer that a cell is tried on; neighbouring cells are tried on different ones."""
    kinds = list(SIZES) if cell["norm"] == "operator" else KINDS
    return kinds[CELLS.index(cell) % len(kinds)]


def everything(layer: nn.Module) -> Any:
    """What a layer consists of."""
    state = {name: (id(p), p.detach().clone()) for name, p in layer.named_parameters()}
    buffers = {name: (id(b), b.clone()) for name, b in layer.named_buffers()}
    own = {name: dict(v) if isinstance(v, dict) else v for name, v in vars(layer).items()}
    return type(layer), list(layer.state_dict()), state, buffers, own


def assert_unchanged(layer: nn.Module, before: Any) -> None:
    kind, keys, parameters, buffers, own = everything(layer)
    assert (kind, keys, own) == (before[0], before[1], before[4])
    for now, then in ((parameters, before[2]), (buffers, before[3])):
        assert now.keys() == then.keys()
        for name, (identity, value) in now.items():
            assert identity == then[name][0], name
            assert torch.equal(value, then[name][1]), name


def assert_keeps_its_promise(kind: str, cell: Cell, layer: Any, weight: Tensor) -> None:
    """Whether a weight in use has the norm that its constraint promises, or with a bound no more.

    A bound for inputs of every size may be far above the norm at a small one.
    """
    norm = norm_of(layer)
    promised = norm.promised_norm(exact_sigmas(kind, cell, original_of(layer))).double()
    used = exact_sigmas(kind, cell, weight)
    if ESTIMATORS[cell["sigma"]].side == "above":
        assert (used <= promised * (1 + 1e-12)).all()
        assert (used >= promised / 3).all()
    else:
        torch.testing.assert_close(used, promised.expand_as(used), rtol=NEAR, atol=0)


def assert_says_why(message: str, cell: Cell) -> None:
    """Whether an error names an option that was given, with its value."""
    named = [f"{name}={value!r}" for name, value in changed(cell).items()]
    assert any(option in message for option in named), message


def rows_of_the_table() -> list[list[str]]:
    """The cells of the table under "What goes with what", the header first."""
    page = Path(__file__).parents[2] / "docs" / "guarantees.md"
    section = (
        page.read_text(encoding="utf-8")
        .partition("## What goes with what")[2]
        .partition("\n## ")[0]
    )
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


HEADER, *ROWS = rows_of_the_table()


def meant(cell: str) -> list[Cell]:
    """The options that a cell of the header or the first column names, with each of its values."""
    found = re.fullmatch(r"`(\w+)=([^`]*)`", cell)
    if found is None:
        return [{}]
    option, value = found.groups()
    if value == "":
        return [{option: each} for each in values(option)[1:]]
    if value in ("c", "r"):
        return [{option: NUMBER}]
    return [{option: ast.literal_eval(value)}]
