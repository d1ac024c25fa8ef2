"""Memory that is written anew: gradients in place, W / σ of the next forward.

Nothing of it may be seen. Each test has something else hold, or look at, what would be overwritten.
The weights here are large enough for it.
"""

import copy
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo as dynamo
from helpers.holder import norm_of, original_of
from torch import nn

import snparam
from snparam.constraints import cpu, holders

ROWS, COLUMNS = 192, 256
assert ROWS * COLUMNS >= cpu.LARGE


def layer_with(**options):
    torch.manual_seed(0)
    return snparam.register_sn(nn.Linear(COLUMNS, ROWS, bias=False), **options)


@pytest.fixture
def layer():
    return layer_with()


def projected(layer, grad):
    """The gradient for the original, from the one for the weight in use, in float64.

    By the u, v and σ of the last forward, which u gives: v is in the direction of what σ is of.
    """
    W, u = original_of(layer).detach().double(), norm_of(layer).u[0, 0].double()
    v = layer_v(layer)
    sigma = float(u @ W @ v)
    grad = grad.double()
    return (grad - (grad * W).sum() / sigma * torch.outer(u, v)) / sigma


def layer_v(layer):
    v = norm_of(layer).forwards.last_v.double().view(-1)
    return v / v.norm()


def leaf_like(used):
    return used.detach().clone().requires_grad_()


# Gradients


TARGET = torch.linspace(-1, 1, ROWS * COLUMNS).sin().view(ROWS, COLUMNS)
X = torch.linspace(0, 50, 8 * COLUMNS).cos().view(8, COLUMNS)


def matmul(w):
    return (X @ w.t()).square().sum()


def twice(w):
    return matmul(w) + (w * TARGET).sum()


def parts(w):
    """A fused projection, as attention splits it."""
    q, k, v = w.view(3, ROWS // 3, COLUMNS).unbind(0)
    return ((X @ q.t()) * (X @ k.t())).sum() + (X @ v.t()).sum()


def chunks(w):
    q, k, v = w.chunk(3)
    return ((X @ q.t()) * (X @ k.t()) * (X @ v.t())).sum()


def transposed(w):
    return (w.t() @ TARGET).square().sum()


def summed(w):
    return w.sum()  # whose gradient is one number, expanded


def sliced(w):
    return w[10:50].square().sum()


def column_sums(w):
    return (w.sum(0) * X[0]).square().sum()  # expanded, from a gradient that nobody else holds


def row_sums(w):
    return (w.sum(1, keepdim=True) * TARGET[:, :1]).square().sum()


def thirds(w):
    return w.view(3, ROWS // 3, COLUMNS).sum(1).square().sum()


LOSSES = [matmul, twice, parts, chunks, transposed, summed, sliced, column_sums, row_sums, thirds]


def close(a, b):
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_the_gradient_is_that_of_the_formula(layer, loss):
    used = layer.weight
    leaf = leaf_like(used)
    loss(used).backward()
    loss(leaf).backward()
    close(original_of(layer).grad, projected(layer, leaf.grad))


def retained(used, loss):
    used.retain_grad()
    loss(used).backward()
    return used.grad


def hooked(used, loss):
    seen = []
    used.register_hook(seen.append)
    loss(used).backward()
    return seen[0]


def seen_by_the_node(used, loss):
    seen = []
    used.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))
    loss(used).backward()
    return seen[0]


def captured(used, loss):
    parameter = used.grad_fn.next_functions[0][0].variable
    grad, parameter.grad = torch.autograd.grad(loss(used), [used, parameter])
    return grad


def captured_in_a_copy_of_the_list(used, loss):
    parameter = used.grad_fn.next_functions[0][0].variable
    found = torch.autograd.grad(loss(used), (used, used, parameter))
    parameter.grad = found[2]
    assert torch.equal(found[0], found[1])
    return found[0]


