"""The ComfyUI side of FG-Attn; the only place that imports ComfyUI."""

import logging

from comfy_api.latest import ComfyExtension, io

from . import recent, sliders
from .maps import FGAttnMap
from .sparse_attention import FGAttnPatch
from .status import prompt_server
from .timing import FGAttnTiming

log = logging.getLogger("fgattn")


class FGAttnExtension(ComfyExtension):
    async def on_load(self) -> None:
        server = prompt_server()
        for routes in (recent, sliders) if server else ():
            try:
                routes.serve(server)
            except Exception:  # the nodes work without
                log.exception("FG-Attn could not add %s to ComfyUI's server", routes.ROUTE)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [FGAttnPatch, FGAttnTiming, FGAttnMap]
