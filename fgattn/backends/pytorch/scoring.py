"""Summarise and score: query cells against key cells, 16 rows each.

With centroid c (mean of a query cell), key mean m and biased variance s2 per channel of a cell:
    logit = scale * c.m + scale^2 / 2 * sum_d c_d^2 s2_d        (second-order log-mean-exp)
    lse_c = log sum_cells n * exp(logit)
Means are summed in fp32; c, m, c^2 and s2 are rounded to the compute type, products add up in fp32.
float64 input stays float64 throughout.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ...layout import CELL


def summarise(x: torch.Tensor, valid: torch.Tensor | None = None, *, variance: bool = False):
    """Mean, and biased variance if asked for, of cells of 16 rows.

    Args:
        x: [G, L, D], rows in the order.
        valid: None or bool [L]; rows that count.

    Returns:
        mean, variance (or None) [G, cells, D] in fp32 (float64 for float64); count [cells] int64.
        A cell without valid rows has zeros.
    """
    heads, length, dim = x.shape
    cells = -(-length // CELL)
    counted = torch.ones(length, dtype=torch.bool, device=x.device) if valid is None else valid
    counted = pad(counted, (0, cells * CELL - length)).view(cells, CELL)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = pad(x, (0, 0, 0, cells * CELL - length)).view(heads, cells, CELL, dim).to(wide)
    if valid is not None:
        rows = rows.masked_fill_(~counted[..., None], 0.0)
    count = counted.sum(1)
    n = count.clamp(min=1)[:, None].to(wide)
    mean = rows.sum(2) / n
    if not variance:
        return mean, None, count
    rows -= mean[:, :, None]
    if valid is not None:
        rows.masked_fill_(~counted[..., None], 0.0)
    else:
        rows[:, -1:].masked_fill_(~counted[-1:, :, None], 0.0)  # only the last cell can be short
    return mean, rows.square_().sum(2) / n, count


def cell_logits(
    query_mean: torch.Tensor,
    key_mean: torch.Tensor,
    key_variance: torch.Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Logits of every query cell against every key cell, [G, query cells, key cells] in fp32 (or float64).

    Args:
        query_mean: [G, query cells, D]; key_mean, key_variance: [G, key cells, D]; None leaves that term out.
        scale: softmax scale.
        dtype: compute type that the factors are rounded to.
    """
    logits = scale * _product(query_mean, key_mean, dtype)
    if key_variance is not None:
        logits += (scale * scale / 2) * _product(query_mean.square(), key_variance, dtype)
    return logits


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.bmm(a.to(dtype).to(a.dtype), b.to(dtype).to(b.dtype).transpose(1, 2))


def log_total(logits: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """log sum_j count_j exp(logits_j), [G, query cells]; cells without keys do not count."""
    return torch.logsumexp(logits + count.to(logits.dtype).log(), dim=2)
