"""Attention over a plan: the reference against the definition, the torch implementation against it."""

import dataclasses
import itertools
import math
import weakref

import pytest
import torch
from fgattn import (
    InvalidArgument,
    Settings,
    TokenLayout,
    Unsupported,
    attend,
    build_plan,
    plan_from_mask,
    reference,
    sparse_attention,
)
from fgattn.backends import execute
from fgattn.backends.pytorch import attend as attend_torch
from fgattn.backends.pytorch import tail
from fgattn.call import Call
from fgattn.planning import parts_for
from fgattn.runs.engine import Engine
from fgattn.settings import TILE_KEYS, TILE_QUERIES, Policy
from makers import (
    CASES,
    assert_error_of_rounding,
    assert_finite_where_dense_is,
    executed_mask,
    in_memory_order,
    low_precision,
    mask_plan,
    poisoned,
    random_mask,
    random_valid,
    restated_order,
    without_tail,
)
from makers import tensors as make
from torch.nn.functional import scaled_dot_product_attention

LAYOUT = TokenLayout((3, 7, 10), front=3, back=9)  # 222 tokens
LENGTH = LAYOUT.length
LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}


def assert_like_reference(q, k, v, plan):
    """Equal but for rounding, which is judged from the data; the reference must stand the same test."""
    got, expected = (attend(q, k, v, plan, impl=impl) for impl in ("torch", "reference"))
    assert got.shape == q.shape and got.dtype == q.dtype and got.isfinite().all()
    if q.dtype == torch.float64:
        assert (got - expected).abs().max() <= 1e-13 * (1 + expected.abs().max())
        return
    for result in (got, expected):
        assert_error_of_rounding(result, q, k, v, plan)


