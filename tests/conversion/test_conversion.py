"""Plan, conversion, restoration of whole networks."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snparam
from snparam.conversion import convert as conversion
from snparam.estimators import convergence
from snparam.estimators.power import BlockIteration, power_step
from snparam.layers import register, table
from snparam.layers.table import UserRows
from snparam.testing import assert_converted, assert_spectral_norm


class Network(nn.Module):
    """Nested containers, a shared module, tied weights, a bare parameter, and norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}) for _ in range(2)]
        )
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.attention = nn.MultiheadAttention(6, 2)
        self.lstm = nn.LSTM(6, 6)
        self.position = nn.Parameter(torch.randn(3, 6))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block["norm"](block["fc"](x).relu())
        x = self.again(self.shared(x))
        x, _ = self.attention(x, x, x)
        x, _ = self.lstm(x)
        out: Tensor = self.head(x)
        return out


TOKENS = torch.tensor([[0, 1, 2], [3, 4, 5]])
WEIGHTS = {
    "embed.weight",
    "blocks.0.fc.weight",
    "blocks.1.fc.weight",
    "shared.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
    "head.weight",
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed conversion must leave alone."""
    return {
        "types": [type(module) for module in model.modules()],
        "keys": list(model.state_dict()),
        "order": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "parameters": [id(p) for p in model.parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._load_state_dict_pre_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.pop("values"), b.pop("values"), strict=True))
    assert a == b


def test_every_eligible_weight_is_converted_in_place() -> None:
    model = Network()
    before = {id(p) for p in model.parameters()}
    assert snparam.convert_model(model) is model
    assert set(snparam.singular_values(model)) == WEIGHTS
    assert {id(p) for p in model.parameters()} == before
    snparam.verify(model, tolerance=1e-3)


def test_an_optimizer_made_before_still_trains_it() -> None:
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    snparam.convert_model(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(TOKENS).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def carriers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "parametrizations")]


@pytest.mark.parametrize("copied", [False, True])
def test_layers_that_are_removed_one_by_one_leave_nothing_behind(copied: bool) -> None:
    model = Network()
    before = snapshot(model)
    snparam.convert_model(model)
    model = copy.deepcopy(model) if copied else model
    snparam.remove_sn(carriers(model)[0])
    assert len(snparam.singular_values(model)) < len(WEIGHTS)
    while left := carriers(model):
        snparam.remove_sn(left[0])
    assert snapshot(model)["hooks"] == before["hooks"]
    model(TOKENS).sum().backward()


def test_converting_again_changes_nothing_and_says_nothing() -> None:
    model = snparam.convert_model(Network(), 3, blocks="auto")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snparam.convert_model(model, 3, blocks="auto")
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    "options",
    [
        {"num_svs": 2},
        {"num_itrs": 2},
        {"blocks": 3},
        {"init": "random"},
        {"eps": 1e-12},
        {"update": "step"},
        {"coeff": 2.0},
        {"soft": True},
        {"gain": "learned"},
    ],
    ids=str,
)
def test_other_options_than_those_of_the_first_conversion_are_refused(
    options: dict[str, Any],
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(6, 3))
    snparam.register_sn(model[0])
    ((option, asked),) = options.items()
    registered = {"num_svs": 1, "num_itrs": 1, "init": "'converged'", "update": "'forward'"}
    was = registered.get(option, {"eps": 0.0, "coeff": 1.0, "soft": False}.get(option))
    before = snapshot(model)
    plan = snparam.plan_conversion(model, **options)
    assert [row.decision for row in plan] == ["refuse", "convert", "convert"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - all of the message is looked at below
        snparam.convert_model(model, **options)
    message = str(caught.value)
    assert message == plan[0].reason
    assert message.startswith(f"SpectralNorm on '0.weight' (6, 6): registered with {option}={was}")
    assert f"asked for: {option}={asked!r}" in message
    assert "restore_model(model)" in message
    assert "exclude=" in message
    assert_same(snapshot(model), before)
    assert {row.decision for row in snparam.plan_conversion(model, exclude="0", **options)} == {
        "skip",
        "convert",
    }
    snparam.convert_model(model, exclude="0", **options)


def test_options_that_come_to_the_same_are_no_others() -> None:
    """blocks=1 and None; as many singular values as there are, and more."""
    model = snparam.convert_model(nn.Sequential(nn.Linear(6, 3), nn.Linear(9, 9)), 4)
    before = snapshot(model)
    for options in ({"blocks": 1}, {"blocks": "auto"}):
        snparam.convert_model(model, 4, **options)
    with pytest.raises(ValueError, match=r"num_svs=4 \(asked for: num_svs=5\)") as caught:
        snparam.convert_model(model, 5)
    assert "'1.weight'" in str(caught.value)
    assert "'0.weight'" not in str(caught.value)  # which has three in both
    assert_same(snapshot(model), before)


def test_options_of_a_weight_that_shares_its_parameter_count() -> None:
    model = Network()
    snparam.register_sn(model.head)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'embed\.weight'.*coeff=1\.0 \(asked for: coeff=3\.0\)"):
        snparam.convert_model(model, coeff=3.0)
    assert_same(snapshot(model), before)


def test_a_weight_that_no_row_lists_keeps_the_options_it_was_registered_with() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.Parameter(torch.randn(3, 5, 4))

    model = nn.Sequential(Experts(), nn.Linear(4, 4))
    snparam.register_sn(model[0], name="kernels", blocks=3)
    snparam.convert_model(model)
    plan = snparam.plan_conversion(model)
    assert [row.reason for row in plan] == ["already normalised"] * 2
    assert plan.share == 1


def test_tied_weights_stay_tied_with_one_state() -> None:
    model = snparam.convert_model(Network())
    embed, head = (m.parametrizations.weight for m in (model.embed, model.head))
    assert embed.original is head.original
    assert embed[0] is head[0]
    clone = copy.deepcopy(model)
    assert clone.embed.parametrizations.weight[0] is clone.head.parametrizations.weight[0]
    snparam.restore_model(model)
    assert model.embed.weight is model.head.weight


def test_tied_weights_move_once_for_each_forward_that_uses_them() -> None:
    model = snparam.convert_model(Network())
    norm = model.embed.parametrizations.weight[0]
    u = norm.u.clone()
    matrices = norm.view.to_matrices(model.embed.parametrizations.weight.original.detach())
    model(TOKENS)  # the embedding, then the head
    for _ in range(2):
        u, _, _ = power_step(matrices, u)[:3]
    torch.testing.assert_close(norm.u, u)


class Doubled(nn.Module):
    """Reads a weight in a way that nobody knows."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def reasons(model: nn.Module, **options: Any) -> dict[str, tuple[str, str]]:
    plan = snparam.plan_conversion(model, **options)
    return {row.weight: (row.decision, row.reason) for row in plan}


def test_a_weight_shared_with_an_unknown_reader_is_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["b"] = Doubled(model["a"].weight)
    found = reasons(model)
    assert found["a.weight"][0] == "skip"
    assert "b.weight" in found["a.weight"][1]


def test_a_weight_that_two_modules_read_differently_is_left_alone_in_both() -> None:
    model = nn.ModuleDict({"a": nn.ConvTranspose1d(3, 3, 1), "b": nn.Conv1d(3, 3, 1)})
    model["b"].weight = model["a"].weight
    found = reasons(model)
    assert found["a.weight"] == ("skip", "shared with b.weight, which reads it as other matrices")
    assert found["b.weight"] == ("skip", "shared with a.weight, which reads it as other matrices")


def test_sharing_with_an_excluded_module_is_said() -> None:
    decision, reason = reasons(Network(), exclude="embed")["head.weight"]
    assert decision == "convert"
    assert "embed.weight, left alone (excluded by 'embed')" in reason


def test_all_that_share_a_state_are_named_together() -> None:
    model = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    for layer in model:
        layer.weight = model[0].weight
    assert reasons(model)["1.weight"] == ("convert", "shares its state with 0.weight, 2.weight")


def test_the_plan_has_every_parameter_of_two_or_more_dimensions() -> None:
    model = Network()
    plan = snparam.plan_conversion(model)
    expected = {n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2}
    expected -= {"again.weight"}  # the same module as `shared`
    assert {row.weight for row in plan} == expected
    rows = {row.weight: row for row in plan}
    assert rows["position"].decision == "skip"
    assert "Network is not in the layer table" in rows["position"].reason
    normalised = sum(p.numel() for n, p in model.named_parameters() if n in WEIGHTS)
    total = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert plan.share == pytest.approx(normalised / total)
    assert f"{normalised / total:.1%}" in str(plan).splitlines()[-1]


@pytest.mark.parametrize(("bad", "said"), [(1, "1 weight is refused"), (2, "2 weights are")])
def test_a_plan_with_refused_weights_says_that_the_conversion_would_raise(
    bad: int, said: str
) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    for layer in model[:bad]:
        nn.init.constant_(layer.weight, torch.nan)
    last = str(snparam.plan_conversion(model)).splitlines()[-1]
    assert last.startswith(f"convert_model would raise: {said}")
    with pytest.raises(ValueError, match="NaN"):
        snparam.convert_model(model)


def test_a_plan_shows_every_sigma_in_one_format_and_says_which_it_is() -> None:
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 3)])
    for layer, value in zip(model, (0.0123456789, 12345.6789, 2.0), strict=True):
        nn.init.constant_(layer.weight, value)
    lines = str(snparam.plan_conversion(model)).splitlines()
    assert "  σ now  " in lines[0]
    assert "  0.0123457  " in lines[2]
    assert "  12345.7  " in lines[3]
    model[2].weight.data[1] = 7.0  # three blocks, of σ 2, 7 and 2
    lines = str(snparam.plan_conversion(model[2], blocks=3)).splitlines()
    assert "  largest σ now  " in lines[0]
    assert "  7  " in lines[2]


