"""Custom nodes of other people, their real classes, before and after ours.

NEIGHBOUR_NODES names a folder of checkouts (ComfyUI-KJNodes, ComfyUI-GGUF, ComfyUI-TeaCache,
ComfyUI-TiledDiffusion, ComfyUI-MultiGPU); what is not there is skipped, each by itself. The packages that
they need must be there: `gguf`, and what KJNodes and TeaCache list. docs/compatibility.md names these tests.
"""

import asyncio
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from makers import by_text

BLOCKS, STEPS = 3, 8
ORDERS = pytest.mark.parametrize("after", [False, True], ids=["before-ours", "after-ours"])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def headline(report):
    return sys.modules["fgattn_pack.fgattn.show.text"].headline(report)


@pytest.fixture(scope="module")
def untouched(classes):
    """Some packs change ComfyUI or the environment when they are imported: afterwards all is as it was."""
    packages = ("comfy", "comfy_extras", "nodes")  # all of them are imported by now
    owners = [module for name, module in sys.modules.items() if module and name.split(".")[0] in packages]
    owners += [kind for m in owners for kind in vars(m).values() if isinstance(kind, type)]
    before = [(owner, dict(vars(owner))) for owner in owners]
    environment = dict(os.environ)
    yield
    os.environ.clear()  # the server of the page tests would inherit it
    os.environ.update(environment)
    for owner, names in before:
        for name, value in names.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)


@pytest.fixture(scope="module")
def neighbour(untouched):
    """Node classes of a checkout, imported as ComfyUI does, with a server that nobody asks."""
    import server

    had, found = hasattr(server.PromptServer, "instance"), {}
    if not had:
        server.PromptServer(asyncio.new_event_loop())

    def load(name):
        folder = Path(os.environ.get("NEIGHBOUR_NODES", "")) / name
        if not (folder / "__init__.py").exists():
            pytest.skip(f"NEIGHBOUR_NODES has no {name}: beside its nodes nothing is tested")
        if name not in found:
            known = "neighbour_" + name.replace("-", "_")
            spec = importlib.util.spec_from_file_location(
                known, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            module = sys.modules[known] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found[name] = module.NODE_CLASS_MAPPINGS
        return found[name]

    yield load
    if not had:
        del server.PromptServer.instance


def of(node, *args, **kwargs):
    """A change to a model by a node of the first or of the third generation."""
    if hasattr(node, "execute"):
        return lambda model: node.execute(model, *args, **kwargs).args[0]
    return lambda model: getattr(node(), node.FUNCTION)(model, *args, **kwargs)[0]


@pytest.fixture
def beside(sample, patched, report):
    """Run a model with a neighbour alone, and with ours at threshold 0 before or after it: the same.

    Returns the neighbour's output and the report.
    """

    def check(model, change, after, tolerance=1e-4, sample=sample, **options):
        alone = sample(change(model), **options)
        ours = change(patched(model, threshold=0.0)) if after else patched(change(model), threshold=0.0)
        got = sample(ours, **options)
        assert alone.isfinite().all() and relative(got, alone) < tolerance
        last = report(ours)
        assert last.failure is None and not last.remarks
        return alone, last

    return check


@pytest.fixture
def sage(monkeypatch):
    """The package sageattention needs CUDA: here a module of its name that counts calls."""
    calls, module = [], ModuleType("sageattention")

    def sageattn(q, k, v, is_causal=False, attn_mask=None, tensor_layout="NHD"):
        assert tensor_layout == "NHD" and attn_mask is None and not is_causal
        calls.append((q.shape[1], k.shape[1]))
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).to(torch.float16)

    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    return calls


@ORDERS
def test_sage_attention(neighbour, wan, sample, patched, report, beside, sage, after):
    """KJNodes' Patch Sage Attention: it gets the calls that we leave dense, and no other."""
    change = of(neighbour("ComfyUI-KJNodes")["PathchSageAttentionKJ"], "auto")
    _, last = beside(wan, change, after, tolerance=1e-2)
    assert by_text(last) == {"sparse": STEPS * BLOCKS, "cross-attention": STEPS * BLOCKS}
    assert sage.count((288, 8)) == 2 * STEPS * BLOCKS and sage.count((288, 288)) == STEPS * BLOCKS
    sage.clear()
    model = change(patched(wan, warmup_steps=2)) if after else patched(change(wan), warmup_steps=2)
    sample(model)
    assert by_text(report(model))["sparse"] == 6 * BLOCKS
    assert sage.count((288, 288)) == 2 * BLOCKS and sage.count((288, 8)) == STEPS * BLOCKS


