"""Selection methods on the demo model's own q, k and v at 480p length: error against density and time.

Each method runs at its published block size and order and at 128 x 16 in cells, over a range of strengths,
with our tail; "threshold" is the project's own, and the only one that plans with kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from fgattn import Settings, build_plan, sparse_attention

from . import peers
from .measure import relative_error
from .quality import LAYOUT, WRONG, recorded_calls
from .runner import Case, Run
from .shapes import QKV

SEED = 2
FINE = (128, 16, "cells")
PUBLISHED = {
    "top_k": (64, 64, "raster"),
    "sol": (64, 64, "raster"),
    "hierarchical": (128, 128, "hilbert"),
    "radial": (128, 128, "raster"),
}
STRENGTHS = {
    "threshold": (0.7, 1.0, 1.5, 2.0),
    "top_k": (0.1, 0.2, 0.3, 0.4),
    "sol": (0.7, 1.0, 1.3, 1.7),
    "hierarchical": (0.1, 0.2, 0.3, 0.4),
    "radial": (0.1, 0.2, 0.5, 1.0),
}


def cases(quick: bool) -> Iterator[Case]:
    """One case per (step, block)."""
    for number, ((step, block), qkv) in enumerate(recorded_calls(SEED).items()):
        if not quick or number == 4:
            yield Case(
                {"case": "methods", "seed": SEED, "step": step, "block": block, "L": LAYOUT.length},
                functools.partial(runs, qkv, quick),
                repeats=3,
                warmup=1,
            )


def runs(qkv: QKV, quick: bool) -> list[Run]:
    yardstick = peers.cudnn(qkv)
    dense = yardstick.call()
    result = [yardstick]
    for method, strengths in STRENGTHS.items():
        for grain in dict.fromkeys((PUBLISHED.get(method, FINE), FINE)):
            for strength in strengths[1::2] if quick else strengths:
                result.append(run(qkv, dense, method, strength, grain))
    return result


def run(qkv: QKV, dense: torch.Tensor, method: str, strength: float, grain: tuple[int, int, str]) -> Run:
    """One method at one strength; `grain` is M, N and the order."""
    m, n, order = grain
    name = "threshold" if method == "threshold" else "method_parameter"
    given: dict[str, Any] = {name: strength}
    settings = Settings(tile_queries=m, tile_keys=n, order=order, method=method, **given)
    plan = build_plan(qkv.q, qkv.k, settings, LAYOUT)
    return Run(
        method,
        functools.partial(sparse_attention, *qkv, settings, LAYOUT),
        functools.partial(relative_error, expected=dense),
        WRONG,
        {
            "M": m,
            "N": n,
            "order": order,
            "strength": strength,
            "density": float(plan.density),
            "executed_density": float(plan.executed_density),
        },
    )
