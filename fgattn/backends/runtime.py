"""Which implementation runs on a device, and why not a faster one: Hopper, then portable Triton, then none.

Each is tried, not looked up by version: a kernel runs where it passes a self-test on first use.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

OutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
log = logging.getLogger("fgattn")


def fastest(q: torch.Tensor, gathers: bool = False) -> str:
    """Implementation for tensors like q [B, H, L, D]; gathers: keys come row by row (`hopper_reason`)."""
    if triton_reason(q):
        return "torch"
    reason = hopper_reason(q.device) or (hopper_reason(q.device, True) if gathers else None)
    return "triton" if reason else "hopper"


def triton_reason(q: torch.Tensor) -> str | None:
    """Why the Triton kernel should not run on tensors like q [B, H, L, D], or None."""
    return unavailable(q) or device_reason(q.device)


def unavailable(q: torch.Tensor) -> str | None:
    """Why the Triton kernel cannot even be tried on tensors like q, or None."""
    if reason := missing():
        return reason
    from .triton import attend as attend_fwd

    if q.shape[3] not in attend_fwd.HEAD_DIMS:
        return f"head size {q.shape[3]} (the kernel has {', '.join(map(str, attend_fwd.HEAD_DIMS))})"
    if q.dtype == torch.float64:
        return "float64"
    if q.device.type != "cuda" and not attend_fwd.IS_INTERPRETED:
        return f"no Triton kernel for device type {q.device.type}"
    return None


@functools.cache
def missing() -> str | None:
    """Why there is no Triton kernel at all, or None."""
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    try:
        from .triton import attend as attend_fwd  # noqa: F401
    except Exception as error:  # a build for another Python, driver or torch; one that is too old
        return f"Triton is installed but does not load: {_one_line(error)}"
    return None


@functools.cache
def device_reason(device: torch.device) -> str | None:
    """Why no GPU kernel can run on a device, or None; runs the fastest one's self-test once.

    The portable kernel is tested, and so compiled, where the Hopper kernel does not run.
    """
    if device.type != "cuda":
        return "Triton's interpreter is for tests"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if not (hopper := hopper_reason(device)):
        return None
    if reason := self_test(device, "triton"):
        return f"{reason} (no hopper: {hopper})"
    log.info("FG-Attn runs its portable Triton kernel: %s", hopper)
    return None


def gpu_kernel(device: torch.device) -> str:
    """The kernel that runs on a GPU, and why not the faster one."""
    reason = hopper_reason(device)
    return f"triton (no hopper: {reason})" if reason else "hopper"


@functools.cache
def hopper_reason(device: torch.device, gathers: bool = False) -> str | None:
    """Why the Hopper kernel cannot run on a device, or None; runs the kernel's self-test once.

    It has two ways to bring keys, each with a self-test of its own: octets by the copy engine, and
    single rows (`gathers`).
    """
    return hopper_missing(device) or self_test(device, "hopper", 1 if gathers else 16)


def hopper_missing(device: torch.device) -> str | None:
    """Why the Hopper kernel cannot even be tried on a device where Triton runs, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"no Hopper GPU: {device.type if torch.version.hip is None else 'ROCm'}"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"no Hopper GPU: compute capability {capability[0]}.{capability[1]}, not 9.0"
    try:
        from .hopper import attend as attend_hopper  # noqa: F401
    except Exception as error:  # Gluon is experimental: names and arguments come and go
        return f"this Triton lacks what the Hopper kernel needs: {_one_line(error)}"
    return None


def self_test(device: torch.device, impl: str, tile_keys: int = 16) -> str | None:
    """Why the kernels fail on a small case, or None: they must agree with the reference and honour the plan.

    It has the shapes of a default run (M=128, D=128, bf16, tail), whose kernels are then compiled.
    """
    try:
        reason = _wrong(device, impl, tile_keys)
    except OutOfMemory:
        raise  # says nothing of the kernels: the next run tests them again
    except Exception as error:
        log.warning("FG-Attn leaves its %s kernel, which fails its self-test:", impl, exc_info=True)
        return f"the kernels do not compile or run here: {_one_line(error)}"
    if reason:
        log.warning("FG-Attn leaves its %s kernel: %s", impl, reason)
    return reason


def _wrong(device: torch.device, impl: str, tile_keys: int) -> str | None:
    from ..attention import attend
    from ..layout import TokenLayout
    from ..plan import build_plan
    from ..settings import Settings

    q, k, v = torch.randn(3, 1, 1, 600, 128, generator=torch.Generator().manual_seed(0)).to(
        device, torch.bfloat16).unbind()
    layout = TokenLayout((5, 10, 12))
    settings = Settings(threshold=1.5, tile_keys=tile_keys)
    plan = build_plan(q, k, settings, layout, impl="triton")
    result = attend(q, k, v, plan, impl=impl).float()
    torch_plan = build_plan(q, k, settings, layout, impl="torch")
    if (plan.bits != torch_plan.bits).double().mean().item() > 0.05:
        return "the kernels' self-test selects other keys than the reference"
    expected = attend(q, k, v, plan, impl="reference").float()
    error = ((result - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        return f"the kernels' self-test is off by {error:.1e}"
    return None


def _one_line(error: Exception) -> str:
    """An exception as text for reports; Triton's run over many lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