def test_a_plan_changes_nothing_and_gives_exact_singular_values() -> None:
    model = Network()
    before = snapshot(model)
    state = torch.random.get_rng_state()
    plan = snparam.plan_conversion(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same(snapshot(model), before)
    for row in plan.to_convert:
        weight = dict(model.named_parameters(remove_duplicate=False))[row.weight]
        exact = float(torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2))
        assert row.sigma == pytest.approx(exact, rel=1e-6)
        assert row.shape == tuple(weight.shape)
        assert row.matrices == (1, weight.shape[0], weight[0].numel())


def test_a_plan_prints_as_an_aligned_table() -> None:
    plan = snparam.plan_conversion(Network())
    header, rule, *rows, last = str(plan).splitlines()
    assert len(rows) == len(plan)
    starts = [i for i, c in enumerate(rule) if c == "-" and (i == 0 or rule[i - 1] == " ")]
    assert header.split("  ")[0] == "weight"
    for line in rows:
        assert all(line[at - 2 : at] == "  " for at in starts[1:] if at < len(line))
    assert last.startswith("9 of 10 weights to convert")


@pytest.mark.parametrize(
    "options",
    [{}, {"num_svs": 3}, {"blocks": "auto"}, {"exclude": "lstm"}, {"include": "blocks"}],
    ids=str,
)
def test_conversion_is_exactly_the_plan(options: dict[str, Any]) -> None:
    plan = snparam.plan_conversion(Network(), **options)
    model = snparam.convert_model(Network(), **options)
    values = snparam.singular_values(model)
    assert set(values) == {row.weight for row in plan.to_convert}
    for row in plan.to_convert:
        assert values[row.weight].shape[0] == row.matrices[0]  # type: ignore[index]
        assert float(values[row.weight].max()) == pytest.approx(row.sigma)


