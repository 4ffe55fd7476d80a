"""radial: a fixed pattern; the further two frames are apart, the closer two tokens must lie within them.

Source: Radial Attention (arXiv 2506.19852 and its code; blocks of 128 x 128, raster). Let s be the tokens of
a frame, d a distance in frames, and u = 2^bit_length(s) / 2^bit_length(d). A query sees the keys whose place
in their frame, counted row by row, differs from its own by at most s where d < 2; elsewhere by at most decay
* u, or a block if that is more. Where u is below a block, only each int(block / u)-th distance is seen. The
first frame is seen by all. A block is kept if, of its keys that some query of the tile sees, more than 0.6
are seen by over a third of the tile's queries.

Our reading: "a block" is max(M, N) tokens; tiles and slices that span frames (any other order, ragged
frames) are judged as a whole. There a larger decay can cost a slice at an edge; in raster order with whole
tiles in a frame it only adds. Queries that are no tokens of the sequence, and sequences without a video,
keep all.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .common import Heads, Method, folded, steps


def select(heads: Heads) -> torch.Tensor:
    name = "radial", heads.layout.front, heads.tile_queries, heads.tile_keys, heads.parameter
    return heads.geometry.table(name, lambda: _mask(heads))[None]


def reach(frames: int, tokens: int, block: int, decay: float) -> list[int]:
    """How far keys may lie from a query's place in the frame, by distance in frames; -1 sees none."""
    result = []
    for distance in range(frames):
        width = 2 ** tokens.bit_length() / 2 ** distance.bit_length()
        if width < block and distance % int(block / width):
            result.append(-1)
        elif distance < 2:
            result.append(tokens)
        else:
            result.append(int(max(width * decay, block)))
    return result


def _mask(heads: Heads) -> torch.Tensor:
    """Bool [tiles, slices]; the same in every call on this layout, 0.5 MB at L = 32 760."""
    geo, m, n = heads.geometry, heads.tile_queries, heads.tile_keys
    front, start = heads.layout.front, heads.layout.query_start
    (frames, height, width), device = geo.grid, geo.key_tokens.device
    tokens, queries, keys = height * width, len(geo.query_tokens), len(geo.key_tokens)
    tiles, slices = -(-queries // m), -(-keys // n)
    if start is None or not frames * tokens:
        return torch.ones(tiles, slices, dtype=torch.bool, device=device)
    distances = reach(frames, tokens, max(m, n), heads.parameter)
    by_distance = torch.tensor(distances, dtype=torch.int32, device=device)
    frame = torch.arange(frames, device=device)
    table = by_distance[(frame[:, None] - frame).abs()]
    table[:, 0] = tokens
    table = pad(table, (0, 1, 0, 1), value=-1)  # a frame of their own for sinks

    def places(token):
        inside = (token >= 0) & (token < frames * tokens)
        return torch.where(inside, token // max(1, tokens), frames), (token % tokens).int()

    query = pad(geo.query_tokens + (start - front), (0, tiles * m - queries), value=-1)
    query_frame, query_place = places(query)
    key_frame, key_place = places(geo.key_tokens - front)
    rows = (query_frame < frames).view(tiles, m).sum(1)
    kept = torch.empty(tiles, slices, dtype=torch.bool, device=device)
    for tile in steps(tiles, m * keys):
        row = slice(tile.start * m, tile.stop * m)
        limit = table[query_frame[row]].index_select(1, key_frame)
        seen = ((query_place[row, None] - key_place).abs_() <= limit).view(-1, m, keys).sum(1)
        often = folded(3 * seen > rows[tile, None], n).sum(2)
        kept[tile] = 5 * often > 3 * folded(seen > 0, n).sum(2)
    return kept


METHOD = Method("decay", 0.2, 8.0, select)
