"""Plain PyTorch: any device, any head size; and the specification, which plans with it."""

from __future__ import annotations

import dataclasses

import torch

from ... import reference
from ...call import Call, needed
from ...packing import plan_selected
from ..base import Backend, Planned, Tail
from . import attend, select, tail


def _plan(call: Call) -> Planned:
    return Planned(
        plan_selected(
            call, lambda q, k, valid: select.select(q, k, valid, call.geometry, call.settings, call.scale)
        )
    )


def _attend(call: Call, planned: Planned, given: Tail | None, out: torch.Tensor) -> None:
    attend.attend(call, planned.plan, given, out)


def _attend_by_reference(call: Call, planned: Planned, given: Tail | None, out: torch.Tensor) -> None:
    out.copy_(reference.attend(call.q, call.k, needed(call.v), planned.plan))


BACKEND = Backend(
    name="torch",
    reason=lambda call: None,
    plan=_plan,
    tail=lambda call, planned: tail.tail(call, planned.plan),
    attend=_attend,
    gains_on=lambda device: device.type == "cpu",
)
SPECIFICATION = dataclasses.replace(
    BACKEND, name="reference", tail=None, attend=_attend_by_reference, gains_on=lambda device: False
)
