"""Launch settings of the attention and planning kernels by architecture, chosen offline."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton


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


class PlanLaunch(NamedTuple):
    runs: int  # centroids of a program
    cells: int  # of a step
    warps: int
    stages: int
    keys: int  # of a step of the key-by-key pass
    key_warps: int
    key_stages: int


PLAN_TABLE: dict[int, PlanLaunch] = {  # by compute capability
    80: PlanLaunch(64, 64, 4, 2, 64, 4, 3),
    90: PlanLaunch(128, 64, 8, 3, 128, 8, 3),
    120: PlanLaunch(64, 64, 4, 2, 64, 4, 3),
}
START = 0.01  # what starting a share of a program costs, as a part of a program: measured
MAX_SHARES = 8


def plan_launch(device: torch.device) -> PlanLaunch:
    return PLAN_TABLE[max(row for row in PLAN_TABLE if row <= capability(device))]


def capability(device: torch.device) -> int:
    """Compute capability as major * 10 + minor; 80 for Triton's interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def shares(programs: int, steps: int, device: torch.device) -> int:
    """Into how many programs each is split, so that the last wave of them is nearly full."""
    processors = _processors(device)
    return min(range(1, min(MAX_SHARES, steps) + 1),
               key=lambda n: triton.cdiv(programs * n, processors) / n * (1 + START * n))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
