"""Score and select: the plan's bits straight from the summaries, for slices of whole cells (N >= 16).

One program takes BLOCK_RUNS centroids of one head and passes over all cells twice: first for the
log-sum-exp, then for the comparison; logits are never stored.

    logit = scale c.m + scale^2/2 sum_d c_d^2 s2_d,   kept unless logit < lse + ln(threshold / L_k) - 0.001
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..order import CELL, Geometry
from ..plan import KERNEL_ROWS
from ..selection import log_bound
from ..settings import Settings
from ..tensors import compute_type
from .summarise import SQUARE, VARIANCE, on_device, position_rows, summarise

BLOCK_RUNS, BLOCK_CELLS = 64, 64
WARPS, STAGES = 4, 2


@triton.jit
def _logits(c, c2, mean, variance, base, j, cells, scale, half, BLOCK_CELLS: tl.constexpr, D: tl.constexpr):
    cell = j + tl.arange(0, BLOCK_CELLS)
    at = base + cell[:, None] * D + tl.arange(0, D)[None, :]
    m = tl.load(mean + at, mask=cell[:, None] < cells, other=0.0)
    s2 = tl.load(variance + at, mask=cell[:, None] < cells, other=0.0)
    return scale * tl.dot(c, tl.trans(m)) + half * tl.dot(c2, tl.trans(s2))


@triton.jit
def select_kernel(
    centroid, square, mean, variance, counts, widths, always, bits, requested, executed,
    stride_counts_b, stride_widths_b, heads, queries, runs, cells, tiles, slices, n_bytes, scale, half, bound,
    BLOCK_RUNS: tl.constexpr, BLOCK_CELLS: tl.constexpr, D: tl.constexpr,
    TILE_RUNS: tl.constexpr, JOINED: tl.constexpr, SPAN: tl.constexpr,
):
    """TILE_RUNS: runs of a mask tile; JOINED: mask tiles executed together; SPAN: cells of a slice."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    run = block * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    dim = tl.arange(0, D)
    at = (head * runs + run[:, None]) * D + dim[None, :]
    c = tl.load(centroid + at, mask=run[:, None] < runs, other=0.0)
    c2 = tl.load(square + at, mask=run[:, None] < runs, other=0.0)
    base = head * cells * D
    counts += head // heads * stride_counts_b
    widths += head // heads * stride_widths_b

    m_i = tl.full([BLOCK_RUNS], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_RUNS], tl.float32)
    for j in range(0, cells, BLOCK_CELLS):
        logits = _logits(c, c2, mean, variance, base, j, cells, scale, half, BLOCK_CELLS, D)
        cell = j + tl.arange(0, BLOCK_CELLS)
        n = tl.load(counts + cell, mask=cell < cells, other=0).to(tl.float32)
        logits += tl.log(n)[None, :]  # an empty cell has logit 0 before, -inf after
        m_new = tl.minimum(tl.maximum(m_i, tl.max(logits, 1)), 3e38)  # finite: no inf - inf
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(logits - m_new[:, None]), 1)
        m_i = m_new
    limit = m_i + tl.log(l_i) + bound

    T: tl.constexpr = BLOCK_RUNS // TILE_RUNS  # mask tiles of this program
    E: tl.constexpr = T // JOINED  # executed tiles
    S: tl.constexpr = BLOCK_CELLS // SPAN  # slices of a step
    tile = block * T + tl.arange(0, T)
    rows = tl.minimum(tl.maximum(queries - tile * TILE_RUNS * 16, 0), TILE_RUNS * 16)
    joined = block * E + tl.arange(0, E)
    most: tl.constexpr = JOINED * TILE_RUNS * 16
    joined_rows = tl.minimum(tl.maximum(queries - joined * most, 0), most)
    asked = tl.zeros([T], tl.int32)
    done = tl.zeros([E], tl.int32)
    for j in range(0, cells, BLOCK_CELLS):
        logits = _logits(c, c2, mean, variance, base, j, cells, scale, half, BLOCK_CELLS, D)
        cell = j + tl.arange(0, BLOCK_CELLS)
        n = tl.load(counts + cell, mask=cell < cells, other=0)
        under = (logits < limit[:, None]) | (run[:, None] >= runs)  # a NaN is not under
        kept = tl.max(tl.reshape(1 - under.to(tl.int32), (T, TILE_RUNS, BLOCK_CELLS)), 1)
        forced = tl.load(always + tile[:, None] * cells + cell[None, :],
                         mask=(tile[:, None] < tiles) & (cell[None, :] < cells), other=0)
        kept = tl.where(n[None, :] > 0, kept | forced.to(tl.int32), 0)
        kept = tl.max(tl.reshape(kept, (T, S, SPAN)), 2)
        part = j // SPAN + tl.arange(0, S)
        width = tl.load(widths + part, mask=part < slices, other=0).to(tl.int32)
        asked += tl.sum(kept * width[None, :], 1)
        kept = tl.max(tl.reshape(kept, (E, JOINED, S)), 1)
        done += tl.sum(kept * width[None, :], 1)
        octets = tl.sum(tl.reshape(kept, (E, S // 8, 8)) << tl.arange(0, 8)[None, None, :], 2)
        byte = j // SPAN // 8 + tl.arange(0, S // 8)
        tl.store(bits + (head * tl.cdiv(tiles, JOINED) + joined[:, None]) * n_bytes + byte[None, :],
                 octets.to(tl.uint8),
                 mask=(joined[:, None] < tl.cdiv(tiles, JOINED)) & (byte[None, :] < n_bytes))
    tl.store(requested + head * tl.num_programs(0) + block, tl.sum(asked.to(tl.int64) * rows, 0))
    tl.store(executed + head * tl.num_programs(0) + block, tl.sum(done.to(tl.int64) * joined_rows, 0))


def plan_bits(q, k, geo: Geometry, valid: torch.Tensor | None, settings: Settings, scale: float):
    """Bits and score counts of a plan, N >= 16.

    Args:
        q: [B, H, L_q, D]; k: [B, H, L_k, D]; any outer strides, neither empty.
        valid: None or bool [B, L_k], in the order.

    Returns:
        bits [B, H, executed tiles, bytes] uint8; requested, executed [B, H] float64.
    """
    (batch, heads, queries, dim), device = q.shape, q.device
    q, k = (x.to(compute_type(x)) for x in (q, k))
    key_rows = position_rows(geo.key_tokens, valid)
    centroid, square = summarise(q, position_rows(geo.query_tokens), SQUARE)
    mean, variance = summarise(k, key_rows, VARIANCE)
    counts = (key_rows >= 0).view(len(key_rows), -1, CELL).sum(2, dtype=torch.int32)
    span = settings.tile_keys // CELL
    widths = torch.nn.functional.pad(counts, (0, -counts.shape[1] % span))
    widths = widths.view(len(counts), -1, span).sum(2, dtype=torch.int32)
    always = geo.always_kept(settings.tile_queries)
    rows = max(settings.tile_queries, KERNEL_ROWS)
    n_bytes, blocks = triton.cdiv(widths.shape[1], 8), triton.cdiv(centroid.shape[1], BLOCK_RUNS)
    bits = torch.empty(batch, heads, triton.cdiv(queries, rows), n_bytes, dtype=torch.uint8, device=device)
    scores = torch.empty(2, batch, heads, blocks, dtype=torch.int64, device=device)
    with on_device(q):
        select_kernel[(blocks, batch * heads)](
            centroid, square, mean, variance, counts, widths, always.view(torch.uint8), bits, *scores,
            *(x.stride(0) if len(x) > 1 else 0 for x in (counts, widths)), heads, queries, centroid.shape[1],
            counts.shape[1], len(always), widths.shape[1], n_bytes, scale, scale * scale / 2,
            log_bound(settings.threshold, len(geo.key_tokens)),
            BLOCK_RUNS=BLOCK_RUNS, BLOCK_CELLS=BLOCK_CELLS, D=dim, TILE_RUNS=settings.tile_queries // CELL,
            JOINED=rows // settings.tile_queries, SPAN=span, num_warps=WARPS, num_stages=STAGES)
    return bits, *scores.sum(3).double()
