"""The private names of torch: that they are there, that they mean what is taken for granted."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import snparam
from snparam.matrices import torch_private
from snparam.matrices.torch_private import MODULE_TABLES, PRIVATE_NAMES, PrivateName

PACKAGE = Path(torch_private.__file__).parents[1]


def holder_of(name: str) -> tuple[Any, str]:
    """What has a private name as its attribute, and the attribute."""
    *path, attribute = name.split(".")
    value: Any = torch
    for depth, part in enumerate(path[1:], start=2):
        if not hasattr(value, part):
            importlib.import_module(".".join(path[:depth]))
        value = getattr(value, part)
    return value, attribute


def fresh_copy() -> ModuleType:
    """The file as it is when it is imported now."""
    spec = importlib.util.spec_from_file_location("torch_private_again", torch_private.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


by_name = pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)


@by_name
def test_torch_has_the_name(entry: PrivateName) -> None:
    holder, attribute = holder_of(entry.name)
    assert hasattr(holder, attribute), (
        f"torch {torch.__version__} has no {entry.name}, by which snparam {entry.purpose}: find "
        f"what has replaced it, and use that in torch_private.{entry.user}"
    )


@by_name
def test_without_the_name_its_function_refuses(
    entry: PrivateName, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, attribute = holder_of(entry.name)
    monkeypatch.delattr(holder, attribute)
    refusing = getattr(fresh_copy(), entry.user)
    with pytest.raises(RuntimeError) as refusal:
        refusing()
    for said in (entry.name, torch.__version__, entry.purpose, entry.without):
        assert said in str(refusal.value)


def test_torch_is_not_what_it_was() -> None:
    """Names that are still there, for other things, are refused where that can be seen."""

    class ChangedHook:
        def __init__(self, run: object) -> None:
            def pack_hook(_: object) -> object:
                return run

            self.pack_hook = pack_hook

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.checkpoint._checkpoint_hook", ChangedHook)
        patch.setattr(nn.LSTM, "forward", lambda self, x: x)
        changed = fresh_copy()
    for function in (changed.checkpointed_runs, changed.check_recurrent_layers):
        with pytest.raises(RuntimeError, match="has changed"):
            function()


@pytest.mark.parametrize("table", MODULE_TABLES)
def test_a_module_has_the_table(table: str) -> None:
    assert isinstance(getattr(nn.Module(), table), dict | set)


def test_a_tensor_counts_what_is_written_to_it() -> None:
    x = torch.zeros(2)
    before = x._version
    x.add_(1)
    assert x._version > before


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_functorch(look: Callable[[], object]) -> None:
    torch.func.vmap(lambda x: (look(), x)[1])(torch.ones(2))


def in_trace(look: Callable[[], object]) -> None:
    torch.jit.trace(lambda x: (look(), x + 1)[1], torch.ones(2), check_trace=False)


def in_dispatch_mode(look: Callable[[], object]) -> None:
    with Watching():
        look()


def in_function_mode(look: Callable[[], object]) -> None:
    with Overriding():
        look()


def in_forward_ad(look: Callable[[], object]) -> None:
    with forward_ad.dual_level():
        look()


def in_nested_jvp(look: Callable[[], object]) -> None:
    one = torch.ones(())
    torch.func.jvp(
        lambda x: torch.func.jvp(lambda y: (look(), y * y)[1], (x,), (one,))[1], (one,), (one,)
    )


def in_cache(look: Callable[[], object]) -> None:
    with parametrize.cached():
        look()


def in_backward(look: Callable[[], object]) -> None:
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: (look(), grad)[1])
    y.sum().backward()


def in_region(look: Callable[[], object]) -> None:
    checkpoint(lambda x: (look(), x.sin())[1], torch.ones(2, requires_grad=True),
               use_reentrant=False)  # fmt: skip


def with_forward_pre_hook(look: Callable[[], object]) -> None:
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: None):
        look()


def with_forward_hook(look: Callable[[], object]) -> None:
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        look()


def with_backward_pre_hook(look: Callable[[], object]) -> None:
    with nn.modules.module.register_module_full_backward_pre_hook(lambda *_: None):
        look()


def with_backward_hook(look: Callable[[], object]) -> None:
    with nn.modules.module.register_module_full_backward_hook(lambda *_: None):
        look()


# What each function says in a situation that a user makes by public means; elsewhere, it says no.
SITUATIONS: list[tuple[Callable[[], object], Callable[..., None]]] = [
    (torch_private.functorch_is_active, in_functorch),
    (torch_private.tracing_state, in_trace),
    (torch_private.dispatch_mode_count, in_dispatch_mode),
    (torch_private.dispatch_modes, in_dispatch_mode),
    (torch_private.function_mode_count, in_function_mode),
    (torch_private.forward_ad_is_active, in_forward_ad),
    (torch_private.forward_mode_is_nested, in_nested_jvp),
    (torch_private.parametrizations_are_cached, in_cache),
    (lambda: torch_private.backward_pass() != -1, in_backward),
    (torch_private.innermost_saved_tensors_hook, in_region),
    (torch_private.saved_tensors_hooks, in_region),
    (lambda: list(torch_private.checkpointed_runs()), in_region),
    (torch_private.has_global_hooks, with_forward_pre_hook),
    (torch_private.has_global_hooks, with_forward_hook),
    (torch_private.has_global_hooks, with_backward_pre_hook),
    (torch_private.has_global_hooks, with_backward_hook),
]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("index", range(len(SITUATIONS)))
def test_it_tells_the_situation(index: int) -> None:
    function, situation = SITUATIONS[index]
    seen: list[bool] = []
    assert not function()
    situation(lambda: seen.append(bool(function())))
    assert seen
    assert all(seen)
    assert not function()


def test_backward_passes_are_told_apart() -> None:
    seen: list[int] = []
    for _ in range(2):
        in_backward(lambda: seen.append(torch_private.backward_pass()))
    assert len(set(seen)) == 2


def test_batches_of_gradients_are_recognised() -> None:
    told: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: (told.append(torch_private.is_batch_of_gradients(grad)), grad)[1])
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert told == [True]
    assert not torch_private.is_batch_of_gradients(x)


def test_copies_go_where_they_belong() -> None:
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 2.0)]
    torch_private.copy_each(targets, sources)
    for target, source in zip(targets, sources, strict=True):
        torch.testing.assert_close(target, source)


def test_modes_that_trace_are_told_from_those_that_watch() -> None:
    with Watching(), FakeTensorMode():
        modes = torch_private.dispatch_modes()
        told = {type(mode): torch_private.is_tracing(mode) for mode in modes}
        with torch_private.without_dispatch_modes():
            assert torch_private.dispatch_mode_count() == 0
    assert told == {Watching: False, FakeTensorMode: True}


def test_selective_checkpointing_is_recognised_in_both_runs() -> None:
    told: list[list[bool]] = []

    def region(x: Tensor) -> Tensor:
        told.append([torch_private.is_selective(mode) for mode in torch_private.dispatch_modes()])
        return x.sin()

    def contexts() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.sin.default])

    x = torch.ones(2, requires_grad=True)
    checkpoint(region, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert told == [[True], [True]]


@pytest.mark.parametrize("names", ["_forward_pre_hooks", "_forward_hooks", "_backward_hooks"])
def test_hooks_of_a_module_are_seen(names: str) -> None:
    module = nn.Linear(2, 2)
    assert not torch_private.has_call_hooks(module)
    register = {
        "_forward_pre_hooks": module.register_forward_pre_hook,
        "_forward_hooks": module.register_forward_hook,
        "_backward_hooks": module.register_full_backward_hook,
    }[names]
    register(lambda *_: None)
    assert torch_private.has_call_hooks(module)


@pytest.mark.parametrize("kind", [nn.Parameter, Tensor])
def test_an_original_stays_the_object_that_it_was(kind: type) -> None:
    tensor = nn.Parameter(torch.ones(2)) if kind is nn.Parameter else torch.ones(2)
    module = nn.Module()
    torch_private.register_original(module, tensor)
    assert module.original is tensor
    names = (
        dict(module.named_parameters()) if kind is nn.Parameter else dict(module.named_buffers())
    )
    assert list(names) == ["original"]


def test_torchs_spectral_norm_is_recognised() -> None:
    norm = parametrizations.spectral_norm(nn.Linear(3, 2)).parametrizations.weight[0]
    assert torch_private.is_torch_spectral_norm(norm)
    assert not torch_private.is_torch_spectral_norm(nn.Identity())


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_compute_with_the_list(kind: type[nn.Module]) -> None:
    torch_private.check_recurrent_layers()
    layer, other, x = kind(2, 3), kind(2, 3), torch.randn(4, 2)

    class Replaced(kind):  # type: ignore[misc, valid-type]
        _flat_weights = property(lambda self: list(other.parameters()), lambda self, value: None)

    layer.__class__ = Replaced
    torch.testing.assert_close(layer(x)[0], other(x)[0])


def test_a_recurrent_layer_that_computes_otherwise_is_left_alone_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, x: x)
    monkeypatch.setattr("snparam.layers.torch.check_recurrent_layers",
                        fresh_copy().check_recurrent_layers)  # fmt: skip
    with pytest.raises(ValueError, match=rf"torch {re.escape(torch.__version__)} has changed"):
        snparam.register_sn(nn.LSTM(2, 3), name="weight_ih_l0")
    (row, *_) = snparam.plan_conversion(nn.LSTM(2, 3))
    assert row.decision == "skip"
    assert "has changed" in row.reason


class Regions(nn.Module):
    """A region in a region, which notes what is said of the runs where it computes."""

    def __init__(self, use_reentrant: tuple[bool, bool]) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.noted: list[list[tuple[Any, bool]]] = []

    def inner(self, x: Tensor) -> Tensor:
        self.noted.append(self.runs())
        return x.sin()

    def outer(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.cos(), use_reentrant=self.use_reentrant[1])

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.outer, x, use_reentrant=self.use_reentrant[0])

    def runs(self) -> list[tuple[Any, bool]]:
        found = list(torch_private.checkpointed_runs())
        frame = inspect.currentframe()
        while frame is not None:
            run = torch_private.reentrant_run(frame)
            if run is not None:
                found.append(run)
            frame = frame.f_back
        return found


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_runs_of_nested_regions_are_found(outer: bool, inner: bool, early_stop: bool) -> None:
    network = Regions((outer, inner))
    with set_checkpoint_early_stop(early_stop):
        network(torch.ones(2, requires_grad=True)).sum().backward()
    first, *later = network.noted
    # Within a reentrant outer region nothing has a gradient, and the other kind keeps nothing.
    expected = 1 if outer and not inner else 2
    assert [again for _, again in first] == [False] * expected
    running = {id(run) for run, _ in first}
    assert len(running) == expected
    assert later
    for noted in later:  # what is recomputed has run before, and what it begins has not
        recomputed = next(run for run, again in noted if again)
        assert id(recomputed) in running
        begun = {id(run) for run, again in noted if not again}
        assert not begun & running
        running |= begun
    if not early_stop:
        assert len(running) == expected + 1  # the outer one, done again, has begun the inner anew


def test_recomputation_begins_in_a_frame_of_the_hook() -> None:
    told: list[bool] = []

    def region(x: Tensor) -> Tensor:
        frames: list[Any] = []
        frame = inspect.currentframe()
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        told.append(
            any(
                torch_private.begins_recomputation(frame, run)
                for frame in frames
                for run, _ in torch_private.checkpointed_runs()
            )
        )
        return x.sin()

    checkpoint(region, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert told == [False, True]


def test_a_hook_of_checkpointing_that_says_nothing_is_refused() -> None:
    def pack_hook(x: Tensor) -> Tensor:
        return x

    pack_hook.__module__ = "torch.utils.checkpoint"
    with (
        torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x),
        pytest.raises(RuntimeError, match=r"has changed torch.utils.checkpoint.*pack_hook"),
    ):
        list(torch_private.checkpointed_runs())


def test_a_function_is_marked_as_torch_marks_it() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    torch.compiler.assume_constant_result(theirs)
    assert vars(torch_private.constant_while_compiling(ours)) == vars(theirs)


@pytest.fixture
def one_rank() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_shard_of_a_single_rank_is_the_whole(one_rank: Any) -> None:
    from torch.distributed.tensor import Shard

    shape, offset = torch_private.local_shape_and_offset((4, 3), one_rank, [Shard(0)])
    assert shape == (4, 3)
    assert offset == (0, 0)


def private_parts(path: Path) -> set[str]:
    """The private names that a file reaches by what it imports from torch."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    imported[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    imported[alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    reached = set(imported.values())
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in imported:
            reached.add(".".join([imported[node.id], *parts]))
    return {
        name
        for name in reached
        if any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
    }


# Folders whose files take them from there.
FOLDERS = [
    "checkpoints",
    "commands",
    "constraints",
    "conversion",
    "estimators",
    "layers",
    "matrices",
    "parametrization",
    "spectrum",
    "systems",
    "testing",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_reaches_for_a_private_name(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    files = [path for path in files if path.name != "torch_private.py"]  # where they are
    assert files
    assert {str(path): names for path in files if (names := private_parts(path))} == {}
