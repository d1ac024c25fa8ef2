"""The benchmark command: it runs, covers every case, alternates, and compares like with like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snparam
from benchmarks import (
    __main__,
    ablation,
    cases,
    drift,
    models,
    peers,
    published_bounds,
    report,
    tightness,
    timing,
    weights,
    work,
)
from benchmarks.memory import left_behind, peak_extra
from benchmarks.rows import Row, Setup
from benchmarks.timing import WARM_UP, Spread, Times, interleaved


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--quick", "--record", "--results", str(folder), "--json", str(folder / "a/b.js")]
    assert __main__.main(arguments) == 0
    return folder


@pytest.fixture
def data(recorded: Path) -> dict[str, Any]:
    (path,) = recorded.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(
    ("case", "against", "reach"),
    [
        ("read + backward, 16x16x3x3", "torch's parametrization", 2.5),
        ("read + backward, 8x8", "torch's parametrization", 1.3),
        ("iteration, num_svs=8", "its two products alone", 0.85),
        ("iteration, num_svs=8", "sequential Gram-Schmidt", None),
        ("training step", "added by torch's", 1 / 3),
        ("update='step', 4 passes", "added by torch's", 1 / 5),
        ("eval, baked", "unconverted", 1.02),
        ("eval, cached", "unconverted", 1.03),
        ("peak extra memory", "torch's parametrization", None),
        ("peak memory of a training step", "added by torch's", 1 / 3),
        ("memory held after a step, tiny", "the weights", 0.01),
        ("converting", "float64 svdvals of each", 4),
        ("worst drift in 10 steps, sigma='rayleigh-ritz', num_svs=2", "exact norm", 1e-3),
        ("time of a step, sigma='rayleigh-ritz', num_svs=4", "the same, sigma='power'", None),
    ],
)
def test_every_case_is_in_the_results_as_a_ratio(
    recorded: Path, data: dict[str, Any], case: str, against: str, reach: float | None
) -> None:
    found = [r for r in data["rows"] if r["case"].startswith(case)]
    row = next(r for r in found if r["against"].startswith(against))
    assert row["reach"] == reach
    assert len(row["medians"]) >= 2
    assert all(median > 0 for median in row["medians"].values())
    (table,) = recorded.glob("*.md")
    assert row["case"] in table.read_text()


def test_the_targets_are_the_promised_ones() -> None:
    large = [(256, 256, 3, 3), (512, 512, 3, 3), (4096, 1024), (50257, 768)]
    small = {(64, 64): 1.3, (192, 192): 1.5}
    assert dict.fromkeys(large, 2.5) | small == cases.LAYERS
    assert cases.MATRICES == [(4096, 1024), (2048, 512)]
    assert list(cases.ADDED) == list(models.NETWORKS)
    assert {reach for name, reach in cases.ADDED.items() if "ViT" not in name} == {1 / 3}
    assert cases.ADDED["ViT, 6 x 384"] == 0.4
    assert cases.ADDED_STEPWISE == 1 / 5
    inputs = {name: network.input_shape for name, network in models.NETWORKS.items()}
    assert inputs["ResNet-18"] == inputs["ResNet-50"] == (8, 3, 64, 64)
    assert inputs["ViT, 6 x 384"] == (4, 3, 64, 64)
    assert any(name.startswith("GPT-2") for name in inputs)


@pytest.mark.parametrize(("name", "size"), [("ResNet-18", 11_689_512), ("ResNet-50", 25_557_032)])
def test_residual_networks_have_as_many_parameters_as_torchvision_s(name: str, size: int) -> None:
    with torch.device("meta"):
        network = models.NETWORKS[name].make()
        assert sum(parameter.numel() for parameter in network.parameters()) == size
        assert network(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_results_say_how_they_were_made_and_nothing_of_where(
    recorded: Path, data: dict[str, Any]
) -> None:
    assert data["command"] == "python -m benchmarks --quick --record"
    assert data["machine"]["torch"] == torch.__version__
    assert data["machine"]["rounds"] == "1"
    for path in recorded.glob("*.*"):
        if path.suffix in (".md", ".json"):
            text = path.read_text()
            assert "python -m benchmarks --quick --record" in text
            assert str(Path.home()) not in text
            assert str(recorded) not in text
    assert json.loads((recorded / "a/b.js").read_text()) == data


@pytest.mark.parametrize(
    "arguments",
    [
        ["--record", "--only", "layers"],
        ["--ablate", "--only", "layers"],
        ["--tightness", "--only", "layers"],
        ["--tightness", "--ablate"],
        ["--record", "--quick"],
        ["--rounds", "0"],
        ["--only", "nothing"],
        pytest.param(
            ["--device", "cuda"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
    ],
)
def test_what_would_spoil_results_is_refused_before_measuring(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        __main__.main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("recorded_names", "said"),
    [
        (["cpu-a-2-threads"], "results exist for cpu-a-2-threads; on no CUDA device yet"),
        (["cuda-b", "cuda-b-ablation", "cuda-b-tightness"], "results exist for cuda-b "),
        ([], "results exist for none; on no CUDA device yet"),
    ],
)
def test_help_says_on_which_devices_results_exist(
    recorded_names: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in recorded_names:
        (tmp_path / f"{name}.json").touch()
    monkeypatch.setattr(__main__, "RESULTS", tmp_path)
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ablation")
    arguments = ["--quick", "--ablate", "--record", "--results", str(folder)]
    assert __main__.main(arguments) == 0
    (table,) = folder.glob("*-ablation.md")
    (path,) = folder.glob("*-ablation.json")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["command"] == "python -m benchmarks --ablate --quick --record"
    assert all(row["case"] in table.read_text() for row in found["rows"])
    return found


@pytest.mark.parametrize("speed_up", ablation.SPEED_UPS, ids=lambda each: each.name)
def test_every_speed_up_is_measured_on_and_off(
    ablated: dict[str, Any], speed_up: ablation.SpeedUp
) -> None:
    rows = [row for row in ablated["rows"] if row["case"].startswith(f"{speed_up.name}: ")]
    assert rows
    for row in rows:
        assert row["medians"].keys() == {"on", "off"}
        assert row["ratio"] == pytest.approx(row["medians"]["off"] / row["medians"]["on"])


@pytest.mark.parametrize("speed_up", ablation.SPEED_UPS, ids=lambda each: each.name)
def test_what_turns_a_speed_up_off_is_there_and_is_put_back(speed_up: ablation.SpeedUp) -> None:
    off = speed_up.off()
    assert off
    before = [getattr(module, name) for module, name, _ in off]

    def run() -> None:
        assert [getattr(module, name) for module, name, _ in off] == [new for *_, new in off]
        raise KeyError

    assert all(old is not new for old, (*_, new) in zip(before, off, strict=True))
    with pytest.raises(KeyError):
        ablation.under(off, run)()
    assert [getattr(module, name) for module, name, _ in off] == before


class EverySpeedUp(nn.Module):
    """Weights on which each speed-up is at work: blocks, equal small ones, many vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(2048, 1024)
        self.blocks = nn.Linear(1024, 64)
        self.small = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        self.one = nn.Linear(64, 320)
        self.converged = nn.Linear(320, 400)
        self.converged.weight.data.add_(0.05)  # which is far above all others, and found at once
        snparam.register_sn(self.wide, num_svs=8, init="random")
        snparam.register_sn(self.blocks, num_svs=2, blocks=4, init="random")
        snparam.convert_model(self.small, update="step", init="random")
        snparam.register_sn(self.one, init="random")
        snparam.register_sn(self.converged)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.small(torch.tanh(self.blocks(torch.tanh(self.wide(x)))))
        out: torch.Tensor = self.converged(self.one(x))
        return out