@ORDERS
def test_memory_efficient_sage_attention(neighbour, wan, beside, monkeypatch, after):
    """KJNodes' Mem Eff patch calls its kernel (here a stand-in) by itself: never reached, and it is said."""
    change = of(neighbour("ComfyUI-KJNodes")["WanVideoMemoryEfficientSageAttentionPatch"])
    code, calls = sys.modules["neighbour_ComfyUI_KJNodes.nodes.ltxv_nodes"], []

    def kernel(tensors, dtype):
        q, k, v = (x.transpose(1, 2) for x in tensors)
        calls.append((q.shape[2], k.shape[2]))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

    monkeypatch.setattr(code, "_cuda_archs", ["sm90"])
    monkeypatch.setattr(code, "_sageattn_int8_fp8_nhd", kernel)
    _, last = beside(wan, change, after)
    assert calls.count((288, 288)) == calls.count((288, 8)) == 2 * STEPS * BLOCKS and not by_text(last)
    assert headline(last) == "attention never reached FG-Attn"


@ORDERS
def test_normalized_attention_guidance(neighbour, wan, sample, beside, after):
    """KJNodes' WanVideoNAG replaces cross-attention, twice for the positive text."""
    text = torch.randn(1, 8, 4096, generator=torch.Generator().manual_seed(7))
    change = of(neighbour("ComfyUI-KJNodes")["WanVideoNAG"], [[text, {}]], 11.0, 0.25, 2.5)
    alone, last = beside(wan, change, after)
    assert relative(alone, sample(wan)) > 1e-2
    assert by_text(last) == {"sparse": STEPS * BLOCKS, "cross-attention": 3 * STEPS * BLOCKS}


@ORDERS
def test_enhance_a_video(neighbour, wan, sample, beside, after):
    """KJNodes' WanVideoEnhanceAVideo replaces self-attention, but calls ComfyUI's."""
    latent = {"samples": torch.zeros(1, 16, 3, 16, 24)}
    change = of(neighbour("ComfyUI-KJNodes")["WanVideoEnhanceAVideoKJ"], weight=4.0, latent=latent)
    alone, last = beside(wan, change, after)
    assert relative(alone, sample(wan)) > 1e-3
    assert by_text(last)["sparse"] == STEPS * BLOCKS


@ORDERS
def test_chunked_feed_forward(neighbour, wan, sample, beside, after):
    """KJNodes' WanChunkFeedForward: the same result, from parts of the tokens."""
    change = of(neighbour("ComfyUI-KJNodes")["WanChunkFeedForward"], 2, 256)  # the page allows 1024 and more
    lengths = []
    feed_forward = wan.model.diffusion_model.blocks[0].ffn[0]
    hook = feed_forward.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    alone, last = beside(wan, change, after)
    hook.remove()
    assert lengths == [144] * 2 * 2 * STEPS and relative(alone, sample(wan)) < 1e-4
    assert by_text(last)["sparse"] == STEPS * BLOCKS


@ORDERS
def test_teacache(neighbour, wan, sample, beside, monkeypatch, after):
    """TeaCache runs the blocks by itself, without the options that carry us: dense, and the node says so.

    That of July 2025 wants a function for LTXV that ComfyUI no longer has, so that it loads only here.
    """
    from comfy.ldm.lightricks import model as ltxv

    monkeypatch.setattr(ltxv, "precompute_freqs_cis", None, raising=False)
    node = neighbour("ComfyUI-TeaCache")["TeaCache"]
    change = of(node, "wan2.1_i2v_720p_14B", 5.0, 0.0, 1.0, "cpu")
    evaluations = []
    hook = wan.model.diffusion_model.blocks[0].register_forward_pre_hook(lambda *_: evaluations.append(1))
    alone, last = beside(wan, change, after)
    hook.remove()
    assert 2 <= len(evaluations) < 2 * STEPS and relative(alone, sample(wan)) > 1e-3
    assert not by_text(last)
    assert headline(last) == "attention never reached FG-Attn"


