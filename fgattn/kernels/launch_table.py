"""Launch settings of the kernels by (architecture, head size), chosen offline."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    block_keys: int  # keys per step of the inner loop
    warps: int
    stages: int  # depth of the software pipeline


# sm_90: measured, benchmarks/results. Others: chosen so that nothing spills and shared memory fits
# (tests/compile); not measured.
TABLE: dict[tuple[int, int], Launch] = {
    (80, 64): Launch(64, 4, 2),
    (80, 128): Launch(64, 8, 2),
    (86, 64): Launch(64, 4, 2),
    (86, 128): Launch(64, 8, 2),
    (89, 64): Launch(64, 4, 2),
    (89, 128): Launch(64, 8, 2),
    (90, 64): Launch(128, 8, 2),
    (90, 128): Launch(128, 8, 2),
    (100, 64): Launch(64, 8, 2),
    (100, 128): Launch(64, 8, 2),
    (120, 64): Launch(64, 8, 2),
    (120, 128): Launch(64, 8, 2),
}


def launch_for(arch: int, head_dim: int) -> Launch:
    """Settings for compute capability `arch` (major * 10 + minor), from the nearest row below it."""
    rows = [a for a, d in TABLE if d == head_dim and a <= arch]
    return TABLE[max(rows, default=80), head_dim]