def trained_state() -> dict[str, torch.Tensor]:
    model = EverySpeedUp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.ones(2, 2048)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.fixture(scope="module")
def with_every_speed_up() -> dict[str, torch.Tensor]:
    return trained_state()


@pytest.mark.parametrize("speed_up", ablation.SPEED_UPS, ids=lambda each: each.name)
def test_turning_a_speed_up_off_changes_numbers_by_rounding_alone(
    speed_up: ablation.SpeedUp, with_every_speed_up: dict[str, torch.Tensor]
) -> None:
    found: list[dict[str, torch.Tensor]] = []
    ablation.under(speed_up.off(), lambda: found.append(trained_state()))()
    for name, expected in with_every_speed_up.items():
        torch.testing.assert_close(
            found[0][name], expected, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_second_value_of_a_drifting_matrix_overtakes_the_first() -> None:
    found = [torch.linalg.svdvals(m.double()) for m in drift.overtaking(16, 12, 11, "cpu")]
    expected = [max(1.0, 0.8 + 0.04 * step) for step in range(11)]
    assert [float(values[0]) for values in found] == pytest.approx(expected, abs=1e-6)
    assert float(found[0][1]) == pytest.approx(0.8, abs=1e-6)
    assert float(found[-1][1]) == pytest.approx(1.0, abs=1e-6)


def test_drift_is_that_of_the_weight_in_use() -> None:
    """A matrix that grows by a tenth at once, and whose new vector is found in no step."""
    before, after = torch.diag(torch.tensor([1.0, 0.5])), torch.diag(torch.tensor([1.0, 1.1]))
    assert drift.worst_drift([before], "power", 1) == pytest.approx(0, abs=1e-6)
    assert drift.worst_drift([before, after], "power", 1) == pytest.approx(0.1, rel=1e-4)
    assert drift.worst_drift([before, after], "rayleigh-ritz", 2) == pytest.approx(0, abs=1e-6)


def test_contenders_alternate_and_take_turns_at_being_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)
    calls: list[str] = []
    runs: dict[str, Callable[[], None]] = {n: (lambda n=n: calls.append(n)) for n in "abc"}
    times = interleaved(runs, rounds=3, device="cpu")
    warm = 3 * WARM_UP + 3  # and one call of each to choose the number of repeats
    assert calls[warm:] == list("abcbcacab")
    assert {name: len(found) for name, found in times.rounds.items()} == dict.fromkeys("abc", 3)


