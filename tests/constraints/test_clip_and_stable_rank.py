"""clip=, stable_rank= and coeff="mup" on layers and networks, against full decompositions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers.holder import Holder, exact, held, matrix_of, norm_of, original_of, used
from helpers.spectra import changed, with_values
from torch import Tensor, nn

import snparam
from snparam.estimators.estimate import ESTIMATORS, register_estimator
from snparam.estimators.power import PowerIteration

CLIP: dict[str, Any] = {"clip": 1.0, "num_svs": 3}
RANK: dict[str, Any] = {"stable_rank": 1.3}
BOTH = pytest.mark.parametrize("options", [CLIP, RANK], ids=["clip", "rank"])
X = torch.linspace(-1, 1, 3 * 2 * 25, dtype=torch.float64).view(3, 2, 5, 5)


def network(update: Any = "forward", **options: Any) -> nn.Sequential:
    """A network of a convolution and a Linear with two singular values above 1 each."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator.get_state())
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)).double()
    for index, seed in ((0, 1), (3, 2)):
        weight: Any = net[index].weight
        matrix = with_values([3.0, 2.0, 0.7, 0.2], weight.shape[0], weight[0].numel(), seed)
        weight.data = matrix.view_as(weight)
    return snparam.convert_model(net, update=update, **options) if options else net


def expected(original: Tensor, options: dict[str, Any]) -> Tensor:
    """The weight that should be in use, by a full decomposition in float64."""
    if "clip" in options:
        out = changed(matrix_of(original), lambda s: s.clamp_max(options["clip"]))
        return out.view(original.shape)

    def shrunk(s: Tensor) -> Tensor:
        s = s / s[0]
        rest = float(s[1:].square().sum())
        factor = min(1.0, math.sqrt((options["stable_rank"] - 1) / rest)) if rest > 0 else 1.0
        return torch.cat([s[:1], s[1:] * factor])

    return changed(matrix_of(original), shrunk).view(original.shape)


@pytest.mark.parametrize("sigma", ["power", "rayleigh-ritz"])
@pytest.mark.parametrize("update", ["forward", "step"])
@BOTH
def test_networks_train_verify_save_load_copy_and_restore(
    options: dict[str, Any], update: Any, sigma: str
) -> None:
    net = network(update, sigma=sigma, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (net(X) - 1).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    snparam.refresh(net)
    assert [row.intended for row in snparam.verify(net, tolerance=1e-6)] == [1.0, 1.0]
    for layer in (net[0], net[3]):
        weight = expected(original_of(layer), options)
        torch.testing.assert_close(snparam.weight_in_use(layer), weight, rtol=1e-5, atol=1e-5)
    out = net.eval()(X)
    other = network(update, sigma=sigma, **options).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(X), out)
    assert torch.equal(copy.deepcopy(net)(X), out)
    with torch.no_grad():
        assert torch.equal(net(X), out)
    snparam.restore_model(net, bake=True)
    assert torch.equal(net(X), out)
    plain = network()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(X), out)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("penalty", [False, True])
