"""When a sparse call is faster than a dense one, from a few figures of its backend.

With the figures of `backends.base.Costs`:

    dense  = 4 B H L_q L_k D / rate                                            ms on the GPU
    sparse = the longer of `host` and fixed + (planning + density / speed) * dense

`host` is what the host takes to queue a sparse call: a model cannot run faster than its calls are queued.
"""

from __future__ import annotations

from ..backends.base import Costs
from ..call import Call

TRIED = 0.15  # density that is assumed until the run knows: about what threshold 2 keeps


def faster(c: Costs, call: Call, density: float = TRIED) -> bool:
    """Whether a call of which this share of the pairs is computed beats a dense one."""
    dense = 4 * call.q.numel() * call.k.shape[2] / c.rate
    return max(c.host, c.fixed + (c.planning + density / c.speed) * dense) < dense
