"""register_sn and remove_sn: one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snparam

Blocks = Callable[[Tensor], list[Tensor]]


def rows(count: int = 1) -> Blocks:
    """The matrices of a weight whose rows are axis 0, by plain slicing."""
    return lambda w: [part.reshape(len(part), -1) for part in w.chunk(count)]


def channels(groups: int, blocks: int) -> Blocks:
    """The matrices of a transposed convolution, output channel by output channel."""

    def split(w: Tensor) -> list[Tensor]:
        channel_rows = [
            part[:, channel].reshape(-1)
            for part in w.chunk(groups)
            for channel in range(w.shape[1])
        ]
        return list(torch.stack(channel_rows).chunk(blocks))

    return split


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Blocks], dict[str, Blocks]]] = {
    # name: (module, weights read by default, weights read with blocks="auto")
    "linear": (lambda: nn.Linear(5, 4), {"weight": rows()}, {"weight": rows()}),
    "bilinear": (lambda: nn.Bilinear(3, 2, 4), {"weight": rows()}, {"weight": rows()}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), {"weight": rows()}, {"weight": rows()}),
    "conv2d groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        {"weight": rows()},
        {"weight": rows(2)},
    ),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), {"weight": rows()}, {"weight": rows()}),
    "transposed1d": (
        lambda: nn.ConvTranspose1d(4, 6, 3),
        {"weight": channels(1, 1)},
        {"weight": channels(1, 1)},
    ),
    "transposed2d groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        {"weight": channels(2, 1)},
        {"weight": channels(2, 2)},
    ),
    "transposed3d": (
        lambda: nn.ConvTranspose3d(4, 2, 2),
        {"weight": channels(1, 1)},
        {"weight": channels(1, 1)},
    ),
    "embedding": (lambda: nn.Embedding(9, 4), {"weight": rows()}, {"weight": rows()}),
    "bag": (lambda: nn.EmbeddingBag(9, 4), {"weight": rows()}, {"weight": rows()}),
    "attention": (
        lambda: nn.MultiheadAttention(6, 2),
        {"in_proj_weight": rows(), "out_proj.weight": rows()},
        {"in_proj_weight": rows(3), "out_proj.weight": rows()},
    ),
    "attention of other widths": (
        lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=3),
        {
            f"{p}.weight" if p == "out_proj" else f"{p}_proj_weight": rows()
            for p in ("q", "k", "v", "out_proj")
        },
        {
            f"{p}.weight" if p == "out_proj" else f"{p}_proj_weight": rows()
            for p in ("q", "k", "v", "out_proj")
        },
    ),
    "rnn": (
        lambda: nn.RNN(3, 4, 2),
        {f"weight_{a}_l{i}": rows() for a in ("ih", "hh") for i in (0, 1)},
        {f"weight_{a}_l{i}": rows() for a in ("ih", "hh") for i in (0, 1)},
    ),
    "lstm": (
        lambda: nn.LSTM(3, 4, bidirectional=True, proj_size=2),
        {f"weight_{a}_l0{d}": rows() for a in ("ih", "hh", "hr") for d in ("", "_reverse")},
        {
            f"weight_{a}_l0{d}": rows(1 if a == "hr" else 4)
            for a in ("ih", "hh", "hr")
            for d in ("", "_reverse")
        },
    ),
    "gru": (
        lambda: nn.GRU(3, 4),
        {"weight_ih_l0": rows(), "weight_hh_l0": rows()},
        {"weight_ih_l0": rows(3), "weight_hh_l0": rows(3)},
    ),
    "rnn cell": (
        lambda: nn.RNNCell(3, 4),
        {"weight_ih": rows(), "weight_hh": rows()},
        {"weight_ih": rows(), "weight_hh": rows()},
    ),
    "lstm cell": (
        lambda: nn.LSTMCell(3, 4),
        {"weight_ih": rows(), "weight_hh": rows()},
        {"weight_ih": rows(4), "weight_hh": rows(4)},
    ),
    "gru cell": (
        lambda: nn.GRUCell(3, 4),
        {"weight_ih": rows(), "weight_hh": rows()},
        {"weight_ih": rows(3), "weight_hh": rows(3)},
    ),
}


def get(module: nn.Module, path: str) -> Tensor:
    for part in path.split("."):
        module = getattr(module, part)
    return module  # type: ignore[return-value]


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("subclass", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_weight_of_every_layer_type_has_norm_one_matrix_by_matrix(
    kind: str, subclass: bool, auto: bool
) -> None:
    make, default, natural = LAYERS[kind]
    module = make()
    if subclass:
        module.__class__ = type("Mine", (type(module),), {})
    originals = {path: get(module, path).detach().clone() for path in default}
    module.eval()
    snparam.register_sn(module, blocks="auto" if auto else None)
    expected = natural if auto else default
    assert set(snparam.singular_values(module)) == set(expected)
    for path, split in expected.items():
        used = get(module, path).detach()
        assert used.shape == originals[path].shape
        for before, after in zip(split(originals[path]), split(used), strict=True):
            sigma = torch.linalg.matrix_norm(before.double(), 2)
            torch.testing.assert_close(
                after.double(), before.double() / sigma, rtol=1e-5, atol=1e-7
            )


INPUTS: dict[str, Callable[[nn.Module], Any]] = {
    "linear": lambda m: m(torch.ones(2, 5)),
    "bilinear": lambda m: m(torch.ones(2, 3), torch.ones(2, 2)),
    "conv1d": lambda m: m(torch.ones(1, 4, 5)),
    "conv2d groups": lambda m: m(torch.ones(1, 4, 5, 5)),
    "conv3d": lambda m: m(torch.ones(1, 2, 3, 3, 3)),
    "transposed1d": lambda m: m(torch.ones(1, 4, 5)),
    "transposed2d groups": lambda m: m(torch.ones(1, 4, 5, 5)),
    "transposed3d": lambda m: m(torch.ones(1, 4, 3, 3, 3)),
    "embedding": lambda m: m(torch.arange(3)),
    "bag": lambda m: m(torch.arange(3)[None]),
    "attention": lambda m: m(*[torch.ones(2, 1, 6)] * 3)[0],
    "attention of other widths": lambda m: m(
        torch.ones(2, 1, 6), torch.ones(2, 1, 4), torch.ones(2, 1, 3)
    )[0],
    "rnn": lambda m: m(torch.ones(2, 1, 3))[0],
    "lstm": lambda m: m(torch.ones(2, 1, 3))[0],
    "gru": lambda m: m(torch.ones(2, 1, 3))[0],
    "rnn cell": lambda m: m(torch.ones(1, 3)),
    "lstm cell": lambda m: m(torch.ones(1, 3))[0],
    "gru cell": lambda m: m(torch.ones(1, 3)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_uses_the_normalised_weights_and_gradients_reach_the_originals(
    kind: str, training: bool
) -> None:
    module = LAYERS[kind][0]().train(training)
    snparam.register_sn(module)
    before = INPUTS[kind](module)
    before.sum().backward()
    originals = [
        list_.original
        for part in module.modules()
        for list_ in getattr(part, "parametrizations", {}).values()
    ]
    assert all(
        original.grad is not None and original.grad.isfinite().all() for original in originals
    )
    with torch.no_grad():
        for original in originals:
            original.mul_(10)
    torch.testing.assert_close(INPUTS[kind](module), before, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bake", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_removing_leaves_an_ordinary_module(kind: str, bake: bool) -> None:
    module = LAYERS[kind][0]().eval()
    types = [type(part) for part in module.modules()]
    parameters = dict(module.named_parameters())
    values = {name: value.detach().clone() for name, value in parameters.items()}
    keys = list(module.state_dict())
    snparam.register_sn(module)
    module.train()
    INPUTS[kind](module)
    module.eval()
    output = INPUTS[kind](module)
    used = {name: get(module, name).detach().clone() for name in snparam.singular_values(module)}
    module.train()  # removal must not take another step
    assert snparam.remove_sn(module, bake=bake) is module
    module.eval()
    assert [type(part) for part in module.modules()] == types
    assert list(module.state_dict()) == keys
    assert list(dict(module.named_parameters())) == list(parameters)
    for name, parameter in module.named_parameters():
        assert parameter is parameters[name]
        expected = used.get(name, values[name]) if bake else values[name]
        assert torch.equal(parameter, expected)
    assert not list(module.buffers())
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._forward_hooks_always_called
        assert not part._load_state_dict_post_hooks
    if bake:
        assert torch.equal(INPUTS[kind](module), output)


class Experts(nn.Module):
    """A stack of experts in one tensor, and other things that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, 5, 3))
        self.bias = nn.Parameter(torch.zeros(5))
        self.register_buffer("codes", torch.zeros(3, 3, dtype=torch.int64))
        self.register_buffer("table", torch.randn(3, 4))