@BOTH
def test_the_gradient_of_a_layer_is_that_of_finite_differences(
    options: dict[str, Any], penalty: bool, training: bool
) -> None:
    net = network(sigma="rayleigh-ritz", **options).train(training)
    weight = original_of(net[0])
    x = X.clone().requires_grad_()

    def loss() -> Tensor:
        out = net(x).square().sum()
        if penalty:  # as in the training of a critic: on the gradient for the input
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            out = out + slope.square().sum()
        return out

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(
        weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight.add_(step * direction)
        snparam.refresh(net)
        values.append(float(loss().detach()))
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("num_svs", [1, 2])
def test_verify_says_by_how_much_more_values_than_are_tracked_miss_c(num_svs: int) -> None:
    layer = held(with_values([3.0, 1.5, 1.2, 0.3], 6, 5), num_svs, clip=1.0)
    (row,) = snparam.verify(layer)
    missing = [1.5, 1.2][num_svs - 1]
    assert row.exact == pytest.approx(missing, rel=1e-6)
    assert (row.intended, row.drift) == (1.0, pytest.approx(missing - 1, rel=1e-5))
    with pytest.raises(RuntimeError, match="drift"):
        snparam.verify(layer, tolerance=0.01)
    below = held(with_values([0.8, 0.1], 6, 5), num_svs, clip=1.0)
    assert snparam.verify(below)[0].intended == pytest.approx(0.8)
    assert torch.equal(used(below), original_of(below))


@BOTH
def test_plan_and_print_show_it(options: dict[str, Any]) -> None:
    plan = snparam.plan_conversion(network(), **options)
    told = {"clip": "clip=1 for the largest singular values, 3 of 4", "rank": "at most 1.3"}
    assert told["clip" if "clip" in options else "rank"] in plan[0].reason
    net = network(**options)
    (name,) = {"clip", "stable_rank"} & set(options)
    assert f"{name}={options[name]}" in repr(net)
    assert getattr(norm_of(net[0]), name) == options[name]
    with pytest.raises(ValueError, match=rf"{name}={options[name]} \(asked for: {name}=None\)"):
        snparam.convert_model(net)


def test_the_plan_says_that_more_values_may_exceed_c() -> None:
    assert "raise num_svs" in snparam.plan_conversion(network(), clip=1.0)[0].reason
    assert "raise num_svs" not in snparam.plan_conversion(network(), 3, clip=1.0)[0].reason
    assert "raise num_svs" not in snparam.plan_conversion(network(), 4, clip=0.01)[0].reason


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64], ids=str
)
@BOTH
def test_other_dtypes_and_blocks(options: dict[str, Any], dtype: torch.dtype, blocks: int) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    parts = [with_values([3.0 - i, 1.5, 0.5], 4, 6, i, wide) for i in range(blocks)]
    layer = held(torch.cat(parts).to(dtype), blocks=blocks, **options)
    weight = used(layer)
    assert weight.dtype == dtype
    assert layer().dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    for part, original in zip(weight.chunk(blocks), original_of(layer).chunk(blocks), strict=True):
        assert float(exact(part)[0]) == pytest.approx(1.0, abs=tolerance)
        right = expected(original, options)
        torch.testing.assert_close(part.to(wide), right, rtol=0, atol=max(tolerance, 1e-6))
    layer().abs().square().sum().backward()
    gradient = original_of(layer).grad
    assert gradient is not None
    assert gradient.dtype == dtype
    assert bool(gradient.isfinite().all())


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"clip": 0.0}, ValueError, "clip=0.0: expected a finite number above 0"),
    ({"clip": "1"}, TypeError, "clip='1': expected a number or None, not str"),
    ({"clip": True}, TypeError, "clip=True"),
    ({"stable_rank": 0.9}, ValueError, "stable_rank=0.9: expected at least 1"),
    ({"stable_rank": math.inf}, ValueError, "stable_rank=inf"),
    ({"coeff": "mu"}, TypeError, "coeff='mu': expected a number or 'mup'"),
    ({"clip": 1.0, "coeff": 2.0}, ValueError, "clip=1.0 and coeff=2.0.*pass one"),
    ({"clip": 1.0, "soft": True}, ValueError, "clip=1.0 and soft=True"),
    ({"clip": 1.0, "gain": "learned"}, ValueError, "clip=1.0 and gain='learned'"),
    ({"clip": 1.0, "stable_rank": 2.0}, ValueError, "clip=1.0 and stable_rank=2.0"),
    ({"clip": 1.0, "constraint": "fixed"}, ValueError, "clip=1.0 and constraint='fixed'"),
    ({"stable_rank": 2.0, "soft": True}, ValueError, "stable_rank=2.0 and soft=True"),
    ({"stable_rank": 2.0, "gain": "fixed"}, ValueError, "stable_rank=2.0 and gain='fixed'"),
    ({"constraint": "clip"}, ValueError, "expected clip=c"),
    ({"constraint": "stable-rank"}, ValueError, "expected stable_rank=r"),
    ({"gain": "fixed", "coeff": "mup"}, ValueError, "gain='fixed'"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=str)
