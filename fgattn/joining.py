"""Joining: which small query tiles are executed together, so that the union of their lists stays short.

Two tiles are joined, and two of these again where M is 16, until KERNEL_ROWS queries are executed together.
Partners are sought within windows of 64. Those that differ in the fewest kept slices are joined first; of
equal ones those with the lowest numbers. A short last tile, and a whole one that is left over, stay at the
end.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .layout import CELL
from .plan import KERNEL_ROWS

WINDOW = 64
FARTHEST = 2**19 - 1  # distances are cut here, so that a distance and two places fit 32 bits
NONE = 2**31 - 1


def joined_order(kept: torch.Tensor, tile_queries: int, queries: int) -> torch.Tensor:
    """Query cell at each place of execution, int32 [G, query cells].

    Args:
        kept: bool [G, tiles, slices], what the tiles are compared by.
        tile_queries: 16 or 32.
    """
    heads, tiles, _ = kept.shape
    rows, query_cells = tile_queries, -(-queries // CELL)
    order = torch.arange(tiles * (rows // CELL), dtype=torch.int32, device=kept.device)
    order = order.view(1, tiles, rows // CELL).expand(heads, -1, -1)
    while rows < KERNEL_ROWS:
        places = _neighbours(kept, queries // rows)
        order, kept = (_joined(x.gather(1, places[..., None].expand_as(x))) for x in (order, kept))
        kept = kept.unflatten(2, (2, -1)).any(2)
        rows *= 2
    return order.flatten(1)[:, :query_cells]


def _joined(x: torch.Tensor) -> torch.Tensor:
    """[G, tiles, n] -> [G, twos, 2 n]: what two neighbours have, side by side."""
    return pad(x, (0, 0, 0, x.shape[1] % 2)).unflatten(1, (-1, 2)).flatten(2)


def _neighbours(kept: torch.Tensor, whole: int) -> torch.Tensor:
    """Order of the tiles in which each two neighbours are joined, [G, tiles]; `whole` tiles are not short."""
    heads, tiles, slices = kept.shape
    windows = -(-tiles // WINDOW)
    x = pad(kept, (0, 0, 0, -tiles % WINDOW)).view(heads * windows, WINDOW, slices).float()
    common = x @ x.transpose(1, 2)
    count = common.diagonal(dim1=1, dim2=2)
    apart = (count[:, :, None] + count[:, None] - 2 * common).clamp(max=FARTHEST).long()
    place = torch.arange(WINDOW, device=kept.device)
    first = torch.arange(0, windows * WINDOW, WINDOW, device=kept.device).repeat(heads)
    candidate = (place[:, None] < place) & (first[:, None, None] + place < whole // 2 * 2)
    key = (apart * WINDOW**2 + place[:, None] * WINDOW + place).masked_fill(~candidate, NONE)
    order = place.repeat(len(x), 1)
    for i in range(0, WINDOW, 2):
        best = key.flatten(1).amin(1)[:, None]
        chosen = torch.cat((best // WINDOW % WINDOW, best % WINDOW), 1)
        order[:, i : i + 2] = torch.where(best < NONE, chosen, order[:, i : i + 2])
        taken = (place == chosen[:, :1]) | (place == chosen[:, 1:])
        key.masked_fill_(taken[:, :, None] | taken[:, None], NONE)
    return (order + first[:, None]).view(heads, windows * WINDOW)[:, :tiles]