def test_a_layer_with_fewer_singular_values_tracks_what_it_has_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(2, 9), nn.Linear(9, 9))
    row = snparam.plan_conversion(model, 5)[0]
    assert (row.decision, row.reason) == ("convert", "tracks 2 singular values, all it has")
    snparam.convert_model(model, 5)
    assert [v.shape for v in snparam.singular_values(model).values()] == [(1, 2), (1, 5)]


SKIPPED: dict[str, tuple[Any, str]] = {
    "lazy": (lambda: nn.LazyLinear(3), "lazy module); run one forward"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), "meta device, without values; materialise"),
    "empty": (lambda: nn.Linear(3, 0), "no entries"),
    "quantised": (lambda: torch.ao.nn.quantized.Linear(3, 3), "quantised"),
    "max_norm": (lambda: nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
    "sparse": (lambda: nn.Embedding(3, 3, sparse=True), "sparse=True"),
    "float8": (lambda: nn.Linear(3, 3).to(torch.float8_e4m3fn), "float8"),
    "odd blocks": (lambda: nn.Linear(3, 3), "do not split"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", SKIPPED)
def test_what_cannot_be_converted_is_a_row_with_its_reason(case: str) -> None:
    make, reason = SKIPPED[case]
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": make()})
    options = {"blocks": 2} if case == "odd blocks" else {}
    row = next(row for row in snparam.plan_conversion(model, **options) if row.name == "bad")
    assert row.decision == "skip"
    assert reason in row.reason
    snparam.convert_model(model, **options)
    assert set(snparam.singular_values(model)) == {"good.weight"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_anywhere_is_refused_by_name_and_nothing_changes(value: float) -> None:
    model = Network()
    with torch.no_grad():
        model.lstm.weight_hh_l0[0, 0] = value
    rows = {row.weight: row for row in snparam.plan_conversion(model)}
    assert rows["lstm.weight_hh_l0"].decision == "refuse"
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'lstm\.weight_hh_l0' \(24, 6\).*NaN or inf"):
        snparam.convert_model(model)
    model.lstm.weight_hh_l0.data.zero_()
    after = snapshot(model)
    before["values"] = after["values"] = []
    assert after == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(9))
def test_a_conversion_that_breaks_off_leaves_the_model_as_it_was(
    at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Network()
    before = snapshot(model)
    attach, calls = conversion.attach, 0

    def breaking(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise error
        attach(*arguments)

    monkeypatch.setattr(conversion, "attach", breaking)
    with pytest.raises(error):
        snparam.convert_model(model)
    assert_same(snapshot(model), before)


def test_converting_nothing_warns_with_what_was_seen() -> None:
    with pytest.warns(UserWarning, match=r"nothing in Sequential.*ReLU"):
        snparam.convert_model(nn.Sequential(nn.ReLU()))
    with pytest.warns(UserWarning, match=r"0\.weight: filter_fn says no"):
        snparam.convert_model(nn.Sequential(nn.Linear(2, 2)), filter_fn=lambda m, n: False)


class Dense(nn.Module):
    """A type that no row of the layer table is for."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))


DENSE = f'snparam.register_layer_type("{__name__}.Dense", {{"kernel": "rows"}})'


def test_a_network_most_of_which_is_unknown_warns_once_with_the_call_that_adds_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Dense(4, 4), Dense(4, 4))
    with pytest.warns(UserWarning, match="not in the layer table") as warned:
        snparam.convert_model(model)
    (message,) = [str(w.message) for w in warned]
    assert message.startswith("convert_model left 66.7% of the parameters")
    assert message.splitlines()[-1].strip() == DENSE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snparam.convert_model(model)  # again: it is known
    assert str(snparam.plan_conversion(model)).splitlines()[-2].strip() == DENSE


def test_a_network_half_of_which_is_unknown_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snparam.convert_model(nn.Sequential(nn.Linear(4, 4), Dense(4, 4)))


@pytest.mark.parametrize("options", [{"exclude": Dense}, {"include": "0"}], ids=str)
def test_unknown_layers_that_are_left_out_on_purpose_do_not_warn(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Dense(40, 4))
    plan = snparam.plan_conversion(model, **options)
    assert "register_layer_type" not in str(plan)
    assert plan[1].reason in ("excluded by Dense", "not included")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snparam.convert_model(model, **options)


def test_a_lazy_tensor_that_will_be_a_vector_has_no_row() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyLinear(3))
    assert [row.weight for row in snparam.plan_conversion(model)] == ["0.weight", "3.weight"]
    model(torch.randn(2, 3, 5, 5))
    weights = [row.weight for row in snparam.plan_conversion(model).to_convert]
    assert weights == ["0.weight", "3.weight"]


class Mixture(nn.Module):
    """Multiplies by the entries of lists, and adds positions and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList([torch.randn(3, 3), torch.randn(4, 3)])
        self.named = nn.ParameterDict({"a": torch.randn(3, 3)})
        self.pos_embed = nn.Parameter(torch.randn(9, 3))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 3))
        self.mask_tokens = nn.Parameter(torch.randn(2, 3))
        self.token_mixer = nn.Parameter(torch.randn(3, 3))
        self.norm = nn.LayerNorm((3, 3))


def test_the_advice_is_for_matrices_and_for_the_types_of_this_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "USER_ROWS", UserRows())
    monkeypatch.setattr(register, "USER_ROWS", table.USER_ROWS)
    model = nn.Sequential(Mixture(), nn.ParameterList([torch.randn(3, 3)]), nn.Linear(2, 2))
    plan = snparam.plan_conversion(model)
    (call,) = plan.registrations
    assert call == (
        f'snparam.register_layer_type("{__name__}.Mixture", '
        '{"token_mixer": "rows", "kernels.*": "rows", "named.*": "rows"})'
    )
    exec(call)
    assert [row.weight for row in snparam.plan_conversion(model).to_convert] == [
        "0.token_mixer",
        "0.kernels.0",
        "0.kernels.1",
        "0.named.a",
        "2.weight",
    ]


def test_where_no_call_would_help_the_warning_says_what_does() -> None:
    model = nn.Sequential(nn.ParameterList([torch.randn(9, 9)]), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"left 95\.3% .* exclude=, or .* register_sn") as warned:
        snparam.convert_model(model)
    assert "register_layer_type" not in str(warned[0].message)


def test_a_predicate_is_not_asked_about_unknown_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Dense(4, 2))
    snparam.plan_conversion(model, filter_fn=lambda module, name: module.out_features > 1)