def test_short_work_is_repeated_equally_often_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * 1e-3)
    calls = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1

    interleaved({"a": lambda: count("a"), "b": lambda: count("b")}, 2, "cpu", warm_up=0)
    assert calls == {"a": 1 + 2 * 5, "b": 1 + 2 * 5}  # a sample of one call is 1 ms, wanted are 5


def test_no_round_begins_after_the_time_that_a_row_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    times = interleaved({"a": lambda: None}, 100, "cpu", warm_up=0, most_seconds=10)
    assert 1 < len(times.rounds["a"]) <= 6
    (alone,) = interleaved({"a": lambda: None}, 100, "cpu", most_seconds=0).rounds.values()
    assert len(alone) == 1


def test_ratios_are_of_the_same_round() -> None:
    times = Times({"plain": [1, 10, 5], "a": [3, 14, 8], "b": [5, 18, 11]})
    low, middle, high = sorted([5 / 3, 18 / 14, 11 / 8])
    expected = Spread(middle, (low + middle) / 2, (middle + high) / 2)
    assert times.ratio("b", "a") == pytest.approx(expected)
    assert times.ratio_of_added("a", "b", "plain") == pytest.approx((3 / 6, 2.5 / 6, 3.5 / 6))
    assert math.isnan(times.ratio_of_added("a", "plain", "b").median)


@pytest.mark.parametrize(
    ("ratio", "reach", "faster", "verdict"),
    [
        (3.1, 3.0, True, "met"),
        (2.9, 3.0, True, "short"),
        (0.3, 1 / 3, False, "met"),
        (0.4, 1 / 3, False, "short"),
        (math.nan, 1 / 3, False, "unclear"),
        (2.0, None, True, ""),
    ],
)
def test_verdicts(ratio: float, reach: float | None, faster: bool, verdict: str) -> None:
    row = Row("case", "other", Spread(ratio, ratio, ratio), reach, faster, {})
    assert row.verdict == verdict


