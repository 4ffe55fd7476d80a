"""Whole runs in ComfyUI on a GPU: the demo model at 480p length through ComfyUI's loader and sampler.

    COMFYUI_DEVICE=cuda COMFYUI_PATH=... python -m pytest -s tests/comfy/test_gpu_runs.py

Each test prints what it measured; docs/compatibility.md names these tests.
"""

import contextlib
import functools
import statistics
import sys
from itertools import pairwise

import pytest
import torch
from makers import by_text

pytestmark = pytest.mark.gpu
SIZE = (1, 16, 21, 60, 104)  # 32 760 tokens
BLOCKS, WARMUP = 8, 2
STATE = {}


@pytest.fixture(autouse=True)
def poison():
    """Not here: times are measured."""


@pytest.fixture
def load(pack):
    """The demo model as a checkpoint is loaded, in a type of weights."""
    import comfy.sd
    from fgattn_pack.fgattn.demo.quantise import load_model

    def make(dtype=torch.bfloat16):
        if not STATE:
            STATE.update(load_model().state_dict())
        return comfy.sd.load_diffusion_model_state_dict(dict(STATE), model_options={"dtype": dtype})

    return make


@pytest.fixture
def run(pack, report):
    """Sample a model: the latent, milliseconds of a step after warm-up, the report if there is one."""
    import comfy.sample
    from fgattn_pack.fgattn.demo.scenes import conditioning

    def sample(model, steps=20, size=SIZE, seed=2):
        noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        text = conditioning(seed)
        marks = []

        def tick(*_):
            torch.cuda.synchronize()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

        latent = comfy.sample.sample(
            model,
            noise,
            steps,
            3.0,
            "euler",
            "simple",
            [[text, {}]],
            [[torch.zeros_like(text), {}]],
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=seed,
            callback=tick,
        )
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(marks)]
        assert latent.isfinite().all()
        return latent[0].float().cpu(), statistics.median(times[WARMUP:] or [0.0])

    return sample


def psnr(latent, expected):
    from fgattn_pack.fgattn.demo.generate import psnr as of
    from fgattn_pack.fgattn.demo.scenes import to_rgb

    return of(to_rgb(latent), to_rgb(expected))


def apply(patched, model, **inputs):
    """The node at its defaults."""
    return patched(model, **{"tile_queries": "128", "warmup_steps": WARMUP} | inputs)


def compiled(model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model, backend="inductor")
    return model


@pytest.mark.parametrize(
    ("dtype", "change"),
    [(torch.bfloat16, None), (torch.float8_e4m3fn, None), (torch.bfloat16, compiled)],
    ids=["bf16", "fp8", "bf16, TorchCompileModel with inductor"],
)
def test_480p(load, run, patched, report, dtype, change, request):
    """20 steps dense and sparse: every block sparse after warm-up, faster, and close."""
    model = load(dtype)
    change = change or (lambda model: model)
    ours = change(apply(patched, model))
    run(ours, steps=8)  # compiles
    dense, dense_ms = run(change(model))
    sparse, sparse_ms = run(ours)
    last = report(ours)
    print(
        f"\n{request.node.callspec.id}: step {dense_ms:.1f} -> {sparse_ms:.1f} ms, attention call "
        f"{last.dense_call:.2f} -> {last.sparse_call:.2f} ms ({last.speedup:.2f} x), "
        f"density {last.density:.3f}, PSNR {psnr(sparse, dense):.1f} dB, "
        f"peak {last.peak_memory / 2**20:.0f} MiB, {last.implementation}"
    )
    assert last.failure is None and not last.remarks
    assert {k: n for k, n in by_text(last).items() if k != "cross-attention"} == {
        "warm-up step": WARMUP * BLOCKS,
        "sparse": (20 - WARMUP) * BLOCKS,
    }
    assert last.speedup > 1.3 and sparse_ms < dense_ms and psnr(sparse, dense) > 28


def test_threshold_0_is_dense(load, run, patched, report):
    """Everything is computed, by our kernel where min_tokens says so; by the rule it is left dense."""
    model = load()
    dense, _ = run(model, steps=4)
    ours = apply(patched, model, threshold=0.0, warmup_steps=0, min_tokens=1)
    same, _ = run(ours, steps=4)
    assert by_text(report(ours))["sparse"] == 4 * BLOCKS
    ruled = apply(patched, model, threshold=0.0, warmup_steps=0)
    left, _ = run(ruled, steps=4)
    print(f"\nthreshold 0: {psnr(same, dense):.1f} dB; by the rule {dict(by_text(report(ruled)))}")
    assert psnr(same, dense) > 38 and psnr(left, dense) > 38
    assert by_text(report(ruled))["sparse"] == BLOCKS
    assert by_text(report(ruled))["too many scores kept for sparse to be faster"] == 3 * BLOCKS


