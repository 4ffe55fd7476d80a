"""The estimate of the error: what it says, how often it looks, and that it touches nothing else."""

import dataclasses
import types

import pytest
import torch
from fgattn import Settings, TokenLayout, attend, build_plan
from fgattn.call import Call
from fgattn.runs.estimate import EVERY, Estimate, every, exact
from makers import random_valid, tensors
from torch.nn.functional import scaled_dot_product_attention

LAYOUT = TokenLayout((4, 8, 16))  # 512 tokens


def sparse(q, k, v, threshold=2.0, layout=LAYOUT):
    return attend(
        q, k, v, build_plan(q, k, Settings(threshold=threshold, tile_queries=64, tile_keys=16), layout)
    )


def call_of(q, k, v, layout=LAYOUT, scale=None):
    return Call.to_plan(q, k, v, Settings(), layout, scale)


def true_error(q, k, v, out):
    dense = scaled_dot_product_attention(q.double(), k.double(), v.double())
    return ((out - dense).norm() / dense.norm()).item()


@pytest.mark.parametrize("threshold", [0.0, 1.0, 3.0, 8.0])
def test_it_is_near_the_true_error(threshold):
    """64 rows of 512, three times: within a quarter of the error of all rows; 0 where nothing is skipped."""
    one = Estimate()
    for seed in range(3):
        q, k, v = tensors(4, 512, seed=seed)
        out = sparse(q, k, v, threshold)
        got = one.estimated_error(call_of(q, k, v), out)
        assert got.ndim == 0 and got.dtype == torch.float32
        assert got.item() == pytest.approx(true_error(q, k, v, out), rel=0.25, abs=1e-5)


def test_rows_differ_from_call_to_call_and_repeat_from_run_to_run():
    q, k, v = tensors(2, 512)
    out = sparse(q, k, v)
    first, second = (
        [one.estimated_error(call_of(q, k, v), out).item() for _ in range(3)]
        for one in (Estimate(), Estimate())
    )
    assert first == second and len(set(first)) == 3


def test_the_sampler_keeps_its_random_numbers():
    """A seed gives the same video with and without estimates."""
    q, k, v = tensors(2, 512)
    before = torch.get_rng_state()
    Estimate().estimated_error(call_of(q, k, v), sparse(q, k, v))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("batch", [1, 2])
def test_padding_and_scale_are_those_of_the_call(scale, batch):
    """Of an exact output the error is rounding; a key too many would show."""
    q, k, v = tensors(2, 512, batch=batch)
    valid = random_valid(batch, 512)
    out = scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None], scale=scale)
    layout = dataclasses.replace(LAYOUT, key_valid=valid)
    assert Estimate().estimated_error(call_of(q, k, v, layout, scale), out) < 1e-5
    assert Estimate().estimated_error(call_of(q, k, v, LAYOUT, scale), out) > 1e-2
    assert Estimate().estimated_error(call_of(q, k, v, layout, 0.2), out) > 1e-2


def test_absent_tokens_are_no_rows_and_no_keys():
    """Their output is zero by definition, which is no error."""
    layout = TokenLayout((3, 8, 16), front=128, absent=tuple(range(28, 128)))
    q, k, v = tensors(2, 512)
    there = torch.tensor([[token not in layout.absent for token in range(512)]])
    out = scaled_dot_product_attention(q, k, v, attn_mask=there) * there[..., None]
    assert Estimate().estimated_error(call_of(q, k, v, layout), out) < 1e-5


def test_few_rows_are_dense_attention():
    q, k, v = tensors(2, 512, dtype=torch.bfloat16)
    rows = torch.arange(0, 512, 8)
    q = q[:, :, rows]
    assert torch.equal(exact(q, k, v, None, None), scaled_dot_product_attention(q, k, v))


def on(length, cuda=False, masked=False):
    """What is asked of a call of this length, with padding or without."""
    q = types.SimpleNamespace(is_cuda=cuda, shape=(1, 12, length, 128))
    return types.SimpleNamespace(q=q, layout=TokenLayout((1, 1, length), 1, absent=(0,) if masked else ()))


def test_every_block_has_its_turn():
    """One block in four a step; after four steps each was seen once."""
    one = Estimate()
    seen = [[b for b in range(30) if one.due(step, b, on(512))] for step in range(4)]
    assert all(7 <= len(s) <= 8 for s in seen) and sorted(b for s in seen for b in s) == list(range(30))


def test_blocks_without_a_number_have_their_turn():
    """LTX and others: calls are counted."""
    one = Estimate()
    due = [one.due(step, None, on(512)) for step in range(8) for _ in range(28)]
    assert sum(due) == len(due) / EVERY


@pytest.mark.parametrize(
    ("length", "masked", "calls"),
    [
        (118_800, False, 4),
        (75_600, False, 4),
        (32_760, False, 4),
        (16_384, False, 16),
        (8192, False, 64),
        (4096, False, 128),
        (118_800, True, 16),
        (16_384, True, 64),
    ],
)
def test_short_calls_are_estimated_less_often_on_a_gpu(length, masked, calls):
    """What an estimate costs does not shrink with the square of the length."""
    assert every(on(length, True, masked)) == calls
    assert every(on(length, False, masked)) == (16 if masked else 4)
