"""Which small tiles are joined: the rule in plain loops, and what it is for."""

import itertools

import pytest
import torch
from fgattn import Settings, TokenLayout, attend, build_plan, joining, plan_from_mask, reference
from fgattn.joining import WINDOW, joined_order
from makers import executed_mask, query_tokens, random_mask
from makers import tensors as make

LENGTHS = [1, 16, 40, 64, 98, 222, 1023, 1025, 2300]


def defined_order(lists, rows, queries):
    """Mask tiles of one head in their order of execution; lists: a set of slices per tile."""
    items = [([t], kept) for t, kept in enumerate(lists)]
    while rows < 64:
        whole = queries // rows // 2 * 2
        pairs = []
        for first in range(0, len(items), WINDOW):
            left = list(range(first, min(first + WINDOW, len(items), whole)))
            while left:
                a, b = min(
                    itertools.combinations(left, 2),
                    key=lambda ab: (len(items[ab[0]][1] ^ items[ab[1]][1]), ab),
                )
                left = [i for i in left if i not in (a, b)]
                pairs.append((items[a][0] + items[b][0], items[a][1] | items[b][1]))
        rest = items[whole:]
        if rest:
            pairs.append(([t for tiles, _ in rest for t in tiles], set().union(*(kept for _, kept in rest))))
        items, rows = pairs, 2 * rows
    return [tile for tiles, _ in items for tile in tiles]


@pytest.mark.parametrize("m", [16, 32])
@pytest.mark.parametrize("queries", LENGTHS)
def test_the_rule(queries, m):
    """Closest pairs first, ties by number, windows, what is left over; every query cell exactly once."""
    kept = random_mask(2, -(-queries // m), 7, seed=queries)  # few slices: many ties
    order = joined_order(kept, m, queries)
    assert order.dtype == torch.int32 and order.shape == (2, -(-queries // 16))
    for head in range(2):
        lists = [set(tile.nonzero().flatten().tolist()) for tile in kept[head]]
        tiles = order[head, :: m // 16] // (m // 16)
        assert tiles.tolist() == defined_order(lists, m, queries)
        cells = [c for t in tiles.tolist() for c in range(t * m // 16, (t + 1) * m // 16)]
        assert order[head].tolist() == cells[: len(order[head])]


def test_distances_are_cut():
    """A distance and a pair share 32 bits."""
    assert joining.FARTHEST * WINDOW**2 + WINDOW**2 - 1 == joining.NONE


@pytest.mark.parametrize("n", [1, 16, 64])
@pytest.mark.parametrize("m", [16, 32])
def test_executed_covers_requested(m, n):
    """Tiles run with all they asked for, and what is joined with nothing that none of its tiles asked for."""
    length = 1100
    mask = random_mask(2, -(-length // m), -(-length // n), share=0.1, seed=n)
    plan = plan_from_mask(mask, m, n, query_length=length, key_length=length)
    for head in range(2):
        wanted = mask[head].repeat_interleave(m, 0)[:length].repeat_interleave(n, 1)[:, :length]
        wanted = wanted[query_tokens(plan, 0, head)]
        for got, rows in zip(executed_mask(plan, 0, head).split(64), wanted.split(64), strict=True):
            assert torch.equal(got, rows.any(0).expand_as(got))
    assert (plan.requested < plan.executed).all()


@pytest.mark.parametrize("m", [16, 32])
def test_equal_tiles_find_each_other(m):
    """Interleaved kinds of tiles lose nothing; neighbours would run the union of all."""
    kinds = random_mask(5, 60, share=0.2)
    mask = kinds[torch.arange(40) % 5]
    plan = plan_from_mask(mask, m, 16)
    assert torch.equal(plan.requested, plan.executed)
    assert kinds.any(0).sum() > 2 * kinds.sum(1).max()


def test_sink_queries_run_together():
    """Tiles that keep everything would make their neighbours do so."""
    layout = TokenLayout((4, 8, 16), front=64)
    q, k, _ = make(1, layout.length)
    plan = build_plan(q, k, Settings(threshold=4.0, tile_queries=16, tile_keys=16), layout)
    whole = plan.kept_slices(0, slice(None))[0].all(1)
    assert whole.sum() == 1
    tile = whole.nonzero().item()
    assert sorted(query_tokens(plan, 0, 0)[tile * 64 : tile * 64 + 64].tolist()) == list(range(64))


@pytest.mark.parametrize(("m", "n"), [(16, 16), (32, 4)])
def test_tokens_get_their_own_result(m, n):
    """Whatever order they run in: with everything kept, the result is dense attention."""
    layout = TokenLayout((4, 8, 9), front=3, back=7)
    q, k, v = make(2, layout.length, batch=2, dtype=torch.float64)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    sparse = build_plan(q, k, Settings(threshold=3.0, tile_queries=m, tile_keys=n), layout)
    assert sparse.cell_order.shape[:2] == (2, 2)
    assert any(not torch.equal(o, torch.arange(len(o))) for o in sparse.cell_order.flatten(0, 1))
    for impl in ("torch", "reference"):
        plan = build_plan(q, k, Settings(threshold=0.0, tile_queries=m, tile_keys=n), layout)
        assert (attend(q, k, v, plan, impl=impl) - dense).abs().max() < 1e-12
    error = (attend(q, k, v, sparse, impl="torch") - reference.attend(q, k, v, sparse)).abs().max()
    assert error < 1e-12
