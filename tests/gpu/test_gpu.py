"""The kernels and the pipeline on a real GPU."""

import dataclasses
import random

import pytest
import torch
from benchmarks.first_use import first_use
from calls import INFINITE_BOUND, plan_calls
from fgattn import Settings, TokenLayout, attend, build_plan, plan_from_mask, reference, sparse_attention
from fgattn.backends import hopper, registry
from fgattn.backends.hopper.boxes import boxes_for
from fgattn.call import Call
from fgattn.methods import METHODS
from fgattn.plan import of_heads
from fgattn.runs.engine import Engine
from fgattn.runs.estimate import exact
from fgattn.settings import TILE_KEYS, TILE_QUERIES, Policy
from hypothesis import example, given
from hypothesis import settings as examples
from makers import by_text, tail_of

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def kernels():
    """Every kernel that this GPU can run."""
    return ["triton"] if hopper.device_reason(torch.device("cuda")) else ["triton", "hopper"]


@pytest.fixture(params=["triton", "hopper"])
def impl(request):
    """Each kernel; skipped with the reason where the GPU has none."""
    if request.param not in kernels():
        pytest.skip(hopper.device_reason(torch.device("cuda")))
    return request.param


def tensors(batch, heads, length, dim, dtype=BF16, seed=0):
    """q, k, v whose tokens attend mostly near themselves, so that every tile size can skip."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, dim, generator=generator, device="cuda").unbind()
    near = torch.randn(heads, -(-length // 128), dim, generator=generator, device="cuda")
    near = near.repeat_interleave(128, 1)[:, :length]
    return (q + near).to(dtype), (k + near).to(dtype), v.to(dtype)


def low_precision(q, k, v, plan):
    """Dense masks with the rounding that any half-precision attention has; no tail."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            tokens = of_heads(plan.query_tokens, b, slice(h, h + 1))[0].long()
            rows = q[b, h, tokens]
            keys, values = (x[b, h, plan.geometry.key_tokens] for x in (k, v))
            mask = plan.kept_keys(b, slice(h, h + 1))[0].repeat_interleave(plan.tile_rows, 0)[: len(rows)]
            scores = ((rows @ keys.T).float() * plan.softmax_scale(q.shape[3])).masked_fill(~mask, -torch.inf)
            out[b, h, tokens] = scores.softmax(1).nan_to_num(0.0).to(q.dtype) @ values
    return out


def assert_close(got, q, k, v, plan):
    """|got - fp64| <= 2 (|half precision - fp64| + eps max): rounding alone explains the error."""
    exact = reference.attend(q.double(), k.double(), v.double(), plan)
    rounding = (reference.attend(q, k, v, plan).double() - exact).abs().max()
    no_tail = dataclasses.replace(plan, tail=False)
    plain = reference.attend(q.double(), k.double(), v.double(), no_tail)
    rounding = rounding + (low_precision(q, k, v, no_tail).double() - plain).abs().max()
    bound = 2 * (rounding + torch.finfo(q.dtype).eps * exact.abs().max())
    error = (got.double() - exact).abs().max()
    assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"


def test_this_gpu_runs_the_kernel():
    """The self-tests pass, and attend takes the fastest kernel by itself."""
    device = torch.device("cuda")
    fastest = "triton" if hopper.device_reason(device) else "hopper"
    assert registry.on_device(device, Settings()).backend.name == fastest
    q, k, v = tensors(1, 1, 200, 64)
    plan = build_plan(q, k, Settings(), TokenLayout.flat(200))
    assert torch.equal(attend(q, k, v, plan), attend(q, k, v, plan, impl=fastest))


