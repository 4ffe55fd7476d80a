"""The ways people run a model: conditioning, schedules, weights and the nodes beside ours.

Each way is run dense and with threshold 0 (through our own path): the results must be the same; and the
books must show sparse calls where the way leaves any. docs/compatibility.md names these tests.
"""

import asyncio
import gc
import sys

import pytest
import torch
from makers import by_text

BLOCKS = 3


@pytest.fixture(scope="module")
def nodes(pack):
    """ComfyUI's own nodes by id."""
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture
def same(sample, patched, report):
    """Run a model dense and with threshold 0; both must agree. Returns the calls by outcome."""

    def check(model, change=lambda model: model, tolerance=1e-4, first=False, **options):
        dense = sample(change(model), **options)
        ours = patched(change(model), threshold=0.0) if not first else change(patched(model, threshold=0.0))
        got = sample(ours, **options)
        assert dense.isfinite().all()
        assert ((got - dense).norm() / dense.norm()).item() < tolerance
        return by_text(report(ours))

    return check


def of(node, *args, **kwargs):
    """A change to a model by one of ComfyUI's nodes."""
    return lambda model: node.execute(model, *args, **kwargs).args[0]


@pytest.mark.parametrize("first", [False, True], ids=["before-ours", "after-ours"])
@pytest.mark.parametrize(
    "name", ["nag", "skip-layer guidance", "easycache", "lazycache", "context windows", "zero-star cfg"]
)
def test_beside_core_nodes(nodes, wan, same, name, first):
    """Guidance that patches attention, caches that skip evaluations, windows over time."""
    change = {
        "nag": lambda: of(nodes["NAGuidance"], 3.0, 0.5, 1.5),
        "skip-layer guidance": lambda: of(
            nodes["SkipLayerGuidanceDiT"], 3.0, 0.0, 1.0, double_layers="1", single_layers=""
        ),
        "easycache": lambda: of(nodes["EasyCache"], 0.5, 0.15, 0.95, False),
        "lazycache": lambda: of(nodes["LazyCache"], 0.5, 0.15, 0.95, False),
        "context windows": lambda: of(
            nodes["ContextWindowsManual"], 2, 1, "standard_static", 1, False, "pyramid", 2, False
        ),
        "zero-star cfg": lambda: of(nodes["CFGZeroStar"]),
    }[name]()
    calls = same(wan, change, first=first)
    assert calls["sparse"] > 0 and set(calls) == {"sparse", "cross-attention"}
    if name == "context windows":
        assert calls["sparse"] == 8 * BLOCKS * 2  # two windows of two frames


@pytest.mark.parametrize("first", [False, True], ids=["before-ours", "after-ours"])
def test_model_attention_backend(nodes, wan, sample, patched, report, monkeypatch, first):
    """It writes the slot once, whatever was there; ours goes on top, its backend computes the dense calls."""
    from comfy.ldm.modules import attention

    if "ModelAttentionBackend" not in nodes:
        pytest.skip("this ComfyUI is older than Model Attention Backend")
    calls, backend = [], attention.REGISTERED_ATTENTION_FUNCTIONS["pytorch"]

    def counted(*args, **kwargs):
        calls.append(1)
        return backend(*args, **kwargs)

    monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "pytorch", counted)
    node = nodes["ModelAttentionBackend"]()
    model = patched(wan, warmup_steps=2) if first else wan
    (model,) = node.patch(model, "pytorch attention")
    if not first:
        model = patched(model, warmup_steps=2)
    sample(model)
    assert by_text(report(model))["sparse"] == 6 * BLOCKS and len(calls) == 10 * BLOCKS