def defined_attention(q, k, v, mask, m, layout, scale, has_tail, runs):
    """One head, row by row from the definitions; mask [L_q, L_k] in the order, before the union.

    `runs`: the run of 16 queries at each place of execution.
    """
    tokens = restated_order(layout.grid, layout.front, layout.back, "cells")
    valid = [layout.key_valid is None or bool(layout.key_valid[0, t]) for t in tokens]
    queries = [t - layout.query_start for t in tokens if 0 <= t - layout.query_start < len(q)]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    executed_rows = max(m, 64)
    order = [row for run in runs for row in range(16 * run, min(16 * run + 16, len(q)))]
    queries, mask = [queries[row] for row in order], mask[order]

    def mean(x, rows):
        return x[rows].to(wide).mean(0).to(q.dtype).double()

    out = torch.zeros(len(q), q.shape[1], dtype=torch.float64)
    for place, query in enumerate(queries):
        first = place // executed_rows * executed_rows
        executed = mask[first : first + executed_rows].any(0)
        run = queries[place // 16 * 16 : place // 16 * 16 + 16]
        entries = []  # log of the weight, value
        for j, token in enumerate(tokens):
            if executed[j] and valid[j]:
                entries.append((scale * float(q[query].double() @ k[token].double()), v[token].double()))
        for start in range(0, len(tokens) if has_tail else 0, 16):
            cell = [j for j in range(start, min(start + 16, len(tokens))) if valid[j]]
            left = [j for j in cell if not executed[j]]
            if left:
                keys = [tokens[j] for j in cell]
                logit = scale * float(mean(q, run) @ mean(k, keys)) + math.log(len(left))
                entries.append((logit, mean(v, keys)))
        if entries:
            peak = max(logit for logit, _ in entries)
            total = sum(math.exp(logit - peak) for logit, _ in entries)
            out[query] = sum(math.exp(logit - peak) / total * value for logit, value in entries)
    return out


@pytest.mark.parametrize("has_tail", [False, True], ids=["no tail", "tail"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize(("m", "n"), [(16, 1), (32, 8), (64, 16), (128, 64)], ids=lambda x: str(x))
def test_reference_is_the_definition(m, n, dtype, has_tail):
    """The yardstick itself, restated with loops over rows and cells."""
    layout = TokenLayout((3, 5, 9), front=3, back=8, query_start=2)
    layout = dataclasses.replace(layout, key_valid=random_valid(1, layout.length, seed=m))
    queries = 130
    q, k, v = make(1, queries, layout.length, dim=24, dtype=dtype, seed=m)
    mask = random_mask(-(-queries // m), -(-layout.length // n), seed=m)
    plan = plan_from_mask(
        mask, m, n, query_length=queries, layout=layout, order="cells", tail=has_tail, scale=0.3
    )
    runs = range(9) if plan.cell_order is None else plan.cell_order[0, 0].tolist()
    by_key = mask.repeat_interleave(m, 0)[:queries].repeat_interleave(n, 1)[:, : layout.length]
    expected = defined_attention(q[0, 0], k[0, 0], v[0, 0], by_key, m, layout, 0.3, has_tail, runs)
    k, v = poisoned(k, layout.key_valid), poisoned(v, layout.key_valid)
    got = attend(q, k, v, plan, impl="reference")[0, 0]
    if dtype == torch.float64:
        assert (got - expected).abs().max() <= 1e-13 * expected.abs().max()
    else:  # the same numbers but for the last rounding, where it is a tie
        assert (got == expected.to(dtype)).float().mean() > 0.995


@pytest.mark.parametrize(
    ("m", "n", "dim", "case"),
    [
        (m, n, (64, 128, 40)[i % 3], list(CASES.values())[i % len(CASES)])
        for i, (m, n) in enumerate(itertools.product(TILE_QUERIES, TILE_KEYS))
    ],
    ids=lambda x: x.why if hasattr(x, "why") else str(x),
)
@pytest.mark.parametrize("has_tail", [False, True], ids=["no tail", "tail"])
def test_every_tile_shape(m, n, dim, case, has_tail):
    """All M x N, each on another kind of sequence, planned from the data."""
    q, k, v = case.tensors(dim, seed=n)
    plan = build_plan(
        q, k, Settings(threshold=1.5, tile_queries=m, tile_keys=n, tail=has_tail), case.layout()
    )
    assert_like_reference(q, k, v, plan)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [*LOW.values(), torch.float32, torch.float64], ids=[*LOW, "fp32", "fp64"])
def test_every_kind_of_sequence(case, dtype):
    """Sinks, ragged grids, missing keys and partial queries in every type."""
    for dim, m, n in ((64, 128, 16), (40, 16, 2)):
        q, k, v = case.tensors(dim, dtype, seed=dim)
        plan = build_plan(q, k, Settings(threshold=2.0, tile_queries=m, tile_keys=n), case.layout())
        for chosen in (plan, without_tail(plan)):
            assert_like_reference(q, k, v, chosen)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 123, 255, 507])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW.values()], ids=["fp32", *LOW])
def test_lengths(length, dtype):
    """Short last tiles, slices, cells and bytes, with masks that leave some tiles empty."""
    for dim, m, n in ((64, 64, 16), (128, 128, 1), (40, 32, 8)):
        q, k, v = make(2, length, dim=dim, dtype=dtype)
        for has_tail in (True, False):
            assert_like_reference(q, k, v, mask_plan(m, n, length, heads=2, seed=length, tail=has_tail))


