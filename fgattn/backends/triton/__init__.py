"""The portable Triton kernels: any GPU that Triton supports."""

from __future__ import annotations

import torch

from ...call import Call
from ...settings import Settings
from ..base import Backend, Planned, Tail
from ..shared import available
from ..shared.costs import costs

PROBE = Settings(threshold=1.5)
SPEED = 0.65  # of dense cuDNN on an H100; on other GPUs neither this kernel nor dense attention is measured


def _plan(call: Call) -> Planned:
    from ..shared.planning import plan_bits

    return plan_bits(call)


def _tail(call: Call, planned: Planned) -> Tail:
    from ..shared.tail import tail

    return tail(call, planned)


def _attend(call: Call, planned: Planned, tail: Tail | None, out: torch.Tensor) -> None:
    from .attend import attend

    attend(call, planned.plan, tail, out)


BACKEND = Backend(
    name="triton",
    reason=available.reason,
    plan=_plan,
    tail=_tail,
    attend=_attend,
    gains_on=lambda device: device.type in ("cuda", "xpu"),
    costs=lambda call: costs(call, SPEED),
    probe=lambda call: PROBE,
    compiling=available.compiling,
)
