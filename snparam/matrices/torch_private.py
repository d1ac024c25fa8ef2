"""The private names of torch that snparam uses, each in this file only.

torch may rename or change them in any release. A function here whose private name is missing, or is
no longer what it was, raises a RuntimeError when it is called, with the name and torch's version,
and never computes something else; importing snparam still works. `PRIVATE_NAMES` is the list, and
`docs/versions.md` says which releases were tried.

Two kinds of private names are used wherever they are needed, because torch keeps them for all the
libraries around it, and a missing one raises by itself: a tensor's `_version`, and the tables that
a module consists of, `MODULE_TABLES`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize
from torch.utils import checkpoint

MODULE_TABLES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


class PrivateName(NamedTuple):
    """A name that is private to torch, and what snparam uses it for.

    Attributes:
        name: qualified name, from `torch` on.
        purpose: what snparam does with it, worded to follow "snparam".
        without: what happens in a release of torch that lacks it.
        user: function of this file that uses it, and raises RuntimeError without it.
    """

    name: str
    purpose: str
    without: str
    user: str


PRIVATE_NAMES: list[PrivateName] = []

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Result = TypeVar("_Result")


def _requires(
    *names: str, purpose: str, without: str, unchanged: Callable[[], bool] = lambda: True
) -> Callable[[_Function], _Function]:
    """Return a decorator that lists private names, and replaces a function if one is gone.

    The replacement raises a RuntimeError. It also takes the function's place if all the names exist
    and one of them has changed.

    Args:
        names: qualified names, from `torch` on, in modules that `import torch` loads.
        purpose: as in `PrivateName`.
        without: as in `PrivateName`.
        unchanged: returns whether the names, where all of them exist, still are what the function
            takes them for.
    """

    def decorate(function: _Function) -> _Function:
        user = function.__name__
        PRIVATE_NAMES.extend(PrivateName(name, purpose, without, user) for name in names)
        missing = [name for name in names if not _exists(name)]
        if not missing and unchanged():
            return function
        problem = f"has no {missing[0]}" if missing else f"has changed {' or '.join(names)}"

        def refuse(*_: object, **__: object) -> NoReturn:
            raise _refusal(problem, purpose, without)

        return refuse  # type: ignore[return-value]

    return decorate


def _exists(name: str) -> bool:
    try:
        _value(name)
    except AttributeError:
        return False
    return True


def _value(name: str) -> Any:
    value: Any = torch
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


def _refusal(problem: str, purpose: str, without: str) -> RuntimeError:
    return RuntimeError(
        f"torch {torch.__version__} {problem}, by which snparam {purpose}; {without}. Install a "
        "release of torch that snparam's docs/versions.md lists, or a newer snparam"
    )


def _torch_function(user: str, name: str, purpose: str, without: str) -> Any:
    """List a private function of torch's and return it, or a function that raises if it is gone.

    Every forward calls such a function, and a function of this file around it would cost more.
    """

    def function(*_: object) -> None: ...

    function.__name__ = user
    checked = _requires(name, purpose=purpose, without=without)(function)
    return _value(name) if checked is function else checked


def _passes_value(name: str, purpose: str, without: str) -> Callable[[Callable[..., _Result]], Any]:
    """Return a decorator that lists a private name of a module `import torch` does not load.

    Each call of the decorated function looks the name up, and passes its value as the first
    argument.
    """

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        PRIVATE_NAMES.append(PrivateName(name, purpose, without, function.__name__))

        @functools.wraps(function)
        def call(*arguments: Any) -> _Result:
            module, _, attribute = name.rpartition(".")
            try:
                value = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise _refusal(f"has no {name}", purpose, without) from error
            return function(value, *arguments)

        return call

    return decorate


# What may observe or repeat operations: transforms, tracers, modes, forward-mode AD, backward
# passes.

_NO_FORWARDS = "no forward of a normalised layer runs without it"
_NO_MODES = "under a TorchDispatchMode no forward of a normalised layer runs without it"

functorch_is_active: Callable[[], bool] = _torch_function(
    "functorch_is_active",
    "torch._C._are_functorch_transforms_active",
    "tells whether a transform of torch.func runs, in which a tensor may stand for many",
    _NO_FORWARDS,
)
is_batch_of_gradients: Callable[[Tensor], bool] = _torch_function(
    "is_batch_of_gradients",
    "torch._C._functorch.is_legacy_batchedtensor",
    "tells a tensor that stands for many in torch.autograd.grad(..., is_grads_batched=True)",
    _NO_FORWARDS,
)
tracing_state: Callable[[], object | None] = _torch_function(
    "tracing_state",
    "torch._C._get_tracing_state",
    "tells whether torch.jit.trace records, which takes a number that is read for a constant",
    _NO_FORWARDS,
)
dispatch_mode_count: Callable[[], int] = _torch_function(
    "dispatch_mode_count",
    "torch._C._len_torch_dispatch_stack",
    "tells whether a TorchDispatchMode looks on",
    _NO_FORWARDS,
)
function_mode_count: Callable[[], int] = _torch_function(
    "function_mode_count",
    "torch._C._len_torch_function_stack",
    "tells whether a TorchFunctionMode looks on",
    _NO_FORWARDS,
)
# It returns a number that differs between backward passes, and -1 outside of them.
backward_pass: Callable[[], int] = _torch_function(
    "backward_pass",
    "torch._C._current_graph_task_id",
    "tells a forward that a backward pass recomputes, which moves no state, from one of its own",
    _NO_FORWARDS,
)
dispatch_modes: Callable[[], list[Any]] = _torch_function(
    "dispatch_modes",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "tells which modes look on",
    _NO_MODES,
)
without_dispatch_modes: Callable[[], AbstractContextManager[Any]] = _torch_function(
    "without_dispatch_modes",
    "torch.utils._python_dispatch._disable_current_modes",
    "hides the power iteration from selective checkpointing, which would replay the products of a "
    "longer one",
    "no region under selective checkpointing runs without it",
)


@_requires(
    "torch.nn.Conv1d._conv_forward",
    "torch.nn.Conv2d._conv_forward",
    "torch.nn.Conv3d._conv_forward",
    purpose="tells a convolution that is torch's own, whose operator is known, and whose output "
    "can be divided by σ instead of its weight",
    without="no training forward of a normalised convolution runs without it",
    # Their common base has a declaration of that name.
    unchanged=lambda: all(
        "_conv_forward" in vars(kind) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    ),
)
def conv_forwards() -> tuple[Any, ...]:
    """Return the methods by which torch's own convolutions convolve."""
    return nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward


