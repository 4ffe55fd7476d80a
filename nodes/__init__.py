"""The ComfyUI side of FG-Attn; the only place that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .sparse_attention import FGAttnPatch
from .timing import FGAttnTiming


class FGAttnExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [FGAttnPatch, FGAttnTiming]
