"""The patch node on a real (tiny, random) Wan model, through ComfyUI's own samplers."""

import logging
import sys

import pytest
import torch
from makers import by_text

SLOT = "optimized_attention_override"
BLOCKS = 3


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def slot(model):
    return model.model_options["transformer_options"].get(SLOT)


def test_keep_all_equals_dense(wan, sample, patched, report):
    """Threshold 0 computes everything, through our own path in every block."""
    model = patched(wan, threshold=0.0)
    assert relative(sample(model), sample(wan)) < 1e-4
    assert by_text(report(model))["sparse"] == 8 * BLOCKS  # cond and uncond run as one batch
    assert report(model).density == 1.0


def test_bypass_is_bit_identical(wan, sample, patched):
    """Patching must leave the original model and its results exactly as they were."""
    options = dict(wan.model_options["transformer_options"])
    before = sample(wan)
    sample(patched(wan))
    assert torch.equal(sample(wan), before)
    assert wan.model_options["transformer_options"] == options
    assert not any(wan.wrappers.values())


def test_every_block_goes_sparse_after_warm_up(wan, sample, patched, report):
    """Two of eight steps are dense, then every self-attention is sparse and nothing else is."""
    model = patched(wan, warmup_steps=5, threshold=1.5)
    sample(model)
    last = report(model)
    assert by_text(last) == {"warm-up step": 2 * BLOCKS, "sparse": 6 * BLOCKS, "cross-attention": 8 * BLOCKS}
    assert [b.block for b in last.blocks] == list(range(BLOCKS))
    assert all(0 < b.density < 1 and b.density <= b.executed_density for b in last.blocks)
    assert [s.sparse_calls for s in last.steps] == [0, 0] + [BLOCKS] * 6
    assert last.speedup is not None


def test_sparse_changes_the_result(wan, sample, patched):
    """A negative control: at a high threshold the output must differ from dense, and stay finite."""
    out, dense = sample(patched(wan, threshold=8.0)), sample(wan)
    assert 1e-3 < relative(out, dense) < 1 and out.isfinite().all()


def test_batch_of_two_and_cfg_one(wan, sample, patched, report):
    """cfg 1 evaluates only the positive conditioning."""
    model = patched(wan)
    sample(model, cfg=1.0)
    assert by_text(report(model))["sparse"] == 8 * BLOCKS


class Recorder:
    """A foreign override that counts its calls."""

    def __init__(self, previous=None):
        self.calls, self.previous = 0, previous

    def __call__(self, func, *args, **kwargs):
        self.calls += 1
        return self.previous(func, *args, **kwargs) if self.previous else func(*args, **kwargs)


@pytest.mark.parametrize("chains", [False, True], ids=["overwrites", "chains"])
@pytest.mark.parametrize("after", [False, True], ids=["before-us", "after-us"])
def test_other_overrides_get_the_dense_calls(wan, sample, patched, report, after, chains):
    """Before or after us, chaining or not: the other override sees exactly what we decline."""
    model = wan.clone() if not after else patched(wan, warmup_steps=1)
    model.model_options["transformer_options"] = dict(model.model_options["transformer_options"])
    other = Recorder(slot(model) if chains else None)
    model.model_options["transformer_options"][SLOT] = other
    if not after:
        model = patched(model, warmup_steps=1)
    sample(model, steps=4)
    assert by_text(report(model)) == {
        "warm-up step": BLOCKS,
        "sparse": 3 * BLOCKS,
        "cross-attention": 4 * BLOCKS,
    }
    assert other.calls == BLOCKS + 4 * BLOCKS


def test_releases_without_preferences_are_not_searched_for_them(wan, sample, patched, monkeypatch):
    """A dense call costs nothing more there."""
    from comfy.ldm.modules import attention

    if hasattr(attention, "ComfyAttention"):
        pytest.skip("layers of this ComfyUI may prefer an attention of their own")
    monkeypatch.setattr(sys.modules["fgattn_pack.nodes.attention_call"], "_asking", lambda: 1 / 0)
    assert torch.equal(sample(patched(wan, min_tokens=10**6)), sample(wan))


def test_a_replaced_attention_is_not_reached_and_said(wan, sample, patched, report, monkeypatch):
    """Another node put its own function in the model's place: nothing of ours runs, and the node says so."""
    from comfy.ldm.wan import model as code

    def plain(q, k, v, heads, mask=None, **_):
        q, k, v = (
            x.take() if hasattr(x, "peek") else x for x in (q, k, v)
        )  # newer ones hand over containers
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    dense, model = sample(wan), patched(wan)
    monkeypatch.setattr(code, "optimized_attention", plain)
    torch.testing.assert_close(sample(model), dense)
    headline = sys.modules["fgattn_pack.fgattn.show.text"].headline
    assert headline(report(model)) == "attention never reached FG-Attn"


