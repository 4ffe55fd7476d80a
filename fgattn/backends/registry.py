"""The backends in the order in which they are tried, and the one answer whether a call can run sparse."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..call import Call
from ..errors import InvalidArgument, Unsupported
from ..layout import TokenLayout
from ..outcomes import Outcome, Reason
from ..settings import Settings
from . import hopper, pytorch, selftest, triton
from .base import Backend, Eligible, without

BACKENDS = [hopper.BACKEND, triton.BACKEND, pytorch.BACKEND, pytorch.SPECIFICATION]


def choose(call: Call, *, gain: bool = False) -> Eligible | Reason:
    """The first backend that can run a call, or why none can.

    Args:
        gain: only backends from which a run can gain on the call's device; else those come first.
    """
    if call.declined:
        return Reason(Outcome.DECLINED, call.declined)
    passed_over: list[tuple[str, str]] = []
    for backend in _candidates(call.device, gain):
        reason = backend.reason(call)
        if reason is None and backend.probe:
            reason = selftest.failure(backend, call.device, backend.probe(call))
        if reason is None:
            return Eligible(backend, tuple(passed_over))
        passed_over.append((backend.name, reason))
    if not passed_over:
        return Reason(Outcome.NO_KERNEL, f"no sparse kernel for device type {call.device.type}")
    last = passed_over[-1][1]
    detail = last + without(tuple(other for other in passed_over if other[1] != last))
    return Reason(Outcome.NO_KERNEL, detail)


def _candidates(device: torch.device, gain: bool) -> Iterator[Backend]:
    for backend in BACKENDS:
        if backend.gains_on(device):
            yield backend
    for backend in BACKENDS:
        if not gain and not backend.gains_on(device):
            yield backend


def named(call: Call, name: str) -> Eligible | Reason:
    """A backend by its name, or why it cannot run a call; its self-test is left out.

    Raises:
        InvalidArgument: there is no such backend.
    """
    backend = by_name(name)
    if reason := call.declined or backend.reason(call):
        return Reason(Outcome.DECLINED, reason)
    return Eligible(backend)


def by_name(name: str) -> Backend:
    """The backend of a name.

    Raises:
        InvalidArgument: there is none.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise InvalidArgument(
        "impl", name, ", ".join(backend.name for backend in BACKENDS), "None chooses the fastest."
    )


def required(call: Call, impl: str | None) -> Backend:
    """The backend that a library call takes: by its name, or the first one that can.

    Raises:
        InvalidArgument: there is no such backend.
        Unsupported: it cannot run this call; the message says why.
    """
    answer = choose(call) if impl is None else named(call, impl)
    if isinstance(answer, Eligible):
        return answer.backend
    if call.declined:
        raise Unsupported(
            "q, k, v",
            call.declined,
            "equal head counts, rows contiguous and 16-byte aligned",
            "Run this call dense.",
        )
    raise Unsupported(
        "impl", impl, "torch or reference here", f"The {impl} kernels cannot run: {answer.text}."
    )


def on_device(device: torch.device, settings: Settings) -> Eligible | Reason:
    """What will run the calls of a run on a device, or why it will run dense: asked with a small call."""
    try:
        q = torch.zeros(1, 1, 16, 128, dtype=torch.bfloat16, device=device)
        return choose(Call.to_plan(q, q, q, settings, TokenLayout.flat(16)), gain=True)
    except (RuntimeError, NotImplementedError) as error:
        return Reason(
            Outcome.NO_KERNEL, f"no sparse kernel for device type {device.type}: {selftest.one_line(error)}"
        )
