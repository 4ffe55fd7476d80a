"""The kernels and the pipeline on a real GPU."""

import dataclasses

import pytest
import torch
from fgattn import Settings, TokenLayout, attend, build_plan, plan_from_mask, reference, runtime
from fgattn.engine import Engine
from fgattn.plan import of_heads
from fgattn.settings import TILE_KEYS, TILE_QUERIES, Policy

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(params=["triton", "hopper"])
def impl(request):
    """Every kernel that this GPU can run."""
    if request.param == "hopper" and (reason := runtime.hopper_missing(torch.device("cuda"))):
        pytest.skip(reason)
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
    assert runtime.device_reason(device) is None
    fastest = "triton" if runtime.hopper_missing(device) else "hopper"
    assert runtime.gpu_kernel(device).split()[0] == fastest
    q, k, v = tensors(1, 1, 200, 64)
    plan = build_plan(q, k, Settings(), TokenLayout.flat(200))
    assert torch.equal(attend(q, k, v, plan), attend(q, k, v, plan, impl=fastest))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("n", TILE_KEYS)
@pytest.mark.parametrize("m", TILE_QUERIES)
def test_kernel_against_reference(m, n, dim, impl):
    """All M x N on a ragged grid with sinks on both sides, with and without tail."""
    layout = TokenLayout((6, 9, 17), front=5, back=9)
    q, k, v = tensors(1, 2, layout.length, dim)
    for tail in (True, False):
        settings = Settings(threshold=1.2, tile_queries=m, tile_keys=n, tail=tail)
        plan = build_plan(q, k, settings, layout)
        assert 0.05 < plan.density < 0.999
        assert_close(attend(q, k, v, plan, impl=impl), q, k, v, plan)


@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 123, 255, 507, 1000])
def test_ragged_lengths(length, impl):
    """Short last tiles, slices and cells."""
    for dim, n in ((64, 1), (128, 16), (128, 128)):
        q, k, v = tensors(2, 1, length, dim, seed=length)
        plan = build_plan(q, k, Settings(tile_keys=n, threshold=1.5), TokenLayout.flat(length))
        assert_close(attend(q, k, v, plan, impl=impl), q, k, v, plan)


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
def test_dtypes(dtype, impl):
    """fp32 is computed in bf16: equal to rounding the inputs first."""
    layout = TokenLayout((4, 8, 12))
    q, k, v = tensors(1, 2, layout.length, 128, dtype)
    plan = build_plan(q, k, Settings(), layout)
    got = attend(q, k, v, plan, impl=impl)
    assert got.dtype == dtype
    if dtype == torch.float32:
        q, k, v = (x.to(BF16) for x in (q, k, v))
    assert_close(got.to(q.dtype), q, k, v, plan)


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


def test_empty_lists_and_skewed_counts(impl):
    """Tiles that keep nothing give zeros beside tiles that keep everything."""
    q, k, v = tensors(1, 3, 700, 128)
    mask = torch.rand(3, 6, 44, device="cuda") < torch.tensor([0.02, 0.3, 1.0], device="cuda")[:, None, None]
    mask[0, 2] = False
    plan = plan_from_mask(mask, 128, 16, query_length=700, key_length=700)
    out = attend(q, k, v, plan, impl=impl)
    assert out[0, 0, 256:384].abs().max() == 0
    assert_close(out, q, k, v, plan)


def test_lists_agree_with_the_reference():
    """Plans made on the GPU equal the specification except where a decision is within 1e-4."""
    layout = TokenLayout((3, 9, 11), front=3, back=6)
    for m, n, dtype in ((128, 16, BF16), (64, 1, BF16), (16, 4, torch.float16), (32, 64, BF16)):
        q, k, _ = tensors(1, 2, layout.length, 64, dtype)
        settings = Settings(tile_queries=m, tile_keys=n, threshold=1.3)
        above = reference.select(q.cpu(), k.cpu(), settings, layout).cuda()
        plan = build_plan(q, k, settings, layout)
        if m < 64:  # in the order of execution
            tile = plan.run_order[..., :: m // 16, None].long() // (m // 16)
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


def test_more_heads_than_one_launch(monkeypatch, impl):
    """Lists of many heads are made in several launches; the result is the same bits."""
    from fgattn.kernels import attend_fwd

    q, k, v = tensors(2, 5, 600, 64)
    plan = build_plan(q, k, Settings(tile_keys=1), TokenLayout.flat(600))
    expected = attend(q, k, v, plan, impl=impl)
    monkeypatch.setattr(attend_fwd, "LIST_BYTES", 3 * 4 * 5 * 608)
    assert torch.equal(attend(q, k, v, plan, impl=impl), expected)


def test_hopper_list_lengths():
    """One list of every length around the steps of the kernel; negative scales; the same bits twice."""
    if reason := runtime.hopper_missing(torch.device("cuda")):
        pytest.skip(reason)
    for dim, m, n, scale in (
            (128, 128, 16, None), (128, 64, 1, 0.05), (64, 128, 8, -0.1), (64, 64, 128, None)):
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


def test_hopper_random_plans():
    """Many random masks in a row: the kernel's barriers hold."""
    if reason := runtime.hopper_missing(torch.device("cuda")):
        pytest.skip(reason)
    generator = torch.Generator("cuda").manual_seed(3)
    q, k, v = tensors(1, 4, 2000, 128)
    for i in range(300):
        m, n = (128, 64)[i % 2], (1, 4, 16, 64)[i % 4]
        share = torch.rand(4, -(-2000 // m), 1, generator=generator, device="cuda")
        mask = torch.rand(4, len(share[0]), -(-2000 // n), generator=generator, device="cuda") < share**2
        plan = plan_from_mask(mask, m, n, query_length=2000, key_length=2000)
        got, expected = (attend(q, k, v, plan, impl=name).float() for name in ("hopper", "triton"))
        assert (got - expected).norm() <= 5e-3 * expected.norm()


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


def test_engine_times_with_events():
    """A run on the GPU reports event times and a speed-up, and leaves short calls dense."""
    engine = Engine(Settings(threshold=1.5), Policy(warmup_steps=1))
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
    assert report.calls == {"warm-up step": 2, "sparse": 6, "fewer than 4096 tokens": 4}
    assert report.speedup > 0 and report.peak_memory > 0 and report.total > 0
    assert all(s.attention > 0 for s in report.steps)
    assert report.implementation == runtime.gpu_kernel(q.device)
