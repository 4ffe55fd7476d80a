"""Launch settings of the portable attention kernel, by GPU generation, head size and tile."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    block_keys: int  # keys per step of the inner loop
    warps: int
    stages: int  # of the software pipeline; two look-ups come before the gathers, so 4 is shallow


# Keys: (compute capability, head size, tile rows).
# sm_90: measured on one H200, see benchmarks/NOTES.md. The others are not measured: the largest step
# that compiles without spills and within shared memory (tests/compile).
TABLE: dict[tuple[int, int, int], Launch] = {
    (80, 64, 64): Launch(64, 4, 4),
    (80, 64, 128): Launch(64, 8, 4),
    (80, 128, 64): Launch(64, 8, 4),
    (80, 128, 128): Launch(64, 8, 4),
    (86, 64, 64): Launch(64, 4, 4),
    (86, 64, 128): Launch(64, 8, 4),
    (86, 128, 64): Launch(32, 8, 4),
    (86, 128, 128): Launch(32, 8, 4),
    (89, 64, 64): Launch(64, 4, 4),
    (89, 64, 128): Launch(64, 8, 4),
    (89, 128, 64): Launch(32, 8, 4),
    (89, 128, 128): Launch(32, 8, 4),
    (90, 64, 64): Launch(64, 4, 5),
    (90, 64, 128): Launch(64, 8, 6),
    (90, 128, 64): Launch(64, 4, 5),
    (90, 128, 128): Launch(64, 8, 7),
    (100, 64, 64): Launch(64, 4, 4),
    (100, 64, 128): Launch(64, 8, 4),
    (100, 128, 64): Launch(64, 4, 4),
    (100, 128, 128): Launch(64, 8, 4),
    (120, 64, 64): Launch(64, 4, 4),
    (120, 64, 128): Launch(64, 8, 4),
    (120, 128, 64): Launch(32, 8, 2),
    (120, 128, 128): Launch(32, 8, 2),
}


def launch_for(arch: int, head_dim: int, tile_rows: int) -> Launch:
    """Settings for compute capability `arch` (major * 10 + minor): the nearest row not above it."""
    rows = [a for a, d, m in TABLE if (d, m) == (head_dim, tile_rows) and a <= arch]
    return TABLE[max(rows, default=80), head_dim, tile_rows]
