"""Maps: which keys some tiles of queries execute, by block, step and head of a run, to be drawn later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch

from ..errors import InvalidArgument
from ..layout import TokenLayout, token_order
from ..outcomes import Outcome, Reason
from ..plan import SparsePlan

LIMIT = 64 << 20  # bytes of a run's maps; Wan 14B at 720p, 81 frames, M = 128, N = 16, needs 0.95 MB a step
Place = tuple[int, int, int]  # frame, row and column of a token, counted from 1; 0 is the middle
MIDDLE: Place = 0, 0, 0
NOBODY: Mapping[str, Place] = MappingProxyType({"": MIDDLE})  # where nobody looks yet


@dataclass(frozen=True, eq=False)
class TileMap:
    """A tile of queries in one call, first batch row.

    | attribute | shape, dtype | meaning |
    |---|---|---|
    | bits | [H, bytes] uint8 | bit s%8 of byte s//8: the tile computes slice s |
    | rows | [H or 1, M] int32 | the tile's tokens; the last one repeats where the tile is short |
    | density | [H] float64 | share of all pairs that the head asks for |
    | layout, order, tile_keys | | where tokens stand; N |
    """

    bits: torch.Tensor
    rows: torch.Tensor
    density: torch.Tensor
    layout: TokenLayout
    order: str
    tile_keys: int

    @property
    def heads(self) -> int:
        return len(self.bits)

    def keys(self, head: int) -> np.ndarray:
        """Tokens that the tile computes as keys, bool [L_k]."""
        layout = self.layout
        kept = np.unpackbits(self.bits[head].numpy(), bitorder="little").astype(bool).repeat(self.tile_keys)
        by_token = np.zeros(layout.length, bool)
        order = token_order(layout, self.order)
        by_token[order] = kept[: len(order)]
        return by_token

    def queries(self, head: int) -> np.ndarray:
        """The tile's own tokens, bool [L_k]."""
        tokens = np.zeros(self.layout.length, bool)
        tokens[self.rows[head if len(self.rows) > 1 else 0].numpy() + (self.layout.query_start or 0)] = True
        return tokens