def test_what_makes_no_sense_is_refused_before_anything_changes(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = nn.Linear(3, 4)
    for call in (snparam.register_sn, snparam.convert_model, snparam.plan_conversion):
        with pytest.raises(error, match=message):
            call(layer, **options)
    assert type(layer) is nn.Linear


@BOTH
def test_an_estimator_of_upper_bounds_has_no_triplets(options: dict[str, Any]) -> None:
    class Above(PowerIteration):
        name, side = "above", "above"

    register_estimator(Above())
    try:
        with pytest.raises(ValueError, match="sigma='above'"):
            snparam.register_sn(nn.Linear(3, 4), sigma="above", **{**options, "num_svs": 1})
    finally:
        del ESTIMATORS["above"]


@pytest.mark.parametrize("options", [CLIP, RANK, {"coeff": "mup"}], ids=str)
@pytest.mark.parametrize("spelling", ["torch", "torch-hook", "biggan"])
def test_other_spellings_cannot_say_it(options: dict[str, Any], spelling: str) -> None:
    net = network(**options)
    with pytest.raises(ValueError, match=f"{spelling}.*makes another weight than W / σ"):
        snparam.state_dict_for(net, spelling)
    weights = snparam.plain_state_dict(net)
    torch.testing.assert_close(weights["0.weight"], snparam.weight_in_use(net[0]))


def test_mup_is_the_root_of_rows_over_columns_of_the_view() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Linear(16, 9)).double()
    plan = snparam.plan_conversion(net, coeff="mup")
    assert [row.reason for row in plan][2] == "coeff=0.75, √(rows / columns)"
    snparam.convert_model(net, coeff="mup")
    radii = [math.sqrt(8 / 36), math.sqrt(4 / 72), 0.75]
    assert [row.intended for row in snparam.verify(net, tolerance=1e-3)] == pytest.approx(radii)
    assert "coeff='mup'" in repr(net)
    assert norm_of(net[0]).coeff == "mup"
    soft = snparam.register_sn(Holder(torch.eye(4, 9)), name="weight", coeff="mup", soft=True)
    torch.testing.assert_close(exact(soft.weight)[0], torch.tensor(2 / 3, dtype=torch.float64))
    stacked = held(torch.randn(6, 3, dtype=torch.float64), coeff="mup", blocks=2)
    assert snparam.verify(stacked)[0].intended == pytest.approx(1.0)  # 3 rows each
    square = snparam.convert_model(nn.Sequential(nn.Linear(4, 4)), coeff="mup")
    assert snparam.state_dict_for(square, "torch")  # there it is W / σ, which others know


def test_mup_leaves_out_embeddings_and_what_is_tied_to_them() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    plan = snparam.plan_conversion(net, coeff="mup")
    assert [row.decision for row in plan] == ["skip", "skip", "convert"]
    assert "embedding" in plan[0].reason
    assert "0.weight" in plan[1].reason
    snparam.convert_model(net, coeff="mup")
    assert list(snparam.singular_values(net)) == ["2.weight"]
    with pytest.raises(ValueError, match=r"coeff='mup'.*looks rows up"):
        snparam.register_sn(nn.Embedding(5, 4), coeff="mup")
    assert snparam.register_sn(nn.Embedding(5, 4), coeff=0.9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@BOTH
def test_a_traced_program_computes_the_same_and_gives_no_gradient(
    options: dict[str, Any], tmp_path: Any
) -> None:
    net = network(**options).eval()
    program = torch.jit.trace(net, X)
    program.save(str(tmp_path / "program.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "program.pt"))(X), net(X))
    program(X).sum().backward()
    assert original_of(net[0]).grad is None


@BOTH
def test_activation_checkpointing_repeats_the_same_weights(options: dict[str, Any]) -> None:
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for checkpointed in (False, True):
        net = network(**options)
        for scale in (1.0, 2.0):
            out = (
                checkpoint(net, X * scale, use_reentrant=False) if checkpointed else net(X * scale)
            )
            out.square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
