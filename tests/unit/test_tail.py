"""Tail: the pooled estimate of what is skipped, against loops."""

import dataclasses
import math

import pytest
import torch
from fgattn import TokenLayout, attend, plan_from_mask, tensors
from makers import executed_mask, poisoned, query_tokens, random_mask, random_valid, tail_of
from makers import tensors as make

LAYOUT = TokenLayout((3, 7, 10), front=3, back=9)  # 222 tokens
LENGTH = LAYOUT.length


def random_plan(m, n, layout=LAYOUT, *, seed=0, heads=2, batch=1, **options):
    mask = random_mask(batch, heads, -(-LENGTH // m), -(-LENGTH // n), seed=seed)
    return plan_from_mask(mask, m, n, query_length=LENGTH, layout=layout, order="cells", tail=True, **options)


def defined_tail(q, k, v, executed, valid, scale):
    """One head, all rows in the order, float64: (sum of weights * v, sum of weights) per run, in logs."""
    outs, sums = [], []
    for first in range(0, len(q), 16):
        centroid = q[first : first + 16].mean(0)
        logits, values = [], []
        for start in range(0, len(k), 16):
            cell = torch.arange(start, min(start + 16, len(k)))
            cell = cell[valid[cell]]
            left = int((~executed[first, cell]).sum())
            if left:
                logits.append(scale * float(centroid @ k[cell].mean(0)) + math.log(left))
                values.append(v[cell].mean(0))
        total = math.log(sum(map(math.exp, logits))) if logits else -math.inf
        sums.append(total)
        out = torch.zeros_like(v[0])
        for logit, value in zip(logits, values, strict=True):
            out = out + math.exp(logit - total) * value
        outs.append(out)
    return torch.stack(outs), torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("padded", [False, True], ids=["all valid", "keys missing"])
@pytest.mark.parametrize(
    ("m", "n"), [(16, 1), (32, 16), (64, 4), (64, 128), (128, 16), (128, 2)], ids=lambda x: str(x)
)
def test_tail_by_brute_force(m, n, padded):
    """Counts per cell are those the tile does not execute; every run has its own centroid."""
    valid = random_valid(2, LENGTH, seed=n) if padded else torch.ones(2, LENGTH, dtype=torch.bool)
    layout = dataclasses.replace(LAYOUT, key_valid=valid) if padded else LAYOUT
    q, k, v = make(2, LENGTH, dim=40, batch=2, dtype=torch.float64, seed=m)
    plan = random_plan(m, n, layout, seed=n, batch=2, scale=0.2)
    out, lse = tail_of(q, poisoned(k, valid), poisoned(v, valid), plan)
    runs = -(-LENGTH // 16)
    assert out.shape == (2, 2, runs, 40) and lse.shape == (2, 2, runs)
    for b in range(2):
        for h in range(2):
            rows = q[b, h, query_tokens(plan, b, h)]
            keys, values, exists = (x[plan.geometry.key_tokens] for x in (k[b, h], v[b, h], valid[b]))
            expected = defined_tail(rows, keys, values, executed_mask(plan, b, h), exists, 0.2)
            for got, wanted in zip((out, lse), expected, strict=True):
                torch.testing.assert_close(got[b, h], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tail_of_short_types(dtype):
    """Means are rounded to the type, sums are not."""
    q, k, v = make(2, LENGTH, dtype=dtype)
    plan = random_plan(64, 4)
    out, lse = tail_of(q, k, v, plan)
    exact, exact_lse = tail_of(q.double(), k.double(), v.double(), plan)
    eps = torch.finfo(dtype).eps
    assert out.dtype == lse.dtype == torch.float32
    assert 0 < (lse - exact_lse).abs().max() < 8 * eps + 1e-5
    assert 0 < (out - exact).abs().max() < 4 * eps + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_nothing_skipped_weighs_nothing(dtype):
    """log-sum-exp -inf, so that the merge leaves attention as it is."""
    q, k, v = make(1, LENGTH, dtype=dtype)
    mask = torch.ones(4, 14, dtype=torch.bool)
    mask[2, 5] = False
    plan = plan_from_mask(mask, 64, 16, query_length=LENGTH, key_length=LENGTH, tail=True)
    out, lse = tail_of(q, k, v, plan)
    skipping = torch.zeros(14, dtype=torch.bool)
    skipping[8:12] = True  # the runs of tile 2
    assert torch.equal(lse[0, 0].isfinite(), skipping)
    assert (lse[0, 0, ~skipping] == -math.inf).all() and not out.isnan().any()


def test_merge_is_one_softmax():
    """Kept keys and tail joined by their log-sum-exps are the softmax over both together."""
    q, k, v = make(1, LENGTH, dtype=torch.float64)
    plan = random_plan(64, 1, heads=1)
    out, lse = tail_of(q, k, v, plan)
    rows = q[0, 0, plan.geometry.query_tokens]
    keys, values = (x[0, 0, plan.geometry.key_tokens] for x in (k, v))
    executed = executed_mask(plan, 0, 0)
    scores = (rows @ keys.T / 8).masked_fill(~executed, -math.inf)
    share = torch.sigmoid(lse[0, 0].repeat_interleave(16)[:LENGTH] - scores.logsumexp(1))[:, None]
    merged = (1 - share) * (scores.softmax(1) @ values) + share * out[0, 0].repeat_interleave(16, 0)[:LENGTH]

    means = [
        x.unflatten(0, (-1, 16)).mean(1)
        for x in (
            torch.cat((keys, keys[-14:].mean(0, keepdim=True).expand(2, -1))),
            torch.cat((values, values[-14:].mean(0, keepdim=True).expand(2, -1))),
            torch.cat((rows, rows[-14:].mean(0, keepdim=True).expand(2, -1))),
        )
    ]
    left = torch.nn.functional.pad(~executed, (0, 2)).unflatten(1, (-1, 16)).sum(2).double()
    pooled = (means[2] @ means[0].T / 8).repeat_interleave(16, 0)[:LENGTH] + left.log()
    together = torch.cat((scores, pooled), 1).softmax(1) @ torch.cat((values, means[1]))
    assert (merged - together).abs().max() < 1e-12

    result = attend(q, k, v, plan, impl="torch")[0, 0, plan.geometry.query_tokens]
    assert (result - together).abs().max() < 1e-12


def test_exact_where_cells_are_uniform():
    """Pooling loses nothing where the keys of a cell are equal and the queries of a run are."""
    q, k, v = (x[:, :, :14].repeat_interleave(16, 2) for x in make(2, LENGTH, dtype=torch.float64))
    mask = random_mask(2, 4, 14)
    plan = plan_from_mask(mask, 64, 16, query_length=224, key_length=224, tail=True)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (attend(q, k, v, plan, impl="torch") - dense).abs().max() < 1e-12


def test_chunks_do_not_show(monkeypatch):
    """Long videos are pooled a few heads at a time, with the same result."""
    q, k, v = make(5, LENGTH, batch=2)
    plan = random_plan(64, 16, heads=5, batch=2)
    whole = tail_of(q, k, v, plan)
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 1)
    for a, b in zip(whole, tail_of(q, k, v, plan), strict=True):
        assert torch.equal(a, b)
