"""The adapters against the real classes of every model family, tiny and random, on the CPU.

A latent patch is changed, and the one query that moves with it in the first block says where its token
stands: the adapter must agree. docs/compatibility.md names these tests.
"""

import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from makers import by_text

SLOT = "optimized_attention_override"


def wan(name, module="wan.model", **settings):
    return lambda: build(
        module,
        name,
        **{"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "text_dim": 64, "in_dim": 16}
        | settings,
    )


def of(module, name, *settings):
    merged = {key: value for part in settings for key, value in part.items()}
    return lambda: build(module, name, **merged)


def build(module, name, **settings):
    """A model class of comfy.ldm with random weights."""
    import comfy.ops

    model = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)(
        **settings, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    generator = torch.Generator().manual_seed(0)
    if name == "MiniMaxH3Model":  # of the checkpoint, otherwise
        model.rope.inv_freq = 10000 ** -torch.linspace(0, 1, 16)
    for tensor in model.parameters():
        spread = 1.0 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
        tensor.data = torch.randn(tensor.shape, generator=generator) * spread
    return model.eval().requires_grad_(False)


HUNYUAN = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 48,
    "hidden_size": 256,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [16, 56, 56],
    "theta": 256,
    "patch_size": [1, 2, 2],
    "qkv_bias": True,
    "guidance_embed": False,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
HUNYUAN_15 = {
    "patch_size": [1, 1, 1],
    "vec_in_dim": None,
    "use_cond_type_embedding": True,
    "depth_single_blocks": 0,
}
COSMOS = {
    "max_img_h": 64,
    "max_img_w": 64,
    "max_frames": 16,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "num_blocks": 2,
    "num_heads": 2,
    "model_channels": 256,
    "crossattn_emb_channels": 48,
    "mlp_ratio": 2.0,
    "pos_emb_cls": "rope3d",
    "concat_padding_mask": False,
}
COSMOS_1 = {
    "affline_emb_norm": True,
    "block_x_format": "THWBD",
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
KANDINSKY = {
    "model_dim": 256,
    "ff_dim": 256,
    "in_visual_dim": 16,
    "visual_embed_dim": 64,
    "num_visual_blocks": 2,
    "num_text_blocks": 1,
    "in_text_dim": 48,
    "in_text_dim2": 32,
    "axes_dims": (32, 48, 48),
}
LTX = {
    "in_channels": 16,
    "cross_attention_dim": 128,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "caption_channels": 48,
    "num_layers": 2,
}
LTX_AV = {
    "audio_in_channels": 128,
    "audio_cross_attention_dim": 64,
    "audio_attention_head_dim": 32,
    "audio_num_attention_heads": 2,
    "use_audio_video_cross_attention": True,
}
MOCHI = {  # mlp_ratio_x: the class insists on one hidden size
    "in_channels": 16,
    "hidden_size_x": 256,
    "hidden_size_y": 128,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio_x": 48.0,
    "mlp_ratio_y": 2.0,
    "use_t5": True,
    "t5_feat_dim": 48,
    "t5_token_length": 7,
    "learn_sigma": False,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
}
FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 48,
    "hidden_size": 256,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
QWEN = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
}
MINIMAX = {
    "hidden_size": 256,
    "num_layers": 2,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 2,
    "ffn_hidden_size": 256,
    "text_dim": 48,
    "time_embed_hidden_size": 64,
    "time_embed_dim": 64,
}
LATENT, TEXT = (1, 16, 3, 12, 16), {"context": (1, 7, 48)}
WAN_TEXT = {"context": (1, 7, 64)}


class Family(NamedTuple):
    model: Callable
    latent: tuple  # 3 x 6 x 8 video tokens; images 6 x 8
    inputs: dict  # shapes of further inputs
    blocks: int  # with self-attention over the video
    front: int = 0  # tokens beside the video's
    back: int = 0
    newer: bool = False  # than ComfyUI 0.19.3


FAMILIES = {
    "Wan 2.1 and 2.2 T2V": Family(wan("WanModel"), LATENT, WAN_TEXT, 2),
    "Wan I2V": Family(wan("WanModel", model_type="i2v", in_dim=36), (1, 36, 3, 12, 16), WAN_TEXT, 2),
    "Wan with a full reference": Family(
        wan("WanModel", in_dim_ref_conv=16), LATENT, WAN_TEXT | {"reference_latent": (1, 16, 12, 16)}, 2, 48
    ),
    "Wan VACE": Family(
        wan("VaceWanModel", model_type="vace", vace_layers=2, vace_in_dim=96),
        LATENT,
        WAN_TEXT | {"vace_context": (1, 1, 96, 3, 12, 16), "vace_strength": [1.0]},
        4,
    ),
    "Wan Camera": Family(
        wan("CameraWanModel", model_type="camera", in_dim_control_adapter=24), LATENT, WAN_TEXT, 2
    ),
    "Wan S2V": Family(
        wan("WanModel_S2V", audio_inject_layers=[0], cond_dim=16),
        LATENT,
        WAN_TEXT | {"reference_latent": (1, 16, 1, 12, 16)},
        2,
        back=48,
    ),
    "Wan HuMo": Family(
        wan("HumoWanModel"), LATENT, WAN_TEXT | {"reference_latent": (1, 16, 1, 12, 16)}, 2, back=48
    ),
    "Wan SCAIL": Family(
        wan("SCAILWanModel"), LATENT, WAN_TEXT | {"pose_latents": (1, 16, 3, 6, 8)}, 2, back=36
    ),
    "Wan Animate": Family(wan("AnimateWanModel", "wan.model_animate", num_layers=5), LATENT, WAN_TEXT, 5),
    "HunyuanVideo": Family(
        of("hunyuan_video.model", "HunyuanVideo", HUNYUAN), LATENT, TEXT | {"y": (1, 32)}, 5, 7
    ),
    "HunyuanVideo with a text mask": Family(
        of("hunyuan_video.model", "HunyuanVideo", HUNYUAN),
        LATENT,
        TEXT | {"y": (1, 32), "attention_mask": 4},
        5,
        7,
    ),
    "HunyuanVideo 1.5": Family(
        of("hunyuan_video.model", "HunyuanVideo", HUNYUAN, HUNYUAN_15), (1, 16, 3, 6, 8), TEXT, 2, 7
    ),
    "Kandinsky 5": Family(of("kandinsky5.model", "Kandinsky5", KANDINSKY), LATENT, TEXT | {"y": (1, 32)}, 2),
    "LTXV": Family(
        of("lightricks.model", "LTXVModel", LTX), (1, 16, 3, 6, 8), TEXT | {"attention_mask": 7}, 2
    ),
    "LTX-2, video of video and audio": Family(
        of("lightricks.av_model", "LTXAVModel", LTX, LTX_AV),
        (1, 16, 3, 6, 8),
        {"context": (1, 7, 96), "attention_mask": 7, "audio": (1, 8, 5, 16)},
        2,
    ),
    "Cosmos 1": Family(of("cosmos.model", "GeneralDIT", COSMOS, COSMOS_1), LATENT, TEXT | {"fps": [24.0]}, 2),
    "Cosmos Predict2": Family(of("cosmos.predict2", "MiniTrainDIT", COSMOS), LATENT, TEXT, 2),
    "Mochi": Family(
        of("genmo.joint_model.asymm_models_joint", "AsymmDiTJoint", MOCHI),
        LATENT,
        TEXT | {"attention_mask": 7},
        2,
        back=7,
    ),
    "Flux": Family(of("flux.model", "Flux", FLUX), (1, 16, 12, 16), TEXT | {"y": (1, 32)}, 4, 7),
    "Qwen-Image": Family(
        of("qwen_image.model", "QwenImageTransformer2DModel", QWEN), (1, 16, 1, 12, 16), TEXT, 2, 7
    ),
    "MiniMax-H3": Family(
        of("minimax.model", "MiniMaxH3Model", MINIMAX),
        (1, 24, 3, 12, 16),
        TEXT | {"audio": (1, 32, 2, 5)},
        2,
        7 + 2 * 5,
        newer=True,
    ),
    "Wan Animate 2 without a pose": Family(
        wan("WanAnimate2Model", "wan.model_animate2", in_dim=36), (1, 36, 3, 12, 16), WAN_TEXT, 2, newer=True
    ),
    "Wan Dancer": Family(
        wan("WanDancerModel", "wan.model_wandancer", in_dim=36, audio_inject_layers=[0]),
        (1, 36, 3, 12, 16),
        WAN_TEXT | {"audio_embed": (1, 12, 35)},
        2,
        newer=True,
    ),
    "causal Wan, all frames at once": Family(
        wan("CausalWanModel", "wan.ar_model"), LATENT, WAN_TEXT, 2, newer=True
    ),
}


def inputs(shapes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        if name == "attention_mask":  # that many of 7 text tokens count
            made[name] = (torch.arange(7) < shape).long()[None]
        elif isinstance(shape, list):
            made[name] = torch.tensor(shape) if name == "fps" else shape
        else:
            made[name] = torch.randn(shape, generator=generator)
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, pack):
    return ready(request.param)


def ready(name, **more):
    """A family's model and its inputs, with more of these than its row has."""
    from comfy.utils import pack_latents

    of = FAMILIES[name]
    try:
        model = of.model()
    except ModuleNotFoundError as missing:
        if of.newer:
            pytest.skip(f"this ComfyUI is older than {name}: {missing}")
        raise
    made, latent = (
        inputs(of.inputs | more),
        torch.randn(of.latent, generator=torch.Generator().manual_seed(2)),
    )
    x, shapes = latent, None
    if "audio" in made:  # ComfyUI hands both around as one tensor
        x, shapes = pack_latents([latent, made.pop("audio")])
    return SimpleNamespace(**of._asdict() | {"model": model}, x=x, shapes=shapes, made=made)


@pytest.fixture
def evaluate(pack):
    """One evaluation of a family's model through a patch, as by ComfyUI's samplers: output and report."""
    from comfy.utils import pack_latents, unpack_latents

    nodes = sys.modules["fgattn_pack.nodes.patch"]
    settings = sys.modules["fgattn_pack.fgattn.settings"]

    def run(family, x=None, threshold=None, record=None, more=()):
        options = {"sigmas": torch.ones(1), "cond_or_uncond": [0], **dict(more)}

        class Executor:
            class_obj = SimpleNamespace(diffusion_model=family.model)

            def __call__(self, x, t, *_, transformer_options, latent_shapes=None, **conditions):
                x = unpack_latents(x, latent_shapes) if latent_shapes else x
                t = conditions.pop("timestep", t)  # by token, where there are guides
                out = family.model(x, t, transformer_options=transformer_options, **conditions)
                return pack_latents(out)[0] if latent_shapes else out

        args = (family.x if x is None else x), torch.ones(1)
        rest = {"transformer_options": options, **family.made}
        rest |= {"latent_shapes": family.shapes} if family.shapes else {}
        with torch.no_grad():
            if threshold is None:
                return Executor()(*args, **rest), None
            patch = nodes.Patch(
                settings.Settings(threshold=threshold, tile_queries=16, tile_keys=16),
                settings.Policy(warmup_steps=0),
            )
            if record is not None:
                attention = patch.engine.attention_of
                patch.engine.attention_of = lambda tensors, **call: (
                    record.append((tensors()[0], call)),
                    attention(tensors, **call),
                )[1]
            patch.engine.begin_run([1.0, 0.0], False, torch.device("cpu"))
            options[SLOT] = nodes.Override(patch.engine, patch.thread, None)
            return patch.apply_model(Executor(), *args, **rest), patch.engine.end_run()

    return run


def test_every_video_self_attention_and_nothing_else(family, evaluate):
    """All blocks run sparse, each under its own number; text refiners, cross-attention and audio do not."""
    record = []
    _, report = evaluate(family, threshold=1.0, record=record)
    assert report.failure is None and not report.remarks
    assert by_text(report)["sparse"] == family.blocks
    assert set(by_text(report)) <= {"sparse", "cross-attention", "self-attention of other tokens"}
    numbers = [call["block"] for _, call in record]
    assert numbers == [None] * len(numbers) or sorted(set(numbers)) == list(range(max(numbers) + 1))


def test_keep_all_equals_dense(family, evaluate):
    """Threshold 0 computes what the model's own attention does, masks included."""
    got, _ = evaluate(family, threshold=0.0)
    expected, _ = evaluate(family)
    assert expected.isfinite().all() and expected.std() > 0
    assert ((got - expected).norm() / expected.norm()).item() < 1e-4


def test_the_grid_is_where_the_tokens_are(family, evaluate):
    """A patch of the latent moves one query of the first block: the one that the layout says."""
    axes = (*family.latent[2:-2], 6, 8)  # latent frames are frames of tokens
    t, h, w = (1, *axes)[-3:]
    size = [n // tokens for n, tokens in zip(family.latent[2:], axes, strict=True)]
    base = []
    evaluate(family, threshold=0.0, record=base)
    for place in ((0, 0, 0), (t - 1, h - 1, w - 1), (t // 2, 1, w // 2)):
        spot = tuple(slice(p * s, (p + 1) * s) for p, s in zip(place[-len(size) :], size, strict=True))
        change, moved = torch.zeros(family.latent), []
        change[(..., *spot)] = 1.0
        flat = torch.nn.functional.pad(change.flatten(), (0, family.x.numel() - change.numel()))
        evaluate(family, family.x + flat.view(family.x.shape), threshold=0.0, record=moved)
        (first, call), (second, _) = base[0], moved[0]
        layout = call["layout"]
        padding = len(layout.absent)  # of the text, in front
        assert layout.grid == (t, h, w)
        assert (layout.front, layout.back) == (family.front, family.back)
        assert padding == (7 - 4 if "attention_mask" in family.inputs and family.front else 0)
        changed = (first != second).any(-1).any(1)[0].nonzero().flatten().tolist()
        assert changed == [family.front + (place[0] * h + place[1]) * w + place[2]]


def inside(model, name):
    """A wrapper of an unknown class, such as those that spread a model over devices."""
    wrapper = torch.nn.Module()
    wrapper.forward = model.forward
    wrapper.add_module(name, model)
    return wrapper


@pytest.mark.parametrize("name", ["HunyuanVideo", "Wan SCAIL"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: inside(model, "module"),
        lambda model: inside(torch.compile(model, backend="eager"), "only_part"),
    ],
    ids=["compiled", "module", "compiled, as the only part"],
)
def test_a_model_inside_wrappers(evaluate, name, wrap):
    """It has the grid, sinks and block numbers that it has by itself, and the same output."""
    family, plain, wrapped = ready(name), [], []
    expected, _ = evaluate(family, threshold=1.0, record=plain)
    family.model = wrap(family.model)
    got, report = evaluate(family, threshold=1.0, record=wrapped)
    places = [[(str(call["layout"]), call["block"]) for _, call in calls] for calls in (plain, wrapped)]
    assert places[0] == places[1] and (family.front, family.back) != (0, 0)
    assert torch.equal(got, expected) and not report.remarks


@pytest.mark.parametrize("dropped", [0, 36, 47], ids=["same grid", "smaller grid", "one token is left"])
@pytest.mark.parametrize("name", ["LTXV", "LTX-2, video of video and audio"])
def test_ltx_guides(evaluate, name, dropped):
    """The last frame is a guide. On a smaller grid the model keeps some of its tokens: these are sinks."""
    family = ready(name)
    family.made["keyframe_idxs"] = torch.rand(1, 3, 48, 2) * 8
    mask = torch.ones(1, 1, 3, 48)
    mask[..., 2, 48 - dropped :] = -1
    family.made |= {"denoise_mask": mask.view(1, 1, 3, 6, 8), "timestep": torch.ones(1, 3 * 48)}
    if "audio" in family.inputs:
        family.made["timestep"] = family.made["timestep"], torch.ones(1, 5)
    record = []
    got, report = evaluate(family, threshold=0.0, record=record)
    assert by_text(report)["sparse"] == 2 and not report.remarks
    layout = record[0][1]["layout"]
    assert (layout.grid, layout.back) == (((2, 6, 8), 48 - dropped) if dropped else ((3, 6, 8), 0))
    expected, _ = evaluate(family)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-4
    assert evaluate(family, threshold=8.0)[0].isfinite().all()


def test_wan_animate_2_with_a_pose(evaluate):
    """The pose pass has other tokens, and frames are computed one by one: all dense."""
    family = ready("Wan Animate 2 without a pose", pose_latents=(1, 16, 2, 12, 16))
    got, report = evaluate(family, threshold=1.0)
    assert torch.equal(got, evaluate(family)[0])
    crossed = 2 * 3 + 2 * 2 * 2  # blocks, frames; blocks, passes, text and image
    assert by_text(report) == {"self-attention of other tokens": 2, "cross-attention": crossed}


def test_causal_wan_frame_by_frame(evaluate, pack):
    """With cached keys attention gets no options of the model: never reached, and the node says so."""
    family = ready("causal Wan, all frames at once")
    text = sys.modules["fgattn_pack.fgattn.show.text"]

    def state():
        caches = family.model.init_kv_caches(1, 3 * 48, "cpu", torch.float32)
        crossed = family.model.init_crossattn_caches(1, "cpu", torch.float32)
        return {"ar_state": {"start_frame": 0, "kv_caches": caches, "crossattn_caches": crossed}}

    expected, _ = evaluate(family, more=state())
    got, report = evaluate(family, threshold=1.0, more=state())
    assert torch.equal(got, expected) and text.headline(report) == "attention never reached FG-Attn"


@pytest.mark.parametrize(
    ("front", "back", "removed", "expected"),
    [
        (7, 0, [[4, 5, 6]], (4, 5, 6)),
        (0, 5, [[10, 12]], (10, 12)),
        (7, 0, [[4], [4]], (4,)),
        (7, 0, [[4], [5]], None),
        (7, 0, [[8]], None),
    ],
    ids=["front", "back", "rows alike", "rows differ", "in the video"],
)
def test_padding_beside_the_video(pack, front, back, removed, expected):
    """It is left out where that is one shorter sequence; else its keys are masked."""
    models = sys.modules["fgattn_pack.nodes.models"]
    layout = sys.modules["fgattn_pack.fgattn.layout"].TokenLayout((2, 2, 2), front, back)
    valid = torch.ones(len(removed), layout.length, dtype=torch.bool)
    for row, tokens in zip(valid, removed, strict=True):
        row[tokens] = False
    found = models.without_padding(layout, valid)
    assert (found and found.absent) == expected


@pytest.mark.parametrize(
    ("index", "expected"), [(3, 5), (None, None), ("3", None), (torch.tensor(3), None), ([3], None)], ids=str
)
def test_a_block_has_a_number(pack, index, expected):
    """Single blocks come after two double ones; what is no number is unknown."""
    models = sys.modules["fgattn_pack.nodes.models"]
    options = {"block_index": index, "block_type": "single"}
    assert models.call_block(options, models.Video((1, 2, 2), "front", 2)) == expected
