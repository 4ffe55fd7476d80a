"""The Triton kernels against the reference, on the CPU in Triton's interpreter."""

import dataclasses

import pytest
import torch
from fgattn import Settings, TokenLayout, attend, build_plan, plan_from_mask, sparse_attention
from fgattn.backends.hopper.boxes import octet_boxes
from fgattn.backends.shared import plan_table
from fgattn.backends.triton.launch_table import Row
from fgattn.settings import TILE_KEYS
from makers import (
    CASES,
    assert_error_of_rounding,
    executed_mask,
    mask_plan,
    poisoned,
    random_mask,
    random_valid,
    without_tail,
)
from makers import tensors as make

launch = pytest.importorskip("fgattn.backends.shared.launch", reason="no Triton: nothing to interpret")
key_lists = pytest.importorskip("fgattn.backends.shared.lists")
planning = pytest.importorskip("fgattn.backends.shared.planning")
refine = pytest.importorskip("fgattn.backends.shared.refine")
attend_kernels = pytest.importorskip("fgattn.backends.triton.attend")

LAYOUT = TokenLayout((2, 5, 9), front=3, back=5)  # 98 tokens
LENGTH = LAYOUT.length
TYPES = {"fp32": torch.float32, "fp16": torch.float16}


def assert_kernel(q, k, v, plan):
    got = attend(q, k, v, plan, impl="triton")
    assert got.shape == q.shape and got.dtype == q.dtype and got.isfinite().all()
    assert_error_of_rounding(got, q, k, v, plan)
    return got


def test_this_is_the_interpreter():
    """Otherwise every test here would be refused, not run."""
    assert launch.IS_INTERPRETED


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", TILE_KEYS)
@pytest.mark.parametrize("m", [16, 64, 128])
def test_every_tile_shape(m, n, dtype):
    """Planned lists, sinks on both sides, ragged last tile, slice and cell; with and without tail."""
    q, k, v = make(1, LENGTH, dtype=TYPES[dtype], seed=n)
    plan = build_plan(q, k, Settings(threshold=3.0, tile_queries=m, tile_keys=n), LAYOUT)
    assert_kernel(q, k, v, plan if (m + n) % 3 else without_tail(plan))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_kind_of_sequence(case):
    """Grids, sinks, missing keys, partial and foreign queries, tiny sequences; both head sizes."""
    case = dataclasses.replace(case, heads=1)
    dim, n = (128, 1) if case.padded else (64, 4)
    q, k, v = case.tensors(dim)
    assert_kernel(
        q, k, v, build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=n), case.layout())
    )


@pytest.mark.parametrize("n", [1, 16, 128])
def test_head_size_128(n):
    """The size of the large video models."""
    q, k, v = make(1, LENGTH, dim=128, dtype=torch.float16)
    assert_kernel(q, k, v, build_plan(q, k, Settings(threshold=2.0, tile_queries=128, tile_keys=n), LAYOUT))


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-50, -0.1])
@pytest.mark.parametrize("keys", [25, 64, 100])
def test_scales_that_are_not_positive(keys, scale):
    """Short last steps have masked scores, which a scale of zero must not make NaN."""
    q, k, v = make(1, keys)
    plan = build_plan(q, k, Settings(threshold=1.0), TokenLayout.flat(keys), scale=scale, impl="torch")
    assert_kernel(q, k, v, plan)


def test_a_call_without_queries():
    """All of them are absent: zeros, and no kernel."""
    layout = TokenLayout((2, 4, 4), front=2, absent=(0, 1))
    q, k, v = make(1, 2, 34)
    for impl in ("triton", "torch"):
        assert not sparse_attention(q, k, v, Settings(), layout, impl=impl).any()
        assert not attend(q, k, v, build_plan(q, k, Settings(), layout, impl="torch"), impl=impl).any()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("n", [1, 16, 128])
def test_rows_looked_up_ahead_or_in_time(n, ahead, monkeypatch):
    """Either kind of list, with several steps of the loop."""
    launch = attend_kernels.launch_for(80, 64, 128).cells._replace(ahead=ahead)
    monkeypatch.setattr(attend_kernels, "launch_for", lambda *_: Row(launch, launch))
    q, k, v = make(1, LENGTH)
    assert_kernel(q, k, v, build_plan(q, k, Settings(threshold=2.0, tile_queries=128, tile_keys=n), LAYOUT))


@pytest.mark.parametrize("generation", ["cdna", "rdna2", "rdna3"])
@pytest.mark.parametrize("n", [1, 16])
def test_other_makers_settings(n, generation, monkeypatch):
    """Smaller blocks of planning, and two programs that share a tile."""
    plan_launch = plan_table.plan_launch_of(generation)
    monkeypatch.setattr(planning, "plan_launch", lambda device: plan_launch)
    monkeypatch.setattr(refine, "plan_launch", lambda device: plan_launch)
    monkeypatch.setattr(attend_kernels, "generation", lambda device: generation)
    q, k, v = make(1, 2 * LENGTH + 9, dim=128, dtype=torch.float16)
    layout = TokenLayout((4, 5, 10), front=3, back=2)
    settings = Settings(threshold=2.0, tile_queries=128, tile_keys=n)
    plan = build_plan(q, k, settings, layout, impl="triton")
    assert (plan.bits != build_plan(q, k, settings, layout, impl="torch").bits).float().mean() < 0.01
    assert_kernel(q, k, v, plan)