@pytest.fixture
def flux(pack):
    """A ModelPatcher of a tiny Flux: Tiled Diffusion takes latents of images only."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    settings = runpy.run_path(str(Path(__file__).with_name("test_models.py")))["FLUX"]
    config = comfy.supported_models.Flux({"image_model": "flux", **settings})
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = comfy.model_base.Flux(config, device="cpu")
    for tensor in model.parameters():
        spread = 1.0 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
        tensor.data = torch.randn(tensor.shape) * spread
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@ORDERS
@pytest.mark.parametrize("method", ["MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion"])
def test_tiled_diffusion(neighbour, flux, beside, method, after):
    """Tiled Diffusion evaluates tiles of an image: sparse in each, on the tile's grid."""
    import comfy.sample

    def sample(model):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 16, 16, 24, generator=generator)
        text = [
            [
                torch.randn(1, 7, 48, generator=generator),
                {"pooled_output": torch.randn(1, 32, generator=generator)},
            ]
        ]
        return comfy.sample.sample(
            model,
            noise,
            4,
            1.0,
            "euler",
            "simple",
            text,
            text,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )

    node = neighbour("ComfyUI-TiledDiffusion")["TiledDiffusion"]
    change = of(node, method, 128, 128, 32, 1)
    alone, last = beside(flux, change, after, sample=sample)
    assert relative(alone, sample(flux)) > 1e-3
    assert by_text(last) == {"sparse": 4 * 4 * 2}  # steps, blocks, tiles


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder of diffusion models that ComfyUI knows."""
    import folder_paths

    for key in ("diffusion_models", "unet_gguf"):
        paths, kinds = folder_paths.folder_names_and_paths.get(key, ([], set()))
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([*paths, str(tmp_path)], kinds))
    return tmp_path


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf(neighbour, models, wan_weights, wan, sample, patched, report, kind):
    """ComfyUI-GGUF's loader: layers expand their weights when they are called, its patcher survives ours."""
    nodes = neighbour("ComfyUI-GGUF")
    import gguf

    writer, kinds = gguf.GGUFWriter(models / "tiny.gguf", "wan"), gguf.GGMLQuantizationType
    for name, weight in wan_weights.items():
        stored = kinds[kind] if weight.ndim == 2 and "blocks" in name else kinds.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), stored), raw_dtype=stored)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    (model,) = nodes["UnetLoaderGGUF"]().load_unet("tiny.gguf")
    weight = model.model.diffusion_model.blocks[0].self_attn.q.weight
    assert weight.tensor_type == kinds[kind] and weight.dtype == torch.uint8
    dense, ours = sample(model), patched(model, threshold=0.0)
    assert type(ours) is type(model) is not type(wan)
    assert 1e-4 < relative(dense, sample(wan)) < 0.5
    assert relative(sample(ours), dense) < 1e-4
    assert report(ours).failure is None and by_text(report(ours))["sparse"] == STEPS * BLOCKS


@pytest.mark.parametrize("name", ["UNETLoaderMultiGPU", "UNETLoaderDisTorch2MultiGPU"])
def test_multi_gpu(neighbour, models, wan_weights, wan, sample, patched, report, name):
    """MultiGPU's loaders on the one device that is here: they choose it, and ours runs on what they load."""
    from safetensors.torch import save_file

    save_file(wan_weights, models / "tiny.safetensors")
    node = neighbour("ComfyUI-MultiGPU")[name]
    several = "DisTorch2" in name
    devices = {"compute_device": "cpu", "virtual_vram_gb": 1.0, "donor_device": "cpu"}
    (model,) = node().override(
        unet_name="tiny.safetensors", weight_dtype="default", **(devices if several else {"device": "cpu"})
    )
    dense, ours = sample(model), patched(model, threshold=0.0)
    assert relative(dense, sample(wan)) < 1e-4 and relative(sample(ours), dense) < 1e-4
    assert hasattr(ours.model, "_distorch_v2_meta") == several
    assert report(ours).failure is None and by_text(report(ours))["sparse"] == STEPS * BLOCKS
