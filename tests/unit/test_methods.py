"""Selection methods: each against its published rule at its published block size, all for what is common."""

import dataclasses
import itertools
import math

import pytest
import torch
from fgattn import InvalidArgument, Settings, TokenLayout, attend, build_plan, methods
from fgattn.backends import pytorch, registry
from fgattn.layout import geometry, release, token_order
from fgattn.methods import METHODS, common
from makers import CASES, poisoned, random_valid
from makers import tensors as make

TOO_CLOSE = 1e-4  # decisions closer than this may differ
LAYOUT = TokenLayout((3, 7, 10), front=3, back=9)  # 222 tokens
TILES = ((128, 16), (16, 1), (32, 4), (64, 64), (128, 128), (16, 32))
STRENGTHS = {
    "top_k": (0.1, 0.3, 0.6, 1.0),
    "hierarchical": (0.1, 0.3, 0.6, 1.0),
    "sol": (3.0, 1.5, 0.7, 0.01),
    "radial": (0.05, 0.2, 1.0, 8.0),
}  # sparse to dense
every_method = pytest.mark.parametrize("method", METHODS)
every_tile = pytest.mark.parametrize(("m", "n"), TILES, ids=str)


def requested(q, k, settings, layout, scale=None):
    """Requested slices, bool [B, H, tiles, slices], before tiles are joined."""
    geo = geometry(layout, settings.order, q.shape[2], q.device)
    valid = None if layout.key_valid is None else layout.key_valid[:, geo.key_tokens]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    parameter = methods.strength(settings.method, settings.method_parameter)
    return torch.stack(
        [
            methods.select(
                settings.method,
                common.Heads(
                    q[b][:, geo.query_tokens],
                    k[b][:, geo.key_tokens],
                    None if valid is None else valid[b],
                    geo,
                    layout,
                    settings.tile_queries,
                    settings.tile_keys,
                    parameter,
                    scale,
                ),
            )[0]
            for b in range(len(q))
        ]
    )


def block_means(x, size):
    return torch.stack([block.mean(0) for block in x.double().split(size)])


def best(row, share):
    """The best int(share * n), at least one, of a row, and those too close to the last one to tell."""
    number = max(1, int(share * len(row)))
    ranked = row.sort(descending=True).values
    edge = ranked[min(number, len(row) - 1)] / 2 + ranked[number - 1] / 2
    if number == len(row):
        edge = -math.inf
    return row > edge, (row - edge).abs() < TOO_CLOSE * row.abs().max()


def assert_equal_where_clear(got, expected, unclear):
    """Element for element but for decisions too close to call, which must be few."""
    assert not ((got != expected) & ~unclear).any() and unclear.double().mean() < 0.02
    assert expected.any() and not expected.all()


def case_of(grid, order, seed=0):
    """One head's rows as stored and in an order that is tested elsewhere."""
    layout = TokenLayout(grid)
    q, k, _ = make(1, layout.length, seed=seed)
    tokens = torch.from_numpy(token_order(TokenLayout(grid), order))
    return layout, q, k, q[0, 0, tokens], k[0, 0, tokens]


def blocks_of_64(method, parameter, order):
    """Tiles of 64 x 64, as most published methods have them."""
    return Settings(
        threshold=1.0,
        tile_queries=64,
        tile_keys=64,
        tail=True,
        order=order,
        method=method,
        method_parameter=parameter,
    )


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_top_k_is_sla(share):
    """SLA, 64 x 64: keys without their mean, block means, the best int(share * blocks) of each row."""
    layout, q, k, rows, keys = case_of((1, 12, 73), "raster")  # 876 tokens, the last block is short
    scores = block_means(rows, 64) @ block_means(keys.double() - keys.double().mean(0), 64).T
    chosen, unclear = (torch.stack(x) for x in zip(*(best(r, share) for r in scores), strict=True))
    got = requested(q, k, blocks_of_64("top_k", share, "raster"), layout)[0, 0]
    assert_equal_where_clear(got, chosen | torch.eye(14, dtype=torch.bool), unclear)


