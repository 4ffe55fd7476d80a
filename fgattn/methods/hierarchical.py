"""hierarchical: every tile keeps the same share of the slices, scored by 16-token pools.

Source: DFSAttn (arXiv 2605.23445 and its code; 128 x 128 blocks, pools of 16, the order "hilbert"): softmax
of mean-pooled queries against mean-pooled keys, 16 tokens each; the probabilities of a block's pool pairs
are added up, and each row of blocks keeps its best int(share * blocks), at least one.

Our reading: pools hold the rows that exist (the published code pads the last one with zeros), and one that
is short of keys weighs less in the softmax; below N = 16 keys are pooled by N; sink slices are kept and do
not count, the tile's own cells come on top. The share that shrinks over a run and masks kept over steps are
left out.
"""

from __future__ import annotations

import torch

from ..layout import CELL
from .common import Heads, Method, folded, keep_top, means


def select(heads: Heads) -> torch.Tensor:
    width, cells = min(CELL, heads.tile_keys), heads.tile_queries // CELL
    query = means(heads.q, CELL)
    key, count = means(heads.k, width, heads.valid), heads.keys_in(width)
    weight = count.to(key.dtype).log()
    candidates = heads.candidates()

    def keep(tile: slice) -> torch.Tensor:
        mine = query[:, tile.start * cells : tile.stop * cells]
        logits = heads.scale * torch.bmm(mine, key.transpose(1, 2))
        shares = torch.softmax(logits + weight, 2)
        shares = folded(shares, heads.tile_keys // width).sum(3)
        shares = folded(shares.transpose(1, 2), cells).sum(3).transpose(1, 2)
        return keep_top(shares, candidates, heads.parameter)

    return heads.judge(cells * len(count), keep)


METHOD = Method("share of the keys", 0.3, 1.0, select)
