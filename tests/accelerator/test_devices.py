"""The ordinary contracts on accelerators: the numbers of a CPU, whatever they are computed on.

`python -m pytest tests/accelerator` runs them where there is a device, and skips them with that
reason where there is none. `SNPARAM_TEST_DEVICES=cpu` lets a CPU stand for one, which tests the
tests.
"""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snparam


def is_available(device: str) -> bool:
    if device == "mps":
        return torch.backends.mps.is_available()
    return device == "cpu" or getattr(torch, device).is_available()


NAMES = os.environ.get("SNPARAM_TEST_DEVICES", "cuda mps xpu").split()
DEVICES = [name for name in NAMES if is_available(name)]


@pytest.fixture(params=DEVICES or [None], ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, with products in full precision, which is what a CPU computes in."""
    if request.param is None:
        pytest.skip(f"there is no accelerator here: none of {', '.join(NAMES)}")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


with_updates = pytest.mark.parametrize("update", ["forward", "step"])


class Network(nn.Module):
    """Layers of each kind; two of one shape, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 2 * 36)
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.a = nn.Linear(2 * 144, 24)
        self.b = nn.Linear(24, 24)
        self.c = nn.Linear(24, 24)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).view(-1, 2, 6, 6)
        x = self.up(self.conv(x).tanh()).flatten(1)
        x = self.b(self.a(x).tanh()).tanh()
        x = self.c(self.b(x).tanh()).view(-1, 4, 24)
        x, _ = self.attention(x, x, x, need_weights=False)
        out: Tensor = self.head(x)
        return out


TOKENS = torch.arange(32).remainder(12).flip(0)
TARGET = torch.linspace(-1, 1, 8 * 4 * 5).view(8, 4, 5).sin()

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_svs": 2, "num_itrs": 2},
    {"blocks": "auto"},
    {"gain": "learned"},
    {"soft": True, "coeff": 0.7},
]
with_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def converted(device: torch.device | str = "cpu", **options: Any) -> nn.Module:
    return snparam.convert_model(Network(), **options).to(device)


def loss_of(model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    output = model(TOKENS.to(device)).float()
    loss: Tensor = (output - TARGET.to(device)).square().mean()
    return loss


def train(
    model: nn.Module,
    steps: int = 5,
    make: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, 0.5),
) -> list[float]:
    optimizer = make(model.parameters())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_close_on(device: torch.device, found: nn.Module, right: nn.Module) -> None:
    """Parameters and states are those of a network on a CPU, and lie on the device."""
    theirs = {**dict(right.named_parameters()), **dict(right.named_buffers())}
    for name, tensor in [*found.named_parameters(), *found.named_buffers()]:
        assert tensor.device.type == device.type, name
        torch.testing.assert_close(
            tensor.cpu(), theirs[name], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n} {m}"
        )


def norms(model: nn.Module) -> list[float]:
    """The exact norm of each matrix of each weight in use, in eval mode."""
    mode = model.training
    model.eval()
    found = []
    for name, module in model.named_modules():
        for tensor, chain in getattr(module, "parametrizations", {}).items():
            with torch.no_grad():
                weight = getattr(module, tensor)
            stack = chain[0].view.to_matrices(weight.detach().cpu().double())
            found += torch.linalg.matrix_norm(stack, 2).tolist()
            assert weight.device == chain.original.device, name
    model.train(mode)
    return found


# Converting and moving


@with_updates
@with_options
def test_conversion_on_the_device_is_that_on_a_cpu(
    device: torch.device, options: dict[str, Any], update: Any
) -> None:
    there = snparam.convert_model(Network().to(device), update=update, **options)
    here = snparam.convert_model(Network(), update=update, **options)
    assert_close_on(device, there, here)
    if not {"gain", "soft"} & set(options):
        assert norms(there) == pytest.approx([1.0] * len(norms(here)), rel=1e-3)
    snparam.verify(there, tolerance=1e-2)
    assert_close_on(device, copy.deepcopy(here).to(device), here)
    torch.testing.assert_close(there.cpu().eval()(TOKENS), here.eval()(TOKENS))