@_requires(
    "torch.utils._python_dispatch.TorchDispatchMode.is_infra_mode",
    purpose="tells a mode that traces or fakes operations from one that only watches them",
    without=_NO_MODES,
)
def is_tracing(mode: Any) -> bool:
    """Return whether a mode is one by which torch traces or fakes operations."""
    return bool(mode.is_infra_mode())


@_requires(
    "torch.utils.checkpoint._CachingTorchDispatchMode",
    "torch.utils.checkpoint._CachedTorchDispatchMode",
    purpose="recognises selective checkpointing, which saves some operations and replays them",
    without=_NO_MODES,
)
def is_selective(mode: Any) -> bool:
    """Return whether a mode is one by which selective checkpointing saves or replays operations."""
    modes = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    return isinstance(mode, modes)


@_requires(
    "torch.autograd.forward_ad._current_level",
    purpose="tells whether forward-mode AD runs, for which custom backward formulas are not enough",
    without=_NO_FORWARDS,
)
def forward_ad_is_active() -> bool:
    """Return whether forward-mode AD runs."""
    return forward_ad._current_level >= 0


@_requires(
    "torch._C._functorch.get_interpreter_stack",
    "torch._C._functorch.TransformType",
    purpose="tells whether torch.func.jvp runs within another, in which torch 2.13 gives autograd "
    "Functions wrong derivatives",
    without="no clipped weight is differentiated under torch.func without it",
)
def forward_mode_is_nested() -> bool:
    """Return whether forward-mode AD of torch.func runs within forward-mode AD of torch.func."""
    functorch: Any = torch._C._functorch
    transforms = functorch.get_interpreter_stack() or []
    return [each.key() for each in transforms].count(functorch.TransformType.Jvp) > 1