def skewed_mask(heads, m, n, queries, keys):
    """Counts of any size; the first 128 queries of head 0 keep nothing, the last tiles everything."""
    generator = torch.Generator("cuda").manual_seed(m + n)
    tiles, slices = -(-queries // m), -(-keys // n)
    share = torch.rand(heads, tiles, 1, generator=generator, device="cuda") ** 3
    mask = torch.rand(heads, tiles, slices, generator=generator, device="cuda") < share
    mask[0, : 128 // m] = False
    mask[:, -1] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("n", TILE_KEYS)
@pytest.mark.parametrize("m", TILE_QUERIES)
def test_kernel_against_reference(m, n, dim, dtype, impl):
    """All of M x N x D x dtype: a ragged grid with sinks and tail, and a skewed mask without."""
    layout = TokenLayout((6, 9, 17), front=5, back=9)
    q, k, v = tensors(1, 2, layout.length, dim, dtype)
    plan = build_plan(q, k, Settings(threshold=1.2, tile_queries=m, tile_keys=n), layout)
    assert 0.05 < plan.density < 0.999
    assert_close(attend(q, k, v, plan, impl=impl), q, k, v, plan)

    q = q[:, :, : layout.length - 3]
    mask = skewed_mask(2, m, n, q.shape[2], layout.length)
    plan = plan_from_mask(mask, m, n, query_length=q.shape[2], key_length=layout.length)
    out = attend(q, k, v, plan, impl=impl)
    assert out[0, 0, :128].abs().max() == 0
    assert_close(out, q, k, v, plan)


@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 123, 255, 507, 1000])
def test_ragged_lengths(length, impl):
    """Short last tiles, slices and cells."""
    for dim, n in ((64, 1), (128, 16), (128, 128)):
        q, k, v = tensors(2, 1, length, dim, seed=length)
        plan = build_plan(q, k, Settings(tile_keys=n, threshold=1.5), TokenLayout.flat(length))
        assert_close(attend(q, k, v, plan, impl=impl), q, k, v, plan)


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (128, BF16)], ids=["fp16", "bf16"])
@pytest.mark.parametrize("n", TILE_KEYS)
@pytest.mark.parametrize("m", [16, 128])
def test_tail_against_torch(m, n, dim, dtype, impl):
    """Ragged ends, orders of cells, batches, missing keys, a shared mask; summaries made before or not."""
    from fgattn.backends.shared.launch import key_rows, query_rows
    from fgattn.backends.shared.summarise import summarise

    layout = TokenLayout((9, 17, 25), front=5, back=9)  # 240 cells: more than a step
    q, k, v = tensors(2, 2, layout.length, dim, dtype)
    valid = torch.rand(2, layout.length, device="cuda") < 0.9
    valid[1, 3000:] = False
    mask = skewed_mask(1, m, n, layout.length, layout.length)
    for plan in (
        build_plan(q, k, Settings(threshold=1.2, tile_queries=m, tile_keys=n), layout, scale=0.1),
        build_plan(
            q,
            k,
            Settings(threshold=1.2, tile_queries=m, tile_keys=n),
            dataclasses.replace(layout, key_valid=valid),
        ),
        plan_from_mask(
            mask, m, n, query_length=layout.length, key_length=layout.length, tail=True, scale=-0.1
        ),
    ):
        keys, values = k, v
        if plan.key_valid is not None:
            keys, values = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (k, v))
        out, lse = tail_of(q, keys, values, plan, impl)
        expected, expected_lse = tail_of(q, k, v, plan)
        assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
        torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=1e-4)
        assert (out - expected).norm() / expected.norm() < (4e-3 if dtype == BF16 else 1e-3)
        geo = plan.geometry
        rows = query_rows(geo), key_rows(geo, plan.key_valid)
        for made in (summarise(q, keys, None, *rows, second=True), summarise(q, keys, values, *rows)):
            again = tail_of(q, keys, values, plan, impl, made)
            assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_fp32_is_computed_in_bf16(impl):
    """Equal to rounding the inputs first."""
    layout = TokenLayout((4, 8, 12))
    q, k, v = tensors(1, 2, layout.length, 128, torch.float32)
    plan = build_plan(q, k, Settings(), layout)
    got = attend(q, k, v, plan, impl=impl)
    assert got.dtype == torch.float32
    q, k, v = (x.to(BF16) for x in (q, k, v))
    assert_close(got.to(BF16), q, k, v, plan)


