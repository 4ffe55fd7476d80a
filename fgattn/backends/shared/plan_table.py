"""Launch settings of the planning kernels by GPU generation, and how their work is split into programs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class PlanLaunch(NamedTuple):
    query_cells: int  # of a program
    key_cells: int  # of a step
    warps: int
    stages: int
    keys: int  # of a step of the key-by-key pass
    key_warps: int
    key_stages: int


PLAN_TABLE: dict[int, PlanLaunch] = {  # by compute capability, the nearest not above
    80: PlanLaunch(64, 64, 4, 2, 64, 4, 3),
    90: PlanLaunch(128, 64, 8, 3, 128, 8, 3),
    120: PlanLaunch(64, 64, 4, 2, 64, 4, 3),
}
START = 0.01  # what starting a share of a program costs, as a part of a program: measured
MAX_SHARES = 8


@functools.cache
def plan_launch(device: torch.device) -> PlanLaunch:
    """The settings of select.py and refine.py on a device."""
    return PLAN_TABLE[max(row for row in PLAN_TABLE if row <= capability(device))]


def capability(device: torch.device) -> int:
    """Compute capability as major * 10 + minor; 80 for Triton's interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.lru_cache(maxsize=256)
def shares(programs: int, steps: int, device: torch.device) -> int:
    """Into how many programs each is split, so that the last wave of them is nearly full."""
    processors = _processors(device)
    return min(
        range(1, min(MAX_SHARES, steps) + 1),
        key=lambda n: -(-(programs * n) // processors) / n * (1 + START * n),
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