def test_where_nothing_is_converted_one_warning_has_the_calls_too() -> None:
    with pytest.warns(UserWarning, match="converted nothing") as warned:
        snparam.convert_model(nn.Sequential(Dense(4, 4)))
    (message,) = [str(w.message) for w in warned]
    assert DENSE in message


@pytest.mark.parametrize("bake", [True, False])
def test_restoring_leaves_the_network_it_was(bake: bool) -> None:
    model = Network()
    before = snapshot(model)
    snparam.convert_model(model, 2, blocks="auto")
    for _ in range(3):
        model(TOKENS)
    model.eval()
    expected = model(TOKENS)
    assert snparam.restore_model(model, bake=bake) is model
    after = snapshot(model)
    if bake:
        assert torch.equal(model(TOKENS), expected)
        before["values"] = after["values"] = []
    assert_same(after, before)


def test_baking_a_weight_that_another_module_uses_as_it_is_is_refused() -> None:
    model = snparam.convert_model(Network(), exclude="embed")
    expected = model.eval()(TOKENS)
    with pytest.raises(ValueError, match=r"head\.weight.*embed\.weight"):
        snparam.restore_model(model, bake=True)
    assert torch.equal(model(TOKENS), expected)
    snparam.restore_model(model, bake=False)
    assert model.embed.weight is model.head.weight


