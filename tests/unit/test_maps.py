"""Maps of a run: the right tile, the right keys, and words where there is none."""

import math

import numpy as np
import pytest
import torch
from fgattn import Settings, TokenLayout, build_plan
from fgattn.errors import InvalidArgument
from fgattn.outcomes import Outcome, Reason
from fgattn.runs import maps
from fgattn.runs.maps import MIDDLE, Maps, listed, token_at
from makers import executed_mask, in_memory_order, tensors

GRID = (4, 6, 10)
WARM_UP, DENSE_BLOCK = Reason(Outcome.WARM_UP), Reason(Outcome.DENSE_BLOCK)


def kept(settings=None, layout=None, place=MIDDLE, heads=2, batch=1):
    """A map and the plan it is of."""
    settings, layout = (
        settings or Settings(threshold=2.0, tile_queries=64, tile_keys=16),
        layout or TokenLayout(GRID),
    )
    q, k, _ = tensors(heads, layout.length, batch=batch)
    plan = build_plan(q, k, settings, layout)
    one = Maps({"7": place})
    one.keep(3, 5, plan, layout, settings.order)
    one.to_host()
    return one.find(3, 5, 0)[1], plan


@pytest.mark.parametrize(
    "layout",
    [TokenLayout(GRID), TokenLayout(GRID, 7), TokenLayout(GRID, 0, 20), TokenLayout((1, 1, 200))],
    ids=["video", "front", "back", "no grid"],
)
@pytest.mark.parametrize(
    ("m", "n", "order"),
    [
        (128, 16, "cells"),
        (64, 1, "cells"),
        (64, 4, "raster"),
        (128, 64, "hilbert"),
        (32, 16, "cells"),
        (16, 2, "raster"),
    ],
)
@pytest.mark.parametrize("place", [MIDDLE, (1, 1, 1), (4, 6, 10), (2, 5, 3)], ids=str)
def test_keys_are_those_of_the_tile_at_the_place(layout, m, n, order, place):
    """Against the scores that the plan computes, as stored, head by head."""
    found, plan = kept(Settings(threshold=2.0, tile_queries=m, tile_keys=n, order=order), layout, place)
    token = token_at(place, layout)
    for head in range(2):
        mask = in_memory_order(executed_mask(plan, 0, head), plan, 0, head)
        assert torch.equal(torch.from_numpy(found.keys(head)), mask[token])
        own = found.queries(head)
        assert own[token] and 0 < own.sum() <= max(m, 64)
        assert (mask[torch.from_numpy(own)] == mask[token]).all()
        assert found.density[head] == plan.requested[0, head] / layout.length**2


def test_queries_that_start_inside_the_sequence():
    """The video's own part of a longer sequence."""
    layout = TokenLayout((4, 4, 8), 32, query_start=32)
    q, k, _ = tensors(1, 128, 160)
    one = Maps({"7": (4, 4, 8)})
    one.keep(
        0,
        0,
        build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=16), layout),
        layout,
        "cells",
    )
    one.to_host()
    found = one.find(0, 0, 0)[1]
    assert found.queries(0)[159] and not found.queries(0)[:32].any() and found.keys(0)[:32].all()


@pytest.mark.parametrize(
    ("place", "token"),
    [
        (MIDDLE, (2 * 6 + 3) * 10 + 5),
        ((1, 1, 1), 0),
        ((4, 6, 10), 239),
        ((99, 99, 99), 239),
        ((0, 1, 2), 121),
    ],
)
def test_places(place, token):
    """From 1; 0 is the middle; outside is the last."""
    assert token_at(place, TokenLayout(GRID)) == token
    assert token_at(place, TokenLayout(GRID, 9)) == token + 9
    assert token_at(place, TokenLayout(GRID, 9, query_start=9)) == token


def one_plan(batch=1):
    layout = TokenLayout((2, 4, 8))
    q, k, _ = tensors(2, 64, batch=batch)
    return build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=16), layout), layout, "cells"


def test_the_first_call_of_a_block_is_the_one():
    """Further conditionings and evaluations of a step are left out."""
    one, first, second = Maps(), one_plan(), one_plan(2)
    one.keep(0, 1, *first)
    one.keep(0, 1, *second)
    one.skip(0, 1, Reason(Outcome.FAILED))
    one.to_host()
    assert len(one.kept) == 1 and not one.skipped
    assert torch.equal(one.kept[0, 1][MIDDLE].bits, first[0].bits[0, :, 0])


def test_calls_without_a_block_number_are_counted():
    one = Maps()
    for step in (0, 1):
        one.keep(step, None, *one_plan())
        one.skip(step, None, Reason(Outcome.DECLINED, "grouped heads"))
        one.keep(step, None, *one_plan())
    assert [*one.kept] == [(0, 0), (0, 2), (1, 0), (1, 2)] and [*one.skipped] == [(0, 1), (1, 1)]


