"""The layers of BigGAN as users have them, with their state dict: `weight`, `u0`, `sv0`, ...

Written from the paper's description (Brock, Donahue and Simonyan 2019, appendix B), one step as in
`reference.step`. Nothing is shared with the library.
"""

import torch
from torch import nn
from torch.nn import functional as F

from helpers.reference import step


class SN:
    """Spectral normalisation as a base class beside a layer's own; dimension 0 counts the rows."""

    def prepare(self, num_svs: int, num_itrs: int = 1) -> None:
        self.num_svs, self.num_itrs = num_svs, num_itrs
        for i in range(num_svs):
            self.register_buffer(f"u{i}", torch.randn(1, self.weight.shape[0]))
            self.register_buffer(f"sv{i}", torch.ones(1))

    def normalised(self) -> torch.Tensor:
        W = self.weight.flatten(1)
        u = torch.cat([getattr(self, f"u{i}") for i in range(self.num_svs)])
        for _ in range(self.num_itrs if self.training else 1):
            u, v, sv = step(W, u)
        if self.training:
            for i in range(self.num_svs):
                getattr(self, f"u{i}").copy_(u[i : i + 1])
                getattr(self, f"sv{i}").copy_(sv[i : i + 1])
        return self.weight / (u[0] @ W @ v[0])


class SNLinear(nn.Linear, SN):
    def forward(self, x):
        return F.linear(x, self.normalised(), self.bias)


class SNConv2d(nn.Conv2d, SN):
    def forward(self, x):
        return self._conv_forward(x, self.normalised(), self.bias)


class SNEmbedding(nn.Embedding, SN):
    def forward(self, x):
        return F.embedding(x, self.normalised())


OF = {nn.Linear: SNLinear, nn.Conv2d: SNConv2d, nn.Embedding: SNEmbedding}


def classic(layer: nn.Module, num_svs: int) -> nn.Module:
    """A layer as one of BigGAN's: the same parameters, random u."""
    layer.__class__ = OF[type(layer)]
    layer.prepare(num_svs)
    return layer