def test_strides_masks_and_cross_lengths(impl):
    """Views of a fused projection, invalid keys full of NaN, and queries inside a longer sequence."""
    layout = TokenLayout((4, 8, 12), front=20)
    fused = torch.randn(2, layout.length, 3, 2, 128, device="cuda", dtype=BF16)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    plan = build_plan(q, k, Settings(tile_queries=64), layout)
    out = attend(q, k, v, plan, impl=impl)
    assert out.transpose(1, 2).is_contiguous()
    assert_close(out, q, k, v, plan)

    valid = torch.rand(2, layout.length, device="cuda") > 0.3
    masked = TokenLayout(layout.grid, front=20, key_valid=valid)
    clean = [x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v)]
    dirty = [x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (k, v)]
    for n in (1, 16, 64):
        plan = build_plan(q, dirty[0], Settings(tile_keys=n), masked)
        assert_close(attend(q, *dirty, plan, impl=impl), q, *clean, plan)

    inside = TokenLayout(layout.grid, front=20, query_start=37)
    part = q[:, :, 37:300]
    plan = build_plan(part, k, Settings(), inside)
    assert_close(attend(part, k, v, plan, impl=impl), part, k, v, plan)


@pytest.mark.parametrize(("m", "n"), [(128, 16), (64, 8), (16, 16), (128, 1), (32, 2)])
@pytest.mark.parametrize(
    ("front", "back", "absent"),
    [(256, 0, range(100, 256)), (0, 77, range(3840, 3890)), (30, 12, (0, 1, *range(17, 30), 3875))],
)
def test_absent_tokens(impl, front, back, absent, m, n):
    """As if they were not in memory, where they hold NaN; their outputs are zeros. Octets stay boxes."""
    layout = TokenLayout((10, 16, 24), front, back, absent=tuple(absent))
    gone = torch.tensor(layout.absent, device="cuda")
    there = torch.ones(layout.length, dtype=torch.bool, device="cuda").index_fill_(0, gone, False)
    there = there.nonzero()[:, 0]
    q, k, v = tensors(1, 3, layout.length, 128)
    short = [x.index_select(2, there) for x in (q, k, v)]
    fewer = TokenLayout(
        layout.grid, front - sum(t < front for t in absent), back - sum(t > front for t in absent)
    )
    plan = build_plan(*short[:2], Settings(threshold=1.5, tile_queries=m, tile_keys=n), fewer)
    expected = attend(*short, plan, impl=impl)
    for x in (q, k, v):
        x[:, :, gone] = torch.nan
    whole = build_plan(q, k, Settings(threshold=1.5, tile_queries=m, tile_keys=n), layout)
    assert torch.equal(whole.bits, plan.bits)
    boxed = [boxes_for(Call.under(p, *x)) is not None for p, x in ((whole, (q, k, v)), (plan, short))]
    assert boxed[0] == boxed[1]
    got = attend(q, k, v, whole, impl=impl)
    assert torch.equal(got.index_select(2, there), expected) and not got[:, :, gone].any()