def test_restoring_a_network_that_is_not_converted_leaves_it() -> None:
    model = Network()
    before = snapshot(model)
    snparam.restore_model(model)
    assert_same(snapshot(model), before)


def test_state_dict_round_trip_is_strict() -> None:
    torch.manual_seed(1)
    model, other = (snparam.convert_model(Network(), 2) for _ in range(2))
    for _ in range(3):
        model(TOKENS)
        with torch.no_grad():
            model.lstm.parametrizations.weight_ih_l0.original.add_(0.1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model.eval()(TOKENS), other.eval()(TOKENS))
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_whole_modules_are_not_pickled() -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(snparam.convert_model(Network()), io.BytesIO())


# The progress bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **options: Any) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    snparam.convert_model(Network(), **options)
    return stream.getvalue()


def test_a_quick_conversion_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal()) == ""


def test_a_bar_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "singular values" in shown(monkeypatch, io.StringIO(), progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("stream", "expected"), [(Terminal, True), (io.StringIO, False)])
def test_a_slow_conversion_shows_a_bar_on_a_terminal_only(
    stream: type[io.StringIO], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tqdm

    # Two seconds without waiting for them: the bar's clock runs a second a look.
    clock = iter(range(10_000))
    monkeypatch.setattr(tqdm.std, "time", lambda: float(next(clock)), raising=False)
    monkeypatch.setattr(tqdm.tqdm, "_time", lambda *_: float(next(clock)), raising=False)
    assert ("singular values" in shown(monkeypatch, stream())) is expected


def test_no_bar_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), progress=False) == ""


def test_without_tqdm_only_asking_for_a_bar_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    snparam.convert_model(Network())
    with pytest.raises(ImportError, match=r"snparam\[progress\]"):
        snparam.convert_model(Network(), progress=True)


# Looking


def test_singular_values_of_a_plain_network_are_computed_and_nothing_changes() -> None:
    model = Network()
    before = snapshot(model)
    values = snparam.singular_values(model)
    assert_same(snapshot(model), before)
    assert set(values) == WEIGHTS
    for name, value in values.items():
        weight = dict(model.named_parameters(remove_duplicate=False))[name].detach().double()
        exact = torch.linalg.svdvals(weight.flatten(1))[:1]
        torch.testing.assert_close(value[0].double(), exact, rtol=1e-6, atol=0)


