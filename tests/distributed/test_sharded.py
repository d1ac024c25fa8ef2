"""Weights that are DTensors: equal to a single process, without any rank holding a whole weight.

Everything is in float64, where what is compared differs by the order of sums alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import snparam
from snparam.constraints.division import Divisor, divide
from snparam.estimators import convergence
from snparam.matrices.sharded import ShardedStack
from snparam.matrices.views import Layout

from .ranks import assert_same, on_ranks

STEPS = 20
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(16, 12)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out + 0  # FSDP2 warns of views


def train(model: nn.Module, part: int = 0, parts: int = 1) -> None:
    """The same twenty batches for everyone, of which this rank has one part."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64).chunk(parts)[part]
        y = torch.randn(8, 12, generator=generator, dtype=torch.float64).chunk(parts)[part]
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensors(model: nn.Module) -> dict[str, Any]:
    """Parameters, states and used weights, as arrays that can be sent between processes."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    model.eval()
    found |= {"up": model.up.weight, "down": model.down.weight}  # type: ignore[dict-item, union-attr]
    return {name: whole(tensor).detach().numpy() for name, tensor in found.items()}


def single(options: dict[str, Any]) -> dict[str, Any]:
    model = snparam.convert_model(Network(), **options)
    train(model)
    return tensors(model)


def tensor_parallel(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = parallelize_module(Network(), mesh, PLAN)
    snparam.convert_model(model, **options)
    assert isinstance(model.up.weight, DTensor)
    train(model)
    return tensors(model)


def fully_sharded(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    model = snparam.convert_model(Network(), **options)
    for module in (model.up, model.down, model):
        fully_shard(module)
    train(model, rank, torch.distributed.get_world_size())
    return tensors(model)


def both(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(Network(), mesh["tp"], PLAN)
    snparam.convert_model(model, **options)
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh["dp"])
    train(model, mesh["dp"].get_local_rank(), 2)
    return tensors(model)


OPTIONS: list[dict[str, Any]] = [
    {"update": "forward"},
    {"update": "step"},
    {"num_svs": 3, "num_itrs": 2},
]


def each(rank: int, system: Any) -> list[dict[str, Any]]:
    return [system(rank, options) for options in OPTIONS]


@pytest.mark.parametrize(("world", "system"), [(2, tensor_parallel), (2, fully_sharded), (4, both)])
def test_training_equals_single_process(world: int, system: Any) -> None:
    expected = [single(options) for options in OPTIONS]
    for results in on_ranks(world, each, system):
        for found, right in zip(results, expected, strict=True):
            assert_same(found, right, atol=1e-11)


def communicated(rank: int) -> tuple[dict[str, int], list[int]]:
    """What reading a weight, updating and looking at singular values sends between ranks."""
    model = snparam.convert_model(Network(), update="step")
    for module in (model.up, model.down, model):
        fully_shard(module)
    sizes: list[int] = []
    reduce = torch.distributed.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    with CommDebugMode() as mode:
        model.eval()
        assert model.up.weight.to_local().shape == (8, 12)
        snparam.update(model)
        snparam.singular_values(model)
    return {str(k).split(".")[-1]: v for k, v in mode.get_comm_counts().items()}, sizes


def test_reading_and_updating_a_sharded_weight_reduces_vectors_and_gathers_nothing() -> None:
    for counts, sizes in on_ranks(2, communicated):
        assert set(counts) == {"allreduce_"}
        # The weight read: one vector as long as a row, and one as long as a column. The update:
        # the same of both weights, together.
        assert sizes == [12, 16, 12 + 16, 16 + 12]
        assert counts["allreduce_"] == 4


def verified(rank: int, gain: Any) -> list[tuple[str, float, float]]:
    model = snparam.convert_model(Network(), gain=gain)
    for module in (model.up, model.down, model):
        fully_shard(module)
    return [(row.weight, row.estimate, row.exact) for row in snparam.verify(model, tolerance=1e-6)]


@pytest.mark.parametrize("gain", [None, "learned"])  # which FSDP2 shards, too
def test_verify_measures_sharded_weights(gain: Any) -> None:
    expected = {
        name: float(torch.linalg.matrix_norm(weight.detach(), 2))
        for name, weight in Network().named_parameters()
        if weight.ndim == 2
    }
    for rows in on_ranks(2, verified, gain):
        assert {name for name, _, _ in rows} == set(expected)
        for name, estimate, exact in rows:
            assert math.isclose(estimate, expected[name], rel_tol=1e-6)
            assert math.isclose(exact, expected[name] if gain else 1.0, rel_tol=1e-6)


SHAPES: list[tuple[tuple[int, ...], Layout, int]] = [
    ((6, 9), Layout("rows"), 1),
    ((6, 9), Layout("rows"), 3),
    ((9, 6), Layout("columns"), 2),
    ((6, 4, 3, 2), Layout("rows"), 1),
    ((6, 4, 3, 2), Layout("rows"), 2),
    ((4, 5, 3), Layout("bare"), 4),
    ((5, 6, 2), Layout("transposed_conv"), 1),
]


def ways_to_place(world: int) -> list[tuple[Any, tuple[Any, ...]]]:
    """Meshes of all ranks, in one dimension and in two, and placements on them."""
    line = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (2, world // 2))
    return [
        (line, (Shard(0),)),
        (line, (Shard(1),)),
        (line, (Replicate(),)),
        (square, (Shard(0), Shard(1))),
        (square, (Replicate(), Shard(0))),
    ]


def products(rank: int) -> None:
    """The products of a sharded stack against those of the whole one, for every placement."""
    world = torch.distributed.get_world_size()
    everywhere = ways_to_place(world)
    torch.manual_seed(0)
    for number, (dtype, (shape, layout, blocks)) in enumerate(
        itertools.product((torch.float64, torch.complex128), SHAPES)
    ):
        weight = torch.randn(shape, dtype=dtype)
        view = layout.view(shape, blocks)
        dense = view.to_matrices(weight)
        b, m, n = dense.shape
        u, v = torch.randn(b, 2, m, dtype=dtype), torch.randn(b, 2, n, dtype=dtype)
        for mesh, placements in everywhere[number % 2 :: 2]:
            stack = ShardedStack(distribute_tensor(weight, mesh, placements), view, dtype)
            torch.testing.assert_close(stack.left(u), u @ dense.conj())
            torch.testing.assert_close(stack.right(v), v @ dense.mT)
            assert stack.largest() == float(dense.abs().max())
            _, sv = convergence.converged(stack, 2 if min(m, n) > 1 else 1)
            exact = torch.linalg.svdvals(dense)[:, : sv.shape[1]]
            torch.testing.assert_close(sv, exact, rtol=1e-3, atol=1e-12)


def test_products_on_shards_equal_those_of_the_whole() -> None:
    on_ranks(4, products)


def unit(*shape: int, dtype: torch.dtype) -> Tensor:
    return nn.functional.normalize(torch.randn(shape, dtype=dtype), dim=-1)


def second_derivatives(rank: int) -> None:
    """The gradients of a penalty on gradients, against those of the division written out."""
    everywhere = ways_to_place(4)
    torch.manual_seed(0)
    for number, (dtype, (shape, layout, blocks)) in enumerate(
        itertools.product((torch.float64, torch.complex128), SHAPES)
    ):
        weight, factor = torch.randn(2, *shape, dtype=dtype)
        view = layout.view(shape, blocks)
        b, m, n = view.matrices
        u, v = unit(b, m, dtype=dtype), unit(b, n, dtype=dtype)
        slope = torch.rand(b, dtype=torch.float64) + 0.5
        constant = torch.rand(b, dtype=torch.float64) + 3
        gain = torch.rand(b, dtype=torch.float64)

        def divisor(weight: Tensor, c=constant, s=slope, u=u, v=v, view=view) -> Tensor:
            sigma = torch.einsum("bm,bmn,bn->b", u.conj(), view.to_matrices(weight), v)
            return c + s * sigma.real

        def written(weight: Tensor, gain: Tensor, view=view, divisor=divisor) -> Tensor:
            scaled = view.to_matrices(weight) * (gain / divisor(weight))[:, None, None]
            return view.from_matrices(scaled, like=weight)

        d = divisor(weight)
        d = d.reshape(()) if b == 1 else d

        def used(w: Tensor, g: Tensor, d=d, slope=slope, u=u, v=v, view=view) -> Tensor:
            return divide(w, Divisor(d, slope, g), u, v, view)

        expected = penalised(written, weight, gain, factor)
        for mesh, placements in everywhere[number % 2 :: 2]:
            parts = [distribute_tensor(x, mesh, placements) for x in (weight, factor)]
            found = penalised(used, parts[0], gain, parts[1])
            for value, right in zip(found, expected, strict=True):
                torch.testing.assert_close(whole(value), right)


def penalised(
    used: Callable[[Tensor, Tensor], Tensor], weight: Tensor, gain: Tensor, factor: Tensor
) -> tuple[Tensor, ...]:
    weight, gain = weight.detach().requires_grad_(), gain.detach().requires_grad_()
    loss = torch.linalg.vector_norm(used(weight, gain) * factor) ** 2
    inner = torch.autograd.grad(loss, (weight, gain), create_graph=True)
    norms = [torch.linalg.vector_norm(gradient) ** 2 for gradient in inner]
    return torch.autograd.grad(norms, (weight, gain))


def test_double_backward_of_sharded_weights_equals_that_of_whole_ones() -> None:
    on_ranks(4, second_derivatives)


def grouped(rank: int) -> str:
    weight = torch.randn(4, 3, 2)
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(ValueError, match="counts rows and columns") as caught:
        ShardedStack(
            sharded, Layout("transposed_conv", natural=2, groups=2).view((4, 3, 2)), weight.dtype
        )
    return str(caught.value)


def test_shards_that_are_no_pieces_of_the_matrix_are_refused() -> None:
    for message in on_ranks(2, grouped):
        assert "leave it unsharded" in message


def with_nan(rank: int) -> list[str]:
    model = Network()
    with torch.no_grad():
        model.down.weight[0, 0] = torch.nan  # on the first rank's shard alone
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, PLAN)
    with pytest.raises(ValueError, match=r"down\.weight.*NaN"):
        snparam.convert_model(model)
    return [type(module).__name__ for module in model.modules()]


def test_nan_on_one_rank_is_refused_on_all() -> None:
    for types in on_ranks(2, with_nan):
        assert types == ["Network", "Linear", "Linear"]


def shard(owner: Any, name: str) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole_weight = owner._parameters[name].detach()
    owner._parameters[name] = nn.Parameter(distribute_tensor(whole_weight, mesh, [Shard(0)]))


def operators_of_shards(rank: int) -> list[str]:
    """What is said of the operator of a convolution that is sharded before, and afterwards."""
    before, afterwards = nn.Conv1d(2, 4, 3), nn.Conv1d(2, 4, 3)
    shard(before, "weight")
    with pytest.raises(ValueError, match="sharded") as first:
        snparam.register_sn(before, norm="operator", input_size=8)
    assert type(before) is nn.Conv1d
    snparam.register_sn(afterwards, norm="operator", input_size=8, update="step")
    shard(afterwards.parametrizations.weight, "original")
    with pytest.raises(ValueError, match="sharded") as second:
        snparam.update(afterwards)
    return [str(first.value), str(second.value)]


def test_the_operator_of_a_sharded_convolution_is_refused_with_the_reason() -> None:
    for said in on_ranks(2, operators_of_shards):
        assert "'weight' of Conv1d (4, 2, 3)" in said[0]
        assert all("norm='matrix'" in each for each in said)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3, padding=1)]
    return nn.Sequential(*parts).double()


def trained_operators(update: Any, rank: int = 0, world: int = 1) -> Any:
    """What a network of convolutions computes after some steps, each rank with its batches."""
    x = torch.ones(1, 2, 8, dtype=torch.float64)
    model = snparam.convert_model(convolutions(), norm="operator", example_inputs=x, update=update)
    if world > 1:
        for module in (model[0], model[2], model):
            fully_shard(module)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randn(4, 2, 8, generator=generator, dtype=torch.float64).chunk(world)[rank]
        (model(batch) + 0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(x)  # a last forward moves the states that no optimizer's step has moved
    return {"output": model.eval()(x).detach().numpy()}


def operators_under_fsdp(rank: int) -> list[Any]:
    return [trained_operators(update, rank, 2) for update in ("forward", "step")]


def test_fsdp2_trains_operators_as_a_single_process_does() -> None:
    """Its forwards have the gathered weight; with update="step" they move the state too."""
    expected = [trained_operators(update) for update in ("forward", "step")]
    for results in on_ranks(2, operators_under_fsdp):
        for found, right in zip(results, expected, strict=True):
            assert_same(found, right, atol=1e-11)


def without_certificate(rank: int) -> list[str]:
    model = Network()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, PLAN)
    with pytest.raises(ValueError, match=r"up\.weight.*sharded, and a certificate needs the whole"):
        snparam.convert_model(model, sigma="upper")
    types = [type(module).__name__ for module in model.modules()]
    model = snparam.convert_model(Network(), sigma="upper")
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="sigma='upper': the weight is sharded"):
        snparam.weight_in_use(model.up)
    model(torch.zeros(2, 12, dtype=torch.float64))  # which FSDP2 gathers the weight for
    return types


def test_a_certificate_of_shards_is_refused() -> None:
    for types in on_ranks(2, without_certificate):
        assert types == ["Network", "Linear", "Linear"]


def trained_certified(update: Any, rank: int = 0, world: int = 1) -> Any:
    model = snparam.convert_model(Network(), sigma="upper", update=update)
    if world > 1:
        fully_shard(model)
    train(model, rank, world)
    return {"output": model.eval()(torch.ones(2, 12, dtype=torch.float64)).detach().numpy()}


def certified_under_fsdp(rank: int) -> list[Any]:
    return [trained_certified(update, rank, 2) for update in ("forward", "step")]


def test_fsdp2_trains_certified_weights_as_a_single_process_does() -> None:
    expected = [trained_certified(update) for update in ("forward", "step")]
    for results in on_ranks(2, certified_under_fsdp):
        for found, right in zip(results, expected, strict=True):
            assert_same(found, right, atol=1e-11)
