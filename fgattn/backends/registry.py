"""The backends in the order in which they are tried, and the one answer whether a call can run sparse."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from ..call import Call
from ..errors import InvalidArgument, Unsupported, one_line
from ..layout import TokenLayout
from ..outcomes import Outcome, Reason
from ..settings import Settings
from ..tensors import GRADIENTS, is_out_of_memory
from . import hopper, pytorch, selftest, triton
from .base import Backend, Eligible, without

BACKENDS = [hopper.BACKEND, triton.BACKEND, pytorch.BACKEND, pytorch.SPECIFICATION]
WITHOUT_GRADIENTS = "Call it under torch.no_grad() or torch.inference_mode(), or run this call dense."
log = logging.getLogger("fgattn")


def choose(call: Call, *, gain: bool = False) -> Eligible | Reason:
    """The first backend that can run a call, or why none can.

    Args:
        gain: only backends from which a run can gain on the call's device; else those come first.
    """
    asked = [(backend, *_ask(backend, "gains_on", call.device)) for backend in BACKENDS]
    candidates = [(backend, failed) for backend, gains, failed in asked if gains or failed]
    if gain and not candidates:
        return Reason(Outcome.NO_KERNEL, f"no sparse kernel for device type {call.device.type}")
    if call.declined:
        return Reason(Outcome.DECLINED, call.declined)
    if not gain:
        candidates += [(backend, None) for backend, gains, failed in asked if not (gains or failed)]
    passed_over: list[tuple[str, str]] = []
    for backend, failed in candidates:
        reason = failed or _reason(backend, call)
        if reason is None and backend.probe:
            settings, reason = _ask(backend, "probe", call)
            reason = reason or selftest.failure(backend, call.device, settings)
            if reason and backend.tested:
                reason += f"; {backend.tested}"
        if reason is None:
            return Eligible(backend, tuple(passed_over))
        passed_over.append((backend.name, reason))
    last = passed_over[-1][1]
    detail = last + without(tuple(other for other in passed_over if other[1] != last))
    return Reason(Outcome.NO_KERNEL, detail)


def _reason(backend: Backend, call: Call) -> str | None:
    """Why a backend cannot run a call, never empty, or None."""
    reason, failed = _ask(backend, "reason", call)
    return failed or (reason if reason is None else reason or "it does not say why")


def _ask(backend: Backend, name: str, given: Call | torch.device) -> tuple[Any, str | None]:
    """What a function of a record answers, and None; where it fails, None, and that as a reason."""
    try:
        return getattr(backend, name)(given), None
    except Exception as error:
        if is_out_of_memory(error):
            raise  # says nothing of the backend
        failed = f"its {name} fails: {one_line(error)}"
        _warn(f"FG-Attn leaves its {backend.name} kernels: {failed}")
        return None, failed


@functools.lru_cache(maxsize=64)
def _warn(text: str) -> None:
    """Log a text, once."""
    log.warning(text, exc_info=True)


def named(call: Call, name: str) -> Eligible | Reason:
    """A backend by its name, or why it cannot run a call; its self-test is left out.

    Raises:
        InvalidArgument: there is no such backend.
    """
    backend = by_name(name)
    if reason := call.declined or _reason(backend, call):
        return Reason(Outcome.DECLINED, reason)
    return Eligible(backend)


def by_name(name: str) -> Backend:
    """The backend of a name.

    Raises:
        InvalidArgument: there is none.
    """
    for backend in BACKENDS:
        if isinstance(name, str) and backend.name == name:
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
            "equal head counts, rows contiguous and 16-byte aligned, no gradients",
            WITHOUT_GRADIENTS if call.declined == GRADIENTS else "Run this call dense.",
        )
    others = [backend.name for backend in BACKENDS if _reason(backend, call) is None]
    allowed = f"{' or '.join(others)} here" if others else "nothing here"
    kernels = "Kernels" if impl is None else f"The {impl} kernels"
    raise Unsupported("impl", impl, allowed, f"{kernels} cannot run: {answer.text}.")


def on_device(device: torch.device, settings: Settings) -> Eligible | Reason:
    """What will run the calls of a run on a device, or why it will run dense: asked with a small call."""
    try:
        q = torch.zeros(1, 1, 16, 128, dtype=torch.bfloat16, device=device)
        return choose(Call.to_plan(q, q, q, settings, TokenLayout.flat(16)), gain=True)
    except (RuntimeError, NotImplementedError) as error:
        return Reason(Outcome.NO_KERNEL, f"no sparse kernel for device type {device.type}: {one_line(error)}")
