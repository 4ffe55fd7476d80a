"""The planning and tail kernels against the torch path and the reference, in Triton's interpreter."""

import dataclasses
import math

import pytest
import torch
from calls import INFINITE_BOUND, plan_calls
from fgattn import Settings, TokenLayout, attend, build_plan, reference
from fgattn.backends import execute
from fgattn.backends.pytorch.scoring import summarise as summarise_torch
from fgattn.layout import geometry
from fgattn.settings import TILE_KEYS, TILE_QUERIES
from hypothesis import example, given
from hypothesis import settings as examples
from makers import CASES, assert_lists_agree, planned, random_mask, random_valid, tail_of
from makers import tensors as make

pytest.importorskip("triton", reason="no Triton: nothing to interpret")
from fgattn.backends.shared.launch import key_rows, query_rows
from fgattn.backends.shared.summarise import summarise

LAYOUT = TokenLayout((2, 5, 9), front=3, back=5)  # 98 tokens


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("padded", [False, True])
def test_summaries(padded, dim):
    """Means, squares and variances of short, partly and wholly missing runs, through strides."""
    length = 98
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(2, length, dim=dim, batch=2))
    valid = random_valid(2, length) if padded else None
    if padded:
        valid[1, 16:32] = False
    layout = TokenLayout((2, 5, 9), 3, 5, query_start=20)
    geo = geometry(layout, "cells", 40, q.device)
    q, rows = q[:, :, :40], (query_rows(geo), key_rows(geo, valid))
    made = summarise(q, k, v, *rows, second=True)
    for b in range(2):
        row = rows[1][b if padded else 0, :length].long()
        centroid = summarise_torch(q[b][:, geo.query_tokens])[0]
        mean, variance, _ = summarise_torch(k[b][:, row.clamp(min=0)], row >= 0, variance=True)
        value = summarise_torch(v[b][:, row.clamp(min=0)], row >= 0)[0]
        for got, expected in zip(made, (centroid, centroid.square(), mean, variance, value), strict=True):
            torch.testing.assert_close(got.unflatten(0, (2, 2))[b], expected, atol=1e-6, rtol=1e-5)
    parts = summarise(q, k, None, *rows), summarise(None, None, v, *rows)
    for name in ("centroid", "mean", "value"):
        assert torch.equal(getattr(parts[name == "value"], name), getattr(made, name))
    assert [x is None for x in (*parts[0], *parts[1])] == [0, 1, 0, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("n", TILE_KEYS)
@pytest.mark.parametrize("m", TILE_QUERIES)
def test_lists_of_every_tile_shape(m, n):
    """Bits and counts against the reference."""
    q, k, _ = make(2, 98, seed=m + n)
    settings = Settings(threshold=2.0, tile_queries=m, tile_keys=n)
    plan = build_plan(q, k, settings, LAYOUT, impl="triton")
    assert_lists_agree(plan, reference.select(q, k, settings, LAYOUT), m)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lists_of_every_kind_of_sequence(case):
    """Grids, sinks, missing keys, partial and foreign queries: equal to the torch path."""
    q, k, _ = case.tensors()
    for settings in (
        Settings(threshold=2.0, tile_queries=64, tile_keys=16),
        Settings(threshold=1.0, tile_queries=128, tile_keys=32),
        Settings(threshold=0.0, tile_queries=32, tile_keys=16),
        Settings(threshold=1.5, tile_queries=32, tile_keys=2),
    ):
        plan = build_plan(q, k, settings, case.layout(), impl="triton")
        assert_lists_agree(plan, reference.select(q, k, settings, case.layout()), settings.tile_queries)


@examples(max_examples=20, deadline=None, derandomize=True)
@example(INFINITE_BOUND)
@given(plan_calls(largest=(2, 4, 7), most_sinks=12, dtypes=("fp32", "fp16")))
def test_any_call_selects_as_the_reference(call):
    """The same as in the torch path's test: every kind of sequence, all M x N, bad values, empty sides."""
    q, k = call.tensors()
    call.check(build_plan(q, k, call.settings, call.layout, scale=call.scale, impl="triton"), reference)


def test_more_than_one_block():
    """1 300 tokens: two blocks of centroids, two of cells."""
    layout = TokenLayout((5, 10, 26))
    q, k, v = make(1, layout.length, dtype=torch.float16)
    plan = build_plan(q, k, Settings(threshold=2.5), layout, impl="triton")
    expected = build_plan(q, k, Settings(threshold=2.5), layout, impl="torch")
    assert 0.05 < plan.density < 0.9
    assert torch.equal(plan.bits, expected.bits) and torch.equal(plan.requested, expected.requested)
    assert_same_tail(q, k, v, plan, 2e-3)
    fine = build_plan(q, k, Settings(threshold=2.5, tile_queries=64, tile_keys=1), layout, impl="triton")
    assert torch.equal(
        fine.bits,
        build_plan(q, k, Settings(threshold=2.5, tile_queries=64, tile_keys=1), layout, impl="torch").bits,
    )


def test_missing_keys_far_above_all_scores():
    """Cells without keys have zero means; where all scores are far below zero they must not set the scale."""
    layout = TokenLayout((2, 5, 9), front=3, back=5, key_valid=torch.ones(1, 98, dtype=torch.bool))
    layout.key_valid[:, 64:] = False
    q, k, _ = make(1, 98)
    q[..., 0], k[..., 0] = 40.0, -40.0
    for n in (4, 16):
        plan = build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=n), layout, impl="triton")
        expected = build_plan(
            q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=n), layout, impl="torch"
        )
        assert 0 < plan.density < 0.9 and torch.equal(plan.bits, expected.bits)


