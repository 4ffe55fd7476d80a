"""When a sparse call is faster than a dense one, from a few figures per kernel.

    dense  = 4 B H L_q L_k D / rate                                            ms on the GPU
    sparse = the longer of `host` and fixed + (planning + density / speed) * dense

`host` is what the host takes to queue a sparse call: a model cannot run faster than its calls are queued.
`python -m benchmarks breakeven` measures all of it; NOTES.md there has the fit, and a test holds the rule
against the results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..settings import Settings

TRIED = 0.15  # density that is assumed until the run knows: about what threshold 2 keeps


class Costs(NamedTuple):
    """Figures of one kernel and head size."""

    rate: float  # of dense attention, operations a ms
    fixed: float  # ms of a sparse call, however short
    planning: float  # planning and tail, share of dense
    speed: float  # of the attention kernel at density 1, dense is 1
    host: float = 0.95  # ms


HOPPER = {  # (head size, keys gathered one by one): H200 and its host's CPU
    (128, False): Costs(600e9, 0.15, 0.075, 1.07),
    (128, True): Costs(600e9, 0.16, 0.14, 0.96),
    (64, False): Costs(430e9, 0.14, 0.06, 1.03),
    (64, True): Costs(430e9, 0.16, 0.14, 0.96),  # as for 128: not measured
}
SMALL_TILES = 0.85  # speed of 64-row programs over 128-row ones
PORTABLE_SPEED = 0.55  # on an H200; on other GPUs neither the portable kernel nor dense attention is measured


def costs(settings: Settings, head_dim: int, kernel: str) -> Costs:
    """Figures for calls of a head size.

    Args:
        kernel: "hopper", or anything else for the portable kernel.
    """
    found = HOPPER[head_dim, settings.tile_keys < 8]
    speed = found.speed if kernel == "hopper" else PORTABLE_SPEED
    return found._replace(speed=speed * (SMALL_TILES if settings.tile_queries < 128 else 1))


def faster(c: Costs, q: torch.Tensor, keys: int, density: float = TRIED) -> bool:
    """Whether a call with queries q [B, H, L_q, D] that computes this share of scores beats a dense one."""
    dense = 4 * q.numel() * keys / c.rate
    return max(c.host, c.fixed + (c.planning + density / c.speed) * dense) < dense
