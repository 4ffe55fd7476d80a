"""The node "FG-Attn Map": keys of one tile of queries over the video, and density by block and head."""

from comfy_api.latest import io
from PIL import Image

from ..fgattn.errors import InvalidArgument
from ..fgattn.runs.maps import TileMap
from ..fgattn.show import map_chart
from ..fgattn.show.palette import BACKGROUND
from ..fgattn.show.text import describe, percent
from .patch import patch_of
from .pictures import BLANK, guarded, preview, tensor
from .status import own_id, show


class FGAttnMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FGAttnInspect",
            display_name="FG-Attn Map",
            category="model/patch",
            description="Shows which keys one tile of queries computed, frame by frame, and how dense every "
            "block and head was. Connect the patched model, and the sampler's latent so that it draws "
            "afterwards; block, head and step may be changed without sampling again.",
            search_aliases=["fgattn", "attention map", "sparsity map", "selected keys"],
            inputs=[
                io.Model.Input("model", tooltip="The output of FG-Attn Sparse Attention that is sampled."),
                io.Latent.Input(
                    "latent", lazy=True, tooltip="The sampler's output, so that the map is drawn after it."
                ),
                io.Int.Input(
                    "block",
                    default=0,
                    min=0,
                    max=999,
                    tooltip="Transformer block, from 0; Wan 1.3B has 30, 14B has 40. In a model "
                    "that does not number its blocks: the call within a step.",
                ),
                io.Int.Input(
                    "head",
                    default=0,
                    min=0,
                    max=999,
                    tooltip="Attention head, from 0; Wan 1.3B has 12, 14B has 40.",
                ),
                io.Int.Input(
                    "step",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip="Step of the run, from 1; 0 is the last sparse one. Warm-up steps are "
                    "dense and have no map.",
                ),
                io.Int.Input(
                    "frame",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Where the tile is, among the video's tokens: frame, from 1; 0 is the "
                    "middle. In Wan models one is 4 frames of the video, the first is 1. A change "
                    "takes effect when the sampler runs again.",
                ),
                io.Int.Input(
                    "row",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Where the tile is: row of tokens, from 1; 0 is the middle. In Wan 2.1 "
                    "a row is 16 pixels high.",
                ),
                io.Int.Input(
                    "column",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Where the tile is: column of tokens, from 1; 0 is the middle. In Wan "
                    "2.1 a column is 16 pixels wide.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "map",
                    display_name="map",
                    tooltip="The video's frames: the tile, the keys "
                    "that it computed, and those that it skipped.",
                ),
                io.Image.Output(
                    "density",
                    display_name="density",
                    tooltip="Share of scores that each block and head asked for in this step.",
                ),
                io.Latent.Output("latent_out", display_name="LATENT", tooltip="The latent, unchanged."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def check_lazy_status(
        cls, *, model, block, head, step, latent=None, frame=0, row=0, column=0
    ) -> list[str]:
        """Runs before the sampler: says which tile its run shall keep, then waits for the latent."""
        if latent is not None:
            return []
        if patch := patch_of(model):
            patch.engine.watch_tile(own_id(cls) or "", (frame, row, column))
        return ["latent"]

    @classmethod
    def execute(
        cls, *, model, latent, block: int, head: int, step: int, frame: int = 0, row: int = 0, column: int = 0
    ) -> io.NodeOutput:
        key, place = own_id(cls) or "", (frame, row, column)
        text, *images = guarded(
            lambda: _draw(patch_of(model), key, block, head, step - 1, place), lambda why: (why, BLANK, BLANK)
        )
        show(own_id(cls), text)
        return io.NodeOutput(*map(tensor, images), latent, ui=preview(cls, _stacked(*images), text))


def _draw(patch, key: str, block: int, head: int, step: int, place):
    """A line of text, the map at the key's place and the densities; words instead of what cannot be drawn."""
    last, maps = (patch.engine.last_report, patch.engine.last_maps) if patch else (None, None)
    if not last or not maps:
        text = (
            "this model does not come through FG-Attn"
            if not patch
            else patch.without_run
            if not last
            else "the last run left no maps, see the log"
        )
        return text, *[map_chart.draw_message("no map", text)] * 2
    drawn = maps.place_for(key, place)
    try:
        step, found = maps.find(step, block, head, drawn)
    except InvalidArgument as error:  # the render is done: it must not be lost for a wrong number
        return str(error), *[map_chart.draw_message("no map", str(error))] * 2
    at = f"step {step + 1} of {last.scheduled}"
    density = map_chart.draw_density(maps, step, block, head, f"Density by block and head, {at}")
    if not isinstance(found, TileMap):
        text = f"block {block}, {at}: no map. {found}"
        return text, map_chart.draw_message(f"Block {block}, {at}: no map", found), density
    estimated = next((b.estimated_error for b in last.blocks if b.block == block), None)
    note = describe(last.settings)
    if estimated is not None:
        note = f"block's est. error {percent(estimated)}; {note}"
    if place != drawn:
        note = f"tile of the run before the place was changed; {note}"
    title = f"Block {block}, head {head}, {at}: keys that one tile of queries computes"
    text = (
        f"block {block}, head {head}, {at}: the tile computes {percent(found.keys(head).mean())} of the "
        f"keys, the head asks for {percent(float(found.density[head]))} of its scores"
    )
    return text, map_chart.draw_map(found, head, title, note), density


def _stacked(above: Image.Image, below: Image.Image) -> Image.Image:
    """Both pictures as one, so that each has the node's whole width; words that stand in both once."""
    if above is below:
        return above
    size = max(above.width, below.width), above.height + below.height
    both = Image.new("RGB", size, BACKGROUND)
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    return both