def test_a_stack_of_experts_is_read_expert_by_expert() -> None:
    module = Experts()
    before = module.stack.detach().clone()
    snparam.register_sn(module, name="stack", blocks=4)
    for expert, used in zip(before, module.stack, strict=True):
        torch.testing.assert_close(used, expert / torch.linalg.matrix_norm(expert, 2))


def test_a_bare_tensor_is_one_matrix_with_axis_0_as_rows_by_default() -> None:
    module = Experts()
    snparam.register_sn(module, name="stack")
    norm = torch.linalg.matrix_norm(module.stack.detach().flatten(1), 2)
    torch.testing.assert_close(norm, torch.tensor(1.0))


def test_a_buffer_can_be_registered_and_stays_a_buffer() -> None:
    module = Experts()
    before = module.table
    snparam.register_sn(module, name="table")
    torch.testing.assert_close(torch.linalg.matrix_norm(module.table, 2), torch.tensor(1.0))
    snparam.remove_sn(module, name="table", bake=False)
    assert module._buffers["table"] is before


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("bake", [True, False])
def test_a_buffer_is_afterwards_saved_or_not_as_it_was_before(persistent: bool, bake: bool) -> None:
    module = Experts()
    module.register_buffer("table", torch.randn(3, 4), persistent=persistent)
    module.register_buffer("more", torch.zeros(2))
    keys, buffers = list(module.state_dict()), list(dict(module.named_buffers()))
    snparam.register_sn(module, name="table")
    original = "parametrizations.table.original"
    assert (original in module.state_dict()) == persistent
    assert list(snparam.plain_state_dict(module)) == keys
    module.load_state_dict(module.state_dict())
    snparam.remove_sn(module, name="table", bake=bake)
    assert list(module.state_dict()) == keys
    assert list(dict(module.named_buffers())) == buffers


