"""Tail: what a tile skips still counts, by key cell, and is shared by the 16 rows of a query cell.

For centroid c every cell adds weight n_r * exp(scale * c.m) with value mean(v): m and mean(v) over
the cell's valid keys, n_r the number of them that the tile does not execute. What is not finite in c and m
is 0: the rows of a query cell share c, and rows that are finite stay so.
"""

from __future__ import annotations

import torch

from ...call import Call, needed
from ...layout import CELL
from ...plan import SparsePlan, of_heads
from ...tensors import head_chunks, ordered
from .scoring import cell_logits, summarise


def tail(call: Call, plan: SparsePlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The skipped keys' partial softmax of each query cell, in the order of execution.

    Returns:
        out [B, H, query cells, D]; log-sum-exp [B, H, query cells], -inf where nothing is skipped; both fp32
        (float64 for float64).
    """
    q, k, v = call.q, call.k, needed(call.v)
    batch, heads, _, dim = q.shape
    queries, keys = plan.queries, plan.keys
    query_cells, key_cells = -(-queries // CELL), -(-keys // CELL)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, heads, query_cells, dim, dtype=wide, device=q.device)
    lse = torch.empty(batch, heads, query_cells, dtype=wide, device=q.device)
    elements = max(queries * dim, keys * dim, query_cells * key_cells, -(-queries // plan.tile_rows) * keys)
    query_tokens = plan.query_tokens
    for b, part in head_chunks(batch, heads, elements):
        rows = ordered(q, b, part, of_heads(query_tokens, b, part))
        query_mean, _, _ = summarise(rows)
        valid = plan.valid_keys(b)
        key_mean, _, count = summarise(ordered(k, b, part, plan.geometry.key_tokens), valid)
        value_mean, _, _ = summarise(ordered(v, b, part, plan.geometry.key_tokens), valid)
        query_mean, key_mean = (x.nan_to_num_(0.0, 0.0, 0.0) for x in (query_mean, key_mean))
        logits = cell_logits(query_mean, key_mean, None, plan.softmax_scale(dim), rows.dtype)
        skipped = (count - plan.executed_keys(b, part)).to(wide)
        logits += skipped.log().repeat_interleave(plan.tile_rows // CELL, 1)[:, :query_cells]
        lse[b, part] = total = torch.logsumexp(logits, 2)
        weights = (logits - total.masked_fill(total == -torch.inf, 0)[..., None]).exp_()
        out[b, part] = torch.bmm(weights, value_mean.to(rows.dtype).to(wide))
    return out, lse
