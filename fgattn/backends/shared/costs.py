"""Figures of planning, tail and the host, which the Triton backends share; measured on an H200.

`python -m benchmarks breakeven` measures them; benchmarks/NOTES.md has the fit, and a test holds the rule
against the results.
"""

from __future__ import annotations

from ...call import Call
from ..base import Costs

OCTET = 8  # N from which keys are listed by octets or more, not one by one
FIGURES = {  # (head size, keys listed one by one)
    (128, False): Costs(600e9, fixed=0.15, planning=0.075, speed=1.07, host=0.55),
    (128, True): Costs(600e9, fixed=0.16, planning=0.14, speed=0.96, host=0.55),
    (64, False): Costs(430e9, fixed=0.14, planning=0.06, speed=1.03, host=0.55),
    (64, True): Costs(430e9, fixed=0.16, planning=0.14, speed=0.96, host=0.55),  # as for 128: not measured
}
SMALL_TILES = 0.85  # speed of 64-row programs over 128-row ones


def costs(call: Call, speed: float | None = None) -> Costs:
    """Figures of a call.

    Args:
        speed: of the attention kernel at density 1, dense being 1; None is the Hopper kernel's, as measured.
    """
    s = call.settings
    found = FIGURES[call.q.shape[3], s.tile_keys < OCTET]
    speed = found.speed if speed is None else speed
    return found._replace(speed=speed * (SMALL_TILES if s.tile_queries < 128 else 1))