@_requires(
    "torch._foreach_copy_",
    purpose="stores the states of many small weights by one launch on an accelerator",
    without="no optimizer moves the states with update='step' without it",
)
def copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source in place into the target at the same position, which has its shape."""
    torch._foreach_copy_(targets, sources)


# Modules and parametrizations.


@_requires(
    "torch.nn.utils.parametrize._cache_enabled",
    purpose="tells whether parametrize.cached() is on, which expects each weight to be made",
    without=_NO_FORWARDS,
)
def parametrizations_are_cached() -> bool:
    """Return whether `torch.nn.utils.parametrize.cached()` is on."""
    return bool(parametrize._cache_enabled)


@_requires(
    "torch.nn.utils.parametrize._register_parameter_or_buffer",
    purpose="lets the original of a weight stay the object that it was",
    without="no weight is registered without it",
)
def register_original(parametrization_list: nn.Module, original: Tensor) -> None:
    """Register a tensor as the original of a parametrization list, as a Parameter or a buffer."""
    parametrize._register_parameter_or_buffer(parametrization_list, "original", original)


_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@_requires(
    *(f"torch.nn.modules.module._global{table}" for table in _CALL_HOOKS),
    purpose="tells whether hooks look at the calls of all modules",
    without=_NO_FORWARDS,
)
def has_global_hooks() -> bool:
    """Return whether hooks are registered for the calls, or the gradients, of all modules."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def has_call_hooks(module: nn.Module) -> bool:
    """Return whether hooks are registered for the calls, or the gradients, of a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@_requires(
    "torch.nn.utils.parametrizations._SpectralNorm",
    purpose="recognises torch's own spectral norm, to take its place and its vectors over",
    without="no parametrized weight is planned or converted without it",
)
def is_torch_spectral_norm(parametrization: nn.Module) -> bool:
    """Return whether a parametrization is torch's own spectral norm."""
    return isinstance(parametrization, parametrizations._SpectralNorm)


def _recurrent_layers_compute_with_a_list() -> bool:
    forwards = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)
    return all("_flat_weights" in inspect.unwrap(f).__code__.co_names for f in forwards)


@_requires(
    "torch.nn.RNNBase._init_flat_weights",
    purpose="gives recurrent layers their normalised weights, by the list that they compute with",
    without="no weight of a recurrent layer is registered without it",
    unchanged=_recurrent_layers_compute_with_a_list,
)
def check_recurrent_layers() -> None:
    """Raise RuntimeError if torch's recurrent layers no longer compute with `_flat_weights`."""


# Activation checkpointing, and compilation.


_NO_REGIONS = "no normalised layer runs in a checkpointed region or a backward pass without it"


@_requires(
    "torch._C._autograd._top_saved_tensors_default_hooks",
    purpose="tells a checkpointed region, in which autograd saves tensors by hooks of its own",
    without=_NO_FORWARDS,
)
def innermost_saved_tensors_hook() -> Any:
    """Return the function by which autograd packs the tensors that it saves now, or None."""
    pair: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if pair is None else pair[0]


@_requires(
    "torch._C._autograd._pop_saved_tensors_default_hooks",
    "torch._C._autograd._push_saved_tensors_default_hooks",
    purpose="finds the checkpointed regions around the innermost",
    without=_NO_REGIONS,
)
def saved_tensors_hooks() -> list[Any]:
    """Return the pack functions of all saved-tensor hooks that are in force, innermost first."""
    graph: Any = torch._C._autograd
    pairs: list[Any] = []
    while (pair := graph._top_saved_tensors_default_hooks(True)) is not None:
        pairs.append(pair)
        graph._pop_saved_tensors_default_hooks()
    for pair in reversed(pairs):
        graph._push_saved_tensors_default_hooks(*pair)
    return [pack for pack, _ in pairs]


def _closes_over(hook: Any, function: str, variable: str) -> bool:
    """Return whether a function defined in a hook's `__init__` closes over a given variable."""
    inner = [code for code in hook.__init__.__code__.co_consts if isinstance(code, CodeType)]
    return any(code.co_name == function and variable in code.co_freevars for code in inner)


def _hooks_keep_runs() -> bool:
    """Return whether checkpointing's hooks close over the variables that lead to a run."""
    forward_hook, recomputation_hook = checkpoint._checkpoint_hook, checkpoint._recomputation_hook
    return (
        _closes_over(forward_hook, "pack_hook", "frame")
        and _closes_over(forward_hook, "unpack_hook", "frame")
        and _closes_over(recomputation_hook, "pack_hook", "target_frame_ref")
    )


