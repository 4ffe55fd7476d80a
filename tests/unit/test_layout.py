"""Order: where every token goes, and what a tile keeps by right of place."""

import numpy as np
import pytest
import torch
from fgattn import InvalidArgument, Settings, TokenLayout
from fgattn.backends.hopper.boxes import DEEP, FLAT, WIDE, boxes_for, octet_boxes
from fgattn.call import Call
from fgattn.layout import geometry, token_order
from fgattn.settings import ORDERS
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import restated_order

CPU = torch.device("cpu")
side = st.integers(1, 9)
layouts = st.tuples(st.tuples(side, side, side), st.integers(0, 20), st.integers(0, 20))
orders = st.sampled_from(("cells", "raster"))
examples = settings(max_examples=60, deadline=None, derandomize=True)


def boxes_of(grid, order):
    """Boxes of all keys of a grid."""
    q = torch.empty(1, 1, grid[0] * grid[1] * grid[2], 64)
    return boxes_for(Call.to_plan(q, q, q, Settings(order=order), TokenLayout(grid)))


@examples
@given(layouts, orders)
def test_order_is_the_definition(layout, order):
    """Every other stage reads rows through this order."""
    assert token_order(TokenLayout(*layout), order).tolist() == restated_order(*layout, order)


@examples
@given(layouts, st.sampled_from(ORDERS))
def test_order_is_a_permutation(layout, order):
    """A token that is lost or doubled would be lost or doubled in the video."""
    tokens = token_order(TokenLayout(*layout), order)
    assert sorted(tokens.tolist()) == list(range(TokenLayout(*layout).length))