@pytest.mark.parametrize("has_tail", [False, True], ids=["no tail", "tail"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 123])
def test_lengths(length, has_tail):
    """The masked last step: lists of every remainder."""
    q, k, v = make(2, length, seed=length)
    for m, n in ((64, 1), (128, 16), (32, 8)):
        assert_kernel(q, k, v, mask_plan(m, n, length, heads=2, seed=length, tail=has_tail))


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_list_lengths(n):
    """One list of every length, so that each boundary of a step is met."""
    length = 16 * n if n > 4 else 140
    slices = -(-length // n)
    mask = torch.ones(1, 16, slices).cumsum(2) <= torch.linspace(0, slices, 16).round()[:, None]
    q, k, v = make(16, 20, length, seed=n)
    plan = plan_from_mask(mask.transpose(0, 1), 128, n, query_length=20, key_length=length)
    got = assert_kernel(q, k, v, plan)
    assert (got[:, 0] == 0).all() and (got[:, 1:] != 0).any(3).all()


@pytest.mark.parametrize("n", [1, 8, 16, 32])
@pytest.mark.parametrize("has_tail", [False, True], ids=["no tail", "tail"])
def test_missing_keys(n, has_tail):
    """Their rows hold NaN and must not be read into anything; batch rows miss different keys."""
    valid = random_valid(2, LENGTH)
    layout = dataclasses.replace(LAYOUT, key_valid=valid)
    q, k, v = make(1, LENGTH, batch=2)
    plan = build_plan(q, k, Settings(threshold=1.5, tile_queries=64, tile_keys=n, tail=has_tail), layout)
    clean = attend(q, k, v, plan, impl="triton")
    k, v = poisoned(k, valid), poisoned(v, valid)
    assert torch.equal(assert_kernel(q, k, v, plan), clean)


@pytest.mark.parametrize(("m", "n"), [(128, 16), (16, 4), (32, 1), (64, 32)])
def test_absent_tokens(m, n):
    """Planned and attended as if they were not in memory, where they hold NaN; their outputs are zeros."""
    layout = TokenLayout((3, 6, 10), front=30, back=12, absent=(0, 1, *range(17, 30), 215))
    there = torch.tensor([t for t in range(layout.length) if t not in layout.absent])
    q, k, v = make(2, layout.length)
    short = [x.index_select(2, there) for x in (q, k, v)]
    plan = build_plan(
        *short[:2],
        Settings(threshold=1.5, tile_queries=m, tile_keys=n),
        TokenLayout((3, 6, 10), 15, 11),
        impl="triton",
    )
    expected = attend(*short, plan, impl="triton")
    for x in (q, k, v):
        x[:, :, list(layout.absent)] = float("nan")
    whole = build_plan(q, k, Settings(threshold=1.5, tile_queries=m, tile_keys=n), layout, impl="triton")
    assert torch.equal(whole.bits, plan.bits) and torch.equal(whole.executed, plan.executed)
    got = attend(q, k, v, whole, impl="triton")
    assert torch.equal(got.index_select(2, there), expected) and not got[:, :, list(layout.absent)].any()


@pytest.mark.parametrize("has_tail", [False, True], ids=["no tail", "tail"])
def test_no_valid_key(has_tail):
    """Zeros, never NaN."""
    valid = torch.zeros(1, 70, dtype=torch.bool)
    q, k, v = make(1, 70)
    layout = TokenLayout((1, 1, 70), key_valid=valid)
    k, v = poisoned(k, valid), poisoned(v, valid)
    plan = build_plan(q, k, Settings(threshold=1.0, tile_queries=64, tile_keys=1, tail=has_tail), layout)
    assert (attend(q, k, v, plan, impl="triton") == 0).all()


def test_empty_list():
    """Zeros without a tail, the tail alone with one."""
    q, k, v = make(1, 130)
    for n in (1, 16):
        for has_tail in (False, True):
            plan = mask_plan(64, n, 130, share=0.3, tail=has_tail)
            got = assert_kernel(q, k, v, plan)
            assert (got[:, :, :64] == 0).all() != has_tail


@pytest.mark.parametrize("n", [1, 16])
def test_mask_is_honoured(n):
    """Negative control: skipped keys may hold anything, kept ones matter."""
    q, k, v = make(1, LENGTH)
    q = 0.1 * q  # so even that every key matters
    plan = mask_plan(64, n, LENGTH)
    before = attend(q, k, v, plan, impl="triton")
    skipped = ~executed_mask(plan, 0, 0)[-1]
    louder = [x.clone() for x in (k, v)]
    for x in louder:
        x[:, :, skipped] += 50.0
    assert torch.equal(attend(q, *louder, plan, impl="triton")[:, :, 64:], before[:, :, 64:])
    v[:, :, ~skipped] += 1.0
    assert (attend(q, k, v, plan, impl="triton")[:, :, 64:] - before[:, :, 64:] > 0.9).all()


@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (1, 2), (1, 1)], ids=lambda s: f"mask {s[0]}x{s[1]}")
def test_masks_that_serve_several_heads(shape):
    """A plan of one row or head is broadcast by strides of zero."""
    q, k, v = make(2, LENGTH, batch=2)
    plan = mask_plan(64, 4, LENGTH, batch=shape[0], heads=shape[1], seed=5)
    assert plan.bits.shape[:2] == shape
    assert_kernel(q, k, v, plan)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_groups_of_heads(group, monkeypatch):
    """Long lists are made for a few heads of one batch row at a time."""
    valid = random_valid(2, LENGTH)
    q, k, v = make(3, LENGTH, batch=2)
    k, v = poisoned(k, valid), poisoned(v, valid)
    plan = build_plan(
        q,
        k,
        Settings(threshold=2.0, tile_queries=64, tile_keys=2),
        dataclasses.replace(LAYOUT, key_valid=valid),
    )
    whole = attend(q, k, v, plan, impl="triton")
    made = []
    kernel = key_lists.list_kernel

    class Counting:
        def __getitem__(self, grid):
            made.append(grid[1])
            return kernel[grid]

    monkeypatch.setattr(key_lists, "list_kernel", Counting())
    monkeypatch.setattr(key_lists, "LIST_BYTES", 4 * 2 * 128 * group)  # 98 keys and the end, aligned
    assert torch.equal(attend(q, k, v, plan, impl="triton"), whole)
    assert made == 2 * {1: [1, 1, 1], 2: [2, 1], 3: [3]}[group]


