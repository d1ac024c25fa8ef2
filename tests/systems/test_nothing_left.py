"""What is done for other people's systems is in the class of a module, and goes with it."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import snparam
from snparam.parametrization.extensions import SYSTEMS
from snparam.testing import assert_same_function

BUILD = {
    "Linear": lambda: nn.Linear(5, 4),
    "Conv2d": lambda: nn.Conv2d(2, 4, 3),
    "Embedding": lambda: nn.Embedding(7, 4),
    "LSTM": lambda: nn.LSTM(3, 4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
}


def normalised_tensors(module):
    return [
        (owner, tensor)
        for owner in module.modules()
        if parametrize.is_parametrized(owner)
        for tensor in owner.parametrizations
    ]


def attributes(module):
    """What each module has of its own, and its tables of hooks, but for its parametrizations."""
    found = []
    for name, part in module.named_modules():
        if "parametrizations" not in name.split("."):
            tables = {k: dict(v) for k, v in vars(part).items() if k.endswith(("hooks", "_kwargs"))}
            found.append((name, sorted(vars(part)), tables))
    return found


@pytest.mark.parametrize("kind", BUILD)
def test_a_registered_module_has_what_one_under_torchs_own_has(kind):
    module = snparam.register_sn(BUILD[kind]())
    theirs = BUILD[kind]()
    for owner, tensor in normalised_tensors(module):
        (name,) = [name for name, part in module.named_modules() if part is owner]
        torch_parametrizations.spectral_norm(theirs.get_submodule(name), tensor)
    assert attributes(module) == attributes(theirs)


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("kind", BUILD)
def test_torchs_own_removal_leaves_an_ordinary_module(kind, leave):
    module, ordinary = snparam.register_sn(BUILD[kind]()), BUILD[kind]()
    before = {tensor: getattr(owner.eval(), tensor) for owner, tensor in normalised_tensors(module)}
    for owner, tensor in normalised_tensors(module):
        parametrize.remove_parametrizations(owner, tensor, leave_parametrized=leave)
        if leave:
            assert torch.equal(getattr(owner, tensor), before[tensor])
    assert [type(part) for part in module.modules()] == [type(part) for part in ordinary.modules()]
    assert attributes(module) == attributes(ordinary)
    assert set(module.state_dict()) == set(ordinary.state_dict())
    module.load_state_dict(ordinary.state_dict())
    assert b"snparam" not in pickle.dumps(module)


def test_what_torch_has_removed_is_loaded_where_snparam_is_not_installed(tmp_path):
    model = snparam.convert_model(nn.Sequential(nn.Linear(5, 4), nn.Conv2d(2, 3, 3)))
    for layer in model:
        parametrize.remove_parametrizations(layer, "weight")
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['snparam'] = None\n"
        "import torch; print(torch.load(sys.argv[1], weights_only=False))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == str(model)


def half(module, tensor):
    """Put somebody else's parametrization on a tensor."""

    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    parametrize.register_parametrization(module, tensor, Half())
    return module


def by_us(module):
    snparam.remove_sn(module, name="weight")


def by_torch(module):
    parametrize.remove_parametrizations(module, "weight")


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("remove", [by_us, by_torch])
def test_beside_somebody_elses_parametrization_the_module_is_theirs_again(first, remove):
    module = nn.Linear(5, 4)
    if first == "theirs":
        half(module, "bias")
    snparam.register_sn(module, name="weight")
    if first == "ours":
        half(module, "bias")
    remove(module)
    theirs = half(nn.Linear(5, 4), "bias")
    assert set(module.state_dict()) == set(theirs.state_dict())
    assert module.load_state_dict(theirs.state_dict()) == ([], [])
    assert_same_function(module, theirs, torch.randn(2, 5), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_orig"'):
        module.load_state_dict({**theirs.state_dict(), "weight_orig": torch.ones(4, 5)})
    with pytest.raises(RuntimeError, match=r"only supported through state_dict"):
        pickle.dumps(module)
    if remove is by_us:
        assert set(vars(type(module))) == set(vars(type(theirs)))


def test_one_of_two_copies_is_removed_and_the_other_stays_what_it_is():
    model = snparam.convert_model(nn.Sequential(nn.Linear(5, 4)))
    twin = copy.deepcopy(model)
    plain = nn.Sequential(nn.Linear(5, 4)).state_dict()
    snparam.remove_sn(twin[0])
    model.load_state_dict(plain)  # which torch alone would not take
    twin.load_state_dict(plain)
    with pytest.raises(RuntimeError, match="restore_model"):
        pickle.dumps(model)
    pickle.dumps(twin)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: type(system).__name__)
def test_a_system_may_be_told_of_a_module_again(system):
    """As where a second tensor of it is registered; one removal undoes all."""
    module = half(nn.Linear(5, 4), "bias")
    before = dict(vars(type(module)))
    for _ in range(3):
        system.on_attach(module)
    system.on_detach(module)
    system.on_detach(module)
    after = dict(vars(type(module)))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before if name != "__dict__")


def test_hooks_and_wrappers_around_a_state_dict_still_run():
    model = snparam.convert_model(nn.Sequential(nn.Linear(5, 4)))
    layer = model[0]
    layer.register_state_dict_post_hook(
        lambda _module, state, prefix, _metadata: state.update({f"{prefix}hooked": torch.ones(1)})
    )
    assert list(model.state_dict())[-1] == "0.hooked"
    destination = {}
    assert layer.state_dict(destination=destination, prefix="a.", keep_vars=True) is destination
    assert (
        destination["a.parametrizations.weight.original"] is layer.parametrizations.weight.original
    )
    with pytest.warns(FutureWarning, match="Positional args"):
        assert list(layer.state_dict({}, "a.")) == list(destination)
