"""Shapes that are measured, by name, and tensors for them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from fgattn import Settings, TokenLayout, build_plan


class Shape(NamedTuple):
    name: str
    grid: tuple[int, int, int]  # (T, H, W) in tokens
    heads: int

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid)

    @property
    def length(self) -> int:
        return self.layout.length


class QKV(NamedTuple):
    """Inputs of one attention call, [B, H, L, D] each."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


SMALL_480P = Shape("Wan 1.3B 480p 81f", (21, 30, 52), 12)
LARGE_480P = Shape("Wan 14B 480p 81f", (21, 30, 52), 40)
LARGE_720P = Shape("Wan 14B 720p 81f", (21, 45, 80), 40)


def random_qkv(shape: Shape, dim: int = 128) -> QKV:
    """[1, H, L, D] in bf16, contiguous, the same every time."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = (3, 1, shape.heads, shape.length, dim)
    return QKV(*torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16))


def for_density(q, k, settings: Settings, layout: TokenLayout, density: float) -> Settings:
    """The settings, with the threshold that keeps this share of scores on these tensors, to 0.002."""
    low, high = 0.0, 8.0  # everything, nearly nothing
    for _ in range(20):
        settings = replace(settings, threshold=(low + high) / 2)
        kept = float(build_plan(q, k, settings, layout).density)
        if abs(kept - density) < 0.002:
            break
        low, high = (settings.threshold, high) if kept > density else (low, settings.threshold)
    else:
        raise ValueError(f"no threshold gives density {density}; the last one gave {kept:.3f}")
    return settings
