"""Selection: the reference against the definitions, and build_plan against the reference."""

import itertools
import math

import pytest
import torch
from calls import INFINITE_BOUND, plan_calls
from fgattn import Settings, TokenLayout, build_plan, packing, reference, tensors
from fgattn.backends.pytorch import select as selection
from fgattn.layout import geometry
from fgattn.settings import TILE_KEYS, TILE_QUERIES
from hypothesis import example, given
from hypothesis import settings as examples
from makers import CASES, assert_lists_agree, poisoned, random_valid, restated_order
from makers import tensors as make

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
THRESHOLDS = (0.7, 1.2, 2.0, 4.0)
LAYOUT = TokenLayout((3, 7, 10), front=3, back=9)  # 222 tokens


def kept_of(q, k, settings, layout=LAYOUT, **options):
    """Executed slices, bool [B, H, tiles, slices]."""
    made = build_plan(q, k, settings, layout, **options)
    return torch.stack([made.kept_slices(b, slice(None)) for b in range(len(q))])


def requested_of(q, k, settings):
    """Requested slices, bool [H, tiles, slices], before tiles are joined."""
    geo = geometry(LAYOUT, settings.order, q.shape[2], q.device)
    rows, keys = q[0][:, geo.query_tokens], k[0][:, geo.key_tokens]
    return selection.select(rows, keys, None, geo, settings, q.shape[3] ** -0.5)[0]


