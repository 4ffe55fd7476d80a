"""Write the example workflows: `python example_workflows/make.py`. A test compares them with this script."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

HUB = "https://huggingface.co"
WAN = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
HUNYUAN = f"{HUB}/Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files"
CLIP_L = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors"
PROMPT = "a fox running through a snowy forest, trees and mountains, tracking camera"
NEGATIVE = "overexposed, static, blurred details, subtitles, worst quality, JPEG artefacts, deformed"


@dataclass
class Node:
    """One node: where it stands, its links (input name -> (node, output slot, type)) and its widgets."""

    kind: str
    at: tuple[int, int]
    size: tuple[int, int]
    links: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    widgets: list = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)  # name, type
    title: str | None = None
    models: tuple[tuple[str, str], ...] = ()  # (URL, folder below models/)


# Widgets in the order of the node's inputs; a seed is followed by the frontend's seed control.
PATCH = [1.0, "128", "16", 2, 0, "", 0, True, "cells", "threshold", 0.0, 1, 1200, True, False]
MODEL, IMAGE, LATENT = [("MODEL", "MODEL")], [("IMAGE", "IMAGE")], [("LATENT", "LATENT")]
CONDITIONING = [("CONDITIONING", "CONDITIONING")]


def unet(url: str, at: tuple[int, int], title: str | None = None) -> Node:
    name = url.rpartition("/")[2]
    return Node(
        "UNETLoader",
        at,
        (390, 82),
        widgets=[name, "default"],
        outputs=MODEL,
        title=title,
        models=((url, "diffusion_models"),),
    )


def wan_text(top: int) -> dict[str, Node]:
    """Text encoder, VAE and size in the left column, the prompts below; from `top` downwards.

    The Vue renderer draws nodes up to 90 px higher than their size says, with what hangs below them.
    """
    encoder = f"{WAN}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    return {
        "clip": Node(
            "CLIPLoader",
            (0, top),
            (390, 106),
            outputs=[("CLIP", "CLIP")],
            widgets=["umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", "default"],
            models=((encoder, "text_encoders"),),
        ),
        "vae": vae(f"{WAN}/vae/wan_2.1_vae.safetensors", (0, top + 190)),
        "size": Node(
            "EmptyHunyuanLatentVideo",
            (0, top + 345),
            (390, 130),
            widgets=[832, 480, 81, 1],
            outputs=LATENT,
            title="Size and length",
        ),
        "positive": prompt((0, top + 570), PROMPT, "Positive prompt"),
        "negative": prompt((0, top + 750), NEGATIVE, "Negative prompt"),
    }


def vae(url: str, at: tuple[int, int]) -> Node:
    return Node(
        "VAELoader",
        at,
        (390, 60),
        widgets=[url.rpartition("/")[2]],
        outputs=[("VAE", "VAE")],
        models=((url, "vae"),),
    )


def prompt(at: tuple[int, int], words: str, title: str) -> Node:
    return Node("CLIPTextEncode", at, (390, 130), {"clip": ("clip", 0, "CLIP")}, [words], CONDITIONING, title)


def shift(source: str, at: tuple[int, int], value: float) -> Node:
    return Node("ModelSamplingSD3", at, (400, 58), {"model": (source, 0, "MODEL")}, [value], MODEL)


def patch(source: str, at: tuple[int, int], title: str | None = None) -> Node:
    return Node("FGAttnPatch", at, (400, 490), {"model": (source, 0, "MODEL")}, [*PATCH], MODEL, title)


def timing(at: tuple[int, int], latent: str, *models: str) -> Node:
    links = {name: (source, 0, "MODEL") for name, source in zip(("model", "model_2"), models, strict=False)}
    order = ["model", "latent", "model_2"][: 1 + len(models)]
    links["latent"] = latent, 0, "LATENT"
    return Node(
        "FGAttnTiming",
        at,
        (480, 790),
        {name: links[name] for name in order},
        outputs=[*LATENT, ("report", "STRING"), ("chart", "IMAGE")],
    )


def attention_map(at: tuple[int, int], latent: str, model: str) -> Node:
    """Block, head and step 0: the first of both, the last sparse step."""
    return Node(
        "FGAttnInspect",
        at,
        (480, 790),
        {"model": (model, 0, "MODEL"), "latent": (latent, 0, "LATENT")},
        [0] * 6,
        [("map", "IMAGE"), ("density", "IMAGE"), *LATENT],
    )


def sampler(model: str, at: tuple[int, int], title: str | None = None) -> Node:
    return Node(
        "KSampler",
        at,
        (315, 262),
        {
            "model": (model, 0, "MODEL"),
            "positive": ("positive", 0, "CONDITIONING"),
            "negative": ("negative", 0, "CONDITIONING"),
            "latent_image": ("size", 0, "LATENT"),
        },
        [1, "fixed", 30, 6.0, "uni_pc", "simple", 1.0],
        LATENT,
        title,
    )


def stage(model: str, latent: str, at: tuple[int, int], title: str, widgets: list) -> Node:
    """One of two samplers."""
    return Node(
        "KSamplerAdvanced",
        at,
        (315, 334),
        {
            "model": (model, 0, "MODEL"),
            "positive": ("positive", 0, "CONDITIONING"),
            "negative": ("negative", 0, "CONDITIONING"),
            "latent_image": (latent, 0, "LATENT"),
        },
        widgets,
        LATENT,
        title,
    )


def decode(latent: str, at: tuple[int, int], title: str | None = None) -> Node:
    return Node(
        "VAEDecode",
        at,
        (315, 46),
        {"samples": (latent, 0, "LATENT"), "vae": ("vae", 0, "VAE")},
        outputs=IMAGE,
        title=title,
    )


def blend(one: str, two: str, mode: str, at: tuple[int, int], title: str) -> Node:
    return Node(
        "ImageBlend",
        at,
        (315, 102),
        {"image1": (one, 0, "IMAGE"), "image2": (two, 0, "IMAGE")},
        [1.0, mode],
        IMAGE,
        title,
    )


def beside(one: str, two: str, at: tuple[int, int], title: str) -> Node:
    return Node(
        "ImageStitch",
        at,
        (315, 150),
        {"image1": (one, 0, "IMAGE"), "image2": (two, 0, "IMAGE")},
        ["right", True, 0, "white"],
        IMAGE,
        title,
    )


def video(images: str, at: tuple[int, int], rate: float, name: str) -> dict[str, Node]:
    x, y = at
    return {
        "video": Node(
            "CreateVideo", at, (315, 78), {"images": (images, 0, "IMAGE")}, [rate], [("VIDEO", "VIDEO")]
        ),
        "save": Node(
            "SaveVideo",
            (x, y + 160),
            (315, 106),
            {"video": ("video", 0, "VIDEO")},
            [f"video/{name}", "auto", "auto"],
        ),
    }


WAN_13B = f"{WAN}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors"
WAN_T2V = {
    "unet": unet(WAN_13B, (0, 0)),
    **wan_text(170),
    "shift": shift("unet", (430, 0), 8.0),
    "fgattn": patch("shift", (430, 140)),
    "sampler": sampler("fgattn", (870, 0)),
    "timing": timing((1225, 0), "sampler", "fgattn"),
    "map": attention_map((1745, 0), "sampler", "fgattn"),
    "decode": decode("timing", (870, 390)),
    **video("decode", (870, 520), 16.0, "fgattn"),
}
WAN22_T2V = {
    "high": unet(
        f"{WAN22}/diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", (0, 0), "High noise"
    ),
    "low": unet(
        f"{WAN22}/diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", (0, 170), "Low noise"
    ),
    **wan_text(340),
    "shift_high": shift("high", (430, 0), 8.0),
    "shift_low": shift("low", (430, 740), 8.0),
    "fgattn_high": patch("shift_high", (430, 140), "FG-Attn, high noise"),
    "fgattn_low": patch("shift_low", (430, 880), "FG-Attn, low noise"),
    "first": stage(
        "fgattn_high",
        "size",
        (870, 0),
        "First steps, high noise",
        ["enable", 1, "fixed", 20, 3.5, "euler", "simple", 0, 10, "enable"],
    ),
    "second": stage(
        "fgattn_low",
        "first",
        (870, 740),
        "Last steps, low noise",
        ["disable", 0, "fixed", 20, 3.5, "euler", "simple", 10, 10000, "disable"],
    ),
    "timing": timing((1225, 0), "second", "fgattn_high", "fgattn_low"),
    "decode": decode("timing", (1745, 0)),
    **video("decode", (1745, 130), 16.0, "fgattn"),
}
HUNYUAN_T2V = {
    "unet": unet(f"{HUNYUAN}/diffusion_models/hunyuan_video_t2v_720p_bf16.safetensors", (0, 0)),
    "clip": Node(
        "DualCLIPLoader",
        (0, 170),
        (390, 130),
        widgets=["clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors", "hunyuan_video", "default"],
        outputs=[("CLIP", "CLIP")],
        models=(
            (CLIP_L, "text_encoders"),
            (f"{HUNYUAN}/text_encoders/llava_llama3_fp8_scaled.safetensors", "text_encoders"),
        ),
    ),
    "vae": vae(f"{HUNYUAN}/vae/hunyuan_video_vae_bf16.safetensors", (0, 390)),
    "size": Node(
        "EmptyHunyuanLatentVideo",
        (0, 545),
        (390, 130),
        widgets=[848, 480, 73, 1],
        outputs=LATENT,
        title="Size and length",
    ),
    "positive": prompt((0, 770), PROMPT, "Prompt"),
    "guidance": Node(
        "FluxGuidance",
        (0, 950),
        (390, 58),
        {"conditioning": ("positive", 0, "CONDITIONING")},
        [6.0],
        CONDITIONING,
    ),
    "shift": shift("unet", (430, 0), 7.0),
    "fgattn": patch("shift", (430, 140)),
    "noise": Node("RandomNoise", (870, 0), (315, 82), widgets=[1, "fixed"], outputs=[("NOISE", "NOISE")]),
    "guider": Node(
        "BasicGuider",
        (870, 140),
        (315, 46),
        {"model": ("fgattn", 0, "MODEL"), "conditioning": ("guidance", 0, "CONDITIONING")},
        outputs=[("GUIDER", "GUIDER")],
    ),
    "method": Node(
        "KSamplerSelect", (870, 270), (315, 58), widgets=["euler"], outputs=[("SAMPLER", "SAMPLER")]
    ),
    "steps": Node(
        "BasicScheduler",
        (870, 410),
        (315, 106),
        {"model": ("fgattn", 0, "MODEL")},
        ["simple", 20, 1.0],
        [("SIGMAS", "SIGMAS")],
    ),
    "sampler": Node(
        "SamplerCustomAdvanced",
        (870, 620),
        (315, 106),
        {
            "noise": ("noise", 0, "NOISE"),
            "guider": ("guider", 0, "GUIDER"),
            "sampler": ("method", 0, "SAMPLER"),
            "sigmas": ("steps", 0, "SIGMAS"),
            "latent_image": ("size", 0, "LATENT"),
        },
        outputs=[("output", "LATENT"), ("denoised_output", "LATENT")],
    ),
    "timing": timing((1225, 0), "sampler", "fgattn"),
    "decode": Node(
        "VAEDecodeTiled",
        (870, 830),
        (315, 150),
        {"samples": ("timing", 0, "LATENT"), "vae": ("vae", 0, "VAE")},
        [256, 64, 64, 8],
        IMAGE,
    ),
    **video("decode", (870, 1060), 24.0, "fgattn"),
}
# |a - b| is the screen of both clamped differences; the screen of a picture with itself doubles what is dark.
COMPARE = {
    "unet": unet(WAN_13B, (0, 0)),
    **wan_text(170),
    "shift": shift("unet", (430, 0), 8.0),
    "fgattn": patch("shift", (430, 140)),
    "dense": sampler("shift", (870, 0), "Dense"),
    "sparse": sampler("fgattn", (870, 400), "Sparse"),
    "timing": timing((1225, 0), "sparse", "fgattn"),
    "dense_frames": decode("dense", (870, 800), "Dense frames"),
    "sparse_frames": decode("timing", (870, 920), "Sparse frames"),
    "more": blend("dense_frames", "sparse_frames", "difference", (1745, 0), "Dense - sparse"),
    "less": blend("sparse_frames", "dense_frames", "difference", (1745, 195), "Sparse - dense"),
    "apart": blend("more", "less", "screen", (1745, 390), "Difference"),
    "twice": blend("apart", "apart", "screen", (1745, 585), "Difference x 2"),
    "fourfold": blend("twice", "twice", "screen", (1745, 780), "Difference x 4"),
    "pair": beside("dense_frames", "sparse_frames", (2100, 0), "Dense | sparse"),
    "three": beside("pair", "fourfold", (2100, 240), "Dense | sparse | difference x 4"),
    **video("three", (2100, 480), 16.0, "fgattn_compare"),
}
WORKFLOWS = {
    "wan2.1_t2v": WAN_T2V,
    "wan2.2_t2v_two_stage": WAN22_T2V,
    "hunyuan_video_t2v": HUNYUAN_T2V,
    "wan2.1_dense_and_sparse": COMPARE,
}


def workflow(nodes: dict[str, Node]) -> dict:
    """The graph in the frontend's file format."""
    ids = {name: i for i, name in enumerate(nodes, 1)}
    links = [
        [0, ids[source], slot, ids[name], i, kind]
        for name, node in nodes.items()
        for i, (source, slot, kind) in enumerate(node.links.values())
    ]
    for number, link in enumerate(links, 1):
        link[0] = number
    drawn = []
    for order, (name, node) in enumerate(nodes.items()):
        entry = {
            "id": ids[name],
            "type": node.kind,
            "pos": list(node.at),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [
                {
                    "name": given,
                    "type": kind,
                    "link": next(n for n, _, _, target, slot, _ in links if (target, slot) == (ids[name], i)),
                }
                for i, (given, (_, _, kind)) in enumerate(node.links.items())
            ],
            "outputs": [
                {
                    "name": given,
                    "type": kind,
                    "slot_index": i,
                    "links": [n for n, source, slot, _, _, _ in links if (source, slot) == (ids[name], i)],
                }
                for i, (given, kind) in enumerate(node.outputs)
            ],
            "properties": {"Node name for S&R": node.kind},
            "widgets_values": node.widgets,
        }
        if node.title:
            entry["title"] = node.title
        if node.models:
            entry["properties"]["models"] = [
                {"name": url.rpartition("/")[2], "url": url, "directory": folder}
                for url, folder in node.models
            ]
        drawn.append(entry)
    return {
        "last_node_id": len(drawn),
        "last_link_id": len(links),
        "nodes": drawn,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def text(name: str) -> str:
    return json.dumps(workflow(WORKFLOWS[name]), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for each in WORKFLOWS:
        (Path(__file__).parent / f"{each}.json").write_text(text(each), encoding="utf-8")
