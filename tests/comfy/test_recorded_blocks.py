"""Newer ComfyUI records what blocks do: their allocations (malloc graph), or all of it (CUDA graph).

A recorded block must free by its end what it allocated; what stays is allocated while recording is paused.
"""

import contextlib
import sys
import threading

import pytest
import torch
from makers import by_text
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCKS = 3


def tensors_in(tree):
    return (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


class Recording(TorchDispatchMode):
    """A malloc graph as ComfyUI drives it; it notes what is allocated while it is not paused."""

    _comfy_active = True

    def __init__(self):
        super().__init__()
        self.paused, self.pauses, self.made = False, 0, []

    def pause(self, sync=False):
        assert not self.paused, "a pause in a pause: the inner one's end would end the outer one"
        self.paused, self.pauses = True, self.pauses + 1

    def resume(self, sync=False):
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tensors_in((args, kwargs))}
        for x in tensors_in(out):
            if not self.paused and x.untyped_storage()._cdata not in given:
                self.made.append((str(func), StorageWeakRef(x.untyped_storage())))
        return out

    def block(self, compute):
        """Run a block; which of its allocations are left over, beside its output."""
        self.made.clear()
        with self:
            out = compute()
        kept = {x.untyped_storage()._cdata for x in tensors_in(out)}
        return out, [name for name, ref in self.made if not ref.expired() and ref.cdata not in kept]


@pytest.fixture
def recorded(pack, monkeypatch):
    """A recording that an engine pauses: by ComfyUI's own function, where the release has it."""

    def of(engine):
        recording = Recording()
        try:
            from comfy.model_prefetch import MALLOC_GRAPHS
        except ImportError:

            @contextlib.contextmanager
            def scope():
                recording.pause()
                yield
                recording.resume()

            engine.scope = scope
        else:
            monkeypatch.setitem(MALLOC_GRAPHS, threading.get_ident(), recording)
        return recording

    return of


def engine_of(model):
    return sys.modules["fgattn_pack.nodes.patch"].patch_of(model).engine


@pytest.mark.parametrize(
    "inputs", [{}, {"reuse_steps": 3}, {"tile_keys": "4", "method": "top_k"}], ids=["plain", "kept", "top_k"]
)
def test_a_block_leaves_nothing_behind(wan, sample, patched, report, recorded, inputs):
    """Plans, statistics, maps, index tensors and estimates stay, and are none of the block's."""
    model = patched(wan, warmup_steps=2, **inputs)
    recording, left = recorded(engine_of(model)), []

    def block(args, extra):
        out, leftovers = recording.block(lambda: extra["original_block"](args))
        left.extend(leftovers)
        return out

    for i in range(BLOCKS):
        model.set_model_patch_replace(block, "dit", "double_block", i)
    sample(model)
    last = report(model)
    assert by_text(last)["sparse"] == 6 * BLOCKS and last.estimated_error is not None
    assert recording.pauses and not recording.paused
    assert not left


def test_without_the_pause_things_are_left(wan, sample, patched, recorded):
    """A control: the test above sees what it looks for."""
    model = patched(wan, reuse_steps=3)
    engine, left = engine_of(model), []
    recording = recorded(engine)
    engine.scope = contextlib.nullcontext

    def block(args, extra):
        out, leftovers = recording.block(lambda: extra["original_block"](args))
        left.extend(leftovers)
        return out

    model.set_model_patch_replace(block, "dit", "double_block", 1)
    sample(model, steps=4)
    assert left


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("padding", [0, 40], ids=["nothing masked", "padded keys"])
def test_a_mask_leaves_nothing_behind(wan, patched, recorded, padding, kind):
    """What a mask means is kept for the whole evaluation; a mask that the block made is not."""
    from comfy.ldm.modules.attention import attention_pytorch

    model = patched(wan)
    engine = engine_of(model)
    recording = recorded(engine)
    engine.begin_run([1.0, 0.0], False, torch.device("cpu"))
    q, k, v = torch.randn(3, 2, 288, 256).unbind()
    mask = torch.ones(2, 288, dtype=torch.bool)
    mask[1, :padding] = False
    if kind == torch.float32:
        mask = torch.zeros(2, 288).masked_fill(~mask, -torch.inf)
    options = {**model.model_options["transformer_options"], "grid_sizes": (3, 8, 12), "block_index": 0}
    _, left = recording.block(
        lambda: attention_pytorch(q, k, v, heads=2, mask=mask.clone(), transformer_options=options)
    )
    assert by_text(engine.end_run()) == {"sparse": 1}
    assert recording.pauses and not left


def test_nothing_is_read_while_a_cuda_graph_is_recorded(wan, sample, patched, report, monkeypatch):
    """Dense, with the reason: a graph repeats the call as it was, in steps that may want another one."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = patched(wan)
    assert torch.equal(sample(model, steps=4), sample(wan, steps=4))
    calls = by_text(report(model))
    assert calls == {"recorded as a CUDA graph": 4 * BLOCKS, "cross-attention": 4 * BLOCKS}


def test_no_mask_is_read_while_a_cuda_graph_is_recorded(wan, patched, monkeypatch):
    """Reading it would wait for the device."""
    from comfy.ldm.modules.attention import attention_pytorch

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(sys.modules["fgattn_pack.nodes.override"], "valid_keys", lambda *_: 1 / 0)
    model = patched(wan)
    engine_of(model).begin_run([1.0, 0.0], False, torch.device("cpu"))
    q, k, v = torch.randn(3, 2, 288, 256).unbind()
    mask = torch.ones(2, 1, 1, 288, dtype=torch.bool)
    options = model.model_options["transformer_options"]
    attention_pytorch(q, k, v, heads=2, mask=mask, transformer_options=options)
    assert by_text(engine_of(model).end_run()) == {"recorded as a CUDA graph": 1}
