"""Summarise and score: runs of 16 queries against cells of 16 keys.

With centroid c (mean of a run), key mean m and biased variance s2 per channel of a cell:
    logit = scale * c.m + scale^2 / 2 * sum_d c_d^2 s2_d        (second-order log-mean-exp)
    lse_c = log sum_cells n * exp(logit)
Means are summed in fp32; c, m, c^2 and s2 are rounded to the compute type, products add up in fp32.
float64 input stays float64 throughout.
"""

from __future__ import annotations

import torch

from .order import CELL


def run_means(x: torch.Tensor, valid: torch.Tensor | None = None):
    """Mean and biased variance of runs of 16 rows.

    Args:
        x: [G, L, D], rows in the order.
        valid: None or bool [L]; rows that count.

    Returns:
        mean, variance [G, runs, D] in fp32 (float64 for float64); count [runs] int64.
        A run without valid rows has zeros.
    """
    length = x.shape[1]
    runs = -(-length // CELL)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    counted = torch.zeros(runs * CELL, dtype=torch.bool, device=x.device)
    counted[:length] = True if valid is None else valid
    counted = counted.view(runs, CELL)
    rows = torch.nn.functional.pad(x.to(wide), (0, 0, 0, runs * CELL - length))
    rows = torch.where(counted[..., None], rows.view(-1, runs, CELL, x.shape[2]), 0)
    count = counted.sum(1)
    n = count.clamp(min=1)[:, None].to(wide)
    mean = rows.sum(2) / n
    spread = torch.where(counted[..., None], rows - mean[:, :, None], 0)
    return mean, spread.square_().sum(2) / n, count


def cell_logits(
    query_mean: torch.Tensor, key_mean: torch.Tensor, key_variance: torch.Tensor | None,
    scale: float, dtype: torch.dtype,
) -> torch.Tensor:
    """Logits of every run against every cell, [G, runs, cells] in fp32 (or float64).

    Args:
        query_mean: [G, runs, D]; key_mean, key_variance: [G, cells, D]; None leaves that term out.
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
    """log sum_j count_j exp(logits_j), [G, runs]; cells without keys do not count."""
    return torch.logsumexp(logits + count.to(logits.dtype).log(), dim=2)