def test_memory_is_bounded(monkeypatch):
    """What does not fit has words instead."""
    call = one_plan()
    monkeypatch.setattr(maps, "LIMIT", 2 * call[0].bits[0, :, 0].numel())
    one = Maps()
    for block in range(4):
        one.keep(0, block, *call)
    one.to_host()
    assert [*one.kept] == [(0, 0), (0, 1)] and one.find(0, 3, 0)[1].startswith(Outcome.MAPS_FULL.value)


def test_every_place_has_its_tile():
    """Two who look at one run, each at a place of its own: as if each were alone."""
    layout, settings = TokenLayout(GRID), Settings(threshold=2.0, tile_queries=64, tile_keys=16)
    q, k, _ = tensors(2, layout.length)
    plan = build_plan(q, k, settings, layout)
    places = {"5": (1, 1, 1), "12:6": (4, 6, 10)}
    both = Maps(places)
    both.keep(0, 0, plan, layout, settings.order)
    both.to_host()
    for key, place in places.items():
        alone = Maps({key: place})
        alone.keep(0, 0, plan, layout, settings.order)
        alone.to_host()
        assert both.place_for(key, MIDDLE) == place
        found, wanted = both.find(0, 0, 1, place)[1], alone.find(0, 0, 1)[1]
        assert found.queries(1)[token_at(place, layout)]
        assert np.array_equal(found.queries(1), wanted.queries(1))
        assert np.array_equal(found.keys(1), wanted.keys(1))
    assert both.find(0, 0, 1)[1] is both.find(0, 0, 1, (1, 1, 1))[1]
    assert np.array_equal(both.densities(0)[0], alone.densities(0)[0])


def test_who_came_after_the_run_sees_a_tile_of_it():
    """The one that it wants, if it is there, else the first."""
    one = Maps({"5": (1, 1, 1), "6": (2, 2, 2)})
    assert [one.place_for("7", place) for place in ((2, 2, 2), (3, 3, 3))] == [(2, 2, 2), (1, 1, 1)]
    assert Maps().place_for("7", (3, 3, 3)) == MIDDLE


def test_tiles_of_one_place_are_kept_once(monkeypatch):
    """The bound is on all of them: two places need twice the room of one."""
    call = one_plan()
    monkeypatch.setattr(maps, "LIMIT", 2 * call[0].bits[0, :, 0].numel())
    for places, steps in (({"5": MIDDLE, "6": MIDDLE}, [0, 1]), ({"5": MIDDLE, "6": (1, 1, 1)}, [0])):
        one = Maps(places)
        for step in range(3):
            one.keep(step, 0, *call)
        assert [step for step, _ in one.kept] == steps
        assert {*one.skipped.values()} == {Reason(Outcome.MAPS_FULL)}


def test_wan_at_720p_fits():
    """40 blocks, 40 heads, 75 600 keys, N = 16: 60 steps."""
    assert 60 * 40 * 40 * math.ceil(75_600 / 16 / 8) < maps.LIMIT


@pytest.fixture
def run():
    """Step 0 dense, steps 1 and 2 sparse in blocks 0 and 2; block 1 dense."""
    one = Maps()
    for step in range(3):
        for block in range(3):
            if step and block != 1:
                one.keep(step, block, *one_plan())
            else:
                one.skip(step, block, DENSE_BLOCK if block == 1 else WARM_UP)
    one.to_host()
    return one


def test_find(run):
    """A map, the last one, or why there is none and where there are some."""
    assert run.find(1, 2, 1) == (1, run.kept[1, 2][MIDDLE])
    assert run.find(-1, 2, 1) == (2, run.kept[2, 2][MIDDLE])
    assert run.find(0, 2, 0) == (0, "warm-up step; steps with a map of block 2: 2 to 3")
    assert run.find(-1, 1, 0) == (2, "listed in dense_blocks")
    assert Maps().find(-1, 0, 0)[1] == "no attention call reached FG-Attn"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((1, 3, 0), "block: got 3; allowed: 0 to 2. Blocks are counted from 0, as in reports."),
        ((3, 0, 0), "step: got 4; allowed: 1 to 3. Steps are counted from 1; 0 is the last sparse one."),
        ((1, 0, 2), "head: got 2; allowed: 0 to 1. Heads are counted from 0."),
    ],
)
def test_what_the_run_did_not_have_is_refused(run, wanted, message):
    with pytest.raises(InvalidArgument) as refused:
        run.find(*wanted)
    assert str(refused.value) == message


def test_densities(run):
    found = run.densities(1)
    assert [*found] == [0, 1, 2] and found[1] == DENSE_BLOCK
    assert np.array_equal(found[0], run.kept[1, 0][MIDDLE].density)
    assert set(run.densities(0).values()) == {WARM_UP, DENSE_BLOCK}
    assert run.densities(9) == {}


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([3, 2, 1], "1 to 3"), ([0, 2, 3, 9], "0, 2 to 3, 9")]
)
def test_listed(numbers, text):
    assert listed(numbers) == text
