"""What came to ComfyUI after 0.33, by its own files: preferred attention, containers, Model Sparse Attention.

The folder NEWER_COMFYUI_FILES has, with their paths in ComfyUI's repository, comfy/ldm/modules/attention.py,
comfy/ldm/wan/model.py, comfy/model_prefetch.py and comfy_extras/nodes_sparse_attention.py of about 0.38. They
run on top of a checkout of 0.33 (COMFYUI_PATH), with a comfy-kitchen and a comfy-aimdo that fit them.
"""

import functools
import inspect
import json
import sys
import weakref

import pytest
import torch
from makers import by_text

pytestmark = pytest.mark.newer
SLOT = "optimized_attention_override"
BLOCKS, STEPS = 3, 8
PREFERRED = ("blocks.0.cross_attn", "blocks.1.self_attn")


class Preferred:
    """A wrapped backend of ComfyUI's kind, that layers may prefer; its results are not the global one's."""

    def __init__(self, attention):
        self.calls = 0
        self.alive = []  # for each call with containers: inputs that somebody still holds while it computes

        def compute(q, k, v, heads, mask=None, **options):
            assert options["_inside_attn_wrapper"]
            self.calls += 1
            return attention.attention_pytorch(q, k, 1.5 * v, heads, mask, **options)

        def from_containers(q, k, v, heads, mask=None, **options):
            held = [weakref.ref(x.peek()) for x in (q, k, v)]
            q, k, v = (x.take().clone() for x in (q, k, v))
            self.alive.append(sum(ref() is not None for ref in held))
            return compute(q, k, v, heads, mask, **options)

        self.function = attention.wrap_attn(compute)
        self.function.container_function = from_containers


@pytest.fixture
def preferred(pack, monkeypatch):
    """ComfyUI's INT8 attention, replaced by a backend that runs on a CPU."""
    from comfy.ldm.modules import attention

    backend = Preferred(attention)
    monkeypatch.setattr(attention, "attention_comfy_kitchen_int8", backend.function)
    monkeypatch.setattr(attention, "COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE", True)
    monkeypatch.setattr(attention.comfy_kitchen, "int8_attention_is_available", lambda device: True)
    return backend


@pytest.fixture
def choosy(wan_weights, preferred):
    """A Wan whose checkpoint says that two of its layers prefer that backend."""
    import comfy.sd

    config = torch.tensor(list(json.dumps({"attention": "comfy_kitchen_int8"}).encode()), dtype=torch.uint8)
    weights = {f"{name}.comfy_attention.config": config for name in PREFERRED}
    model = comfy.sd.load_diffusion_model_state_dict(dict(wan_weights) | weights)
    layers = dict(model.model.diffusion_model.named_modules())
    assert all(layers[name].comfy_attention.function is preferred.function for name in PREFERRED)
    return model


def test_dense_calls_go_to_what_the_layer_prefers(choosy, sample, patched, report, preferred):
    """Warm-up, short and text calls are those that the model would have made without us, bit for bit."""
    without = sample(choosy)
    assert preferred.calls == 2 * STEPS
    preferred.calls = 0
    assert torch.equal(sample(patched(choosy, min_tokens=10**6)), without)
    assert preferred.calls == 2 * STEPS
    preferred.calls = 0
    model = patched(choosy, warmup_steps=2)
    sample(model)
    assert by_text(report(model))["sparse"] == 6 * BLOCKS
    assert preferred.calls == STEPS + 2  # text attention in every step, self-attention in warm-up steps


def test_dense_calls_hold_no_tensors(choosy, sample, patched, preferred):
    """A backend that frees q, k and v early can do so: nothing of ours holds them while it computes."""
    sample(choosy)
    assert preferred.alive == [0] * 2 * STEPS
    preferred.alive.clear()
    sample(patched(choosy, warmup_steps=2))
    assert preferred.alive == [0] * (STEPS + 2)


@pytest.mark.parametrize("chains", [False, True], ids=["plain", "takes containers"])
def test_an_override_below_ours_is_asked_as_without_us(choosy, sample, patched, preferred, chains):
    """Another node's override replaces what layers prefer; it still does, with ours on top."""
    from comfy.ldm.modules import attention

    def other(func, *args, **kwargs):
        return 0.5 * func(*args, **kwargs)

    if chains:
        other.container_function = lambda *args, **kwargs: (
            0.5 * attention.optimized_attention(*args, **kwargs)
        )
    model = choosy.clone()
    model.model_options["transformer_options"] = {SLOT: other}
    without = sample(model)
    assert preferred.calls == 0
    assert torch.equal(sample(patched(model, min_tokens=10**6)), without)
    assert preferred.calls == 0


def test_an_override_above_ours(choosy, sample, patched, preferred):
    """One that hands its calls on reaches the layer's preference; one that chose a backend is obeyed."""
    from comfy.ldm.modules import attention

    for chosen, expected in ((None, 2 * STEPS), (attention.attention_sub_quad.__wrapped__, 0)):
        model, preferred.calls = patched(choosy, min_tokens=10**6), 0
        ours = model.model_options["transformer_options"][SLOT]

        def above(func, *args, ours=ours, chosen=chosen, **kwargs):
            kwargs.pop("_inside_attn_wrapper")
            return ours(chosen or func, *args, **kwargs)

        options = {"transformer_options": {SLOT: above}, "preferred_attention": preferred}
        q, k, v = torch.randn(3, 1, 40, 256).unbind()
        attention.attention_pytorch(q, k, v, 2, **options)
        assert preferred.calls == (1 if expected else 0)