def registered() -> nn.Module:
    return snparam.register_sn(nn.Linear(3, 4))


def with_(module: nn.Module, name: str, value: float) -> nn.Module:
    with torch.no_grad():
        getattr(module, name)[0, 0] = value
    return module


def hooked() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(3, 4))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "unknown name": (
        lambda: nn.Linear(3, 4),
        {"name": "wight"},
        ValueError,
        r"Linear.*'wight'.*\['weight'\]",
    ),
    "one dimension": (
        lambda: nn.Linear(3, 4),
        {"name": "bias"},
        ValueError,
        r"'bias' of Linear \(4,\).*dimension",
    ),
    "integers": (
        Experts,
        {"name": "codes"},
        TypeError,
        r"'codes' of Experts \(3, 3\).*int64.*float32",
    ),
    "twice": (registered, {}, ValueError, r"'weight' of .*Linear.*already.*remove_sn"),
    "lazy": (lambda: nn.LazyLinear(3), {}, ValueError, r"LazyLinear.*lazy.*forward"),
    "quantised": (
        lambda: torch.ao.nn.quantized.Linear(3, 4),
        {},
        TypeError,
        "quantised.*before quantising",
    ),
    "hook": (hooked, {}, ValueError, r"Linear"),
    "not in the table": (Experts, {}, ValueError, r"Experts.*name=.*'stack'"),
    "container": (
        lambda: nn.Sequential(nn.Linear(3, 4)),
        {},
        ValueError,
        "Sequential.*convert_model",
    ),
    "no weight": (nn.ReLU, {}, ValueError, "ReLU has no weight"),
    "meta": (lambda: nn.Linear(3, 4, device="meta"), {}, ValueError, r"\(4, 3\).*meta.*load"),
    "empty": (lambda: nn.Linear(3, 0), {}, ValueError, r"\(0, 3\).*no entries"),
    "nan": (lambda: with_(nn.Linear(3, 4), "weight", torch.nan), {}, ValueError, r"\(4, 3\).*NaN"),
    "inf": (
        lambda: with_(nn.Linear(3, 4), "weight", torch.inf),
        {},
        ValueError,
        r"\(4, 3\).*NaN or inf",
    ),
    "too many": (
        lambda: nn.Linear(3, 4),
        {"num_svs": 4},
        ValueError,
        r"'weight' of Linear \(4, 3\): num_svs=4 exceeds min\(rows, columns\)=3; pass num_svs <= 3",
    ),
    "blocks": (lambda: nn.Linear(3, 4), {"blocks": 3}, ValueError, r"\(4, 3\): 4 rows.*blocks=3"),
    "max_norm": (lambda: nn.Embedding(3, 4, max_norm=1.0), {}, ValueError, r"\(3, 4\).*max_norm"),
    "sparse": (lambda: nn.Embedding(3, 4, sparse=True), {}, ValueError, r"\(3, 4\).*sparse=True"),
    "float8": (lambda: nn.Linear(3, 4).to(torch.float8_e4m3fn), {}, TypeError, r"\(4, 3\).*float8"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::FutureWarning:torch.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_registered_is_refused_before_anything_changes(case: str) -> None:
    make, options, error, message = REFUSED[case]
    module = make()
    before = (type(module), set(module.__dict__), list(module.state_dict()))
    with pytest.raises(error, match=message):
        snparam.register_sn(module, **options)
    assert (type(module), set(module.__dict__), list(module.state_dict())) == before


def test_a_sparse_layout_is_refused() -> None:
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.eye(4, 3).to_sparse())
    with pytest.raises(TypeError, match=r"sparse.*dense"):
        snparam.register_sn(module)


