"""torch.compile, torch.export, torch.func: the same numbers as eager runs and plain loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.same import assert_same_gradients_and_states
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import snparam
from snparam.matrices import products


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(2, 4, 3)
        self.b = nn.Linear(36, 8)
        self.c = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.a(x).flatten(1)).relu())
        return out


X = torch.linspace(-1, 1, 4 * 2 * 25).reshape(4, 2, 5, 5)


OPTIONS: list[dict[str, Any]] = [
    {"update": "forward"},
    {"update": "step"},
    {"num_svs": 3, "gain": "learned"},
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_training_and_eval_equal_eager(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    eager = snparam.convert_model(Network(), init="random", **options)
    traced = copy.deepcopy(eager)
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        graphs.append(graph)
        return compile_fx(graph, inputs)

    compiled = torch.compile(traced, fullgraph=True, backend=counted)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (eager, traced)]
    for training in (True, True, True, False, True, False):
        for model, run, optimizer in (
            (eager, eager, optimizers[0]),
            (traced, compiled, optimizers[1]),
        ):
            model.train(training)
            run(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(compiled(X), eager(X), rtol=1e-4, atol=1e-5)
    # One for training and one for eval, whatever the steps and switches; with update="step" one
    # more for the training that trusts the optimizers' hooks.
    assert len(graphs) == (3 if options.get("update") == "step" else 2)
    for (name, a), b in zip(eager.named_buffers(), traced.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cached_networks_are_compiled_whole(mode: Any) -> None:
    model = snparam.convert_model(Network()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(X).detach()
    with mode(), snparam.cached(model):
        for _ in range(2):
            torch.testing.assert_close(compiled(X), expected)


@pytest.mark.parametrize("bake", [False, True])
def test_exported_programs_equal_eager(bake: bool) -> None:
    model = snparam.convert_model(Network()).eval()
    expected = model(X)
    if bake:
        snparam.restore_model(model)
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_goes_on_in_an_exported_program_as_in_eager(options: dict[str, Any]) -> None:
    eager = snparam.convert_model(Network(), init="random", **options)
    start = {name: b.clone() for name, b in eager.named_buffers()}
    exported = torch.export.export(copy.deepcopy(eager), (X,)).module()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (eager, exported)]
    if options.get("update") == "step":  # nothing but the eager network knows how to update
        optimizers = []
    for _ in range(3):
        for model in (eager, exported):
            model(X).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(exported(X), eager(X), rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in eager.named_parameters()}
    states = dict(eager.named_buffers())
    for name, p in exported.named_parameters():
        torch.testing.assert_close(p.grad, gradients.pop(name), rtol=1e-3, atol=1e-4)
    for name, b in exported.named_buffers():
        torch.testing.assert_close(b, states.pop(name), rtol=1e-3, atol=1e-4)
    assert not gradients
    assert not states
    if options.get("update") != "step":
        assert all(not torch.equal(b, start[name]) for name, b in exported.named_buffers())


def functional() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    model = snparam.convert_model(Network().double()).eval()
    return model, dict(model.named_parameters()), dict(model.named_buffers())


def loss(
    model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor
) -> Tensor:
    return functional_call(model, (parameters, buffers), (x,)).square().sum()


def test_per_sample_gradients_equal_a_loop() -> None:
    model, parameters, buffers = functional()
    detached = {name: p.detach() for name, p in parameters.items()}

    def one(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(model, p, buffers, x[None])

    x = X.double()
    found = vmap(grad(one), (None, 0))(detached, x)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(
            model(sample[None]).square().sum(), list(parameters.values())
        )
        for value, right in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(value[index], right)


# torch.jit's, in torch.func's own decompositions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_equals_differences() -> None:
    model, parameters, buffers = functional()
    detached = {name: p.detach() for name, p in parameters.items()}
    torch.manual_seed(1)
    tangents = {name: torch.randn_like(p) for name, p in detached.items()}
    norms = [
        m[0] for m in model.modules() if isinstance(m, nn.utils.parametrize.ParametrizationList)
    ]
    for norm in norms:  # converged, where u and v are stationary and the estimate is sigma itself
        assert norm.u.dtype == torch.float64

    def f(p: dict[str, Tensor]) -> Tensor:
        return loss(model, p, buffers, X.double())

    _, found = jvp(f, (detached,), (tangents,))
    expected = sum(
        (g * t).sum()
        for g, t in zip(
            torch.autograd.grad(f(parameters), list(parameters.values())),
            tangents.values(),
            strict=True,
        )
    )
    torch.testing.assert_close(found, expected)


def test_training_under_a_transform_with_buffers_passed_in() -> None:
    model, parameters, buffers = functional()
    model.train()

    def f(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return loss(model, p, b, X.double())

    clones = {name: b.clone() for name, b in buffers.items()}
    found = grad(f)({name: p.detach() for name, p in parameters.items()}, clones)
    expected = torch.autograd.grad(model(X.double()).square().sum(), list(parameters.values()))
    for value, right in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("num_svs", [2, 8])
def test_large_weights_are_compiled_and_exported_whole(num_svs: int) -> None:
    """Eagerly their products are parted among threads, which a graph cannot count."""
    torch._dynamo.reset()
    eager = snparam.convert_model(nn.Linear(512, 1024), num_svs, init="random")
    assert eager.weight.numel() >= products._MIN_BANDED_ENTRIES
    x = torch.linspace(0, 9, 2 * 512).sin().view(2, 512)
    compiled = copy.deepcopy(eager)
    exported = torch.export.export(copy.deepcopy(eager), (x,)).module()
    outputs = [
        run(x)
        for run in (eager, torch.compile(compiled, fullgraph=True, backend="eager"), exported)
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# torch's, where it compiles what is given a tensor that is no leaf.
NO_LEAF = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


def checkpointed(model: nn.Module, update: str, reentrant: bool, compiled: str) -> nn.Module:
    """A region around the last two layers; compiled in it, around it, or not at all."""
    snparam.convert_model(model, update=update, init="random")  # type: ignore[arg-type]
    inner = nn.Sequential(model.b, nn.Tanh(), model.c)
    if compiled == "inside":
        inner.compile(backend="aot_eager")

    def forward(x: Tensor) -> Tensor:
        hidden = model.a(x).flatten(1)
        if compiled == "not":
            out: Tensor = inner(hidden)
        else:
            out = torch.utils.checkpoint.checkpoint(inner, hidden, use_reentrant=reentrant)
        return out

    model.forward = forward  # type: ignore[method-assign]
    if compiled == "around":
        model.compile(backend="aot_eager")
    return model


@NO_LEAF
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiled", ["inside", "around"])
def test_checkpointing_and_compiling_equal_neither(compiled: str, reentrant: bool) -> None:
    update = "step"
    torch._dynamo.reset()
    networks = []
    for way in ("not", compiled):
        torch.manual_seed(1)
        networks.append(checkpointed(Network().double(), update, reentrant, way))
    for network in networks:
        snparam.update(network)  # until then a forward moves the state, but in no compiled region
        for _ in range(2):
            (network(X.double()).square().sum() - network(-2 * X.double()).sum()).backward()
    for p, q in zip(*(n.parameters() for n in networks), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for p, q in zip(*(n.buffers() for n in networks), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@NO_LEAF
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_region_in_a_graph_moves_no_state(update: Any, fullgraph: bool) -> None:
    """It is refused where it would; with update="step" it takes a step that is not stored."""
    torch._dynamo.reset()
    model = snparam.convert_model(Network(), update=update, init="random")
    before = {name: b.clone() for name, b in model.named_buffers()}

    def run(x: Tensor) -> Tensor:
        hidden = model.a.eval()(x).flatten(1)
        out: Tensor = torch.utils.checkpoint.checkpoint(
            lambda h: model.c(model.b(h).tanh()), hidden, use_reentrant=False
        )
        return out

    compiled = torch.compile(run, backend="aot_eager", fullgraph=fullgraph)
    if update == "forward":
        with pytest.raises(RuntimeError, match=r"'b\.weight' \(8, 36\).*checkpoint.*update='step'"):
            compiled(X)
    else:
        compiled(X).square().sum().backward()
        assert model.b.parametrizations.weight.original.grad.isfinite().all()  # type: ignore[union-attr]
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


@NO_LEAF
@pytest.mark.parametrize("reentrant", [True, False])
def test_compiling_inside_a_region_is_refused_where_it_would_move_the_state_twice(
    reentrant: bool,
) -> None:
    torch._dynamo.reset()
    model = checkpointed(Network(), "forward", reentrant, "inside")
    before = [b.clone() for b in (*model.b.buffers(), *model.c.buffers())]
    with pytest.raises(RuntimeError, match=r"'b\.weight' \(8, 36\).*checkpoint.*update='step'"):
        model(X)
    for b, start in zip((*model.b.buffers(), *model.c.buffers()), before, strict=True):
        assert torch.equal(b, start)
    model.eval()(X).sum().backward()  # which moves nothing


class HandsOn(nn.Module):
    """Reads a child's weight and calls the child where the compiler does not look."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.child = nn.Linear(6, 6, dtype=torch.float64)
        self.order = order

    @torch.compiler.disable
    def call(self, x: Tensor) -> Tensor:
        out: Tensor = self.child(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        for step in self.order:
            x = x @ self.child.weight if step == "r" else self.call(x)
        return x


@NO_LEAF
@pytest.mark.parametrize("order", ["rc", "cr", "rrc", "rcc", "rcrc"])
def test_a_compiled_module_and_what_it_calls_uncompiled_are_one_forward(order: str) -> None:
    torch._dynamo.reset()
    eager = snparam.convert_model(HandsOn(order), init="random", num_itrs=2)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend="aot_eager")
    x = torch.ones(2, 6, dtype=torch.float64)
    for _ in range(2):
        for model in (eager, run):
            model(x).square().sum().backward()
    assert_same_gradients_and_states(eager, compiled, rtol=1e-9, atol=1e-12)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@NO_LEAF
