"""Layouts of other libraries against what their forwards compute: rows are outputs, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import transformers as hf
from transformers.pytorch_utils import Conv1D

import snparam
from snparam.layers.table import layouts_of


def views(module: nn.Module, blocks: Any = None) -> dict[str, Tensor]:
    """Weights by name, as stacks of matrices."""
    return {
        name: layout.view(value.shape, blocks).to_matrices(value).double()
        for name, layout in layouts_of(module).items()
        for value in [module.get_parameter(name).detach()]
    }


def test_conv1d_is_stored_input_first() -> None:
    layer = Conv1D(5, 3)
    nn.init.normal_(layer.weight)
    (matrix,) = views(layer)["weight"]
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), (x.double() @ matrix.T).float())


@pytest.mark.parametrize("cross", [False, True])
def test_gpt2s_fused_projections_are_split_as_its_attention_splits_them(cross: bool) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    attention = GPT2Attention(hf.GPT2Config(n_embd=8, n_head=2), cross, layer_idx=0)
    nn.init.normal_(attention.c_attn.weight)
    (row,) = [
        r for r in snparam.plan_conversion(attention, blocks="auto") if r.weight == "c_attn.weight"
    ]
    assert row.matrices == ((2, 8, 8) if cross else (3, 8, 8))
    snparam.convert_model(attention, blocks="auto", progress=False)
    parts = attention.c_attn.weight.detach().double().split(8, dim=1)
    for part in parts:
        assert float(torch.linalg.svdvals(part)[0]) == pytest.approx(1, abs=1e-3)


def gated(matrices: dict[str, Tensor], x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """What an expert computes, by its first matrices."""
    gate, up = (matrices["gate_up_proj"][0] @ x.T).chunk(2)
    return (matrices["down_proj"][0] @ (act(gate) * up)).T


EXPERTS: dict[str, Any] = {
    "mixtral.MixtralExperts": lambda: hf.MixtralConfig(
        hidden_size=6, intermediate_size=10, num_local_experts=3
    ),
    "qwen3_moe.Qwen3MoeExperts": lambda: hf.Qwen3MoeConfig(
        hidden_size=6, moe_intermediate_size=10, num_experts=3
    ),
    "aria.AriaExperts": lambda: hf.models.aria.AriaTextConfig(
        hidden_size=6, intermediate_size=10, moe_num_experts=3, num_attention_heads=2
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_stacks_whose_matrices_are_what_each_expert_multiplies_by(name: str) -> None:
    where, _, kind = name.partition(".")
    module = getattr(hf.models, where)
    cls = getattr(__import__(f"{module.__name__}.modeling_{where}", fromlist=[kind]), kind)
    config = EXPERTS[name]()
    config._experts_implementation = "eager"
    experts = cls(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 6)
    first = torch.zeros(4, 1, dtype=torch.int64)
    found = experts(x, first, torch.ones(4, 1))
    matrices = views(experts)
    assert {len(stack) for stack in matrices.values()} == {3}
    expected = gated(matrices, x.double(), nn.functional.silu)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    if name != "aria.AriaExperts":
        assert len(views(experts, "auto")["gate_up_proj"]) == 6  # gate and up, of each


def test_llama4s_experts_are_stored_input_first() -> None:
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    config = hf.Llama4TextConfig(hidden_size=6, intermediate_size=10, num_local_experts=3)
    experts = Llama4TextExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3 * 2, 6)
    expected = gated(views(experts), x[:2].double(), nn.functional.silu)
    torch.testing.assert_close(experts(x)[:2].double(), expected, rtol=1e-4, atol=1e-4)


def test_dbrx_stacks_its_experts_in_the_rows() -> None:
    from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU

    config = hf.DbrxConfig(
        d_model=6, ffn_config={"ffn_hidden_size": 10, "moe_num_experts": 3, "moe_top_k": 1}
    ).ffn_config
    config.hidden_size = 6
    glu = DbrxExpertGLU(config)
    for parameter in glu.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 6)
    w1, v1, w2 = (getattr(glu, name).view(3, 10, 6)[1] for name in ("w1", "v1", "w2"))
    m = {name: stack[1] for name, stack in views(glu).items()}
    hidden = glu.activation_fn(x.double() @ m["w1"].T) * (x.double() @ m["v1"].T)
    torch.testing.assert_close(
        glu(x, w1, v1, w2).double(), hidden @ m["w2"].T, rtol=1e-4, atol=1e-4
    )


def test_every_parameter_of_three_dimensions_called_experts_is_known() -> None:
    """All of transformers' classes named Experts: by pattern, or by name if they do not say how."""
    import inspect
    import re
    from pathlib import Path

    from snparam.layers.libraries.transformers import TYPES
    from snparam.layers.rows import qualified_class_name

    models = Path(inspect.getfile(hf)).parent / "models"
    seen = 0
    for file in models.glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        for match in re.finditer(r"(@use_experts_implementation.*\n)?class (\w+Experts)\(nn", text):
            says, kind = match[1], match[2]
            body = text[match.end() :].split("\nclass ")[0]
            if not re.search(r"\.(gate_up_proj|down_proj|up_proj) = nn\.Parameter\(", body):
                continue
            cls = type(kind, (nn.Module,), {"__module__": _module(file)})
            row = next(row for row in TYPES if row.is_for(cls))
            assert says or row.obstacle is None, qualified_class_name(cls)
            seen += 1
    assert seen > 50


