"""SparsePlan: which slices of keys each executed tile of queries attends, packed as bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from .layout import CELL, Geometry

KERNEL_ROWS = 64  # smallest tile that is executed; smaller mask tiles are joined, see `joining`


@dataclass(frozen=True, eq=False)
class SparsePlan:
    """The kept keys of one attention call; immutable, reusable for tensors of the same shape.

    | attribute | shape, dtype | meaning |
    |---|---|---|
    | bits | [B, H, tiles, row_bytes(slices)] uint8 | bit s%8 of byte s//8: slice s is executed |
    | requested | [B, H] float64 | pairs of a query and a key that the mask tiles ask for |
    | executed | [B, H] float64 | pairs that are computed: joined tiles attend the union of their lists |
    | cell_order | None or [B, H, query cells] int32 | query cell at each place of execution; None: in order |
    | geometry | | order of queries and keys |
    | key_valid | None or [B, L_k] bool | keys that exist, in the order |
    | tile_rows | int | queries of an executed tile: max(M, 64) |
    | tile_keys | int | N |
    | tail | bool | add the pooled estimate of what is skipped |
    | scale | float or None | softmax scale; None is D**-0.5 |

    B and H are 1 where a plan from a mask serves every batch row or head.
    """

    bits: torch.Tensor
    requested: torch.Tensor
    executed: torch.Tensor
    cell_order: torch.Tensor | None
    geometry: Geometry
    key_valid: torch.Tensor | None
    tile_rows: int
    tile_keys: int
    tail: bool
    scale: float | None

    @property
    def queries(self) -> int:
        return self.geometry.query_tokens.shape[0]

    @property
    def keys(self) -> int:
        return self.geometry.key_tokens.shape[0]

    @property
    def density(self) -> torch.Tensor:
        """Requested share of all pairs, 0-d float64 on the plan's device."""
        return self._share(self.requested)

    @property
    def executed_density(self) -> torch.Tensor:
        """Computed share of all pairs, 0-d float64 on the plan's device."""
        return self._share(self.executed)

    @property
    def pairs(self) -> int:
        """All pairs of a query and a key in one head of one batch row."""
        return self.queries * self.keys

    def _share(self, pairs: torch.Tensor) -> torch.Tensor:
        return pairs.sum() / max(1, pairs.numel() * self.pairs)

    @property
    def query_tokens(self) -> torch.Tensor:
        """Token of each query in the order of execution, int32 [B, H, L_q]."""
        geo = self.geometry
        in_order = geo.table("query tokens, int32", lambda: geo.query_tokens.to(torch.int32)[None, None])
        if self.cell_order is None:
            return in_order
        tokens = in_order[0, 0]
        places = torch.arange(CELL, dtype=torch.int32, device=tokens.device)
        return tokens[(self.cell_order[..., None] * CELL + places).flatten(2)[..., : self.queries]]

    def valid_keys(self, batch: int) -> torch.Tensor | None:
        """None or bool [L_k], in the order."""
        if self.key_valid is None:
            return None
        return self.key_valid[batch if len(self.key_valid) > 1 else 0]

    def kept_slices(self, batch: int, heads: slice) -> torch.Tensor:
        """Executed slices of some heads, bool [G, tiles, slices]; G is 1 if heads share them."""
        bits = of_heads(self.bits, batch, heads)
        places = torch.arange(8, device=bits.device, dtype=torch.uint8)
        kept = (bits[..., None] >> places & 1).bool().flatten(-2)
        return kept[..., : -(-self.keys // self.tile_keys)]

    def kept_keys(self, batch: int, heads: slice) -> torch.Tensor:
        """Executed valid keys of some heads, bool [G, tiles, L_k]."""
        keys = self.kept_slices(batch, heads).repeat_interleave(self.tile_keys, -1)[..., : self.keys]
        valid = self.valid_keys(batch)
        return keys if valid is None else keys & valid

    def executed_keys(self, batch: int, heads: slice) -> torch.Tensor:
        """Number of valid keys that each tile executes in each cell, uint8 [G, tiles, cells]."""
        kept, valid = self.kept_slices(batch, heads), self.valid_keys(batch)
        if self.tile_keys <= CELL:
            counts = kept * valid_counts(self.keys, self.tile_keys, valid, kept.device)
            per_cell = CELL // self.tile_keys
            return (
                pad(counts, (0, -counts.shape[2] % per_cell))
                .unflatten(2, (-1, per_cell))
                .sum(3, dtype=torch.uint8)
            )
        counts = valid_counts(self.keys, CELL, valid, kept.device)
        return kept.repeat_interleave(self.tile_keys // CELL, 2)[..., : len(counts)] * counts

    def softmax_scale(self, dim: int) -> float:
        return dim**-0.5 if self.scale is None else self.scale


def of_heads(x: torch.Tensor, batch: int, heads: slice) -> torch.Tensor:
    """[B or 1, H or 1, ...] -> [G or 1, ...]."""
    x = x[batch if len(x) > 1 else 0]
    return x[heads] if len(x) > 1 else x


def row_bytes(bits: int) -> int:
    """Bytes of a row of bits; rows end on 16 bytes."""
    return -(-bits // 128) * 16


def pack(kept: torch.Tensor) -> torch.Tensor:
    """Bool [..., n] -> uint8 [..., row_bytes(n)]: bit i%8 of byte i//8."""
    octets = pad(kept, (0, 8 * row_bytes(kept.shape[-1]) - kept.shape[-1])).unflatten(-1, (-1, 8))
    places = torch.arange(8, device=kept.device, dtype=torch.uint8)
    return (octets.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def valid_counts(keys, width, valid, device):
    """Valid keys in each run of `width`, uint8 [ceil(keys / width)]."""
    exists = torch.ones(keys, dtype=torch.uint8, device=device) if valid is None else valid
    return pad(exists, (0, -keys % width)).view(-1, width).sum(1, dtype=torch.uint8)