def test_singular_values_of_a_converted_network_are_read_and_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = snparam.convert_model(Network(), 3)
    found_by = [(BlockIteration, "step"), (convergence, "converged"), (convergence, "exact_sigma")]
    for where, name in found_by:
        monkeypatch.delattr(where, name)
    values = snparam.singular_values(model)
    assert all(v.shape == (1, 3) for v in values.values())
    values["embed.weight"].zero_()  # a copy
    assert float(snparam.singular_values(model)["embed.weight"].sum()) > 0


def test_verify_measures_exactly_and_raises_with_the_rows_at_fault() -> None:
    model = snparam.convert_model(Network())
    with torch.no_grad():
        model.shared.parametrizations.weight.original.copy_(torch.randn(6, 6))
    states = {n: b.clone() for n, b in model.named_buffers()}
    rows = {row.weight: row for row in snparam.verify(model)}
    assert all(torch.equal(b, states[n]) for n, b in model.named_buffers())
    model.eval()
    used = model.shared.weight.detach().double()
    exact = float(torch.linalg.matrix_norm(used, 2))
    assert rows["shared.weight"].exact == pytest.approx(exact, rel=1e-9)
    assert rows["shared.weight"].drift == pytest.approx(exact - 1, abs=1e-6)
    with pytest.raises(RuntimeError, match=r"(?s)1 of 9 weights.*shared\.weight") as caught:
        snparam.verify(model, tolerance=(exact - 1) / 2)
    assert "embed.weight" not in str(caught.value)


def test_verify_without_converted_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Network.*convert_model"):
        snparam.verify(Network())


@pytest.mark.parametrize("value", [0.0, torch.nan])
@pytest.mark.parametrize("blocks", [1, 2])
def test_verify_shows_what_was_estimated_for_a_weight_that_is_not_divided(
    value: float, blocks: int
) -> None:
    layer = snparam.register_sn(nn.Linear(3, 4), blocks=blocks)
    layer.parametrizations.weight.original.data.fill_(value)
    (row,) = snparam.verify(layer)
    assert row.estimate == pytest.approx(value, abs=0, nan_ok=True)
    assert f"  {value:.6g}  " in str(snparam.verify(layer))


def test_verify_shows_the_block_with_the_largest_drift_and_says_which() -> None:
    layer = snparam.register_sn(nn.Linear(3, 6), blocks=3)
    original = layer.parametrizations.weight.original.data
    original[2:4] = 5 * torch.randn(2, 3)
    (row,) = verification = snparam.verify(layer)
    used = layer.eval().weight.detach().double().unflatten(0, (3, 2))
    norms = torch.linalg.matrix_norm(used, 2)
    assert row.block == int((norms - 1).abs().argmax()) == 1
    assert row.exact == pytest.approx(float(norms[1]))
    header, _, line = str(verification).splitlines()
    assert "worst block" in header
    assert "  1 of 0 to 2  " in line
    assert f"  {row.exact:.6g}  " in line
    assert "block" not in str(snparam.verify(snparam.register_sn(nn.Linear(3, 4))))