@with_updates
def test_states_are_saved_on_the_device_and_loaded_on_a_cpu(
    device: torch.device, update: Any
) -> None:
    model = converted(device, update=update, num_svs=2)
    train(model, 2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    here = converted(update=update, num_svs=2)
    here.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for name, tensor in model.state_dict().items():
        assert torch.equal(here.state_dict()[name], tensor.cpu())
    torch.testing.assert_close(
        here.eval()(TOKENS), model.eval()(TOKENS.to(device)).cpu(), rtol=1e-4, atol=1e-5
    )
    back = converted(device, update=update, num_svs=2)
    back.load_state_dict(here.state_dict())
    assert_close_on(device, back, here)


def test_cached_and_restored_networks_compute_what_eval_computes(device: torch.device) -> None:
    model = converted(device)
    train(model, 2)
    x = TOKENS.to(device)
    with torch.no_grad():
        right = model.eval()(x)
        with snparam.cached(model):
            for _ in range(2):
                torch.testing.assert_close(model(x), right)
        used = snparam.weight_in_use(model.a, "weight")
        assert torch.equal(used, model.a.weight)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x), right)
        snparam.restore_model(model)
        torch.testing.assert_close(model(x), right)
    assert torch.equal(model.a.weight, used)


# Training


@with_updates
@with_options
def test_training_is_that_on_a_cpu(
    device: torch.device, options: dict[str, Any], update: Any
) -> None:
    there, here = (converted(d, update=update, **options) for d in (device, "cpu"))
    losses = train(there), train(here)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
    assert_close_on(device, there, here)


@with_updates
def test_channels_last_and_strided_weights_train_as_on_a_cpu(
    device: torch.device, update: Any
) -> None:
    there, here = (
        converted(d, update=update).to(memory_format=torch.channels_last) for d in (device, "cpu")
    )
    train(there), train(here)
    assert_close_on(device, there, here)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "one by one": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_kind_of_optimizer_moves_the_states(
    device: torch.device, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    model = converted(device, update="step", num_itrs=2)
    before = [m.u.clone() for m in model.modules() if isinstance(m, snparam.SpectralNorm)]
    optimizer = make(model.parameters())
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    after = [m.u.clone() for m in model.modules() if isinstance(m, snparam.SpectralNorm)]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    loss_of(model).backward()  # which moves nothing
    states = [m.u for m in model.modules() if isinstance(m, snparam.SpectralNorm)]
    assert all(torch.equal(a, b) for a, b in zip(after, states, strict=True))
    assert norms(model) == pytest.approx([1.0] * len(norms(model)), abs=0.1)


@pytest.mark.parametrize("layers", [3, 20])
def test_layers_of_one_shape_are_moved_as_each_alone(device: torch.device, layers: int) -> None:
    torch.manual_seed(0)
    crowd = nn.Sequential(*[nn.Linear(16, 16) for _ in range(layers)]).to(device)
    snparam.convert_model(crowd, update="step", init="random")
    alone = copy.deepcopy(crowd)
    snparam.update(crowd)
    for layer in alone:
        snparam.update(layer)
    for a, b in zip(crowd.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@with_updates
@pytest.mark.parametrize("num_svs", [1, 8])
def test_large_weights_train_as_on_a_cpu(device: torch.device, num_svs: int, update: Any) -> None:
    pair = []
    for where in (device, torch.device("cpu")):
        torch.manual_seed(0)
        layer = nn.Linear(512, 1024)
        with torch.no_grad():  # one singular value apart from the others
            layer.weight.add_(torch.outer(torch.ones(1024), torch.ones(512)) / 200)
        snparam.register_sn(layer, num_svs, update=update).to(where)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        for _ in range(3):
            x = torch.linspace(-1, 1, 4 * 512).sin().view(4, 512).to(where)
            layer(x).square().mean().backward()
            optimizer.step()
        pair.append(layer)
    found, right = pair
    weights = [layer.parametrizations.weight.original.detach().cpu() for layer in pair]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)
    svs = [layer.parametrizations.weight[0].sv.cpu()[:, :1] for layer in pair]
    torch.testing.assert_close(*svs, rtol=1e-4, atol=0)
    assert norms(found) == pytest.approx([1.0], rel=1e-2)
    assert norms(right) == pytest.approx([1.0], rel=1e-2)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within it, waiting for the device is an error, where that can be known."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@with_updates
@pytest.mark.parametrize(
    "options", [{}, {"num_svs": 2}, {"blocks": "auto"}, {"gain": "learned"}], ids=str
)
def test_training_steps_never_wait_for_the_device(
    device: torch.device, options: dict[str, Any], update: Any
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32)
    )
    snparam.convert_model(model, update=update, **options).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.linspace(-1, 1, 3 * 72, device=device).view(3, 2, 6, 6)
    for step in range(4):
        with no_waiting(device) if step else nullcontext():
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                model.eval()(x)
            model.train()


