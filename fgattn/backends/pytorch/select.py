"""Select: which slices of N keys each tile of M queries keeps.

A tile keeps a cell unless its logit lies under t_c = lse_c + ln(threshold) - ln(L_k) - 0.001 for
each of the tile's centroids. N > 16 keeps a slice if one of its cells is kept; N < 16 decides key
by key inside the kept cells. Comparisons are "not less", so a NaN keeps.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ...layout import CELL, Geometry
from ...settings import Settings
from ...tensors import any_of
from .scoring import cell_logits, log_total, summarise

REFINE_ELEMENTS = 16 << 20  # size of the largest temporary of the key-by-key pass


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    valid: torch.Tensor | None,
    geo: Geometry,
    settings: Settings,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept slices, bool [G, tiles, slices], and what tiles are joined by: the same, or cells where N < 16.

    Args:
        q: [G, L_q, D] and k: [G, L_k, D], rows in the order, neither empty.
        valid: None or bool [L_k] in the order.
    """
    cells_per_tile = settings.tile_queries // CELL
    query_mean, _, _ = summarise(q)
    key_mean, key_variance, count = summarise(k, valid, variance=True)
    logits = cell_logits(query_mean, key_mean, key_variance, scale, q.dtype)
    bound = log_total(logits, count) + settings.log_bound(k.shape[1])
    m = settings.tile_queries
    always = geo.table(("always kept", m), lambda: geo.always_kept(m))
    cells = (_any_cell(logits, bound, cells_per_tile) | always) & (count > 0)
    if settings.tile_keys >= CELL:
        return 2 * (any_of(cells, settings.tile_keys // CELL),)

    del logits
    length = k.shape[1]
    keys = torch.empty(*cells.shape[:2], length, dtype=torch.bool, device=k.device)
    centroid = query_mean.to(q.dtype).to(query_mean.dtype)
    keys_first = k.to(centroid.dtype).transpose(1, 2)
    step = max(1, REFINE_ELEMENTS // (k.shape[0] * cells_per_tile * length))
    for first in range(0, cells.shape[1], step):
        tile = slice(first, first + step)
        query_cell = slice(first * cells_per_tile, (first + step) * cells_per_tile)
        scores = scale * torch.bmm(centroid[:, query_cell], keys_first)
        chosen = _any_cell(scores, bound[:, query_cell], cells_per_tile) | _per_key(always[tile], length)
        keys[:, tile] = chosen & _per_key(cells[:, tile], length)
    if valid is not None:
        keys &= valid
    return any_of(keys, settings.tile_keys), cells


def _any_cell(logits: torch.Tensor, bound: torch.Tensor, cells_per_tile: int) -> torch.Tensor:
    """[G, query cells, J] -> [G, tiles, J]: whether a query cell of the tile is not under its bound."""
    under = logits < bound[..., None]
    under = pad(under, (0, 0, 0, -under.shape[1] % cells_per_tile), value=True)
    return ~under.unflatten(1, (-1, cells_per_tile)).all(2)


def _per_key(cells: torch.Tensor, length: int) -> torch.Tensor:
    return cells.repeat_interleave(CELL, -1)[..., :length]
