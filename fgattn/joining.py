"""Grouping: which small query tiles run together, so that the union of their lists stays short.

Tiles are paired until a group has KERNEL_ROWS queries: within windows of 64 tiles (or pairs), closest lists
first, that is the fewest slices that only one side keeps; between equals the lowest numbers. A short
last tile and a whole one that is left over stay at the end.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .layout import CELL

KERNEL_ROWS = 64  # smallest tile that is executed; smaller mask tiles attend the union of theirs
WINDOW = 64
FARTHEST = 2**19 - 1  # distances are cut here, so that a distance and a pair fit 32 bits
NONE = 2**31 - 1


def group(kept: torch.Tensor, tile_queries: int, queries: int) -> torch.Tensor:
    """Run of 16 queries at each place of execution, int32 [G, runs].

    Args:
        kept: bool [G, tiles, slices], what the tiles are compared by.
        tile_queries: 16 or 32.
    """
    groups, tiles, _ = kept.shape
    rows, runs = tile_queries, -(-queries // CELL)
    order = torch.arange(tiles * (rows // CELL), dtype=torch.int32, device=kept.device)
    order = order.view(1, tiles, rows // CELL).expand(groups, -1, -1)
    while rows < KERNEL_ROWS:
        places = _pair(kept, queries // rows)
        order, kept = (_joined(x.gather(1, places[..., None].expand_as(x))) for x in (order, kept))
        kept = kept.unflatten(2, (2, -1)).any(2)
        rows *= 2
    return order.flatten(1)[:, :runs]


def _joined(x: torch.Tensor) -> torch.Tensor:
    """[G, tiles, n] -> [G, pairs, 2 n]."""
    return pad(x, (0, 0, 0, x.shape[1] % 2)).unflatten(1, (-1, 2)).flatten(2)


def _pair(kept: torch.Tensor, whole: int) -> torch.Tensor:
    """Order of the tiles in which neighbours are pairs, [G, tiles]; the first `whole` tiles are not short."""
    groups, tiles, slices = kept.shape
    windows = -(-tiles // WINDOW)
    x = pad(kept, (0, 0, 0, -tiles % WINDOW)).view(groups * windows, WINDOW, slices).float()
    common = x @ x.transpose(1, 2)
    count = common.diagonal(dim1=1, dim2=2)
    apart = (count[:, :, None] + count[:, None] - 2 * common).clamp(max=FARTHEST).long()
    place = torch.arange(WINDOW, device=kept.device)
    first = torch.arange(0, windows * WINDOW, WINDOW, device=kept.device).repeat(groups)
    candidate = (place[:, None] < place) & (first[:, None, None] + place < whole // 2 * 2)
    key = (apart * WINDOW**2 + place[:, None] * WINDOW + place).masked_fill(~candidate, NONE)
    order = place.repeat(len(x), 1)
    for pair in range(0, WINDOW, 2):
        best = key.flatten(1).amin(1)[:, None]
        chosen = torch.cat((best // WINDOW % WINDOW, best % WINDOW), 1)
        order[:, pair : pair + 2] = torch.where(best < NONE, chosen, order[:, pair : pair + 2])
        taken = (place == chosen[:, :1]) | (place == chosen[:, 1:])
        key.masked_fill_(taken[:, :, None] | taken[:, None], NONE)
    return (order + first[:, None]).view(groups, windows * WINDOW)[:, :tiles]
