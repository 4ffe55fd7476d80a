"""Plans: packing, counts, plans from masks of other methods, and what is refused."""

import dataclasses
import doctest
import itertools

import pytest
import torch
from fgattn import InvalidArgument, Settings, TokenLayout, Unsupported, attend, build_plan, plan_from_mask
from fgattn.settings import TILE_KEYS, TILE_QUERIES
from makers import executed_mask, in_memory_order, random_mask, random_valid
from makers import tensors as make

LAYOUT = TokenLayout((3, 7, 10), front=3, back=9)  # 222 tokens
LENGTH = LAYOUT.length


def tiles_and_slices(m, n, queries=LENGTH, keys=LENGTH):
    return -(-queries // m), -(-keys // n)


@pytest.mark.parametrize("n", TILE_KEYS)
@pytest.mark.parametrize("m", TILE_QUERIES)
def test_mask_survives_packing(m, n):
    """Bits, union over tiles that run together, short last tiles, counts: all by brute force."""
    tiles, slices = tiles_and_slices(m, n)
    mask = random_mask(2, 3, tiles, slices, seed=m + n)
    valid = random_valid(2, LENGTH, seed=n)
    layout = dataclasses.replace(LAYOUT, key_valid=valid)
    made = plan_from_mask(mask, m, n, query_length=LENGTH, layout=layout)
    in_order = valid[:, made.geometry.key_tokens]
    assert torch.equal(made.key_valid, in_order)
    rows = max(m, 64)
    assert made.tile_rows == rows and made.bits.shape == (2, 3, -(-LENGTH // rows), 16 * -(-slices // 128))
    for b, h in itertools.product(range(2), range(3)):
        wanted = mask[b, h].repeat_interleave(m, 0)[:LENGTH].repeat_interleave(n, 1)[:, :LENGTH] & in_order[b]
        if m < 64:  # rows in their order of execution
            positions = made.cell_order[b, h, :, None] * 16 + torch.arange(16)
            wanted = wanted[positions.flatten()[:LENGTH].long()]
        union = torch.cat([part.any(0, keepdim=True).expand(len(part), -1) for part in wanted.split(rows)])
        assert torch.equal(executed_mask(made, b, h), union)
        assert made.requested[b, h] == wanted.sum() and made.executed[b, h] == union.sum()
    scores = 6 * LENGTH**2
    assert made.density.item() == pytest.approx(made.requested.sum().item() / scores, abs=1e-12)
    assert made.executed_density.item() == pytest.approx(made.executed.sum().item() / scores, abs=1e-12)


@pytest.mark.parametrize("n", [1, 16, 64])
def test_slices_without_valid_keys_are_not_listed(n):
    """Half a batch may be padding: its keys would be gathered for nothing."""
    valid = torch.arange(LENGTH)[None] < 100
    layout = TokenLayout.flat(LENGTH)
    layout = dataclasses.replace(layout, key_valid=valid)
    q, k, _ = make(1, LENGTH)
    everything = torch.ones(tiles_and_slices(64, n), dtype=torch.bool)
    for made in (
        build_plan(q, k, Settings(threshold=0.0, tile_queries=64, tile_keys=n), layout),
        plan_from_mask(everything, 64, n, query_length=LENGTH, layout=layout),
    ):
        kept = made.kept_slices(0, slice(None))[0]
        assert kept[:, : -(-100 // n)].all() and not kept[:, -(-100 // n) :].any()


def test_density_counts_short_tiles_by_their_size():
    """One tile of 64 and one of 16 rows: the short one must weigh a fifth, not half."""
    mask = torch.tensor([[True, False], [False, True]])  # 64 x 64 and 16 x 6 scores
    made = plan_from_mask(mask, 64, 64, query_length=80, key_length=70)
    assert made.requested.item() == 64 * 64 + 16 * 6
    assert made.density.item() == (64 * 64 + 16 * 6) / (80 * 70)


def test_executed_density_of_small_tiles():
    """16-row tiles with different keys: each asks for a quarter, the kernel tile computes all."""
    made = plan_from_mask(torch.eye(4, dtype=torch.bool), 16, 16)
    assert made.density.item() == 0.25 and made.executed_density.item() == 1.0


@pytest.mark.parametrize("extra", [(), (3,), (2, 3)], ids=["[tiles, slices]", "[H, ..]", "[B, H, ..]"])
def test_mask_without_batch_or_heads_serves_all(extra):
    """A static mask is made once and used by every head and batch row."""
    mask = random_mask(*extra, 2, 14, seed=2)
    made = plan_from_mask(mask, 128, 16, query_length=LENGTH, key_length=LENGTH)
    full = plan_from_mask(mask.expand(2, 3, 2, 14).clone(), 128, 16, query_length=LENGTH, key_length=LENGTH)
    q, k, v = make(3, LENGTH, batch=2)
    for impl in ("torch", "reference"):
        assert torch.equal(attend(q, k, v, made, impl=impl), attend(q, k, v, full, impl=impl))
    assert made.density.item() == pytest.approx(full.density.item(), abs=1e-12)


@pytest.mark.parametrize("order", ["cells", "raster"])
def test_mask_counts_in_the_order(order):
    """A mask of another method addresses runs of the order, not of memory."""
    mask = torch.zeros(LENGTH // 16 + 1, LENGTH // 16 + 1, dtype=torch.bool)
    mask[2, 5] = True
    made = plan_from_mask(mask, 16, 16, query_length=LENGTH, layout=LAYOUT, order=order)
    stored = in_memory_order(executed_mask(made, 0, 0), made)
    tokens = made.geometry.key_tokens
    assert sorted(stored.any(0).nonzero().flatten().tolist()) == sorted(tokens[80:96].tolist())
    if order == "raster":
        assert tokens[80:96].tolist() == list(range(83, 99))  # the front sinks stand last


@pytest.mark.parametrize(
    ("mask", "options", "what"),
    [
        (torch.ones(2, 14), {}, r"mask: got \(torch.float32, .*bool \[tiles, slices\].*Threshold scores"),
        (torch.ones(14, dtype=torch.bool), {}, r"mask: got .*bool \[tiles, slices\]"),
        (torch.ones(1, 1, 1, 2, 14, dtype=torch.bool), {}, r"mask: got .*bool \[tiles, slices\]"),
        (
            torch.ones(2, 14, dtype=torch.bool),
            {"query_length": 300},
            r"mask tiles and slices: got \(2, 14\); allowed: \(3, 14\) for L_q=300"
            ".*query_length and key_length",
        ),
        (
            torch.ones(2, 14, dtype=torch.bool),
            {"key_length": 240},
            r"\(2, 14\); allowed: \(2, 15\) .* L_k=240",
        ),
        (torch.ones(2, 14, dtype=torch.bool), {"key_length": 200}, r"got \(2, 14\); allowed: \(2, 13\)"),
        (
            torch.ones(2, 14, dtype=torch.bool),
            {"layout": LAYOUT},
            r"query_start: got 0; allowed: at most .*None",
        ),
        (
            torch.ones(2, 14, dtype=torch.bool),
            {"layout": LAYOUT, "query_length": 222, "key_length": 210},
            r"layout.length: got 222; allowed: L_k = 210",
        ),
        (torch.ones(2, 14, dtype=torch.bool), {"order": "morton"}, "order: got 'morton'"),
        (torch.ones(2, 14, dtype=torch.bool), {"tail": None}, "tail: got None"),
    ],
    ids=[
        "floats",
        "1-D",
        "5-D",
        "too few tiles",
        "too few slices",
        "too many slices",
        "queries beyond the keys",
        "length against layout",
        "order",
        "tail",
    ],
)
def test_mask_that_does_not_fit(mask, options, what):
    """A mask of the wrong grain would be a silently wrong picture."""
    with pytest.raises(InvalidArgument, match=what):
        plan_from_mask(mask, 128, 16, **options)


@pytest.mark.parametrize(
    ("m", "n", "what"), [(48, 16, "tile_queries: got 48"), (128, 24, "tile_keys: got 24")]
)
def test_mask_with_other_tiles(m, n, what):
    """Only tiles the kernels have."""
    with pytest.raises(InvalidArgument, match=what):
        plan_from_mask(torch.ones(2, 2, dtype=torch.bool), m, n)


@pytest.mark.parametrize(
    ("valid", "what"),
    [
        (torch.ones(1, 222), r"key_valid: got \(torch.float32, .*bool \(2, 222\).*one row per batch row"),
        (torch.ones(1, 222, dtype=torch.bool), r"got \(torch.bool, \(1, 222\)\); allowed: bool \(2, 222\)"),
        (torch.ones(2, 221, dtype=torch.bool), r"got \(torch.bool, \(2, 221\)\)"),
        (torch.ones(222, dtype=torch.bool), r"got \(torch.bool, \(222,\)\)"),
    ],
    ids=["floats", "too few rows", "too short", "no batch"],
)
def test_key_valid_that_does_not_fit(valid, what):
    """A text mask of the wrong shape must not be broadcast by accident."""
    q, k, _ = make(1, 222, batch=2)
    with pytest.raises(InvalidArgument, match=what):
        build_plan(q, k, Settings(), dataclasses.replace(LAYOUT, key_valid=valid))


@pytest.mark.parametrize(
    ("layout", "queries", "what"),
    [
        (TokenLayout((3, 7, 10)), 222, r"layout.length: got 210; allowed: L_k = 222. Count every token"),
        (TokenLayout((3, 7, 10), 3, 9, query_start=1), 222, r"query_start: got 1; allowed: at most .* = 0"),
        (TokenLayout((1, 1, 222)), 230, r"query_start: got 0; allowed: at most .* = -8.*None"),
    ],
    ids=["sinks forgotten", "shifted queries", "more queries than keys"],
)
def test_layout_that_does_not_fit(layout, queries, what):
    """A wrong grid would order the wrong tokens together."""
    q, k, _ = make(1, queries, 222)
    with pytest.raises(InvalidArgument, match=what):
        build_plan(q, k, Settings(), layout)


def test_unsupported_tensors_are_declined_before_planning():
    """The engine goes dense on Unsupported; planning on such tensors would waste the call."""
    q, k, _ = make(4, 222)
    with pytest.raises(Unsupported, match="grouped heads"):
        build_plan(q, k[:, :2], Settings(), LAYOUT)


@pytest.mark.parametrize(
    ("queries", "keys", "batch", "heads"), [(0, 100, 1, 2), (100, 0, 1, 2), (0, 0, 2, 1)]
)
def test_empty_sides(queries, keys, batch, heads):
    """Nothing to attend is not an error; densities stay finite."""
    q, k, _ = make(heads, queries, keys, batch=batch)
    made = build_plan(q, k, Settings(), TokenLayout.flat(keys, None))
    assert made.queries == queries and made.keys == keys
    assert made.requested.tolist() == [[0.0] * heads] * batch
    assert made.density == 0 and made.executed_density == 0


def test_plan_is_immutable():
    """Plans are kept across steps: a shared one must not change."""
    made = plan_from_mask(torch.ones(1, 1, dtype=torch.bool), 64, 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.tail = True


def test_no_query_length_means_full_tiles():
    """Without lengths, mask tiles and slices are all full."""
    made = plan_from_mask(torch.ones(3, 5, dtype=torch.bool), 32, 8)
    assert (made.queries, made.keys) == (96, 40) and not made.tail


def test_bits_of_slices_past_the_end_are_zero():
    """The kernel reads whole bytes; a stray bit would be a key that does not exist."""
    q, k, _ = make(1, 222)
    for n in TILE_KEYS:
        bits = build_plan(q, k, Settings(threshold=0.0, tile_queries=64, tile_keys=n), LAYOUT).bits
        places = torch.arange(8, dtype=torch.uint8)
        unpacked = (bits[..., None] >> places & 1).flatten(-2)
        slices = -(-222 // n)
        assert unpacked[..., :slices].all() and not unpacked[..., slices:].any()


def test_docstring_example():
    """The example of the docs compares with dense attention."""
    torch.manual_seed(0)
    names = {
        "torch": torch,
        "attend": attend,
        "build_plan": build_plan,
        "Settings": Settings,
        "TokenLayout": TokenLayout,
    }
    found = doctest.DocTestFinder(recurse=False).find(build_plan, "build_plan", globs=names)
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert runner.summarize().attempted >= 5 and runner.summarize().failed == 0