def test_a_nan_weight_never_passes_verification() -> None:
    layer = snparam.register_sn(nn.Linear(3, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="weight"):
        snparam.verify(layer, tolerance=1e6)


@pytest.mark.parametrize("context", [snparam.frozen, snparam.cached])
def test_contexts_of_a_plain_network_are_refused(context: Any) -> None:
    with pytest.raises(ValueError, match="Network"), context(Network()):
        pass


def test_frozen_training_forwards_are_eval_forwards_and_move_nothing() -> None:
    model = snparam.convert_model(Network(), init="random")
    expected = model.eval()(TOKENS)
    model.train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    with snparam.frozen(model), snparam.frozen(model):
        # By rounding: training may divide what the linear map computes.
        torch.testing.assert_close(model(TOKENS), expected)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model(TOKENS)
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_plan_and_conversion_take_the_same_options() -> None:
    import inspect

    plan, convert, register = (
        inspect.signature(f).parameters
        for f in (snparam.plan_conversion, snparam.convert_model, snparam.register_sn)
    )
    assert list(plan) == list(convert)
    of_one_layer = ("module", "name", "input_size")
    shared = [name for name in register if name not in of_one_layer]
    assert [name for name in convert if name in register] == shared
    for function in (snparam.plan_conversion, snparam.convert_model, snparam.register_sn):
        assert all(f"{name}:" in (function.__doc__ or "") for name in shared)
    assert conversion.plan_conversion is snparam.plan_conversion


# What callers pass instead


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([nn.Linear(2, 2)], "a list.*call it for each"),
        (None, "None"),
        (nn.Linear, "the class Linear.*instance"),
        (nn.Linear(2, 2).state_dict(), "a OrderedDict"),
        (torch.ones(2, 2), "a Tensor"),
    ],
    ids=["list", "None", "class", "state_dict", "tensor"],
)
@pytest.mark.parametrize(
    "function",
    [
        snparam.convert_model,
        snparam.plan_conversion,
        snparam.restore_model,
        snparam.register_sn,
        snparam.remove_sn,
        snparam.verify,
        snparam.singular_values,
        snparam.refresh,
        snparam.update,
        snparam.plain_state_dict,
        snparam.state_dict_for,
        snparam.optimizer_state_dict_for,
        snparam.gain_parameters,
        snparam.parameter_groups,
        snparam.weight_in_use,
        snparam.frozen,
        snparam.cached,
        assert_spectral_norm,
        assert_converted,
    ],
    ids=lambda f: f.__name__,
)
def test_what_is_no_module_is_named(function: Any, given: Any, said: str) -> None:
    optimizer = torch.optim.SGD([torch.ones(1)])
    more = {"state_dict_for": ["torch"], "optimizer_state_dict_for": [optimizer, "plain"]}
    with (
        pytest.raises(
            TypeError, match=rf"(?s){function.__name__}: expected an nn.Module, not {said}"
        ),
        contextlib.ExitStack() as stack,
    ):
        # `frozen` and `cached` raise where they are entered.
        stack.enter_context(function(given, *more.get(function.__name__, ())))


@pytest.mark.parametrize("bake", ["no", "false", 0, None], ids=repr)
@pytest.mark.parametrize(
    "function",
    [snparam.restore_model, snparam.remove_sn, snparam.plain_state_dict],
    ids=lambda f: f.__name__,
)
def test_whether_to_bake_is_true_or_false(function: Any, bake: Any) -> None:
    layer = snparam.register_sn(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=f"bake={bake!r}: expected True or False"):
        function(layer, bake=bake)
    assert set(snparam.singular_values(layer)) == {"weight"}


def test_whether_to_take_over_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="replace='no': expected True or False"):
        snparam.convert_model(nn.Linear(3, 4), replace="no")  # type: ignore[arg-type]


def test_the_arguments_of_torchs_spectral_norm_are_answered_with_ours() -> None:
    for function in (snparam.convert_model, snparam.plan_conversion, snparam.register_sn):
        with pytest.raises(TypeError, match=r"'n_power_iterations'; did you mean 'num_itrs'\?"):
            function(nn.Linear(2, 2), n_power_iterations=3)
    with pytest.raises(TypeError, match="name='weight'"):
        snparam.register_sn(nn.Linear(2, 2), "weight")  # type: ignore[arg-type]


def test_one_singular_value_is_no_plural() -> None:
    plan = snparam.plan_conversion(nn.Sequential(nn.Linear(8, 1), nn.Linear(8, 2)), 3)
    assert [row.reason for row in plan] == [
        "tracks 1 singular value, all it has",
        "tracks 2 singular values, all it has",
    ]


def test_rows_of_plans_and_of_verifications_name_weights_alike() -> None:
    model = Network()
    planned = snparam.plan_conversion(model)
    verified = snparam.verify(snparam.convert_model(model))
    rows = {row.weight: (row.name, row.tensor) for row in planned if row.decision == "convert"}
    assert {row.weight: (row.name, row.tensor) for row in verified} == rows
    assert all(weight == f"{name}.{tensor}" for weight, (name, tensor) in rows.items())
    layer = snparam.register_sn(nn.Linear(2, 2))
    for row in (*snparam.plan_conversion(layer), *snparam.verify(layer)):
        assert (row.weight, row.name, row.tensor) == ("weight", "", "weight")


def test_the_package_shows_its_public_names() -> None:
    assert set(dir(snparam)) == {*snparam.__all__, "__version__"}
    assert all(hasattr(snparam, name) for name in dir(snparam))
