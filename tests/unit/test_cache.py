"""Index tensors: shared by calls, bounded in bytes, given back, and never poisoned by the mode of a call."""

import dataclasses

import pytest
import torch
from fgattn import Settings, TokenLayout, attend, build_plan, sparse_attention
from fgattn import layout as layouts
from fgattn.cache import ByteCache, bytes_of
from fgattn.layout import GEOMETRIES, geometry, release
from fgattn.runs.engine import Engine
from fgattn.settings import Policy
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
LAYOUT = TokenLayout((3, 7, 11))
SETTINGS = Settings(threshold=1.5, tile_queries=64)


@dataclasses.dataclass
class Value:
    nbytes: int


@pytest.fixture(autouse=True)
def empty():
    """No tensors from before, none left behind."""
    release()
    yield
    release()


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, 2, LAYOUT.length, 64, generator=generator).unbind()


def test_what_was_used_last_stays():
    """By bytes, not by number; a value that alone is too large stays until the next one comes."""
    cache = ByteCache(100)
    made = []

    def get(key, nbytes=40):
        return cache.get(key, lambda: made.append(key) or Value(nbytes))

    assert get("a") is get("a") and get("b") and get("a") and get("c")
    assert made == ["a", "b", "c"] and len(cache) == 2 and cache.nbytes == 80
    assert get("a") and made == ["a", "b", "c"], "b was used longest ago"
    assert get("large", 1000) and len(cache) == 1
    assert get("d") and cache.nbytes == 40


def test_values_that_grow_are_counted():
    """Tables are added to a geometry when a kernel first asks for them."""
    cache = ByteCache(100)
    first, second = (cache.get(key, lambda: Value(40)) for key in "ab")
    second.nbytes = 70
    cache.trim()
    assert len(cache) == 1 and cache.get("b", lambda: 1 / 0) is second
    assert first is not cache.get("a", lambda: Value(1))


def test_bytes_are_those_of_the_storage():
    """A view holds all of what it is a view of."""
    x = torch.zeros(100, dtype=torch.int32)
    assert bytes_of(x[:10]) == 400 and bytes_of((x, None, (x, "name"))) == 800 and bytes_of(None) == 0


def test_many_lengths_stay_within_the_bound(monkeypatch):
    """A prompt of another length is another layout in HunyuanVideo: they must not pile up on the GPU."""
    monkeypatch.setattr(GEOMETRIES, "limit", 1 << 18)
    for text in range(34):
        layout = TokenLayout((5, 12, 16), front=text)
        q = torch.randn(1, 1, layout.length, 64)
        sparse_attention(q, q, q, SETTINGS, layout)
        held = GEOMETRIES.nbytes
        assert held <= 1 << 18
    assert 1 < len(GEOMETRIES) < 34
    last = geometry(layout, "cells", layout.length, CPU)
    assert geometry(layout, "cells", layout.length, CPU) is last


def test_the_bound_holds_for_a_long_video():
    """One layout of 219 600 tokens fits; so do the tables that a kernel needs of it."""
    geo = geometry(TokenLayout((61, 45, 80)), "cells", 219_600, CPU)
    assert 5_000_000 < geo.nbytes < layouts.CACHE_BYTES / 4


def test_a_model_that_leaves_gives_them_back():
    """ComfyUI unloads models when it needs the memory; an engine that has no model holds nothing."""
    q, k, v = tensors()
    one = Engine(SETTINGS, Policy(warmup_steps=0))
    one.begin_run([1.0, 0.0], True, CPU)
    one.attention(q, k, v, layout=LAYOUT, dense=lambda: 1 / 0)
    one.end_run()
    assert GEOMETRIES.nbytes > 0
    one.release()
    assert GEOMETRIES.nbytes == 0 and len(GEOMETRIES) == 0


def test_plans_outlive_what_was_given_back():
    """A kept plan has its own geometry."""
    q, k, v = tensors()
    plan = build_plan(q, k, SETTINGS, LAYOUT)
    before = attend(q, k, v, plan)
    release()
    assert torch.equal(attend(q, k, v, plan), before)


def test_a_layout_first_seen_under_inference_mode_serves_every_call():
    """Samplers run in inference mode. Outside it, PyTorch refuses to change inference tensors in place."""
    q, k, v = tensors()
    with torch.inference_mode():
        inside = sparse_attention(q, k, v, SETTINGS, LAYOUT)
    geo = geometry(LAYOUT, "cells", LAYOUT.length, CPU)
    assert not geo.key_tokens.is_inference()
    assert not any(x.is_inference() for x in geo._tables.values() if isinstance(x, torch.Tensor))
    assert torch.equal(sparse_attention(q, k, v, SETTINGS, LAYOUT), inside)


def test_a_layout_first_seen_under_fake_tensors_serves_real_ones():
    """torch.compile and memory estimators run a model on fake tensors first: these must not be kept."""
    with FakeTensorMode():
        fake = geometry(LAYOUT, "cells", LAYOUT.length, CPU)
        assert type(fake.key_tokens) is not torch.Tensor
        fake.table("length", lambda: torch.zeros(len(fake.key_tokens)))
        assert fake.always_kept(64).shape == (4, 15)
    assert len(GEOMETRIES) == 0
    q, k, v = tensors()
    assert type(sparse_attention(q, k, v, SETTINGS, LAYOUT)) is torch.Tensor
    real = geometry(LAYOUT, "cells", LAYOUT.length, CPU)
    with FakeTensorMode():
        assert type(geometry(LAYOUT, "cells", LAYOUT.length, CPU).key_tokens) is not torch.Tensor
        assert real.table("seen in between", lambda: torch.zeros(3)) is not None
    assert type(real.table("seen in between", lambda: torch.zeros(3))) is torch.Tensor
    assert geometry(LAYOUT, "cells", LAYOUT.length, CPU) is real


def test_tables_belong_to_one_geometry():
    """A geometry with some queries of another one has tables of its own."""
    geo = geometry(LAYOUT, "cells", LAYOUT.length, CPU)
    geo.table("queries", lambda: geo.query_tokens.clone())
    part = dataclasses.replace(geo, query_tokens=geo.query_tokens[:7])
    assert len(part.table("queries", lambda: part.query_tokens.clone())) == 7