def test_runs_repeat(load, run, patched):
    """The same prompt gives the same bits, plans kept or not."""
    for inputs in ({}, {"reuse_steps": 2}, {"threshold": 0.3}):
        ours = apply(patched, load(), **inputs)
        assert torch.equal(run(ours, steps=8)[0], run(ours, steps=8)[0])


def test_short_videos_are_left_dense(load, run, patched, report):
    """1 560 tokens: the break-even rule, with its reason on the node."""
    ours = apply(patched, load())
    run(ours, steps=4, size=(1, 16, 1, 60, 104))
    assert set(by_text(report(ours))) == {"too few tokens for sparse to be faster", "cross-attention"}


@pytest.mark.parametrize("inputs", [{}, {"reuse_steps": 4}, {"tile_keys": "1"}], ids=str)
def test_memory_after_ten_runs(load, run, patched, inputs):
    """VRAM after ten runs equals VRAM after one."""
    ours, after = apply(patched, load(), **inputs), []
    for seed in range(10):
        run(ours, steps=4, seed=seed)
        after.append(torch.cuda.memory_allocated())
    print(f"\n{inputs}: {after[0] / 2**20:.1f} MiB after one run, {after[-1] / 2**20:.1f} after ten")
    assert after[-1] == after[0]


def test_peak_memory(load, run, patched, report):
    """A sparse run needs hardly more at its peak than a dense one: the summaries and bits of one call."""
    peaks, model = {}, load()
    ours = apply(patched, model, warmup_steps=0, min_tokens=1)
    for name, one in (("dense", model), ("sparse", ours)):
        run(one, steps=2)  # weights are loaded, kernels compiled
        torch.cuda.reset_peak_memory_stats()
        run(one, steps=2)
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    print(f"\npeak memory: dense {peaks['dense']:.0f} MiB, sparse {peaks['sparse']:.0f} MiB")
    assert by_text(report(ours))["sparse"] == 2 * BLOCKS
    assert peaks["sparse"] <= 1.05 * peaks["dense"]


def test_a_full_gpu(load, run, patched, report):
    """Out of memory in our path: fewer heads at a time, then dense, never the end of the render."""
    total = torch.cuda.get_device_properties(0).total_memory

    @contextlib.contextmanager
    def only(free):
        """As on a GPU that has so much left when our call begins."""
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + free) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    model, latents, ended = load(), [], []
    for free in (4096, 160, 128, 112, 96, 88, 80, 72, 64, 1):
        ours = apply(patched, model, tile_queries="16", tile_keys="1", warmup_steps=1)
        patch = sys.modules["fgattn_pack.nodes.patch"].patch_of(ours)
        patch.engine.scope = functools.partial(only, free << 20)
        latents.append(run(ours, steps=4)[0])
        last = report(ours)
        ended.append("dense" if last.failure else "fewer heads" if last.remarks else "sparse")
        assert not last.failure or "OutOfMemoryError" in last.failure
        assert by_text(last)["warm-up step"] == BLOCKS
        print(
            f"\n{free} MiB free: {ended[-1]}, {dict(by_text(last))}, {psnr(latents[-1], latents[0]):.1f} dB"
        )
    assert ended == sorted(ended, key=["sparse", "fewer heads", "dense"].index)
    assert {*ended} == {"sparse", "fewer heads", "dense"}


@pytest.mark.parametrize(
    "mode", ["--novram", "--novram, no async offload", "--lowvram, nothing fits", "dynamic VRAM"]
)
def test_memory_modes(load, run, patched, report, monkeypatch, mode):
    """Offloaded weights: the same result, as sparse as ever."""
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher

    expected, normal_ms = run(apply(patched, load()), steps=8)
    management.unload_all_models()
    if mode == "dynamic VRAM":
        import comfy_aimdo.control

        if not comfy_aimdo.control.init_device(management.get_torch_device().index):
            pytest.skip("comfy-aimdo does not work here")
        monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    else:
        state = management.VRAMState.LOW_VRAM if "low" in mode else management.VRAMState.NO_VRAM
        monkeypatch.setattr(management, "vram_state", state)
        if "nothing fits" in mode:
            monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", management.get_total_memory())
        if "no async" in mode:
            monkeypatch.setattr(management, "NUM_STREAMS", 0)
    ours = apply(patched, load())
    got, ms = run(ours, steps=8)
    loaded = ours.loaded_size() / ours.model_size()
    management.unload_all_models()
    print(
        f"\n{mode}: {loaded:.0%} of the weights resident, step {normal_ms:.1f} -> {ms:.1f} ms, "
        f"{'the same bits' if torch.equal(got, expected) else f'{psnr(got, expected):.1f} dB'}"
    )
    assert mode == "dynamic VRAM" or loaded < 0.1
    assert psnr(got, expected) > 40
    assert report(ours).failure is None and by_text(report(ours))["sparse"] == (8 - WARMUP) * BLOCKS
