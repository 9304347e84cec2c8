# SPDX-License-Identifier: Apache-2.0
"""The head of RTMPose: one token a keypoint, a gated attention unit among them, a classification of each axis.

Modules are named as in the published checkpoints.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ScaleNorm(nn.Module):
    """x g / max(|x| / sqrt(d), 1e-5) over the last dimension, with one learned g. The gradient at zero is zero."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / norm.clamp(min=self.eps) * self.g


class Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return x * self.scale


class GatedAttention(nn.Module):
    """Gated attention unit over the keypoints, with squared ReLU in the place of a softmax.

        z = ScaleNorm(x), [u, v, b] = act(U z), q = b gamma_0 + beta_0, k = b gamma_1 + beta_1
        y = O( u * (A v) ),  A = ReLU( (q k^T + w) / sqrt(s) )^2;  y + c x where the widths agree

    Args:
        tokens: K.
        in_channels: of a token.
        out_channels: of an answer.
        expansion: e / in_channels.
        s: width of queries and keys.
        act: `SiLU` or `ReLU`.
        relative: learn a bias w[K - 1 + j - i] for each distance of keypoints.

    Reference: Hua et al., Transformer Quality in Linear Time, ICML 2022.
    """

    def __init__(
        self,
        tokens: int,
        in_channels: int,
        out_channels: int,
        *,
        expansion: float = 2.0,
        s: int = 128,
        act: Literal["SiLU", "ReLU"] = "SiLU",
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.s, self.e = s, int(in_channels * expansion)
        self.ln = ScaleNorm()
        self.uv = nn.Linear(in_channels, 2 * self.e + s, bias=False)
        self.gamma, self.beta = nn.Parameter(torch.rand(2, s)), nn.Parameter(torch.rand(2, s))
        self.o = nn.Linear(self.e, out_channels, bias=False)
        self.act = nn.SiLU() if act == "SiLU" else nn.ReLU()
        self.res_scale = Scale(in_channels) if in_channels == out_channels else None
        self.w = nn.Parameter(torch.rand(2 * tokens - 1)) if relative else None

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, K, out]` for `[B, K, in]`."""
        u, v, base = self.act(self.uv(self.ln(x))).split((self.e, self.e, self.s), dim=-1)
        q, k = base * self.gamma[0] + self.beta[0], base * self.gamma[1] + self.beta[1]
        scores = q @ k.mT
        if self.w is not None:
            place = torch.arange(x.shape[1], device=x.device)
            scores = scores + self.w[x.shape[1] - 1 + place[None] - place[:, None]]
        weights = F.relu(scores / self.s**0.5).square()
        out: Tensor = self.o(u * (weights @ v))
        return out if self.res_scale is None else self.res_scale(x) + out


@final
class RTMCC(nn.Module):
    """From the last map to logits of both axes.

    Args:
        in_channels: of the map.
        num_keypoints: K.
        map_size: (height, width) of the map.
        bins: (Wx, Wy), see :func:`tutelage.functional.simcc.bins`.
        hidden: width of a token.
        s: width of queries and keys.
        expansion: of the attention unit.
        kernel: of the convolution that makes a map for each keypoint.

    Reference: Jiang et al., RTMPose: Real-Time Multi-Person Pose Estimation based on MMPose, arXiv 2303.07399.
    """

    def __init__(
        self,
        in_channels: int,
        num_keypoints: int,
        map_size: tuple[int, int],
        bins: tuple[int, int],
        *,
        hidden: int = 256,
        s: int = 128,
        expansion: float = 2.0,
        kernel: int = 7,
    ) -> None:
        super().__init__()
        self.final_layer = nn.Conv2d(in_channels, num_keypoints, kernel, padding=kernel // 2)
        self.mlp = nn.Sequential(ScaleNorm(), nn.Linear(map_size[0] * map_size[1], hidden, bias=False))
        self.gau = GatedAttention(num_keypoints, hidden, hidden, expansion=expansion, s=s)
        self.cls_x = nn.Linear(hidden, bins[0], bias=False)
        self.cls_y = nn.Linear(hidden, bins[1], bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=1e-3 if isinstance(module, nn.Conv2d) else 1e-2)
        assert self.final_layer.bias is not None
        nn.init.zeros_(self.final_layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `[B, K, Wx]` and `[B, K, Wy]` for `[B, C, h, w]`."""
        tokens = self.gau(self.mlp(self.final_layer(x).flatten(2)))
        return self.cls_x(tokens), self.cls_y(tokens)