@pytest.mark.parametrize("limit", [8, 64])
def test_blocks_compiled_one_by_one_equal_eager_ones(limit: int) -> None:
    """Each is compiled for itself, and runs eagerly where torch limits how many there may be."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = snparam.convert_model(Blocks(), init="random")
    compiled = copy.deepcopy(eager)
    x = torch.ones(2, 4, dtype=torch.float64)
    with torch._dynamo.config.patch(recompile_limit=limit):
        for block in compiled.blocks:
            block.compile(backend="aot_eager")
        for training in (True, False, True):
            for model in (eager, compiled):
                model.train(training)(x).square().sum().backward()
    assert_same_gradients_and_states(eager, compiled, rtol=1e-9, atol=1e-12)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 12 if limit > 12 else graphs < 12


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{"clip": 0.5, "num_svs": 2}, {"stable_rank": 1.2}], ids=str)
def test_compiled_training_of_triplet_constraints_equals_eager(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = snparam.register_sn(nn.Linear(6, 5), **options)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    for training in (True, True, False):
        for layer, run in ((eager, eager), (traced, compiled)):
            layer.train(training)
            layer.zero_grad()
            run(x).square().sum().backward()
        for a, b in zip(eager.parameters(), traced.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)
        for a, b in zip(eager.buffers(), traced.buffers(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