def test_an_unknown_model_runs_by_shape_alone(pack, wan, patched, sample, report, monkeypatch):
    """Raster order, with a remark that says what is lost."""
    monkeypatch.setattr(sys.modules["fgattn_pack.nodes.patch"], "video_of", lambda *_: None)
    model = patched(wan)
    sample(model)
    last = report(model)
    assert by_text(last)["sparse"] and last.remarks == (sys.modules["fgattn_pack.nodes.models"].NO_GRID,)


def test_patching_twice_replaces(wan, sample, patched, report):
    """The second node wins; the first one's override is not left in the chain."""
    model = patched(patched(wan, threshold=8.0), threshold=0.0)
    assert slot(model).previous is None
    sample(model)
    assert report(model).density == 1.0


def test_two_branches_do_not_see_each_other(wan, sample, patched, report):
    """Two patched clones of one model, sampled in turn, keep their own settings and books."""
    one, two = patched(wan, threshold=0.0), patched(wan, threshold=2.0)
    sample(one, steps=4)
    assert report(two) is None
    sample(two, steps=4)
    sample(one, steps=4)
    assert report(one).density == 1.0 > report(two).density
    assert by_text(report(one))["sparse"] == 4 * BLOCKS


def test_later_clones_share_the_patch(wan, sample, patched, report):
    """A LoRA node after ours clones the model; the patch must go along."""
    model = patched(wan)
    sample(model.clone(), steps=4)
    assert by_text(report(model))["sparse"] == 4 * BLOCKS


def test_interrupt_passes_through_and_leaves_a_clean_state(wan, sample, patched, report, monkeypatch):
    """Stopping in the middle of our path stops the render; the next prompt runs as if nothing was."""
    from comfy.model_management import InterruptProcessingException

    execute = sys.modules["fgattn_pack.fgattn.backends.execute"]
    model, build = patched(wan), execute.plan_of

    def interrupted(*args, **kwargs):
        raise InterruptProcessingException

    monkeypatch.setattr(execute, "plan_of", interrupted)
    with pytest.raises(InterruptProcessingException):
        sample(model)
    assert report(model).failure is None
    monkeypatch.setattr(execute, "plan_of", build)
    sample(model, steps=4)
    assert by_text(report(model))["sparse"] == 4 * BLOCKS


def test_unloading_the_model_gives_index_tensors_back(wan, sample, patched, report):
    """ComfyUI takes a model off its device when it needs the memory: so does what we keep for calls."""
    import comfy.model_management

    kept = sys.modules["fgattn_pack.fgattn.layout"].GEOMETRIES
    model = patched(wan)
    sample(model, steps=4)
    assert kept.nbytes > 0
    comfy.model_management.unload_all_models()
    assert kept.nbytes == 0
    sample(model, steps=4)
    assert by_text(report(model))["sparse"] == 4 * BLOCKS and kept.nbytes > 0


def test_an_exception_goes_dense_and_says_so(wan, sample, patched, report, monkeypatch, caplog):
    """A failure in our path: one traceback, text for the node, and the dense result."""
    execute = sys.modules["fgattn_pack.fgattn.backends.execute"]
    shown = []
    patch = sys.modules["fgattn_pack.nodes.patch"]
    monkeypatch.setattr(patch, "show", lambda node, text: shown.append((node, text)))
    model = patched(wan)

    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(execute, "plan_of", broken)
    with caplog.at_level(logging.ERROR, "fgattn"):
        out = sample(model, steps=4)
    assert torch.equal(out, sample(wan, steps=4))
    assert report(model).failure == "RuntimeError: out of luck"
    assert by_text(report(model)) == {
        "error": 1,
        "after an error": 4 * BLOCKS - 1,
        "cross-attention": 4 * BLOCKS,
    }
    assert [bool(r.exc_info) for r in caplog.records] == [True]
    assert shown[0] == ("1", "dense: RuntimeError: out of luck") and "out of luck" in shown[-1][1]


def test_a_failing_dense_attention_is_not_swallowed(wan, sample, patched):
    """What fails in somebody else's attention is not ours to hide."""
    model = wan.clone()

    def broken(func, *args, **kwargs):
        raise ZeroDivisionError

    model.model_options["transformer_options"][SLOT] = broken
    with pytest.raises(ZeroDivisionError):
        sample(patched(model), steps=4)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "uni_pc"])
