"""What normalisation costs, counted: matrix products, large tensors made, moves of the state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import snparam
from snparam.constraints import division
from snparam.estimators.power import BlockIteration
from snparam.matrices import orthonormalisation

PRODUCTS = {"mv", "mm", "bmm", "addmv", "addmm", "addbmm"}


class Counting(TorchDispatchMode):
    """Counts operations by name, and the new tensors of at least `large` entries."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large
        self.operations: Counter[str] = Counter()
        self.made = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations[func.overloadpacket.__name__] += 1
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.numel() >= self.large:
            self.made += out.untyped_storage().data_ptr() not in given
        return out

    @property
    def products(self) -> int:
        return sum(self.operations[name] for name in PRODUCTS)


@contextmanager
def counting(weight: Tensor) -> Iterator[Counting]:
    with Counting(weight.numel()) as mode:
        yield mode


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(20, 30), {}),
    "conv": (lambda: nn.Conv2d(6, 8, 3), {}),
    "channels_last": (
        lambda: nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        {},
    ),
    "groups": (lambda: nn.Conv2d(8, 16, 3, groups=4), {"blocks": "auto"}),
    "top 4": (lambda: nn.Linear(20, 30), {"num_svs": 4}),
    "float64": (lambda: nn.Linear(20, 30).double(), {}),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    make, options = LAYERS[request.param]
    return snparam.register_sn(make(), **options)


def original(layer: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr]
    return weight


def test_training_read_takes_two_products(layer: nn.Module) -> None:
    with counting(original(layer)) as mode:
        layer.weight  # noqa: B018
    assert mode.products == 2


@pytest.mark.parametrize("num_itrs", [1, 2, 5])
def test_each_step_takes_two_products(num_itrs: int) -> None:
    layer = snparam.register_sn(nn.Linear(20, 30), num_itrs=num_itrs)
    with counting(original(layer)) as mode:
        layer.weight  # noqa: B018
    assert mode.products == 2 * num_itrs


@pytest.mark.parametrize("num_svs", [1, 2, 8, 16])
def test_products_do_not_grow_with_num_svs(num_svs: int) -> None:
    layer = snparam.register_sn(nn.Linear(20, 30), num_svs)
    with counting(original(layer)) as mode:
        layer.weight  # noqa: B018
    assert mode.products == 2


def test_eval_read_takes_one_step_whatever_num_itrs() -> None:
    layer = snparam.register_sn(nn.Linear(20, 30), num_itrs=7).eval()
    with torch.no_grad(), counting(original(layer)) as mode:
        layer.weight  # noqa: B018
    assert mode.products == 2


def test_read_makes_one_tensor_of_the_weights_size(layer: nn.Module) -> None:
    with counting(original(layer)) as mode:
        layer.weight  # noqa: B018
    assert mode.made == 1


def test_backward_makes_one_tensor_of_the_weights_size_and_takes_no_product(
    layer: nn.Module,
) -> None:
    weight = original(layer)
    used = layer.weight
    grad = torch.ones_like(used)
    with counting(weight) as mode:
        (gradient,) = torch.autograd.grad(used, weight, grad)
    assert mode.made == 1
    assert mode.products == 0  # a rank-one update (addr, baddbmm_) only writes
    assert gradient.shape == weight.shape


class ReadsItself(nn.Linear):
    """Reads its weight several times, as attention and recurrent layers do."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return nn.functional.linear(nn.functional.linear(x, self.weight), self.weight, self.bias)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "reads itself": (lambda: ReadsItself(8, 8), (2, 8)),
    "lstm": (lambda: nn.LSTM(4, 4, num_layers=2, bidirectional=True), (3, 2, 4)),
    "gru": (lambda: nn.GRU(4, 4), (3, 2, 4)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0),
        (3, 2, 8),
    ),
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)), (2, 4)),
}


@pytest.fixture(params=NETWORKS, ids=str)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[request.param]
    return make(), torch.ones(shape)


def steps_counted(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """How many power-iteration steps a call takes."""
    taken = 0
    step = BlockIteration.step

    def counted(*args: Any) -> Any:
        nonlocal taken
        taken += 1
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(BlockIteration, "step", counted)
        run()
    return taken


@pytest.mark.parametrize("num_itrs", [1, 3])
def test_forward_moves_each_state_once_however_often_it_reads(
    network: tuple[nn.Module, Tensor], num_itrs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network
    snparam.convert_model(model, num_itrs=num_itrs)
    weights = len(snparam.singular_values(model))
    assert steps_counted(monkeypatch, lambda: model(x)) == weights * num_itrs


def test_eval_forward_computes_each_weight_once(
    network: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network
    snparam.convert_model(model, num_itrs=3).eval()
    weights = len(snparam.singular_values(model))
    assert steps_counted(monkeypatch, lambda: model(x)) <= weights


def test_cached_computes_each_weight_once_for_many_forwards(
    network: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network
    snparam.convert_model(model).eval()
    weights = len(snparam.singular_values(model))

    def run() -> None:
        with torch.no_grad(), snparam.cached(model):
            for _ in range(5):
                model(x)

    assert steps_counted(monkeypatch, run) <= weights


def test_update_per_step_leaves_no_product_in_forward_and_backward() -> None:
    layer = snparam.register_sn(nn.Linear(20, 30), update="step")
    snparam.update(layer)
    weight = original(layer)
    with counting(weight) as mode:
        layer.weight.backward(torch.ones(30, 20))
    assert mode.products == 0


NO_KERNEL = {
    "promote_types", "alias", "as_strided", "detach", "expand", "permute", "select", "slice",
    "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


def kernels(run: Callable[[], object]) -> int:
    """How many operations would be launched on an accelerator: all but views and questions."""
    with Counting(0) as mode:
        run()
    return sum(n for name, n in mode.operations.items() if name not in NO_KERNEL)


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on accelerators, where no number is read, done on a CPU."""
    for module in (orthonormalisation, division):
        monkeypatch.setattr(module, "reads_freely", lambda _: False)


@pytest.mark.usefixtures("accelerated")
def test_no_more_kernels_than_torchs_parametrization() -> None:
    """Launches are what a small layer costs on an accelerator."""
    grad = torch.ones(30, 20)
    theirs = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 30))
    ours = snparam.register_sn(nn.Linear(20, 30))
    stepwise = snparam.register_sn(nn.Linear(20, 30), update="step")
    snparam.update(stepwise)

    def both(layer: nn.Module) -> tuple[int, int]:
        weight = cast(Tensor, layer.weight)
        return kernels(lambda: layer.weight), kernels(lambda: weight.backward(grad))

    for layer in (theirs, ours, stepwise):
        cast(Tensor, layer.weight).backward(grad)
    assert sum(both(ours)) <= sum(both(theirs))
    assert both(stepwise) == (1, both(ours)[1])


@pytest.mark.usefixtures("accelerated")
def test_kernels_of_an_update_do_not_grow_with_the_layers_of_one_shape() -> None:
    def launched(layers: int) -> int:
        model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(layers)])
        snparam.convert_model(model, update="step")
        return kernels(lambda: snparam.update(model))

    assert launched(3) == launched(12)


def test_update_takes_one_batched_step_for_layers_of_one_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(8)], nn.Linear(6, 3))
    snparam.convert_model(model, update="step")
    assert steps_counted(monkeypatch, lambda: snparam.update(model)) == 2
