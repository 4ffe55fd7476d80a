"""Self-test: a backend's kernels on a small case, before the first call that needs them.

Kernels are tried, not looked up by version: a backend runs where it agrees with the reference and honours
the plan.
"""

from __future__ import annotations

import functools
import logging

import torch

from ..call import Call
from ..errors import one_line
from ..layout import TokenLayout
from ..settings import Settings
from ..tensors import empty_like, is_out_of_memory
from . import pytorch
from .base import Backend
from .execute import attend, plan_of

LAYOUT = TokenLayout((5, 10, 12))
DIFFERENT_BITS = 0.05  # share; scores within rounding of the threshold may fall either way
LARGEST_ERROR = 1e-2  # relative L2, of bf16 output
log = logging.getLogger("fgattn")


@functools.cache
def failure(backend: Backend, device: torch.device, settings: Settings) -> str | None:
    """Why a backend's kernels fail on a device, or None; each answer is kept for the process.

    The case has the shapes of a default call (D = 128, bf16, tail), whose kernels are then compiled.
    """
    try:
        reason = disagreement(backend, device, settings)
    except Exception as error:
        if is_out_of_memory(error):
            raise  # says nothing of the kernels: the next call tests them again
        log.warning("FG-Attn leaves its %s kernels, which fail their self-test:", backend.name, exc_info=True)
        return f"the kernels do not compile or run here: {one_line(error)}"
    if reason:
        log.warning("FG-Attn leaves its %s kernels: %s", backend.name, reason)
    return reason


def forget() -> None:
    """Test again at the next use."""
    failure.cache_clear()


def disagreement(backend: Backend, device: torch.device, settings: Settings) -> str | None:
    """What a backend makes of the small case that the reference does not, or None."""
    call = case(device, settings)
    compile_ahead(backend, call)
    planned = plan_of(call, backend)
    result = attend(call, backend, planned, empty_like(call.q)).float()
    expected_bits = plan_of(call, pytorch.BACKEND).plan.bits
    if (planned.plan.bits != expected_bits).double().mean().item() > DIFFERENT_BITS:
        return "the kernels' self-test selects other keys than the reference"
    expected = attend(call, pytorch.SPECIFICATION, planned, empty_like(call.q)).float()
    error = ((result - expected).norm() / expected.norm()).item()
    if not error < LARGEST_ERROR:
        return f"the kernels' self-test is off by {error:.1e}"
    return None


def case(device: torch.device, settings: Settings) -> Call:
    """The small case, on seeded random tensors [1, 1, 600, 128]."""
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 600, 128, generator=random).to(device, torch.bfloat16).unbind()
    return Call.to_plan(q, k, v, settings, LAYOUT)


def compile_ahead(backend: Backend, call: Call) -> None:
    """Compile all kernels of a call side by side; they would be compiled one after the other as it runs."""
    if backend.compiling:
        with backend.compiling():
            attend(call, backend, plan_of(call, backend), empty_like(call.q))
