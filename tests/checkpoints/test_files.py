"""Files: what is written reads right, and what is broken changes nothing."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers.spelled import SPELLINGS
from torch import nn

import snparam
from snparam.testing import assert_same_function


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("num_svs", [1, 2])
def test_through_files_of_both_kinds(spelling, num_svs, tmp_path):
    model = snparam.convert_model(network(), num_svs)
    state = snparam.state_dict_for(model, spelling)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    for loaded in (
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
        torch.load(tmp_path / "model.pt", weights_only=True),
    ):
        other = snparam.convert_model(network(), num_svs)
        other.load_state_dict(loaded)
        assert_same_function(other, model, torch.randn(3, 4))


def test_a_plain_file_loads_into_the_ordinary_network(tmp_path):
    model = snparam.convert_model(network())
    safetensors.torch.save_file(snparam.plain_state_dict(model), tmp_path / "plain.safetensors")
    ordinary = network()
    safetensors.torch.load_model(ordinary, tmp_path / "plain.safetensors")
    assert_same_function(ordinary, model, torch.randn(3, 4), rtol=0, atol=0)


class Needy:
    """What a pickle must not bring to life."""


def test_a_pickle_that_would_need_more_is_refused():
    model = snparam.convert_model(network())
    before = copy.deepcopy(model.state_dict())
    buffer = io.BytesIO()
    torch.save({**model.state_dict(), "extra": Needy()}, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Needy"):
        model.load_state_dict(torch.load(buffer, weights_only=True))
    assert_unchanged(model, before)


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_truncated_file_is_an_error_and_changes_nothing(kept, kind, tmp_path):
    model = snparam.convert_model(network())
    path, before = tmp_path / f"model.{kind}", copy.deepcopy(model.state_dict())
    state = snparam.convert_model(network()).state_dict()
    if kind == "pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    load = {"pt": torch.load, "safetensors": safetensors.torch.load_file}[kind]
    errors = (RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError)
    with pytest.raises(errors):
        model.load_state_dict(load(path))
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_damaged_file_changes_nothing_or_the_numbers_of_what_it_has(kind, tmp_path):
    """One byte at a time. Neither format has a checksum of the numbers themselves."""
    path, state = tmp_path / f"model.{kind}", snparam.convert_model(network()).state_dict()
    save = {"pt": torch.save, "safetensors": safetensors.torch.save_file}[kind]
    load = {"pt": torch.load, "safetensors": safetensors.torch.load_file}[kind]
    save(state, path)
    whole = path.read_bytes()
    model = snparam.convert_model(network())
    errors = 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        reader = copy.deepcopy(model)
        try:
            reader.load_state_dict(load(path))
        except Exception:  # noqa: BLE001  torch's reader of pickles has many
            errors += 1
            assert_unchanged(reader, model.state_dict())
        else:
            shapes = {name: tensor.shape for name, tensor in reader.state_dict().items()}
            assert shapes == {name: tensor.shape for name, tensor in state.items()}
    assert errors > len(whole) / 5 / 4


DOCS = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_documentation_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block, {})