def defined_slices(q, k, settings, layout, valid, scale):
    """Requested slices of one head, [tile][slice], written from the definitions alone."""
    front, back, start = layout.front, layout.back, layout.query_start
    tokens = restated_order(layout.grid, front, back, settings.order)
    sinks = {*range(front), *range(len(tokens) - back, len(tokens))}
    queries = list(range(len(q)))  # unrelated to the keys: raster order
    if start is not None:
        queries = [t - start for t in tokens if start <= t < start + len(q)]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def rounded(x):
        return x.to(q.dtype).double()

    centroids = []
    for i in range(0, len(queries), 16):
        c = q[queries[i : i + 16]].to(wide).mean(0)
        centroids.append((rounded(c), rounded(c * c)))
    cells = []  # keys of the cell, or None; mean, variance
    for j in range(0, len(tokens), 16):
        rows = k[[t for t in tokens[j : j + 16] if valid[t]]].to(wide)
        mean = rows.mean(0) if len(rows) else rows.sum(0)
        spread = ((rows - mean) ** 2).sum(0) / max(1, len(rows))
        cells.append((len(rows), rounded(mean), rounded(spread)))

    logits, bounds = [], []
    for c, c_squared in centroids:
        row = [
            scale * float(c @ mean) + scale**2 / 2 * float(c_squared @ spread) for _, mean, spread in cells
        ]
        terms = [logit + math.log(n) for logit, (n, _, _) in zip(row, cells, strict=True) if n]
        peak = max(terms, default=0.0)
        lse = peak + math.log(sum(math.exp(t - peak) for t in terms)) if terms else -math.inf
        theta = math.log(settings.threshold) if settings.threshold else -math.inf
        logits.append(row)
        bounds.append(lse + theta - math.log(len(tokens)) - 1e-3)

    m, n = settings.tile_queries, settings.tile_keys
    result = []
    for first in range(0, len(queries), m):
        tile = queries[first : first + m]
        runs = range(first // 16, (first + len(tile) - 1) // 16 + 1)
        own = set() if start is None else {start + i for i in tile}
        everything = bool(own & sinks)
        row = []
        for s in range(0, len(tokens), n):
            kept = False
            for position in range(s, min(s + n, len(tokens))):
                cell, token = position // 16, tokens[position]
                members = set(tokens[16 * cell : 16 * cell + 16])
                if not valid[token]:
                    continue
                if everything or members & sinks or members & own:
                    kept = True
                elif any(not logits[r][cell] < bounds[r] for r in runs):
                    kept = (
                        kept
                        or n >= 16
                        or any(
                            not scale * float(centroids[r][0] @ k[token].double()) < bounds[r] for r in runs
                        )
                    )
            row.append(kept)
        result.append(row)
    return torch.tensor(result)


SMALL = {
    "ragged, sinks": TokenLayout((3, 5, 9), front=2, back=5),
    "cross": TokenLayout((3, 5, 9), back=3, query_start=None),
    "middle": TokenLayout((3, 5, 8), front=4, query_start=21),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("m", "n"), [(16, 1), (16, 16), (32, 4), (64, 32), (128, 2), (128, 128)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("name", SMALL)
def test_reference_is_the_definition(name, m, n, dtype):
    """The yardstick itself: restated key by key, without code of the library."""
    layout, order = SMALL[name], "raster" if m == 32 else "cells"
    queries = {"cross": 50, "middle": 70}.get(name, layout.length)
    q, k, _ = make(1, queries, layout.length, dim=24, dtype=dtype, seed=m + n)
    valid = random_valid(1, layout.length, seed=n)
    layout = TokenLayout(layout.grid, layout.front, layout.back, layout.query_start, valid)
    decided = kept = 0
    for threshold, scale in ((0.8, None), (4.0, None), (1.5, 0.11)):
        settings = Settings(threshold=threshold, tile_queries=m, tile_keys=n, order=order)
        values = reference.select(q, poisoned(k, valid), settings, layout, scale)[0, 0]
        expected = defined_slices(
            q[0, 0], k[0, 0], settings, layout, valid[0].tolist(), 24**-0.5 if scale is None else scale
        )
        sure = values.abs() >= (1e-9 if dtype == torch.float64 else 1e-4)
        assert torch.equal((values >= 0) & sure, expected & sure), threshold
        decided, kept = decided + sure.sum(), kept + expected.sum()
    assert 0 < kept < decided or n == 128  # a slice of 128 keys always holds an own cell or a sink here


PAIRS = list(itertools.product(CASES, TILE_QUERIES, TILE_KEYS))


@pytest.mark.parametrize(
    ("why", "m", "n", "dtype", "threshold"),
    [(why, m, n, list(DTYPES)[i % 3], THRESHOLDS[i // 3 % 4]) for i, (why, m, n) in enumerate(PAIRS)],
    ids=lambda x: str(x),
)
def test_lists_are_those_of_the_reference(why, m, n, dtype, threshold):
    """Element for element, executed and requested, for every tile shape on every kind of sequence."""
    case = CASES[why]
    q, k, _ = case.tensors(dtype=DTYPES[dtype], seed=m + n)
    settings = Settings(
        threshold=threshold, tile_queries=m, tile_keys=n, order="raster" if (m + n) % 3 == 0 else "cells"
    )
    made = build_plan(q, k, settings, case.layout())
    assert_lists_agree(made, reference.select(q, k, settings, case.layout()), m)


@examples(max_examples=150, deadline=None, derandomize=True)
@example(INFINITE_BOUND)
@given(plan_calls())
def test_any_call_selects_as_the_reference(call):
    """Ragged grids, sinks, missing keys, foreign and no queries, equal, huge and bad values, all M x N."""
    q, k = call.tensors()
    call.check(build_plan(q, k, call.settings, call.layout, scale=call.scale, impl="torch"), reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 16, 64])
def test_requested_slices_before_the_union(n, dtype):
    """Small tiles one by one: the union in a plan could hide a slice on the wrong tile."""
    q, k, _ = make(2, 222, dtype=DTYPES[dtype], seed=n)
    settings = Settings(threshold=1.5, tile_queries=16, tile_keys=n)
    got = requested_of(q, k, settings)
    values = reference.select(q, k, settings, LAYOUT)[0]
    assert ((got == (values >= 0)) | (values.abs() < 1e-4)).all()


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.keys > 100], ids=lambda c: c.why)
def test_cases_are_sparse(case):
    """A table of cases that keep everything would prove nothing."""
    q, k, _ = case.tensors()
    dense, sparse = (
        build_plan(q, k, Settings(threshold=t, tile_queries=64, tile_keys=16), case.layout()).density.item()
        for t in (0.7, 4.0)
    )
    assert 0.1 < sparse < min(dense - 0.05, 0.75)


@pytest.mark.parametrize("n", TILE_KEYS)
@pytest.mark.parametrize("m", [16, 128])
def test_higher_threshold_keeps_a_subset(m, n):
    """The slider's promise: to the right is sparser, never different."""
    q, k, _ = make(2, 222, seed=n)
    steps = [
        requested_of(q, k, Settings(threshold=t, tile_queries=m, tile_keys=n))
        for t in (0.0, 0.3, 0.7, 1.0, 1.5, 2.5, 5.0, 1e9)
    ]
    for denser, sparser in itertools.pairwise(steps):
        assert not (sparser & ~denser).any()
    assert steps[0].all() and (n == 128 or steps[-1].sum() < steps[0].sum())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_threshold_zero_keeps_every_valid_key(case):
    """The way to compare with dense attention."""
    q, k, _ = case.tensors()
    for m, n in ((16, 1), (128, 16), (32, 64)):
        made = build_plan(q, k, Settings(threshold=0.0, tile_queries=m, tile_keys=n), case.layout())
        valid = made.key_valid
        share = 1.0 if valid is None else valid.double().mean().item()
        assert made.density.item() == made.executed_density.item() == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("n", [1, 8, 16, 32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_own_cells_and_sinks_are_kept(case, n):
    """At a threshold that no probability reaches, exactly what must stay stays."""
    q, k, _ = case.tensors()
    got = kept_of(q, k, Settings(threshold=1e9, tile_queries=64, tile_keys=n), case.layout())
    tokens = restated_order(case.grid, case.front, case.back, "cells")
    sinks = {*range(case.front), *range(case.keys - case.back, case.keys)}
    valid = random_valid(case.batch, case.keys) if case.padded else torch.ones(case.batch, case.keys).bool()
    queries = [None] * case.query_count
    if case.start is not None:
        queries = [t for t in tokens if case.start <= t < case.start + case.query_count]
    for b, t, s in itertools.product(range(case.batch), range(got.shape[2]), range(got.shape[3])):
        tile = set(queries[64 * t : 64 * t + 64])
        expected = False
        for position in range(n * s, min(n * s + n, case.keys)):
            members = set(tokens[position // 16 * 16 : position // 16 * 16 + 16])
            keeps = bool(tile & sinks or members & sinks or members & tile)
            expected |= keeps and bool(valid[b, tokens[position]])
        assert (got[b, :, t, s] == expected).all(), (b, t, s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 16, 128])
def test_equal_keys(n, dtype):
    """All keys have the uniform probability: a threshold of 1 keeps them despite rounding, 1.01 none."""
    q, k, _ = make(2, 222, dtype=DTYPES[dtype], seed=5)
    k[:] = k[:, :, :1]
    assert kept_of(q, k, Settings(threshold=1.0, tile_queries=64, tile_keys=n)).all()
    assert kept_of(q, k, Settings(threshold=1.0009, tile_queries=64, tile_keys=n)).all()
    assert torch.equal(
        kept_of(q, k, Settings(threshold=1.01, tile_queries=64, tile_keys=n)),
        kept_of(q, k, Settings(threshold=1e9, tile_queries=64, tile_keys=n)),
    )


BAD = {
    "NaN in a query": ("q", math.nan),
    "NaN in a key": ("k", math.nan),
    "inf in a query": ("q", math.inf),
    "inf in a key": ("k", math.inf),
    "-inf in a key": ("k", -math.inf),
    "huge query": ("q", 6e4),
    "huge key": ("k", -6e4),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 16, 32])
@pytest.mark.parametrize("name", BAD)
def test_bad_values(name, n, dtype):
    """What overflows or is no number is computed, never dropped; other heads do not notice."""
    which, value = BAD[name]
    q, k, _ = make(2, 222, dtype=DTYPES[dtype], seed=7)
    before = kept_of(q, k, Settings(threshold=1.5, tile_queries=64, tile_keys=n))
    (q if which == "q" else k)[0, 1, 40, 3] = value
    settings = Settings(threshold=1.5, tile_queries=64, tile_keys=n)
    got = kept_of(q, k, settings)
    values = reference.select(q, k, settings, LAYOUT)
    assert ((got == (values >= 0)) | (values.abs() < 1e-4)).all()
    assert torch.equal(got[:, 0], before[:, 0])
    if math.isnan(value):
        tiles = got[0, 1].all(1)
        where = restated_order((3, 7, 10), 3, 9, "cells").index(40) // 64
        assert tiles[where] and (which == "q" or tiles.all())


@pytest.mark.parametrize("n", [2, 16, 64])
def test_rows_and_heads_are_independent(n):
    """A second prompt in the batch must not change the first one's picture."""
    q, k, _ = make(3, 222, batch=2, seed=n)
    valid = random_valid(2, 222)
    layout = TokenLayout(LAYOUT.grid, 3, 9, 0, valid)
    together = kept_of(q, k, Settings(threshold=1.5, tile_queries=32, tile_keys=n), layout)
    for b in range(2):
        for h in range(3):
            one = TokenLayout(LAYOUT.grid, 3, 9, 0, valid[b : b + 1])
            alone = kept_of(
                q[b : b + 1, h : h + 1],
                k[b : b + 1, h : h + 1],
                Settings(threshold=1.5, tile_queries=32, tile_keys=n),
                one,
            )
            assert torch.equal(together[b, h], alone[0, 0])


@pytest.mark.parametrize("n", [1, 16, 128])
def test_chunks_do_not_show(n, monkeypatch):
    """Long videos are planned a few heads and tiles at a time, with the same result."""
    q, k, _ = make(5, 222, batch=2, seed=n)
    layout = TokenLayout(LAYOUT.grid, 3, 9, 0, random_valid(2, 222))
    whole = build_plan(q, k, Settings(threshold=1.2, tile_queries=16, tile_keys=n), layout)
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 30_000)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(selection, "REFINE_ELEMENTS", 1500)
    parts = build_plan(q, k, Settings(threshold=1.2, tile_queries=16, tile_keys=n), layout)
    for name in ("bits", "requested", "executed"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize("scale", [None, 0.05, 0.5, 2.0])
def test_scale(scale):
    """Models that normalise q and k bring their own softmax scale."""
    q, k, _ = make(2, 222, dim=40, seed=3)
    for n in (1, 16):
        settings = Settings(threshold=1.5, tile_queries=64, tile_keys=n)
        made = build_plan(q, k, settings, LAYOUT, scale=scale)
        assert_lists_agree(made, reference.select(q, k, settings, LAYOUT, scale), 64)
        default = build_plan(q, k, settings, LAYOUT, scale=40**-0.5)
        assert torch.equal(made.bits, default.bits) == (scale is None)
        assert made.softmax_scale(40) == (40**-0.5 if scale is None else scale)


def test_same_call_twice():
    """Two equal renders must be equal to the bit."""
    q, k, _ = make(2, 222, dtype=torch.bfloat16)
    first, second = (
        build_plan(q, k, Settings(threshold=1.2, tile_queries=32, tile_keys=4), LAYOUT) for _ in range(2)
    )
    assert torch.equal(first.bits, second.bits) and torch.equal(first.requested, second.requested)


def test_selection_has_no_hidden_randomness():
    """Planning must leave the sampler's random numbers alone."""
    q, k, _ = make(2, 222)
    before = torch.get_rng_state()
    build_plan(q, k, Settings(threshold=1.2, tile_queries=32, tile_keys=4), LAYOUT)
    assert torch.equal(torch.get_rng_state(), before)
