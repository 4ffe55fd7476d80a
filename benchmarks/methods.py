"""Selection methods on the demo model's own q, k and v: output error against executed density.

Each method runs at its published block size and order and at 128 x 16 in cells, with and without the tail,
over a range of strengths; "threshold" is the project's own. 480p length on a GPU, a small grid on a CPU.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from fgattn import Settings, TokenLayout, attend, build_plan
from fgattn.demo.generate import schedule
from fgattn.demo.quantise import load_model
from fgattn.demo.scenes import conditioning
from torch.nn.functional import scaled_dot_product_attention

from .measure import milliseconds, relative_error

SIZE = {"cuda": (21, 60, 104), "cpu": (13, 32, 32)}  # T, H, W of the latent: 32 760 and 3 328 tokens
STEPS, BLOCKS = (5, 10, 15), (1, 4, 7)
FINE = (128, 16, "cells")
PUBLISHED = {"top_k": (64, 64, "raster"), "sol": (64, 64, "raster"), "hierarchical": (128, 128, "hilbert"),
             "radial": (128, 128, "raster")}
STRENGTHS = {"threshold": (0.7, 1.0, 1.5, 2.0), "top_k": (0.1, 0.2, 0.3, 0.4), "sol": (0.7, 1.0, 1.3, 1.7),
             "hierarchical": (0.1, 0.2, 0.3, 0.4), "radial": (0.1, 0.2, 0.5, 1.0)}


class Recorder:
    """Stands in for an engine: runs dense and keeps the calls of some blocks."""

    def __init__(self):
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def attention(self, q, k, v, *, layout, dense, block, scale=None):
        if block in BLOCKS:
            self.calls.append((q.clone(), k.clone(), v.clone()))
        return dense()


@torch.no_grad()
def recorded_calls(device: str, steps: tuple[int, ...]) -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
    """(step, block) -> q, k, v [1, 3, L, 128] of a noised reference scene; bf16 on a GPU, else fp32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_model().to(device, dtype)
    x = torch.randn(1, 16, *SIZE[device], generator=torch.Generator().manual_seed(1)).to(device)
    context = conditioning(1).to(device, dtype)
    calls = {}
    for step, (sigma, following) in enumerate(pairwise(schedule(20)[: max(steps) + 2])):
        recorder = Recorder()
        time = torch.full((1,), 1000 * sigma, device=device)
        velocity = model(x.to(dtype), time, context, recorder).float()
        if step in steps:
            calls |= {(step, b): call for b, call in zip(BLOCKS, recorder.calls, strict=True)}
        x = x + (following - sigma) * velocity
    return calls


def cases(quick: bool):
    """(grain, settings) of every row."""
    for method, strengths in STRENGTHS.items():
        grains = {"128x16": FINE}
        if method in PUBLISHED:
            grains = {"published": PUBLISHED[method], **grains}
        for grain, (m, n, order) in grains.items():
            for strength in strengths[1::2] if quick else strengths:
                name = "threshold" if method == "threshold" else "method_parameter"
                yield grain, Settings(
                    tile_queries=m, tile_keys=n, order=order, method=method, **{name: strength})


def rows(quick: bool = False):
    """One row per (settings, step, block)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    t, h, w = SIZE[device]
    layout = TokenLayout((t, h // 2, w // 2))
    result = []
    for (step, block), (q, k, v) in recorded_calls(device, STEPS[1:2] if quick else STEPS).items():
        dense = scaled_dot_product_attention(q, k, v)
        for grain, settings in cases(quick):
            plan = build_plan(q, k, settings, layout)
            bare = replace(plan, tail=False)
            row = {
                "method": settings.method, "strength": settings.method_parameter or settings.threshold,
                "grain": grain, "M": settings.tile_queries, "N": settings.tile_keys, "order": settings.order,
                "step": step, "block": block, "L": layout.length, "heads": q.shape[1],
                "density": float(plan.density), "executed_density": float(plan.executed_density),
                "relative_error": relative_error(attend(q, k, v, plan), dense),
                "relative_error_without_tail": relative_error(attend(q, k, v, bare), dense)}
            if not row["relative_error"] < 1:
                raise SystemExit(f"step {step}, block {block}, {settings}: error {row['relative_error']:.2e}")
            if device == "cuda":
                row["plan_ms"] = milliseconds(
                    lambda q=q, k=k, s=settings: build_plan(q, k, s, layout), repeats=5)[0]["ms"]
            result.append(row)
    return result