def test_warm_up_counts_steps_not_calls(wan, sample, patched, report, sampler):
    """Samplers that evaluate several times a step: dense exactly while sigma is in the first two."""
    model, seen = patched(wan, warmup_steps=2), []

    def record(executor, *args, **kwargs):
        options = args[5]
        seen.append((options["sigmas"][0].item(), options["sample_sigmas"].tolist()))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "record", record)
    sample(model, sampler=sampler)
    dense = sum(sigma > levels[2] * 1.0001 for sigma, levels in seen)
    assert len(seen) >= 8
    assert by_text(report(model))["warm-up step"] == dense * BLOCKS
    assert by_text(report(model))["sparse"] == (len(seen) - dense) * BLOCKS


def test_warm_up_only_from_full_noise(wan, sample, patched, report):
    """A split schedule: the second sampler, and image-to-image, have no warm-up."""
    model = patched(wan, warmup_steps=2)
    sample(model, last_step=4, force_full_denoise=False)
    assert by_text(report(model))["warm-up step"] == 1 * BLOCKS  # a quarter of four steps
    sample(model, start_step=4)
    assert "warm-up step" not in by_text(report(model))
    sample(model, denoise=0.5)
    assert "warm-up step" not in by_text(report(model))


def test_full_noise_is_converted_at_run_time(wan, sample, patched, report):
    """A shift node after ours moves the schedule; what counts is the shift that is sampled."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    model = patched(wan, warmup_steps=2)
    (shifted,) = ModelSamplingSD3().patch(model, shift=1.0)
    sample(shifted, steps=8)
    assert by_text(report(model))["warm-up step"] == 2 * BLOCKS
    sample(shifted, start_step=1)  # sigma 0.875: full noise at no shift would be 0.98
    assert "warm-up step" not in by_text(report(model))


def test_final_dense_blocks_and_min_tokens(wan, sample, patched, report):
    """The advanced inputs do what their tooltips say."""
    model = patched(wan, final_dense_steps=2, dense_blocks="0, 2-9")
    sample(model)
    calls = by_text(report(model))
    assert calls["final dense step"] == 2 * BLOCKS
    assert calls["listed in dense_blocks"] == 6 * 2 and calls["sparse"] == 6
    sample(model, last_step=4, force_full_denoise=False)
    assert "final dense step" not in by_text(report(model))
    model = patched(wan, min_tokens=289)
    sample(model, steps=4)
    assert by_text(report(model)) == {"fewer than 289 tokens": 4 * BLOCKS, "cross-attention": 4 * BLOCKS}


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_call_layouts(pack, wan, patched, skip_reshape, skip_output_reshape):
    """All four layouts of ComfyUI's contract, with an explicit scale, against its own attention."""
    from comfy.ldm.modules.attention import attention_pytorch

    model = patched(wan, threshold=0.0)
    patch = sys.modules["fgattn_pack.nodes.patch"].patch_of(model)
    patch.engine.begin_run([1.0, 0.0], False, torch.device("cpu"))
    q, k, v = torch.randn(3, 2, 288, 2, 128).unbind()
    if skip_reshape:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (x.flatten(2) for x in (q, k, v))
    options = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    expected = attention_pytorch(q * (0.2 * 128**0.5), k, v, 2, **options)
    got = attention_pytorch(
        q,
        k,
        v,
        heads=2,
        scale=0.2,
        **options,
        transformer_options={
            **model.model_options["transformer_options"],
            "grid_sizes": (3, 8, 12),
            "block_index": 0,
        },
    )
    assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)
    assert by_text(patch.engine.end_run()) == {"sparse": 1}


@pytest.mark.parametrize("skip_reshape", [False, True], ids=["fused", "split"])
def test_grouped_heads_are_declined(pack, wan, patched, skip_reshape):
    """Fewer key heads than query heads, in both layouts: that call is dense, and no failure."""
    model = patched(wan)
    engine = sys.modules["fgattn_pack.nodes.patch"].patch_of(model).engine
    engine.begin_run([1.0, 0.0], False, torch.device("cpu"))
    q, k, v = (torch.randn(1, heads, 288, 64) for heads in (6, 2, 2))
    repeated = (q, *(x.repeat_interleave(3, 1) for x in (k, v)))
    expected = torch.nn.functional.scaled_dot_product_attention(*repeated).transpose(1, 2).flatten(2)
    asked = []

    def backend(q, k, v, heads, **options):
        asked.append((q.shape, k.shape, options["enable_gqa"], options["skip_reshape"]))
        return expected

    given = (q, k, v) if skip_reshape else tuple(x.transpose(1, 2).flatten(2) for x in (q, k, v))
    options = model.model_options["transformer_options"]
    got = slot(model)(
        backend, *given, heads=6, enable_gqa=True, skip_reshape=skip_reshape, transformer_options=options
    )
    assert torch.equal(got, expected) and asked == [(given[0].shape, given[1].shape, True, skip_reshape)]
    report = engine.end_run()
    assert by_text(report) == {"grouped heads (6 query heads, 2 key heads)": 1} and report.failure is None


