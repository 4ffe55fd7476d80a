"""Tail: what a tile skips still counts, pooled by cell and shared by the 16 rows of a run.

For centroid c every cell adds weight n_r * exp(scale * c.m) with value mean(v): m and mean(v) over
the cell's valid keys, n_r the number of them that the tile does not execute.
"""

from __future__ import annotations

import torch

from ...layout import CELL
from ...plan import SparsePlan, of_heads
from ...tensors import head_chunks, ordered
from .scoring import cell_logits, summarise


def pooled_tail(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SparsePlan):
    """The skipped keys' partial softmax per run of 16 queries, in the order of execution.

    Args:
        q, k, v: [B, H, L, D] as for `attend`, neither side empty.

    Returns:
        out [B, H, runs, D]; log-sum-exp [B, H, runs], -inf where nothing is skipped; both fp32
        (float64 for float64).
    """
    batch, heads, _, dim = q.shape
    queries, keys = plan.queries, plan.keys
    runs, cells = -(-queries // CELL), -(-keys // CELL)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, heads, runs, dim, dtype=wide, device=q.device)
    lse = torch.empty(batch, heads, runs, dtype=wide, device=q.device)
    elements = max(queries * dim, keys * dim, runs * cells, -(-queries // plan.tile_rows) * keys)
    query_tokens = plan.query_tokens
    for b, group in head_chunks(batch, heads, elements):
        rows = ordered(q, b, group, of_heads(query_tokens, b, group))
        query_mean, _, _ = summarise(rows)
        valid = plan.valid_keys(b)
        key_mean, _, count = summarise(ordered(k, b, group, plan.geometry.key_tokens), valid)
        value_mean, _, _ = summarise(ordered(v, b, group, plan.geometry.key_tokens), valid)
        logits = cell_logits(query_mean, key_mean, None, plan.softmax_scale(dim), rows.dtype)
        skipped = (count - plan.executed_keys(b, group)).to(wide)
        logits += skipped.log().repeat_interleave(plan.tile_rows // CELL, 1)[:, :runs]
        lse[b, group] = total = torch.logsumexp(logits, 2)
        weights = (logits - total.masked_fill(total == -torch.inf, 0)[..., None]).exp_()
        out[b, group] = torch.bmm(weights, value_mean.to(rows.dtype).to(wide))
    return out, lse
