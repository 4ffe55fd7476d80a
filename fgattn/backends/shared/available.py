"""Whether the shared Triton kernels can run: needs no Triton itself, so that others can ask."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager

import torch

from ...call import Call
from ...errors import one_line

HEAD_DIMS = (64, 128)
OLDEST = (8, 0)  # compute capability


def reason(call: Call) -> str | None:
    """Why the kernels that plan and attend in Triton cannot be tried on a call, or None."""
    if absent := missing():
        return absent
    if (dim := call.q.shape[3]) not in HEAD_DIMS:
        return f"head size {dim} (the kernel has {', '.join(map(str, HEAD_DIMS))})"
    if call.q.dtype == torch.float64:
        return "float64"
    return device_reason(call.device)


@functools.cache
def missing() -> str | None:
    """Why there is no Triton kernel at all, or None."""
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    if error := loading_error(f"{__package__}.planning"):
        return f"Triton is installed but does not load: {error}"
    return None


@functools.cache
def device_reason(device: torch.device) -> str | None:
    """Why no Triton kernel can run on a device, or None."""
    if device.type == "xpu":
        return None  # Intel's: the self-test tells
    if device.type != "cuda":
        from .launch import IS_INTERPRETED

        return None if IS_INTERPRETED else f"no Triton kernel for device type {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def compiling() -> AbstractContextManager[None]:
    """`Backend.compiling` of all kernels that `launch_kernel` launches."""
    from .prepared import compiling

    return compiling()


def loading_error(module: str) -> str | None:
    """Why a module of kernels does not load, in one line, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a build for another Python, driver or torch; one that is too old
        return one_line(error)
    return None
