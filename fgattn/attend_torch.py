"""Attend in plain PyTorch: any device, any head size, bounded memory.

Per head, tiles with about equally many kept keys are computed together: keys and values are
gathered to the widest list of the group, the rest is masked. Everything accumulates in fp32.
"""

from __future__ import annotations

import torch

from .order import CELL
from .plan import SparsePlan
from .tensors import CHUNK_ELEMENTS, ordered


def attend_torch(q, k, v, plan: SparsePlan, tail, out: torch.Tensor) -> None:
    """Write softmax over the plan's keys (and `tail` = (out, lse) of pooled_tail, or None) to out."""
    batch, heads = q.shape[:2]
    for b in range(batch):
        for h in range(heads):
            one = slice(h, h + 1)
            rows = [ordered(x, b, one, t)[0] for x, t in (
                (q, plan.geometry.query_tokens), (k, plan.geometry.key_tokens), (v, plan.geometry.key_tokens))]
            pooled = None if tail is None else tuple(x[b, h] for x in tail)
            result = _head(*rows, plan.kept_keys(b, one)[0], plan, pooled)
            out[b, h, plan.geometry.query_tokens] = result.to(out.dtype)


def _head(q, k, v, kept, plan: SparsePlan, tail):
    """q [L_q, D], k, v [L_k, D] in the order; kept [tiles, L_k] -> [L_q, D] in the wide type."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    tiles, rows = kept.shape[0], plan.tile_rows
    queries, dim = q.shape
    q = torch.nn.functional.pad(q.to(wide) * plan.softmax_scale(dim), (0, 0, 0, tiles * rows - queries))
    q, k, v = q.view(tiles, rows, dim), k.to(wide), v.to(wide)
    out = torch.empty_like(q)
    counts = kept.sum(1)
    by_count = counts.argsort()
    widths = counts[by_count].tolist()
    last = tiles
    while last:
        width = max(1, widths[last - 1])
        first = max(0, last - max(1, CHUNK_ELEMENTS // (width * (rows + 2 * dim))))
        group = by_count[first:last]
        index, real = _padded_lists(kept[group], width)
        scores = torch.bmm(q[group], k[index].transpose(1, 2)).masked_fill_(~real[:, None], -torch.inf)
        peak = scores.amax(2, keepdim=True)
        if tail is not None:
            runs = group[:, None] * (rows // CELL) + torch.arange(rows, device=q.device) // CELL
            runs = runs.clamp(max=len(tail[1]) - 1)
            tail_peak = tail[1][runs][..., None]
            peak = torch.maximum(peak, tail_peak)
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        weights = (scores - peak).exp_()
        total = weights.sum(2, keepdim=True)
        result = torch.bmm(weights, v[index]).masked_fill_(~real[:, :1, None], 0.0)  # empty lists
        if tail is not None:
            share = (tail_peak - peak).exp()
            total = total + share
            result += share * tail[0][runs]
        out[group] = result / total.masked_fill(total == 0, 1.0)
        last = first
    return out.view(-1, dim)[:queries]


def _padded_lists(kept: torch.Tensor, width: int):
    """Positions of the set entries of each row, [n, width] int64, and which of them are real.

    Padding repeats the row's first entry, so that it never reads a row that is not kept.
    """
    row, key = kept.nonzero(as_tuple=True)
    index = kept.to(torch.uint8).argmax(1, keepdim=True).repeat(1, width)
    place = kept.cumsum(1) - 1
    index[row, place[row, key]] = key
    real = torch.arange(width, device=kept.device) < kept.sum(1)[:, None]
    return index, real