@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (300, 1), (77, 222), (222, 77)], ids=str)
def test_other_lengths_of_q_and_k(queries, keys):
    """Cross-attention: text keys, or few queries."""
    q, k, v = make(2, queries, keys)
    layout = TokenLayout.flat(keys, None)
    for settings in (
        Settings(threshold=2.0, tile_queries=64, tile_keys=16),
        Settings(threshold=2.0, tile_queries=32, tile_keys=2),
        Settings(threshold=2.0, tile_queries=128, tile_keys=128, tail=False),
    ):
        assert_like_reference(q, k, v, build_plan(q, k, settings, layout))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_keep_all_is_dense_attention(case, impl):
    """With nothing skipped the answer is known from elsewhere: torch's own attention."""
    q, k, v = case.tensors(dtype=torch.float64)
    layout = case.layout()
    for n in (1, 16, 128):
        plan = build_plan(q, k, Settings(threshold=0.0, tile_queries=64, tile_keys=n), layout)
        inputs = {"query": q, "key": k.nan_to_num(0), "value": v.nan_to_num(0)}
        if layout.key_valid is not None:
            inputs["attn_mask"] = layout.key_valid[:, None, None]
        for scale in (None, 0.05):
            got = attend(q, k, v, dataclasses.replace(plan, scale=scale), impl=impl)
            assert (got - scaled_dot_product_attention(**inputs, scale=scale)).abs().max() < 1e-12


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("n", [1, 16, 64])
def test_a_mask_is_a_masked_softmax(n, impl):
    """Without a tail, a plan is nothing but a mask for torch's own attention."""
    q, k, v = make(2, LENGTH, dtype=torch.float64)
    plan = mask_plan(64, n, LENGTH, heads=2, share=0.5)
    mask = torch.stack([in_memory_order(executed_mask(plan, 0, h), plan, 0, h) for h in range(2)])
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask[None]).nan_to_num(0)
    assert (attend(q, k, v, plan, impl=impl) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("n", [1, 8, 32])
def test_mask_is_honoured(n, impl):
    """Negative control: a skipped key may hold anything, a kept one matters to all who keep it."""
    q, k, v = make(1, LENGTH, dtype=torch.float64)
    q = 0.1 * q  # so even that every key matters to every row
    mask = torch.ones(-(-LENGTH // 128), -(-LENGTH // n), dtype=torch.bool)
    slot = 100 // n
    mask[0, slot] = False  # the first tile skips it, the second keeps it
    plan = plan_from_mask(mask, 128, n, query_length=LENGTH, key_length=LENGTH)
    before = attend(q, k, v, plan, impl=impl)
    rows = slice(slot * n, slot * n + n)
    for changed in ("k", "v"):
        other = {"k": k.clone(), "v": v.clone()}
        other[changed][:, :, rows] += 3.0
        after = attend(q, other["k"], other["v"], plan, impl=impl)
        assert torch.equal(after[:, :, :128], before[:, :, :128])
        assert ((after[:, :, 128:] - before[:, :, 128:]).abs().amax(3) > 1e-6).all()


def test_tail_hears_skipped_keys():
    """With a tail, what is skipped still counts, by its cell."""
    q, k, v = make(1, 64)
    q = 0.1 * q
    mask = torch.tensor([[True, True, False, True]])
    plan = plan_from_mask(mask, 64, 16, tail=True)
    louder = v.clone()
    louder[:, :, 32:48] += 100.0
    assert ((attend(q, k, louder, plan) - attend(q, k, v, plan)).abs().amax(3) > 1e-3).all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_keys_may_be_permuted_with_their_mask(impl):
    """Attention is a sum over keys: their place is nothing but an address."""
    q, k, v = make(2, LENGTH, dtype=torch.float64)
    shuffle = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))
    mask = random_mask(2, 4, LENGTH)
    plain, moved = (plan_from_mask(x, 64, 1, query_length=LENGTH) for x in (mask, mask[..., shuffle]))
    plain = attend(q, k, v, plain, impl=impl)
    moved = attend(q, k[:, :, shuffle], v[:, :, shuffle], moved, impl=impl)
    assert (plain - moved).abs().max() < 1e-13


def fused(q, k, v):
    """Slices of one [B, L, 3, H, D] projection."""
    whole = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
    return [whole[:, :, i].transpose(1, 2) for i in range(3)]


def as_blhd(*tensors):
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]


def with_gaps(*tensors):
    """Every other row of a longer tensor, rows wider than the head."""
    result = []
    for x in tensors:
        b, h, length, dim = x.shape
        wide = x.new_zeros(b, h, 2 * length, dim + 8)
        wide[:, :, ::2, :dim] = x
        result.append(wide[:, :, ::2, :dim])
    return result


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    "view",
    [fused, as_blhd, with_gaps, lambda q, k, v: (q, *as_blhd(k, v))],
    ids=["slices of fused qkv", "[B, L, H, D]", "gaps", "mixed"],
)
def test_strides(view, impl):
    """Models hand over views; values must not depend on how they are stored."""
    tensors = make(3, LENGTH, batch=2, seed=4)
    plan = build_plan(*tensors[:2], Settings(threshold=1.5, tile_queries=64, tile_keys=4), LAYOUT)
    views = view(*tensors)
    assert not all(x.is_contiguous() for x in views)
    assert all(torch.equal(a, b) for a, b in zip(views, tensors, strict=True))
    assert torch.equal(
        build_plan(*views[:2], Settings(threshold=1.5, tile_queries=64, tile_keys=4), LAYOUT).bits, plan.bits
    )
    assert torch.equal(attend(*views, plan, impl=impl), attend(*tensors, plan, impl=impl))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_output_is_stored_as_the_queries_are(impl):
    """ComfyUI reshapes the result to [B, L, H * D] at once: from [B, L, H, D] that is free."""
    q, k, v = make(3, LENGTH, batch=2)
    plan = mask_plan(64, 16, LENGTH, heads=3, batch=2)
    assert attend(q, k, v, plan, impl=impl).is_contiguous()
    assert attend(*as_blhd(q, k, v), plan, impl=impl).transpose(1, 2).is_contiguous()
    assert attend(*fused(q, k, v), plan, impl=impl).transpose(1, 2).is_contiguous()
    assert attend(*with_gaps(q, k, v), plan, impl=impl).is_contiguous()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("has_tail", [False, True], ids=["no tail", "tail"])