@pytest.mark.parametrize("num_svs", [1, 4])
def test_the_sequential_peer_gives_the_same_weight_and_gradient(num_svs: int) -> None:
    source = nn.Linear(7, 9, dtype=torch.float64)
    ours: Any = peers.ours(num_svs)(source)
    other: Any = peers.sequential(num_svs)(source)
    grad = torch.randn(9, 7, dtype=torch.float64)
    ours.parametrizations.weight[0].u.copy_(other.parametrizations.weight[0].u[None])
    for _ in range(5):
        a, b = ours.weight, other.weight
        torch.testing.assert_close(a, b)
        (into_a,) = torch.autograd.grad(a, ours.parametrizations.weight.original, grad)
        (into_b,) = torch.autograd.grad(b, other.parametrizations.weight.original, grad)
        torch.testing.assert_close(into_a, into_b)
        torch.testing.assert_close(
            ours.parametrizations.weight[0].u[0], other.parametrizations.weight[0].u
        )
        torch.testing.assert_close(
            ours.parametrizations.weight[0].sv[0], other.parametrizations.weight[0].sv
        )


def test_iterations_that_differ_are_noticed() -> None:
    source = nn.Linear(7, 9)
    block, vectors = peers.ours(2)(source), peers.sequential(2)(source)
    assert peers.check_same_numbers(block, vectors).sv < 1e-5
    with torch.no_grad():
        vectors.parametrizations["weight"].original.mul_(1.01)  # type: ignore[index]
    with pytest.raises(AssertionError, match="the two iterations differ"):
        peers.check_same_numbers(block, vectors)


def test_peers_normalise_every_layer() -> None:
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Embedding(5, 6), nn.Linear(4, 5))
    for convert in (peers.torch_parametrization, peers.sequential(1), peers.ours()):
        for layer in peers.layers(convert(source)):
            for _ in range(200):
                weight = layer.weight
            norm = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
            torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "convert", [peers.ours(), peers.torch_parametrization, peers.sequential(1)]
)
def test_reading_and_going_backward_moves_every_peer_and_leaves_no_gradient(
    convert: peers.Convert,
) -> None:
    layer = convert(nn.Linear(6, 5, bias=False))
    (u,) = [b for name, b in layer.named_buffers() if name.endswith(("u", "_u"))]
    u.copy_(torch.nn.functional.normalize(torch.ones_like(u), dim=-1))
    before = u.clone()
    (parameter,) = layer.parameters()
    gradients: list[torch.Tensor] = []
    parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    run = work.read_and_backward(layer, torch.randn(5, 6))
    run()
    run()
    assert not torch.equal(u, before)
    assert [bool(gradient.any()) for gradient in gradients] == [True, True]
    assert parameter.grad is None


@pytest.mark.parametrize(
    ("processor", "slug"),
    [
        ("Intel(R) Xeon(R) Processor", "intel-xeon"),
        ("AMD EPYC", "amd-epyc"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "intel-core-i7-9750h-2-60ghz"),
        ("", "unknown"),
    ],
)
def test_results_are_filed_by_kind_of_machine(
    processor: str, slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_processor_name", lambda: processor)
    setup = Setup("cpu", rounds=1, quick=True)
    assert report.kind(setup) == f"cpu-{slug}-{torch.get_num_threads()}-threads"


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def run() -> None:
        a = torch.empty(1000, dtype=torch.float64)
        del a
        b = torch.empty(1000, dtype=torch.float64)
        c = torch.empty(500, dtype=torch.float64)
        del b, c

    assert 12_000 <= peak_extra(run, "cpu") < 12_600


def test_what_a_call_leaves_behind_is_what_it_returns() -> None:
    def make() -> object:
        passing, cycle = torch.empty(3000, dtype=torch.float64), [torch.empty(2000)]
        cycle.append(cycle)  # type: ignore[arg-type]
        return torch.empty(1000, dtype=passing.dtype)

    assert 8_000 <= left_behind(make, "cpu") < 8_600


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tightness")
    arguments = ["--quick", "--tightness", "--record", "--results", str(folder)]
    with pytest.MonkeyPatch.context() as patch:  # which takes half a minute off
        for module in (tightness, timing):
            patch.setattr(module, "SHORTEST_SAMPLE", 1e-6)
        assert __main__.main(arguments) == 0
    (page,), (path,), (picture,) = (folder.glob(f"*-tightness.{end}") for end in MADE)
    assert f"]({picture.name})" in page.read_text()
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["command"] == "python -m benchmarks --tightness --quick --record"
    for text in (page.read_text(), path.read_text()):
        assert str(folder) not in text
    assert all(point["family"] in page.read_text() for point in found["points"])
    return found


MADE = ("md", "json", "png")
KINDS = ("Gaussian", "heavy-tailed", "low rank", "trained")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ('sigma="power"', {"1 step", "10 steps"}),
        ('sigma="rayleigh-ritz"', {"1 step", "10 steps"}),
        ("start of a conversion", {""}),
        ('sigma="exact"', {""}),
        ("certified bound", {"", "tightness 1.05", "tightness 1.01"}),
        ("σ of the reshaped weight", {""}),
        ('norm="operator", start', {""}),
        ("four reshapings (Singla, Feizi 2021)", {""}),
    ],
)
def test_each_method_is_measured_on_each_kind_of_weight(
    measured: dict[str, Any], kind: str, family: str, settings: set[str]
) -> None:
    own = [p for p in measured["points"] if (p["weights"], p["family"]) == (kind, family)]
    assert {point["setting"] for point in own} == settings
    assert all(point["cost"]["median"] > 0 for point in own)


