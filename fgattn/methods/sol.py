"""sol: a tile keeps slices whose pooled score stands out by tau standard deviations.

Source: Sol-Attn (arXiv 2607.24027) as `sol_attn` of comfy-kitchen and ComfyUI's sparse attention node run it
(64 x 64 blocks, tau 1.3). With c the mean of a tile's queries, m_j the mean of slice j's keys and M the mean
of all m_j, slice j is kept if scale c.(m_j - M) > tau sqrt(scale^2 sum_d c_d^2 var_d + eps), where var_d is
the variance of channel d over the slices: the deviation the scores would have if channels were independent.
The slices beside the tile's own are always kept.

Our reading: means are over the rows that exist, and M and var over the slices that have keys; "beside" is one
slice of N keys on each side of the tile's own cells, which is the published block where M = N = 64. There
scores are computed in 8 bits; here they are not rounded.
"""

from __future__ import annotations

import math

import torch

from .common import Heads, Method, means

EPSILON = 1e-6 * math.log(2) ** 2  # theirs is 1e-6 of squared base-2 scores


def select(heads: Heads) -> torch.Tensor:
    query = means(heads.q, heads.tile_queries)
    key = means(heads.k, heads.tile_keys, heads.valid)
    exists = (heads.keys_in(heads.tile_keys) > 0)[:, None]
    number = exists.sum().clamp(min=1)
    key = (key - key.sum(1, keepdim=True) / number).masked_fill(~exists, 0.0)
    variance = key.square().sum(1) / number
    spread = torch.bmm(query.square(), variance[:, :, None]) * heads.scale**2
    bound = heads.parameter * (spread + EPSILON).sqrt()

    def keep(tile: slice) -> torch.Tensor:
        return ~(heads.scale * torch.bmm(query[:, tile], key.transpose(1, 2)) <= bound[:, tile])

    return heads.judge(heads.slices, keep) | _beside(heads)


def _beside(heads: Heads) -> torch.Tensor:
    """Bool [tiles, slices]: slices of the tile's own cells, and one more on each side."""
    geo = heads.geometry
    tile = torch.arange(len(geo.own_cell), device=geo.own_cell.device) // heads.tile_queries
    cells = len(geo.sink_cell)
    own = torch.zeros(heads.tiles, cells + 1, dtype=torch.bool, device=tile.device)
    # -1 lands in the spare last column; an assignment by index would wait for the host.
    own.view(-1).scatter_(0, tile * (cells + 1) + geo.own_cell % (cells + 1), True)
    own = heads.in_slices(own[:, :-1])
    beside = own.clone()
    beside[:, 1:] |= own[:, :-1]
    beside[:, :-1] |= own[:, 1:]
    return beside


METHOD = Method("tau, standard deviations", 1.3, 8.0, select)