def test_top_k_is_vsa():
    """VSA: cubes of 4 x 4 x 4 tokens, the best by pooled score; in Hilbert order a cube is a run."""
    grid = t, h, w = 8, 12, 8
    layout, q, k, _, _ = case_of(grid, "hilbert", seed=2)
    cubes = {}
    for token, (z, y, x) in enumerate(itertools.product(range(t), range(h), range(w))):
        cubes.setdefault((z // 4, y // 4, x // 4), []).append(token)
    order = token_order(TokenLayout(grid), "hilbert").tolist()
    runs = sorted(cubes.values(), key=lambda c: min(order.index(token) for token in c))
    assert [sorted(order[i : i + 64]) for i in range(0, len(order), 64)] == runs
    pooled = [torch.stack([x[0, 0, c].double().mean(0) for c in runs]) for x in (q, k)]
    scores = pooled[0] @ pooled[1].T
    chosen, unclear = (torch.stack(x) for x in zip(*(best(r, 0.4) for r in scores), strict=True))
    got = requested(q, k, blocks_of_64("top_k", 0.4, "hilbert"), layout)[0, 0]
    assert_equal_where_clear(got, chosen | torch.eye(len(runs), dtype=torch.bool), unclear)


@pytest.mark.parametrize("tau", [0.3, 1.3, 2.5])
def test_sol_is_sol_attn(tau):
    """sol_attn, 64 x 64, base-2 scores as published: the mean score of a block's rows against tau sigma."""
    layout, q, k, rows, keys = case_of((1, 12, 73), "raster")
    unit = 64**-0.5 / math.log(2)
    means = block_means(keys, 64)
    centred = means - means.mean(0)
    per_row = rows.double() @ centred.T * unit
    expected, unclear = torch.zeros(14, 14, dtype=torch.bool), torch.zeros(14, 14, dtype=torch.bool)
    for i, block in enumerate(rows.double().split(64)):
        score = per_row[64 * i : 64 * i + 64].mean(0)
        sigma = math.sqrt(float((block.mean(0) ** 2 * centred.square().mean(0)).sum()) * unit**2 + 1e-6)
        expected[i], unclear[i] = score > tau * sigma, (score - tau * sigma).abs() < TOO_CLOSE
        expected[i, max(0, i - 1) : i + 2] = True
    got = requested(q, k, blocks_of_64("sol", tau, "raster"), layout)[0, 0]
    assert_equal_where_clear(got, expected, unclear)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_hierarchical_is_dfsattn(share):
    """DFSAttn, 128 x 128 of 16-token pools in Hilbert order: probabilities of pools, added up by block."""
    layout, q, k, rows, keys = case_of((8, 12, 20), "hilbert")  # 1920 tokens
    pools = torch.softmax(block_means(rows, 16) @ block_means(keys, 16).T * 64**-0.5, 1)
    scores = torch.stack([torch.stack([b.sum() for b in r.split(8, 1)]) for r in pools.split(8)])
    chosen, unclear = (torch.stack(x) for x in zip(*(best(r, share) for r in scores), strict=True))
    got = requested(
        q,
        k,
        Settings(
            threshold=1.0,
            tile_queries=128,
            tile_keys=128,
            tail=True,
            order="hilbert",
            method="hierarchical",
            method_parameter=share,
        ),
        layout,
    )[0, 0]
    assert_equal_where_clear(got, chosen | torch.eye(15, dtype=torch.bool), unclear)


@pytest.mark.parametrize("decay", [0.2, 1.0])
@pytest.mark.parametrize("grid", [(10, 16, 16), (6, 16, 40), (18, 8, 16)], ids=str)
def test_radial_is_radial_attention(grid, decay):
    """Radial Attention, 128 x 128: the mask of each pair of frames, shrunk block by block."""
    (frames, height, width), q, k = grid, *make(1, math.prod(grid), seed=1)[:2]
    tokens = height * width
    place = torch.arange(tokens)
    apart = (place[:, None] - place).abs()
    rows = []
    for i in range(frames):
        row = []
        for j in range(frames):
            d = abs(i - j)
            decayed = 2 ** tokens.bit_length() / 2 ** d.bit_length()
            reach = tokens if d < 2 else max(128, decayed * decay)
            mask = apart <= reach
            if decayed < 128 and d % int(128 / decayed) != 0:
                mask = torch.zeros_like(mask)
            if j == 0:
                mask = torch.ones_like(mask)
            share = mask.double().unflatten(0, (-1, 128)).mean(1).unflatten(1, (-1, 128))
            row.append((share > 1 / 3).sum(2) / ((share > 0).sum(2) + 1e-9) > 0.6)
        rows.append(torch.cat(row, 1))
    got = requested(
        q,
        k,
        Settings(
            threshold=1.0,
            tile_queries=128,
            tile_keys=128,
            tail=True,
            order="raster",
            method="radial",
            method_parameter=decay,
        ),
        TokenLayout(grid),
    )[0, 0]
    expected = torch.cat(rows)
    assert torch.equal(got, expected | torch.eye(len(expected), dtype=torch.bool))
    assert not expected.all()


PAIRS = list(itertools.product(METHODS, CASES))


@pytest.mark.parametrize(
    ("method", "why", "m", "n"), [(method, why, *tile) for method, why in PAIRS for tile in TILES], ids=str
)
def test_every_sequence(method, why, m, n):
    """Ragged grids, sinks, missing keys, any M x N: what must stay stays, what is not there is never kept."""
    case = CASES[why]
    layout = case.layout()
    q, k, v = case.tensors(seed=m + n)
    order = ("cells", "raster", "hilbert")[(m + n) % 3]
    settings = Settings(threshold=1.0, tile_queries=m, tile_keys=n, tail=True, order=order, method=method)
    got = requested(q, k, settings, layout)
    assert got.shape == (case.batch, 2, -(-case.query_count // m), -(-case.keys // n))
    geo = geometry(layout, order, case.query_count, q.device)
    always = geo.always_kept(m).repeat_interleave(16, 1)[:, : case.keys]
    valid = layout.key_valid if case.padded else torch.ones(case.batch, case.keys, dtype=torch.bool)
    for b in range(case.batch):
        there = valid[b, geo.key_tokens]
        must = torch.stack([part.any(1) for part in (always & there).split(n, 1)], 1)
        exists = torch.stack([part.any() for part in there.split(n)])
        assert got[b][:, must].all() and not got[b][:, :, ~exists].any()
    made = build_plan(q, k, settings, layout)
    again = build_plan(q, k, settings, layout)
    assert torch.equal(made.bits, again.bits) and torch.equal(made.requested, again.requested)
    executed = torch.stack([made.kept_slices(b, slice(None)) for b in range(case.batch)])
    if m >= 64:
        assert torch.equal(executed, got)
    assert (made.executed >= made.requested).all()
    out = attend(q, k, v, made)
    has_key = valid.any(1)[:, None, None, None]
    assert (out.isfinite() | ~has_key).all()


@every_tile
@every_method
def test_stronger_keeps_a_superset(method, m, n):
    """The parameter is a slider."""
    layout, order = TokenLayout((4, 16, 32)), "raster" if method == "radial" else "cells"
    q, k, _ = make(2, layout.length, seed=n)
    kept = [
        requested(
            q,
            k,
            Settings(
                threshold=1.0,
                tile_queries=m,
                tile_keys=n,
                tail=True,
                order=order,
                method=method,
                method_parameter=p,
            ),
            layout,
        )
        for p in STRENGTHS[method]
    ]
    for sparser, denser in itertools.pairwise(kept):
        assert not (sparser & ~denser).any()
    assert kept[0].sum() < kept[-1].sum()


@every_tile
def test_radial_in_any_order_only_gets_denser(m, n):
    """Where tiles span frames a slice at an edge may go, but never the density down."""
    q, k, _ = make(1, LAYOUT.length)
    for order in ("cells", "hilbert"):
        shares = [
            requested(
                q,
                k,
                Settings(
                    threshold=1.0,
                    tile_queries=m,
                    tile_keys=n,
                    tail=True,
                    order=order,
                    method="radial",
                    method_parameter=p,
                ),
                LAYOUT,
            )
            .double()
            .mean()
            for p in STRENGTHS["radial"]
        ]
        assert shares == sorted(shares)


@every_tile
@pytest.mark.parametrize("method", ["top_k", "hierarchical"])
def test_share_is_exact(method, m, n):
    """A fixed share is one: also where all keys are equal, and the same for every tile and head."""
    layout = TokenLayout((3, 7, 10), query_start=None)
    q, k, _ = make(2, 75, 210, seed=3)
    for keys in (k, k[:, :, :1].expand_as(k).contiguous()):
        got = requested(
            q,
            keys,
            Settings(
                threshold=1.0,
                tile_queries=m,
                tile_keys=n,
                tail=True,
                order="cells",
                method=method,
                method_parameter=0.35,
            ),
            layout,
        )
        assert (got.sum(3) == max(1, int(0.35 * -(-210 // n)))).all()


@every_method
@pytest.mark.parametrize("n", [1, 16, 64])
def test_bad_values(method, n):
    """NaN is computed, never dropped; nothing huge or infinite disturbs other heads or what always stays."""
    settings = Settings(threshold=1.0, tile_queries=64, tile_keys=n, tail=True, order="cells", method=method)
    for which, value in itertools.product("qk", (math.nan, math.inf, -math.inf, 6e4, -6e4)):
        q, k, _ = make(2, 222, seed=7)
        before = requested(q, k, settings, LAYOUT)
        (q if which == "q" else k)[0, 1, 40, 3] = value
        got = requested(q, k, settings, LAYOUT)
        assert torch.equal(got[:, 0], before[:, 0])
        assert torch.equal(got, requested(q, k, settings, LAYOUT))
        if math.isnan(value) and method != "radial":
            place = token_order(TokenLayout((3, 7, 10), 3, 9), "cells").tolist().index(40)
            assert got[0, 1, place // 64].all() if which == "q" else got[0, 1, :, place // n].all()


@every_method
def test_equal_keys_and_one_huge_key(method):
    """Nothing to choose by, and a single thing to choose: both give a plan that attends."""
    q, k, v = make(2, 222, seed=5)
    for change in ("equal", "huge"):
        keys = k[:, :, :1].expand_as(k).contiguous() if change == "equal" else k.clone()
        if change == "huge":
            keys[:, :, 100] *= 1e4
        made = build_plan(
            q,
            keys,
            Settings(threshold=1.0, tile_queries=64, tile_keys=16, tail=True, order="cells", method=method),
            LAYOUT,
        )
        assert 0 < made.density <= 1 and attend(q, keys, v, made).isfinite().all()


@every_method
@pytest.mark.parametrize(("queries", "keys"), [(0, 40), (40, 0), (0, 0)])
def test_empty_sides(method, queries, keys):
    """Nothing to select is no error."""
    q, k, v = torch.zeros(1, 2, queries, 64), *torch.zeros(2, 1, 2, keys, 64)
    made = build_plan(q, k, Settings(method=method), TokenLayout.flat(keys, None))
    assert attend(q, k, v, made).shape == (1, 2, queries, 64) and not made.requested.any()


@every_method
@pytest.mark.parametrize("n", [1, 16])
def test_steps_rows_and_heads_are_independent(method, n, monkeypatch):
    """Long videos are judged a few tiles and heads at a time, with the same result."""
    q, k, _ = make(3, 222, batch=2, seed=n)
    layout = dataclasses.replace(LAYOUT, key_valid=random_valid(2, 222))
    k = poisoned(k, layout.key_valid)
    settings = Settings(threshold=1.0, tile_queries=32, tile_keys=n, tail=True, order="cells", method=method)
    whole = requested(q, k, settings, layout)
    monkeypatch.setattr(common, "STEP_ELEMENTS", 3000)
    release()
    assert torch.equal(requested(q, k, settings, layout), whole)
    for b, h in itertools.product(range(2), range(3)):
        one = dataclasses.replace(layout, key_valid=layout.key_valid[b : b + 1])
        alone = requested(q[b : b + 1, h : h + 1], k[b : b + 1, h : h + 1], settings, one)
        assert torch.equal(alone[0, 0], whole[b, h])


@every_method
def test_scale(method):
    """Models that normalise q and k bring their own softmax scale: a scale of the scores, nothing else."""
    q, k, _ = make(2, 222, dim=40, seed=3)
    settings = Settings(threshold=1.0, tile_queries=64, tile_keys=16, tail=True, order="cells", method=method)
    scaled = requested(q, k * 3, settings, LAYOUT, 40**-0.5)
    assert (requested(q, k, settings, LAYOUT, 3 * 40**-0.5) != scaled).double().mean() < 0.005


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_types(method, dtype):
    """Half precision selects nearly what double precision does."""
    q, k, _ = (x.to(dtype) for x in make(2, 222, seed=4))
    settings = Settings(threshold=1.0, tile_queries=64, tile_keys=16, tail=True, order="cells", method=method)
    exact = requested(q.double(), k.double(), settings, LAYOUT)
    assert (requested(q, k, settings, LAYOUT) != exact).sum() <= 2


def test_radial_without_frames_keeps_everything():
    """A sequence without a known grid is one frame, and queries of another sequence have no frame."""
    q, k, _ = make(1, 222)
    for layout in (TokenLayout.flat(222), TokenLayout((3, 7, 10), 3, 9, None)):
        assert requested(q, k, Settings(method="radial"), layout).all()


@every_method
def test_it_is_torch_code_whatever_the_backend(method, monkeypatch):
    """A backend plans by threshold alone: it is not asked."""

    def fail(call):
        raise AssertionError("the backend was asked for a plan")

    q, k, _ = make(1, 40)
    record = dataclasses.replace(pytorch.BACKEND, name="other", plan=fail)
    monkeypatch.setattr(registry, "BACKENDS", [record])
    settings, layout = Settings(method=method), TokenLayout.flat(40)
    other = build_plan(q, k, settings, layout, impl="other")
    monkeypatch.undo()
    assert torch.equal(other.bits, build_plan(q, k, settings, layout).bits)


@pytest.mark.parametrize(
    ("method", "parameter", "says"),
    [
        (
            "topk",
            0.0,
            "method: got 'topk'; allowed: threshold, top_k, sol, hierarchical, radial. threshold is",
        ),
        (None, 0.0, "method: got None; allowed: threshold, top_k"),
        ("threshold", math.nan, "method_parameter: got nan; allowed: a finite number"),
        ("threshold", "1", "method_parameter: got '1'; allowed: a finite number"),
        ("radial", 10**400, "; allowed: above 0 up to 8 with radial"),
        ("top_k", 1.5, "got 1.5; allowed: above 0 up to 1 with top_k (share of the keys). 0 chooses 0.3."),
        ("hierarchical", -0.1, "got -0.1; allowed: above 0 up to 1 with hierarchical"),
        ("sol", math.nan, "got nan; allowed: above 0 up to 8 with sol (tau, standard deviations)"),
        ("radial", math.inf, "got inf; allowed: above 0 up to 8 with radial (decay)"),
        ("radial", True, "got True"),
        ("sol", "1", "got '1'"),
    ],
    ids=str,
)
def test_nonsense_is_refused(method, parameter, says):
    """What, got, allowed, remedy."""
    with pytest.raises(InvalidArgument) as caught:
        Settings(method=method, method_parameter=parameter)
    assert says in str(caught.value)


def test_a_parameter_that_the_method_does_not_use():
    """It waits for a method that does, as the threshold does."""
    assert Settings(threshold=0.7, method_parameter=3.0).strength == 0.7
    assert Settings(threshold=7, method="sol", method_parameter=3.0).strength == 3.0


def test_strength():
    """Reports name the strength that took effect, whatever the method takes it from."""
    assert Settings(threshold=0.7).strength == 0.7
    assert [Settings(method=m).strength for m in METHODS] == [0.3, 1.3, 0.3, 0.2]
    assert Settings(threshold=0.7, method="sol", method_parameter=2).strength == 2
