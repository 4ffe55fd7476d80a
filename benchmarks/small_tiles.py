"""Query tiles of 16 and 32 rows on real masks: rate of the requested scores against dense cuDNN.

q, k and v are the demo model's at 480p length; the threshold is searched for the requested density.
Tiles that run together compute the union of their lists: executed / requested says what that costs. Tail
off; lists are made in the timed call. Each row is checked against float64 on sampled tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from fgattn import Settings, TokenLayout, attend, build_plan

from . import peers
from .measure import relative_error
from .quality import LAYOUT, REPEAT_HEADS, recorded_calls
from .runner import Case, Run
from .shapes import QKV

DENSITY, ALLOWED = 0.15, 0.001


def cases(quick: bool) -> Iterator[Case]:
    """One case per (step, block)."""
    for number, ((step, block), qkv) in enumerate(recorded_calls().items()):
        if not quick or number % 4 == 0:
            yield Case(
                {"case": "small tiles", "step": step, "block": block, "D": 128, "L": LAYOUT.length},
                functools.partial(runs, qkv),
                repeats=10,
            )


def runs(qkv: QKV) -> list[Run]:
    qkv = QKV(*(x.repeat(1, REPEAT_HEADS, 1, 1) for x in qkv))
    q, k, v = qkv
    result = [peers.cudnn(qkv)]
    for m in (32, 16):
        threshold, plan = plan_of_density(q, k, m, LAYOUT)
        density = float(plan.density)
        result.append(
            Run(
                "hopper",
                functools.partial(attend, q, k, v, plan, impl="hopper"),
                functools.partial(sampled_error, q, k, v, plan),
                peers.TOLERANCE,
                {
                    "heads": q.shape[1],
                    "M": m,
                    "N": 16,
                    "threshold": threshold,
                    "density": density,
                    "executed_density": float(plan.executed_density),
                },
            )
        )
    return result


def plan_of_density(q, k, m: int, layout: TokenLayout):
    """(threshold, plan) with 16-key slices whose requested density is DENSITY."""
    low, high = 0.01, 100.0
    for _ in range(30):
        threshold = (low * high) ** 0.5
        plan = build_plan(
            q, k, Settings(threshold=threshold, tile_queries=m, tile_keys=16, tail=False), layout
        )
        off = float(plan.density) - DENSITY
        if abs(off) < ALLOWED:
            return threshold, plan
        low, high = (threshold, high) if off > 0 else (low, threshold)
    raise ValueError(f"M={m}: no threshold gives a density of {DENSITY}")


def sampled_error(q, k, v, plan, out) -> float:
    """Relative error of a few executed tiles against float64."""
    errors = []
    heads, tiles = plan.bits.shape[1:3]
    for head, tile in ((0, 0), (heads - 1, tiles - 1), (heads // 2, tiles // 2)):
        tokens = plan.query_tokens[0, head, tile * plan.tile_rows : (tile + 1) * plan.tile_rows]
        keys = plan.geometry.key_tokens[plan.kept_keys(0, slice(head, head + 1))[0, tile]]
        scores = q[0, head, tokens].double() @ k[0, head, keys].double().T * q.shape[3] ** -0.5
        errors.append(relative_error(out[0, head, tokens], scores.softmax(1) @ v[0, head, keys].double()))
    return max(errors)