@pytest.mark.parametrize("view", ["[B, L, H, D]", "fused qkv", "gaps"])
def test_strides(view):
    """Rows are addressed, never copied."""
    q, k, v = make(2, LENGTH, batch=2)
    if view == "[B, L, H, D]":
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elif view == "fused qkv":
        whole = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
        views = [whole[:, :, i].transpose(1, 2) for i in range(3)]
    else:
        views = []
        for x in (q, k, v):
            wide = torch.full((2, 2, 2 * LENGTH, 72), float("nan"))
            wide[:, :, ::2, :64] = x
            views.append(wide[:, :, ::2, :64])
    plan = build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=4), LAYOUT)
    assert torch.equal(attend(*views, plan, impl="triton"), attend(q, k, v, plan, impl="triton"))


@pytest.mark.parametrize("scale", [0.02, 0.7])
def test_scale(scale):
    """Folded into base 2 once."""
    q, k, v = make(1, LENGTH)
    assert_kernel(
        q, k, v, build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=4), LAYOUT, scale=scale)
    )


def test_large_scores():
    """The running maximum: late keys may beat everything before."""
    q, k, v = make(1, LENGTH)
    k = k * torch.linspace(0.1, 30, LENGTH)[:, None]
    for has_tail in (False, True):
        assert_kernel(q, k, v, mask_plan(64, 1, LENGTH, share=0.8, tail=has_tail))


@pytest.mark.parametrize(
    ("n", "unit"),
    [
        (1, "key"),
        (4, "key"),
        (32, "key"),
        (1, "cell"),
        (2, "cell"),
        (16, "cell"),
        (32, "cell"),
        (128, "cell"),
        (8, "box"),
        (16, "box"),
        (128, "box"),
    ],
)
@pytest.mark.parametrize("keys", [1111, 1024, 64, 15])
def test_lists_say_what_the_bits_say(n, unit, keys, monkeypatch):
    """Ascending and complete, across steps of the scan and programs that share a list; their ends marked."""
    monkeypatch.setattr(key_lists, "LIST_BLOCK", 128)
    monkeypatch.setattr(key_lists, "LIST_SPAN", 256)
    valid = random_valid(1, keys) if unit == "key" else None
    layout = TokenLayout((1, 1, keys), key_valid=valid, query_start=None)
    mask = random_mask(3, -(-keys // n))
    mask[0], mask[1] = True, False
    plan = plan_from_mask(mask, 64, n, layout=layout, query_length=150, key_length=keys)
    boxes = torch.from_numpy(octet_boxes(plan.geometry.host_tokens, layout.grid)) if unit == "box" else None
    lists = key_lists.Lists(plan, 1, 1, boxes)
    assert list(lists.launches()) == [(0, 0, 1)]
    width = {"key": 1, "cell": 16 if n >= 16 else 1, "box": 8}[unit]
    assert lists.unit == width
    for tile in range(3):
        kept = plan.kept_keys(0, slice(0, 1))[0, tile]
        units = torch.arange(0, keys, width)[kept[::width]] // width
        entries = units if lists.entries is None else lists.entries.flatten()[units]
        assert lists.lists[0, tile, : len(units) + 16].tolist() == entries.tolist() + [-1] * 16
        assert lists.listed[0, tile] == kept.sum()