def test_nothing_to_attend_gives_zeros(impl, has_tail):
    """Never a NaN: a black frame is what users would see."""
    q, k, v = make(2, 100, 0)
    layout = TokenLayout.flat(0, None)
    got = attend(q, k, v, build_plan(q, k, Settings(tail=has_tail), layout), impl=impl)
    assert got.shape == (1, 2, 100, 64) and (got == 0).all()

    q, k, v = make(2, 0, 100)
    got = attend(q, k, v, build_plan(q, k, Settings(tail=has_tail), TokenLayout.flat(100, None)), impl=impl)
    assert got.shape == (1, 2, 0, 64)

    q, k, v = make(2, 100)
    nothing_valid = torch.zeros(1, 100, dtype=torch.bool)
    layout = TokenLayout((1, 1, 100), key_valid=nothing_valid)
    k, v = poisoned(k, nothing_valid), poisoned(v, nothing_valid)
    for n in (1, 16, 64):
        plan = build_plan(q, k, Settings(threshold=1.0, tile_queries=64, tile_keys=n, tail=has_tail), layout)
        assert plan.executed_density == 0
        assert (attend(q, k, v, plan, impl=impl) == 0).all()


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize("method", ["threshold", "top_k"])
@pytest.mark.parametrize(("m", "n"), [(16, 1), (128, 64)])
@pytest.mark.parametrize("impl", [None, "torch", "reference"])
def test_no_batch_row_or_no_head(impl, m, n, method, batch, heads):
    """An empty output, as of any other operation on tensors, and plans of their usual shapes."""
    layout = dataclasses.replace(LAYOUT, key_valid=torch.ones(batch, LENGTH, dtype=torch.bool))
    settings = Settings(tile_queries=m, tile_keys=n, method=method)
    q, k, v = (torch.empty(batch, heads, LENGTH, 64) for _ in range(3))
    some = torch.randn(2, 3, LENGTH, 64)
    usual = build_plan(some, some, settings, LAYOUT)
    mask = torch.ones(batch, heads, -(-LENGTH // m), -(-LENGTH // n), dtype=torch.bool)
    for plan in (
        build_plan(q, k, settings, layout, impl=impl),
        plan_from_mask(mask, m, n, query_length=LENGTH, layout=layout, tail=True),
    ):
        for name in ("bits", "requested", "executed", "cell_order"):
            expected, got = getattr(usual, name), getattr(plan, name)
            assert (got is None) == (expected is None)
            if got is not None:
                assert (got.dtype, got.shape) == (expected.dtype, (batch, heads, *expected.shape[2:]))
        assert plan.density == plan.executed_density == 0
        assert attend(q, k, v, plan, impl=impl).shape == q.shape
    assert sparse_attention(q, k, v, settings, layout, impl=impl).shape == q.shape


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_empty_list_gives_zeros_or_the_tail(impl):
    """A tile of a foreign mask may keep nothing."""
    q, k, v = make(1, 128)
    mask = torch.tensor([[False] * 8, [True] * 8])
    valid = torch.arange(128)[None] > 0  # the empty tile reads no key, not even the first
    plan = plan_from_mask(mask, 64, 16, layout=TokenLayout((1, 1, 128), key_valid=valid))
    assert (attend(q, poisoned(k, valid), poisoned(v, valid), plan, impl=impl)[:, :, :64] == 0).all()
    got = attend(q, k, v, plan_from_mask(mask, 64, 16, tail=True), impl=impl)
    key_means, value_means = (x[0, 0].unflatten(0, (8, 16)).mean(1) for x in (k, v))
    centroids = q[0, 0, :64].unflatten(0, (4, 16)).mean(1).repeat_interleave(16, 0)
    expected = (centroids @ key_means.T / 8).softmax(1) @ value_means
    assert (got[0, 0, :64] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("n", [1, 16, 128])
@pytest.mark.parametrize("m", [16, 128])
def test_missing_keys_do_not_leak(m, n, impl):
    """Padding holds anything, NaN included: its content must not reach lists, tail or output."""
    valid = random_valid(2, LENGTH)
    layout = dataclasses.replace(LAYOUT, key_valid=valid)
    q, k, v = make(2, LENGTH, batch=2)
    settings = Settings(threshold=1.5, tile_queries=m, tile_keys=n)
    clean = attend(q, k, v, build_plan(q, k, settings, layout), impl=impl)
    k, v = poisoned(k, valid), poisoned(v, valid)
    assert torch.equal(attend(q, k, v, build_plan(q, k, settings, layout), impl=impl), clean)


def test_padding_equals_a_shorter_sequence():
    """A padded prompt attends as the unpadded one does."""
    q, k, v = make(2, 160, 160, dtype=torch.float64)
    valid = torch.arange(160)[None] < 130
    settings = Settings(threshold=1.5, tile_queries=64, tile_keys=16)
    padded = TokenLayout((1, 1, 160), query_start=None, key_valid=valid)
    plan = build_plan(q, k, settings, padded)
    got = attend(q, k, v, plan)
    # The threshold is relative to 1 / L_k, padding included.
    shorter = dataclasses.replace(settings, threshold=1.5 * 130 / 160)
    expected = sparse_attention(q, k[:, :, :130], v[:, :, :130], shorter, TokenLayout.flat(130, None))
    assert plan.density < 130 / 160 - 0.1
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_batch_rows_and_heads_are_independent(impl):
    """One row's content, plan and missing keys are its own."""
    valid = random_valid(2, LENGTH)
    layout = dataclasses.replace(LAYOUT, key_valid=valid)
    q, k, v = make(3, LENGTH, batch=2)
    together = attend(
        q, k, v, build_plan(q, k, Settings(threshold=1.5, tile_queries=64, tile_keys=4), layout), impl=impl
    )
    for b, h in itertools.product(range(2), range(3)):
        one = [x[b : b + 1, h : h + 1] for x in (q, k, v)]
        alone = dataclasses.replace(LAYOUT, key_valid=valid[b : b + 1])
        got = attend(
            *one,
            build_plan(*one[:2], Settings(threshold=1.5, tile_queries=64, tile_keys=4), alone),
            impl=impl,
        )
        assert (got[0, 0] - together[b, h]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *LOW.values()], ids=["fp32", *LOW])
def test_same_call_twice_is_identical(dtype):
    """Two equal renders must be equal to the bit."""
    q, k, v = make(2, LENGTH, dtype=dtype)
    first, second = (
        sparse_attention(q, k, v, Settings(threshold=1.5, tile_queries=32, tile_keys=4), LAYOUT)
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_large_scores_do_not_overflow():
    """Scores of several thousand: every maximum is subtracted before the exponential."""
    q, k, v = make(2, LENGTH)
    q, k = 30 * q, 30 * k
    for has_tail in (True, False):
        plan = mask_plan(64, 4, LENGTH, tail=has_tail)
        got, expected = (attend(q, k, v, plan, impl=impl) for impl in ("torch", "reference"))
        assert got.isfinite().all() and (got - expected).abs().max() < 1e-2


def test_tolerance_can_fail():
    """The data-derived tolerance must notice one key more or less, and a tail that is not there."""
    q, k, v = make(2, LENGTH, dtype=torch.bfloat16)
    plan = build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=1), LAYOUT)
    good = attend(q, k, v, plan, impl="torch")
    assert_error_of_rounding(good, q, k, v, plan)
    assert_error_of_rounding(low_precision(q, k, v, plan), q, k, v, plan)
    flips = (torch.arange(plan.bits.shape[3]) == 3).to(torch.uint8)  # key 24 of every tile
    flipped = dataclasses.replace(plan, bits=plan.bits ^ flips)
    for wrong in (without_tail(plan), flipped):
        with pytest.raises(AssertionError, match="rounding explains"):
            assert_error_of_rounding(attend(q, k, v, wrong, impl="torch"), q, k, v, plan)


GROUPED = "grouped heads (4 query heads, 2 key heads)"


@pytest.mark.parametrize(
    ("q", "k", "v", "reason"),
    [
        (torch.zeros(1, 4, 32, 64), torch.zeros(1, 2, 32, 64), torch.zeros(1, 2, 32, 64), GROUPED),
        (
            torch.zeros(1, 2, 64, 32).mT,
            torch.zeros(1, 2, 32, 64),
            torch.zeros(1, 2, 32, 64),
            "q has stride 32 in its last dimension, not 1",
        ),
        (
            torch.zeros(1, 2, 32, 64),
            torch.zeros(1, 2, 32, 128)[..., ::2],
            torch.zeros(1, 2, 32, 64),
            "k has stride 2 in its last dimension, not 1",
        ),
        (
            torch.zeros(1, 2, 32, 64),
            torch.zeros(1, 2, 32, 64),
            torch.zeros(1, 2, 32, 65)[..., :64],
            "v has rows that are not 16-byte aligned",
        ),
        (
            torch.zeros(1, 2, 32, 64),
            torch.zeros(4097)[1:].view(1, 2, 32, 64),
            torch.zeros(1, 2, 32, 64),
            "k has rows that are not 16-byte aligned",
        ),
        (
            torch.zeros(1, 2, 32, 20).half(),
            torch.zeros(1, 2, 32, 20).half(),
            torch.zeros(1, 2, 32, 20).half(),
            "q has rows that are not 16-byte aligned",
        ),
    ],
    ids=["grouped heads", "q transposed", "k strided", "v rows", "k start", "odd head size"],
)
def test_unsupported_says_why(q, k, v, reason):
    """The reason is what the log and the node show while such calls go dense."""
    plan = plan_from_mask(torch.ones(1, 2, dtype=torch.bool), 64, 16, query_length=32)
    for impl in ("torch", "reference", "triton", None):
        with pytest.raises(Unsupported) as caught:
            attend(q, k, v, plan, impl=impl)
        assert repr(reason) in str(caught.value) and "Run this call dense." in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (((1, 2, 32), (1, 2, 32, 64), (1, 2, 32, 64)), "shapes of q, k, v: .*Split fused heads"),
        (((1, 2, 32, 64), (1, 2, 32, 64), (1, 2, 31, 64)), "shapes of q, k, v"),
        (((1, 2, 32, 64), (1, 2, 32, 32), (1, 2, 32, 32)), "shapes of q, k, v"),
        (((2, 2, 32, 64), (1, 2, 32, 64), (1, 2, 32, 64)), "shapes of q, k, v"),
        (
            ((1, 2, 33, 64), (1, 2, 32, 64), (1, 2, 32, 64)),
            r"got \(1, 2, 33, 32\); allowed: \(1, 1, 32, 32\) of the plan",
        ),
        (((1, 2, 32, 64), (1, 2, 48, 64), (1, 2, 48, 64)), "Build a plan for these tensors"),
    ],
    ids=["3-D", "k and v", "head size", "batch", "queries of another plan", "keys of another plan"],
)
def test_wrong_shapes(shapes, what):
    """A plan on tensors of other shapes would read other rows."""
    plan = plan_from_mask(torch.ones(1, 2, dtype=torch.bool), 64, 16, query_length=32)
    with pytest.raises(InvalidArgument, match=what):
        attend(*map(torch.zeros, shapes), plan)


