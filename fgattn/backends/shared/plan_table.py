"""Launch settings of the planning kernels by generation of GPU, and how their work is split into programs."""

from __future__ import annotations

import functools
from collections.abc import Iterable
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


Generation = int | str  # of GPUs: NVIDIA's compute capability, major * 10 + minor, or a name of ours
PLAN_TABLE: dict[Generation, PlanLaunch] = {
    80: PlanLaunch(64, 64, 4, 2, 64, 4, 3),
    90: PlanLaunch(128, 64, 8, 3, 128, 8, 3),
    120: PlanLaunch(64, 64, 4, 2, 64, 4, 3),
    "cdna": PlanLaunch(64, 64, 4, 2, 64, 4, 3),
    "rdna2": PlanLaunch(16, 64, 8, 2, 64, 8, 3),
    "rdna3": PlanLaunch(32, 64, 8, 2, 64, 8, 3),
    "xpu": PlanLaunch(64, 64, 4, 2, 64, 4, 3),
}
CDNA = ("gfx908", "gfx90a", "gfx94", "gfx95")  # AMD's GPUs of data centres that have matrix units
RDNA3 = ("gfx11", "gfx12")  # and newer: AMD's other GPUs with such units
START = 0.01  # what starting a share of a program costs, as a part of a program: measured
MAX_SHARES = 8


@functools.cache
def plan_launch(device: torch.device) -> PlanLaunch:
    """The settings of select.py and refine.py on a device."""
    return plan_launch_of(generation(device))


def plan_launch_of(generation: Generation) -> PlanLaunch:
    """Settings of a generation; for compute capabilities without a row, of the nearest row not above."""
    return PLAN_TABLE[nearest(generation, PLAN_TABLE)]


def nearest(generation: Generation, rows: Iterable[Generation]) -> Generation:
    """The row of a generation: its own; of compute capabilities the highest not above, else the lowest."""
    if isinstance(generation, str):
        return generation
    capabilities = [row for row in rows if isinstance(row, int)]
    return max((c for c in capabilities if c <= generation), default=min(capabilities))


@functools.cache
def generation(device: torch.device) -> Generation:
    """Which row of the launch tables a device takes; that of 8.0 for Triton's interpreter.

    ROCm reports a compute capability, too, but it says nothing of what fits.
    """
    if device.type == "xpu":
        return "xpu"
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        return amd_generation(torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def amd_generation(name: str) -> str:
    """The generation of an architecture such as "gfx942:sramecc+:xnack-"; RDNA 2 needs the least."""
    if name.startswith(CDNA):
        return "cdna"
    return "rdna3" if name.startswith(RDNA3) else "rdna2"


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
