"""Real ComfyUI classes on the CPU; needs a checkout, named by COMFYUI_PATH.

ComfyUI chooses its device when it is imported: COMFYUI_DEVICE=cuda runs the tests marked `gpu` and no other.
NEWER_COMFYUI_FILES names a folder with single files of a newer ComfyUI, such as comfy/model_prefetch.py: all
tests then run with these in place of the checkout's own, and those marked `newer` run, too.
"""

import asyncio
import importlib
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

COMFYUI = os.environ.get("COMFYUI_PATH")
NEWER = os.environ.get("NEWER_COMFYUI_FILES")
GPU = os.environ.get("COMFYUI_DEVICE") == "cuda"


def pytest_configure(config):
    if COMFYUI and NEWER:
        folder = tempfile.TemporaryDirectory(prefix="newer_comfyui_")
        config.add_cleanup(folder.cleanup)
        lay_over(Path(COMFYUI).resolve(), Path(NEWER).resolve(), Path(folder.name))
        os.environ["COMFYUI_PATH"] = folder.name


def lay_over(checkout: Path, files: Path, into: Path) -> None:
    """Make `into` a ComfyUI of links: to the files where there is one of that name, else to the checkout."""
    newer = {file.relative_to(files) for file in files.rglob("*.py")}
    if not newer:
        raise pytest.UsageError(f"NEWER_COMFYUI_FILES: {files} has no Python file")
    for file in newer:
        (into / file).parent.mkdir(parents=True, exist_ok=True)
        (into / file).symlink_to(files / file)
    for folder in {parent for file in newer for parent in file.parents}:
        for child in (checkout / folder).iterdir():
            link = into / folder / child.name
            if not link.exists() and child.name != "__pycache__":
                link.symlink_to(child)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="COMFYUI_PATH names no ComfyUI checkout: nothing of ComfyUI is tested")
    older = pytest.mark.skip(
        reason="NEWER_COMFYUI_FILES names no files of a newer ComfyUI: what is new there is not tested"
    )
    other = pytest.mark.skip(reason="COMFYUI_DEVICE is " + ("" if GPU else "not ") + "cuda")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.comfy)
            if not COMFYUI:
                item.add_marker(skip)
            elif bool(item.get_closest_marker("gpu")) != GPU:
                item.add_marker(other)
            elif item.get_closest_marker("newer") and not NEWER:
                item.add_marker(older)


@pytest.fixture(scope="session")
def pack(pack_root):
    """The node pack with its nodes imported, ComfyUI on its device."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = not GPU
    if GPU:  # as ComfyUI's main does, before anything else of it is imported
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    importlib.import_module("utils.install_util")  # first, as in main.py: `nodes` would find comfy/utils.py
    importlib.import_module("fgattn_pack.nodes")
    return pack_root


def weights_of(kind, **options):
    """State dict of a tiny Wan 2.1 model: 2 heads of 128, random."""
    import comfy.ops
    import torch

    torch.manual_seed(0)
    model = kind(
        dim=256, ffn_dim=256, num_heads=2, text_dim=4096, operations=comfy.ops.disable_weight_init, **options
    )
    weights = {}
    for name, tensor in model.state_dict().items():
        spread = 1.0 if "modulation" in name else max(tensor.shape[-1], 1) ** -0.5
        base = torch.ones_like(tensor) if name.endswith(("norm_q.weight", "norm_k.weight")) else 0.0
        weights[name] = torch.randn(tensor.shape) * spread + base
    return weights


@pytest.fixture(scope="session")
def wan_weights(pack):
    """T2V, 3 blocks."""
    from comfy.ldm.wan.model import WanModel

    return weights_of(WanModel, model_type="t2v", num_layers=3)


@pytest.fixture
def vace(pack):
    """A ModelPatcher of VACE: 2 blocks, and one of control that runs after block 0."""
    import comfy.sd
    from comfy.ldm.wan.model import VaceWanModel

    return comfy.sd.load_diffusion_model_state_dict(
        weights_of(VaceWanModel, num_layers=2, vace_layers=1, vace_in_dim=96)
    )


@pytest.fixture
def wan(wan_weights):
    """A fresh ModelPatcher of it, loaded as a checkpoint is."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(dict(wan_weights))


@pytest.fixture(scope="session")
def sample(pack):
    """Run ComfyUI's sampler on a model, in inference mode as its executor does: 3 x 8 x 12 video tokens."""
    import comfy.sample
    import torch

    @torch.inference_mode()
    def run(model, steps=8, sampler="euler", cfg=2.0, scheduler="simple", seed=0, **options):
        noise = torch.randn(1, 16, 3, 16, 24, generator=torch.Generator().manual_seed(seed))
        text = torch.randn(2, 1, 8, 4096, generator=torch.Generator().manual_seed(seed + 1))
        positive, negative = ([[t, {}]] for t in text)
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=seed,
            **options,
        )

    return run


@pytest.fixture
def patched(pack):
    """Apply the node to a model as the graph does."""
    node = sys.modules["fgattn_pack.nodes"].FGAttnPatch

    def apply(model, threshold=1.0, tile_queries="16", tile_keys="16", warmup_steps=0, **inputs):
        from comfy_api.latest import io

        clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}})
        return clone.execute(
            model=model,
            threshold=threshold,
            tile_queries=tile_queries,
            tile_keys=tile_keys,
            warmup_steps=warmup_steps,
            **inputs,
        ).args[0]

    return apply


@pytest.fixture
def report():
    """The last run's report of a patched model."""
    return lambda model: sys.modules["fgattn_pack.nodes.patch"].patch_of(model).engine.last_report


@pytest.fixture(scope="session")
def waited():
    """Gives what a coroutine returns; in a thread, because a page test's own loop runs in this one."""
    with ThreadPoolExecutor() as pool:
        yield lambda coroutine: pool.submit(asyncio.run, coroutine).result()


@pytest.fixture(scope="session")
def classes(pack, waited):
    """All node classes, ComfyUI's extras and ours."""
    import nodes

    waited(nodes.init_builtin_extra_nodes())
    ours = sys.modules["fgattn_pack.nodes"]
    for node in (ours.FGAttnPatch, ours.FGAttnTiming, ours.FGAttnMap):
        nodes.NODE_CLASS_MAPPINGS[node.GET_SCHEMA().node_id] = node
    return nodes.NODE_CLASS_MAPPINGS
