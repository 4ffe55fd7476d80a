"""Planning and attending of a call by a backend, with what all backends have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .. import methods
from ..call import Call, needed
from ..methods.common import Heads
from ..packing import plan_selected
from .base import Backend, Planned


def plan_of(call: Call, backend: Backend) -> Planned:
    """What of the call is computed. Methods other than "threshold" are torch code, whatever the backend."""
    if call.settings.method != "threshold" or call.is_empty:
        return Planned(plan_selected(call, lambda q, k, valid: _by_method(call, q, k, valid)))
    with _current(call.device):
        return backend.plan(call)


def attend(call: Call, backend: Backend, planned: Planned, out: torch.Tensor) -> torch.Tensor:
    """Write the call's output under a plan to out [B, H, L_q, D] and return it."""
    plan = planned.plan
    if plan.queries < call.q.shape[2]:
        out.zero_()  # absent tokens
    if call.is_empty:
        return out.zero_()
    with _current(call.device):
        tail = backend.tail(call, planned) if plan.tail and backend.tail else None
        backend.attend(call, planned, tail, out)
    return out


def _current(device: torch.device) -> AbstractContextManager:
    """Kernels run on the current GPU: where another one is, the context changes it for a while."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _by_method(call: Call, q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor | None):
    s = call.settings
    heads = Heads(
        q=q,
        k=k,
        valid=valid,
        geometry=call.geometry,
        layout=needed(call.layout),
        tile_queries=s.tile_queries,
        tile_keys=s.tile_keys,
        parameter=methods.strength(s.method, s.method_parameter),
        scale=call.scale,
    )
    return methods.select(s.method, heads)
