"""Where a sparse call gets faster than a dense one: whole calls as the engine runs them, over length, heads,
head size and density, beside dense cuDNN attention.

`ms` is GPU time with launches hidden, `host_ms` what the host takes to queue the call; a stream of such calls
takes the longer one for each. fgattn/runs/break_even.py is the rule that follows.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from fgattn import Settings, build_plan
from fgattn.runs.engine import Engine
from fgattn.settings import Policy

from . import peers
from .measure import BUSY_CYCLES, planned_error
from .runner import Case, Run
from .shapes import QKV, Shape, for_density, random_qkv

GRIDS = (  # 1 000 to 32 760 tokens
    (5, 10, 20),
    (5, 20, 20),
    (5, 20, 40),
    (10, 20, 40),
    (20, 20, 40),
    (21, 30, 52),
)
HEADS = {128: (12, 24, 40), 64: (32,)}  # by head size
DENSITIES = (0.1, 0.3, 0.6)
SINGLE_KEYS_HEADS = 24
QUEUED = 30  # calls whose queueing is timed


def cases(quick: bool) -> Iterator[Case]:
    for dim, counts in HEADS.items():
        for heads in counts[-1:] if quick else counts:
            for grid in GRIDS[1:4] if quick else GRIDS:
                shape = Shape(f"{grid}, {heads} heads", grid, heads)
                yield Case(
                    {"case": "break-even", "L": shape.length, "heads": heads, "D": dim},
                    functools.partial(runs, shape, dim),
                    repeats=7,
                    warmup=1,
                )


def runs(shape: Shape, dim: int) -> list[Run]:
    qkv = random_qkv(shape, dim)
    dense = peers.cudnn(qkv)
    result = [
        Run(
            dense.name,
            dense.call,
            dense.error,
            dense.tolerance,
            {**dense.columns, "host_ms": host_milliseconds(dense.call)},
        )
    ]
    for n in (16, 1) if dim == 128 and shape.heads == SINGLE_KEYS_HEADS else (16,):
        for density in DENSITIES:
            try:
                settings = for_density(qkv.q, qkv.k, Settings(tile_keys=n), shape.layout, density)
            except ValueError:  # so short that what is always kept is more
                continue
            result.append(sparse(qkv, settings, shape))
    return result


def sparse(qkv: QKV, settings: Settings, shape: Shape) -> Run:
    q, k, v = qkv
    # Estimates of the error are due for one call in four at most: they are no part of a call.
    engine = Engine(settings, Policy(warmup_steps=0, min_tokens=1, estimate_error=False))
    engine.begin_run([1.0, 0.0], False, q.device)
    plan = build_plan(q, k, settings, shape.layout)

    def never() -> torch.Tensor:
        raise AssertionError("the call that is timed ran dense")

    def call():
        return engine.attention(q, k, v, layout=shape.layout, dense=never, block=0)

    density = float(plan.executed_density)
    return Run(
        "fgattn",
        call,
        functools.partial(planned_error, qkv, plan),
        peers.TOLERANCE,
        {
            "M": settings.tile_queries,
            "N": settings.tile_keys,
            "threshold": settings.threshold,
            "density": density,
            "host_ms": host_milliseconds(call),
        },
    )


def host_milliseconds(call: Callable[[], object]) -> float:
    """Time to queue a call while the GPU is busy: the lower quartile, as other load of the host only adds."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda._sleep(QUEUED * BUSY_CYCLES)
    times = []
    for _ in range(QUEUED):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.quantiles(times, n=4)[0]