def test_lists_agree_with_the_reference():
    """Plans made on the GPU equal the specification except where a decision is within 1e-4."""
    layout = TokenLayout((3, 9, 11), front=3, back=6)
    for m, n, dtype in ((128, 16, BF16), (64, 1, BF16), (16, 4, torch.float16), (32, 64, BF16)):
        q, k, _ = tensors(1, 2, layout.length, 64, dtype)
        settings = Settings(tile_queries=m, tile_keys=n, threshold=1.3)
        above = reference.select(q.cpu(), k.cpu(), settings, layout).cuda()
        plan = build_plan(q, k, settings, layout)
        if m < 64:  # in the order of execution
            tile = plan.cell_order[..., :: m // 16, None].long() // (m // 16)
            above = above.gather(2, tile.expand_as(above))
        kept = above >= 0
        if m < 64:
            pad = torch.nn.functional.pad(kept, (0, 0, 0, -kept.shape[2] % (64 // m)))
            kept = pad.unflatten(2, (-1, 64 // m)).any(3)
            near = torch.nn.functional.pad(above.abs() < 1e-4, (0, 0, 0, -above.shape[2] % (64 // m)))
            near = near.unflatten(2, (-1, 64 // m)).any(3)
        else:
            near = above.abs() < 1e-4
        got = plan.kept_slices(0, slice(0, 2))
        assert not ((got != kept[0]) & ~near[0]).any()


@examples(max_examples=300, deadline=None, derandomize=True)
@example(INFINITE_BOUND)
@given(plan_calls(dtypes=("fp16", "bf16")))
def test_any_call_selects_as_the_reference(call):
    """As the tests without a GPU: ragged grids, sinks, missing keys, bad values, empty sides, all M x N."""
    q, k = (x.cuda() for x in call.tensors())
    plan = build_plan(q, k, call.settings, call.layout, scale=call.scale, impl="triton")
    tensors = {name: x.cpu() for name, x in vars(plan).items() if isinstance(x, torch.Tensor)}
    call.check(dataclasses.replace(plan, **tensors), reference)


def test_more_heads_than_one_launch(monkeypatch, impl):
    """Lists of many heads are made in several launches; the result is the same bits."""
    from fgattn.backends.shared import lists

    q, k, v = tensors(2, 5, 600, 64)
    for n, units in ((1, 608), (8, 80)):
        plan = build_plan(q, k, Settings(tile_keys=n), TokenLayout.flat(600))
        expected = attend(q, k, v, plan, impl=impl)
        monkeypatch.setattr(lists, "LIST_BYTES", 3 * 4 * 5 * units)
        assert torch.equal(attend(q, k, v, plan, impl=impl), expected)


def test_hopper_list_lengths():
    """One list of every length around the steps of the kernel; negative scales; the same bits twice."""
    if reason := hopper.device_reason(torch.device("cuda")):
        pytest.skip(reason)
    for dim, m, n, scale in (
        (128, 128, 16, None),
        (128, 64, 1, 0.05),
        (64, 128, 8, -0.1),
        (64, 64, 128, None),
    ):
        slices, tiles = 40, 41
        queries, keys = tiles * m - 5, slices * n - n // 2
        q, _, _ = tensors(1, 1, queries, dim)
        _, k, v = tensors(1, 1, keys, dim, seed=1)
        mask = torch.arange(slices, device="cuda") >= slices - torch.arange(tiles, device="cuda")[:, None]
        for tail in (False, True):
            plan = plan_from_mask(mask, m, n, query_length=queries, key_length=keys, tail=tail, scale=scale)
            out = attend(q, k, v, plan, impl="hopper")
            assert_close(out, q, k, v, plan)
            assert torch.equal(out, attend(q, k, v, plan, impl="hopper"))


@pytest.mark.parametrize("checked", [False, True], ids=["all keys", "some keys"])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
@pytest.mark.parametrize(("dim", "m"), [(128, 128), (128, 64), (64, 128), (64, 64)])
def test_hopper_listers(dim, m, n, checked):
    """Slices kept anywhere, close together and far apart, of any number around steps, slots and windows."""
    if reason := hopper.device_reason(torch.device("cuda")):
        pytest.skip(reason)
    keys, generator = 5000 - n // 2, torch.Generator("cuda").manual_seed(dim + m + n)
    slices = -(-keys // n)
    counts = [
        c // n
        for c in (
            0,
            n,
            31,
            32,
            33,
            64,
            65,
            127,
            128,
            129,
            255,
            257,
            511,
            512,
            513,
            640,
            1023,
            1024,
            1025,
            1536,
            2048,
            2049,
            4096,
            4999,
        )
    ]
    mask = torch.zeros(1, 2, 2 * len(counts), slices, dtype=torch.bool, device="cuda")
    for i, count in enumerate(counts):
        for h in range(2):
            mask[0, h, i, torch.randperm(slices, generator=generator, device="cuda")[:count]] = True
        mask[0, 0, len(counts) + i, slices - count :] = True
        mask[0, 1, len(counts) + i, :count] = True
    valid = torch.rand(1, keys, generator=generator, device="cuda") < 0.7 if checked else None
    layout = TokenLayout((1, 1, keys), query_start=None, key_valid=valid)
    q, _, _ = tensors(1, 2, mask.shape[2] * m - 3, dim)
    _, k, v = tensors(1, 2, keys, dim, seed=1)
    plan = plan_from_mask(mask, m, n, query_length=q.shape[2], key_length=keys, layout=layout)
    v = v[:, :1].expand(1, 2, keys, dim)  # stride 0: no boxes
    out = attend(q, k, v, plan, impl="hopper")
    assert torch.equal(out, attend(q, k, v, plan, impl="hopper"))
    expected = attend(q, k, v, plan, impl="torch")
    error = (out.float() - expected.float()).norm(dim=3)
    assert (error <= 0.02 * expected.float().norm(dim=3)).all()


def stored(r, batch, heads, length, dim, generator):
    """Random [B, H, L, D]: stored that way, as [B, L, H, D], or in rows of a wider tensor."""
    way = r.randrange(3)
    shape = (batch, heads, length, dim) if way == 0 else (batch, length, heads, dim * way)
    x = torch.randn(shape, generator=generator, device="cuda").to(BF16)
    return x if way == 0 else x[..., :dim].transpose(1, 2)


def random_layout(r, generator, batch):
    """A layout and a number of queries: part of its tokens, all of them, or others."""
    grid = tuple(r.randint(1, size) for size in (6, 15, 17))
    front, back = r.choice((0, 0, 7, 20)), r.choice((0, 0, 7, 20))
    keys = grid[0] * grid[1] * grid[2] + front + back
    start = r.randrange(keys)
    start, queries = r.choice(((0, keys), (start, r.randint(1, keys - start)), (None, r.randint(1, 1500))))
    valid = None
    if r.random() < 0.3:
        valid = torch.rand(batch, keys, generator=generator, device="cuda") > r.random()
    return TokenLayout(grid, front, back, start, valid), queries


def random_plan(r, generator, q, k, layout):
    """A plan from a mask of any density and skew, or from scores; the latter equal to torch's."""
    settings = Settings(
        threshold=r.choice((0.0, 0.5, 1.0, 1.5, 3.0)),
        tile_queries=r.choice(TILE_QUERIES),
        tile_keys=r.choice(TILE_KEYS),
        tail=r.random() < 0.5,
        order=r.choice(("cells", "raster")),
    )
    (batch, heads, queries, _), m, n = q.shape, settings.tile_queries, settings.tile_keys
    scale = r.choice((None, None, 0.05, -0.1))
    if r.random() < 0.5:
        shape = batch, heads, -(-queries // m)
        share = torch.rand(*shape, 1, generator=generator, device="cuda") ** r.choice((0.2, 1, 4))
        mask = torch.rand(*shape, -(-layout.length // n), generator=generator, device="cuda") < share
        return plan_from_mask(
            mask,
            m,
            n,
            query_length=queries,
            key_length=layout.length,
            layout=layout,
            order=settings.order,
            tail=settings.tail,
            scale=scale,
        ), settings
    plan, same = (build_plan(q, k, settings, layout, scale=scale, impl=name) for name in ("triton", "torch"))
    slices = [torch.stack([p.kept_slices(b, slice(0, heads)) for b in range(batch)]) for p in (plan, same)]
    differ = (slices[0] != slices[1]).sum()
    assert differ <= 2 + 0.002 * slices[0].numel(), f"{differ} of {slices[0].numel()} slices differ"
    return plan, settings


@pytest.mark.parametrize("seed", range(4))
def test_random_plans(seed):
    """1 000 in all: every row of every kernel is that of the torch implementation."""
    r, generator = random.Random(seed), torch.Generator("cuda").manual_seed(seed)
    worst = 0.0
    for i in range(250):
        batch, heads, dim = r.randint(1, 2), r.randint(1, 3), r.choice((64, 128))
        layout, queries = random_layout(r, generator, batch)
        q = stored(r, batch, heads, queries, dim, generator)
        k, v = (stored(r, batch, heads, layout.length, dim, generator) for _ in range(2))
        clean = k, v
        if layout.key_valid is not None:  # kernels must not use what does not exist
            missing = ~layout.key_valid[:, None, :, None]
            clean = [x.masked_fill(missing, 0) for x in (k, v)]
            k, v = (x.masked_fill_(missing, torch.nan) for x in (k, v))
        plan, settings = random_plan(r, generator, q, k, layout)
        expected = attend(q, *clean, plan, impl="torch").float()
        size = expected.norm(dim=3)
        for name in kernels():
            error = (attend(q, k, v, plan, impl=name).float() - expected).norm(dim=3)
            assert (error <= 0.02 * size).all(), (i, name, q.shape, q.stride(), k.stride(), layout, settings)
            worst = max(worst, (error / size.clamp(min=1e-30)).max().item())
    print(f"largest relative error of a row: {worst:.1e}")


def test_one_variant_for_all_shapes(impl, monkeypatch):
    """Another length, batch or number of heads compiles nothing; short of an octet, keys come row by row."""
    import triton

    def run(batch, heads, length):
        q, k, v = tensors(batch, heads, length, 64)
        plan = build_plan(q, k, Settings(tile_queries=64, tile_keys=8), TokenLayout.flat(length))
        attend(q, k, v, plan, impl=impl)

    run(1, 1, 64)
    run(1, 1, 7)
    made = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda src, **_: made.append(src.name))
    for shape in ((1, 1, 1), (1, 1, 2048), (2, 3, 1000), (1, 16, 128), (1, 5, 777)):
        run(*shape)
    assert made == []


def test_offsets_beyond_32_bits(impl):
    """Rows further apart than 2^31 elements are addressed right."""
    length, dim = 3000, 128
    storage = torch.empty(1, length, 1 << 20, device="cuda", dtype=BF16)
    q, k, v = tensors(1, 1, length, dim)
    far = storage[:, :, :dim][:, None].copy_(k)
    plan = build_plan(q, k, Settings(), TokenLayout.flat(length))
    assert torch.equal(attend(q, far, v, plan, impl=impl), attend(q, k, v, plan, impl=impl))


def test_480p_length_sampled_memory_and_no_sync():
    """L = 32 760, 12 heads: right on sampled tiles, bit-identical twice, no wait for the host."""
    layout = TokenLayout((21, 30, 52))
    q, k, v = tensors(1, 12, layout.length, 128)
    q += k.roll(1, 1)  # some structure
    settings = Settings(threshold=2.0)
    first = attend(q, k, v, build_plan(q, k, settings, layout))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = build_plan(q, k, settings, layout)
        second = attend(q, k, v, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
    no_tail = dataclasses.replace(plan, tail=False)
    out = attend(q, k, v, no_tail)
    kept = plan.kept_keys(0, slice(3, 4))[0]
    for tile in (0, 100, 255):
        rows = plan.geometry.query_tokens[tile * 128 : (tile + 1) * 128]
        keys = plan.geometry.key_tokens[kept[tile]]
        scores = q[0, 3, rows].double() @ k[0, 3, keys].double().T * 128**-0.5
        exact = scores.softmax(1) @ v[0, 3, keys].double()
        assert (out[0, 3, rows].double() - exact).norm() / exact.norm() < 4e-3


def one_tile(plan, head, tile):
    """The part of a plan that one tile of one head executes."""
    rows = slice(tile * plan.tile_rows, (tile + 1) * plan.tile_rows)
    queries = torch.arange(len(plan.geometry.query_tokens[rows]), device="cuda")
    return dataclasses.replace(
        plan,
        bits=plan.bits[:, head : head + 1, tile : tile + 1],
        geometry=dataclasses.replace(plan.geometry, query_tokens=queries),
    ), plan.geometry.query_tokens[rows]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("m", "n"), [(128, 16), (64, 64), (16, 4)])
def test_methods_on_the_gpu(method, m, n):
    """Every selection method: no wait for the host after the first call, and the selection of the CPU."""
    layout = TokenLayout((5, 24, 40), back=17)
    q, k, v = tensors(1, 3, layout.length, 128)
    q += k.roll(1, 1)  # some structure
    settings = Settings(threshold=1.0, tile_queries=m, tile_keys=n, order="hilbert", method=method)
    first = build_plan(q, k, settings, layout)
    attend(q, k, v, first)  # the first use tests the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = build_plan(q, k, settings, layout)
        out = attend(q, k, v, again)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first.bits, again.bits) and out.isfinite().all()
    there = build_plan(q.cpu(), k.cpu(), settings, layout)
    assert (first.requested.cpu() / there.requested - 1).abs().max() < 5e-3
    if m >= 64:  # smaller tiles may run in another order
        assert (first.bits.cpu() != there.bits).double().mean() < 0.02


def test_720p_length_sampled_and_twice():
    """L = 75 600, 40 heads, planning and tail: sampled tiles against float64, and the same bits twice."""
    layout = TokenLayout((21, 45, 80))
    q, k, v = tensors(1, 40, layout.length, 128)
    settings = Settings(threshold=1.0)
    plan = build_plan(q, k, settings, layout)
    assert 0.02 < plan.density < 0.9
    outs = [attend(q, k, v, plan, impl=name) for name in kernels()]
    for head, tile in ((0, 0), (17, 301), (39, 590)):
        part, rows = one_tile(plan, head, tile)
        one = slice(head, head + 1)
        got = torch.stack([out[:, one, rows] for out in outs])
        assert_close(got, q[:, one, rows], k[:, one], v[:, one], part)
    again = build_plan(q, k, settings, layout)
    assert torch.equal(again.bits, plan.bits)
    for name, out in zip(kernels(), outs, strict=True):
        assert torch.equal(attend(q, k, v, again, impl=name), out)


@pytest.mark.parametrize("kernel", ["torch", None])
@pytest.mark.parametrize(("m", "n"), [(128, 16), (16, 1)])
def test_extra_memory(kernel, m, n):
    """Beyond q, k, v and out: at most 512 MB at L = 32 760, 12 heads, plan included."""
    layout = TokenLayout((21, 30, 52))
    q, k, v = tensors(1, 12, layout.length, 128)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(q, k, v, build_plan(q, k, Settings(tile_queries=m, tile_keys=n), layout), impl=kernel)
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra <= 512e6, f"{extra / 1e6:.0f} MB"


def test_heads_in_parts(monkeypatch):
    """A call as the nodes make it, whole and in parts: planning's summaries serve the tail."""
    layout = TokenLayout((8, 16, 16))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(1, 6, layout.length, 128))
    for n in (1, 16):
        settings = Settings(threshold=1.5, tile_queries=128, tile_keys=n)
        whole = sparse_attention(q, k, v, settings, layout)
        expected = attend(q, k, v, build_plan(q, k, settings, layout))
        assert torch.equal(whole, expected)
        monkeypatch.setattr("fgattn.attention.parts_for", lambda *_: 4)
        parts = sparse_attention(q, k, v, settings, layout)
        monkeypatch.undo()
        torch.testing.assert_close(parts, whole, atol=2e-2, rtol=2e-2)
        assert parts.stride() == q.stride()


def test_memory_of_a_large_call():
    """Single keys at L = 75 600 with 40 heads: at most 256 MB beside q, k, v and the output."""
    layout = TokenLayout((21, 45, 80))
    q, k, v = tensors(1, 40, layout.length, 128)
    for _ in range(2):  # the first call fills caches that stay
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = sparse_attention(q, k, v, Settings(threshold=1.0, tile_queries=128, tile_keys=1), layout)
        extra = torch.cuda.max_memory_allocated() - before - out.nbytes
        del out
    assert extra <= 256e6, f"{extra / 1e6:.0f} MB"


def test_engine_times_with_events():
    """A run on the GPU reports event times and a speed-up, and leaves short calls dense."""
    engine = Engine(Settings(threshold=1.5), Policy(warmup_steps=1, min_tokens=4096))
    q, k, v = tensors(1, 2, 4096, 128)
    layout = TokenLayout((4, 32, 32))
    engine.begin_run([1.0, 0.8, 0.6, 0.4, 0.0], True, q.device)
    short = [x[:, :, :256] for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention
    for sigma in (1.0, 0.8, 0.6, 0.4):
        engine.begin_evaluation(sigma)
        for block in range(2):
            engine.attention(q, k, v, layout=layout, dense=lambda: dense(q, k, v), block=block)
        engine.attention(*short, layout=TokenLayout.flat(256), dense=lambda: dense(*short), block=0)
    report = engine.end_run()
    assert by_text(report) == {"warm-up step": 2, "sparse": 6, "fewer than 4096 tokens": 4}
    assert report.speedup > 0 and report.peak_memory > 0 and report.total > 0
    assert all(s.attention > 0 for s in report.steps)
    assert report.implementation == registry.on_device(q.device, Settings()).text


def test_first_use(tmp_path):
    """With an empty cache each kernel of the first call is compiled once and named; then the cache serves.

    How long it takes depends on what else the machine does: `python -m benchmarks first_use` measures it.
    """
    cold, warm = first_use(tmp_path), first_use(tmp_path)
    assert cold.calls == warm.calls == {"sparse": 1}
    own = {"tail_kernel", "attend_kernel"}
    if not hopper.device_reason(torch.device("cuda")):
        own = {"tail_hopper_kernel", "hopper_kernel"}
    shared = {"summarise_kernel", "total_kernel", "select_kernel", "slice_kernel", "list_kernel"}
    assert sorted(cold.compiled) == sorted(shared | own)
    assert not warm.compiled


def test_live_statistics_do_not_wait():
    """Reading the books of a run that goes on never synchronises, and has the steps once they are done."""
    q, k, v = tensors(1, 2, 8192, 128)
    one = Engine(Settings(), Policy(warmup_steps=1, min_tokens=1))
    levels = [1.0 - i / 8 for i in range(9)]
    one.begin_run(levels, True, q.device)
    seen = []
    for sigma in levels[:-1]:
        one.begin_evaluation(sigma)
        one.attention(q, k, v, layout=TokenLayout((8, 32, 32)), dense=lambda: q.clone(), block=0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen.append(one.so_far())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    last, report = one.so_far(), one.end_run()
    assert [s.index for s in last.steps] == list(range(7)) and last.steps[0].sparse_calls == 0
    assert last.density == pytest.approx(report.density, rel=0.2)
    assert all(a.total == b.total for a, b in zip(last.steps, report.steps, strict=False))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_few_dense_rows(dtype, masked):
    """The yardstick of the estimate: within rounding of float64, in little memory, in every kernel."""
    q, k, v = tensors(1, 8, 20_000, 128, dtype)
    valid = torch.ones(1, 20_000, dtype=torch.bool, device="cuda")
    valid[:, -700:] = False
    rows = q[:, :, ::313].contiguous()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = exact(rows, k, v, valid if masked else None, None)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    keys = int(valid.sum()) if masked else 20_000
    scores = rows.double() @ k[:, :, :keys].double().mT * 128**-0.5
    expected = scores.softmax(-1) @ v[:, :, :keys].double()
    assert ((out.double() - expected).norm() / expected.norm()).item() < (5e-3 if dtype == BF16 else 1e-4)


def test_estimates_and_maps_do_not_wait():
    """Nor do they use the sampler's random numbers; the estimate is near the error of all rows."""
    q, k, v = tensors(1, 2, 8192, 128)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    one, layout = (
        Engine(Settings(threshold=2.0), Policy(warmup_steps=0, min_tokens=1)),
        TokenLayout((8, 32, 32)),
    )
    before = torch.cuda.get_rng_state()
    one.begin_run([1.0, 0.5, 0.0], True, q.device)
    for strict in (False, True):  # compilation and the first use of a geometry may wait
        one.begin_evaluation(0.5 if strict else 1.0)
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            outs = [one.attention(q, k, v, layout=layout, dense=lambda: q, block=b) for b in range(130)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    report = one.end_run()
    assert torch.equal(torch.cuda.get_rng_state(), before) and not report.remarks
    assert by_text(report) == {"sparse": 260}
    true = ((outs[0].double() - dense.double()).norm() / dense.double().norm()).item()
    assert report.estimated_error == pytest.approx(true, rel=0.5)
    assert len(one.last_maps.kept) == 260 and one.last_maps.find(-1, 0, 0)[1].keys(0).any()