def test_what_is_called_an_estimate_exact_or_a_bound_is_so(measured: dict[str, Any]) -> None:
    """Up to the rounding of float32, in which the estimators compute, and others' bounds too."""
    checked = set()
    for point in measured["points"]:
        kind, ratio = point["kind"], point["tightness"]
        checked.add(kind)
        if kind == tightness.BOUND:
            is_certified = point["family"].startswith("certified bound")
            assert ratio >= (1 if is_certified else 1 - 1e-6), point
        elif kind == tightness.ESTIMATE:
            assert ratio <= 1 + 1e-6, point
        elif kind == tightness.EXACT:
            assert ratio == pytest.approx(1, abs=1e-6), point
        if point["setting"].startswith("tightness "):
            assert ratio <= float(point["setting"].split()[1]), point
    assert checked == {"estimate", "exact", "bound", "no promise"}


def test_a_table_says_which_peers_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tightness, "missing_peers", lambda: ["orthogonium"])
    text = tightness.table([])
    assert "orthogonium: not installed" in text
    assert "deel-torchlip" not in text


def test_costs_are_of_one_call_however_often_it_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    def lasting(seconds: float) -> Callable[[], float]:
        def run() -> float:
            now[0] += seconds
            return 3.0

        return run

    monkeypatch.setattr(tightness.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tightness, "_gram_product", lambda weight: lasting(0.002))
    methods = [
        tightness.Method(str(seconds), "", "matrix", tightness.BOUND, lasting(seconds))
        for seconds in (1e-5, 0.001, 0.02)
    ]
    setup = Setup("cpu", rounds=3, quick=True)
    found = list(tightness._measured(setup, "ones", torch.ones(2, 3), {"matrix": 2.0}, methods))
    assert [point.cost.median for point in found] == pytest.approx([0.005, 0.5, 10])
    assert [point.seconds for point in found] == pytest.approx([1e-5, 0.001, 0.02])
    assert {point.tightness for point in found} == {1.5}


def test_the_supremum_of_a_symbol_is_found_between_the_points_of_a_grid() -> None:
    """|1 + a e^{iω} + b e^{2iω}|² is largest at cos ω = −a (1 + b) / 4b where b is negative."""
    a, b = 1.0, -0.5
    kernel = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    kernel[0, 0, 1] = torch.tensor([1.0, a, b])
    expected = math.sqrt((1 - b) ** 2 + a**2 - a**2 * (1 + b) ** 2 / (4 * b))
    assert tightness.supremum(kernel) == pytest.approx(expected, rel=1e-12)
    assert tightness.supremum(kernel.mT) == pytest.approx(expected, rel=1e-12)
    assert tightness.supremum(torch.ones(1, 1, 3, 3)) == pytest.approx(9, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (1, 5)])
