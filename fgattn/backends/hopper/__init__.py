"""The kernels for compute capability 9.0, in Gluon, Triton's lower-level language.

Keys come by TMA, the GPU's unit that copies boxes of memory, where they lie in boxes; else row by row."""

from __future__ import annotations

import functools

import torch

from ...call import Call
from ...settings import Settings
from ..base import Backend, Planned, Tail
from ..shared import available
from ..shared.costs import costs
from .boxes import boxes_for

CAPABILITY = (9, 0)
TESTED = "the fast kernels of this GPU are tested with Triton 3.6 to 3.9, which torch 2.11 to 2.15 bring"
# The self-test of each way to bring keys.
BY_BOXES, BY_ROWS = Settings(threshold=1.5), Settings(threshold=1.5, tile_keys=1)


@functools.cache
def device_reason(device: torch.device) -> str | None:
    """Why the kernels cannot be tried on a device, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"no Hopper GPU: {device.type if torch.version.hip is None else 'ROCm'}"
    if (found := torch.cuda.get_device_capability(device)) != CAPABILITY:
        return f"no Hopper GPU: compute capability {found[0]}.{found[1]}, not 9.0"
    if absent := available.missing():
        return absent
    # Gluon is experimental: names and arguments come and go.
    if failed := available.loading_error(f"{__package__}.attend"):
        return f"this Triton lacks what the Hopper kernel needs: {failed}; {TESTED}"
    return None


def _plan(call: Call) -> Planned:
    from ..shared.planning import plan_bits

    return plan_bits(call)


def _tail(call: Call, planned: Planned) -> Tail:
    from .tail import tail

    return tail(call, planned)


def _attend(call: Call, planned: Planned, tail: Tail | None, out: torch.Tensor) -> None:
    from .attend import attend

    attend(call, planned.plan, tail, out)


BACKEND = Backend(
    name="hopper",
    reason=lambda call: device_reason(call.device) or available.reason(call),
    plan=_plan,
    tail=_tail,
    attend=_attend,
    gains_on=lambda device: device.type == "cuda",
    costs=costs,
    probe=lambda call: BY_ROWS if boxes_for(call) is None else BY_BOXES,
    compiling=available.compiling,
    tested=TESTED,
)
