"""Score and select: the plan's bits straight from the summaries.

select_kernel: one program takes BLOCK_RUNS centroids of one head and passes over all cells twice,
first for the log-sum-exp, then for the comparison; logits are never stored.

    logit = scale c.m + scale^2/2 sum_d c_d^2 s2_d,   kept unless logit < limit_c
    limit_c = lse_c + ln(threshold / L_k) - 0.001

refine_kernel, for slices below 16 keys: the same programs pass over the keys of the cells that were
kept, and keep a slice unless scale c.k < limit_c for all its keys and all the tile's centroids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..grouping import KERNEL_ROWS
from ..order import CELL, Geometry
from ..selection import log_bound
from ..settings import Settings
from ..tensors import compute_type
from .group import grouped
from .summarise import COUNTS, SQUARE, VARIANCE, on_device, position_rows, summarise

BLOCK_RUNS, BLOCK_CELLS = 64, 64
REFINE_CELLS, REFINE_STAGES = 4, 3  # of the key-by-key pass
WARPS, STAGES = 4, 2


@triton.jit
def _logits(c, c2, mean, variance, base, j, cells, scale, half, BLOCK_CELLS: tl.constexpr, D: tl.constexpr):
    cell = tl.minimum(j + tl.arange(0, BLOCK_CELLS), cells - 1)  # past the end the count is 0: no mask
    at = base + cell[:, None] * D + tl.arange(0, D)[None, :]
    m = tl.load(mean + at)
    s2 = tl.load(variance + at)
    return scale * tl.dot(c, tl.trans(m)) + half * tl.dot(c2, tl.trans(s2))


@triton.jit
def _any_run(under, T: tl.constexpr, TILE_RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """[runs, BLOCK] -> [T, BLOCK]: 1 where a run of the tile is not under its limit."""
    return tl.max(tl.reshape(1 - under.to(tl.int32), (T, TILE_RUNS, BLOCK)), 1)


@triton.jit
def _store(kept, bits, first_byte, tile, tiles, n_bytes, T: tl.constexpr, S: tl.constexpr):
    """A step's kept slices [T, S] as bits."""
    octets = tl.sum(tl.reshape(kept, (T, S // 8, 8)) << tl.arange(0, 8)[None, None, :], 2)
    byte = first_byte + tl.arange(0, S // 8)
    tl.store(bits + tile[:, None].to(tl.int64) * n_bytes + byte[None, :], octets.to(tl.uint8),
             mask=(tile[:, None] < tiles) & (byte[None, :] < n_bytes))


@triton.jit
def _total(keys, tile, queries, ROWS: tl.constexpr):
    """Scores in tiles of ROWS queries that keep so many keys, the last tile being short."""
    rows = tl.minimum(tl.maximum(queries - tile * ROWS, 0), ROWS)
    return tl.sum(keys.to(tl.int64) * rows, 0)


@triton.jit(do_not_specialize=["stride_counts_b", "stride_widths_b", *COUNTS])
def select_kernel(
    centroid, square, mean, variance, counts, widths, always, limits, bits, requested,
    stride_always, stride_counts_b, stride_widths_b, heads, queries, runs, cells, tiles, slices, n_bytes,
    scale, half, bound, BLOCK_RUNS: tl.constexpr, BLOCK_CELLS: tl.constexpr, D: tl.constexpr,
    TILE_RUNS: tl.constexpr, SPAN: tl.constexpr,
):
    """TILE_RUNS: runs of a mask tile; SPAN: cells of a slice."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    run = block * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    at = (head * runs + run[:, None]) * D + tl.arange(0, D)[None, :]
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
        # Finite, so that there is no inf - inf, but for a NaN, which keeps; an empty cell adds -inf.
        logits = tl.minimum(logits, 3e38, propagate_nan=tl.PropagateNan.ALL) + tl.log(n)[None, :]
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(logits - m_new[:, None]), 1)
        m_i = m_new
    limit = m_i + tl.log(l_i) + bound
    tl.store(limits + head * runs + run, limit, mask=run < runs)

    T: tl.constexpr = BLOCK_RUNS // TILE_RUNS  # mask tiles of this program
    S: tl.constexpr = BLOCK_CELLS // SPAN  # slices of a step
    tile = block * T + tl.arange(0, T)
    bits += head * tiles * n_bytes
    asked = tl.zeros([T], tl.int32)
    for j in range(0, cells, BLOCK_CELLS):
        logits = _logits(c, c2, mean, variance, base, j, cells, scale, half, BLOCK_CELLS, D)
        cell = j + tl.arange(0, BLOCK_CELLS)
        n = tl.load(counts + cell, mask=cell < cells, other=0)
        under = (logits < limit[:, None]) | (run[:, None] >= runs)  # a NaN is not under
        kept = _any_run(under, T, TILE_RUNS, BLOCK_CELLS)
        forced = tl.load(always + tile[:, None] * stride_always + cell[None, :],
                         mask=(tile[:, None] < tiles) & (cell[None, :] < stride_always), other=0)
        kept = tl.where(n[None, :] > 0, kept | forced.to(tl.int32), 0)
        kept = tl.max(tl.reshape(kept, (T, S, SPAN)), 2)
        part = j // SPAN + tl.arange(0, S)
        width = tl.load(widths + part, mask=part < slices, other=0).to(tl.int32)
        asked += tl.sum(kept * width[None, :], 1)
        _store(kept, bits, j // SPAN // 8, tile, tiles, n_bytes, T, S)
    tl.store(requested + head * tl.num_programs(0) + block, _total(asked, tile, queries, TILE_RUNS * 16))


@triton.jit(do_not_specialize=COUNTS)
def refine_kernel(
    centroid, k, rows, always, limits, order, cell_bits, bits, requested, executed,
    stride_always, stride_kb, stride_kh, stride_kl, stride_rows_b, heads, queries, runs, cells, tiles,
    cell_bytes, n_bytes, scale, BLOCK_RUNS: tl.constexpr, BLOCK_CELLS: tl.constexpr, D: tl.constexpr,
    TILE_RUNS: tl.constexpr, JOINED: tl.constexpr, N: tl.constexpr,
):
    """Runs are taken in their order of execution (None: as they come).

    `cell_bits`: kept cells of each mask tile. BLOCK_CELLS: cells of a step, 16 keys each. JOINED: mask
    tiles that are executed together.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    place = block * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    T: tl.constexpr = BLOCK_RUNS // TILE_RUNS
    E: tl.constexpr = T // JOINED
    tile_place = block * T + tl.arange(0, T)
    run, tile = place, tile_place
    if order is not None:
        order += head * runs
        run = tl.load(order + place, mask=place < runs, other=0)
        tile = tl.load(order + tile_place * TILE_RUNS, mask=tile_place < tiles, other=0) // TILE_RUNS
    dim = tl.arange(0, D)
    c = tl.load(centroid + (head * runs + run[:, None]) * D + dim[None, :],
                mask=place[:, None] < runs, other=0.0)
    limit = tl.load(limits + head * runs + run, mask=place < runs, other=0.0)
    k += head // heads * stride_kb + head % heads * stride_kh
    rows += head // heads * stride_rows_b
    KEYS: tl.constexpr = BLOCK_CELLS * 16
    S: tl.constexpr = KEYS // N
    joined = block * E + tl.arange(0, E)
    joined_tiles = tl.cdiv(tiles, JOINED)
    bits += head * joined_tiles * n_bytes
    cell_bits += (head * tiles + tile[:, None]) * cell_bytes
    asked = tl.zeros([T], tl.int32)
    done = tl.zeros([E], tl.int32)
    for j in range(0, cells, BLOCK_CELLS):
        key = j * 16 + tl.arange(0, KEYS)
        cell = key // 16
        inside = (tile_place[:, None] < tiles) & (cell[None, :] < cells)
        octet = tl.load(cell_bits + (cell // 8)[None, :], mask=inside, other=0).to(tl.int32)
        in_kept_cell = (octet >> (cell % 8)[None, :]) & 1
        row = tl.load(rows + key, mask=cell < cells, other=-1)
        keys = tl.load(k + row.to(tl.int64)[:, None] * stride_kl + dim[None, :], mask=row[:, None] >= 0,
                       other=0.0)
        scores = scale * tl.dot(c, tl.trans(keys))
        under = (scores < limit[:, None]) | (place[:, None] >= runs)
        forced = tl.load(always + tile[:, None] * stride_always + cell[None, :], mask=inside, other=0)
        kept = (_any_run(under, T, TILE_RUNS, KEYS) | forced.to(tl.int32)) & in_kept_cell
        exists = (row >= 0).to(tl.int32)
        kept = tl.max(tl.reshape(kept * exists[None, :], (T, S, N)), 2)
        width = tl.sum(tl.reshape(exists, (S, N)), 1)
        asked += tl.sum(kept * width[None, :], 1)
        kept = tl.max(tl.reshape(kept, (E, JOINED, S)), 1)
        done += tl.sum(kept * width[None, :], 1)
        _store(kept, bits, j * 16 // N // 8, joined, joined_tiles, n_bytes, E, S)
    tl.store(requested + head * tl.num_programs(0) + block,
             _total(asked, tile_place, queries, TILE_RUNS * 16))
    tl.store(executed + head * tl.num_programs(0) + block,
             _total(done, joined, queries, JOINED * TILE_RUNS * 16))


def plan_bits(q, k, geo: Geometry, valid: torch.Tensor | None, settings: Settings, scale: float):
    """Bits and score counts of a plan.

    Args:
        q: [B, H, L_q, D]; k: [B, H, L_k, D]; any outer strides, neither empty.
        valid: None or bool [B, L_k], in the order.

    Returns:
        bits, requested, executed and run_order of a SparsePlan.
    """
    (batch, heads, queries, dim), device = q.shape, q.device
    q, k = (x.to(compute_type(x)) for x in (q, k))
    key_rows = position_rows(geo.key_tokens, valid)
    centroid, square = summarise(q, position_rows(geo.query_tokens), SQUARE)
    mean, variance = summarise(k, key_rows, VARIANCE)
    counts = (key_rows >= 0).view(len(key_rows), -1, CELL).sum(2, dtype=torch.int32)
    (runs, cells), m, n = (centroid.shape[1], counts.shape[1]), settings.tile_queries, settings.tile_keys
    always = geo.always_kept(m).view(torch.uint8)
    blocks, tiles = triton.cdiv(runs, BLOCK_RUNS), len(always)
    requested = torch.empty(batch, heads, blocks, dtype=torch.int64, device=device)
    limits = torch.empty(batch * heads, runs, dtype=torch.float32, device=device)
    common = {"BLOCK_RUNS": BLOCK_RUNS, "D": dim, "TILE_RUNS": m // CELL}

    def packed(rows: int, slices: int) -> torch.Tensor:
        shape = batch, heads, triton.cdiv(queries, rows), triton.cdiv(slices, 8)
        return torch.empty(shape, dtype=torch.uint8, device=device)

    span = max(1, n // CELL)
    widths = torch.nn.functional.pad(counts, (0, -cells % span)).view(len(counts), -1, span)
    widths = widths.sum(2, dtype=torch.int32)
    bits, order = packed(m, widths.shape[1]), None
    with on_device(q):
        select_kernel[(blocks, batch * heads)](
            centroid, square, mean, variance, counts, widths, always, limits, bits, requested,
            always.stride(0), *(x.stride(0) if len(x) > 1 else 0 for x in (counts, widths)),
            heads, queries, runs, cells, tiles, widths.shape[1], bits.shape[3], scale, scale * scale / 2,
            log_bound(settings.threshold, len(geo.key_tokens)),
            BLOCK_CELLS=BLOCK_CELLS, SPAN=span, num_warps=WARPS, num_stages=STAGES, **common)
        del square, mean, variance  # room for the groups' lists
        cell_bits, executed = bits, requested
        if m < KERNEL_ROWS:
            bits, executed, order = grouped(bits, widths, m, queries)
        if n < CELL:
            rows = max(m, KERNEL_ROWS)
            bits, executed = packed(rows, triton.cdiv(len(geo.key_tokens), n)), torch.empty_like(requested)
            refine_kernel[(blocks, batch * heads)](
                centroid, k, key_rows, always, limits, order, cell_bits, bits, requested, executed,
                always.stride(0), *k.stride()[:3], key_rows.stride(0) if len(key_rows) > 1 else 0,
                heads, queries, runs, cells, tiles, cell_bits.shape[3], bits.shape[3], scale,
                BLOCK_CELLS=REFINE_CELLS, JOINED=rows // m, N=n, num_warps=WARPS, num_stages=REFINE_STAGES,
                **common)
    return bits, requested.sum(2).double(), executed.sum(2).double(), order
