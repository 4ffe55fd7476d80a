"""Write the example workflows: `python example_workflows/make.py`. A test compares them with this script."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

WAN = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
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
    model: tuple[str, str] | None = None  # URL below WAN, folder


# Widgets in the order of the node's inputs; KSampler's second one is the frontend's seed control.
WAN_T2V = {
    "unet": Node("UNETLoader", (0, 0), (390, 82), widgets=["wan2.1_t2v_1.3B_fp16.safetensors", "default"],
                 outputs=[("MODEL", "MODEL")],
                 model=("diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", "diffusion_models")),
    "clip": Node("CLIPLoader", (0, 140), (390, 106),
                 widgets=["umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", "default"],
                 outputs=[("CLIP", "CLIP")],
                 model=("text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders")),
    "vae": Node("VAELoader", (0, 300), (390, 60), widgets=["wan_2.1_vae.safetensors"],
                outputs=[("VAE", "VAE")], model=("vae/wan_2.1_vae.safetensors", "vae")),
    "positive": Node("CLIPTextEncode", (430, 620), (400, 140), {"clip": ("clip", 0, "CLIP")},
                     ["a fox running through a snowy forest, trees and mountains, tracking camera"],
                     [("CONDITIONING", "CONDITIONING")], "Positive prompt"),
    "negative": Node("CLIPTextEncode", (430, 820), (400, 140), {"clip": ("clip", 0, "CLIP")}, [NEGATIVE],
                     [("CONDITIONING", "CONDITIONING")], "Negative prompt"),
    "shift": Node("ModelSamplingSD3", (430, 0), (210, 58), {"model": ("unet", 0, "MODEL")}, [8.0],
                  [("MODEL", "MODEL")]),
    "fgattn": Node("FGAttnPatch", (430, 110), (400, 450), {"model": ("shift", 0, "MODEL")},
                   [1.0, "128", "16", 2, 0, "", 0, True, "cells", "threshold", 0.0, 1, 1200, False],
                   [("MODEL", "MODEL")]),
    "size": Node("EmptyHunyuanLatentVideo", (0, 420), (390, 130), widgets=[832, 480, 81, 1],
                 outputs=[("LATENT", "LATENT")], title="Size and length"),
    "sampler": Node("KSampler", (870, 0), (315, 262), {
        "model": ("fgattn", 0, "MODEL"), "positive": ("positive", 0, "CONDITIONING"),
        "negative": ("negative", 0, "CONDITIONING"), "latent_image": ("size", 0, "LATENT"),
    }, [1, "fixed", 30, 6.0, "uni_pc", "simple", 1.0], [("LATENT", "LATENT")]),
    "timing": Node("FGAttnTiming", (1225, 0), (480, 790),
                   {"model": ("fgattn", 0, "MODEL"), "latent": ("sampler", 0, "LATENT")},
                   outputs=[("LATENT", "LATENT"), ("report", "STRING"), ("chart", "IMAGE")]),
    "decode": Node("VAEDecode", (870, 310), (210, 46),
                   {"samples": ("timing", 0, "LATENT"), "vae": ("vae", 0, "VAE")},
                   outputs=[("IMAGE", "IMAGE")]),
    "video": Node("CreateVideo", (870, 400), (270, 78), {"images": ("decode", 0, "IMAGE")}, [16.0],
                  [("VIDEO", "VIDEO")]),
    "save": Node("SaveVideo", (870, 530), (315, 106), {"video": ("video", 0, "VIDEO")},
                 ["video/fgattn", "auto", "auto"]),
}
WORKFLOWS = {"wan2.1_t2v": WAN_T2V}


def workflow(nodes: dict[str, Node]) -> dict:
    """The graph in the frontend's file format."""
    ids = {name: i for i, name in enumerate(nodes, 1)}
    links = [[0, ids[source], slot, ids[name], i, kind]
             for name, node in nodes.items() for i, (source, slot, kind) in enumerate(node.links.values())]
    for number, link in enumerate(links, 1):
        link[0] = number
    drawn = []
    for order, (name, node) in enumerate(nodes.items()):
        entry = {
            "id": ids[name], "type": node.kind, "pos": list(node.at), "size": list(node.size), "flags": {},
            "order": order, "mode": 0,
            "inputs": [{"name": given, "type": kind, "link": next(
                n for n, _, _, target, slot, _ in links if (target, slot) == (ids[name], i))}
                for i, (given, (_, _, kind)) in enumerate(node.links.items())],
            "outputs": [{"name": given, "type": kind, "slot_index": i, "links": [
                n for n, source, slot, _, _, _ in links if (source, slot) == (ids[name], i)]}
                for i, (given, kind) in enumerate(node.outputs)],
            "properties": {"Node name for S&R": node.kind}, "widgets_values": node.widgets,
        }
        if node.title:
            entry["title"] = node.title
        if node.model:
            path, folder = node.model
            entry["properties"]["models"] = [
                {"name": path.split("/")[-1], "url": f"{WAN}/{path}", "directory": folder}]
        drawn.append(entry)
    return {"last_node_id": len(drawn), "last_link_id": len(links), "nodes": drawn, "links": links,
            "groups": [], "config": {}, "extra": {}, "version": 0.4}


def text(name: str) -> str:
    return json.dumps(workflow(WORKFLOWS[name]), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for each in WORKFLOWS:
        (Path(__file__).parent / f"{each}.json").write_text(text(each), encoding="utf-8")
