"""Attention: what a caller of the library needs, from tensors to the output."""

from __future__ import annotations

import torch

from .backends import execute
from .backends.base import Planned
from .backends.registry import required
from .call import Call
from .errors import InvalidArgument
from .layout import TokenLayout
from .plan import SparsePlan
from .planning import parts_for
from .settings import Settings
from .tensors import check_tensor, empty_like, unwritable


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: SparsePlan,
    *,
    impl: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v over the keys of the plan, plus its tail.

    Args:
        q: [B, H, L_q, D]; k, v: [B, H, L_k, D]; any outer strides, last stride 1, rows 16-byte
            aligned. fp16, bf16, fp32 (triton and hopper compute it in bf16 on a GPU), or float64
            (reference and torch).
        plan: made for these shapes.
        impl: name of a backend: "hopper" (compute capability 9.0), "triton" (GPU), "torch" (any device) or
            "reference" (the specification, slow); None takes the first of them that can run.
        out: where the result goes, of q's shape and type, stored under the same rules, in memory of its own;
            None makes it.

    Returns:
        [B, H, L_q, D] in q's dtype; stored as [B, L_q, H, D] if q is.

    Raises:
        InvalidArgument: shapes or a device that do not fit the plan, unknown impl, an `out` that cannot be
            written.
        Unsupported: this backend cannot run these tensors; the message says why. None computes gradients:
            tensors that require them are taken under `torch.no_grad()` or `torch.inference_mode()` only.
    """
    call = Call.under(plan, q, k, v)
    backend = required(call, impl)
    out = empty_like(q) if out is None else out
    check_tensor("out", out, "None makes one.")
    if (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        raise InvalidArgument(
            "out",
            (tuple(out.shape), out.dtype, out.device),
            f"{(tuple(q.shape), q.dtype, q.device)}",
            "None makes one.",
        )
    if reason := unwritable(out, (q, k, v)):
        raise InvalidArgument(
            "out", reason, "rows stored as those of q, memory of its own", "None makes one."
        )
    return execute.attend(call, backend, Planned(plan), out)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    settings: Settings,
    layout: TokenLayout,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """build_plan and attend, for a part of the heads at a time; arguments, result and errors as there."""
    check_tensor("v", v, "Pass tensors [B, H, L, D].")
    call = Call.to_plan(q, k, v, settings, layout, scale)
    backend = required(call, impl)
    out = empty_like(q)
    for heads, part in call.in_parts(parts_for(call)):
        planned = execute.plan_of(part, backend)
        execute.attend(part, backend, planned, out[:, heads])
        del planned  # the next part's shall have its room
    return out