def test_gram_iteration_comes_down_to_the_norm(shape: tuple[int, int], scale: float) -> None:
    matrices = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)).double() * scale
    norm = float(torch.linalg.svdvals(matrices).max())
    found = [published_bounds.gram_iteration(matrices, steps) / norm for steps in (0, 1, 3, 30)]
    assert all(ratio >= 1 - 1e-12 for ratio in found)
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (4, 2, 3, 3), (3, 3, 5, 5), (2, 2, 1, 1)])
def test_published_bounds_are_bounds_of_the_convolution(shape: tuple[int, ...]) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        kernel = torch.randn(shape, dtype=torch.float64, generator=generator)
        norm = tightness.supremum(kernel, grid=16)
        found = {
            "reshapings": published_bounds.four_reshapings(kernel),
            "frequencies": published_bounds.gram_iteration_on_frequencies(kernel, 5, 16),
            "kernels": published_bounds.gram_iteration_on_kernels(kernel, 2),
        }
        assert all(bound >= norm * (1 - 1e-9) for bound in found.values()), found
        # With slack for 16 points, and for at most √(taps) that the reshapings may lose.
        slack = 1 / (1 - (shape[-1] - 1) / 16)
        assert found["frequencies"] <= 1.05 * slack * norm
        assert found["reshapings"] <= shape[-1] * norm * (1 + 1e-9)
        deeper = published_bounds.gram_iteration_on_kernels(kernel, 3)
        assert norm * (1 - 1e-9) <= deeper <= found["kernels"] * (1 + 1e-9)


def test_the_kinds_of_weights_have_the_spectra_that_they_are_for() -> None:
    shape = (40, 60)
    values = {
        kind: torch.linalg.svdvals(draw(*shape))
        for kind, draw in [
            ("flat", weights.gaussian), ("heavy", weights.heavy_tailed), ("low", weights.low_rank)
        ]
    }  # fmt: skip
    gaps = {kind: float(found[1] / found[0]) for kind, found in values.items()}
    assert gaps["heavy"] < 0.8 < gaps["flat"]
    assert int((values["low"] > 1e-4 * values["low"][0]).sum()) == weights.RANK


# README's rows, in order: what is measured, and how many decimals are quoted.
QUOTED = [
    ("read + backward, 4096x1024", "torch's parametrization", 1),
    ("read + backward, 50257x768", "torch's parametrization", 1),
    ("read + backward, 256x256x3x3", "torch's parametrization", 1),
    ("read + backward, 64x64", "torch's parametrization", 1),
    ("iteration, num_svs=8, 4096x1024", "sequential Gram-Schmidt", 1),
    ("iteration, num_svs=8, 2048x512", "sequential Gram-Schmidt", 1),
    ("training step, GPT-2 blocks, 4 x 768", "added by torch's", 2),
    ("training step, ResNet-50", "added by torch's", 2),
    ("training step, ViT, 6 x 384", "added by torch's", 2),
    ("update='step', 4 passes, ResNet-50", "added by torch's", 2),
    ("update='step', 4 passes, ViT, 6 x 384", "added by torch's", 2),
    ("eval, cached, ResNet-50", "unconverted", 2),
    ("peak extra memory, 4096x4096", "torch's parametrization", 2),
    ("peak memory of a training step, GPT-2 blocks, 4 x 768", "added by torch's", 3),
    ("converting ResNet-50", "float64 svdvals of each", 1),
]
ROOT = Path(__file__).parents[1]
PROCESSOR = "cpu-amd-epyc-2-threads"


def test_readme_quotes_what_was_recorded() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Cost\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    quoted = [cells[-1] for cells in lines[2:]]
    recorded = json.loads((__main__.RESULTS / f"{PROCESSOR}.json").read_text(encoding="utf-8"))
    ratios = {(row["case"], row["against"]): row["ratio"] for row in recorded["rows"]}
    expected = [f"{ratios[case, against]:.{digits}f}" for case, against, digits in QUOTED]
    assert quoted == expected