@pytest.mark.parametrize("n", [2, 16, 32])
@pytest.mark.parametrize("m", [16, 32])
def test_tiles_are_grouped_as_in_torch(m, n):
    """More tiles than a window, a short one at the end: the same order, lists, counts and tail."""
    layout = TokenLayout((4, 17, 19))
    q, k, v = make(2, layout.length, dtype=torch.float16)
    plan, expected = (
        build_plan(q, k, Settings(threshold=2.0, tile_queries=m, tile_keys=n), layout, impl=i)
        for i in ("triton", "torch")
    )
    assert torch.equal(plan.cell_order, expected.cell_order)
    assert torch.equal(plan.bits, expected.bits)
    assert torch.equal(plan.requested, expected.requested) and torch.equal(plan.executed, expected.executed)
    assert_same_tail(q, k, v, plan, 2e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_extreme_queries_and_keys(value):
    """NaN keeps, infinities and huge values select as in torch."""
    for side in (0, 1):
        tensors = make(1, 98)
        tensors[side][0, 0, 40, 3] = value
        q, k, _ = tensors
        for n in (4, 16):
            plan = build_plan(
                q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=n), LAYOUT, impl="triton"
            )
            assert torch.equal(
                plan.bits,
                build_plan(
                    q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=n), LAYOUT, impl="torch"
                ).bits,
            )


def assert_same_tail(q, k, v, plan, tolerance=1e-5):
    out, lse = tail_of(q, k, v, plan, "triton")
    expected_out, expected_lse = tail_of(q, k, v, plan)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(out, expected_out, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 128])
def test_tail_of_every_slice_width(n):
    """Ragged cells and slices; 64-row and 128-row tiles; -inf where nothing is skipped."""
    q, k, v = make(2, 98, seed=n)
    for m in (32, 128):
        assert_same_tail(
            q, k, v, build_plan(q, k, Settings(threshold=2.0, tile_queries=m, tile_keys=n), LAYOUT)
        )
    assert (
        tail_of(
            q, k, v, build_plan(q, k, Settings(threshold=0.0, tile_queries=64, tile_keys=n), LAYOUT), "triton"
        )[1]
        .isneginf()
        .all()
    )


@pytest.mark.parametrize("scale", [None, -0.2])
def test_summaries_of_a_plan_serve_its_tail(scale):
    """What planning summarised is not read again, and changes nothing; a negative scale has none to offer."""
    q, k, v = make(2, 98)
    settings = Settings(threshold=2.0, tile_queries=64, tile_keys=4)
    call, backend, made = planned(q, k, v, settings, LAYOUT, scale=scale)
    assert (made.made is None) == (scale is not None)
    assert torch.equal(
        execute.attend(call, backend, made, torch.empty_like(q)), attend(q, k, v, made.plan, impl="triton")
    )


def test_kernels_write_a_part_of_the_heads():
    """As large calls do: slices of q, k, v and the output, all stored by token."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(3, 98))
    whole = attend(
        q,
        k,
        v,
        build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=4), LAYOUT, impl="triton"),
    )
    out = torch.empty_like(q)
    for of in (slice(0, 1), slice(1, 3)):
        settings = Settings(threshold=2.0, tile_queries=64, tile_keys=4)
        call, backend, made = planned(q[:, of], k[:, of], v[:, of], settings, LAYOUT)
        execute.attend(call, backend, made, out[:, of])
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tail_of_every_kind_of_sequence(case):
    """Missing keys, other lengths, batches."""
    q, k, v = case.tensors()
    for n in (2, 16):
        assert_same_tail(
            q, k, v, build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=n), case.layout())
        )


@pytest.mark.parametrize(("m", "tiles"), [(64, 2), (16, 7)])
def test_one_plan_for_all_heads(m, tiles):
    """Plans from masks may have one batch row and head."""
    from fgattn import plan_from_mask

    q, k, v = make(2, 98, batch=2)
    plan = plan_from_mask(random_mask(tiles, 7), m, 16, query_length=98, key_length=98, tail=True)
    assert_same_tail(q, k, v, plan)
    torch.testing.assert_close(
        attend(q, k, v, plan, impl="triton"), attend(q, k, v, dataclasses.replace(plan), impl="torch")
    )
