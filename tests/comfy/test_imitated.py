"""What is newer than ComfyUI 0.33.0, imitated by what its authors' code documents.

Model Sparse Attention (`test_newer.py` has the real one), the layout that MiniMax-H3 reports. Imitations show
that our side holds; that theirs behaves so was read, not run.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from makers import by_text

SLOT = "optimized_attention_override"
BLOCKS, STEPS = 3, 8


class CoreSparse:
    """The hook of Model Sparse Attention.

    Its override is put on top when the node runs and again before every evaluation, unless it is there
    already; what it declines goes to the override that it found.
    """

    def __init__(self, monkeypatch):
        import comfy.samplers

        self.installed, self.calls, self.depths = [], 0, []
        calculate = comfy.samplers._calc_cond_batch

        def prepared(model, conds, x, timestep, options):  # newer releases hand the options to the callbacks
            self.install(options["transformer_options"])
            return calculate(model, conds, x, timestep, options)

        monkeypatch.setattr(comfy.samplers, "_calc_cond_batch", prepared)

    def install(self, options):
        previous = options.get(SLOT)
        if previous in self.installed:
            return

        def override(func, *args, **kwargs):
            self.calls += 1
            return previous(func, *args, **kwargs) if previous else func(*args, **kwargs)

        override.previous = previous
        self.installed.append(override)
        options[SLOT] = override

    def on(self, model):
        from comfy.patcher_extension import CallbacksMP

        model = model.clone()
        model.model_options["transformer_options"] = dict(model.model_options["transformer_options"])
        self.install(model.model_options["transformer_options"])
        model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "block_sparse_attention", lambda *_: None)

        def measure(executor, *args, **kwargs):
            depth, one = 0, args[5].get(SLOT)
            while one is not None:
                depth, one = depth + 1, one.previous
            self.depths.append(depth)
            return executor(*args, **kwargs)

        model.add_wrapper_with_key("apply_model", "zz_depth", measure)
        return model


@pytest.mark.parametrize("first", [False, True], ids=["before-ours", "after-ours"])
def test_beside_model_sparse_attention(wan, sample, patched, report, monkeypatch, first):
    """Ours runs where it can, theirs gets what we leave dense; the chain stays short; the report says so."""
    core = CoreSparse(monkeypatch)
    model = core.on(patched(wan, warmup_steps=2)) if first else patched(core.on(wan), warmup_steps=2)
    out = sample(model)
    last = report(model)
    assert by_text(last) == {"warm-up step": 2 * BLOCKS, "sparse": 6 * BLOCKS, "cross-attention": 8 * BLOCKS}
    assert core.calls == (2 + 8) * BLOCKS * (1 if first else 2)  # before ours it is in the chain twice
    assert any("Model Sparse Attention" in remark for remark in last.remarks)
    assert len(core.depths) == STEPS and max(core.depths) <= 4 and len(core.installed) <= 2
    assert torch.equal(out, sample(patched(wan, warmup_steps=2)))


def named(name, base=object, **attributes):
    return type(name, (base,), attributes)()


@pytest.fixture
def adapters(pack):
    return sys.modules["fgattn_pack.nodes.models"]


def test_minimax_h3(adapters):
    """[text, conditions, references, audio][video]: all in front of the video, which is last.

    The class itself is in 0.33.0, see test_models.py; `minimax_h3_layout` came later.
    """
    model = named("MiniMaxH3Model", patch_size=(1, 2, 2))
    video = adapters.video_of(model, (1, 24, 7, 24, 41))  # padded to 42
    assert video.grid == (7, 12, 21)
    length = 7 * 12 * 21
    layout = SimpleNamespace(seq_len=length + 200, segments=[(0, 200, "text"), (200, 200 + length, "video")])
    for options in ({}, {"minimax_h3_layout": layout}):
        found = adapters.call_layout(options, video, length + 200, length + 200)
        assert (found.grid, found.front, found.back) == ((7, 12, 21), 200, 0)
    assert adapters.call_layout({}, video, 200, 200).text == "self-attention of other tokens"
    text = {"minimax_h3_layout": SimpleNamespace(seq_len=2 * length)}  # the refiner of a long one
    other = adapters.call_layout(text, video, length + 50, length + 50)
    assert other.text == "self-attention of other tokens"
