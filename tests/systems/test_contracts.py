"""Contracts of torch's that a parametrized layer keeps: snparam beside torch's own spectral_norm.

Every test runs on torch's `parametrizations.spectral_norm` too: what it asserts is what torch's own
does. What fails there as well is asserted to fail, at the end.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.parametrized import (
    KINDS,
    WAYS,
    Kind,
    Way,
    assert_computes_with,
    assert_normalised,
    assert_same_state,
    built,
    computed_with,
    converge,
    list_of,
    matrix,
    norm,
    normalised,
    original_of,
    plain,
    run,
    state,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.jit.frontend import FrontendError
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# torch's own, in torch.func's decompositions and of every use of TorchScript
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")

each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
with_kinds = lambda *names: pytest.mark.parametrize(  # noqa: E731
    "kind", [KINDS[name] for name in names], ids=names
)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


class Times(nn.Module):
    """A parametrization or a module: a multiple of what it is given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Slanted(nn.Module):
    """A parametrization: the weight with its last dimension scaled, which has another norm."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.linspace(0.5, 1.5, weight.shape[-1], dtype=weight.dtype)


# Calling


@each_way
def test_calls_and_reads_go_through_the_call_of_every_module(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nn.Module.__call__` is what tracers, profilers and debuggers replace."""
    kind = KINDS["linear"]
    layer = built(way, kind)
    called: list[nn.Module] = []
    call = nn.Module.__call__

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", noted)
    layer(*kind.inputs(torch.float64))
    assert called[0] is layer
    called.clear()
    layer.weight  # noqa: B018
    assert called == [list_of(layer, kind), list_of(layer, kind)[0]]


@in_both_modes
@each_kind
@each_way
def test_the_layer_computes_with_the_normalised_weight(
    way: Way, kind: Kind, training: bool
) -> None:
    assert_normalised(built(way, kind).train(training), kind)


@in_both_modes
@each_way
def test_a_forward_that_is_set_on_the_instance_is_called(way: Way, training: bool) -> None:
    """As accelerate, peft and bitsandbytes do."""
    kind = KINDS["linear"]
    layer = built(way, kind).train(training)
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)  # type: ignore[method-assign]
    right = 2 * computed_with(normalised(original_of(layer, kind), kind), kind, layer)
    torch.testing.assert_close(run(layer, kind), right)
    del layer.forward
    assert_normalised(layer, kind)


# Hooks


