"""The ComfyUI side of FG-Attn; the only place that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from . import recent, sliders
from .maps import FGAttnMap
from .sparse_attention import FGAttnPatch
from .status import prompt_server
from .timing import FGAttnTiming


class FGAttnExtension(ComfyExtension):
    async def on_load(self) -> None:
        if server := prompt_server():
            recent.serve(server)
            sliders.serve(server)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [FGAttnPatch, FGAttnTiming, FGAttnMap]