@pytest.mark.parametrize(
    ("reason", "mask"),
    [
        ("attention mask", torch.ones(288, 288, dtype=torch.bool)),
        (
            "attention mask",
            torch.ones(1, 2, 1, 288, dtype=torch.bool),
        ),  # one per head, not per row of the batch
        ("attention bias", torch.linspace(0, 1, 288)[None]),
        ("attention mask that leaves no key", torch.zeros(1, 288, dtype=torch.bool)),
    ],
)
def test_declined_calls_have_a_reason(pack, wan, patched, reason, mask):
    """What cannot run sparse goes to ComfyUI's attention unchanged and is counted by reason."""
    from comfy.ldm.modules.attention import attention_pytorch

    model = patched(wan)
    patch = sys.modules["fgattn_pack.nodes.patch"].patch_of(model)
    patch.engine.begin_run([1.0, 0.0], False, torch.device("cpu"))
    q, k, v = torch.randn(3, 2, 288, 256).unbind()
    got = attention_pytorch(
        q, k, v, heads=2, mask=mask, transformer_options=model.model_options["transformer_options"]
    )
    assert torch.equal(got, attention_pytorch(q, k, v, heads=2, mask=mask))
    assert by_text(patch.engine.end_run()) == {reason: 1}


def separately(model, monkeypatch):
    """A cond and uncond that are not batched: two model calls an evaluation."""
    monkeypatch.setattr("comfy.samplers.can_concat_cond", lambda one, other: one is other)
    return model


@pytest.fixture
def plan_uses(pack, monkeypatch):
    """Every sparse call in order: its step, block and branch; those its plan was made for; the plan."""
    watch = sys.modules["fgattn_pack.fgattn.runs.watch"].Watch
    look, uses, made = watch.sparse, [], {}

    def sparse(self, at, call, out, plan):
        made.setdefault(id(plan), (plan, *at))
        uses.append((*at, *made[id(plan)][1:], plan))
        look(self, at, call, out, plan)

    monkeypatch.setattr(watch, "sparse", sparse)
    return uses


@pytest.mark.parametrize("batched", [True, False], ids=["one call", "two calls"])
def test_plans_serve_two_steps_of_their_branch(wan, sample, patched, report, plan_uses, monkeypatch, batched):
    """Every plan is used by its own block and conditioning, in the step it was made in and the next."""
    model = patched(wan, reuse_steps=2)
    sample(model if batched else separately(model, monkeypatch))
    calls = 1 if batched else 2  # an evaluation
    last = report(model)
    assert by_text(last)["sparse"] == 8 * BLOCKS * calls and last.failure is None and not last.remarks
    assert last.plans == {"made": 4 * BLOCKS * calls, "reused": 4 * BLOCKS * calls}
    assert len(plan_uses) == 8 * BLOCKS * calls
    for step, block, branch, made_in, made_for_block, made_for_branch, _ in plan_uses:
        assert (block, branch) == (made_for_block, made_for_branch) and made_in == step - step % 2
    branches = {branch for _, _, branch, *_ in plan_uses}
    assert len(branches) == calls
    assert all(len(uuids) == 3 - calls and window is None for uuids, window in branches)
    assert "reused" in report_text(last) and [s.planning > 0 for s in last.steps] == [True, False] * 4


def report_text(last):
    return sys.modules["fgattn_pack.fgattn.show.text"].text(last)


def test_reuse_changes_little(wan, sample, patched):
    """Plans of the step before are no longer the same choice, but a close one."""
    dense, fresh = sample(wan), sample(patched(wan))
    reused = sample(patched(wan, reuse_steps=2))
    assert not torch.equal(reused, fresh)
    assert relative(reused, dense) < 2 * relative(fresh, dense)
    keep_all = sample(patched(wan, threshold=0.0))
    assert torch.equal(sample(patched(wan, threshold=0.0, reuse_steps=8)), keep_all)


def test_plans_that_do_not_fit_are_reported(wan, sample, patched, report):
    """The result is that of fresh plans, and the report says why."""
    model = patched(wan, reuse_steps=4, reuse_memory_mb=0)
    assert torch.equal(sample(model), sample(patched(wan)))
    assert report(model).plans == {"not kept": 8 * BLOCKS}
    assert f"plans not kept: {8 * BLOCKS}, memory (reuse_memory_mb) is full" in report_text(report(model))


