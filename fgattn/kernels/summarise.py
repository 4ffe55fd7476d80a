"""Summarise: means (and variances) of runs of 16 rows, gathered through the order.

One program reads RUNS runs of one head once, in fp32; nothing but the summaries is written.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from ..order import CELL

RUNS = 4  # runs of a program
NOTHING, SQUARE, VARIANCE = 0, 1, 2  # what is wanted beside the mean


@triton.jit
def summarise_kernel(
    x, rows, mean, second, stride_b, stride_h, stride_l, stride_rows_b, heads, runs,
    RUNS: tl.constexpr, D: tl.constexpr, SECOND: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    place = block * RUNS * 16 + tl.arange(0, RUNS * 16)
    dim = tl.arange(0, D)
    row = tl.load(rows + b * stride_rows_b + place, mask=place < runs * 16, other=-1).to(tl.int64)
    value = tl.load(x + b * stride_b + h * stride_h + row[:, None] * stride_l + dim[None, :],
                    mask=row[:, None] >= 0, other=0.0).to(tl.float32)
    exists = tl.reshape((row >= 0).to(tl.float32), (RUNS, 16))
    value = tl.reshape(value, (RUNS, 16, D))
    n = tl.maximum(tl.sum(exists, 1), 1.0)[:, None]
    average = tl.sum(value, 1) / n  # [RUNS, D]
    run = block * RUNS + tl.arange(0, RUNS)
    at = (head * runs + run[:, None]) * D + dim[None, :]
    tl.store(mean + at, average.to(mean.dtype.element_ty), mask=run[:, None] < runs)
    if SECOND == 1:
        tl.store(second + at, (average * average).to(mean.dtype.element_ty), mask=run[:, None] < runs)
    if SECOND == 2:
        spread = (value - average[:, None, :]) * exists[:, :, None]
        tl.store(second + at, (tl.sum(spread * spread, 1) / n).to(mean.dtype.element_ty),
                 mask=run[:, None] < runs)


def on_device(x: torch.Tensor):
    """Context in which Triton launches on x's GPU; nothing in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def position_rows(tokens: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Row at each position of the order, -1 for invalid ones and past the end; int32 [B or 1, runs * 16].

    Args:
        tokens: [L], row at each position.
        valid: None or bool [B, L], in the order.
    """
    rows = tokens.to(torch.int32)[None]
    if valid is not None:
        rows = rows.masked_fill(~valid, -1)
    return torch.nn.functional.pad(rows, (0, -len(tokens) % CELL), value=-1)


def summarise(x: torch.Tensor, rows: torch.Tensor, second: int = NOTHING):
    """Mean of each run, and its square or the biased variance, in x's type.

    Args:
        x: [B, H, L, D], any outer strides.
        rows: int32 [B or 1, runs * 16]: row of x at each position, -1 for none.
        second: NOTHING, SQUARE or VARIANCE.

    Returns:
        mean, second (or None), both [B * H, runs, D]. A run without rows has zeros.
    """
    batch, heads, _, dim = x.shape
    runs = rows.shape[1] // CELL
    mean = torch.empty(batch * heads, runs, dim, dtype=x.dtype, device=x.device)
    other = torch.empty_like(mean) if second else None
    with on_device(x):
        summarise_kernel[(triton.cdiv(runs, RUNS), batch * heads)](
            x, rows, mean, other, *x.stride()[:3], rows.stride(0) if len(rows) > 1 else 0, heads, runs,
            RUNS=RUNS, D=dim, SECOND=second, num_warps=4)
    return mean, other
