"""Attend in plain PyTorch: any device, any head size, one executed tile at a time.

Keys and values of a tile are gathered and the softmax is computed in fp32 (float64 for float64), so
that no temporary is larger than tile rows x L_k.
"""

from __future__ import annotations

import torch

from ...call import Call, needed
from ...layout import CELL
from ...plan import SparsePlan, of_heads
from ...tensors import ordered
from ..base import Tail


def attend(call: Call, plan: SparsePlan, tail: Tail | None, out: torch.Tensor) -> None:
    """Write softmax over the plan's keys, and the tail if there is one, to out."""
    q, k, v = call.q, call.k, needed(call.v)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query_tokens, key_tokens = plan.query_tokens, plan.geometry.key_tokens
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            one = slice(h, h + 1)
            tokens = of_heads(query_tokens, b, one)[0]
            rows = ordered(q, b, one, tokens)[0].to(wide) * plan.softmax_scale(q.shape[3])
            keys, values = (ordered(x, b, one, key_tokens)[0].to(wide) for x in (k, v))
            if tail is None:
                tail_out, tail_lse = torch.zeros_like(rows), rows.new_full((len(rows), 1), -torch.inf)
            else:
                given = tail[0][b, h], tail[1][b, h, :, None]
                tail_out, tail_lse = (x.repeat_interleave(CELL, 0)[: len(rows)] for x in given)
            result = torch.empty_like(rows)
            for tile, kept in enumerate(plan.kept_keys(b, one)[0]):
                mine = slice(tile * plan.tile_rows, (tile + 1) * plan.tile_rows)
                result[mine] = _tile(rows[mine], keys, values, kept, tail_out[mine], tail_lse[mine])
            out[b, h, tokens] = result.to(out.dtype)


def _tile(q, k, v, kept, tail_out, tail_lse):
    """One tile: q [M, D] already scaled; k, v [L_k, D]; kept [L_k]; tail [M, D] and [M, 1] -> [M, D]."""
    listed = kept.nonzero()[:, 0]
    scores = q @ k[listed].T
    peak = tail_lse
    if len(listed):
        peak = torch.maximum(peak, scores.amax(1, keepdim=True))
    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # nothing at all: zeros
    weights = scores.sub_(peak).exp_()
    share = (tail_lse - peak).exp()
    total = weights.sum(1, keepdim=True) + share
    return (weights @ v[listed] + share * tail_out) / total.masked_fill(total == 0, 1.0)
