"""A small Wan 2.1 text-to-video transformer, with the upstream parameter names.

Its self-attention goes through an FG-Attn `Engine`, which decides call by call between dense and
sparse; outside a run, `Engine.attention` is dense.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..layout import TokenLayout
from ..runs.engine import Engine

HEAD_DIM = 128
CHANNELS = 16  # of a latent
TIME_DIM = 256  # sinusoidal features of the noise level
LAYERS = 8


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


class Attention(nn.Module):
    """Projections of one attention layer."""

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def project(self, x: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [B, L_q, dim], source [B, L_k, dim] -> q, k, v [B, H, L, 128]."""
        projected = self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)
        return tuple(y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for y in projected)

    def merge(self, heads: torch.Tensor) -> torch.Tensor:
        """[B, H, L, 128] -> [B, L, dim]."""
        return self.o(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.self_attn = Attention(dim)
        self.norm3 = nn.LayerNorm(dim, 1e-6)
        self.cross_attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU("tanh"), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x, time, text, rotation, self_attention):
        """x [B, L, dim], time [B, 6, dim], text [B, n, dim]; self_attention(q, k, v) -> like q."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, 1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.self_attn.project(y, y)
        y = self_attention(rotate(q, *rotation), rotate(k, *rotation), v)
        x = x + self.self_attn.merge(y) * gate1
        q, k, v = self.cross_attn.project(self.norm3(x), text)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.cross_attn.merge(y)
        return x + self.ffn(self.norm2(x) * (1 + scale2) + shift2) * gate2


class Head(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.modulation + time[:, None]).chunk(2, 1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class VideoTransformer(nn.Module):
    """Predicts the velocity (noise - video) of a noisy latent video."""

    def __init__(self, dim: int = 384, ffn: int = 1536, layers: int = LAYERS, text_dim: int = 4096):
        super().__init__()
        self.patch_embedding = nn.Conv3d(CHANNELS, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(TIME_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(dim, ffn) for _ in range(layers))
        self.head = Head(dim, CHANNELS * 4)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor, engine: Engine
    ) -> torch.Tensor:
        """The velocity, shaped like x.

        Args:
            x: [B, 16, T, H, W], H and W even.
            time: [B], 1000 x noise level.
            context: [B, n, 4096], the conditioning tokens.
            engine: runs the self-attention of every block.
        """
        frames, height, width = x.shape[2:]
        grid = (frames, height // 2, width // 2)
        layout, rotation = TokenLayout(grid), rotary(grid, x.device)
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        time = self.time_embedding(sinusoids(time).to(x.dtype))
        per_block = self.time_projection(time).unflatten(1, (6, -1))
        text = self.text_embedding(context)
        for i, block in enumerate(self.blocks):

            def self_attention(q, k, v, i=i):
                return engine.attention(
                    q,
                    k,
                    v,
                    layout=layout,
                    block=i,
                    dense=lambda: functional.scaled_dot_product_attention(q, k, v),
                )

            tokens = block(tokens, per_block, text, rotation, self_attention)
        patches = self.head(tokens, time).unflatten(1, grid).unflatten(-1, (2, 2, CHANNELS))
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)


def sinusoids(time: torch.Tensor) -> torch.Tensor:
    """time [B] -> fp32 [B, 256]."""
    half = TIME_DIM // 2
    angle = time.float()[:, None] * 10000.0 ** -(torch.arange(half, device=time.device) / half)
    return torch.cat((angle.cos(), angle.sin()), 1)


def rotary(grid: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [T*H*W, 64], of the 3-D rotary embedding: 22 pairs for t, 21 each for h, w."""
    third = HEAD_DIM // 6
    pairs = (HEAD_DIM // 2 - 2 * third, third, third)
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angle = torch.cat(
        [
            place.reshape(-1, 1) * 10000.0 ** -(torch.arange(n, dtype=torch.float64) / n)
            for place, n in zip(places, pairs, strict=True)
        ],
        1,
    )
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, H, L, 128] with each pair of neighbouring channels turned by its token's angles."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
