"""Summaries of cells: means (and second moments) of 16 rows of q, k or v each, gathered through the order.

One launch reads each tensor once. A program has CHANNELS / D cells of one head, all of whose loads are under
way together. Sums are fp32; nothing but the summaries is written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...call import Call, needed
from ...layout import CELL
from ..base import Planned, Tail
from .launch import COUNTS, batch_and_head, key_rows, query_rows, shared_stride
from .prepared import launch_kernel

CHANNELS = 1024  # of a program, all its cells together: eight a thread


class Summaries(NamedTuple):
    """Of cells of 16 queries and cells of 16 keys, in the compute type; None where it was not asked for.

    | field | shape | meaning |
    |---|---|---|
    | centroid, square | [B * H, query_cells, D] | mean of a cell's queries, and its square |
    | mean, variance | [B * H, key_cells, D] | mean and biased variance of a cell's keys |
    | value | [B * H, key_cells, D] | mean of a cell's values |
    """

    centroid: torch.Tensor | None = None
    square: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    value: torch.Tensor | None = None


class Means(NamedTuple):
    """What a tail is made from: fields as in Summaries, all there."""

    centroid: torch.Tensor
    mean: torch.Tensor
    value: torch.Tensor


@triton.jit
def _moments(
    x,
    rows,
    average,
    second,
    head,
    cells,
    stride_l,
    CELLS: tl.constexpr,
    D: tl.constexpr,
    SQUARE: tl.constexpr,
    VARIANCE: tl.constexpr,
):
    """Summaries of CELLS of a head's `cells`: `average`, and its square or the variance as `second`.

    x: [L, D] with distance stride_l; rows: int32 [cells * 16], a row of x or -1; average, second: [B * H,
    cells, D]. A cell without rows has zeros.
    """
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    dim = tl.arange(0, D)
    loaded, there = (), ()
    for i in tl.static_range(16):
        row = tl.load(rows + cell * 16 + i, mask=cell < cells, other=-1)
        at = x + row.to(tl.int64)[:, None] * stride_l + dim[None, :]
        loaded += (tl.load(at, mask=row[:, None] >= 0, other=0.0),)
        there += (row >= 0,)
    n = tl.zeros([CELLS], tl.float32)
    total = tl.zeros([CELLS, D], tl.float32)
    shifted = tl.zeros([CELLS, D], tl.float32)  # relative to the cell's first row: no cancellation
    squares = tl.zeros([CELLS, D], tl.float32)
    origin = loaded[0].to(tl.float32)
    for i in tl.static_range(16):
        value = loaded[i].to(tl.float32)
        n += there[i].to(tl.float32)
        total += value
        if VARIANCE:
            value = tl.where(there[i][:, None], value - origin, 0.0)
            shifted += value
            squares += value * value
    n = tl.maximum(n, 1.0)[:, None]
    mean = total / n
    at = (head * cells + cell[:, None]) * D + dim[None, :]
    tl.store(average + at, mean.to(average.dtype.element_ty), mask=cell[:, None] < cells)
    if SQUARE:
        tl.store(second + at, (mean * mean).to(average.dtype.element_ty), mask=cell[:, None] < cells)
    if VARIANCE:
        shifted = shifted / n
        variance = tl.maximum(squares / n - shifted * shifted, 0.0)
        # overflow and NaN stay; an infinite mean has no variance
        variance = tl.where(squares < float("inf"), variance, squares + (total - total))
        tl.store(second + at, variance.to(average.dtype.element_ty), mask=cell[:, None] < cells)


@triton.jit(do_not_specialize=COUNTS)
def summarise_kernel(
    q,
    k,
    v,
    query_rows,
    key_rows,
    centroid,
    square,
    mean,
    variance,
    value,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_rows_b,
    heads,
    query_cells,
    key_cells,
    first_tensor,
    CELLS: tl.constexpr,
    D: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Means of the cells of v, q and k; with SECOND also the squares of those of q and the variances of k.

    Launched by `summarise`. Grid: (programs of CELLS cells of the longer side, B * H, tensors), where the
    third axis counts v, q, k from `first_tensor` on.

    Reads
        q, k, v: [B, H, L, D], 16 or 32 bits, the channels of a row next to each other.
        query_rows: int32 [1, query_cells * 16]; key_rows: int32 [B or 1, key_cells * 16]; -1: none.
    Writes
        the fields of Summaries, in the type of q, k and v.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = batch_and_head(tl.program_id(1), heads)
    key_rows += b * stride_rows_b
    which = first_tensor + tl.program_id(2)
    if which == 0:
        _moments(
            v + b * stride_vb + h * stride_vh,
            key_rows,
            value,
            value,
            head,
            key_cells,
            stride_vl,
            CELLS,
            D,
            False,
            False,
        )
    elif which == 1:
        _moments(
            q + b * stride_qb + h * stride_qh,
            query_rows,
            centroid,
            square,
            head,
            query_cells,
            stride_ql,
            CELLS,
            D,
            SECOND,
            False,
        )
    else:
        _moments(
            k + b * stride_kb + h * stride_kh,
            key_rows,
            mean,
            variance,
            head,
            key_cells,
            stride_kl,
            CELLS,
            D,
            False,
            SECOND,
        )


def summarise(q, k, v, query_rows: torch.Tensor, key_rows: torch.Tensor, second: bool = False) -> Summaries:
    """Summaries of q and k, of v, or of all three, in one launch. A cell without rows has zeros.

    Args:
        q, k, v: [B, H, L, D] of one type, any outer strides; q and k, or v, may be None.
        query_rows: int32 [1, query_cells * 16]: row of q at each position, -1 for none.
        key_rows: int32 [B or 1, key_cells * 16], of k and v.
        second: squares of the centroids and variances of the keys too.
    """
    x = v if q is None else q
    batch, heads, _, dim = x.shape
    query_cells, key_cells = query_rows.shape[1] // CELL, key_rows.shape[1] // CELL

    def room(length: int, is_wanted: bool) -> torch.Tensor | None:
        return torch.empty(batch * heads, length, dim, dtype=x.dtype, device=x.device) if is_wanted else None

    planned = q is not None
    made = Summaries(
        room(query_cells, planned),
        room(query_cells, planned and second),
        room(key_cells, planned),
        room(key_cells, planned and second),
        room(key_cells, v is not None),
    )
    q, k, v = (x if y is None else y for y in (q, k, v))
    tensors = (made.value is not None) + 2 * (made.centroid is not None)  # v comes first
    launch_kernel(
        summarise_kernel,
        (-(-(max(query_cells, key_cells) * dim) // CHANNELS), batch * heads, tensors),
        q,
        k,
        v,
        query_rows,
        key_rows,
        *(x if y is None else y for y in made),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        shared_stride(key_rows),
        heads,
        query_cells,
        key_cells,
        int(made.value is None),
        CELLS=CHANNELS // dim,
        D=dim,
        SECOND=second,
        num_warps=4,
    )
    return made


def tail_room(call: Call, planned: Planned) -> tuple[Means, torch.Tensor, Tail]:
    """What a tail kernel needs: means, those of the plan if it has them; rows of keys; room for the tail.

    The tail is out [B, H, query cells, D] and log-sum-exp [B, H, query cells] in fp32, not yet written.
    """
    q, k, v = call.tensors
    batch, heads, _, dim = q.shape
    rows = key_rows(call.geometry, call.key_valid)
    made: Summaries | None = planned.made
    if made is None:
        made = summarise(q, k, v, query_rows(call.geometry), rows)
    elif made.value is None:
        made = made._replace(value=summarise(None, None, v, query_rows(call.geometry), rows).value)
    means = Means(needed(made.centroid), needed(made.mean), needed(made.value))
    query_cells = -(-call.queries // CELL)
    out = torch.empty(batch, heads, query_cells, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, query_cells, dtype=torch.float32, device=q.device)
    return means, rows, (out, lse)