@pytest.mark.parametrize("grid", [(4, 4, 8), (8, 12, 16), (4, 8, 24)], ids=str)
def test_runs_are_cells_of_the_grid(grid):
    """The point of the order: 16 neighbours in the sequence are a 2 x 2 x 4 box of the video."""
    t, h, w = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    tokens = torch.from_numpy(token_order(TokenLayout(grid), "cells")).view(-1, 16)
    for axis, extent in ((t, 2), (h, 2), (w, 4)):
        low, high = axis[tokens].amin(1), axis[tokens].amax(1)
        assert (high - low + 1 == extent).all() and (low % extent == 0).all()


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_is_a_hilbert_curve(side):
    """Neighbours in the sequence touch, and every aligned cube of side 2^i is one run."""
    tokens = token_order(TokenLayout((side, side, side)), "hilbert")
    points = np.stack(np.unravel_index(tokens, (side, side, side)), 1)
    assert (np.abs(np.diff(points, axis=0)).sum(1) == 1).all()
    for width in (2, 4, 8):
        if width <= side:
            cubes = (points // width).reshape(-1, width**3, 3)
            assert (cubes == cubes[:, :1]).all()


@examples
@given(st.tuples(side, side, side))
def test_hilbert_of_a_grid_is_that_of_its_cube(grid):
    """Any grid: the tokens in the order in which the curve of the enclosing cube meets them."""
    cube = 3 * (1 << max(n - 1 for n in grid).bit_length(),)
    points = np.stack(np.unravel_index(token_order(TokenLayout(cube), "hilbert"), cube))
    inside = points[:, (points < np.array(grid)[:, None]).all(0)]
    assert (np.ravel_multi_index(tuple(inside), grid) == token_order(TokenLayout(grid), "hilbert")).all()


@pytest.mark.parametrize("grid", [(21, 30, 52), (4, 8, 8), (3, 7, 10)], ids=str)
def test_hilbert_octets_are_no_boxes(grid):
    """Eight neighbours are a cube of 2 x 2 x 2, which TMA does not fetch at once: keys are gathered."""
    assert boxes_of(grid, "hilbert") is None


@pytest.mark.parametrize(
    ("start", "count"),
    [(0, None), (0, 30), (11, 40), (100, None), (None, 50)],
    ids=["all", "first", "middle", "end", "unrelated"],
)
@pytest.mark.parametrize("order", ["cells", "raster"])
@pytest.mark.parametrize(("front", "back"), [(0, 0), (3, 17), (20, 0)])
def test_queries_follow_their_keys(start, count, order, front, back):
    """Queries stand in the order of their own keys, and know their cell and whether they are sinks."""
    layout = TokenLayout((3, 5, 7), front, back, start)
    count = layout.length - start if count is None else count
    geo = geometry(layout, order, count, CPU)
    assert sorted(geo.query_tokens.tolist()) == list(range(count))
    tokens = restated_order(layout.grid, front, back, order)
    assert geo.key_tokens.tolist() == tokens
    if start is None:
        assert geo.query_tokens.tolist() == list(range(count))
        assert not geo.sink_query.any() and (geo.own_cell == -1).all()
        return
    positions = [tokens.index(start + q) for q in geo.query_tokens.tolist()]
    assert positions == sorted(positions)
    assert geo.own_cell.tolist() == [p // 16 for p in positions]
    assert geo.sink_query.tolist() == [
        not front <= start + q < front + 105 for q in geo.query_tokens.tolist()
    ]


@examples
@given(layouts, orders, st.sampled_from((16, 32, 64, 128)), st.data())
def test_always_kept_by_brute_force(layout, order, m, data):
    """Sink cells, the tile's own cells, and everything for a tile with a sink query."""
    grid, front, back = layout
    length = TokenLayout(*layout).length
    start = data.draw(st.none() | st.integers(0, length))
    count = data.draw(st.integers(0, 70 if start is None else length - start))
    got = geometry(TokenLayout(grid, front, back, start), order, count, CPU).always_kept(m)
    tokens = restated_order(grid, front, back, order)

    def is_sink(token):
        return token < front or token >= length - back

    cells = [tokens[i : i + 16] for i in range(0, length, 16)]
    queries = [] if start is None else [t for t in tokens if start <= t < start + count]
    if start is None:
        queries = [None] * count
    for i in range(0, count, m):
        tile = queries[i : i + m]
        everything = any(q is not None and is_sink(q) for q in tile)
        for j, cell in enumerate(cells):
            expected = everything or any(is_sink(t) for t in cell) or any(q in cell for q in tile)
            assert got[i // m, j] == expected, (i // m, j)
    assert got.shape == (-(-count // m), len(cells))


@pytest.mark.parametrize(
    "arguments",
    [
        ((2, 3), 0, 0, 0),
        ((1, 2, 3, 4), 0, 0, 0),
        ((2, -1, 3), 0, 0, 0),
        ((2, 2.0, 3), 0, 0, 0),
        ((True, 2, 3), 0, 0, 0),
        ((2, 2, 2), -1, 0, 0),
        ((2, 2, 2), 0, 1.5, 0),
        ((2, 2, 2), 0, 0, -3),
        (("2", 2, 2), 0, 0, 0),
    ],
    ids=str,
)
def test_layout_rejects(arguments):
    """A wrong grid must stop before it orders anything."""
    with pytest.raises(InvalidArgument, match=r"layout: got .*allowed: whole numbers .*Give the grid"):
        TokenLayout(*arguments)


def test_layout_is_a_value():
    """Lists are taken as grids; the length counts sinks."""
    layout = TokenLayout([2, 3, 4], 5, 6)
    assert layout.grid == (2, 3, 4) and layout.length == 35
    assert TokenLayout.flat(77).length == 77
    with pytest.raises(AttributeError):
        layout.front = 1


def test_queries_outside_the_keys():
    """Queries that reach past the keys have no own cell: the caller must say what they are."""
    with pytest.raises(InvalidArgument, match=r"query_start: got 20; allowed: at most .* = 14.*None"):
        geometry(TokenLayout((1, 4, 6), query_start=20), "cells", 10, CPU)


def test_geometry_is_reused():
    """One geometry per layout: building it again would copy to the GPU in every call."""
    first = geometry(TokenLayout((4, 8, 8), 2), "cells", 100, CPU)
    assert geometry(TokenLayout((4, 8, 8), 2), "cells", 100, CPU) is first
    assert geometry(TokenLayout((4, 8, 8), 2), "raster", 100, CPU) is not first
    assert geometry(TokenLayout((4, 8, 8), 2, query_start=5), "cells", 100, CPU) is not first


@examples
@given(
    st.tuples(
        st.tuples(side, side, st.sampled_from((1, 3, 4, 8, 12, 16))), st.integers(0, 20), st.integers(0, 20)
    ),
    orders,
)
def test_boxes_hold_the_octets(layout, order):
    """TMA brings exactly the tokens of each octet, in their order; none outside the sequence."""
    grid, (_, h, w) = layout[0], layout[0]
    tokens = token_order(TokenLayout(*layout), order)
    boxes = octet_boxes(tokens, grid)
    if boxes is None:
        return
    for i, (first, kind) in enumerate(zip(boxes // 4, boxes % 4, strict=True)):
        step = {FLAT: 4, WIDE: w, DEEP: h * w}[kind]
        box = [first + pair * step + place for pair in range(2) for place in range(4)]
        expected = tokens[i * 8 : i * 8 + 8].tolist()
        assert box[8 - len(expected) :] == expected
        assert min(box) >= 0 and max(box) < len(tokens)


@pytest.mark.parametrize(
    ("grid", "kinds"),
    [((21, 30, 52), {WIDE}), ((21, 45, 80), {FLAT, WIDE, DEEP}), ((16, 32, 32), {WIDE}), ((5, 9, 10), None)],
)
def test_grids_of_video_models_are_boxes(grid, kinds):
    """Wan at 480p and 720p takes the fast path; rows that four does not divide cannot."""
    boxes = boxes_of(grid, "cells")
    assert kinds is None if boxes is None else set((boxes % 4).tolist()) == kinds
