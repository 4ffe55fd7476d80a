"""Error against density and time on the demo model's own q, k and v at 480p length.

Two seeds; layers and noise levels are spread over the model and the schedule. Our calls are whole ones:
planning, tail (at two thresholds also without it) and attention. The error is that of the output against
dense attention in the same type.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import torch
from fgattn import Settings, TokenLayout, build_plan, sparse_attention
from fgattn.demo.generate import schedule
from fgattn.demo.quantise import load_model
from fgattn.demo.scenes import conditioning
from fgattn.layout import geometry
from fgattn.settings import TILE_KEYS, TILE_QUERIES

from . import peers
from .measure import relative_error
from .runner import Case, Run
from .shapes import QKV

SIZE = (21, 60, 104)  # T, H, W of the latent
LAYOUT = TokenLayout((SIZE[0], SIZE[1] // 2, SIZE[2] // 2))  # 32 760 tokens
SEEDS, STEPS, BLOCKS = (1, 2), (5, 10, 15), (1, 4, 7)
REPEAT_HEADS = 4  # 3 heads to 12, as in a model of 1.3 B parameters
SETTINGS = [Settings(threshold=threshold) for threshold in (0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)]
SETTINGS += [Settings(threshold=threshold, tail=False) for threshold in (1.0, 2.0)]
SETTINGS += [Settings(threshold=2.0, tile_keys=1), Settings(threshold=2.0, tile_queries=64)]
SETTINGS += [
    Settings(tile_queries=m, tile_keys=n) for m in TILE_QUERIES for n in TILE_KEYS if (m, n) != (128, 16)
]
SOL_TAUS = (0.7, 1.0, 1.3, 1.7, 2.2)
WRONG = 0.5  # above this error something is broken
COMPILERS = 12  # processes


def cases(quick: bool) -> Iterator[Case]:
    """One case per (seed, step, block); the first one if quick."""
    compile_ahead()
    for seed in SEEDS[:1] if quick else SEEDS:
        for (step, block), qkv in recorded_calls(seed).items():
            yield Case(
                {"case": "demo model", "seed": seed, "step": step, "block": block, "L": LAYOUT.length},
                functools.partial(runs, qkv),
                repeats=3,
                warmup=1,
            )
            if quick:
                return


def runs(qkv: QKV) -> list[Run]:
    qkv = QKV(*(x.repeat(1, REPEAT_HEADS, 1, 1) for x in qkv))
    q, k, v = qkv
    heads = {"heads": q.shape[1]}
    yardstick = peers.cudnn(qkv)
    dense = yardstick.call()
    result = [yardstick]
    for s in SETTINGS:
        plan = build_plan(q, k, s, LAYOUT)
        result.append(
            Run(
                "fgattn" if s.tail else "fgattn, no tail",
                functools.partial(sparse_attention, q, k, v, s, LAYOUT),
                functools.partial(relative_error, expected=dense),
                WRONG,
                {
                    **heads,
                    "M": s.tile_queries,
                    "N": s.tile_keys,
                    "order": s.order,
                    "threshold": s.threshold,
                    "density": float(plan.density),
                    "executed_density": float(plan.executed_density),
                },
            )
        )
    cells = geometry(LAYOUT, "cells", LAYOUT.length, q.device).key_tokens
    for order, tokens in (("raster", None), ("cells", cells)):
        for tau in SOL_TAUS:
            run = peers.sol(qkv, tau, dense, tokens)
            run.columns.update(heads, order=order)
            result.append(run)
    return result


def compile_ahead() -> None:
    """Fill Triton's cache by several processes; one alone takes a minute."""
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, {(s.tile_queries, s.tile_keys, s.tail): s for s in SETTINGS}.values()))


def _compile(settings: Settings) -> None:
    layout = TokenLayout((4, 8, 16))
    q, k, v = torch.randn(3, 1, 1, layout.length, 128, device="cuda", dtype=torch.bfloat16).unbind()
    with contextlib.suppress(Exception):  # the case itself will show it
        sparse_attention(q, k, v, settings, layout)


class Recorder:
    """Stands in for an engine: runs dense and keeps the calls of some blocks."""

    def __init__(self):
        self.calls: list[QKV] = []

    def attention(self, q, k, v, *, layout, dense, block, scale=None):
        if block in BLOCKS:
            self.calls.append(QKV(q.clone(), k.clone(), v.clone()))
        return dense()


@torch.no_grad()
def recorded_calls(seed: int = 1) -> dict[tuple[int, int], QKV]:
    """(step, block) -> q, k, v [1, 3, 32760, 128] of a generation, bf16."""
    model = load_model().to("cuda", torch.bfloat16)
    noise = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(seed)).cuda()
    context = conditioning(seed).cuda().to(torch.bfloat16)
    sigmas, x = schedule(20), noise
    calls: dict[tuple[int, int], QKV] = {}
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        recorder = Recorder()
        time = torch.full((1,), 1000 * sigma, device="cuda")
        velocity = model(x.to(torch.bfloat16), time, context, recorder).float()
        if step in STEPS:
            calls |= {(step, b): call for b, call in zip(BLOCKS, recorder.calls, strict=True)}
        x = x + (following - sigma) * velocity
    return calls
