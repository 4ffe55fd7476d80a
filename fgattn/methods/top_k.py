"""top_k: every tile keeps the same share of the slices, those with the best pooled score.

Source: SLA (arXiv 2509.24006; 64 x 64 blocks) and VSA (arXiv 2505.13389; cubes of 64 tokens): the mean of a
tile's queries times the mean of a slice's keys, the best int(share * slices) of each row. SLA takes the mean
of all keys from the keys first, which moves all scores of a row alike and is left out.

Our reading: means are over the rows that exist; sink slices are kept and do not count, the tile's own cells
come on top. In the order "hilbert" 64 neighbours are VSA's cubes where 4 divides the grid. The trained linear
(SLA) and coarse (VSA) branches belong to their models; the tail stands in.
"""

from __future__ import annotations

import torch

from .common import Heads, Method, keep_top, means


def select(heads: Heads) -> torch.Tensor:
    query = means(heads.q, heads.tile_queries)
    key = means(heads.k, heads.tile_keys, heads.valid)
    candidates = heads.candidates()

    def keep(tile: slice) -> torch.Tensor:
        scores = heads.scale * torch.bmm(query[:, tile], key.transpose(1, 2))
        return keep_top(scores, candidates, heads.parameter)

    return heads.judge(heads.slices, keep)


METHOD = Method("share of the keys", 0.3, 1.0, select)
