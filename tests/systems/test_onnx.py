"""ONNX: what onnxruntime computes from an exported network is what it computes eagerly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import snparam


class Network(nn.Module):
    """A convolution, a transformer block and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(2, 4, 3)
        self.embed = nn.Linear(4, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.embed(self.patches(x).flatten(2).mT)))
        return out


def images(count: int) -> Tensor:
    return torch.linspace(-1, 1, count * 2 * 25).reshape(count, 2, 5, 5).sin()


# Of each weight; exporting takes ten times as long as everything else here.
OPTIONS: dict[str, dict[str, Any]] = {
    "patches": {"gain": "learned"},
    "embed": {"update": "step"},
    "block.self_attn": {"num_svs": 3, "blocks": "auto", "name": "in_proj_weight"},
    "block.self_attn.out_proj": {"soft": True, "coeff": 2.0},
    "block.linear2": {"num_svs": 2, "num_itrs": 2},
    "head": {},
}


# torch's own, in its exporter.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("bake", [False, True])
def test_onnxruntime_computes_what_eager_eval_computes(bake: bool, tmp_path: Path) -> None:
    # From a cold start, so that the step that eval takes is a large one.
    model = Network().eval()
    for name, options in OPTIONS.items():
        snparam.register_sn(model.get_submodule(name), init="random", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    expected = model(images(5)).detach()
    if bake:
        snparam.restore_model(model)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model, (images(2),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    program.save(tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "network.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {session.get_inputs()[0].name: images(5).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