@in_both_modes
@each_kind
@each_way
def test_hooks_on_the_layer_see_its_forward_and_change_it(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    expected = run(layer, kind)
    order: list[str] = []

    def doubled(_module: nn.Module, _args: Any, out: Any) -> Any:
        order.append("post")
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    layer.register_forward_pre_hook(lambda *_: order.append("pre"))
    layer.register_forward_hook(doubled)
    found = run(layer, kind)
    torch.testing.assert_close(found, 2 * expected)
    assert order == ["pre", "post"]
    found.sum().backward()
    assert original_of(layer, kind).grad is not None


@in_both_modes
@each_way
def test_full_backward_hooks_of_the_layer_get_its_gradients(way: Way, training: bool) -> None:
    kind = KINDS["linear"]
    layer = built(way, kind).train(training)
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_full_backward_hook(lambda _, inner, outer: seen.append((inner[0], outer[0])))
    x = kind.inputs(torch.float64)[0].requires_grad_()
    out = layer(x)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    out.backward(upstream)
    assert torch.equal(seen[0][1], upstream)
    right = upstream @ normalised(original_of(layer, kind).detach(), kind)
    torch.testing.assert_close(seen[0][0], right)


@in_both_modes
@each_kind
@each_way
def test_a_forward_hook_on_the_list_changes_the_weight(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    run(layer, kind)  # before there is a hook
    hook = list_of(layer, kind).register_forward_hook(lambda _module, _args, weight: 5 * weight)
    assert_computes_with(layer, kind, lambda weight: 5 * normalised(weight, kind))
    torch.testing.assert_close(
        norm(getattr(layer, kind.name).detach(), kind).item(), 5.0, rtol=1e-7, atol=0
    )
    hook.remove()
    assert_normalised(layer, kind)


@in_both_modes
@each_kind
@each_way
def test_a_forward_hook_on_the_parametrization_changes_the_weight(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    run(layer, kind)
    hook = list_of(layer, kind)[0].register_forward_hook(lambda _module, _args, weight: 5 * weight)
    assert_computes_with(layer, kind, lambda weight: 5 * normalised(weight, kind))
    hook.remove()
    assert_normalised(layer, kind)


@in_both_modes
@each_kind
@each_way
def test_a_pre_hook_on_the_parametrization_changes_what_is_normalised(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    slanted = Slanted()
    list_of(layer, kind)[0].register_forward_pre_hook(lambda _module, args: (slanted(args[0]),))
    converge(layer, kind)
    assert_computes_with(layer, kind, lambda weight: normalised(slanted(weight), kind))


# torch's, of modules whose inputs need no gradient: here the list, which has none.
NO_INPUTS = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@NO_INPUTS
@in_both_modes
@each_kind
@each_way
def test_hooks_on_the_parametrization_and_its_list_are_called_once_for_each_read(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    called: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: called.append(what)

    chain = list_of(layer, kind)
    chain.register_forward_pre_hook(note("list pre"))
    chain.register_forward_hook(note("list"))
    chain.register_full_backward_pre_hook(note("list backward pre"))
    chain.register_full_backward_hook(note("list backward"))
    chain[0].register_forward_pre_hook(note("norm pre"))
    chain[0].register_forward_hook(note("norm"))
    chain[0].register_full_backward_pre_hook(note("norm backward pre"))
    chain[0].register_full_backward_hook(note("norm backward"))
    getattr(layer, kind.name).sum().backward()
    there = ["list pre", "norm pre", "norm", "list"]
    back = ["list backward pre", "list backward", "norm backward pre", "norm backward"]
    assert called == [*there, *back]
    called.clear()
    run(layer, kind).sum().backward()
    # Attention reads its weight more than once, and both of torch's hooks see each read.
    reads = called.count("list pre")
    assert reads >= 1
    assert all(called.count(each) == reads for each in there)
    assert all(called.count(each) >= 1 for each in back)


@NO_INPUTS
@in_both_modes
@each_kind
@each_way
def test_global_hooks_see_the_layer_its_list_and_its_parametrization(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    run(layer, kind)
    chain = list_of(layer, kind)
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    backward: list[nn.Module] = []
    hooks = [
        global_hooks.register_module_forward_pre_hook(lambda m, _: before.append(m)),
        global_hooks.register_module_forward_hook(lambda m, *_: after.append(m)),
        global_hooks.register_module_full_backward_hook(lambda m, *_: backward.append(m)),
    ]
    try:
        run(layer, kind).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    assert before[:3] == [layer, chain, chain[0]]
    assert after[:2] == [chain[0], chain]
    assert after[-1] is layer
    assert chain[0] in backward


@in_both_modes
@each_kind
@each_way
def test_a_global_forward_hook_changes_the_weight(way: Way, kind: Kind, training: bool) -> None:
    layer = built(way, kind).train(training)
    chain = list_of(layer, kind)

    def multiply(module: nn.Module, _args: Any, out: Any) -> Any:
        return 5 * out if module is chain else None

    hook = global_hooks.register_module_forward_hook(multiply)
    try:
        assert_computes_with(layer, kind, lambda weight: 5 * normalised(weight, kind))
    finally:
        hook.remove()
    assert_normalised(layer, kind)


# Caching, replacing, adding


@in_both_modes
@each_kind
@each_way
def test_cached_reads_once(way: Way, kind: Kind, training: bool) -> None:
    layer = built(way, kind).train(training)
    with torch.no_grad():
        original_of(layer, kind).mul_(torch.linspace(1, 2, original_of(layer, kind).shape[-1]))
    twin = copy.deepcopy(layer)
    with parametrize.cached():
        first = getattr(layer, kind.name)
        outputs = [run(layer, kind) for _ in range(3)]
        assert getattr(layer, kind.name) is first
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    with parametrize.cached():
        torch.testing.assert_close(run(twin, kind), outputs[0])
    assert_same_state(state(layer), state(twin))  # which has moved as by one read, if at all
    assert getattr(layer, kind.name) is not first
    sum(outputs).sum().backward()  # type: ignore[union-attr]
    assert original_of(layer, kind).grad is not None
    converge(layer, kind)
    assert_normalised(layer, kind)


@in_both_modes
@each_kind
@each_way
def test_a_replaced_parametrization_is_the_one_that_is_used(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    run(layer, kind)
    list_of(layer, kind)[0] = nn.Identity()
    assert_computes_with(layer, kind, lambda weight: weight)
    list_of(layer, kind)[0] = Times(3.0)
    assert_computes_with(layer, kind, lambda weight: 3 * weight)


@in_both_modes
@each_kind
@each_way
def test_a_parametrization_after_it_gets_the_normalised_weight(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    run(layer, kind)
    parametrize.register_parametrization(layer, kind.name, Times(3.0))
    assert_computes_with(layer, kind, lambda weight: 3 * normalised(weight, kind))


@in_both_modes
@each_kind
@each_way
def test_a_parametrization_before_it_gives_the_weight_that_is_normalised(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind)
    list_of(layer, kind).insert(0, Slanted())
    converge(layer, kind)
    layer.train(training)
    assert_computes_with(layer, kind, lambda weight: normalised(Slanted()(weight), kind))


# Tracing


class Residual(nn.Module):
    """Convolutions and linear maps, with what tracers look at between them."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.conv = built(way, Kind(lambda: nn.Conv2d(2, 2, 3, padding=1), "weight", ONE_IMAGE))
        self.up = built(way, Kind(lambda: nn.ConvTranspose2d(2, 2, 1), "weight", ONE_IMAGE, axis=1))
        self.head = built(way, Kind(lambda: nn.Linear(8, 3), "weight", ONE_ROW))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.up(self.conv(x).tanh())
        out: Tensor = self.head(x.flatten(1))
        return out


def ONE_IMAGE(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, 24, dtype=dtype).view(3, 2, 2, 2),)


def ONE_ROW(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, 24, dtype=dtype).view(3, 8),)


X = ONE_IMAGE(torch.float64)[0]
NAMES = ("conv", "up", "head")


def step_of(net: nn.Module) -> None:
    """Change every parameter of a network, as an optimizer does."""
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(index)
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)


@in_both_modes
@each_way
def test_a_symbolic_trace_has_the_parameters_and_follows_them(way: Way, training: bool) -> None:
    net = Residual(way).train(training)
    traced = torch.fx.symbolic_trace(net)
    traced.train(training)
    originals = {f"{name}.parametrizations.weight.original" for name in NAMES}
    assert originals <= {name for name, _ in traced.named_parameters()}
    assert {id(p) for p in traced.parameters()} == {id(p) for p in net.parameters()}
    for _ in range(2):
        step_of(net)
        twin = copy.deepcopy(net)
        torch.testing.assert_close(traced(X), twin(X))
        assert_same_state(state(net), state(twin))


@each_way
def test_training_a_traced_network_trains_it_as_the_network_itself(way: Way) -> None:
    net = Residual(way)
    twin = copy.deepcopy(net)
    runs = {"traced": torch.fx.symbolic_trace(net), "itself": twin}
    for run_ in runs.values():
        optimizer = torch.optim.SGD(run_.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            run_(X).square().mean().backward()
            optimizer.step()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n} {m}")
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))


@each_way
def test_a_network_and_its_trace_can_be_copied_and_go_their_own_ways(way: Way) -> None:
    net = Residual(way).eval()
    traced = torch.fx.symbolic_trace(net)
    copies = [copy.deepcopy(net), copy.deepcopy(traced)]
    expected = net(X)
    step_of(net)
    for each in copies:
        torch.testing.assert_close(each(X), expected)
    assert not torch.allclose(traced(X), expected)


@each_way
def test_torchvisions_feature_extraction_follows_the_network(way: Way) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net = Residual(way).eval()
    extractor = extraction.create_feature_extractor(net, ["conv", "head"])
    step_of(net)
    found = extractor(X)
    torch.testing.assert_close(found["conv"], net.conv(X))
    torch.testing.assert_close(found["head"], net(X))
    found["head"].sum().backward()
    assert net.head.parametrizations.weight.original.grad is not None  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@each_way
def test_timms_feature_extraction_follows_the_network(way: Way) -> None:
    models = pytest.importorskip("timm.models")
    net = Residual(way).eval()
    extractor = models.create_feature_extractor(net, {"conv": "conv", "head": "head"})
    step_of(net)
    found = extractor(X)
    torch.testing.assert_close(found["conv"], net.conv(X))
    torch.testing.assert_close(found["head"], net(X))


@each_way
def test_torchscript_traces_follow_the_parameters_and_can_be_saved(way: Way) -> None:
    net = Residual(way).eval()
    traced = torch.jit.trace(net, X)
    originals = {f"{name}.parametrizations.weight.original" for name in NAMES}
    assert originals <= {name for name, _ in traced.named_parameters()}
    expected = net(X)
    torch.testing.assert_close(traced(X), expected)
    with torch.no_grad():
        for name in NAMES:  # shared with the trace; the normalised weight is the same
            net.get_parameter(f"{name}.parametrizations.weight.original").mul_(3)
    torch.testing.assert_close(traced(X), expected)
    step_of(net)
    torch.testing.assert_close(traced(X), net(X))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(X), net(X))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of attention's and LSTM's own
@each_kind
@each_way
def test_torchscript_traces_of_each_layer_can_be_saved(way: Way, kind: Kind) -> None:
    layer = built(way, kind).eval()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            traced = torch.jit.trace(layer, kind.inputs(torch.float64))
            torch.jit.save(traced, io.BytesIO())
            found = traced(*kind.inputs(torch.float64))
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found, run(layer, kind))


@in_both_modes
@with_kinds("linear", "conv", "transposed", "embedding", "attention")
@each_way
def test_a_make_fx_graph_is_a_function_of_parameters_and_buffers(
    way: Way, kind: Kind, training: bool
) -> None:
    layer, other = (built(way, kind, seed=seed).train(training) for seed in (0, 1))

    def function(tensors: dict[str, Tensor], x: tuple[Tensor, ...]) -> Any:
        out = functional_call(layer, tensors, x)
        return out[0] if isinstance(out, tuple) else out

    def tensors(of: nn.Module) -> dict[str, Tensor]:
        return {
            **{name: p.detach().clone() for name, p in of.named_parameters()},
            **{name: b.clone() for name, b in of.named_buffers()},
        }

    before = state(layer)
    graph = make_fx(function)(tensors(layer), kind.inputs(torch.float64))
    assert_same_state(before, state(layer))
    given = tensors(other)
    found = graph(given, kind.inputs(torch.float64))
    torch.testing.assert_close(found, run(other, kind))
    for name, buffer in other.named_buffers():  # which the graph has moved in place, if at all
        torch.testing.assert_close(given[name], buffer)


# Tensors without values


@in_both_modes
@each_kind
@each_way
def test_shapes_are_inferred_under_a_fake_tensor_mode(way: Way, kind: Kind, training: bool) -> None:
    layer = built(way, kind).train(training)
    expected = run(layer, kind)
    before = state(layer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = tuple(torch.empty_like(each) for each in kind.inputs(torch.float64))
        if kind.inputs(torch.float64)[0].dtype == torch.float64:
            found = layer(*x)
            found = found[0] if isinstance(found, tuple) else found
        else:
            found = layer(torch.zeros(2, 3, dtype=torch.long))
    assert isinstance(found, FakeTensor)
    assert found.shape == expected.shape
    assert_same_state(before, state(layer))
    assert_normalised(layer, kind)


@in_both_modes
@each_kind
@each_way
def test_layers_of_fake_tensors_are_copied_and_run(way: Way, kind: Kind, training: bool) -> None:
    layer = built(way, kind).train(training)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(layer)
    with mode:
        found = fake(*(mode.from_tensor(x) for x in kind.inputs(torch.float64)))
    found = found[0] if isinstance(found, tuple) else found
    assert isinstance(found, FakeTensor)
    assert found.shape == run(layer, kind).shape


@in_both_modes
@each_kind
@each_way
def test_layers_on_the_meta_device_infer_shapes_and_load_a_state(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    expected = run(layer, kind)
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to("meta")
    found = layer(*(x.to("meta") for x in kind.inputs(torch.float64)))
    found = found[0] if isinstance(found, tuple) else found
    assert found.is_meta
    assert found.shape == expected.shape
    layer.to_empty(device="cpu")
    layer.load_state_dict(saved)
    assert_normalised(layer, kind)


# Changing what a module is made of


@pytest.fixture
def swapping() -> Iterator[None]:
    """Parameters are swapped in place, as tensor subclasses need it, and not set anew."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@in_both_modes
@with_kinds("linear", "conv", "transposed", "embedding", "attention")  # no LSTM can be swapped
@each_way
def test_parameters_are_swapped(way: Way, kind: Kind, training: bool) -> None:
    layer, other = (built(way, kind, seed=seed).train(training) for seed in (0, 1))
    run(layer, kind).sum().backward()
    layer.zero_grad()
    original = original_of(layer, kind)
    layer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert original_of(layer, kind) is original
    assert torch.equal(original, original_of(other, kind))
    assert_normalised(layer, kind)
    layer.float()
    assert original_of(layer, kind) is original
    assert original.dtype == torch.float32
    layer.double()
    converge(layer, kind)
    assert_normalised(layer, kind)


HOOK_TABLES = [name for name in vars(nn.Module()) if "hooks" in name]


def hooks_of(module: nn.Module) -> dict[str, int]:
    return {name: len(getattr(module, name)) for name in HOOK_TABLES if getattr(module, name)}


@pytest.mark.parametrize("leave", [True, False])
@each_kind
@each_way
def test_torchs_own_removal_leaves_the_module_as_if_never_normalised(
    way: Way, kind: Kind, leave: bool
) -> None:
    layer, before = built(way, kind), plain(kind)
    used = getattr(layer.eval(), kind.name).detach().clone()
    original = original_of(layer, kind)
    right = used if leave else original.detach().clone()
    parametrize.remove_parametrizations(layer, kind.name, leave_parametrized=leave)
    assert type(layer) is type(before)
    assert set(vars(layer)) == set(vars(before))
    assert all(hooks_of(part) == {} for part in layer.modules())
    assert {n for n, _ in layer.named_parameters()} == {n for n, _ in before.named_parameters()}
    assert not list(layer.named_buffers())
    assert getattr(layer, kind.name) is original
    assert torch.equal(original, right)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    assert all(torch.equal(run(each, kind), run(layer, kind)) for each in copies)
    # And again: nothing that was left behind stands in the way.
    way(layer, kind.name)
    converge(layer, kind)
    assert_normalised(layer, kind)


def test_what_torch_has_removed_it_from_is_loaded_without_snparam(tmp_path: Path) -> None:
    net = nn.ModuleList()
    for way in WAYS.values():
        for kind in KINDS.values():
            layer = built(way, kind)
            parametrize.remove_parametrizations(layer, kind.name)
            net.append(layer)
    torch.save(net, tmp_path / "net.pt")
    code = (
        "import sys; sys.modules['snparam'] = None; import torch;"
        f"print(torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "Parametrized" not in found.stdout


@in_both_modes
@with_kinds("linear", "conv", "transposed", "embedding")
@each_way
def test_a_transfer_leaves_the_source_and_normalises_the_target(
    way: Way, kind: Kind, training: bool
) -> None:
    layer, target = built(way, kind).train(training), plain(kind, seed=1).train(training)
    original = original_of(layer, kind)
    values = original.detach().clone()
    parametrize.transfer_parametrizations_and_params(layer, target)
    if training:  # torch registers on the target before it moves the weight, which is a read
        converge(layer, kind)
    assert original_of(layer, kind) is original
    assert torch.equal(original, values)
    assert_normalised(layer, kind)
    assert torch.equal(original_of(target, kind), values)
    assert_normalised(target, kind)
    optimizer = torch.optim.SGD(target.parameters(), 0.01)
    run(target.train(), kind).square().sum().backward()
    optimizer.step()
    converge(target, kind, updates=True)
    assert_normalised(target, kind)


# Modes


class Logging(TorchDispatchMode):
    """Keeps the operations that are run, by name, with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tensors = [x.detach().clone() for x in args if isinstance(x, Tensor)]
        self.calls.append((func.overloadpacket.__name__, tensors))
        return func(*args, **(kwargs or {}))


class Intercepting(TorchFunctionMode):
    """Replaces the weight of every layer by twice the weight, as quantisers replace it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (F.linear, F.conv2d, F.conv_transpose2d) or func is F.embedding:
            x, weight, *others = args
            args = (x, 2 * weight, *others)
        return func(*args, **(kwargs or {}))


MAPS = {"linear": "addmm", "conv": "convolution", "transposed": "convolution"}


@in_both_modes
@with_kinds("linear", "conv", "transposed")
@each_way
def test_a_dispatch_mode_sees_the_layer_apply_the_normalised_weight(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    name = next(MAPS[name] for name, each in KINDS.items() if each is kind)
    expected = run(layer, kind)
    with Logging() as mode:
        found = run(layer, kind)
    torch.testing.assert_close(found, expected)
    right = normalised(original_of(layer, kind).detach(), kind)
    seen = [tensors for called, tensors in mode.calls if called == name]
    ways_to_lie = (right, right.mT) if kind is KINDS["linear"] else (right,)
    assert any(
        each.shape == one.shape and torch.allclose(each, one)
        for tensors in seen
        for each in tensors
        for one in ways_to_lie
    )
    with Logging():  # and the backward pass under it is the one without
        assert_normalised(layer, kind)


@in_both_modes
@with_kinds("linear", "conv", "transposed", "embedding")
@each_way
def test_a_function_mode_gets_the_normalised_weight_and_may_replace_it(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    run(layer, kind)
    right = computed_with(2 * normalised(original_of(layer, kind), kind), kind, layer)
    with Intercepting():
        found = run(layer, kind)
    torch.testing.assert_close(found, right)
    assert_normalised(layer, kind)


@in_both_modes
@with_kinds("linear", "conv", "transposed")
@each_way
def test_flops_are_those_of_the_plain_layer_and_few_more(
    way: Way, kind: Kind, training: bool
) -> None:
    layer = built(way, kind).train(training)
    totals = []
    for each in (plain(kind), layer):
        with FlopCounterMode(display=False) as mode:
            run(each, kind).sum().backward()
        totals.append(mode.get_total_flops())
    rows, columns = matrix(original_of(layer, kind), kind).shape
    product = 2 * rows * columns  # with one vector, which torch counts as one of matrices, or not
    assert totals[0] <= totals[1] <= totals[0] + 6 * product


# Other derivatives


@in_both_modes
@with_kinds("linear", "conv", "transposed", "embedding")
@pytest.mark.parametrize("way", [WAYS["forward"], WAYS["step"]], ids=["forward", "step"])
def test_forward_mode_in_training_is_that_of_eval(way: Way, kind: Kind, training: bool) -> None:
    """torch's own differentiates its power iteration in place, and raises."""
    assert_forward_mode(built(way, kind).train(training), kind)


@with_kinds("linear", "conv", "transposed", "embedding")
@each_way
def test_forward_mode_equals_the_derivative_of_the_norm(way: Way, kind: Kind) -> None:
    assert_forward_mode(built(way, kind).eval(), kind)


def assert_forward_mode(layer: nn.Module, kind: Kind) -> None:
    weight = original_of(layer, kind).detach()
    tangent = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view_as(weight)
    others = {n: p.detach() for n, p in layer.named_parameters()}
    key = f"parametrizations.{kind.name}.original"

    def derivative(function: Callable[[Tensor], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(function(forward_ad.make_dual(weight, tangent)))
        assert found.tangent is not None
        return found.tangent

    found = derivative(
        lambda w: functional_call(layer, {**others, key: w}, kind.inputs(torch.float64))
    )
    right = derivative(lambda w: computed_with(normalised(w, kind), kind, layer))
    torch.testing.assert_close(found, right)


@with_kinds("linear", "conv", "transposed", "embedding")
@each_way
def test_a_vmapped_ensemble_equals_its_members(way: Way, kind: Kind) -> None:
    base = built(way, kind).eval()
    members = [copy.deepcopy(base) for _ in range(3)]  # torch stacks modules of one class alone
    for seed, member in enumerate(members):
        member.load_state_dict(built(way, kind, seed=seed).state_dict())
    parameters, buffers = stack_module_state(members)  # type: ignore[arg-type]

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(members[0], (parameters, buffers), kind.inputs(torch.float64))
        return out

    found = vmap(one)(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([run(member, kind) for member in members]))
    for member in members:
        assert_normalised(member, kind)


# What fails with torch's own as well


@each_way
def test_parametrized_layers_cannot_be_scripted(way: Way) -> None:
    with pytest.raises((RuntimeError, ValueError, FrontendError)):
        torch.jit.script(built(way, KINDS["linear"]).eval())


@each_way
def test_a_parametrized_lstm_is_not_one_graph(way: Way) -> None:
    torch._dynamo.reset()
    kind = KINDS["lstm"]
    compiled = torch.compile(built(way, kind).eval(), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(*kind.inputs(torch.float64))


def test_the_norms_of_these_layers_tell_whether_they_are_normalised() -> None:
    """A layer that is not normalised would pass none of the tests above."""
    for kind in KINDS.values():
        assert norm(getattr(plain(kind), kind.name).detach(), kind) > 2
