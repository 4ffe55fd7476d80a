"""attend(q, k, v, plan): argument checks and the choice of implementation."""

from __future__ import annotations

import torch

from . import reference
from .backends import runtime
from .backends.pytorch.attend import attend_torch
from .backends.pytorch.tail import pooled_tail
from .errors import InvalidArgument, Unsupported
from .layout import TokenLayout
from .plan import SparsePlan, parts_for, plan_call
from .settings import Settings
from .tensors import check_tensors, compute_type, head_parts

IMPLEMENTATIONS = ("reference", "torch", "triton", "hopper")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SparsePlan, *, impl: str | None = None,
    summaries=None, out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v over the keys of the plan, plus its tail.

    Args:
        q: [B, H, L_q, D]; k, v: [B, H, L_k, D]; any outer strides, last stride 1, rows 16-byte
            aligned. fp16, bf16, fp32 (triton and hopper compute it in bf16 on a GPU), or float64
            (reference and torch).
        plan: made for these shapes.
        impl: "reference" (the specification, slow), "torch" (any device), "triton" (GPU) or
            "hopper" (compute capability 9.0); None takes the last of them that runs here.
        summaries: of these tensors, if `plan_call` has just made them; None makes them.
        out: where the result goes, of q's shape and type; None makes it.

    Returns:
        [B, H, L_q, D] in q's dtype; stored as [B, L_q, H, D] if q is.

    Raises:
        InvalidArgument: shapes that do not fit the plan, unknown impl.
        Unsupported: this implementation cannot run these tensors; the message says why.
    """
    check_tensors(q, k, v)
    check_plan(q, k, plan)
    if impl not in (None, *IMPLEMENTATIONS):
        raise InvalidArgument("impl", impl, ", ".join(IMPLEMENTATIONS), "None chooses the fastest.")
    if impl is None:
        impl = runtime.fastest(q, plan.gathers)
    reason = runtime.unavailable(q) if impl in ("triton", "hopper") else None
    if impl == "hopper":
        reason = reason or runtime.hopper_missing(q.device)
    if reason:
        raise Unsupported("impl", impl, "torch or reference here", f"The {impl} kernel cannot run: {reason}.")
    out = empty_like(q) if out is None else out
    if (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        raise InvalidArgument("out", (tuple(out.shape), out.dtype, out.device),
                              (tuple(q.shape), q.dtype, q.device), "None makes one.")
    if plan.queries < q.shape[2]:
        out.zero_()  # absent tokens
    if not q.numel() or not plan.keys:
        return out.zero_()
    if impl == "reference":
        out.copy_(reference.attend(q, k, v, plan))
    elif impl == "torch":
        tail = pooled_tail(q, k, v, plan) if plan.tail else None
        attend_torch(q, k, v, plan, tail, out)
    else:
        from .backends.triton.tail import tail_triton

        q, k, v = (x.to(compute_type(x)) for x in (q, k, v))
        tail = tail_triton(q, k, v, plan, summaries, hopper=impl == "hopper") if plan.tail else None
        if impl == "hopper":
            from .backends.hopper.attend import attend_hopper as launch
        else:
            from .backends.triton.attend import attend_triton as launch
        launch(q, k, v, plan, tail, out)
    return out


def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings, layout: TokenLayout,
    *, scale: float | None = None, impl: str | None = None,
) -> torch.Tensor:
    """build_plan and attend, for a part of the heads at a time; arguments, result and errors as there."""
    check_tensors(q, k, v)
    out = empty_like(q)
    for of in head_parts(q.shape[1], parts_for(q, k.shape[2], settings)):
        mine = q[:, of], k[:, of], v[:, of]
        plan, summaries = plan_call(*mine, settings, layout, scale=scale)
        attend(*mine, plan, impl=impl, summaries=summaries, out=out[:, of])
        del plan, summaries  # the next part's shall have their room
    return out


def check_plan(q: torch.Tensor, k: torch.Tensor, plan: SparsePlan) -> None:
    """Raise InvalidArgument unless the plan was made for tensors of these shapes."""
    fits = all(n in (1, m) for n, m in zip(plan.bits.shape[:2], q.shape[:2], strict=True))
    if not fits or plan.geometry.rows != (q.shape[2], k.shape[2]):
        raise InvalidArgument(
            "[B, H, L_q, L_k]", (*q.shape[:3], k.shape[2]),
            f"{(*plan.bits.shape[:2], *plan.geometry.rows)} of the plan (B and H may be 1 there)",
            "Build a plan for these tensors; a mask needs query_length and key_length if its last "
            "tiles are short.")


def empty_like(q: torch.Tensor) -> torch.Tensor:
    """An output for q that is stored as q is: [B, H, L, D] or [B, L, H, D]."""
    if q.stride(1) < q.stride(2):
        return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return torch.empty_like(q, memory_format=torch.contiguous_format)