def test_context_windows_keep_their_own_plans(wan, sample, patched, report, plan_uses):
    """Windows of frames are evaluated one by one with the same conditioning; the plans stay apart."""
    from comfy.context_windows import (
        ContextFuseMethods,
        IndexListContextHandler,
        get_matching_context_schedule,
        get_matching_fuse_method,
    )

    model = patched(wan, reuse_steps=2)
    model.model_options["context_handler"] = IndexListContextHandler(
        context_schedule=get_matching_context_schedule("standard_static"),
        fuse_method=get_matching_fuse_method(ContextFuseMethods.PYRAMID),
        context_length=2,
        context_overlap=1,
        context_stride=1,
        closed_loop=False,
        dim=2,
    )
    sample(model)
    windows = {window for _, _, (_, window), *_ in plan_uses}
    assert windows == {(0, 1), (1, 2)}
    assert report(model).plans == {"made": 8 * BLOCKS, "reused": 8 * BLOCKS}
    for step, block, branch, made_in, made_for_block, made_for_branch, _ in plan_uses:
        assert (block, branch) == (made_for_block, made_for_branch) and made_in == step - step % 2


def tiled(model):
    """A wrapper that evaluates the left and the right half by themselves, with copies of all tensors."""

    def halves(apply_model, args):
        c, options = args["c"], args["c"]["transformer_options"]
        return torch.cat(
            [
                apply_model(
                    half,
                    args["timestep"].clone(),
                    **{**c, "transformer_options": {**options, "sigmas": options["sigmas"].clone()}},
                )
                for half in args["input"].chunk(2, -1)
            ],
            -1,
        )

    model = model.clone()
    model.set_model_unet_function_wrapper(halves)
    return model


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("told", [True, False], ids=["evaluations told", "not told"])
def test_tiles_keep_their_own_plans(wan, sample, patched, report, plan_uses, monkeypatch, sampler, told):
    """The sigmas of a tile are another tensor, but the evaluation is the same."""
    if not told:  # a guider of another node may leave out the wrappers around an evaluation
        from comfy.samplers import CFGGuider

        monkeypatch.setattr(CFGGuider, "__call__", CFGGuider.predict_noise)
    model = tiled(patched(wan, reuse_steps=8))
    sample(model, sampler=sampler)
    first = {block: plan for step, block, *_, plan in plan_uses[:BLOCKS]}
    second = {block: plan for step, block, *_, plan in plan_uses[BLOCKS : 2 * BLOCKS]}
    assert not any(first[block] is second[block] for block in range(BLOCKS))
    if told:
        assert report(model).plans["made"] == 2 * BLOCKS
        for i, (_, block, *_, plan) in enumerate(plan_uses):
            assert plan is (second if i // BLOCKS % 2 else first)[block]
    assert report(model).failure is None


def test_control_blocks_keep_their_own_plans(vace, sample, patched, report, plan_uses):
    """VACE runs a second attention under the number of block 0."""
    model = patched(vace, reuse_steps=2)
    sample(model)
    assert by_text(report(model))["sparse"] == 8 * 3
    assert report(model).plans == {"made": 4 * 3, "reused": 4 * 3}
    assert [block for _, block, *_ in plan_uses] == [0, 0, 1] * 8
    plans = [plan for *_, plan in plan_uses]
    for i in range(0, len(plans), 6):  # an even step and the next one; plans are equal only to themselves
        assert plans[i : i + 3] == plans[i + 3 : i + 6]
    assert len({id(plan) for plan in plans}) == 4 * 3


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s_ancestral"])
def test_evaluations_of_a_step_share_plans(wan, sample, patched, report, plan_uses, sampler):
    """Samplers that evaluate several times a step make a plan every other step all the same."""
    model = patched(wan, reuse_steps=2)
    sample(model, sampler=sampler)
    assert report(model).plans["made"] == 4 * BLOCKS
    assert len(plan_uses) == by_text(report(model))["sparse"] > 8 * BLOCKS
    assert all(made_in in (step - 1, step) for step, _, _, made_in, *_ in plan_uses)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, False),
        ({"uuids": []}, False),
        ({"uuids": ["a"]}, True),
        ({"uuids": ["a"], "context_window": object()}, False),
    ],
    ids=["none", "empty", "uuid", "unknown window"],
)
def test_branch_of_a_call(pack, options, known):
    """What cannot be told apart is unknown, and its plans are not kept."""
    assert (sys.modules["fgattn_pack.nodes.models"].call_branch(options) is not None) == known