def by_numpy(used, loss):
    seen = []
    used.register_hook(lambda grad: seen.append(grad.numpy()))
    loss(used).backward()
    return torch.from_numpy(seen[0])


def by_an_alias(used, loss):
    seen = []
    used.register_hook(lambda grad: seen.append(grad.detach()))
    loss(used).backward()
    return seen[0]


def by_its_storage(used, loss):
    seen = []
    used.register_hook(lambda grad: seen.append((grad.untyped_storage(), grad.stride())))
    loss(used).backward()
    storage, stride = seen[0]
    return torch.empty(0).set_(storage, 0, used.shape, stride)


WATCHERS = [
    retained, hooked, seen_by_the_node, captured, captured_in_a_copy_of_the_list, by_numpy,
    by_an_alias, by_its_storage,
]  # fmt: skip


@pytest.mark.parametrize("loss", [matmul, twice, parts, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("watch", WATCHERS, ids=lambda f: f.__name__)
def test_a_gradient_that_somebody_keeps_is_left_alone(layer, watch, loss):
    used = layer.weight
    leaf = leaf_like(used)
    loss(leaf).backward()
    assert torch.equal(watch(used, loss), leaf.grad)
    close(original_of(layer).grad, projected(layer, leaf.grad))


def test_a_gradient_that_was_passed_in_is_left_alone(layer):
    grad = TARGET.clone()
    layer.weight.backward(grad)
    assert torch.equal(grad, TARGET)
    close(original_of(layer).grad, projected(layer, TARGET))


def test_a_gradient_that_another_parameter_is_given_too_is_left_alone(layer):
    """Addition hands one tensor to both of its terms, and accumulation takes it as it is."""
    for first in (True, False):
        other = nn.Parameter(torch.zeros(ROWS, COLUMNS))
        used = layer.weight
        total = used + other if first else other + used
        (X @ total.t()).square().sum().backward()
        leaf = leaf_like(used)
        matmul(leaf).backward()
        assert torch.equal(other.grad, leaf.grad)


class Keeps(torch.autograd.Function):
    """Hands on, as a gradient, a tensor that it keeps."""

    @staticmethod
    def forward(ctx, w, kept):
        ctx.save_for_backward(kept)
        return w.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], None


def test_a_gradient_that_a_graph_has_saved_is_left_alone(layer):
    kept = TARGET.clone()
    loss = Keeps.apply(layer.weight, kept).sum()
    address = kept.data_ptr()
    del kept
    loss.backward(retain_graph=True)
    first = original_of(layer).grad.clone()
    original_of(layer).grad = None
    loss.backward()
    assert address
    assert torch.equal(original_of(layer).grad, first)


class HandsOn(torch.autograd.Function):
    """Has a gradient from elsewhere, in memory that is not torch's."""

    @staticmethod
    def forward(ctx, w, array):
        ctx.array = array
        return w.sum()

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(ctx.array), None


def test_a_gradient_in_memory_of_another_library_is_left_alone(layer):
    array = TARGET.numpy().copy()
    HandsOn.apply(layer.weight, array).backward()
    assert torch.equal(torch.from_numpy(array), TARGET)
    close(original_of(layer).grad, projected(layer, TARGET))


@pytest.fixture
def nothing_learned():
    """What a gradient looks like that nobody holds is not known, as in a new process."""
    learned = set(holders.ALONE)
    holders.ALONE.clear()
    yield
    holders.ALONE.clear()
    holders.ALONE.update(learned)


@pytest.mark.usefixtures("nothing_learned")
def test_a_debugger_does_not_teach_that_held_gradients_are_free(layer):
    """One that shows local variables holds them, when it is learned what nobody holds."""

    def show(frame, _event, _arg):
        frame.f_locals  # noqa: B018
        return show

    earlier = sys.gettrace()
    sys.settrace(show)
    try:
        matmul(layer.weight).backward()
    finally:
        sys.settrace(earlier)
    assert not holders.ALONE


@pytest.mark.usefixtures("nothing_learned")
def test_a_default_device_elsewhere_does_not_matter(layer):
    with torch.device("meta"):
        matmul(layer.weight).backward()
    used = layer.weight
    leaf = leaf_like(used)
    matmul(leaf).backward()
    close(original_of(layer).grad, projected(layer, leaf.grad))


def test_a_graph_may_be_used_again(layer):
    loss = matmul(layer.weight)
    loss.backward(retain_graph=True)
    first = original_of(layer).grad.clone()
    original_of(layer).grad = None
    loss.backward()
    assert torch.equal(original_of(layer).grad, first)


def test_a_batch_of_gradients_is_one_after_the_other(layer):
    used = layer.weight
    grads = torch.stack([TARGET, TARGET.flip(0), torch.ones_like(TARGET)])
    given = grads.clone()
    (batch,) = torch.autograd.grad(
        used, original_of(layer), grads, is_grads_batched=True, retain_graph=True
    )
    assert torch.equal(grads, given)
    for grad, found in zip(given, batch, strict=True):
        (right,) = torch.autograd.grad(used, original_of(layer), grad, retain_graph=True)
        torch.testing.assert_close(found, right)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_under_autocast_and_anomaly_detection(layer):
    used = layer.weight
    leaf = leaf_like(used)
    losses = [matmul(w) for w in (used, leaf)]
    with torch.autograd.detect_anomaly(check_nan=True), torch.autocast("cpu"):
        for loss in losses:
            loss.backward()
    close(original_of(layer).grad, projected(layer, leaf.grad))


def test_a_weight_that_was_written_to_after_its_read_has_the_right_gradient(layer):
    """Nothing that backward needs is in what was written to."""
    used = layer.weight
    leaf = leaf_like(used)
    twice(used.mul_(TARGET)).backward()
    twice(leaf * TARGET).backward()
    close(original_of(layer).grad, projected(layer, leaf.grad))


def test_a_large_gradient_that_nobody_else_holds_is_overwritten(layer):
    """Otherwise it would be for nothing: the gradient that arrives is where the original's is."""
    arrived = []
    used = layer.weight
    used.register_hook(lambda grad: arrived.append(grad.data_ptr()))
    matmul(used).backward()
    assert arrived == [original_of(layer).grad.data_ptr()]


RUNNERS = {"the interpreter": lambda run: run(), "torch's compiler": lambda run: dynamo.run(run)()}


@pytest.mark.parametrize("first", RUNNERS)
@pytest.mark.parametrize("then", RUNNERS)
@pytest.mark.usefixtures("nothing_learned")
def test_holders_are_counted_alike_whoever_runs_the_frames(layer, first, then):
    """The compiler goes on with it when something has failed in it, and a call counts one more."""
    kept = []

    def overwritten(keep=False):
        arrived = []
        used = layer.weight
        used.register_hook(lambda grad: arrived.append(grad.data_ptr()))
        if keep:
            used.register_hook(kept.append)
        original_of(layer).grad = None
        matmul(used).backward()
        return arrived == [original_of(layer).grad.data_ptr()]

    assert RUNNERS[first](overwritten)
    assert RUNNERS[then](overwritten)
    assert not RUNNERS[then](lambda: overwritten(keep=True))


# The weight in use


def test_the_memory_of_a_finished_forward_serves_the_next(layer):
    addresses = set()
    for _ in range(4):
        used = layer.weight
        addresses.add(used.data_ptr())
        matmul(used).backward()
        del used
    assert len(addresses) == 1


HOLDERS = {
    "itself": lambda w: w,
    "an alias": lambda w: w.detach(),
    "a view": lambda w: w[3:].view(-1),
    "numpy": lambda w: w.detach().numpy(),
    "storage": lambda w: w.untyped_storage(),
    "dlpack": lambda w: torch.utils.dlpack.to_dlpack(w.detach()),
    "graph": lambda w: (w * w).sum(),
    "data": lambda w: w.data,
}


def test_a_loss_that_is_kept_keeps_no_memory_of_a_finished_forward(layer):
    """As in every loop, where the last loss lives until there is the next."""
    used = layer.weight
    where = used.data_ptr()
    loss = matmul(used)
    del used
    loss.backward()
    assert layer.weight.data_ptr() == where
    assert loss.grad_fn is not None


def content(held):
    if isinstance(held, torch.UntypedStorage):
        held = torch.empty(0).set_(held)
    if isinstance(held, torch.Tensor) and held.grad_fn is not None and held.ndim == 0:
        return held.grad_fn.next_functions[0][0]._saved_self.detach().clone()
    if type(held).__name__ == "PyCapsule":
        return torch.utils.dlpack.from_dlpack(held).clone()
    return torch.as_tensor(held).detach().clone()


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_weight_that_somebody_holds_is_left_alone(layer, kind):
    used = layer.weight
    right = used.detach().clone()
    held = HOLDERS[kind](used)
    del used
    gc.collect()
    with torch.no_grad():
        original_of(layer).mul_(-1).add_(0.1)
    for _ in range(2):
        layer(X)
    found = content(held)
    assert torch.equal(found, right.flatten()[-found.numel() :].view(found.shape))


def test_forwards_before_one_backward_have_memory_of_their_own(layer):
    """D(real) and D(fake)."""
    used = [layer.weight for _ in range(3)]
    assert len({w.data_ptr() for w in used}) == 3
    leaves = [leaf_like(w) for w in used]
    sum(matmul(w) for w in used).backward()
    for leaf in leaves:
        matmul(leaf).backward()
    assert torch.isfinite(original_of(layer).grad).all()
    for w, leaf in zip(used, leaves, strict=True):
        assert torch.equal(w, leaf)


def test_forwards_in_threads_have_memory_of_their_own(layer):
    layer.eval()
    matmul(layer.weight).backward()  # leaves memory behind
    start = threading.Barrier(4)

    def forward(_):
        start.wait()
        return layer.weight

    with ThreadPoolExecutor(4) as pool:
        weights = list(pool.map(forward, range(4)))
    assert len({w.data_ptr() for w in weights}) == 4


def test_reads_without_a_graph_keep_no_memory(layer):
    with torch.no_grad():
        assert layer.weight.data_ptr()
    assert norm_of(layer).derived.memory._earlier == []


@pytest.mark.parametrize("change", ["resize", "double", "strides"])
def test_another_size_dtype_or_order_is_given_other_memory(layer, change):
    matmul(layer.weight).backward()
    if change == "double":
        layer.double()
    elif change == "strides":
        original_of(layer).data = original_of(layer).data.t().contiguous().t()
    else:
        original_of(layer).data = original_of(layer).data.clone()
    original_of(layer).grad = None
    used = layer.weight
    assert used.dtype == original_of(layer).dtype
    assert used.stride() == original_of(layer).stride()
    sigma = torch.linalg.matrix_norm(used.detach().double(), 2)
    assert abs(float(sigma) - 1) < 1e-2


def test_a_copy_has_memory_of_its_own(layer):
    matmul(layer.weight).backward()
    twin = copy.deepcopy(layer)
    a, b = layer.weight, twin.weight
    assert a.data_ptr() != b.data_ptr()
    matmul(b).backward()
    assert torch.equal(a, b)


# A weight that is changed too early


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("which", ["weight", "gain"])
def test_a_change_between_forward_and_backward_is_an_error(which, create_graph):
    layer = layer_with(gain="learned")
    loss = matmul(layer.weight)
    changed = original_of(layer) if which == "weight" else norm_of(layer).gain
    with torch.no_grad():
        changed.mul_(2)
    if which == "gain" and not create_graph:
        loss.backward()  # what it needs of the gain is a number that it has kept
        return
    with pytest.raises(RuntimeError, match=f"a {which} of shape .* in-place"):
        torch.autograd.grad(loss, original_of(layer), create_graph=create_graph)
