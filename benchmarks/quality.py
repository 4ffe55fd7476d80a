"""Error against density and time on the demo model's own q, k and v at 480p length.

Layers and noise levels are spread over the model and the schedule. Our calls are whole ones: planning, tail
and attention. The error is that of the output against dense attention in the same type.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise

import torch
from fgattn import Settings, TokenLayout, build_plan, sparse_attention
from fgattn.demo.generate import schedule
from fgattn.demo.quantise import load_model
from fgattn.demo.scenes import conditioning
from fgattn.order import geometry

from . import peers
from .measure import relative_error
from .runner import Case, Run

SIZE = (21, 60, 104)  # T, H, W of the latent
LAYOUT = TokenLayout((SIZE[0], SIZE[1] // 2, SIZE[2] // 2))  # 32 760 tokens
STEPS, BLOCKS = (5, 10, 15), (1, 4, 7)
REPEAT_HEADS = 4  # 3 heads to 12, as in a model of 1.3 B parameters
SETTINGS = [(128, 16, threshold) for threshold in (0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)]
SETTINGS += [(128, 1, 1.0), (128, 1, 2.0), (64, 16, 1.0), (64, 16, 2.0)]
SOL_TAUS = (0.7, 1.0, 1.3, 1.7, 2.2)
WRONG = 0.5  # above this error something is broken


def cases(quick: bool) -> Iterator[Case]:
    """One case per (step, block)."""
    settings = [Settings(t, m, n) for m, n, t in (SETTINGS[1:4:2] if quick else SETTINGS)]
    taus = SOL_TAUS[1:2] if quick else SOL_TAUS
    for (step, block), qkv in recorded_calls().items():
        yield Case({"case": "demo model", "step": step, "block": block, "L": LAYOUT.length},
                   functools.partial(runs, qkv, settings, taus), repeats=5)


def runs(qkv, settings: list[Settings], taus) -> list[Run]:
    q, k, v = (x.repeat(1, REPEAT_HEADS, 1, 1) for x in qkv)
    heads = {"heads": q.shape[1]}
    yardstick = peers.cudnn(q, k, v)
    dense = yardstick.call()
    result = [yardstick]
    for s in settings:
        plan = build_plan(q, k, s, LAYOUT)
        result.append(Run(
            "fgattn", functools.partial(sparse_attention, q, k, v, s, LAYOUT),
            functools.partial(relative_error, expected=dense), WRONG,
            {**heads, "M": s.tile_queries, "N": s.tile_keys, "order": s.order, "threshold": s.threshold,
             "density": float(plan.density), "executed_density": float(plan.executed_density)}))
    cells = geometry(LAYOUT, "cells", LAYOUT.length, q.device).key_tokens
    for order, tokens in (("raster", None), ("cells", cells)):
        for tau in taus:
            run = peers.sol(q, k, v, tau, dense, tokens)
            run.columns.update(heads, order=order)
            result.append(run)
    return result


class Recorder:
    """Stands in for an engine: runs dense and keeps the calls of some blocks."""

    def __init__(self):
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def attention(self, q, k, v, *, layout, dense, block, scale=None):
        if block in BLOCKS:
            self.calls.append((q.clone(), k.clone(), v.clone()))
        return dense()


@torch.no_grad()
def recorded_calls() -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
    """(step, block) -> q, k, v [1, 3, 32760, 128] of a generation from seed 1, bf16."""
    model = load_model().to("cuda", torch.bfloat16)
    noise = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(1)).cuda()
    context = conditioning(1).cuda().to(torch.bfloat16)
    sigmas, x, calls = schedule(20), noise, {}
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        recorder = Recorder()
        time = torch.full((1,), 1000 * sigma, device="cuda")
        velocity = model(x.to(torch.bfloat16), time, context, recorder).float()
        if step in STEPS:
            calls |= {(step, b): call for b, call in zip(BLOCKS, recorder.calls, strict=True)}
        x = x + (following - sigma) * velocity
    return calls
