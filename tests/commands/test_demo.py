"""The demo's contract, in a reduced run: what it prints, writes, checks, and leaves alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from snparam.commands import demo
from snparam.commands.cli import main

# Ends the process at the first use of the network, so that nothing can catch it and go on.
WITHOUT_NETWORK = """
import os, runpy, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os.write(2, f"network use: {event} {arguments}".encode())
        os._exit(97)

sys.addaudithook(refuse)
"""


def python(code: str, *arguments: str, cwd) -> subprocess.CompletedProcess:
    # A hub setting of the caller must not be what keeps the demo off the network.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """``python -m snparam demo``, two epochs, in an empty directory and without a network."""
    directory = tmp_path_factory.mktemp("demo")
    code = WITHOUT_NETWORK + "runpy.run_module('snparam', run_name='__main__', alter_sys=True)"
    return python(code, "demo", "--epochs", "2", cwd=directory), directory


def test_it_succeeds_without_a_network(finished):
    done, _ = finished
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_guard_against_the_network_works(tmp_path):
    code = "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)"
    assert python(WITHOUT_NETWORK + code, cwd=tmp_path).returncode == 97


def test_it_writes_two_pictures_that_are_not_blank(finished):
    _, directory = finished
    pictures = sorted((directory / "snparam-demo").iterdir())
    assert [picture.name for picture in pictures] == ["confusion.png", "singular_values.png"]
    for picture in pictures:
        pixels = torch.from_numpy(imread(picture))[..., :3].reshape(-1, 3)
        assert len(pixels) > 400 * 400
        colours = (pixels * 255).int() @ torch.tensor([1 << 16, 1 << 8, 1], dtype=torch.int32)
        assert len(colours.unique()) > 50
        assert 0.01 < (pixels.mean(1) < 0.9).double().mean() < 0.9


def test_it_prints_the_plan_the_values_before_and_after_and_the_accuracy(finished):
    done, _ = finished
    plan, before, after = (
        done.stdout.index(heading)
        for heading in ("Plan", "right after the conversion", "after training\n")
    )
    name = "vit.layers.2.mlp.fc2"
    assert plan < done.stdout.index(name, plan) < before < done.stdout.index(name, before) < after
    assert name in done.stdout[after:]
    assert "classifier" in done.stdout[plan:before]  # left alone, and the plan says so
    assert re.search(r"Test accuracy: \d+\.\d% of 450 images", done.stdout)


def test_every_check_is_printed_with_its_measurement_and_passes(finished):
    done, _ = finished
    checks = re.findall(r"^ {2}(ok|FAILED) +(.+): (.+)$", done.stdout, flags=re.MULTILINE)
    assert len(checks) == 6
    assert {verdict for verdict, _, _ in checks} == {"ok"}


def test_it_shows_its_progress_on_stderr(finished):
    done, _ = finished
    assert "training: 100%" in done.stderr
    assert "loss=" in done.stderr
    assert "training:" not in done.stdout


@pytest.fixture
def without_drawing(monkeypatch):
    """Files in the place of pictures, which take longer than the training of a reduced run."""
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).touch()
    )


@pytest.mark.usefixtures("without_drawing")
def test_quiet_shows_neither_tables_nor_progress(tmp_path, capsys):
    assert main(["demo", "--epochs", "1", "--out", str(tmp_path / "a" / "b"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "Plan" not in captured.out
    assert "Checks" in captured.out
    assert captured.err == ""
    assert len(list((tmp_path / "a" / "b").iterdir())) == 2


@pytest.mark.usefixtures("without_drawing")
def test_runs_repeat_and_leave_the_global_state_alone(tmp_path):
    torch.manual_seed(1234)  # not the state that a run would leave, were it to leave one
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = demo.run(tmp_path, epochs=1, quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = demo.run(tmp_path, epochs=1, quiet=True)
    assert (first.checks, first.accuracy) == (second.checks, second.accuracy)
    assert demo.run(tmp_path, epochs=1, seed=1, quiet=True).checks != first.checks


def not_restored(model, bake=True):
    return model


def restored_without_the_norm(model, bake=True):
    return demo_restore(model, bake=False)


def restored_with_a_key_too_many(model, bake=True):
    demo_restore(model, bake=bake).register_buffer("u", torch.zeros(1))
    return model


demo_restore = demo.restore_model


@pytest.mark.usefixtures("without_drawing")
@pytest.mark.parametrize(
    ("sabotage", "claims"),
    [
        (not_restored, ["classes and state_dict keys", "fresh model"]),
        (restored_without_the_norm, ["restored model against converted"]),
        (restored_with_a_key_too_many, ["classes and state_dict keys"]),
    ],
)
def test_a_broken_restoration_fails_the_checks_it_breaks(monkeypatch, tmp_path, sabotage, claims):
    monkeypatch.setattr(demo, "restore_model", sabotage)
    result = demo.run(tmp_path, epochs=1, quiet=True)
    failed = [check.claim for check in result.checks if not check.passed]
    assert len(failed) == len(claims)
    assert all(any(claim in text for text in failed) for claim in claims)


@pytest.mark.usefixtures("without_drawing")
def test_a_broken_conversion_fails_its_check(monkeypatch, tmp_path):
    convert = demo.convert_model

    def cold(model, **options):
        """With an estimate that is far from converged."""
        return convert(model, init="random", **options)

    monkeypatch.setattr(demo, "convert_model", cold)
    result = demo.run(tmp_path, epochs=1, quiet=True)
    assert "after the conversion" in result.checks[0].claim
    assert not result.checks[0].passed


def test_a_missing_library_is_named_with_the_extra(monkeypatch, tmp_path):
    found = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name)
    )
    with pytest.raises(ImportError) as error:
        demo.run(tmp_path / "out")
    assert str(error.value) == "the demo needs scikit-learn: pip install 'snparam[demo]'"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_drawing")
def test_a_terminal_gets_a_drawn_table_with_every_name_in_full(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    demo.run(tmp_path, epochs=1)
    drawn = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(drawn) == 2 * 19  # before and after, a line for each converted weight
    assert sum("vit.embeddings.patch_embeddings.projection.weight" in line for line in drawn) == 2