def _module(file: Any) -> str:
    return f"transformers.models.{file.parent.name}.{file.stem}"


def test_timms_standardised_convolutions_are_left_alone_and_its_mixed_ones_are_stacks() -> None:
    pytest.importorskip("timm")
    from timm.layers import CondConv2d, ScaledStdConv2d, StdConv2d

    for kind in (StdConv2d, ScaledStdConv2d):
        layer = kind(4, 6, 3)
        rows = {row.tensor: row for row in snparam.plan_conversion(layer)}
        assert "standardises the weight anew" in rows["weight"].reason
        assert all(row.decision == "skip" for row in rows.values())
    layer = CondConv2d(4, 6, 3, groups=2, num_experts=5, bias=True)
    rows = {row.tensor: row for row in snparam.plan_conversion(layer)}
    assert rows["weight"].matrices == (5, 6, 18)
    assert rows["bias"].decision == "skip"
    x = torch.randn(1, 4, 5, 5)
    routing = torch.eye(5)[2:3]
    kernel = views(layer)["weight"][2].float().reshape(6, 2, 3, 3)
    expected = nn.functional.conv2d(x, kernel, layer.bias[2], padding=1, groups=2)
    torch.testing.assert_close(layer(x, routing), expected)
    (row,) = [r for r in snparam.plan_conversion(layer, blocks="auto") if r.tensor == "weight"]
    assert row.matrices == (10, 3, 18)


def test_timms_attention_is_split_into_q_k_and_v() -> None:
    pytest.importorskip("timm")
    from timm.layers import Attention

    attention = Attention(8, num_heads=2)
    rows = {r.weight: r for r in snparam.plan_conversion(attention, blocks="auto")}
    assert rows["qkv.weight"].matrices == (3, 8, 8)
    assert rows["proj.weight"].matrices == (1, 8, 8)


def test_other_layers_are_read_by_what_their_forward_multiplies() -> None:
    from transformers.models.convbert.modeling_convbert import GroupedLinearLayer
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    grouped = GroupedLinearLayer(6, 8, 2)
    for parameter in grouped.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 1, 6)
    matrices = torch.block_diag(*views(grouped)["weight"])
    expected = x[:, 0].double() @ matrices.T + grouped.bias.double()
    torch.testing.assert_close(grouped(x)[:, 0].double(), expected, rtol=1e-4, atol=1e-4)

    parallel = JetMoeParallelExperts(3, 4, 5)
    nn.init.normal_(parallel.weight)
    x = torch.randn(3, 4)
    stack = views(parallel)["weight"]
    expected = torch.einsum("eoi,ei->eo", stack, x.double())
    torch.testing.assert_close(parallel(x, [1, 1, 1]).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_converted_experts_module_is_still_known_by_its_name() -> None:
    """torch puts a class of its own in front of the module's."""
    layer = Conv1D(5, 3)
    snparam.register_sn(layer)
    assert type(layer) is not Conv1D
    assert [layout.kind for layout in layouts_of(layer).values()] == ["columns"]
