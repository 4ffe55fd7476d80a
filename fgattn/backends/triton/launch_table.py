"""Launch settings of the portable attention kernel, by GPU generation, head size and tile."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    block_keys: int  # keys per step of the inner loop
    warps: int
    stages: int  # of the software pipeline


class Row(NamedTuple):
    """Settings by what a list holds: look-ups of keys are stages of the pipeline, those of cells are not."""

    keys: Launch
    cells: Launch


def _two_ahead(block_keys: int, warps: int) -> Row:
    """Two steps of k and v in shared memory."""
    return Row(Launch(block_keys, warps, 6), Launch(block_keys, warps, 3))


# Keys: (compute capability, head size, tile rows).
# sm_90: measured on one H100, see benchmarks/NOTES.md. The others are not measured: the largest step
# that compiles without spills in a loop and within shared memory (tests/compile).
TABLE: dict[tuple[int, int, int], Row] = {
    (80, 64, 64): _two_ahead(64, 4),
    (80, 64, 128): _two_ahead(64, 8),
    (80, 128, 64): _two_ahead(64, 8),
    (80, 128, 128): _two_ahead(64, 8),
    (86, 64, 64): _two_ahead(64, 4),
    (86, 64, 128): _two_ahead(64, 8),
    (86, 128, 64): _two_ahead(32, 8),
    (86, 128, 128): _two_ahead(32, 8),
    (89, 64, 64): _two_ahead(64, 4),
    (89, 64, 128): _two_ahead(64, 8),
    (89, 128, 64): _two_ahead(32, 8),
    (89, 128, 128): _two_ahead(32, 8),
    (90, 64, 64): Row(Launch(128, 4, 2), Launch(128, 4, 3)),
    (90, 64, 128): Row(Launch(64, 8, 7), Launch(128, 8, 3)),
    (90, 128, 64): Row(Launch(64, 4, 6), Launch(64, 4, 3)),
    (90, 128, 128): Row(Launch(128, 8, 5), Launch(128, 8, 3)),
    (100, 64, 64): _two_ahead(64, 4),
    (100, 64, 128): _two_ahead(64, 8),
    (100, 128, 64): _two_ahead(64, 4),
    (100, 128, 128): _two_ahead(64, 8),
    (120, 64, 64): _two_ahead(64, 4),
    (120, 64, 128): _two_ahead(64, 8),
    (120, 128, 64): _two_ahead(32, 8),
    (120, 128, 128): _two_ahead(32, 8),
}


def launch_for(arch: int, head_dim: int, tile_rows: int) -> Row:
    """Settings for compute capability `arch` (major * 10 + minor): the nearest row not above it."""
    rows = [a for a, d, m in TABLE if (d, m) == (head_dim, tile_rows) and a <= arch]
    return TABLE[max(rows, default=80), head_dim, tile_rows]