def test_compiled_blocks_keep_preferences(choosy, sample, patched, preferred):
    """TorchCompileModel: the calls that we leave dense, and nothing else changes."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    (model,) = TorchCompileModel.execute(patched(choosy, min_tokens=10**6), backend="eager").args
    without = sample(choosy)
    torch._dynamo.reset()
    preferred.calls = 0
    torch.testing.assert_close(sample(model), without, rtol=1e-4, atol=1e-4)
    assert preferred.calls == 2 * STEPS


def test_a_pack_that_replaced_core_functions(choosy, sample, patched, preferred, monkeypatch):
    """Some put objects of their own in ComfyUI's module; nothing of ours depends on what these are."""
    from comfy.ldm.modules import attention

    for name in ("optimized_attention", "attention_pytorch", "attention_sub_quad"):
        monkeypatch.setattr(attention, name, functools.partial(getattr(attention, name)))
    without, preferred.calls = sample(choosy), 0
    model = patched(choosy, min_tokens=10**6)
    assert torch.equal(sample(model), without)
    assert preferred.calls == 2 * STEPS
    other = choosy.clone()
    other.model_options["transformer_options"] = {SLOT: lambda func, *args, **call: func(*args, **call)}
    without = sample(other)
    monkeypatch.setattr(sys.modules["fgattn_pack.nodes.attention_call"], "_asking", dict)
    assert torch.equal(sample(patched(other, min_tokens=10**6)), without)


def test_in_doubt_the_global_backend_computes(wan, choosy, sample, patched, preferred, monkeypatch):
    """A release whose wrapper has other names: the preference is lost, the render is not."""
    monkeypatch.setattr(sys.modules["fgattn_pack.nodes.attention_call"], "_asking", dict)
    assert torch.equal(sample(patched(choosy, min_tokens=10**6)), sample(wan))
    assert preferred.calls == 0


def test_a_failure_in_containers_goes_dense(choosy, sample, patched, report, preferred, monkeypatch):
    """Our path breaks after it has looked at the tensors: they are still there for the layer's attention."""
    execute = sys.modules["fgattn_pack.fgattn.backends.execute"]

    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(execute, "plan_of", broken)
    model = patched(choosy)
    assert torch.equal(sample(model), sample(choosy))
    assert report(model).failure == "RuntimeError: out of luck"


class Sparse:
    """ComfyUI's Model Sparse Attention, whose kernel alone is replaced: by its dense attention, on a CPU."""

    def __init__(self, monkeypatch):
        import comfy_extras.nodes_sparse_attention as code

        self.node, self.calls, self.installed = code.BlockSparseAttention, 0, set()

        def kernel(q, k, v, scale=None, **_):
            self.calls += 1
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

        install = code.install_override

        def noted(patch, options):
            self.installed = patch.installed
            install(patch, options)

        monkeypatch.setattr(code, "install_override", noted)
        monkeypatch.setattr(code, "_ineligible", lambda q, k, *_: None if q.shape == k.shape else "cross")
        monkeypatch.setattr(code.ck, "sol_attn", kernel)

    def on(self, model, **inputs):
        chosen = {"selection": "sol-attn", "tau": 1.3}
        return self.node.execute(model, chosen, 0.0, 1.0, min_tokens=0, **inputs).args[0]


def depth(one):
    """Overrides from this one down."""
    found = 0
    while one is not None:
        found += 1
        one = one.previous if hasattr(one, "previous") else inspect.getclosurevars(one).nonlocals["previous"]
    return found


@pytest.mark.parametrize("first", [False, True], ids=["before ours", "after ours"])
def test_beside_model_sparse_attention(wan, sample, patched, report, monkeypatch, first):
    """Ours runs where it can, theirs gets what we leave dense; the chain stays short; the report says so."""
    core, depths = Sparse(monkeypatch), []
    model = core.on(patched(wan, warmup_steps=2)) if first else patched(core.on(wan), warmup_steps=2)

    def measure(executor, *args, **kwargs):
        depths.append(depth(args[5][SLOT]))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "zz_depth", measure)
    sample(model)
    last = report(model)
    assert by_text(last) == {"warm-up step": 2 * BLOCKS, "sparse": 6 * BLOCKS, "cross-attention": 8 * BLOCKS}
    assert core.calls == 2 * BLOCKS
    assert any("Model Sparse Attention" in remark for remark in last.remarks)
    assert len(depths) == STEPS and max(depths) <= 4 and 1 <= len(core.installed) <= 2


def test_what_model_sparse_attention_declines(choosy, sample, patched, preferred, monkeypatch):
    """Its own dense blocks end where they end without us: it hands them to the global backend."""
    core = Sparse(monkeypatch)
    without = sample(core.on(choosy, dense_blocks="0-2"))
    assert torch.equal(sample(patched(core.on(choosy, dense_blocks="0-2"), min_tokens=10**6)), without)
    assert core.calls == preferred.calls == 0