class Maps:
    """The maps of one run: of the first call of each block in each step.

    Where a model does not number its blocks, calls are counted within a step.

    Args:
        places: tokens whose tiles are kept, at least one, each by the key of who looks at it; what lies
            outside the video is taken as its last frame, row, column. Tiles of one place are kept once.

    Attributes:
        kept: (step, block) -> place -> map.
        skipped: (step, block) -> why there is none.
    """

    def __init__(self, places: Mapping[str, Place] = NOBODY):
        self.places = dict(places)
        self.kept: dict[tuple[int, int], dict[Place, TileMap]] = {}
        self.skipped: dict[tuple[int, int], Reason] = {}
        self._size = 0
        self._unnamed: Counter = Counter()  # calls of unknown blocks, by step

    def keep(self, step: int, block: int | None, plan: SparsePlan, layout: TokenLayout, order: str) -> None:
        """Keep the maps of a call; never waits for the device."""
        at = self._at(step, block)
        if at in self.kept:
            return
        heads, _, width = plan.bits.shape[1:]
        places = dict.fromkeys(self.places.values())
        if self._size + len(places) * heads * width > LIMIT:
            return self._skip(at, Reason(Outcome.MAPS_FULL))
        self._size += len(places) * heads * width
        density = plan.requested[0] / plan.pairs
        known = layout if layout.key_valid is None else replace(layout, key_valid=None)

        def tile_map(place: Place) -> TileMap:
            bits, rows = _bits_and_rows(plan, token_at(place, layout))
            return TileMap(bits, rows, density, known, order, plan.tile_keys)

        self.kept[at] = {place: tile_map(place) for place in places}

    def skip(self, step: int, block: int | None, reason: Reason) -> None:
        """Note why a call has no map."""
        self._skip(self._at(step, block), reason)

    def to_host(self) -> None:
        """Bring all maps to the host; waits for the device."""
        every = [(maps, place) for maps in self.kept.values() for place in maps]
        bits, rows, density = (
            _to_host([getattr(maps[place], name) for maps, place in every])
            for name in ("bits", "rows", "density")
        )
        for i, (maps, place) in enumerate(every):
            maps[place] = replace(maps[place], bits=bits[i], rows=rows[i], density=density[i])

    def place_for(self, key: str, wanted: Place) -> Place:
        """The place of a key; for one that the run did not know the wanted place, if any key has it."""
        known = self.places.values()
        return self.places.get(key) or (wanted if wanted in known else next(iter(known)))

    def find(self, step: int, block: int, head: int, place: Place | None = None) -> tuple[int, TileMap | str]:
        """A step, and its map of a block, or why it has none.

        Args:
            step: counted from 0; -1 is the last one with a map of this block.
            place: one of those that are kept; None is the first of them.

        Raises:
            InvalidArgument: the run had no such block, step or head.
        """
        every = {*self.kept, *self.skipped}
        if not every:
            return step, "no attention call reached FG-Attn"
        blocks = {b for _, b in every}
        if block not in blocks:
            raise InvalidArgument("block", block, listed(blocks), "Blocks are counted from 0, as in reports.")
        with_map = {s for s, b in self.kept if b == block}
        steps = {s for s, b in every if b == block}
        if step < 0:
            step = max(with_map or steps)
        if step not in steps:
            raise InvalidArgument(
                "step",
                step + 1,
                listed(s + 1 for s in steps),
                "Steps are counted from 1; 0 is the last sparse one.",
            )
        if (step, block) not in self.kept:
            reason = self.skipped[step, block].text
            others = listed(s + 1 for s in with_map)
            return step, f"{reason}; steps with a map of block {block}: {others}" if others else reason
        found = self.kept[step, block][place or next(iter(self.places.values()))]
        if head >= found.heads:
            raise InvalidArgument("head", head, listed(range(found.heads)), "Heads are counted from 0.")
        return step, found

    def densities(self, step: int) -> dict[int, np.ndarray | Reason]:
        """Block -> requested density of each head, or why there is none, in a step."""
        blocks = sorted({b for s, b in (*self.kept, *self.skipped) if s == step})
        return {
            b: self._density(self.kept[step, b]) if (step, b) in self.kept else self.skipped[step, b]
            for b in blocks
        }

    @staticmethod
    def _density(maps: dict[Place, TileMap]) -> np.ndarray:
        """Of the call, whichever tile is looked at."""
        return next(iter(maps.values())).density.numpy()

    def _at(self, step: int, block: int | None) -> tuple[int, int]:
        if block is None:
            block = self._unnamed[step]
            self._unnamed[step] += 1
        return step, block

    def _skip(self, at: tuple[int, int], reason: Reason) -> None:
        if at not in self.kept:
            self.skipped.setdefault(at, reason)


def token_at(place: Place, layout: TokenLayout) -> int:
    """Token of a place, counted from the first query."""
    index = [min(n // 2 if at == 0 else at - 1, n - 1) for at, n in zip(place, layout.grid, strict=True)]
    (_, h, w), (t, y, x) = layout.grid, index
    return layout.front + (t * h + y) * w + x - (layout.query_start or 0)


def listed(numbers: Iterable[int]) -> str:
    """Numbers as "0 to 39" or "1, 3 to 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in runs)


def _bits_and_rows(plan: SparsePlan, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits [H, bytes] and tokens [H or 1, M] of the tile that holds a token, counted from the first query."""
    heads, _, width = plan.bits.shape[1:]
    if plan.cell_order is None:
        geo, size = plan.geometry, plan.tile_rows
        tile, rows = geo.table(("tile", token, size), lambda: _tile(geo.query_tokens[None], token, size))
        return plan.bits[0].index_select(1, tile)[:, 0], rows
    tile, rows = _tile(plan.query_tokens[0].long(), token, plan.tile_rows)
    index = tile.expand(heads)[:, None, None].expand(heads, 1, width)
    return plan.bits[0].gather(1, index)[:, 0], rows


def _tile(tokens: torch.Tensor, token: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number [G] and tokens [G, size] of the tile that holds a token, in the orders `tokens` [G, L_q]."""
    tile = (tokens == token).int().argmax(1) // size
    places = tile[:, None] * size + torch.arange(size, device=tokens.device)
    return tile, tokens.gather(1, places.clamp(max=tokens.shape[1] - 1)).to(torch.int32)


def _to_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the host, in one copy."""
    if not tensors:
        return []
    flat = torch.cat([t.flatten() for t in tensors]).cpu()
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
