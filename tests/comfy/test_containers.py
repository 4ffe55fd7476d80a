"""q, k and v in containers: newer ComfyUI hands them over so that whoever computes the call can free them."""

import sys
import weakref

import pytest
import torch
from makers import by_text


@pytest.fixture
def attention(pack):
    from comfy.ldm.modules import attention

    if not hasattr(attention, "AttentionTensorContainer"):
        pytest.skip("this ComfyUI has no containers; 0.33 has")
    return attention


@pytest.fixture
def called(attention, wan, patched):
    """Calls a wrapped backend of ComfyUI with containers, ours on top: the report, and the error."""

    def call(backend, sigmas=(1.0, 0.0), mask=None, by_head=False, **inputs):
        model = patched(wan, **inputs)
        engine = sys.modules["fgattn_pack.nodes.patch"].patch_of(model).engine
        engine.begin_run(sigmas, True, torch.device("cpu"))
        tensors = list(torch.randn(3, 1, 2, 288, 128, generator=torch.Generator().manual_seed(0)).unbind())
        if not by_head:
            tensors = [x.transpose(1, 2).flatten(2) for x in tensors]
        layouts = {"skip_reshape": by_head, "skip_output_reshape": by_head}
        expected = attention.attention_pytorch(*tensors, 2, mask, **layouts)
        refs = [weakref.ref(x) for x in tensors]
        containers = [attention.AttentionTensorContainer(x) for x in tensors]
        del tensors
        options = {**model.model_options["transformer_options"], "grid_sizes": (3, 8, 12), "block_index": 0}
        out = backend(*containers, 2, mask, **layouts, transformer_options=options)
        assert all(c.tensor is None for c in containers) and not any(ref() is not None for ref in refs)
        return engine.end_run(), (out - expected).norm() / expected.norm()

    return call


@pytest.fixture
def early(attention):
    """A backend that frees q, k and v before it computes; it notes how many somebody else still holds."""

    def from_containers(q, k, v, heads, mask=None, **options):
        held = [weakref.ref(x.peek()) for x in (q, k, v)]
        q, k, v = (x.take().clone() for x in (q, k, v))
        backend.held.append(sum(ref() is not None for ref in held))
        return attention.attention_pytorch(q, k, v, heads, mask, **options)

    @attention.wrap_attn
    def backend(*args, **kwargs):
        raise AssertionError("asked for tensors")

    backend.container_function, backend.held = from_containers, []
    return backend


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("warmup_steps", [0, 1], ids=["sparse", "dense"])
def test_a_backend_without_container_function(called, attention, warmup_steps, by_head):
    """ComfyUI's own backends for tensors: nobody holds q, k and v afterwards."""
    report, error = called(
        attention.attention_sub_quad,
        sigmas=(1.0, 0.7, 0.5, 0.3, 0.0),
        by_head=by_head,
        threshold=0.0,
        warmup_steps=warmup_steps,
    )
    assert by_text(report) == {("warm-up step" if warmup_steps else "sparse"): 1}
    assert error < 1e-5


@pytest.mark.parametrize(
    ("reason", "inputs"),
    [
        ("warm-up step", {"sigmas": (1.0, 0.7, 0.5, 0.3, 0.0), "warmup_steps": 1}),
        ("listed in dense_blocks", {"dense_blocks": "0"}),
        ("fewer than 289 tokens", {"min_tokens": 289}),
        ("attention mask", {"mask": torch.ones(288, 288, dtype=torch.bool)}),
    ],
)
def test_a_dense_call_is_freed_as_early_as_without_us(called, early, reason, inputs):
    """Nothing of ours holds a tensor while a dense call is computed."""
    report, error = called(early, **inputs)
    assert by_text(report) == {reason: 1}
    assert early.held == [0] and error < 1e-5


def test_after_a_failure_too(called, early, monkeypatch):
    """Nor does the failed attempt; here, the log's own records would."""
    monkeypatch.setattr(sys.modules["fgattn_pack.fgattn.runs.engine"].log, "exception", lambda *_: None)
    monkeypatch.setattr(sys.modules["fgattn_pack.fgattn.backends.execute"], "attend", lambda *_: 1 / 0)
    report, error = called(early)
    assert by_text(report) == {"error": 1}
    assert early.held == [0] and error < 1e-5


@pytest.mark.parametrize("warmup_steps", [0, 1], ids=["sparse", "dense"])
def test_an_attention_layer_of_minimax_h3(attention, wan, patched, warmup_steps):
    """The first model that hands over containers, by its own layer: strided views of one buffer, by head."""
    import comfy.ops
    from comfy.ldm.minimax.model import Attention

    layer = Attention(64, heads=2, head_dim=128, eps=1e-6, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
    model = patched(wan, threshold=0.0, warmup_steps=warmup_steps)
    engine = sys.modules["fgattn_pack.nodes.patch"].patch_of(model).engine
    engine.begin_run((1.0, 0.7, 0.5, 0.3, 0.0), True, torch.device("cpu"))
    options = {**model.model_options["transformer_options"], "grid_sizes": (3, 8, 12), "block_index": 0}
    x = torch.randn(288 + 20, 64, generator=generator)  # 20 tokens of text
    with torch.no_grad():
        torch.testing.assert_close(layer(x, None, options), layer(x), rtol=1e-4, atol=1e-5)
    assert by_text(engine.end_run()) == {("warm-up step" if warmup_steps else "sparse"): 1}
