"""Summarise: means (and variances) of runs of 16 rows, gathered through the order.

One program reads RUNS runs of one head once, in fp32; nothing but the summaries is written.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from ..order import CELL

RUNS = 16  # runs of a program
NOTHING, SQUARE, VARIANCE = 0, 1, 2  # what is wanted beside the mean
# Arguments that Triton shall not compile variants for (being 1, or divisible by 16): each video length and
# number of heads would cost its own seconds.
COUNTS = [
    "heads", "first", "queries", "keys", "tiles", "units", "runs", "cells", "slices", "span", "n_bytes",
    "cell_bytes"]


@triton.jit(do_not_specialize=COUNTS)
def summarise_kernel(
    x, rows, mean, second, stride_b, stride_h, stride_l, stride_rows_b, heads, runs,
    RUNS: tl.constexpr, D: tl.constexpr, SECOND: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    dim = tl.arange(0, D)
    x += b * stride_b + h * stride_h
    rows += b * stride_rows_b
    n = tl.zeros([RUNS], tl.float32)
    total = tl.zeros([RUNS, D], tl.float32)
    shifted = tl.zeros([RUNS, D], tl.float32)  # relative to the run's first row: no cancellation
    squares = tl.zeros([RUNS, D], tl.float32)
    origin = tl.zeros([RUNS, D], tl.float32)
    for i in tl.static_range(16):
        row = tl.load(rows + run * 16 + i, mask=run < runs, other=-1)
        exists = row[:, None] >= 0
        at = x + row.to(tl.int64)[:, None] * stride_l + dim[None, :]
        value = tl.load(at, mask=exists, other=0.0).to(tl.float32)
        n += (row >= 0).to(tl.float32)
        total += value
        if SECOND == 2:
            if i == 0:
                origin = value
            value = tl.where(exists, value - origin, 0.0)
            shifted += value
            squares += value * value
    n = tl.maximum(n, 1.0)[:, None]
    average = total / n
    at = (head * runs + run[:, None]) * D + dim[None, :]
    tl.store(mean + at, average.to(mean.dtype.element_ty), mask=run[:, None] < runs)
    if SECOND == 1:
        tl.store(second + at, (average * average).to(mean.dtype.element_ty), mask=run[:, None] < runs)
    if SECOND == 2:
        shifted = shifted / n
        variance = tl.maximum(squares / n - shifted * shifted, 0.0)
        # overflow and NaN stay; an infinite mean has no variance
        variance = tl.where(squares < float("inf"), variance, squares + (total - total))
        tl.store(second + at, variance.to(mean.dtype.element_ty), mask=run[:, None] < runs)


def on_device(x: torch.Tensor):
    """Context in which Triton launches on x's GPU; nothing in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def batch_stride(x: torch.Tensor) -> int:
    """Stride of the first dimension of a table; 0 where one row serves all of the batch."""
    return x.stride(0) if len(x) > 1 else 0


def position_rows(tokens: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Row at each position of the order, -1 for invalid ones and past the end; int32 [B or 1, runs * 16].

    Args:
        tokens: [L], row at each position.
        valid: None or bool [B, L], in the order.
    """
    rows = _rows(tokens)
    return rows if valid is None else rows.masked_fill(~pad(valid, (0, rows.shape[1] - valid.shape[1])), -1)


@functools.lru_cache(maxsize=64)
def _rows(tokens: torch.Tensor) -> torch.Tensor:
    return pad(tokens.to(torch.int32)[None], (0, -len(tokens) % CELL), value=-1)


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
            x, rows, mean, other, *x.stride()[:3], batch_stride(rows), heads, runs,
            RUNS=RUNS, D=dim, SECOND=second, num_warps=4)
    return mean, other
