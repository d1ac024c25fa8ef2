"""Mixed and low precision, averaging, threads, inference mode, optimizers, copies."""

from __future__ import annotations

import copy
import multiprocessing
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import snparam
from snparam.estimators.power import power_step


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )


X = torch.linspace(-1, 1, 5 * 16).reshape(5, 16)


def run_in_threads(*runs: Callable[[], object]) -> None:
    """Run all at once, with as many threads of torch's for each as the main thread has.

    A product's last bits depend on their number, also in a network that is not normalised.
    """

    def alike(run: Callable[[], object]) -> None:
        torch.set_num_threads(number)
        run()

    number = torch.get_num_threads()
    threads = [threading.Thread(target=alike, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def norms(model: nn.Module) -> list[float]:
    """Exact norms of the weights in use."""
    return [
        float(torch.linalg.matrix_norm(m.weight.detach().double(), 2))
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_svs", [1, 2])
def test_autocast_does_not_reach_the_estimate(dtype: torch.dtype, num_svs: int) -> None:
    plain, cast = (snparam.convert_model(network(), num_svs, init="random") for _ in range(2))
    for a, b in zip(plain.buffers(), cast.buffers(), strict=True):
        b.copy_(a)
    with torch.autocast("cpu", dtype):
        cast(X).square().sum().backward()
    plain(X)
    for a, b in zip(plain.buffers(), cast.buffers(), strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cast.parameters())


@pytest.mark.parametrize("num_svs", [1, 2])
@pytest.mark.parametrize("after", [True, False])
def test_bfloat16_models_have_norms_within_a_percent(num_svs: int, after: bool) -> None:
    model = network() if after else network().bfloat16()
    snparam.convert_model(model, num_svs)
    model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(5):
        model(X.bfloat16()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert norms(model) == pytest.approx([1.0] * 3, abs=0.01)
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_half_precision_never_overflows(scale: float) -> None:
    model = network().half()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.uniform_(-scale, scale)
    snparam.convert_model(model)
    model(X.half()).sum().backward()
    assert norms(model) == pytest.approx([1.0] * 3, abs=0.01)
    assert all(b.isfinite().all() for b in model.buffers())


@pytest.mark.parametrize("options", [{}, {"num_svs": 2}, {"update": "step"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_weights_are_used_with_a_norm_of_one_under_autocast_and_after_a_cast(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = network()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.uniform_(-1e4, 1e4)
    snparam.convert_model(model, **options)
    with torch.autocast("cpu", dtype):
        output = model(X)
        used = norms(model)
    output.float().square().mean().backward()
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert used == pytest.approx([1.0] * 3, abs=0.01)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.to(dtype)
    assert norms(model) == pytest.approx([1.0] * 3, abs=0.01)
    model(X.to(dtype)).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())


@pytest.mark.parametrize("first", ["cast", "register"])
@pytest.mark.parametrize("gain", ["learned", "fixed"])
def test_a_gain_that_half_precision_cannot_hold_is_kept_wider(first: str, gain: Any) -> None:
    layer = nn.Linear(64, 48)
    with torch.no_grad():
        layer.weight.uniform_(-1e4, 1e4)
    before = layer.weight.detach().half()
    if first == "cast":
        layer.half()
    snparam.register_sn(layer, gain=gain).half()
    assert layer.parametrizations.weight[0].gain.item() > torch.finfo(torch.float16).max
    torch.testing.assert_close(layer.weight, before, rtol=2e-3, atol=0)
    layer.weight.float().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_averaged_weights_are_normalised_in_eval(use_buffers: bool, update: Any) -> None:
    model = snparam.convert_model(network(), update=update)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(20):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    assert norms(averaged.eval()) == pytest.approx([1.0] * 3, abs=0.01)


def test_threads_share_a_model_in_eval() -> None:
    model = snparam.convert_model(network(), 2).eval()
    expected = model(X)
    before = [b.clone() for b in model.buffers()]
    found: list[Tensor] = []

    def run() -> None:
        for _ in range(20):
            with torch.no_grad():
                found.append(model(X))

    run_in_threads(*[run] * 4)
    assert len(found) == 80
    assert all(torch.equal(output, expected) for output in found)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def broadcast(
    tensors: list[Tensor], devices: list[int], detach: bool = False
) -> list[list[Tensor]]:
    """What replication does between GPUs: the first replica has the buffers themselves."""
    copies = [[x.detach().clone() if detach else x.clone() for x in tensors] for _ in devices]
    return [tensors if detach else copies[0], *copies[1:]]


@pytest.mark.parametrize("options", [{}, {"num_svs": 2}, {"update": "step"}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_replicas_in_threads_do_what_the_model_does(
    options: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replication = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replication, "_get_device_index", lambda device, _: device)
    model, alone = (snparam.convert_model(network(), **options).train(training) for _ in range(2))
    found: dict[int, Tensor] = {}

    def run(index: int, replica: nn.Module) -> None:
        found[index] = replica(X)

    for _ in range(3):
        replicas = enumerate(nn.parallel.replicate(model, [0, 1, 2]))
        run_in_threads(*[partial(run, *each) for each in replicas])
        expected = alone(X)
        assert len(found) == 3
        for index in range(3):  # by rounding: a replica's weight is no Parameter, and is read
            torch.testing.assert_close(found.pop(index), expected)
        for a, b in zip(model.buffers(), alone.buffers(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"num_svs": 2}, {"update": "step"}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_networks_made_in_inference_mode_are_read(options: dict[str, Any], training: bool) -> None:
    # Their tensors count no versions.
    model = snparam.convert_model(network(), **options).train(training)
    with torch.inference_mode():
        made = copy.deepcopy(model)
        assert torch.equal(made(X), copy.deepcopy(model)(X))


def test_inference_mode_then_training() -> None:
    model, other = (snparam.convert_model(network()) for _ in range(2))
    with torch.inference_mode():
        model(X)
    with torch.no_grad():
        other(X)
    model(X).sum().backward()
    other(X).sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


def test_eval_between_training_changes_nothing_and_agrees_with_it() -> None:
    model = snparam.convert_model(network())
    trained = model(X)
    before = [b.clone() for b in model.buffers()]
    torch.testing.assert_close(model.eval()(X), trained, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    torch.testing.assert_close(model.train()(X), trained, rtol=1e-4, atol=1e-6)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_train_the_originals_and_norms_stay(kind: str) -> None:
    model = snparam.convert_model(network(), num_itrs=20)  # an optimizer may outrun fewer
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    first = None
    for _ in range(30):
        loss = (model(X) - 1).square().mean()
        first = first or float(loss.detach())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < first
    snparam.verify(model, tolerance=1e-2)


def test_weight_decay_shrinks_the_original_and_not_the_weight_in_use() -> None:
    model = snparam.convert_model(network())
    original = model[0].parametrizations.weight.original
    before = original.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(original, before * 0.9)
    model.eval()
    assert norms(model) == pytest.approx([1.0] * 3, abs=1e-5)


def test_two_forwards_before_a_backward_and_retained_graphs() -> None:
    model = snparam.convert_model(network(), init="random")
    real, fake = model(X), model(-X)  # the state moves in between
    (real.mean() - fake.mean()).backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    (real.mean() - fake.mean()).backward()
    for p, g in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_accumulated_gradients_are_those_of_the_sum_of_losses() -> None:
    accumulating, summing = (snparam.convert_model(network()) for _ in range(2))
    for x in (X, -2 * X):  # the state moves in between, in both
        accumulating(x).square().mean().backward()
    sum(summing(x).square().mean() for x in (X, -2 * X)).backward()
    for p, q in zip(accumulating.parameters(), summing.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_gradient_penalty_equals_one_of_the_weights_written_out() -> None:
    model = snparam.convert_model(network().double()).eval()
    x = X.double().requires_grad_()
    (inner,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    found = torch.autograd.grad(
        (inner.norm(dim=1) - 1).square().sum(), list(model.parameters()), allow_unused=True
    )

    def written(layer: nn.Module, h: Tensor) -> Tensor:
        list_ = layer.parametrizations.weight
        u, v, _ = power_step(list_.original.detach()[None], list_[0].u)[:3]
        sigma = u[0, 0] @ list_.original @ v[0, 0]
        return nn.functional.linear(h, list_.original / sigma, layer.bias)

    y = X.double().requires_grad_()
    out = written(model[4], written(model[2], written(model[0], y).relu()).relu())
    (inner,) = torch.autograd.grad(out.sum(), y, create_graph=True)
    expected = torch.autograd.grad(
        (inner.norm(dim=1) - 1).square().sum(), list(model.parameters()), allow_unused=True
    )
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b)
    assert sum(b is not None for b in expected) >= 3


def test_copies_after_forward_and_backward() -> None:
    model = snparam.convert_model(nn.Sequential(nn.LSTM(4, 4)))
    x = torch.ones(2, 1, 4)
    model(x)[0].sum().backward()
    clone = copy.deepcopy(model)
    torch.testing.assert_close(clone(x)[0], model(x)[0])


def build_in_child(queue: Any, state: dict[str, Tensor]) -> None:
    torch.set_num_threads(1)
    model = snparam.convert_model(network())
    model.load_state_dict(state)
    queue.put(model.eval()(X).detach().numpy())


def test_processes_exchange_state_dicts_and_modules_say_so() -> None:
    model = snparam.convert_model(network()).eval()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=build_in_child, args=(queue, model.state_dict()))
    child.start()
    found = torch.from_numpy(queue.get(timeout=600))
    child.join(600)
    torch.testing.assert_close(found, model(X).detach())
    refused = context.Process(target=build_in_child, args=(queue, model))
    with pytest.raises(RuntimeError, match=r"Linear with SpectralNorm.*state_dict.*convert_model"):
        refused.start()