# Precision


@with_updates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_weights_and_states_in_full_precision(
    device: torch.device, dtype: torch.dtype, update: Any
) -> None:
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("attention under float16 autocast is not for a CPU")
    model = converted(device, update=update)
    right = converted(device, update=update)
    for _ in range(2):
        with torch.autocast(device.type, dtype):
            output = model(TOKENS.to(device))
            weight = model.a.weight
        expected = right(TOKENS.to(device))
        right.a.weight  # noqa: B018  (a read as above)
        assert output.dtype == dtype
        assert weight.dtype == torch.float32
        torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
        output.float().square().mean().backward()
    for (name, a), b in zip(model.named_buffers(), right.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@with_updates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_stay_normalised(
    device: torch.device, dtype: torch.dtype, update: Any
) -> None:
    model = converted(device, update=update).to(dtype)
    for _ in range(3):
        loss_of(model).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert norms(model) == pytest.approx([1.0] * len(norms(model)), abs=0.02)


@with_updates
def test_a_grad_scaler_skips_steps_and_training_goes_on(device: torch.device, update: Any) -> None:
    model = converted(device, update=update, num_itrs=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for step in range(8):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model)
        loss = loss * (math.inf if step in (2, 3) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = all(map(torch.equal, before, model.parameters()))
        assert skipped == (step in (2, 3))
    assert all(b.isfinite().all() for b in model.buffers())
    assert norms(model) == pytest.approx([1.0] * len(norms(model)), abs=0.05)


@with_updates
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"num_svs": 2}, {"blocks": 2}, {"eps": 1e-12}], ids=str)
def test_broken_and_zero_weights_leave_u(
    device: torch.device, options: dict[str, Any], bad: float, update: Any
) -> None:
    torch.manual_seed(0)
    layer = snparam.register_sn(nn.Linear(20, 30, bias=False), update=update, **options).to(device)
    original, norm = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    good, u = original.detach().clone(), norm.u.clone()
    for value in (bad, 0.0):
        with torch.no_grad():
            original.fill_(value)
        layer(torch.ones(1, 20, device=device))
        assert torch.equal(norm.u, u)
    with torch.no_grad():
        original.copy_(good)
    layer(torch.ones(1, 20, device=device)).sum().backward()
    assert norms(layer) == pytest.approx([1.0] * len(u), rel=1e-3)
    assert original.grad.isfinite().all()


# Recomputing and compiling


@with_updates
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_regions_have_the_gradients_of_unchecked_ones(
    device: torch.device, reentrant: bool, update: Any
) -> None:
    found = []
    for checked in (True, False):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
        snparam.convert_model(body, update=update).to(device)
        with torch.no_grad():  # far from converged
            for module in body.modules():
                if isinstance(module, snparam.SpectralNorm):
                    module.u.copy_(torch.linspace(1, 2, module.u.numel()).view_as(module.u))
        losses = []
        for scale in (1.0, -2.0, 3.0):
            x = scale * torch.linspace(-1, 1, 36, device=device).view(3, 12)
            x.requires_grad_()
            out = checkpoint(body, x, use_reentrant=reentrant) if checked else body(x)
            losses.append(out.square().sum())
        losses[1].backward()
        (losses[0] - 2 * losses[2]).backward()
        found.append([p.grad.cpu() for p in body.parameters()] + [b.cpu() for b in body.buffers()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*TensorFloat32.*:UserWarning")
@with_updates
def test_compiled_training_is_eager_training(device: torch.device, update: Any) -> None:
    if device.type == "mps":
        pytest.skip("Inductor's backend for mps is a prototype")
    torch._dynamo.reset()

    def small() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))

    eager = snparam.convert_model(small(), update=update).to(device)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (eager, traced)]
    x = torch.linspace(-1, 1, 60, device=device).view(5, 12).sin()
    for training in (True, True, True, False, True):
        outputs = []
        for model, run, optimizer in (
            (eager, eager, optimizers[0]),
            (traced, compiled, optimizers[1]),
        ):
            model.train(training)
            outputs.append(run(x))
            outputs[-1].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    for a, b in zip(
        [*eager.parameters(), *eager.buffers()],
        [*traced.parameters(), *traced.buffers()],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
