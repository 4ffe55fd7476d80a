"""Which implementation runs on a device, and why not the faster one."""

from __future__ import annotations

import functools
import importlib.util

import torch


def triton_reason(q: torch.Tensor) -> str | None:
    """Why the Triton kernel should not run on tensors like q [B, H, L, D], or None."""
    return unavailable(q) or device_reason(q.device)


def unavailable(q: torch.Tensor) -> str | None:
    """Why the Triton kernel cannot even be tried on tensors like q, or None."""
    if reason := missing():
        return reason
    from .kernels import attend_fwd

    if q.shape[3] not in attend_fwd.HEAD_DIMS:
        return f"head size {q.shape[3]} (the kernel has {', '.join(map(str, attend_fwd.HEAD_DIMS))})"
    if q.dtype == torch.float64:
        return "float64"
    if q.device.type != "cuda" and not attend_fwd.IS_INTERPRETED:
        return f"no Triton kernel for device type {q.device.type}"
    return None


def missing() -> str | None:
    """Why there is no Triton kernel at all, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@functools.cache
def device_reason(device: torch.device) -> str | None:
    """Why the Triton kernel cannot run on a device, or None; runs the kernel's self-test once."""
    if device.type != "cuda":
        return "Triton's interpreter is for tests"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return self_test(device)


def self_test(device: torch.device) -> str | None:
    """Run the kernel on a small case: it must agree with the reference and honour its mask."""
    from .attention import attend
    from .plan import plan_from_mask

    q, k, v = torch.randn(3, 1, 1, 200, 64, generator=torch.Generator().manual_seed(0)).to(
        device, torch.bfloat16).unbind()
    mask = torch.arange(2 * 13, device=device).view(2, 13) % 3 != 0
    plan = plan_from_mask(mask, 128, 16, query_length=200, key_length=200, tail=True)
    everything = plan_from_mask(torch.ones_like(mask), 128, 16, query_length=200, key_length=200)
    try:
        result = attend(q, k, v, plan, impl="triton").float()
    except Exception as error:
        return f"the kernel does not compile or run here: {type(error).__name__}: {error}"
    expected = attend(q, k, v, plan, impl="reference").float()
    error = ((result - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        return f"the kernel's self-test is off by {error:.1e}"
    dense = attend(q, k, v, everything, impl="reference").float()
    if ((result - dense).norm() / dense.norm()).item() < 5e-2:
        return "the kernel's self-test ignores the mask"
    return None