def test_plan_of_other_heads():
    """Per-head lists fit their own number of heads and batch rows only."""
    plan = plan_from_mask(torch.ones(2, 3, 1, 1, dtype=torch.bool), 64, 64)
    for heads, batch in ((2, 2), (3, 1), (1, 2)):
        with pytest.raises(InvalidArgument, match=r"\(2, 3, 64, 64\) of the plan"):
            attend(*make(heads, 64, batch=batch), plan)


def test_wrong_types():
    """Mixed and integer types are errors of the caller."""
    plan = plan_from_mask(torch.ones(1, 1, dtype=torch.bool), 64, 64)
    q, k, v = make(1, 64)
    for wrong in ((q.half(), k, v), (q, k, v.double()), (q.int(), k.int(), v.int())):
        with pytest.raises(InvalidArgument, match=r"dtype and device of q, k, v.*Convert them first"):
            attend(*wrong, plan)
    with pytest.raises(InvalidArgument, match="impl: got 'cuda'; allowed: hopper, triton, torch, reference"):
        attend(q, k, v, plan, impl="cuda")


def test_cpu_takes_the_torch_implementation():
    """None chooses what runs: here neither Triton nor its interpreter."""
    q, k, v = make(2, LENGTH)
    plan = mask_plan(64, 4, LENGTH)
    assert torch.equal(attend(q, k, v, plan), attend(q, k, v, plan, impl="torch"))
    with pytest.raises(Unsupported, match="The triton kernels cannot run: "):
        attend(q, k, v, plan, impl="triton")


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("order", "m", "n"), [("cells", 128, 16), ("cells", 16, 1), ("raster", 32, 32), ("hilbert", 64, 4)]
)
def test_absent_tokens(order, m, n, impl):
    """As if they had been taken out of q, k and v, with zeros in their place of the output."""
    layout = TokenLayout((3, 6, 10), front=30, back=12, absent=(0, 1, *range(17, 30), 215))
    there = torch.tensor([t for t in range(layout.length) if t not in layout.absent])
    q, k, v = make(2, layout.length)
    settings = Settings(threshold=1.5, tile_queries=m, tile_keys=n, order=order)
    short = [x.index_select(2, there) for x in (q, k, v)]
    expected = torch.zeros_like(q).index_copy_(
        2, there, sparse_attention(*short, settings, TokenLayout((3, 6, 10), front=15, back=11), impl=impl)
    )
    for x in (q, k, v):
        x[:, :, list(layout.absent)] = float("nan")
    torch.testing.assert_close(sparse_attention(q, k, v, settings, layout, impl=impl), expected)
    with pytest.raises(InvalidArgument, match=r"\[B, H, L_q, L_k\]"):
        attend(*short, build_plan(q, k, settings, layout))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("side", [0, 1], ids=["query", "key"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_spoil_no_others(value, side, threshold, impl):
    """They share cells and tiles with rows that are finite in dense attention: those stay so."""
    if side == 1 and math.isnan(value):
        return  # of all rows
    for m, n, has_tail in ((128, 16, True), (16, 4, True), (64, 32, False)):
        settings = Settings(threshold=threshold, tile_queries=m, tile_keys=n, tail=has_tail)
        assert_finite_where_dense_is(impl, value, side, settings, LAYOUT)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_stay_in_their_tiles(value, impl):
    """A tile that skips the key has nothing of it; with a tail it has the mean, as dense attention would."""
    q, k, v = make(2, LENGTH)
    v[0, 0, 50, 3] = value
    mask = torch.ones(-(-LENGTH // 64), -(-LENGTH // 4), dtype=torch.bool)
    mask[[0, 2], 50 // 4] = False
    plan = plan_from_mask(mask, 64, 4, query_length=LENGTH, key_length=LENGTH)
    keeps = mask[:, 50 // 4].repeat_interleave(64)[:LENGTH]
    out = attend(q, k, v, plan, impl=impl)
    assert torch.equal(out[0, 0].isfinite().all(1), ~keeps) and out[0, 1].isfinite().all()


@pytest.mark.parametrize("absent", [(30,), (-1,), (222,), (209,)])
def test_only_sinks_can_be_absent(absent):
    """Cells, boxes and maps count on a whole video."""
    with pytest.raises(InvalidArgument, match=r"layout\.absent"):
        TokenLayout((3, 6, 10), front=30, back=12, absent=absent)


def test_sparse_attention_is_plan_and_attend():
    """The one-call form has no behaviour of its own."""
    q, k, v = make(2, LENGTH)
    settings = Settings(threshold=2.0, tile_queries=32, tile_keys=4)
    expected = attend(q, k, v, build_plan(q, k, settings, LAYOUT, scale=0.2), impl="reference")
    assert torch.equal(sparse_attention(q, k, v, settings, LAYOUT, scale=0.2, impl="reference"), expected)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_heads_in_parts(parts, by_token, monkeypatch):
    """A call that would need much memory takes its heads in parts: the same result, stored as q is."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) if by_token else x for x in make(5, LENGTH))
    whole = sparse_attention(q, k, v, Settings(threshold=1.5, tile_queries=32, tile_keys=4), LAYOUT)
    monkeypatch.setattr("fgattn.attention.parts_for", lambda *_: parts)
    out = sparse_attention(q, k, v, Settings(threshold=1.5, tile_queries=32, tile_keys=4), LAYOUT)
    torch.testing.assert_close(out, whole)
    assert out.stride() == q.stride()


def test_parts_do_not_add_up(monkeypatch):
    """A part's plan is gone when the next one is planned: parts are there to save memory."""
    made = []

    plan_of = execute.plan_of

    def watched(call, backend):
        assert all(plan() is None for plan in made)
        planned = plan_of(call, backend)
        made.append(weakref.ref(planned.plan))
        return planned

    monkeypatch.setattr(execute, "plan_of", watched)
    for module in ("attention", "runs.engine"):
        monkeypatch.setattr(f"fgattn.{module}.parts_for", lambda *_: 3)
    q, k, v = make(3, LENGTH)
    sparse_attention(q, k, v, Settings(threshold=1.5, tile_queries=32, tile_keys=4), LAYOUT)
    one = Engine(Settings(threshold=1.5, tile_queries=32, tile_keys=4), Policy(warmup_steps=0))
    one.begin_run([1.0, 0.0], True, q.device)
    one.attention(q, k, v, layout=LAYOUT, dense=None, block=0)
    assert len(made) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q: torch.empty_like(q)[:, :, 1:],
        lambda q: torch.empty_like(q)[:, 1:],
        lambda q: torch.empty_like(q, dtype=torch.float64),
        lambda q: torch.empty_like(q, device="meta"),
        lambda q: torch.empty_like(torch.cat((q, q), 3))[
            ..., ::2
        ],  # a kernel would write between its elements
        lambda q: torch.empty_like(q.transpose(2, 3)).contiguous().transpose(2, 3),
        lambda q: torch.empty_like(q[:1, :1]).expand(q.shape),
        lambda q: torch.empty_like(q, requires_grad=True),
        lambda q: q,  # tiles that are written would be read by others
    ],
)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_an_output_that_does_not_fit_is_refused(impl, wrong):
    """The kernels would write past its end."""
    q, k, v = make(2, LENGTH)
    plan = build_plan(q, k, Settings(), LAYOUT)
    with pytest.raises(InvalidArgument, match=r"^out: got"):
        attend(q, k, v, plan, impl=impl, out=wrong(q))
    out = torch.empty_like(q)
    assert attend(q, k, v, plan, impl=impl, out=out) is out


def test_parts_of_a_large_call():
    """Wan 14B at 720p: single keys in two parts, slices of whole cells in one; no parts without a GPU."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    def parts(q, n):
        return parts_for(Call(q, q, q, Settings(tile_keys=n), None, None, None, 1.0))

    q = torch.empty(1, 40, 75600, 128, device="meta")
    on_gpu = q.as_subclass(OnGPU)
    assert [parts(on_gpu, n) for n in (1, 4, 8, 16)] == [2, 2, 2, 1]
    assert parts(on_gpu[:, :1], 1) == 1
    assert parts(q, 1) == 1


def test_reference_needs_no_other_stage(monkeypatch):
    """The specification must not share the code it judges."""
    q, k, v = make(1, LENGTH)
    plan = build_plan(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=16), LAYOUT)

    def fail(*_):
        raise AssertionError("the reference called an implementation")

    for module in (attend_torch, tail):
        for name in ("summarise", "cell_logits", "ordered", "attend", "tail"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fail)
    reference.attend(q, k, v, plan)
    reference.select(q, k, Settings(threshold=2.0, tile_queries=64, tile_keys=16), LAYOUT)
