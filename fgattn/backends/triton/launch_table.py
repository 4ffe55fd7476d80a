"""Launch settings of the portable attention kernel, by generation of GPUs, head size and tile."""

from __future__ import annotations

from typing import NamedTuple

from ..shared.plan_table import Generation, nearest


class Launch(NamedTuple):
    block_keys: int  # keys per step of the inner loop
    warps: int
    stages: int  # of the software pipeline
    ahead: bool = False  # look-ups are made before the pipeline; else they are stages of it


class Row(NamedTuple):
    """Settings by what a list holds."""

    keys: Launch
    cells: Launch
    parts: int = 1  # programs that share the queries of a tile


def _two_ahead(block_keys: int, warps: int) -> Row:
    """Two steps of k and v in shared memory."""
    return Row(Launch(block_keys, warps, 6), Launch(block_keys, warps, 3, ahead=True))


def _alike(launch: Launch, parts: int = 1) -> Row:
    """The same settings whatever a list holds, but for when rows are looked up."""
    return Row(launch, launch._replace(ahead=True), parts)


# Keys: (generation, head size, tile rows); a generation of NVIDIA's is the compute capability, for others see
# `generation` in shared/plan_table.py.
# sm_90: measured on one H100, see benchmarks/NOTES.md. The others are not measured: the largest step
# that compiles without spills in a loop and within shared memory (tests/compile). RDNA 2 has no matrix
# units, so that operands are fp32 there and registers spill whatever the step. For Intel nothing is compiled.
TABLE: dict[tuple[Generation, int, int], Row] = {
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
    (90, 64, 64): Row(Launch(128, 4, 2), Launch(128, 4, 3, ahead=True)),
    (90, 64, 128): Row(Launch(64, 8, 7), Launch(64, 8, 6)),
    (90, 128, 64): Row(Launch(64, 4, 6), Launch(64, 4, 3, ahead=True)),
    (90, 128, 128): Row(Launch(128, 8, 5), Launch(128, 8, 3, ahead=True)),
    (100, 64, 64): _two_ahead(64, 4),
    (100, 64, 128): _two_ahead(64, 8),
    (100, 128, 64): _two_ahead(64, 4),
    (100, 128, 128): _two_ahead(64, 8),
    (120, 64, 64): _two_ahead(64, 4),
    (120, 64, 128): _two_ahead(64, 8),
    (120, 128, 64): _two_ahead(32, 8),
    (120, 128, 128): _two_ahead(32, 8),
    ("cdna", 64, 64): _alike(Launch(64, 8, 2)),
    ("cdna", 64, 128): _alike(Launch(64, 8, 2)),
    ("cdna", 128, 64): _alike(Launch(64, 8, 2)),
    ("cdna", 128, 128): _alike(Launch(64, 8, 2), parts=2),
    ("rdna2", 64, 64): _alike(Launch(16, 16, 1)),
    ("rdna2", 64, 128): _alike(Launch(16, 16, 1)),
    ("rdna2", 128, 64): _alike(Launch(16, 16, 1)),
    ("rdna2", 128, 128): _alike(Launch(16, 16, 1), parts=2),
    ("rdna3", 64, 64): _alike(Launch(32, 8, 2)),
    ("rdna3", 64, 128): _alike(Launch(32, 16, 2)),
    ("rdna3", 128, 64): _alike(Launch(16, 8, 2)),
    ("rdna3", 128, 128): _alike(Launch(16, 16, 2)),
    ("xpu", 64, 64): _alike(Launch(64, 8, 2)),
    ("xpu", 64, 128): _alike(Launch(64, 8, 2)),
    ("xpu", 128, 64): _alike(Launch(64, 8, 2)),
    ("xpu", 128, 128): _alike(Launch(64, 8, 2)),
}


def launch_for(generation: Generation, head_dim: int, tile_rows: int) -> Row:
    """Settings of a generation; for compute capabilities without a row, of the nearest row not above."""
    return TABLE[nearest(generation, (g for g, _, _ in TABLE)), head_dim, tile_rows]