def test_split_conditioning(wan, pack):
    """Texts of different length cannot share a batch: cond and uncond come as two calls."""
    import comfy.sample

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 3, 16, 24, generator=generator)
    positive, negative = ([[torch.randn(1, n, 4096, generator=generator), {}]] for n in (8, 11))

    def run(model):
        return comfy.sample.sample(
            model,
            noise,
            4,
            2.0,
            "euler",
            "simple",
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )

    ours = sys.modules["fgattn_pack.nodes.patch"]
    settings = sys.modules["fgattn_pack.fgattn.settings"]
    dense = run(wan)
    model = ours.Patch(
        settings.Settings(threshold=0.0, tile_queries=16, tile_keys=16), settings.Policy(warmup_steps=0)
    ).install(wan)
    got = run(model)
    assert ((got - dense).norm() / dense.norm()).item() < 1e-4
    assert by_text(ours.patch_of(model).engine.last_report)["sparse"] == 2 * 4 * BLOCKS


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 4},
        {"steps": 8},
        {"steps": 4, "sampler": "lcm", "cfg": 1.0},
        {"sampler": "euler_ancestral"},
        {"scheduler": "beta"},
        {"denoise": 0.4},
        {"start_step": 2, "last_step": 6},
    ],
    ids=str,
)
def test_schedules(wan, same, options):
    """Few-step and split schedules, cfg 1, image-to-image."""
    assert same(wan, **options)["sparse"] > 0


@pytest.mark.parametrize("dtype", ["fp8", "fp16", "bf16"])
def test_weights(wan_weights, same, dtype):
    """Weights in other types compute in the same types with and without the node."""
    import comfy.sd

    types = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16, "bf16": torch.bfloat16}
    model = comfy.sd.load_diffusion_model_state_dict(dict(wan_weights), model_options={"dtype": types[dtype]})
    assert same(model, steps=2, tolerance=2e-2)["sparse"] == 2 * BLOCKS


@pytest.mark.parametrize("first", [False, True], ids=["before-ours", "after-ours"])
def test_lora(wan, wan_weights, same, first):
    """A LoRA loader on either side of the node."""
    import comfy.sd

    weight = wan_weights["blocks.0.self_attn.q.weight"]
    lora = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.randn(4, weight.shape[1]) / 16,
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.randn(weight.shape[0], 4) / 16,
    }

    def change(model):
        return comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)[0]

    assert same(wan, change, first=first)["sparse"] == 8 * BLOCKS


@pytest.mark.parametrize("first", [False, True], ids=["before-ours", "after-ours"])
def test_compiled_model(wan, same, first):
    """A compiled model calls us outside the graph; eager here, the graph break is the same with inductor."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def change(model):
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager")
        return model

    assert same(wan, change, first=first, steps=2)["sparse"] == 2 * BLOCKS


@pytest.mark.parametrize(
    "keys", [["diffusion_model"], ["diffusion_model.blocks.0"]], ids=["whole", "a block"]
)
def test_a_compiled_model_does_not_depend_on_the_order_of_nodes(wan, sample, patched, report, keys):
    """Where the grid shows: compiled before or after our node, the same bits as not compiled."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def change(model):
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager", keys=keys)
        return model

    plain, before, after = patched(wan), patched(change(wan)), change(patched(wan))
    wanted = sample(plain, steps=2)
    assert not torch.equal(sample(patched(wan, order="raster"), steps=2), wanted)
    for model in (before, after):
        assert torch.equal(sample(model, steps=2), wanted)
        assert by_text(report(model)) == by_text(report(plain)) and not report(model).remarks
        assert report(model).density == report(plain).density


def test_many_short_runs_leave_nothing_behind(wan, sample, patched):
    """500 runs in turn of two patched clones: no growth of objects, wrappers or the override chain."""
    models = [patched(wan, threshold=t) for t in (0.5, 2.0)]

    def state():
        gc.collect()
        slots = [m.model_options["transformer_options"]["optimized_attention_override"] for m in models]
        chains = [slot.previous for slot in slots]
        wrappers = [sum(len(w) for kinds in m.wrappers.values() for w in kinds.values()) for m in models]
        return chains, wrappers, sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor))

    for model in models:
        sample(model, steps=1, cfg=1.0)
    before = state()
    for _ in range(250):
        for model in models:
            sample(model, steps=1, cfg=1.0)
    after = state()
    assert after[:2] == before[:2] and after[2] <= before[2] + 2
