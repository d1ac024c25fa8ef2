"""The benchmark command: it runs, covers every case, alternates, and compares like with like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__, peers
from benchmarks.memory import peak_extra
from benchmarks.timing import WARM_UP, interleaved


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--quick", "--rounds", "4", "--record", "--results", str(folder)]
    assert __main__.main(arguments) == 0
    return folder


def test_every_case_is_in_the_results_as_a_ratio(recorded: Path) -> None:
    (data,) = recorded.glob("*.json")
    cases = [row["case"] for row in json.loads(data.read_text())["rows"]]
    for part in (
        "read + backward",
        "num_svs=8",
        "training step",
        "update='step', 4 passes",
        "eval, baked",
        "eval, cached",
        "training after restore",
        "peak extra memory",
        "converting",
    ):
        assert any(part in case for case in cases), part
    (table,) = recorded.glob("*.md")
    text = table.read_text()
    assert all(case in text for case in cases)
    assert "torch: " + torch.__version__ in text
    assert "python -m benchmarks --record" in text
    assert str(Path.home()) not in text


def test_the_picture_is_not_blank(recorded: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="draws with matplotlib, extra `plot`")
    (path,) = recorded.glob("*.png")
    assert image.imread(path).std() > 0.05


def test_contenders_alternate_and_take_turns_at_being_first() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleaved(runs, rounds=3, device="cpu")
    assert calls[3 * WARM_UP :] == list("abcbcacab")
    assert {name: len(found) for name, found in times.rounds.items()} == dict.fromkeys("abc", 3)


@pytest.mark.parametrize("num_svs", [1, 4])
def test_the_sequential_peer_gives_the_same_weight_and_gradient(num_svs: int) -> None:
    source = nn.Linear(7, 9, dtype=torch.float64)
    ours = peers.ours(num_svs)(source)
    other = peers.sequential(num_svs)(source)
    grad = torch.randn(9, 7, dtype=torch.float64)
    ours.parametrizations.weight[0].u.copy_(other.parametrizations.weight[0].u[None])
    for _ in range(5):
        a, b = ours.weight, other.weight
        torch.testing.assert_close(a, b)
        (into_a,) = torch.autograd.grad(a, ours.parametrizations.weight.original, grad)
        (into_b,) = torch.autograd.grad(b, other.parametrizations.weight.original, grad)
        torch.testing.assert_close(into_a, into_b)


def test_peers_normalise_every_layer() -> None:
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Embedding(5, 6), nn.Linear(4, 5))
    for convert in (peers.torch_parametrization, peers.sequential(1), peers.ours()):
        for layer in peers.layers(convert(source)):
            for _ in range(200):
                weight = layer.weight
            norm = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
            torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-2, atol=0)
    assert all(
        "weight_orig" in layer._parameters for layer in peers.layers(peers.torch_hook(source))
    )


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def run() -> None:
        a = torch.empty(1000, dtype=torch.float64)
        del a
        b = torch.empty(1000, dtype=torch.float64)
        c = torch.empty(500, dtype=torch.float64)
        del b, c

    assert 12_000 <= peak_extra(run, "cpu") < 12_600