def test_one_bad_weight_of_several_leaves_the_module_as_it_was() -> None:
    module = nn.LSTM(3, 4)
    with_(module, "weight_hh_l0", torch.nan)
    with pytest.raises(ValueError, match="'weight_hh_l0' of LSTM"):
        snparam.register_sn(module)
    assert type(module) is nn.LSTM
    assert "weight_ih_l0" in module._parameters


def test_removing_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Linear.*restore_model"):
        snparam.remove_sn(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="'bias' not registered"):
        snparam.remove_sn(registered(), name="bias")


@pytest.mark.parametrize(("given", "option"), [("weight", "name"), (False, "bake")])
def test_what_is_passed_by_position_is_answered_with_its_option(given: Any, option: str) -> None:
    layer = registered()
    with pytest.raises(TypeError, match=f"remove_sn: {given!r}.*pass it as {option}={given!r}"):
        snparam.remove_sn(layer, given)
    snparam.remove_sn(layer, **{option: given})
    assert type(layer) is nn.Linear


def test_one_of_several_weights_can_be_removed() -> None:
    module = snparam.register_sn(nn.GRU(3, 4))
    snparam.remove_sn(module, name="weight_ih_l0")
    assert set(snparam.singular_values(module)) == {"weight_hh_l0"}
    module(torch.ones(2, 1, 3))
    snparam.remove_sn(module)
    assert type(module) is nn.GRU


def test_random_start_is_the_classic_cold_one_and_uses_the_global_generator() -> None:
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        module = snparam.register_sn(nn.Linear(30, 40), 3, init="random")
        starts.append(module.parametrizations.weight[0].u)
    a, b, c = starts
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    torch.testing.assert_close(a[0] @ a[0].T, torch.eye(3))


def test_converged_start_is_deterministic_and_leaves_the_generator_alone() -> None:
    weight = torch.randn(30, 40)
    state = torch.random.get_rng_state()
    starts = []
    for _ in range(2):
        module = nn.Linear(40, 30)
        module.weight = nn.Parameter(weight.clone())
        torch.random.set_rng_state(state)
        starts.append(snparam.register_sn(module, 3).parametrizations.weight[0].u)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(*starts)
