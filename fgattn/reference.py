"""The specification: selection, tail and attention in plain code with dense masks, for short inputs.

Means are summed in fp32 and rounded to the tensors' type as everywhere; all else is float64.
float64 tensors are never rounded. What is not finite in means of queries and keys is 0 in the tail.
"""

from __future__ import annotations

import math

import torch

from .layout import CELL, TokenLayout, geometry
from .plan import SparsePlan, of_heads
from .settings import Settings
from .tensors import compute_type


def select(
    q: torch.Tensor, k: torch.Tensor, settings: Settings, layout: TokenLayout, scale: float | None = None
) -> torch.Tensor:
    """How far each slice is above its tile's threshold (the default method), float64 [B, H, tiles, slices].

    A slice is requested where this is >= 0: +inf for what is always kept, -inf for slices without
    valid keys. Implementations may differ where it lies within 1e-4 of 0.
    """
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    m, n = settings.tile_queries, settings.tile_keys
    scale = dim**-0.5 if scale is None else scale
    geo = geometry(layout, settings.order, queries, q.device)
    queries, keys = len(geo.query_tokens), len(geo.key_tokens)
    valid = torch.ones(batch, keys, dtype=torch.bool, device=q.device)
    if layout.key_valid is not None:
        valid = layout.key_valid.to(q.device)[:, geo.key_tokens]
    result = q.new_full((batch, heads, -(-queries // m), -(-keys // n)), -math.inf, dtype=torch.float64)
    theta = math.log(settings.threshold) if settings.threshold else -math.inf
    for b in range(batch):
        for h in range(heads):
            rows, key_rows = q[b, h, geo.query_tokens], k[b, h, geo.key_tokens]
            centroids = _cells(rows, torch.ones_like(rows[:, 0], dtype=torch.bool))[0]
            means, variances, counts = _cells(key_rows, valid[b])
            real = counts > 0
            logits = scale * _rounded(centroids, q) @ _rounded(means, q).T
            logits += scale**2 / 2 * (_rounded(centroids.square(), q) @ _rounded(variances, q).T)
            lse = torch.logsumexp(logits[:, real] + counts[real].double().log(), 1)
            bound = lse + theta - math.log(max(keys, 1)) - 1e-3
            above_cell = _nan_keeps(logits - bound[:, None])
            key_scores = scale * _rounded(centroids, q) @ key_rows.to(compute_type(q)).double().T
            above_key = _nan_keeps(key_scores - bound[:, None])
            for tile in range(result.shape[2]):
                query_cell = slice(tile * m // CELL, (tile + 1) * m // CELL)
                query = slice(tile * m, (tile + 1) * m)
                cell = above_cell[query_cell].amax(0)
                always = geo.sink_cell.clone()
                always[geo.own_cell[query][geo.own_cell[query] >= 0]] = True
                if geo.sink_query[query].any():
                    always[:] = True
                cell[always] = math.inf
                above = cell.repeat_interleave(CELL)[:keys]
                if n < CELL:
                    key = above_key[query_cell].amax(0)
                    key[always.repeat_interleave(CELL)[:keys]] = math.inf
                    above = torch.minimum(above, key)
                above = above.masked_fill(~valid[b], -math.inf)
                for i, part in enumerate(above.split(n)):
                    result[b, h, tile, i] = part.max()
    return result


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SparsePlan) -> torch.Tensor:
    """Attention over the plan's keys and tail, [B, H, L_q, D] in q's dtype."""
    out = torch.zeros_like(q)
    scale = plan.softmax_scale(q.shape[3])
    for b in range(q.shape[0]):
        valid = plan.valid_keys(b)
        if valid is None:
            valid = torch.ones(plan.keys, dtype=torch.bool, device=q.device)
        for h in range(q.shape[1]):
            kept = plan.kept_keys(b, slice(h, h + 1))[0]
            tokens = of_heads(plan.query_tokens, b, slice(h, h + 1))[0]
            rows = q[b, h, tokens]
            keys, values = (x[b, h, plan.geometry.key_tokens] for x in (k, v))
            mask = kept.repeat_interleave(plan.tile_rows, 0)[: len(rows)]
            # Each row: its kept keys, then one entry per cell for what is skipped.
            scores = scale * rows.double() @ keys.double().T
            scores = scores.masked_fill(~mask, -math.inf)
            entries = values.double()
            if plan.tail and plan.keys:
                centroids = _cells(rows, torch.ones_like(rows[:, 0], dtype=torch.bool))[0]
                means, _, counts = _cells(keys, valid)
                skipped = counts - torch.stack([c.sum(1) for c in mask.split(CELL, 1)], 1)
                tail = scale * _rounded(_finite(centroids), q) @ _rounded(_finite(means), q).T
                tail = tail.repeat_interleave(CELL, 0)[: len(rows)]
                tail = torch.where(skipped > 0, tail + skipped.double().log(), -math.inf)
                scores = torch.cat((scores, tail), 1)
                entries = torch.cat((entries, _rounded(_cells(values, valid)[0], q)))
            # Rows without any entry are zero; entries that do not count must not spread what is not finite.
            weights = torch.softmax(scores, 1).masked_fill(scores == -math.inf, 0.0)
            result = torch.zeros_like(rows, dtype=torch.float64)
            for tile in torch.arange(len(rows), device=q.device).split(plan.tile_rows):
                counts = (scores[tile] != -math.inf).any(0)
                result[tile] = weights[tile][:, counts] @ entries[counts]
            out[b, h, tokens] = result.to(q.dtype)
    return out


def _cells(rows: torch.Tensor, valid: torch.Tensor):
    """Mean and biased variance [runs, D] over the valid rows of cells of 16, and their number."""
    rows = rows if rows.dtype == torch.float64 else rows.to(compute_type(rows)).float()
    means, variances, counts = [], [], []
    for cell, ok in zip(rows.split(CELL), valid.split(CELL), strict=True):
        cell = cell[ok]
        mean = cell.sum(0) / max(1, len(cell))
        means.append(mean)
        variances.append((cell - mean).square().sum(0) / max(1, len(cell)))
        counts.append(len(cell))
    return torch.stack(means), torch.stack(variances), torch.tensor(counts, device=rows.device)


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def _rounded(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.to(compute_type(like)).double()


def _nan_keeps(difference: torch.Tensor) -> torch.Tensor:
    return difference.masked_fill(difference.isnan(), math.inf)