_FINDS_RUNS = (
    "finds the object that checkpointing keeps for each run of a region, to which belongs what the "
    "run has used"
)


@_requires(
    "torch.utils.checkpoint._checkpoint_hook",
    "torch.utils.checkpoint._recomputation_hook",
    purpose=_FINDS_RUNS,
    without=_NO_REGIONS,
    unchanged=_hooks_keep_runs,
)
def checkpointed_runs() -> Iterator[tuple[Any, bool]]:
    """Yield every run of a checkpointed region, not reentrant, that is going on, innermost first.

    Such a region puts hooks on the tensors that autograd saves, in its forward and in its
    recomputation, however it was begun: by a call, a decorator or a module's hooks.

    Yields:
        the object that checkpointing keeps for the run, and whether the run is being recomputed.

    Raises:
        RuntimeError: if one of checkpointing's hooks does not lead to a run.
    """
    for hook in saved_tensors_hooks():
        pack = inspect.unwrap(hook)
        if getattr(pack, "__module__", None) != checkpoint.__name__:
            continue
        cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
        if "frame" in cells:
            yield cells["frame"].cell_contents, False
        elif "target_frame_ref" in cells:
            yield cells["target_frame_ref"].cell_contents(), True
        else:
            problem = f"has changed {checkpoint.__name__}.{pack.__qualname__}"
            raise _refusal(problem, _FINDS_RUNS, _NO_REGIONS)


def begins_recomputation(frame: FrameType, run: object) -> bool:
    """Return whether a Python frame is that of the hook by which a backward recomputes a run."""
    return frame.f_code.co_name == "unpack_hook" and frame.f_locals.get("frame") is run


def _is_reentrant_function() -> bool:
    """Return whether torch's reentrant checkpointing has the names that `reentrant_run` reads."""
    function = checkpoint.CheckpointFunction
    forward, backward = function.forward.__code__, function.backward.__code__
    return all("run_function" in code.co_names and code.co_varnames[0] == "ctx"
               for code in (forward, backward))  # fmt: skip


@_requires(
    "torch.utils.checkpoint.CheckpointFunction",
    purpose=_FINDS_RUNS,
    without=_NO_REGIONS,
    unchanged=_is_reentrant_function,
)
def reentrant_run(frame: FrameType) -> tuple[Any, bool] | None:
    """Return the run of a reentrant checkpointed region whose forward or backward a frame executes.

    The run is recognised by its attribute `run_function` rather than by its class, because other
    libraries have such autograd Functions of their own.

    Returns:
        the object that checkpointing keeps for the run, and whether the run is being recomputed; or
        None for any other frame.
    """
    name = frame.f_code.co_name
    if name not in ("forward", "backward") or "ctx" not in frame.f_code.co_varnames:
        return None
    context = frame.f_locals.get("ctx")
    return (context, name == "backward") if hasattr(context, "run_function") else None


@_passes_value(
    "torch._dynamo.variables.higher_order_ops.CheckpointHigherOrderVariable",
    "tells a checkpointed region that is compiled, whose recomputation repeats all that is in it",
    "no network with such a region is compiled without it",
)
def compiles_region(kind: type, frame: FrameType) -> bool:
    """Return whether a frame of torch.compile's own code compiles a checkpointed region."""
    return isinstance(frame.f_locals.get("self"), kind)


def constant_while_compiling(function: _Function) -> _Function:
    """Mark a function for torch.compile to call while it compiles, as one that gives a constant.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Sharded tensors.


@_passes_value(
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    "tells which part of a sharded weight lies on a rank",
    "no sharded weight is normalised without it",
)
def local_shape_and_offset(
    function: Any, shape: tuple[int, ...], mesh: Any, placements: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of this rank's shard of a tensor, and the index at which it begins."""
    local, offset = function(torch.Size(shape), mesh, placements)
    return tuple(local), tuple(offset)


# Exported graphs


@_requires(
    "torch._ops.OpOverload",
    purpose="reads the arguments of the operations in an exported graph by their names",
    without="certify does not work without it",
)
def schema_of(target: Any) -> Any | None:
    """Return the schema of an operation: its name, its arguments, and whether it writes into one.

    Args:
        target: what a node of a graph calls; for anything but an overload of an operation, None is
            returned.
    """
    return target._schema if isinstance(target, torch._ops.OpOverload) else None
